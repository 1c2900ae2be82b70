"""When to switch: pure decisions about a pre-copy that is watched from outside.

The source never stops by itself (switchover-ack is never given), so it can be held at the best moment:
just after a sync of the dirty bitmap that left little to send. Late in a pass `remaining` is stale (one
move that trusted it had 969 ms left to send), so a fresh sync is asked for, always. Nothing is switched of
which it is known that sending the rest would take longer than the server's budget allows.
"""

from enum import StrEnum

import msgspec

from nahtlos.model.blackout import HANDOVER_SECONDS
from nahtlos.model.values import Value
from nahtlos.physical.agent.convergence import (
    Course,
    Measure,
    Permitted,
    is_due,
    link_speed,
    makes_no_progress,
    never_sent_once,
    next_measure,
)
from nahtlos.physical.ports import MigrationPhase, MigrationProgress

MIN_PASSES = 2
FRESH_SECONDS = 0.012
SOONEST_LOOK, LATEST_LOOK = 0.002, 0.02
NEAR_BYTES = 4 << 20
NEAR_AT_SYNC_BYTES = 8 << 20
SETTLE_SECONDS = 8.0
"""After that, or once there is no progress any more, a switch that costs at most the budget, without one at
most FORCED_PAUSE_SECONDS, is taken instead of a better one."""
FORCED_PAUSE_SECONDS = 0.3
LONGEST_PASS_SECONDS = 2.0
"""What follows a server is least at the end of a pass; no longer is waited for that."""
LINK_BYTES = 64 << 20
NOT_CONVERGED = "convergence"
"""The field of the error of a pre-copy that was given up: planners try another way by it."""


class Sync(Value, frozen=True, kw_only=True):
    """The last dirty-bitmap sync that was seen."""

    passes: int = 0
    at: float = 0.0
    remaining: int = 1 << 62
    dirtied: int = 0
    """Bytes that were found to be touched anew by the syncs after the first, each page once per pass."""
    dirtied_since: float = 0.0
    """When the first of the passes began that `dirtied` is of."""
    in_flight: int = 0
    """Bytes sent before it that were still on their way."""
    touched: int = 0
    """Bytes the server is to touch until it stands still."""


class Verdict(StrEnum):
    WAIT = "wait"
    SWITCH = "switch"
    MEASURE = "measure"
    """It will not end as it goes: the next of the permitted measures is to be taken."""
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


def with_to_come(sync: Sync, in_flight: int, touched: int | None) -> Sync:
    """`touched`: bytes a second, as measured while nothing was sent. Passes that last long find less, for a
    page that is touched twice counts once."""
    rate = max(touched or 0, dirty_rate(sync) or 0)
    return msgspec.structs.replace(sync, in_flight=in_flight, touched=int(rate * HANDOVER_SECONDS))


def to_send(sync: Sync, progress: MigrationProgress) -> int:
    """Bytes that the blackout waits for; no page counts twice."""
    left = progress.remaining + sync.touched
    return sync.in_flight + (min(left, progress.total) if progress.total else left)


def dirty_rate(sync: Sync) -> int | None:
    """Bytes a second, over all passes that were seen from end to end; None if there was none."""
    seconds = sync.at - sync.dirtied_since
    return int(sync.dirtied / seconds) if seconds > 0 else None


def link_rate(course: Course, progress: MigrationProgress, elapsed: float) -> int | None:
    """Bytes a second that went over the link; None if too few did to tell it from the start and the end. Of
    the pass that sent most: between passes, and until a good moment has come, nothing is sent at all."""
    most = max(course.passes, key=lambda p: p.sent, default=None)
    if most is not None and most.sent >= LINK_BYTES and most.seconds > 0:
        return int(most.sent / most.seconds)
    enough = progress.transferred >= LINK_BYTES and elapsed > 0
    return int(progress.transferred / elapsed) if enough else None


def verdict(
    sync: Sync,
    progress: MigrationProgress,
    *,
    now: float,
    started: float,
    deadline: float,
    course: Course | None = None,
    permitted: Permitted | None = None,
) -> Verdict:
    """`now` and `started` in seconds of one clock; `deadline` in seconds after the start."""
    course, permitted = course or Course(since=started), permitted or Permitted()
    fresh = now - sync.at <= FRESH_SECONDS
    if Measure.POST_COPY in course.taken:
        soon = fresh and progress.passes >= MIN_PASSES
        return Verdict.SWITCH if soon or now - course.since > LONGEST_PASS_SECONDS else Verdict.WAIT
    if progress.phase is MigrationPhase.ACTIVE and progress.passes >= MIN_PASSES:
        settled = now - started > SETTLE_SECONDS or makes_no_progress(course, now)
        if (
            fresh
            and (_near(sync, progress) or settled)
            and _affordable(sync, progress, permitted, course, now - started)
        ):
            return Verdict.SWITCH
    if is_due(course, progress, permitted):
        return Verdict.MEASURE
    late = now - started > deadline
    stuck = fresh and makes_no_progress(course, now)
    stuck = stuck or never_sent_once(course, progress, now, started + deadline)
    if not late and not stuck:
        return Verdict.WAIT
    return Verdict.GIVE_UP if next_measure(course, permitted, late=late) is None else Verdict.MEASURE


def _near(sync: Sync, progress: MigrationProgress) -> bool:
    return progress.remaining <= NEAR_BYTES and sync.remaining <= NEAR_AT_SYNC_BYTES


def _affordable(
    sync: Sync, progress: MigrationProgress, permitted: Permitted, course: Course, elapsed: float
) -> bool:
    """Whether what is left can be sent within the budget; without one, little always can."""
    if permitted.pause is None and _near(sync, progress):
        return True
    speed = link_speed(course, progress, elapsed)
    pause = FORCED_PAUSE_SECONDS if permitted.pause is None else permitted.pause
    return speed > 0 and to_send(sync, progress) / speed <= pause


class Look(Value, frozen=True, kw_only=True):
    """At a pre-copy, and how soon to look again."""

    at: float
    passes: int
    remaining: int
    again: float = SOONEST_LOOK


def look_again(before: Look | None, progress: MigrationProgress, now: float) -> Look:
    """In half of the time in which this pass will have ended, as fast as it went since the last look: each
    look costs processor time that guests need, and only a sync must not be missed."""
    again = SOONEST_LOOK
    if before is not None and before.passes == progress.passes and now > before.at:
        speed = (before.remaining - progress.remaining) / (now - before.at)
        left = progress.remaining / speed if speed > 0 else 0.0
        again = min(max(left / 2, SOONEST_LOOK), LATEST_LOOK)
    return Look(at=now, passes=progress.passes, remaining=progress.remaining, again=again)


def fraction(progress: MigrationProgress) -> float:
    """0.0 to 1.0 of the first pass, for people to look at."""
    if progress.passes >= MIN_PASSES or progress.total == 0:
        return 1.0 if progress.passes >= MIN_PASSES else 0.0
    return min(1.0, 1.0 - progress.remaining / progress.total)
