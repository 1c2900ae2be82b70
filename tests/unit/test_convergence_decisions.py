"""Whether a pre-copy that is watched ends, and what is done so that it does: as tables, and over whole
courses of a server that writes at a steady rate."""

from dataclasses import dataclass, field

import pytest

from nahtlos.model.blackout import seconds_to_send
from nahtlos.physical.agent.convergence import (
    Course,
    Measure,
    Permitted,
    after,
    followed,
    link_speed,
    next_measure,
    remedy_of,
    why_given_up,
)
from nahtlos.physical.agent.precopy import LINK_BYTES, Sync, Verdict, link_rate, seen, verdict
from nahtlos.physical.ports import MigrationPhase, MigrationProgress

MB = 1 << 20
TICK = 0.002
DEADLINE = 120.0
ALL = tuple(Measure)
HARMLESS = (Measure.BOOST, Measure.SLOW_DOWN)


@dataclass
class Copy:
    """A server of `memory` bytes that touches `written` of them, `rate` bytes a second, over `link`."""

    rate: float
    link: float = 128.0 * MB
    memory: float = 256.0 * MB
    written: float = 64.0 * MB
    boosted: float = 0.0
    permitted: Permitted = field(default_factory=Permitted)
    taken: list[tuple[Measure, float]] = field(default_factory=list[tuple[Measure, float]])
    left_at_the_end: float = 0.0

    def run(self) -> tuple[Verdict, float]:
        """The last word, and when it was said."""
        now, sync, course = 0.0, Sync(), Course(since=0.0)
        left, sent, passes, pass_began, rate = self.memory, 0.0, 1, 0.0, self.rate
        while True:
            now += TICK
            going = min(left, self.link * TICK)
            left, sent = left - going, sent + going
            if left <= 0:
                left = min(rate * max(now - pass_began, TICK), self.written)
                passes, pass_began = passes + 1, now
            progress = MigrationProgress(
                phase=MigrationPhase.ACTIVE,
                remaining=int(left),
                total=int(self.memory),
                transferred=int(sent),
                passes=passes,
            )
            sync, course = seen(sync, progress, now), followed(course, progress, now)
            said = verdict(
                sync,
                progress,
                now=now,
                started=0.0,
                deadline=DEADLINE,
                course=course,
                permitted=self.permitted,
            )
            if said is Verdict.MEASURE:
                measure = next_measure(course, self.permitted)
                assert measure is not None
                self.taken.append((measure, now))
                self.link = self.boosted if measure is Measure.BOOST else self.link
                rate = rate * 0.2 if measure is Measure.SLOW_DOWN else rate
                course = after(course, measure, now)
            elif said is not Verdict.WAIT:
                self.left_at_the_end = left
                return said, now


@pytest.mark.parametrize("rate", [0, 8, 40, 100])
def test_what_writes_slower_than_the_link_is_switched_with_little_left(rate: int) -> None:
    copy = Copy(rate=rate * MB)
    said, at = copy.run()
    assert said is Verdict.SWITCH
    assert copy.left_at_the_end <= 8 * MB
    assert at < 15


@pytest.mark.parametrize("rate", [200, 400])
def test_what_writes_faster_is_given_up_long_before_the_deadline(rate: int) -> None:
    said, at = Copy(rate=rate * MB).run()
    assert said is Verdict.GIVE_UP
    assert at < 10


def test_more_bandwidth_is_the_first_measure_and_enough_where_the_link_has_it() -> None:
    copy = Copy(rate=200 * MB, boosted=1024.0 * MB, permitted=Permitted(measures=ALL))
    said, _ = copy.run()
    assert said is Verdict.SWITCH
    assert [measure for measure, _ in copy.taken] == [Measure.BOOST]


def test_measures_follow_one_another_each_once_and_given_time() -> None:
    hopeless = Copy(rate=4000 * MB, boosted=129.0 * MB, permitted=Permitted(measures=HARMLESS))
    said, given_up = hopeless.run()
    assert said is Verdict.GIVE_UP
    assert [measure for measure, _ in hopeless.taken] == list(HARMLESS)
    first, second = (at for _, at in hopeless.taken)
    assert second - first >= 5
    assert given_up - second >= 25


