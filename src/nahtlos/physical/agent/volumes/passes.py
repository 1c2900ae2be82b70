"""When a guest whose memory is saved while it runs is made to stand still. Pure.

Each pass over what it has written since the last one is shorter, as long as it is saved faster than the guest
writes; once a pass is not, nothing is won by another one. What is left then is what it stands still for.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

LITTLE = 8 << 20
"""Bytes nobody notices the time of."""
SHRINKS = 0.8
"""A pass that leaves more than this share of the last one's is not worth a further one."""
PASSES = 30
SLOWEST = 16 << 20
"""Bytes a second, where nothing was measured yet."""
STEADY = 3
"""Passes in a row that were not worth it."""


class Verdict(StrEnum):
    GO_ON = "go-on"
    STOP = "stop"
    GIVE_UP = "give-up"


@dataclass
class Passes:
    """`seconds`: the longest the guest may stand still; `room`: bytes there are for all of it."""

    seconds: float
    room: int
    memory: int
    _pass: int = 0
    _left: list[int] = field(default_factory=list[int])
    _at: float = 0.0
    _sent: int = 0
    rate: float = 0.0
    """Bytes a second, as fast as it was seen."""

    def seen(self, *, passes: int, left: int, sent: int, now: float) -> Verdict:
        """At a look: the number of the pass, what is left of it, and what was sent in all, in bytes."""
        since, begun = sent - self._sent, passes - self._pass
        if self._at and now > self._at and since > 0:
            self.rate = max(self.rate, since / (now - self._at))
        self._at, self._sent = now, sent
        if not begun:
            return Verdict.GO_ON
        self._pass = passes
        # It may be seen long after it began: what was sent since the last look is at most what is gone of it.
        left = max(left, since // begun)
        if passes < 2:
            return Verdict.GO_ON  # all of it is left
        self._left.append(left)
        if left <= LITTLE:
            return Verdict.STOP
        if not self._is_steady() and sent + 2 * left < self.room and passes < PASSES:
            return Verdict.GO_ON
        return Verdict.STOP if self.takes(left) <= self.seconds else Verdict.GIVE_UP

    def takes(self, left: int) -> float:
        """Seconds."""
        return left / max(self.rate, SLOWEST)

    @property
    def left(self) -> int:
        """At the beginning of the last pass."""
        return self._left[-1] if self._left else self.memory

    def _is_steady(self) -> bool:
        last = self._left[-STEADY - 1 :]
        if len(last) <= STEADY:
            return False
        return all(now > SHRINKS * before for before, now in pairwise(last))
