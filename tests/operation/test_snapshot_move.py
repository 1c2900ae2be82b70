"""Snapshots that go to another host under single faults: they come whole or not at all, they are somewhere at
every moment, and nothing of them is left where they are not kept."""

from collections.abc import Iterable

import pytest
from moving import Event, StruckFrame, hold_down, kill_agents, partition
from relocating import HOME, TARGET
from snapshot_moving import OPERATION, SnapshotMoving, strikes

from nahtlos.model.ids import HostId
from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment
from nahtlos.wire.memory import Fate
from nahtlos.wire.messages import CancelOperation, SetCopySpeed

STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER]
A, B = f"host/{HOME}", f"host/{TARGET}"


def failures(runs: Iterable[tuple[str, SnapshotMoving]]) -> list[str]:
    found: list[str] = []
    for name, run in runs:
        run.play()
        if run.problems:
            found.append(f"{name}: " + "; ".join(run.problems))
    return found


def kill_storage(host: HostId) -> Event:
    return lambda run: run.world.kill_storage(host)


def told(message: CancelOperation | SetCopySpeed, seconds: float) -> Event:
    def does(run: SnapshotMoving) -> None:
        run.later(seconds, lambda: run.conductor.say(TARGET, message))  # type: ignore[attr-defined]

    return does  # type: ignore[return-value]


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
    fate, found = Fate(copies=0), list[str]()
    for sender, receiver in ((A, B), (B, A)):
        counter = StruckFrame(sender, receiver, 0, Fate())
        assert not SnapshotMoving(faults=counter).play().problems
        found += failures(
            (
                f"{number}. from {sender} to {receiver}",
                SnapshotMoving(faults=StruckFrame(sender, receiver, number, fate)),
            )
            for number in range(1, counter.count + 1)
        )
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
