"""The simulated data centre has the traps of the real one: each wrong order of a move costs what it costs
there, and the proven order costs nothing. A world in which every order were harmless would prove nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.ports import (
    Crash,
    Drivers,
    MigrationPhase,
    MoveRole,
    NetworkDesired,
    StorageDesired,
    VmmId,
)
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import EDGE, OLD, Cloudlet, Conductor, server_spec
from nahtlos.physical.sim.faults import Act, Call, Life, Moment, Scripted
from nahtlos.physical.sim.host import drivers_of

A, B = HostId("host-1"), HostId("host-2")


class Stage:
    """One server on A, traffic for it, and the drivers of both hosts."""

    def __init__(self, folder: Path) -> None:
        self.cloudlet = Cloudlet.build(folder, hosts=2, seed=1)
        self.world = self.cloudlet.world
        self.drivers: dict[HostId, Drivers] = {h: drivers_of(self.world, h, Life(h)) for h in (A, B, EDGE)}
        self.conductor = Conductor(self.cloudlet, storage_host=A)
        self.spec = server_spec(1)
        self.conductor.place(self.spec, A)
        self.server = self.conductor.server_config(self.spec.id, 1)
        self.old, self.new = VmmId(self.spec.id, 1), VmmId(self.spec.id, 2)

    @property
    def network(self) -> NetworkConfig:
        return self.conductor.network_config()

    @property
    def port(self) -> PortConfig:
        return self.network.ports[0]

    async def open(self) -> None:
        volume = VolumeSpec(id=VolumeId("web-1-v"), size_mib=160, image=None, host=A)
        await self.drivers[A].storage.reconcile(StorageDesired(volumes=(volume,)))
        await self.drivers[A].network.port_create(self.port, self.network, deliver=True)
        await self.drivers[A].hypervisor.start(self.server, OLD)
        for host in self.drivers:
            config = self.conductor._config(host)
            await self.drivers[host].network.reconcile(NetworkDesired(config=config))
        await self.world.until(lambda: self.world.facts(self.spec.id).up, timeout=30, what="boot")

    async def prepare(self, *, sacrifice: bool = True) -> None:
        a, b = self.drivers[A], self.drivers[B]
        await b.network.port_create(self.port, self.network, deliver=False)
        await b.network.move_prepare(self.port, self.network, MoveRole.DESTINATION, "10.99.0.11")
        await b.hypervisor.incoming_start(self.server, 2, OLD)
        uri = await b.hypervisor.incoming_listen(self.new, "10.99.0.12")
        if sacrifice:
            assert await b.network.move_sacrifice(self.port.id)
        await a.network.move_prepare(self.port, self.network, MoveRole.SOURCE, "10.99.0.12")
        await a.hypervisor.migrate_start(self.old, uri, peer=B, bandwidth=1 << 30)
        await asyncio.sleep(0.1)

    async def switch(self, *, drain: bool = True) -> None:
        await self.drivers[B].network.move_switch(self.port, self.network, MoveRole.DESTINATION)
        await self.drivers[A].network.move_switch(self.port, self.network, MoveRole.SOURCE)
        if drain:
            assert await self.drivers[A].network.move_drain(self.port.id, timeout=1.0)

    async def finish(self) -> None:
        await self.drivers[B].hypervisor.incoming_wait(self.new, timeout=5.0)
        await self.drivers[B].hypervisor.resume(self.new)
        await asyncio.sleep(0.2)
        await self.drivers[A].hypervisor.kill(self.old)
        self.world.settle()
        await asyncio.sleep(0.1)
        self.world.settle()

    def lost(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for flow in self.world.paths.flows.values():
            for reason, count in flow.lost.items():
                found[reason] = found.get(reason, 0) + count
        return found


Play = Callable[[Stage], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Play], Stage]:
    stages: list[Stage] = []

    def run(act: Play) -> Stage:
        async def main() -> None:
            stages.append(Stage(tmp_path))
            await stages[0].open()
            await act(stages[0])

        run_virtual(main(), seed=1, limit_seconds=600)
        return stages[0]

    return run


def test_the_proven_order_loses_nothing(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.prepare()
        await stage.switch()
        await stage.drivers[A].hypervisor.pause(stage.old)
        await stage.finish()

    stage = play(act)
    assert stage.lost() == {}
    assert stage.world.violations == []
    assert stage.world.facts(stage.spec.id).boots == 1


def test_without_a_sacrificed_frame_a_real_one_is_spoiled(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.prepare(sacrifice=False)
        await stage.switch()
        await stage.drivers[A].hypervisor.pause(stage.old)
        await stage.finish()

    assert play(act).lost() == {"spoiled by a VMM that was receiving": 1}


def test_stopping_before_the_switch_loses_frames(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.prepare()
        await stage.drivers[A].hypervisor.pause(stage.old)
        await stage.switch(drain=False)
        await stage.finish()
        stage.world.remove_tap(stage.world.hosts[A], stage.port.id)

    assert sum(play(act).lost().values()) >= 1


def test_without_the_gate_frames_that_came_by_the_tunnel_are_lost(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.prepare()
        stage.world.paths.gate(A, stage.port.mac, on=False)
        await stage.switch()
        await stage.drivers[A].hypervisor.pause(stage.old)
        await stage.finish()

    assert "came to host-1 by the tunnel and may not leave by it" in play(act).lost()


def test_a_source_resumed_after_it_was_sent_is_a_second_copy(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.prepare()
        await stage.switch()
        await stage.drivers[A].hypervisor.pause(stage.old)
        await stage.drivers[B].hypervisor.incoming_wait(stage.new, timeout=5.0)
        await stage.drivers[B].hypervisor.resume(stage.new)
        await stage.drivers[A].hypervisor.resume(stage.old)

    assert {v.kind for v in play(act).world.violations} == {"two-copies", "stale-copy", "epoch"}


def test_booting_a_server_that_runs_elsewhere_is_noticed(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.drivers[B].network.port_create(stage.port, stage.network, deliver=True)
        await stage.drivers[B].hypervisor.start(stage.server, OLD)

    assert {v.kind for v in play(act).world.violations} == {"rebooted", "two-copies"}


def test_ending_the_only_copy_is_noticed(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.drivers[A].hypervisor.kill(stage.old)

    assert [v.kind for v in play(act).world.violations] == ["last-copy"]


def test_the_source_never_stops_by_itself(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        await stage.prepare()
        await asyncio.sleep(30)
        progress = await stage.drivers[A].hypervisor.migrate_progress(stage.old)
        assert progress.phase is MigrationPhase.ACTIVE
        assert progress.passes > 100
        assert [v.host for v in stage.world.running(stage.spec.id)] == [A]

    play(act)


def test_a_guest_that_writes_faster_than_the_stream_does_not_converge(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        for vmm in stage.world.vmms_of(stage.spec.id):
            vmm.dirty_rate = 2 << 30
        await stage.prepare()
        await asyncio.sleep(30)
        progress = await stage.drivers[A].hypervisor.migrate_progress(stage.old)
        assert progress.remaining > 4 << 20

    play(act)


def test_a_destination_that_died_fails_the_stream_and_the_source_runs_on(
    play: Callable[[Play], Stage],
) -> None:
    async def act(stage: Stage) -> None:
        await stage.prepare()
        stage.world.kill_vmm(stage.world.hosts[B].vmms[stage.new], "test")
        await asyncio.sleep(0.05)
        progress = await stage.drivers[A].hypervisor.migrate_progress(stage.old)
        assert progress.phase is MigrationPhase.FAILED
        with pytest.raises(Refused):
            await stage.drivers[B].hypervisor.incoming_wait(stage.new, timeout=1.0)
        await stage.drivers[A].hypervisor.migrate_cancel(stage.old)

    stage = play(act)
    assert [v.host for v in stage.world.running(stage.spec.id)] == [A]
    assert stage.lost() == {}


def test_a_stalled_stream_stays_active(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        stage.world.stall_link(A, B, on=True)
        await stage.prepare()
        await asyncio.sleep(60)
        hypervisor = stage.drivers[A].hypervisor
        assert (await hypervisor.migrate_progress(stage.old)).phase is MigrationPhase.ACTIVE
        await hypervisor.pause(stage.old)
        with pytest.raises(Unavailable):
            await stage.drivers[B].hypervisor.incoming_wait(stage.new, timeout=2.0)
        await hypervisor.migrate_cancel(stage.old)
        await hypervisor.resume(stage.old)

    assert play(act).world.violations == []


def test_frames_parked_at_an_abandoned_destination_come_back(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        a, b = stage.drivers[A], stage.drivers[B]
        await stage.prepare()
        await stage.switch()
        await asyncio.sleep(0.5)
        await a.network.move_revert(stage.port, stage.network, MoveRole.SOURCE)
        returned = await b.network.move_revert(stage.port, stage.network, MoveRole.DESTINATION)
        assert returned >= 50
        await b.hypervisor.kill(stage.new)
        await b.network.port_delete(stage.port.id)
        await asyncio.sleep(0.1)
        stage.world.settle()

    assert play(act).lost() == {}


def test_power_and_kills_excuse_a_reboot_and_leave_the_disk(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        stage.world.power_off(A)
        with pytest.raises(Unavailable):
            await stage.drivers[A].hypervisor.observe()
        stage.world.power_on(A)
        assert await stage.drivers[A].hypervisor.observe() == ()
        assert [v.id for v in await stage.drivers[A].storage.observe()] == ["web-1-v"]
        with pytest.raises(Refused):  # taps are gone
            await stage.drivers[A].hypervisor.start(stage.server, OLD)
        await stage.drivers[A].network.port_create(stage.port, stage.network, deliver=True)
        await stage.drivers[A].hypervisor.start(stage.server, OLD)
        assert (await stage.drivers[A].hypervisor.observe())[0].state is RunState.RUNNING

    stage = play(act)
    assert stage.world.violations == []
    assert stage.world.facts(stage.spec.id).boots == 2


@pytest.mark.parametrize(("moment", "runs"), [(Moment.BEFORE, True), (Moment.AFTER, False)])
def test_a_verb_may_fail_before_or_after_its_effect(
    play: Callable[[Play], Stage], moment: Moment, runs: bool
) -> None:
    def when(call: Call, at: Moment) -> Act:
        return Act.UNAVAILABLE if (call.verb, at) == ("pause", moment) else Act.PASS

    async def act(stage: Stage) -> None:
        stage.world.troubles = Scripted(when)
        with pytest.raises(Unavailable, match="simulated"):
            await stage.drivers[A].hypervisor.pause(stage.old)
        assert bool(stage.world.running(stage.spec.id)) is runs

    play(act)


def test_nothing_a_dead_agent_tries_has_an_effect(play: Callable[[Play], Stage]) -> None:
    async def act(stage: Stage) -> None:
        life = Life("agent")
        hypervisor = drivers_of(stage.world, A, life).hypervisor
        life.end("test")
        with pytest.raises(Crash):
            await hypervisor.kill(stage.old)
        assert stage.world.running(stage.spec.id)

    play(act)