def test_slowed_down_it_ends() -> None:
    copy = Copy(rate=400 * MB, permitted=Permitted(measures=(Measure.SLOW_DOWN,)))
    said, at = copy.run()
    assert said is Verdict.SWITCH
    assert at < 30


@pytest.mark.parametrize(("rate", "written", "budget"), [(60, 64, 80), (200, 24, 300), (400, 64, 600)])
def test_it_is_never_switched_where_the_rest_would_not_go_out_within_the_budget(
    rate: int, written: int, budget: int
) -> None:
    pause = seconds_to_send(budget, "tcg")
    assert pause is not None
    copy = Copy(rate=rate * MB, written=written * MB, permitted=Permitted(pause=pause))
    said, at = copy.run()
    assert said is Verdict.SWITCH
    assert copy.left_at_the_end / copy.link <= pause
    assert at < 20


def test_what_cannot_keep_its_budget_is_given_up_with_the_figures() -> None:
    copy = Copy(rate=400 * MB, permitted=Permitted(pause=0.1))
    assert copy.run()[0] is Verdict.GIVE_UP
    course, progress = Course(since=0.0), MigrationProgress(phase=MigrationPhase.ACTIVE)
    for passes in range(1, 6):
        progress = MigrationProgress(
            phase=MigrationPhase.ACTIVE, passes=passes, remaining=64 * MB, transferred=passes * 64 * MB
        )
        course = followed(course, progress, passes * 0.5)
    assert link_speed(course, progress, 3.0) == 128 * MB
    words = why_given_up(course, progress, Permitted(pause=0.1), 3.0, DEADLINE)
    assert "64 MiB are left again, at 128 MiB/s" in words
    assert "takes 500 ms, of its blackout budget 100 ms are left" in words


def test_the_link_is_told_by_the_pass_that_sent_most_not_by_what_was_waited() -> None:
    def looked(passes: int, sent: int) -> MigrationProgress:
        return MigrationProgress(
            phase=MigrationPhase.ACTIVE, remaining=0, total=256 * MB, transferred=sent, passes=passes
        )

    course = followed(Course(since=0.0), looked(1, 0), 0.0)
    assert link_rate(course, looked(1, LINK_BYTES // 2), 1.0) is None
    assert link_rate(course, looked(1, 2 * LINK_BYTES), 4.0) == LINK_BYTES // 2
    course = followed(course, looked(2, 2 * LINK_BYTES), 0.5)
    course = followed(course, looked(3, 2 * LINK_BYTES + MB), 9.0)
    assert link_rate(course, looked(3, 2 * LINK_BYTES + MB), 10.0) == 4 * LINK_BYTES


def test_a_first_pass_that_cannot_end_in_time_is_not_waited_for() -> None:
    said, at = Copy(rate=0, memory=256.0 * 1024 * MB).run()
    assert said is Verdict.GIVE_UP
    assert at < 6
    assert Copy(rate=0, memory=4.0 * 1024 * MB).run()[0] is Verdict.SWITCH


def test_each_measure_is_taken_once_in_its_order() -> None:
    course, permitted = Course(since=0.0), Permitted(measures=ALL)
    assert next_measure(course, permitted) is Measure.BOOST
    assert next_measure(course, permitted, late=True) is Measure.POST_COPY
    course = after(course, Measure.BOOST, 1.0)
    assert next_measure(course, permitted) is Measure.SLOW_DOWN
    course = after(course, Measure.SLOW_DOWN, 2.0)
    assert next_measure(course, permitted) is Measure.POST_COPY
    assert next_measure(after(course, Measure.POST_COPY, 3.0), permitted) is None


def test_a_budget_leaves_what_is_not_spent_on_the_stop_and_on_waking() -> None:
    assert seconds_to_send(0, "tcg") is None
    assert seconds_to_send(166, "tcg") == pytest.approx(0.1)
    assert seconds_to_send(116, "kvm") == pytest.approx(0.1)
    assert seconds_to_send(20, "tcg") == 0.0


def test_remedies_name_what_has_not_been_permitted_yet() -> None:
    assert "--allow-slowdown" in remedy_of(Permitted())
    permitted = Permitted(pause=0.1, measures=(Measure.SLOW_DOWN,))
    assert "--allow-slowdown" not in remedy_of(permitted)
    assert "--blackout-budget" in remedy_of(permitted)
