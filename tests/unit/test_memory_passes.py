"""When a guest whose memory is saved is made to stand still: as a table of what is seen of the passes."""

import pytest

from nahtlos.physical.agent.volumes.passes import Passes, Verdict

MIB = 1 << 20
ALL = 1024


def seen(lefts: list[int], *, seconds: float = 2.0, rate: int = 200, room: int = 2 * ALL) -> list[Verdict]:
    """`lefts`: MiB that each further pass begins with; `rate`: MiB a second it is saved by."""
    passes = Passes(seconds=seconds, room=room * MIB, memory=ALL * MIB)
    now, sent, found = 1.0, 0, list[Verdict]()
    passes.seen(passes=1, left=ALL * MIB, sent=0, now=now)
    for number, left in enumerate([ALL, *lefts]):
        if number:
            found.append(passes.seen(passes=number + 1, left=left * MIB, sent=sent * MIB, now=now))
        now += left / rate
        sent += left
        passes.seen(passes=number + 1, left=0, sent=sent * MIB, now=now)
    return found


@pytest.mark.parametrize(
    ("lefts", "last"),
    [
        pytest.param([4], Verdict.STOP, id="idle: at once"),
        pytest.param([400, 100, 20, 5], Verdict.STOP, id="each pass is shorter"),
        pytest.param([100, 90, 95, 92], Verdict.STOP, id="steady, and short enough"),
        pytest.param([200, 190, 195, 192], Verdict.STOP, id="steady: 0.96 s"),
    ],
)
def test_it_stops_once_little_is_left_or_nothing_is_won(lefts: list[int], last: Verdict) -> None:
    found = seen(lefts)
    assert found[-1] is last
    assert set(found[:-1]) <= {Verdict.GO_ON}


def test_what_would_take_longer_than_is_allowed_is_given_up_with_the_time_it_would_take() -> None:
    assert seen([200, 190, 195, 192], seconds=0.5)[-1] is Verdict.GIVE_UP
    passes = Passes(seconds=0.5, room=4096 * MIB, memory=ALL * MIB, rate=float(100 * MIB))
    assert passes.takes(50 * MIB) == 0.5


def test_no_further_pass_is_begun_that_there_is_no_room_for() -> None:
    assert seen([300, 150], room=ALL + 400) == [Verdict.STOP, Verdict.STOP]
    assert seen([300, 150], room=2 * ALL) == [Verdict.GO_ON, Verdict.GO_ON]


def test_looks_within_a_pass_decide_nothing() -> None:
    passes = Passes(seconds=2.0, room=4096 * MIB, memory=ALL * MIB)
    for look in range(50):
        assert passes.seen(passes=1, left=0, sent=look * MIB, now=1.0 + look) is Verdict.GO_ON
    assert passes.seen(passes=2, left=0, sent=50 * MIB, now=60.0) is Verdict.STOP
    assert passes.left == MIB


def test_a_pass_that_is_seen_late_is_as_long_as_what_was_sent_since() -> None:
    passes = Passes(seconds=0.01, room=1 << 40, memory=ALL * MIB)
    found = [passes.seen(passes=1, left=0, sent=ALL * MIB, now=1.0)]
    for look in range(1, 8):  # two passes of 100 MiB between two looks, and little left of the last one
        sent = ALL + 200 * look
        found.append(passes.seen(passes=1 + 2 * look, left=MIB, sent=sent * MIB, now=1.0 + look))
    assert Verdict.STOP not in found
    assert found[-1] is Verdict.GIVE_UP


def test_a_guest_that_never_gets_calmer_does_not_go_round_for_ever() -> None:
    falling = [900 - 40 * (n % 2) for n in range(40)]
    found = seen(falling, room=1 << 20)
    assert Verdict.GIVE_UP in found[:6]
