"""The base of all nouns."""

import msgspec


class Value(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """Immutable, compared by content, unknown fields ignored when decoded."""
