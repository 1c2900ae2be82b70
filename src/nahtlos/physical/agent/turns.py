"""Whose turn it is on one host to be switched: of many moves, one at a time is between the switch of its path
and the run of its guest, so that none pays for another's with its blackout.

A turn is a courtesy and nothing rests on it: who cannot get one in time goes ahead without. So it is never
written down, it ends by itself when nobody asks for it any more, and an agent that was started again knows of
none. Owns the line of one host; where a move needs the turns of two, `SwitchTurn` asks for both.

    free -> holder (asks again within LEASE_SECONDS) -> given back, or not asked for -> the next in line
"""

from nahtlos.model.ids import OperationId
from nahtlos.model.values import Value

LEASE_SECONDS = 3.0
"""A turn, or a place in the line, that is not asked for again that long is gone. Longer than a switch takes,
during which nobody asks."""


class Place(Value, frozen=True, kw_only=True):
    operation: OperationId
    asked_at: float


class Line(Value, frozen=True, kw_only=True):
    """Who has the turn, and who waits for it, first come first."""

    holder: Place | None = None
    waiting: tuple[Place, ...] = ()


def asked(line: Line, operation: OperationId, now: float) -> Line:
    """`operation` wants the turn, or keeps what it has: it holds the turn after that, or is in the line."""
    line = without_lapsed(line, now)
    mine = Place(operation=operation, asked_at=now)
    if line.holder is not None and line.holder.operation == operation:
        return Line(holder=mine, waiting=line.waiting)
    if any(place.operation == operation for place in line.waiting):
        waiting = tuple(mine if place.operation == operation else place for place in line.waiting)
    else:
        waiting = (*line.waiting, mine)
    return _moved_up(Line(holder=line.holder, waiting=waiting), operation)


def _moved_up(line: Line, asking: OperationId) -> Line:
    """Only who asks is given a turn: it would not be used by anybody else."""
    first = line.waiting[0]
    if line.holder is None and first.operation == asking:
        return Line(holder=first, waiting=line.waiting[1:])
    return line


def given_back(line: Line, operation: OperationId) -> Line:
    holder = line.holder
    return Line(
        holder=None if holder is not None and holder.operation == operation else holder,
        waiting=tuple(place for place in line.waiting if place.operation != operation),
    )


def ahead(line: Line, operation: OperationId) -> int:
    """How many in the line come before `operation`, without who has the turn."""
    before = [place.operation for place in line.waiting]
    return before.index(operation) if operation in before else 0


def without_lapsed(line: Line, now: float) -> Line:
    since = now - LEASE_SECONDS
    holder = line.holder
    return Line(
        holder=holder if holder is not None and holder.asked_at >= since else None,
        waiting=tuple(place for place in line.waiting if place.asked_at >= since),
    )


class Turns:
    """The line of this host. Times are seconds of one clock that never goes back."""

    def __init__(self) -> None:
        self._line = Line()

    def ask(self, operation: OperationId, now: float) -> bool:
        """Whether it has the turn. To be asked again, at least every LEASE_SECONDS, until it has, and while
        it keeps it."""
        self._line = asked(self._line, operation, now)
        holder = self._line.holder
        return holder is not None and holder.operation == operation

    def give_back(self, operation: OperationId) -> None:
        """Whether it held it, waited for it, or neither."""
        self._line = given_back(self._line, operation)

    def ahead(self, operation: OperationId) -> int:
        return ahead(self._line, operation)

    def is_anothers(self, operation: OperationId, now: float) -> bool:
        """Whether somebody else than `operation` has the turn."""
        holder = without_lapsed(self._line, now).holder
        return holder is not None and holder.operation != operation

    @property
    def holder(self) -> OperationId | None:
        return self._line.holder.operation if self._line.holder is not None else None
