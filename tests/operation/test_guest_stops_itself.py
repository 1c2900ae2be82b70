"""A guest may stop without having been told to, for instance at a disk error (`werror=stop`): its pre-copy is
then no longer held back and completes, although nobody has asked for the stop. Then, too, only the
destination knows whose the server is.
"""

import pytest
from crash_plays import Event, Strike, kill_agents, partition
from moving import DESTINATION, SERVER, SOURCE, Run

from nahtlos.physical.sim.faults import Moment

AT = [
    Strike(SOURCE, "hypervisor", "migrate_start", 1, Moment.AFTER),
    Strike(SOURCE, "hypervisor", "migrate_progress", 1, Moment.AFTER),
    Strike(SOURCE, "hypervisor", "migrate_progress", 4, Moment.BEFORE),
]


def stop(run: Run) -> None:
    vmm = run.vmm(SOURCE)
    assert vmm is not None
    run.world.pause(vmm)


def part(run: Run) -> None:
    """Long enough for the destination to take the server alone; what waits at the source is lost then."""
    run.loss_excused = True
    partition(f"host/{SOURCE}", f"host/{DESTINATION}", 70.0)(run)


def and_then(event: Event, seconds: float = 0.0) -> Event:
    def does(run: Run) -> None:
        stop(run)
        run.later(seconds, lambda: event(run))

    return does


@pytest.mark.parametrize("at", AT, ids=str)
@pytest.mark.parametrize(
    "event",
    [
        pytest.param(stop, id="only-that"),
        pytest.param(and_then(part), id="peers-parted"),
        pytest.param(and_then(kill_agents(SOURCE)), id="source-agent-killed"),
        pytest.param(and_then(kill_agents(DESTINATION), 0.1), id="destination-agent-killed"),
    ],
)
def test_a_guest_that_stopped_by_itself_runs_again_once(event: Event, at: Strike) -> None:
    run = Run(at=at, does=event).play()
    assert run.struck
    assert not run.problems
    assert run.world.facts(SERVER).boots == 1
