"""A volume that is written all the time under the real orchestrator and agents, in virtual time: it gets more
copies and gives them up again, one of them with its host's power, and a snapshot of it goes to another host,
whoever is killed meanwhile. What was asked for comes about, no write is lost, and every copy that counts has
all of them."""

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from quick_database import database_in_the_loop
from simulated_cloud import IMAGE, SimulatedCloud, memory
from test_drained_snapshots import killed_now_and_then

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import HostId, ServerId, SnapshotId, VolumeId
from nahtlos.model.storage import ReplicaState
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.volumes import hosts_with
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.volumes import SnapshotMoveRequest, SnapshotRequest, VolumeChange

HOME = HostId("host-1")
WEB, DISK, THEN = ServerId("web"), VolumeId("web-disk"), SnapshotId("then")
Ask = Callable[[], Awaitable[None]]


class Play:
    def __init__(self, cloud: SimulatedCloud, seed: int) -> None:
        self.cloud = cloud
        self.chance = random.Random(seed)
        self.disturbed = bool(seed)

    async def asks(self, ask: Ask) -> None:
        """And meanwhile this and that is killed; until it has come about and everything is at rest."""
        async with asyncio.TaskGroup() as tasks:
            if self.disturbed:
                tasks.create_task(killed_now_and_then(self.cloud, self.chance))
            tasks.create_task(_of(ask))
        await self.cloud.until(self.at_rest, timeout=400, what="what was asked for")

    async def at_rest(self, service: CloudService) -> bool:
        view = await service.volumes.volume(DISK)
        return view.settled and self.cloud.up(WEB)

    async def has(self, copies: int) -> None:
        cloud = self.cloud
        await self.asks(lambda: _with_copies(cloud, copies))
        spec = (await cloud.ask(lambda s: s.volumes.volume(DISK))).spec
        assert [copy.state for copy in spec.copies] == [ReplicaState.CURRENT] * copies
        await cloud.until(self.converged, timeout=60, what="hosts that hold no more than they should")
        held = hosts_with(cloud.world, DISK)
        assert held.keys() == set(spec.current)
        assert {copy.writes for copy in held.values()} == {cloud.world.disks.acknowledged[DISK]}

    async def converged(self, service: CloudService) -> bool:
        spec = (await service.volumes.volume(DISK)).spec
        return hosts_with(self.cloud.world, DISK).keys() == {copy.host for copy in spec.copies}

    async def snapshot_goes(self, to: HostId) -> None:
        cloud = self.cloud
        before = {s.writes for h in cloud.world.hosts.values() for n, s in h.snapshots.items() if n == THEN}
        await self.asks(lambda: cloud.ask(lambda s: _brought(s, to)))

        async def let_go(_: CloudService) -> bool:
            found = [h.id for h in cloud.world.hosts.values() if THEN in h.snapshots]
            assert {cloud.world.hosts[h].snapshots[THEN].writes for h in found} == before
            return found == [to]

        await cloud.until(let_go, timeout=60, what="the snapshot there and nowhere else")

    async def power_fails(self) -> None:
        """Of a host with a copy; nobody is asked for anything when it is back."""
        cloud = self.cloud
        (vmm,) = cloud.world.running(WEB)
        spec = (await cloud.ask(lambda s: s.volumes.volume(DISK))).spec
        host = next(copy.host for copy in spec.copies if copy.host != vmm.host)
        cloud.world.power_off(host)
        cloud.agents[host].held_down = True
        cloud.agents[host].kill("power")
        before = cloud.world.disks.acknowledged[DISK]

        async def goes_on(service: CloudService) -> bool:
            current = (await service.volumes.volume(DISK)).spec.current
            return host not in current and cloud.world.disks.acknowledged[DISK] > before

        await cloud.until(goes_on, timeout=60, what="writes without the copy")
        cloud.world.power_on(host)
        cloud.agents[host].held_down = False
        await cloud.until(self.at_rest, timeout=400, what="the copy to be current again")
        assert host in (await cloud.ask(lambda s: s.volumes.volume(DISK))).spec.current


async def _of(ask: Ask) -> None:
    await ask()


async def _with_copies(cloud: SimulatedCloud, copies: int) -> None:
    """Refused as long as a host that could have one is away."""
    while not await cloud.ask(lambda s: _taken(s, copies)):
        await asyncio.sleep(1.0)


async def _taken(service: CloudService, copies: int) -> bool:
    try:
        await service.volumes.change_volume(DISK, VolumeChange(copies=copies))
    except Conflict as error:
        assert error.field == "copies", error
        return False
    return True


async def _brought(service: CloudService, to: HostId) -> None:
    """Said again where the one before it took effect and its answer was lost."""
    view = await service.volumes.snapshot(THEN)
    if view.spec.hosts != (to,) and not await service.volumes.tasks():
        await service.volumes.move_snapshot(THEN, SnapshotMoveRequest(to=to))


async def used(cloud: SimulatedCloud, seed: int) -> None:
    play = Play(cloud, seed)
    await cloud.ready()
    await cloud.ask(lambda s: s.create_server(ServerRequest(name=WEB, image=IMAGE, host=HOME)))
    await cloud.until(play.at_rest, timeout=60, what="a server")
    home = (await cloud.ask(lambda s: s.volumes.volume(DISK))).spec.host
    await cloud.ask(lambda s: s.volumes.create_snapshots(SnapshotRequest(name=THEN, volumes=(DISK,))))
    await cloud.until(play.at_rest, timeout=60, what="a snapshot")
    await play.snapshot_goes(next(HostId(h) for h in ("host-2", "host-3") if h != home))
    if seed % 2:
        await play.snapshot_goes(home)
    for copies in (2, 3, 2, 1):
        before = cloud.world.disks.acknowledged[DISK]
        await play.has(copies)
        assert cloud.world.disks.acknowledged[DISK] > before, "it was written meanwhile"
        if copies == 3:
            await play.power_fails()
    assert not cloud.world.violations


@pytest.mark.parametrize("seed", range(3))
def test_what_is_asked_of_a_volume_in_use_comes_about(seed: int) -> None:
    with database_in_the_loop(), tempfile.TemporaryDirectory(dir=memory()) as folder:
        cloud = SimulatedCloud(Path(folder), seed=seed)
        run_virtual(cloud.run(lambda c: used(c, seed)), seed=seed, limit_seconds=10_000)
    assert not cloud.orchestrator.bugs and not cloud.problems
    assert not any(agent.bugs for agent in cloud.agents.values())
