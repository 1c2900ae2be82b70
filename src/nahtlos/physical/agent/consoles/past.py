"""What a server's console has said, counted by one offset over all the VMMs that have run it. Pure.

    history |------- given up -------|===== Past.data =====|===== log of the VMM by Past.epoch =====
    offset  0                      start                  end                           end + size

A history begins with the first VMM of a server, and anew where what was said before could not come along:
then offsets of another history mean nothing.
"""

from typing import NamedTuple

from nahtlos.model.values import Value
from nahtlos.physical.ports import CONSOLE_KEPT


class Past(Value, frozen=True, kw_only=True):
    history: str
    epoch: int
    """By which the VMM runs the server whose log follows."""
    end: int = 0
    """Offset at which that log begins."""
    data: bytes = b""
    """What comes before `end`, as far as it is kept."""

    @property
    def start(self) -> int:
        return self.end - len(self.data)

    def followed_by(self, tail: bytes, size: int, epoch: int) -> "Past":
        """The log has ended with `size` bytes, of which `tail` are the last; the one of `epoch` follows."""
        whole = self.data + tail if len(tail) == size else tail
        return Past(history=self.history, epoch=epoch, end=self.end + size, data=whole[-CONSOLE_KEPT:])


class Piece(NamedTuple):
    """What is to be read: `limit` bytes from `offset`, which is in the past, or in the log."""

    offset: int
    limit: int
    in_past: bool


def piece(past: Past, size: int, *, history: str, offset: int, limit: int) -> Piece:
    """What whoever has read until `offset` of `history` (empty: this one) gets next, when the log has `size`
    bytes. Never more than one of the two at a time."""
    end = past.end + size
    oldest = max(past.start, end - CONSOLE_KEPT)
    begin = min(max(offset, oldest), end) if history in ("", past.history) else oldest
    if begin < past.end:
        return Piece(begin, min(limit, past.end - begin), in_past=True)
    return Piece(begin, min(limit, end - begin), in_past=False)
