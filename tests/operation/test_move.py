"""A move under single faults: every verb of both hosts fails or kills its agent, before and after its effect;
every process is killed, every line cut or stalled, at every step; every message lost, doubled, late.

The steps are those of a clean run: nothing is listed by hand. What must hold is in `moving.Run`: one running
copy, no packet lost unless its path itself was struck, the operation ended on both hosts, nothing left over.
"""

import os

import pytest
from crash_plays import (
    Event,
    failures,
    failures_of_frames,
    hold_down,
    kill_agents,
    kill_orchestrator,
    kill_storage,
    lose_power,
    partition,
)
from moving import DESTINATION, SERVER, SOURCE, Run, break_lines, cut_stream, kill_vmm, stall_stream, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment
from nahtlos.wire.memory import Fate

STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER or s.driver == "ledger"]
"""Where something happens from outside: after every effect, and around every write."""
SOME_STEPS = STEPS if os.environ.get("NAHTLOS_THOROUGH") else STEPS[::4]
"""Events that last long take long to play: every fourth step, unless all are asked for."""
A, B, ORCHESTRATOR = f"host/{SOURCE}", f"host/{DESTINATION}", "orchestrator"


def test_undisturbed_the_server_moves_and_no_packet_is_lost() -> None:
    run = Run().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    steady = [f for f in run.world.paths.flows.values() if f.steady]
    assert len(steady) == 1
    assert steady[0].delivered > 50
    assert steady[0].reordered == 0
    assert run.world.facts(SERVER).boots == 1


def test_the_steps_of_a_clean_run_are_found() -> None:
    struck = {(s.host, f"{s.driver}.{s.verb}") for s in STRIKES}
    assert (SOURCE, "hypervisor.pause") in struck
    assert (SOURCE, "ledger.yield") in struck
    assert (DESTINATION, "ledger.take") in struck
    assert (DESTINATION, "hypervisor.resume") in struck


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_its_agent(act: Act) -> None:
    found = failures(
        (f"{act} {at}", Run(at=at, act=act)) for at in STRIKES if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


def test_a_verb_keeps_failing_for_a_while() -> None:
    found = failures(
        (f"for 5 s {at}", Run(at=at, act=Act.UNAVAILABLE, lasting=5.0))
        for at in STRIKES
        if at.driver != "ledger" and at.occurrence == 1
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(SOURCE), id="source-agent-killed"),
        pytest.param(kill_agents(DESTINATION), id="destination-agent-killed"),
        pytest.param(kill_agents(SOURCE, DESTINATION), id="both-agents-killed"),
        pytest.param(hold_down(SOURCE, 10.0), id="source-agent-down-for-10s"),
        pytest.param(kill_orchestrator, id="orchestrator-killed"),
        pytest.param(kill_vmm(SOURCE), id="source-vmm-killed"),
        pytest.param(kill_vmm(DESTINATION), id="destination-vmm-killed"),
        pytest.param(lose_power(SOURCE), id="source-host-without-power"),
        pytest.param(lose_power(DESTINATION), id="destination-host-without-power"),
        pytest.param(kill_storage(SOURCE), id="storage-daemon-killed"),
        pytest.param(break_lines, id="peers-line-breaks"),
        pytest.param(partition(A, B, 5.0), id="peers-parted-for-5s"),
        pytest.param(cut_stream, id="stream-cut"),
        pytest.param(stall_stream(5.0), id="stream-stalls-for-5s"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", Run(at=at, does=event)) for at in STEPS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(hold_down(DESTINATION, 60.0), id="destination-agent-down-for-60s"),
        pytest.param(partition(A, B, 70.0), id="peers-parted-for-70s"),
        pytest.param(partition(ORCHESTRATOR, A, 30.0), id="orchestrator-parted-from-source"),
        pytest.param(partition(ORCHESTRATOR, B, 30.0), id="orchestrator-parted-from-destination"),
        pytest.param(stall_stream(60.0), id="stream-stalls-for-60s"),
    ],
)
def test_something_lasts_long_from_a_step_on(event: Event) -> None:
    found = failures((f"at {at}", Run(at=at, does=event)) for at in SOME_STEPS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "fate",
    [
        pytest.param(Fate(copies=0), id="lost"),
        pytest.param(Fate(copies=2), id="doubled"),
        pytest.param(Fate(delay=2.0), id="late"),
        pytest.param(Fate(copies=0, breaks=True), id="line-breaks-before"),
        pytest.param(Fate(copies=1, breaks=True), id="line-breaks-after"),
    ],
)
def test_a_message_meets_its_fate(fate: Fate) -> None:
    lines = ((A, B), (B, A), (ORCHESTRATOR, A), (ORCHESTRATOR, B))
    found = failures_of_frames(lambda faults: Run(faults=faults), lines, fate)
    assert not found, "\n".join(found)


def test_killed_before_the_server_was_handed_over_a_destination_costs_no_reboot() -> None:
    """Its source still has it: a destination that dies before it has said that all has arrived is not
    missed. (If it dies between that and its first instruction, the server is booted again there.)"""
    arrived = next(i for i, s in enumerate(STEPS) if s.verb == "incoming_wait")
    for at in STEPS[:arrived]:
        run = Run(at=at, does=kill_vmm(DESTINATION)).play()
        assert run.world.facts(SERVER).boots == 1, at
