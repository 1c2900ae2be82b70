"""The base of all messages, apart from them so that each subject can have its own module."""

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that is sent."""
