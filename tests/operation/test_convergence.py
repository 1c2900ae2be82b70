"""Moves of servers that touch their memory as fast as it is sent, by real agents in the simulated world: they
end within the server's budget by what its owner permits, or are undone long before their deadline."""

import msgspec
import pytest
from crash_plays import Strike
from moving import SERVER, SOURCE, Run

from nahtlos.model.blackout import seconds_to_send
from nahtlos.model.inventory import OperationState
from nahtlos.model.prediction import Means
from nahtlos.physical.agent.precopy import NOT_CONVERGED
from nahtlos.physical.sim.cloudlet import server_spec
from nahtlos.physical.sim.faults import Act, Moment

MIB = 1 << 20
FAST, LINK = 64 * MIB, 32 * MIB
DEADLINE = 120.0
MEASURES = ("migrate_pace", "migrate_slow_down")


def hard(
    *, boost: int = 0, slow_down: bool = False, budget: int = 0, at: Strike | None = None, act: Act = Act.PASS
) -> Run:
    """The first pass over the link takes half a second, and so does every other one."""
    spec = msgspec.structs.replace(server_spec(1), allow_slowdown=slow_down, blackout_budget_ms=budget)
    return Run(spec=spec, dirty_rate=FAST, bandwidth=LINK, boost=boost, deadline=DEADLINE, at=at, act=act)


def seconds(run: Run) -> float:
    assert run.status is not None
    return max(run.status.times.values()) - min(run.status.times.values())


def test_a_move_that_would_not_end_is_undone_early_with_the_figures() -> None:
    run = hard().play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.UNDONE
    assert run.status.error is not None
    assert run.status.error.field == NOT_CONVERGED
    assert "MiB are left again, at 32 MiB/s" in run.status.error.message
    assert "--allow-slowdown" in run.status.error.remedy
    assert seconds(run) < 15
    assert int(run.status.result["dirty_rate"]) > 25 * MIB


def test_with_more_bandwidth_it_ends() -> None:
    run = hard(boost=1 << 30).play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.world.facts(SERVER).longest_blackout < 0.3


@pytest.mark.parametrize("budget", [300])
def test_slowed_down_by_consent_it_ends_within_its_budget(budget: int) -> None:
    run = hard(slow_down=True, budget=budget).play()
    assert run.status is not None
    if run.status.state is OperationState.DONE:
        assert run.world.facts(SERVER).longest_blackout * 1000 < (budget or 350)
        assert run.status.result["means"] == Means.SLOWED
    assert not run.problems, run.problems


@pytest.mark.parametrize("budget", [100, 400])
def test_a_budget_is_kept_or_the_move_is_undone(budget: int) -> None:
    run = hard(budget=budget).play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.UNDONE
    assert run.status.error is not None
    left = seconds_to_send(budget, "tcg")
    assert left is not None
    assert f"of its blackout budget {left * 1000:.0f} ms" in run.status.error.message


def test_a_wide_budget_is_used() -> None:
    run = hard(budget=700).play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert 0.3 < run.world.facts(SERVER).longest_blackout < 0.7


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.CRASH])
def test_a_measure_that_fails_or_kills_its_agent_costs_nothing_but_the_move(act: Act) -> None:
    clean = hard(boost=40 * MIB, slow_down=True).play()
    struck = [s for s in clean.seen if s.verb in MEASURES and s.host == SOURCE]
    assert {s.verb for s in struck} == set(MEASURES)
    for strike in struck:
        run = hard(boost=40 * MIB, slow_down=True, at=strike, act=act).play()
        assert not run.problems, (str(strike), run.problems)
        assert run.struck
    assert {s.moment for s in struck} == {Moment.BEFORE, Moment.AFTER}
