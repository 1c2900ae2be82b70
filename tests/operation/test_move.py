"""A move under single faults: every verb of both hosts fails or kills its agent, before and after its effect;
every process is killed, every line cut or stalled, at every step; every message lost, doubled, late.

The steps are those of a clean run: nothing is listed by hand. What must hold is in `moving.Run`: one running
copy, no packet lost unless a VMM was killed, the operation ended on both hosts, nothing left over.
"""

import pytest
from moving import DESTINATION, SOURCE, Run, Strike, StruckFrame, failures, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment
from nahtlos.wire.memory import Fate, Faults

STRIKES = list(strikes())


def test_undisturbed_the_server_moves_and_no_packet_is_lost() -> None:
    run = Run().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    flow = run.world.paths.flows[("52:54:00:4d:00:0a", "edge-1")]
    assert flow.delivered > 50
    assert flow.reordered == 0


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_its_agent(act: Act) -> None:
    found = failures(
        (f"{act} {at}", Run(at=at, act=act))
        for at in STRIKES
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


def test_a_verb_fails_for_a_while() -> None:
    found = failures(
        (f"for 5 s {at}", Run(at=at, act=Act.UNAVAILABLE, lasting=5.0))
        for at in STRIKES
        if at.driver != "ledger" and at.occurrence == 1
    )
    assert not found, "\n".join(found)
