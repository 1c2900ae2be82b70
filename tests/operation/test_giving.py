"""What a server is given while it runs, by its agents in the simulated world: guests that take their time or
never let go, moves and replacements in the middle of a change, agents that die around one."""

from collections.abc import Callable

import msgspec
import pytest
from crash_plays import Strike
from moving import DESTINATION, SERVER, SOURCE, Run

from nahtlos.model.ids import HostId
from nahtlos.model.inventory import ComputeStatus, OperationState
from nahtlos.model.nouns import CpuShare, Size
from nahtlos.physical.sim.cloudlet import NEW
from nahtlos.physical.sim.faults import Act, Moment

WITHIN = 60.0


class Giving(Run):
    """Grows, then is to shrink, and is moved or replaced while its guest does not."""

    in_place = False
    clings = False

    async def _go(self) -> None:
        self.want(vcpus=1, memory_mib=64, max_vcpus=4, boot_memory_mib=64, max_memory_mib=256)
        await self.rests()
        self.begin()
        self.want(vcpus=3, memory_mib=128, cpu=CpuShare(quota=50, weight=300))
        await self.has("to grow", lambda now: now == self.wanted and not now.waits_for)
        if self.clings:
            self.world.clinging.add(SERVER)
            self.world.slow_memory[SERVER] = 20.0
            self.want(vcpus=2, memory_mib=64)
            await self.has("to cling", lambda now: "let go" in now.waits_for and "back" in now.waits_for)
        host = await self._leave()
        await self.rests()
        if self.clings:
            await self.has("to give memory back", lambda now: now.memory_mib == 64, host)
            await self.has("to go on clinging", lambda now: now.vcpus == 3, host)
            self.world.clinging.clear()
        await self.has("what it is to have", lambda now: now == self.wanted and not now.waits_for, host)

    async def _leave(self) -> HostId:
        world, conductor = self.world, self.conductor
        if self.in_place:
            order = conductor.replace(SERVER, NEW)
            await world.until(lambda: conductor.replaced(order) is not None, timeout=WITHIN, what="the end")
            self.status = conductor.replaced(order)
            return SOURCE
        moved = conductor.move(SERVER, DESTINATION)
        await world.until(lambda: conductor.over(moved) is not None, timeout=WITHIN, what="the end")
        self.status = conductor.over(moved)
        return DESTINATION

    def want(self, **fields: object) -> None:
        spec = self.conductor.servers[SERVER]
        size = {name: fields.pop(name) for name in ("vcpus", "memory_mib") if name in fields}
        spec = msgspec.structs.replace(spec, size=msgspec.structs.replace(spec.size, **size), **fields)
        self.conductor.servers[SERVER] = spec

    @property
    def wanted(self) -> ComputeStatus:
        spec = self.conductor.servers[SERVER]
        return ComputeStatus(vcpus=spec.size.vcpus, memory_mib=spec.size.memory_mib, cpu=spec.cpu)

    async def rests(self) -> None:
        def at_rest() -> bool:
            return self.world.facts(SERVER).up and self.conductor.converged()

        await self.world.until(at_rest, timeout=WITHIN, what="rest")

    async def has(self, what: str, holds: Callable[[ComputeStatus], bool], host: HostId = SOURCE) -> None:
        """As its host reports; how long each change took is left out."""

        def reported() -> bool:
            report = self.conductor.reports.get(host)
            found = [each.compute for each in report.servers if each.id == SERVER] if report else []
            return any(holds(msgspec.structs.replace(each, took_ms={})) for each in found)

        await self.world.until(reported, timeout=WITHIN, what=what)

    def _place_wanted(self) -> tuple[str, int]:
        return (SOURCE, 2) if self.in_place else super()._place_wanted()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("clings", [False, True])
def test_a_server_keeps_what_it_has_and_its_changes_go_on(in_place: bool, clings: bool) -> None:
    run = Giving()
    run.in_place, run.clings = in_place, clings
    run.play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE


def test_an_agent_told_everything_is_asked_nothing_more() -> None:
    run = Giving().play()
    calls = [s for s in run.seen if s.verb == "compute_reconcile" and s.moment is Moment.AFTER]
    assert [call.host for call in calls] == [SOURCE]


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.CRASH])
@pytest.mark.parametrize("moment", [Moment.BEFORE, Moment.AFTER])
def test_a_change_that_fails_or_whose_agent_dies_is_made_all_the_same(act: Act, moment: Moment) -> None:
    at = Strike(SOURCE, "hypervisor", "compute_reconcile", 1, moment)
    run = Giving(at=at, act=act).play()
    assert run.struck
    assert not run.problems


def test_the_capacity_a_server_takes_is_what_it_was_given_last() -> None:
    run = Giving().play()
    (server,) = (each for each in run.conductor.reports[DESTINATION].servers if each.id == SERVER)
    assert server.size == Size(vcpus=3, memory_mib=128)
