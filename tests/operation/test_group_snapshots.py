"""A group of snapshots under single faults: it is of one moment or there is none of it, and every guest runs
on."""

import os

import pytest
from crash_plays import Event, failures, failures_of_frames, hold_down, kill_agents, kill_storage, partition
from snapshooting import FIRST, SECOND, SERVERS, THIRD, Snapshooting, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment
from nahtlos.wire.memory import Fate

STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER or s.driver == "ledger"]
THOROUGH = bool(os.environ.get("NAHTLOS_THOROUGH"))
A, B, C = f"host/{FIRST}", f"host/{SECOND}", f"host/{THIRD}"


def test_undisturbed_it_is_of_one_moment_and_the_stop_is_short() -> None:
    run = Snapshooting().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.longest_stop < 0.02, run.longest_stop
    assert run.longest_stop * 1000 <= int(run.status.result["stood_still_ms"]) + 0.5


def test_on_one_host_nobody_stands_still() -> None:
    run = Snapshooting(one_host=True).play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.longest_stop == 0.0
    assert "stood_still_ms" not in run.status.result


def test_the_steps_of_a_clean_run_are_found() -> None:
    struck = {(s.host, f"{s.driver}.{s.verb}") for s in STRIKES}
    for host in (FIRST, SECOND):
        assert (host, "storage.snapshot") in struck
    for host in (SECOND, THIRD):
        assert (host, "hypervisor.pause") in struck
        assert (host, "hypervisor.resume") in struck


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_its_agent(act: Act) -> None:
    found = failures(
        (f"{act} {at}", Snapshooting(at=at, act=act))
        for at in STRIKES
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(FIRST), id="coordinator-killed"),
        pytest.param(kill_agents(SECOND, THIRD), id="owners-agents-killed"),
        pytest.param(kill_agents(FIRST, SECOND, THIRD), id="all-agents-killed"),
        pytest.param(hold_down(FIRST, 20.0), id="coordinator-down-for-20s"),
        pytest.param(hold_down(THIRD, 20.0), id="owner-down-for-20s"),
        pytest.param(kill_storage(SECOND), id="daemon-killed"),
        pytest.param(partition(A, C, 5.0), id="peers-parted-for-5s"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", Snapshooting(at=at, does=event)) for at in STEPS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "fate",
    [
        pytest.param(Fate(copies=0), id="lost"),
        pytest.param(Fate(copies=2), id="doubled"),
        pytest.param(Fate(delay=2.0), id="late"),
        pytest.param(Fate(copies=1, breaks=True), id="line-breaks-after"),
    ],
)
def test_a_message_meets_its_fate(fate: Fate) -> None:
    lines = ((A, B), (B, A), (A, C), (C, A))
    found = failures_of_frames(lambda faults: Snapshooting(faults=faults), lines, fate)
    assert not found, "\n".join(found)


def test_a_server_moves_meanwhile() -> None:
    found = failures(
        (f"{moment:.3f} s", Snapshooting(moves=moment))
        for moment in [n * 0.004 for n in range(0, 40, 1 if THOROUGH else 3)]
    )
    assert not found, "\n".join(found)


def test_while_nobody_asks_a_guest_stands_still_no_longer_than_it_was_told() -> None:
    """Its coordinator is gone, with the guests of other hosts standing still."""
    paused = next(s for s in STEPS if s.host == THIRD and s.verb == "pause")
    run = Snapshooting(at=paused, does=hold_down(FIRST, 20.0), stop_seconds=0.2).play()
    assert not run.problems
    assert max(run.world.facts(s).longest_blackout for s in SERVERS) < 0.3
