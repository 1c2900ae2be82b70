"""A host that is drained under the real orchestrator and agents, in virtual time: its server, its volumes and
their snapshots leave it, whoever is killed meanwhile, and nothing of them is left there."""

import asyncio
import random
import tempfile
from pathlib import Path

import pytest
from crash_plays import memory
from quick_database import database_in_the_loop
from simulated_cloud import IMAGE, SimulatedCloud

from nahtlos.model.blueprint import HostIntent, HostPhase
from nahtlos.model.ids import HostId, ServerId, SnapshotId, VolumeId
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.volumes import SnapshotRequest, VolumeRequest

LEAVING = HostId("host-1")
WEB, DATA, CLONE = ServerId("web"), VolumeId("data"), VolumeId("clone")
THEN, ELSE = SnapshotId("then"), SnapshotId("else")


async def made(cloud: SimulatedCloud) -> None:
    """A server, a volume of it with two snapshots, and a clone of one, all on one host."""

    async def settled(service: CloudService) -> bool:
        return all(view.settled for view in await service.volumes.volumes())

    await cloud.ready()
    await cloud.ask(lambda s: s.volumes.create_volume(VolumeRequest(name=DATA, size_mib=64, host=LEAVING)))
    await cloud.until(settled, timeout=60, what="a volume")
    await cloud.ask(
        lambda s: s.create_server(ServerRequest(name=WEB, image=IMAGE, host=LEAVING, volumes=(DATA,)))
    )
    await cloud.until(_up(cloud), timeout=60, what="a server")
    await cloud.until(settled, timeout=60, what="its volumes")
    for name in (THEN, ELSE):
        request = SnapshotRequest(name=name, volumes=(DATA,))
        await cloud.ask(lambda s, request=request: s.volumes.create_snapshots(request))

        async def kept(service: CloudService, name: SnapshotId = name) -> bool:
            return name in {view.spec.id for view in await service.volumes.snapshots()}

        await cloud.until(kept, timeout=60, what="a snapshot")
    await cloud.ask(lambda s: s.volumes.create_volume(VolumeRequest(name=CLONE, snapshot=THEN)))
    await cloud.until(settled, timeout=60, what="a clone")


def _up(cloud: SimulatedCloud):  # type: ignore[no-untyped-def]
    async def up(_: CloudService) -> bool:
        return cloud.up(WEB)

    return up


async def killed_now_and_then(cloud: SimulatedCloud, chance: random.Random) -> None:
    for _ in range(8):
        await asyncio.sleep(chance.uniform(0.05, 1.5))
        host = chance.choice((*cloud.agents, None))
        if host is None:
            cloud.orchestrator.kill("now and then")
        elif chance.random() < 0.5:
            cloud.agents[host].kill("now and then")
        else:
            cloud.world.kill_storage(host)


async def drained(cloud: SimulatedCloud, seed: int) -> None:
    await made(cloud)
    here = cloud.world.hosts[LEAVING]
    before = {name: each.writes for name, each in here.snapshots.items()}
    assert set(before) == {THEN, ELSE} and CLONE in here.volumes

    async def is_empty(service: CloudService) -> bool:
        for name, writes in before.items():
            found = {h.snapshots[name].writes for h in cloud.world.hosts.values() if name in h.snapshots}
            assert found == {writes}, f"{name} holds {found} of {writes} writes"
        return (await service.host(LEAVING)).phase is HostPhase.DRAINED

    await cloud.ask(lambda s: s.set_host_intent(LEAVING, HostIntent.DRAINED))
    async with asyncio.TaskGroup() as tasks:
        if seed:
            tasks.create_task(killed_now_and_then(cloud, random.Random(seed)))
        await cloud.until(is_empty, timeout=400, what="an empty host")
    assert not here.volumes and not here.snapshots
    view = await cloud.ask(lambda s: s.host(LEAVING))
    assert view.kept.volumes == view.kept.snapshots == ()
    for name in before:
        snapshot = await cloud.ask(lambda s, name=name: s.volumes.snapshot(name))
        (place,) = snapshot.spec.hosts
        volume = await cloud.ask(lambda s, snapshot=snapshot: s.volumes.volume(snapshot.spec.volume))
        assert place == volume.spec.host != LEAVING
        assert name in cloud.world.hosts[place].snapshots
        await cloud.ask(lambda s, name=name: s.volumes.delete_snapshot(name))

    async def are_gone(service: CloudService) -> bool:
        return not await service.volumes.snapshots()

    await cloud.until(are_gone, timeout=60, what="the end of the snapshots")
    assert not any(host.snapshots for host in cloud.world.hosts.values())
    assert not cloud.world.violations and cloud.up(WEB)


@pytest.mark.parametrize("seed", range(3))
def test_a_drained_host_keeps_nothing(seed: int) -> None:
    with database_in_the_loop(), tempfile.TemporaryDirectory(dir=memory()) as folder:
        cloud = SimulatedCloud(Path(folder), seed=seed)
        run_virtual(cloud.run(lambda c: drained(c, seed)), seed=seed, limit_seconds=10_000)
    assert not cloud.orchestrator.bugs and not cloud.problems
    assert not any(agent.bugs for agent in cloud.agents.values())
