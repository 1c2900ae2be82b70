"""Snapshots that go to another host under single faults: they come whole or not at all, they are somewhere at
every moment, and nothing of them is left where they are not kept."""

import pytest
from crash_plays import Event, failures, failures_of_frames, hold_down, kill_agents, kill_storage, partition
from relocating import HOME, TARGET
from snapshot_moving import OPERATION, SnapshotConductor, SnapshotMoving, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment
from nahtlos.wire.memory import Fate
from nahtlos.wire.messages import CancelOperation, SetCopySpeed

STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER]
A, B = f"host/{HOME}", f"host/{TARGET}"


def told(message: CancelOperation | SetCopySpeed, seconds: float) -> Event:
    def does(run: SnapshotMoving) -> None:
        assert isinstance(run.conductor, SnapshotConductor)
        conductor = run.conductor
        run.later(seconds, lambda: conductor.say(TARGET, message))

    return does


def test_undisturbed_they_come_and_their_source_lets_go() -> None:
    run = SnapshotMoving().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE


def test_the_steps_of_a_clean_run_are_found() -> None:
    struck = {(s.host, f"{s.driver}.{s.verb}") for s in STRIKES}
    assert {(HOME, "storage.offer_snapshots"), (HOME, "storage.end_offer")} <= struck
    assert (TARGET, "storage.fetch_snapshots") in struck


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_something_goes_wrong_at_a_step(act: Act) -> None:
    found = failures(
        (f"{act} {at}", SnapshotMoving(at=at, act=act))
        for at in STRIKES
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(HOME), id="source-agent-killed"),
        pytest.param(kill_agents(TARGET), id="destination-agent-killed"),
        pytest.param(kill_agents(HOME, TARGET), id="both-agents-killed"),
        pytest.param(kill_storage(HOME), id="source-daemon-killed"),
        pytest.param(kill_storage(TARGET), id="destination-daemon-killed"),
        pytest.param(partition(A, B, 5.0), id="peers-parted-for-5s"),
        pytest.param(hold_down(HOME, 30.0), id="source-agent-down-for-30s"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", SnapshotMoving(at=at, does=event)) for at in STEPS)
    assert not found, "\n".join(found)


def test_a_message_is_lost() -> None:
    lines = ((A, B), (B, A))
    found = failures_of_frames(lambda faults: SnapshotMoving(faults=faults), lines, Fate(copies=0))
    assert not found, "\n".join(found)


def test_cancelled_at_any_moment_they_are_where_they_were_or_where_they_go() -> None:
    first = next(s for s in STRIKES if s.verb == "offer_snapshots")
    cancel = CancelOperation(id=OPERATION)
    ends: set[OperationState] = set()
    for moment in [n * 0.04 for n in range(7)]:
        run = SnapshotMoving(at=first, does=told(cancel, moment)).play()
        assert not run.problems, (moment, run.problems)
        assert run.status is not None
        ends.add(run.status.state)
    assert ends == {OperationState.UNDONE, OperationState.DONE}


def duration(run: SnapshotMoving) -> float:
    run.play()
    assert not run.problems, run.problems
    assert run.status is not None and run.status.state is OperationState.DONE
    return run.status.times["done"] - run.status.times["work"]


def test_the_speed_holds_and_is_changed_while_it_runs() -> None:
    """In virtual time: each is of 40 MiB."""
    slow = duration(SnapshotMoving(bytes_per_second=8 << 20))
    assert 10 <= slow < 11, slow
    first = next(s for s in STRIKES if s.verb == "offer_snapshots")
    faster = told(SetCopySpeed(id=OPERATION, bytes_per_second=80 << 20), 2.0)
    mended = duration(SnapshotMoving(bytes_per_second=8 << 20, at=first, does=faster))
    assert 5 <= mended < 6.5, mended
