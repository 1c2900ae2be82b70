"""When to switch: pure decisions about a pre-copy that is watched from outside.

The source never stops by itself (switchover-ack is never given), so it can be held at the best moment:
just after a sync of the dirty bitmap that left little to send. Late in a pass `remaining` is stale (one
move that trusted it had 969 ms left to send), so a fresh sync is asked for.
"""

from enum import StrEnum

from nahtlos.model.values import Value
from nahtlos.physical.ports import MigrationPhase, MigrationProgress

MIN_PASSES = 2
FRESH_SECONDS = 0.012
NEAR_BYTES = 4 << 20
NEAR_AT_SYNC_BYTES = 8 << 20
SETTLE_SECONDS = 8.0
"""After that, a switch that costs at most FORCED_PAUSE_SECONDS is taken instead of a better one."""
FORCED_PAUSE_SECONDS = 0.3


class Sync(Value, frozen=True, kw_only=True):
    """The last dirty-bitmap sync that was seen."""

    passes: int = 0
    at: float = 0.0
    remaining: int = 1 << 62


class Verdict(StrEnum):
    WAIT = "wait"
    SWITCH = "switch"
    GIVE_UP = "give-up"


def seen(sync: Sync, progress: MigrationProgress, now: float) -> Sync:
    if progress.passes == sync.passes:
        return sync
    return Sync(passes=progress.passes, at=now, remaining=progress.remaining)


def verdict(
    sync: Sync, progress: MigrationProgress, *, now: float, started: float, deadline: float
) -> Verdict:
    """`now` and `started` in seconds of one clock; `deadline` in seconds after the start."""
    if progress.phase is MigrationPhase.ACTIVE and progress.passes >= MIN_PASSES:
        if (
            now - sync.at <= FRESH_SECONDS
            and progress.remaining <= NEAR_BYTES
            and sync.remaining <= NEAR_AT_SYNC_BYTES
        ):
            return Verdict.SWITCH
        if now - started > SETTLE_SECONDS and _forced_pause(progress, now - started) <= FORCED_PAUSE_SECONDS:
            return Verdict.SWITCH
    return Verdict.GIVE_UP if now - started > deadline else Verdict.WAIT


def _forced_pause(progress: MigrationProgress, elapsed: float) -> float:
    """Seconds it would take to send what remains at the mean rate so far."""
    rate = progress.transferred / elapsed if elapsed > 0 else 0.0
    return progress.remaining / rate if rate > 0 else float("inf")


def fraction(progress: MigrationProgress) -> float:
    """0.0 to 1.0 of the first pass, for people to look at."""
    if progress.passes >= MIN_PASSES or progress.total == 0:
        return 1.0 if progress.passes >= MIN_PASSES else 0.0
    return min(1.0, 1.0 - progress.remaining / progress.total)
