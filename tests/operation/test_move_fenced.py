"""A move whose destination is told that its source is fenced: it waits for nothing any more. Told wrongly, of
a source that lives, the server is on one host all the same.
"""

import asyncio
from dataclasses import dataclass

from crash_plays import Moment, lose_power
from moving import DESTINATION, SERVER, SOURCE, Run, strikes

from nahtlos.model.errors import Error
from nahtlos.model.ids import OperationId
from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.destination import SILENCE_SECONDS
from nahtlos.wire.messages import CancelOperation

MOVE = OperationId(f"op-{SERVER}-1-1")
STEPS = [s for s in strikes() if s.moment is Moment.AFTER]
DARK_SECONDS = 100.0
TOLD_AFTER = 0.5
AT_ONCE = 5.0


@dataclass
class Fenced(Run):
    """The destination is told half a second after `at`; if `dark`, its source has lost its power then."""

    dark: bool = True
    taken_seconds: float | None = None
    """From the word to the end at the destination; None: it had ended, or had not begun."""

    async def _go(self) -> None:
        self.does = Fenced._happens
        await super()._go()

    def _happens(self) -> None:
        if self.dark:
            lose_power(SOURCE, DARK_SECONDS)(self)
        asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        await asyncio.sleep(TOLD_AFTER)
        if self._over():
            return
        began = self.world.now()
        try:
            await self.conductor._sessions[DESTINATION].request(CancelOperation(id=MOVE), timeout=3.0)
        except Error:
            return
        while not self._over():
            await asyncio.sleep(0.05)
        self.taken_seconds = self.world.now() - began

    def _over(self) -> bool:
        return (MOVE, DESTINATION) in self.conductor.ended


def test_without_its_source_a_move_ends_at_once_at_its_destination() -> None:
    ends: set[OperationState] = set()
    told = 0
    for at in STEPS:
        run = Fenced(at=at).play()
        assert not run.problems, (at, run.problems)
        assert run.status is not None
        ends.add(run.status.state)
        if run.taken_seconds is not None:
            told += 1
            assert run.taken_seconds < AT_ONCE < SILENCE_SECONDS, (at, run.taken_seconds)
    assert told > 5
    assert ends == {OperationState.UNDONE, OperationState.DONE}


def test_told_wrongly_it_is_on_one_host_and_runs_on() -> None:
    ends: set[OperationState] = set()
    for at in STEPS:
        run = Fenced(at=at, dark=False).play()
        assert not run.problems, (at, run.problems)
        assert run.status is not None
        assert run.world.facts(SERVER).boots == 1, at
        ends.add(run.status.state)
    assert OperationState.UNDONE in ends
