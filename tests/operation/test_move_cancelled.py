"""A move that is given up before its switch: cancelled at any moment, with its link stalled, while it waits
for its turn; or by the deadline of its source. The server never ceases to be where it was, and can be moved
again at once.
"""

import asyncio
from dataclasses import dataclass

import pytest
from crash_plays import Strike
from moving import DESTINATION, SERVER, SOURCE, Run, strikes

from nahtlos.model.ids import OperationId
from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.turns import LEASE_SECONDS, Turns
from nahtlos.physical.sim.cloudlet import PRECOPY_DEADLINE
from nahtlos.wire.messages import CancelOperation

MOVE = OperationId(f"op-{SERVER}-1-1")
AT_ONCE = 0.5
"""Virtual seconds: an order's way to the agent, one look at the stream, and its cancellation."""


@dataclass
class Cancelled(Run):
    """Cancelled so many seconds after `at`, if at all; then, if it was undone, moved again."""

    after: float | None = None
    stalled: bool = False
    again: bool = True
    taken_seconds: float = 0.0
    """From the order to cancel to the end."""
    second: OperationState | None = None

    async def _go(self) -> None:
        self.does = Cancelled._begin_to_end
        await super()._go()
        if self.again and self.status is not None and self.status.state is OperationState.UNDONE:
            self.world.stall_link(SOURCE, DESTINATION, on=False)
            order = self.conductor.move(SERVER, DESTINATION, 2)
            await self.world.until(
                lambda: self.conductor.over(order) is not None, timeout=60.0, what="the second attempt"
            )
            await self.world.until(self.conductor.converged, timeout=60.0, what="convergence")
            ended = self.conductor.over(order)
            self.second = ended.state if ended is not None else None
            self.status = ended

    def _begin_to_end(self) -> None:
        if self.stalled:
            self.world.stall_link(SOURCE, DESTINATION, on=True)
        if self.after is not None:
            asyncio.get_running_loop().create_task(self._cancel(self.after))

    async def _cancel(self, after: float) -> None:
        await asyncio.sleep(after)
        began = self.world.now()
        try:
            await self.conductor._sessions[SOURCE].request(CancelOperation(id=MOVE), timeout=3.0)
        except Exception:
            return  # past the point where it can be undone
        while self.conductor.ended.get((MOVE, SOURCE)) is None:
            await asyncio.sleep(0.01)
        self.taken_seconds = self.world.now() - began


def first(verb: str) -> Strike:
    return next(s for s in strikes() if s.verb == verb and s.host == SOURCE and s.moment == "after")


STARTED = first("migrate_start")


def test_cancelled_at_any_moment_the_server_is_on_one_host_and_can_be_moved_again() -> None:
    ends: set[OperationState] = set()
    for number in range(12):
        run = Cancelled(at=STARTED, after=number * 0.004).play()
        assert not run.problems, (number, run.problems)
        ends.add(OperationState.UNDONE if run.second is not None else OperationState.DONE)
        assert run.second in (None, OperationState.DONE)
        assert run.world.facts(SERVER).boots == 1
    assert ends == {OperationState.UNDONE, OperationState.DONE}


def test_with_its_link_stalled_a_move_is_cancelled_at_once() -> None:
    run = Cancelled(at=STARTED, stalled=True, after=2.0).play()
    assert not run.problems
    assert run.second is OperationState.DONE
    assert 0 < run.taken_seconds < AT_ONCE
    assert run.world.facts(SERVER).boots == 1


def test_with_its_link_stalled_for_ever_the_source_gives_up_by_its_own_deadline() -> None:
    """The hypervisor would say `active` for ever."""
    run = Cancelled(at=STARTED, stalled=True, again=False).play()
    assert not run.problems
    assert run.status is not None and run.status.state is OperationState.UNDONE
    assert run.status.times["done"] - run.status.times["precopy"] < PRECOPY_DEADLINE + 2.0
    assert run.world.facts(SERVER).boots == 1


@pytest.mark.parametrize("again", [True, False])
def test_cancelled_while_it_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """Another one has the turn of the source all the time."""
    real = Turns.ask
    other = OperationId("another")

    def never_its_own(turns: Turns, operation: OperationId, now: float) -> bool:
        if operation == MOVE:
            real(turns, other, now)
        return real(turns, operation, now)

    monkeypatch.setattr(Turns, "ask", never_its_own)
    run = Cancelled(at=STARTED, after=1.0 + LEASE_SECONDS, again=again).play()
    assert not run.problems
    assert 0 < run.taken_seconds < AT_ONCE
    assert run.world.facts(SERVER).boots == 1
    if again:
        assert run.second is OperationState.DONE
    else:
        assert run.status is not None and run.status.state is OperationState.UNDONE
