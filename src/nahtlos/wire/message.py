"""The base of all messages, and what several subjects say: apart, so that each can have its own module."""

from enum import StrEnum

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that is sent."""


class Decision(StrEnum):
    """The destination's, of a move."""

    UNDECIDED = "undecided"
    COMMITTED = "committed"
    """It owns what moves, durably."""
    ABANDONED = "abandoned"
    """It will never own it by this operation, durably."""
