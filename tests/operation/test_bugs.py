"""A driver raises what no contract names: the move is undone or goes forward all the same, nothing runs
twice, and the agent lives. Where even that fails the operation is stuck, its server is left alone, and
starting the agent again takes it up."""

import pytest
from crash_plays import Strike
from moving import DESTINATION, SERVER, SOURCE, Run, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.source import SourceMove
from nahtlos.physical.sim.faults import Moment

STRIKES = [
    s
    for s in strikes()
    if s.driver in ("hypervisor", "network") and s.verb not in ("observe", "reconcile", "release", "releases")
]


class Broken(Exception):
    """None of model.errors."""


def breaks(run: Run) -> None:
    raise Broken


def without_bugs(run: Run) -> list[str]:
    return [p for p in run.problems if not p.startswith("bug in the agent")]


def _broken(bug: BaseException) -> bool:
    """It, or nothing else among those that tasks side by side raised."""
    return isinstance(bug, Broken) or (isinstance(bug, ExceptionGroup) and bug.split(Broken)[1] is None)


def test_what_no_contract_names_neither_ends_the_agent_nor_strands_the_server() -> None:
    found: list[str] = []
    for at in STRIKES:
        run = Run(at=at, does=breaks).play()
        assert run.struck, at
        found += [f"{at}: {problem}" for problem in without_bugs(run)]
        bugs = [bug for agent in run.agents.values() for bug in agent.bugs]
        found += [f"{at}: {bug!r}" for bug in bugs if not _broken(bug)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("moment", list(Moment))
def test_a_stuck_move_is_left_alone_until_the_agent_starts_again(
    monkeypatch: pytest.MonkeyPatch, moment: Moment
) -> None:
    """The bug is in what would undo the move: only the operation itself may decide about its server."""
    at = Strike(SOURCE, "hypervisor", "pause", 1, moment)

    async def fails(self: SourceMove, error: object) -> None:
        raise Broken

    def does(run: Run) -> None:
        run.loss_excused = True
        monkeypatch.setattr(SourceMove, "_fail", fails)
        run.later(20.0, monkeypatch.undo)
        run.later(25.0, lambda: run.agents[SOURCE].kill("restarted by an operator"))
        run.later(15.0, lambda: look(run))
        raise Broken

    def look(run: Run) -> None:
        journals = run.conductor.reports[SOURCE].operations
        assert [o.state for o in journals] == [OperationState.STUCK]
        error = journals[0].error
        assert error is not None
        assert "restart that agent" in error.remedy

    run = Run(at=at, does=does).play()
    assert run.struck
    assert not [p for p in without_bugs(run) if not p.startswith("stuck")]
    assert [v.host for v in run.world.running(SERVER)] in ([SOURCE], [DESTINATION])
    assert run.world.facts(SERVER).boots == 1
    assert all(o.state is not OperationState.STUCK for o in run.conductor.reports[SOURCE].operations)
