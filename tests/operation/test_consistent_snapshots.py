"""Groups of snapshots around which guests freeze their file systems, under single faults: what is said to be
of frozen file systems is, every guest is thawed, and one whose agent does not answer costs only what was
asked."""

import os

import pytest
from crash_plays import failures, hold_down
from snapshooting import FIRST, SECOND, THIRD, Snapshooting, strikes

from nahtlos.model.ids import HostId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import Consistency
from nahtlos.physical.sim.faults import Act, Moment

STRICT, SOFT = Consistency.FILESYSTEM, Consistency.PREFERRED
STRIKES = list(strikes(STRICT))
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER or s.driver == "ledger"]
THOROUGH = bool(os.environ.get("NAHTLOS_THOROUGH"))


@pytest.mark.parametrize("one_host", [False, True])
@pytest.mark.parametrize("consistency", [STRICT, SOFT])
def test_undisturbed_all_are_of_frozen_file_systems(consistency: Consistency, one_host: bool) -> None:
    run = Snapshooting(consistency=consistency, one_host=one_host).play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert len(run.held) == 2
    steps = [step.what for step in run.world.trace]
    assert steps.count("guest-fsfreeze-freeze") == steps.count("guest-fsfreeze-thaw") == 2


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_fault_at_any_step_claims_nothing_and_leaves_nobody_frozen(act: Act) -> None:
    chosen = STEPS if THOROUGH else STEPS[:: 2 if act is Act.CRASH else 4]
    assert len(STEPS) > 40, len(STEPS)
    assert not failures(
        (f"{act} {strike}", Snapshooting(consistency=STRICT, at=strike, act=act)) for strike in chosen
    )


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("consistency", [STRICT, SOFT])
def test_a_guest_without_an_agent_costs_what_was_asked_for(consistency: Consistency, silent: bool) -> None:
    run = Snapshooting(consistency=consistency, silent=silent, without_agent=not silent)
    run.play()
    assert run.status is not None
    if consistency is STRICT:
        assert run.status.state is OperationState.UNDONE
        assert run.status.error is not None
        assert not any(host.snapshots for host in run.world.hosts.values())
    else:
        assert not run.problems
        assert run.status.state is OperationState.DONE
        assert run.held == ["snap-web-2-v"]


@pytest.mark.parametrize("host", [FIRST, SECOND, THIRD])
def test_an_agent_that_is_away_for_a_while_thaws_its_guest_when_it_is_back(host: HostId) -> None:
    taken = [s for s in STRIKES if s.verb == "snapshot"]
    runs = (
        (f"{strike}", Snapshooting(consistency=STRICT, at=strike, does=hold_down(host, 40.0)))
        for strike in taken
    )
    assert not failures(runs)
