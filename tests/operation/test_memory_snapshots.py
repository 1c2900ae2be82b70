"""A server's memory and disks of one moment, under single faults: all or nothing, and the guest runs on."""

import pytest
from crash_plays import Event, failures, hold_down, kill_agents, partition
from memory_saving import DISK_AT, MEMORY_AT, RUNS_AT, MemorySaving, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment

STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER or s.driver == "ledger"]
A, B, C = f"host/{DISK_AT}", f"host/{RUNS_AT}", f"host/{MEMORY_AT}"


def test_undisturbed_it_stands_still_for_a_moment_only() -> None:
    run = MemorySaving().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.taken is not None
    assert run.taken.saved.volume == "then-memory"
    assert [disk.volume for disk in run.taken.saved.disks] == ["web-1-v"]
    assert 0 < run.stood_still < 0.05, run.stood_still
    assert run.taken.pause_seconds >= run.stood_still


def test_the_steps_of_a_clean_run_are_found() -> None:
    struck = {(s.host, f"{s.driver}.{s.verb}") for s in STRIKES}
    assert (DISK_AT, "storage.snapshot") in struck
    for verb in ("hypervisor.save", "hypervisor.pause", "hypervisor.resume", "storage.raw_flush"):
        assert (RUNS_AT, verb) in struck


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_its_agent(act: Act) -> None:
    found = failures(
        (f"{act} {at}", MemorySaving(at=at, act=act))
        for at in STRIKES
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(RUNS_AT), id="its-agent-killed"),
        pytest.param(kill_agents(DISK_AT, RUNS_AT, MEMORY_AT), id="all-agents-killed"),
        pytest.param(hold_down(RUNS_AT, 20.0), id="its-agent-down-for-20s"),
        pytest.param(hold_down(DISK_AT, 20.0), id="the-disks-agent-down-for-20s"),
        pytest.param(partition(A, B, 5.0), id="peers-parted-for-5s"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", MemorySaving(at=at, does=event)) for at in STEPS)
    assert not found, "\n".join(found)


def test_its_vmm_dies_or_it_is_to_move_meanwhile() -> None:
    moments = [n * 0.03 for n in range(12)]
    found = failures((f"killed at {at:.2f}", MemorySaving(killed=at, loss_excused=True)) for at in moments)
    found += failures((f"moves at {at:.2f}", MemorySaving(moves=at)) for at in moments)
    assert not found, "\n".join(found)


def test_one_that_writes_faster_than_it_is_saved_is_refused_with_what_it_would_take() -> None:
    run = MemorySaving(dirty_rate=20 << 30, stop_seconds=0.005).play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.UNDONE
    assert run.status.error is not None
    assert run.status.error.field == "pause"
    assert "--pause" in run.status.error.remedy
    assert run.stood_still < 0.05
