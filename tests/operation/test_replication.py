"""A rebuild and the loss of a copy under single faults: every verb of the three hosts fails or kills its
agent, before and after its effect, and around every write of a ledger; agents, daemons and lines are struck
at every step.

What must hold is in `replicating.Replicating` and in the simulated world: no acknowledged write is ever
missing from what is read, a recorded copy has every one of them, the operation ends, and the server's writes
go on.
"""

import os

import pytest
from crash_plays import Event, failures, hold_down, kill_agents, kill_orchestrator, kill_storage, partition
from relocating import CLIENT, HOME, SERVER, TARGET
from replicating import ReplicaConductor, Replicating, strikes

from nahtlos.model.config import ServerConfig
from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent import converge
from nahtlos.physical.agent.context import Context
from nahtlos.physical.sim.faults import Act, Moment

STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER or s.driver == "ledger"]
SOME_STEPS = STEPS if os.environ.get("NAHTLOS_THOROUGH") else STEPS[::4]


def test_undisturbed_the_copy_comes_and_its_loss_is_recorded_before_the_server_goes_on() -> None:
    run = Replicating().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    conductor = run.conductor
    assert isinstance(conductor, ReplicaConductor)
    assert (conductor.current, conductor.losses) == ([HOME], 1)
    assert run.world.facts(SERVER).boots == 1


def test_copy_an_operator_gave_up_is_made_anew_under_its_server() -> None:
    run = Replicating(anew=True, loses=False).play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    conductor = run.conductor
    assert isinstance(conductor, ReplicaConductor)
    assert conductor.current == [HOME, TARGET]
    assert (conductor.copy_epoch, conductor.losses) == (3, 0), "it was left before it was shut to its server"
    assert run.world.facts(SERVER).boots == 1


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.CRASH])
def test_making_anew_under_a_server_survives_faults(act: Act) -> None:
    of_it = [s for s in strikes(Replicating(anew=True, loses=False)) if s not in STRIKES]
    assert any((s.host, s.driver) == (CLIENT, "hypervisor") for s in of_it)
    some = [s for s in of_it if act is Act.CRASH or s.driver != "ledger"]
    step = 1 if os.environ.get("NAHTLOS_THOROUGH") else 5
    found = failures(
        (f"{act} {at}", Replicating(anew=True, loses=False, at=at, act=act)) for at in some[::step]
    )
    assert not found, "\n".join(found)


def test_server_whose_vmm_ended_goes_on_with_one_copy_and_that_is_recorded_first() -> None:
    """The copies may differ in what was on its way: two of them are never read after that."""
    run = Replicating(ends=True).play()
    assert not run.problems
    conductor = run.conductor
    assert isinstance(conductor, ReplicaConductor)
    assert (len(conductor.current), conductor.losses) == (1, 1)
    assert run.world.facts(SERVER).boots == 2


def test_server_that_is_removed_while_it_writes_leaves_copies_that_are_alike() -> None:
    run = Replicating(removed=True).play()
    assert not run.problems
    conductor = run.conductor
    assert isinstance(conductor, ReplicaConductor)
    assert (conductor.current, conductor.losses) == ([HOME, TARGET], 0)


def test_server_whose_vmm_ends_as_it_is_removed_leaves_one_copy_that_counts() -> None:
    run = Replicating(removed=True, ends=True).play()
    assert not run.problems
    conductor = run.conductor
    assert isinstance(conductor, ReplicaConductor)
    assert len(conductor.current) == 1


@pytest.mark.parametrize("verb", ["hypervisor.pause", "hypervisor.kill", "ledger.fresh", "ledger.disown"])
@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
def test_agent_that_dies_while_it_removes_a_server_leaves_no_copies_that_differ(
    verb: str, moment: Moment
) -> None:
    seen = Replicating(removed=True).play().seen
    at = [s for s in seen if (s.host, f"{s.driver}.{s.verb}", s.moment) == (CLIENT, verb, moment)][-1]
    assert not Replicating(removed=True, at=at, act=Act.CRASH).play().problems


def test_without_that_copies_that_differ_would_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def as_it_is(_context: Context, _server: ServerConfig) -> None:
        return

    monkeypatch.setattr(converge, "end_alike", as_it_is)
    assert Replicating(removed=True).play().problems == ["several copies count that may differ"]


@pytest.mark.parametrize("event", [None, kill_agents(HOME, TARGET, CLIENT), kill_storage(HOME, TARGET)])
def test_copies_come_to_be_in_step_whoever_dies(event: Event | None) -> None:
    joined = next(s for s in STRIKES if s.host == HOME and f"{s.driver}.{s.verb}" == "ledger.joined")
    run = Replicating(steps=True, loses=False, at=joined if event else None, does=event)
    assert not run.play().problems


def test_without_that_the_world_sees_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    async def as_it_is(_context: Context, server: ServerConfig) -> ServerConfig:
        return server

    monkeypatch.setattr(converge, "on_one_copy", as_it_is)
    assert any("write-hole" in problem for problem in Replicating(ends=True).play().problems)


def test_the_steps_of_a_clean_run_are_found() -> None:
    struck = {(s.host, f"{s.driver}.{s.verb}") for s in STRIKES}
    assert {(HOME, "ledger.join"), (HOME, "ledger.joined"), (TARGET, "storage.receive")} <= struck
    assert {(CLIENT, "ledger.lost"), (CLIENT, "ledger.adopt"), (CLIENT, "hypervisor.resume")} <= struck


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_its_agent(act: Act) -> None:
    found = failures(
        (f"{act} {at}", Replicating(at=at, act=act))
        for at in STRIKES
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(HOME), id="coordinator-killed"),
        pytest.param(kill_agents(HOME, TARGET, CLIENT), id="all-agents-killed"),
        pytest.param(kill_orchestrator, id="orchestrator-killed"),
        pytest.param(kill_storage(HOME), id="source-daemon-killed"),
        pytest.param(kill_storage(HOME, TARGET), id="both-daemons-killed"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", Replicating(at=at, does=event)) for at in STEPS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(hold_down(CLIENT, 20.0), id="owner-agent-down-for-20s"),
        pytest.param(partition(f"host/{HOME}", f"host/{CLIENT}", 20.0), id="peers-parted-for-20s"),
    ],
)
def test_something_lasts_long_from_a_step_on(event: Event) -> None:
    found = failures((f"at {at}", Replicating(at=at, does=event)) for at in SOME_STEPS)
    assert not found, "\n".join(found)
