"""What is decided about a copy that runs beside writes, and what is told of it. Pure."""

from enum import StrEnum

import msgspec

from nahtlos.model.storage import CopyPhase, CopyProgress

RATE_SECONDS = 2.0
"""The rate that is told is that of the last so many seconds."""


class Act(StrEnum):
    BEGIN = "begin"
    """Nothing copies: from the start."""
    WAIT = "wait"
    COMPLETE = "complete"
    FORWARD = "forward"
    """It was completed: from here on there is no way back."""


def next_act(phase: CopyPhase) -> Act:
    match phase:
        case CopyPhase.NONE | CopyPhase.FAILED:
            return Act.BEGIN
        case CopyPhase.COPYING:
            return Act.WAIT
        case CopyPhase.READY:
            return Act.COMPLETE
        case CopyPhase.DONE:
            return Act.FORWARD


class Pace(msgspec.Struct, frozen=True):
    """How fast it goes: bytes copied since some moment."""

    at: float = 0.0
    done: int = 0
    rate: float = 0.0
    """Bytes a second."""
    moved_at: float = 0.0
    """When it last came forward."""

    def seen(self, now: float, progress: CopyProgress) -> "Pace":
        if progress.done < self.done or not self.at:
            return Pace(now, progress.done, 0.0, now)
        moved = now if progress.done > self.done else self.moved_at
        if now - self.at < RATE_SECONDS:
            return msgspec.structs.replace(self, moved_at=moved)
        return Pace(now, progress.done, (progress.done - self.done) / (now - self.at), moved)


def fraction(progress: CopyProgress) -> float:
    return min(1.0, progress.done / progress.total) if progress.total else 0.0


def told(progress: CopyProgress, pace: Pace, where: str) -> str:
    """For people: how far, how fast, how long yet."""
    text = f"{where} to take {progress.total >> 20} MiB, {progress.done >> 20} of them there"
    if pace.rate >= 1:
        left = max(0, progress.total - progress.done) / pace.rate
        text += f", {pace.rate / (1 << 20):.1f} MiB/s, about {left:.0f} s left"
    return f"{text} ({progress.error})" if progress.error else text
