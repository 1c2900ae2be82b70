"""How a server reaches its volumes changes while something that was told of it before is on its way: a VMM
that is being started, the order of a move that one of its two agents has taken up already, a replacement.
Whoever went by what is older would read a copy that was given up since, or write past one that has joined.
"""

from dataclasses import dataclass

import msgspec
import pytest
from crash_plays import BOUND_SECONDS, hold_down
from relocating import CLIENT, HOME, SERVER, TARGET
from replicating import ReplicaConductor, Replicating, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.model.power import Power, PowerState
from nahtlos.physical.agent import destination, replacement
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.volumes import freeze
from nahtlos.physical.sim import faults
from nahtlos.physical.sim.cloudlet import NEW
from nahtlos.wire.messages import BeginReplace
from nahtlos.wire.volumes import RebuildOrder, VolumeTask

START_SECONDS = 16.0
COPY_BYTES_PER_SECOND = 16 << 20
"""Of 160 MiB: the copy joins while its server, whose VMM ended as it began, is being started."""


class SlowConductor(ReplicaConductor):
    def order(self, task: VolumeTask) -> None:
        assert isinstance(task, RebuildOrder)
        super().order(msgspec.structs.replace(task, bytes_per_second=COPY_BYTES_PER_SECOND))


@dataclass
class Starting(Replicating):
    """The copy is nearly there when the server's VMM is started anew."""

    loses: bool = False

    def _conducted(self) -> ReplicaConductor:
        conductor = SlowConductor(self.cloudlet, storage_host=HOME)
        conductor.place(next(iter(super()._conducted().servers.values())), CLIENT)
        return conductor


def kill_vmm(play: Replicating) -> None:
    """A moment later: whoever is being asked just now answers first."""

    def does() -> None:
        for vmm in play.world.running(SERVER):
            play.world.kill_vmm(vmm, "struck")

    play.later(0, does)


def started_while_a_copy_joins(monkeypatch: pytest.MonkeyPatch) -> Starting:
    began = next(s for s in strikes() if (s.host, s.verb) == (HOME, "relocate_start"))
    monkeypatch.setitem(faults.SECONDS, "start", (START_SECONDS, START_SECONDS))  # pyright: ignore[reportArgumentType]
    run = Starting(at=began, does=kill_vmm).play()
    assert run.struck
    return run


def test_copy_joins_only_once_a_server_that_is_being_started_can_be_led_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = started_while_a_copy_joins(monkeypatch)
    assert not run.problems
    assert isinstance(run.conductor, ReplicaConductor)
    assert (run.conductor.current, run.conductor.losses) == ([HOME, TARGET], 0)


class _Nobody(set[object]):
    def __contains__(self, server: object) -> bool:
        return False


def test_without_that_a_copy_would_count_that_lacks_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Context.__init__

    def begin(context: Context, *given: object, **named: object) -> None:
        begun(context, *given, **named)  # pyright: ignore[reportArgumentType]
        object.__setattr__(context, "starting", _Nobody())

    monkeypatch.setattr(Context, "__init__", begin)
    run = started_while_a_copy_joins(monkeypatch)
    assert any("lost-write" in problem for problem in run.problems)


@dataclass
class Older(Replicating):
    """A move is ordered, and its destination takes it up; before its source does, a copy is lost, the server
    goes on without it, and the order is worded anew. Or, `in_place`: a replacement is ordered by what was so
    before the loss."""

    loses: bool = False
    in_place: bool = False

    async def _go(self) -> None:
        await super()._go()
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, ReplicaConductor)
        before = conductor.server_config(SERVER, 1)
        assert {each.host for each in before.volume.copies} == {HOME, TARGET}
        if not self.in_place:
            hold_down(CLIENT, 5.0)(self)
            order = conductor.move(SERVER, TARGET)
            await world.until(self._taken_up, timeout=4.0, what="the destination's part")
            del conductor.orders[order.id]
        (vmm,) = world.running(SERVER)
        world.kill_vmm(vmm, "struck")
        await world.until(self._on_one_copy, timeout=BOUND_SECONDS, what="a start without one of the copies")
        await self._writes_on()
        if self.in_place:
            ordered = msgspec.structs.replace(conductor.replace(SERVER, NEW), server=before)
            conductor.say(CLIENT, BeginReplace(order=ordered))
            await world.until(self._is_answered, timeout=BOUND_SECONDS, what="an answer")
        else:
            anew = msgspec.structs.replace(order, server=conductor.server_config(SERVER, 1))  # pyright: ignore[reportPossiblyUnboundVariable]
            conductor.orders[anew.id] = anew
            await world.until(lambda: conductor.over(anew) is not None, timeout=BOUND_SECONDS, what="its end")
            self.status = conductor.over(anew)
        await self._writes_on()

    def _taken_up(self) -> bool:
        report = self.conductor.reports.get(TARGET)
        return report is not None and any(o.server == SERVER for o in report.operations)

    def _is_answered(self) -> bool:
        """Refused, or carried out."""
        return bool(
            self.conductor.problems
            or self.conductor.ended.keys() & {(o, CLIENT) for o in self.conductor.replacements}
        )

    def _on_one_copy(self) -> bool:
        assert isinstance(self.conductor, ReplicaConductor)
        running = self.world.running(SERVER)
        return len(running) == 1 and not running[0].server.volume.copies and self.conductor.converged()


def test_destination_that_knows_an_older_order_than_its_source_takes_no_server() -> None:
    run = Older().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.UNDONE
    assert run.status.error is not None
    assert "reaches its volumes otherwise by now" in run.status.error.message


def test_replacement_that_was_ordered_before_a_copy_was_lost_does_not_begin() -> None:
    run = Older(in_place=True).play()
    assert not run.problems
    assert any("reaches its volumes otherwise by now" in text for text in run.conductor.problems)


@pytest.mark.parametrize("in_place", [False, True])
def test_without_that_a_copy_that_was_lost_would_be_read(
    monkeypatch: pytest.MonkeyPatch, *, in_place: bool
) -> None:
    def as_it_is(*_given: object) -> None:
        return

    for module in (destination, freeze, replacement):
        monkeypatch.setattr(module, "check_paths", as_it_is)
    assert any("lost-write" in problem for problem in Older(in_place=in_place).play().problems)


STOP_SECONDS = 75
"""Longer than a server that no host owns counts as gone."""
OFF = Power(state=PowerState.OFF, serial=1, seconds=STOP_SECONDS)
AGAIN = Power(state=PowerState.ON, serial=2, boot=2)


def stops_slowly(play: Replicating) -> None:
    """Its guest does not listen to its power button, and writes on until its time is over. Then it boots."""
    world, conductor = play.world, play.conductor

    def powered(power: Power) -> None:
        conductor.servers[SERVER] = msgspec.structs.replace(conductor.servers[SERVER], power=power)

    world.deaf.add(SERVER)
    world.stop_expected(SERVER)
    powered(OFF)
    play.later(STOP_SECONDS + 10, lambda: powered(AGAIN))


def test_copy_does_not_join_past_a_server_that_takes_long_to_stop() -> None:
    """An operation of the server runs meanwhile, so that it can be led nowhere: it is not gone for that."""
    began = next(s for s in strikes() if (s.host, s.verb) == (HOME, "relocate_start"))
    run = Starting(at=began, does=stops_slowly).play()
    assert run.struck
    assert not run.problems
