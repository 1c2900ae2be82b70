"""A move asks for its turn to be switched while the other agent is away: it waits, its pre-copy held, and
goes on; away for too long, it is undone, and the server has never stood still."""

from collections.abc import Callable

import pytest
from moving import DESTINATION, SERVER, SOURCE, Run, Strike

from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.switch_turn import AWAY_SECONDS
from nahtlos.physical.sim.faults import Moment

NEAR = Strike(SOURCE, "hypervisor", "migrate_progress", 3, Moment.BEFORE)
"""The stream flows, and has not come near its end yet."""


def away(seconds: float) -> Callable[[Run], None]:
    """The agents do not reach each other; the stream of memory goes another way."""

    def does(run: Run) -> None:
        parties = f"host/{SOURCE}", f"host/{DESTINATION}"
        run.cloudlet.network.partition(*parties)
        run.later(seconds, lambda: run.cloudlet.network.heal(*parties))

    return does


@pytest.mark.parametrize("seconds", [3.0, 8.0, 14.0])
def test_an_agent_that_is_away_for_a_while_is_waited_for(seconds: float) -> None:
    run = Run(at=NEAR, does=away(seconds), guarded=False).play()
    assert run.struck and not run.problems, run.problems
    assert run.status is not None and run.status.state is OperationState.DONE
    times = run.status.times
    assert times["switch"] - times["precopy"] >= seconds - 0.5


def test_one_that_stays_away_ends_the_move_and_says_whom_to_look_at() -> None:
    run = Run(at=NEAR, does=away(3 * AWAY_SECONDS), guarded=False).play()
    assert run.struck and not run.problems, run.problems
    assert run.status is not None and run.status.state is OperationState.UNDONE
    error = run.status.error
    assert error is not None and error.field == "destination" and DESTINATION in error.remedy
    assert run.world.facts(SERVER).boots == 1
    assert "switch" not in run.status.times


def test_whom_it_waits_for_is_said() -> None:
    said: set[str] = set()

    def does(run: Run) -> None:
        away(6.0)(run)

        def look() -> None:
            report = run.conductor.reports.get(SOURCE)
            operations = report.operations if report else ()
            said.update(o.waits_for for o in operations if o.waits_for)

        for tick in range(1, 12):
            run.later(tick * 0.5, look)

    run = Run(at=NEAR, does=does, guarded=False).play()
    assert not run.problems
    assert any(f"{DESTINATION}, which does not answer" in text for text in said), said
