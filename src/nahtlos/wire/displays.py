"""A server's display through its agent: one connection to the VMM, whose bytes (RFB) are asked for and given.

Who asks for no more than it can pass on needs no other flow control.
"""

from nahtlos.model.ids import ServerId
from nahtlos.wire.message import Message


class DisplayOpen(Message, frozen=True, kw_only=True):
    """Answered with DisplayOpened. Forgotten by the agent when nobody reads it for half a minute."""

    server: ServerId


class DisplayOpened(Message, frozen=True, kw_only=True):
    display: str


class DisplayRead(Message, frozen=True, kw_only=True):
    """Answered with DisplayData as soon as there is something, or after `wait` seconds with nothing."""

    display: str
    wait: float
    limit: int


class DisplayData(Message, frozen=True, kw_only=True):
    data: bytes
    ended: bool = False
    """The VMM has closed, or the server is not here any more."""


class DisplayWrite(Message, frozen=True, kw_only=True):
    display: str
    data: bytes


class DisplayClose(Message, frozen=True, kw_only=True):
    display: str
