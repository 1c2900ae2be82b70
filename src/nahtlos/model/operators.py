"""Operators, as they are listed."""

import msgspec


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """An operator, and by how many tokens it can prove itself. Tokens are not kept, only their digests."""

    name: str
    tokens: int
