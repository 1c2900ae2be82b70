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
LINK_BYTES = 64 << 20
NOT_CONVERGED = "convergence"
"""The field of the error of a pre-copy that was given up at its deadline: planners try another way by it."""


class Sync(Value, frozen=True, kw_only=True):
    """The last dirty-bitmap sync that was seen."""

    passes: int = 0
    at: float = 0.0
    remaining: int = 1 << 62
    dirtied: int = 0
    """Bytes that were found to be touched anew by the syncs after the first, each page once per pass."""
    dirtied_since: float = 0.0
    """When the first of the passes began that `dirtied` is of."""


class Verdict(StrEnum):
    WAIT = "wait"
    SWITCH = "switch"
    GIVE_UP = "give-up"


def seen(sync: Sync, progress: MigrationProgress, now: float) -> Sync:
    if progress.passes == sync.passes:
        return sync
    begun = sync.passes > 0
    return Sync(
        passes=progress.passes,
        at=now,
        remaining=progress.remaining,
        dirtied=sync.dirtied + progress.remaining if begun else 0,
        dirtied_since=sync.dirtied_since if begun else now,
    )


def dirty_rate(sync: Sync) -> int | None:
    """Bytes a second, over all passes that were seen from end to end; None if there was none."""
    seconds = sync.at - sync.dirtied_since
    return int(sync.dirtied / seconds) if seconds > 0 else None


def link_rate(progress: MigrationProgress, elapsed: float) -> int | None:
    """Bytes a second that went over the link; None if too few did to tell it from the start and the end."""
    enough = progress.transferred >= LINK_BYTES and elapsed > 0
    return int(progress.transferred / elapsed) if enough else None


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
