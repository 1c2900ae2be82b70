"""Whether a pre-copy that is watched will come to its end, and what is done so that it does. Pure.

    go on -> more bandwidth -> the server slowed down -> handed over, the rest follows -> given up
                               (both by consent)

It is told by whole passes: each sends what the one before it has left. Once what passes leave becomes no less
any more, the server touches its memory as fast as it is sent, and waiting for the deadline would only cost
brownout. What is affordable then is taken, if the server's budget allows it; else the next measure is.
"""

from enum import StrEnum

import msgspec

from nahtlos.model.values import Value
from nahtlos.physical.ports import MigrationProgress

ENOUGH_PASSES = 4
PROGRESS = 0.1
"""Passes that leave less by a smaller share than this, all of them together, make no progress."""
PATIENCE_SECONDS = 5.0
"""Nothing is told from less; a server may have been busy for a moment."""
SLOWED_PATIENCE_SECONDS = 25.0
"""A hypervisor takes the vCPUs from a server step by step, and each takes it some seconds."""
HOPELESS = 1.5
"""The first pass alone would take that many times what is left until the deadline."""
TELLING_BYTES, TELLING_SECONDS = 4 << 20, 0.02
"""A pass of less does not tell how fast the link is."""


class Measure(StrEnum):
    """Against a server that touches memory as fast as it is sent; each is taken once, in this order."""

    BOOST = "more bandwidth"
    SLOW_DOWN = "slowed down"
    POST_COPY = "handed over, the rest follows"
    """The last, for what it risks; the others undo nothing."""


class Permitted(Value, frozen=True, kw_only=True):
    """What may be done to a server so that its move ends."""

    pause: float | None = None
    """Seconds that sending the rest may take by its blackout budget; None: it has none."""
    measures: tuple[Measure, ...] = ()
    post_copy_at_once: bool = False
    """It is known that nothing else ends it: not tried for longer than all is sent once."""
    post_copy_from: float = 0.0
    """Bytes a second of the link from which on the budget holds for a post-copy."""


class Pass(Value, frozen=True, kw_only=True):
    """Over the memory, from one sync of the dirty bitmap to the next."""

    seconds: float
    sent: int
    """Bytes."""
    left: int
    """Bytes that were found to be touched anew at its end."""


class Course(Value, frozen=True, kw_only=True):
    """How a pre-copy has gone since it began, or since the last measure was taken."""

    since: float
    """Seconds of the clock of whoever watches."""
    taken: tuple[Measure, ...] = ()
    count: int = 0
    """Syncs seen, of all."""
    at: float = 0.0
    """When the pass under way began."""
    sent: int = 0
    """Bytes until then."""
    passes: tuple[Pass, ...] = ()
    """The last few."""


def followed(course: Course, progress: MigrationProgress, now: float) -> Course:
    if progress.passes == course.count:
        return course
    ended = Pass(seconds=now - course.at, sent=progress.transferred - course.sent, left=progress.remaining)
    passes = (*course.passes, ended)[-ENOUGH_PASSES:] if course.count else ()
    return Course(
        since=course.since,
        taken=course.taken,
        count=progress.passes,
        at=now,
        sent=progress.transferred,
        passes=passes,
    )


def after(course: Course, measure: Measure, now: float) -> Course:
    """What was seen before says nothing of what comes."""
    return Course(since=now, taken=(*course.taken, measure), count=0)


def held(course: Course, progress: MigrationProgress, now: float) -> Course:
    """While it is sent slowly on purpose, its passes say nothing; those before stay as they were."""
    return Course(
        since=course.since,
        taken=course.taken,
        count=progress.passes,
        at=now,
        sent=progress.transferred,
        passes=course.passes,
    )


def link_speed(course: Course, progress: MigrationProgress, elapsed: float) -> float:
    """Bytes a second: of the last pass that was long enough to tell, else the mean so far, which is too low
    if anything."""
    for last in reversed(course.passes):
        if last.sent >= TELLING_BYTES and last.seconds >= TELLING_SECONDS:
            return last.sent / last.seconds
    return progress.transferred / elapsed if elapsed > 0 else 0.0


def makes_no_progress(course: Course, now: float) -> bool:
    """What passes leave has become no less for long enough."""
    patience = SLOWED_PATIENCE_SECONDS if Measure.SLOW_DOWN in course.taken else PATIENCE_SECONDS
    if now - course.since < patience or len(course.passes) < ENOUGH_PASSES:
        return False
    first, *others = course.passes
    return min(p.left for p in others) >= first.left * (1 - PROGRESS)


def never_sent_once(course: Course, progress: MigrationProgress, now: float, until: float) -> bool:
    """Not even the first pass would be done before `until`."""
    elapsed = now - course.since
    if progress.passes > 1 or elapsed < PATIENCE_SECONDS or course.taken:
        return False
    done = progress.total - progress.remaining
    return done <= 0 or progress.remaining * elapsed / done > HOPELESS * (until - now)


def next_measure(course: Course, permitted: Permitted, *, late: bool = False) -> Measure | None:
    """None if all were taken. `late`: only what ends it at once is left."""
    if Measure.POST_COPY in course.taken:
        return None
    order = (Measure.POST_COPY,) if late else tuple(Measure)
    return next((m for m in order if m in permitted.measures and m not in course.taken), None)


def within_budget(permitted: Permitted, speed: float) -> Permitted:
    """Without a post-copy over a link so slow that the pages a server needs first come too late."""
    if speed >= permitted.post_copy_from:
        return permitted
    measures = tuple(m for m in permitted.measures if m is not Measure.POST_COPY)
    return msgspec.structs.replace(permitted, measures=measures)


def is_due(course: Course, progress: MigrationProgress, permitted: Permitted) -> bool:
    """A post-copy that was decided on beforehand."""
    ready = permitted.post_copy_at_once and Measure.POST_COPY in permitted.measures
    return ready and Measure.POST_COPY not in course.taken and progress.passes > 1


def why_given_up(
    course: Course, progress: MigrationProgress, permitted: Permitted, elapsed: float, deadline: float
) -> str:
    """In words, with the figures it was told by."""
    speed = link_speed(course, progress, elapsed)
    left = course.passes[-1].left if course.passes else progress.remaining
    end = f"did not end within {deadline:g} s" if elapsed >= deadline else f"would not end: {elapsed:.1f} s"
    words = [
        f"pre-copy {end} and {progress.passes} passes after it began {left >> 20} MiB are left again, "
        f"at {speed / (1 << 20):.0f} MiB/s"
    ]
    if permitted.pause is not None and speed > 0:
        words.append(
            f"sending them takes {left / speed * 1000:.0f} ms, of its blackout budget "
            f"{permitted.pause * 1000:.0f} ms are left for that"
        )
    if course.taken:
        words.append(f"tried: {', '.join(course.taken)}")
    return "; ".join(words)


def remedy_of(permitted: Permitted) -> str:
    ways = ["give the move more bandwidth", "wait until the server writes less"]
    if Measure.SLOW_DOWN not in permitted.measures:
        ways.append("permit to slow it down (--allow-slowdown)")
    if Measure.POST_COPY not in permitted.measures:
        ways.append("permit that its memory follows it (--allow-post-copy)")
    if permitted.pause is not None:
        ways.append("raise its budget (--blackout-budget)")
    return ", or ".join([", ".join(ways[:-1]), ways[-1]])
