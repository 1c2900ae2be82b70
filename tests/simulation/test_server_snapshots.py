"""Whole servers' snapshots, with their memory, under the real orchestrator and agents in virtual time."""

import asyncio
import random

import pytest
from simulated_cloud import SimulatedCloud, killed_for_ever
from test_stopped_servers import H1, H2, WEB, becomes, created, played, suspend

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import Conflict, Error, NotFound, Refused
from nahtlos.model.ids import ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.physical.sim.cloudlet import NEW
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.server_snapshots import (
    ServerRevertRequest,
    ServerSnapshotRequest,
    ServerSnapshotView,
)
from nahtlos.runtime.controllers.volumes import VolumeRequest

THEN = SnapshotId("then")
ASKED = ServerSnapshotRequest(name="then", server=WEB)
BACK = ServerRevertRequest(snapshot=THEN)


async def taken(cloud: SimulatedCloud, request: ServerSnapshotRequest = ASKED) -> ServerSnapshotView:
    await cloud.ask(lambda s: s.server_snapshots.create(request))

    async def there(service: CloudService) -> bool:
        return any(v.spec.id == request.name for v in await service.server_snapshots.server_snapshots())

    await cloud.until(there, timeout=200, what="the snapshot")
    return await cloud.ask(lambda s: s.server_snapshots.server_snapshot(SnapshotId(request.name)))


async def goes_back(cloud: SimulatedCloud) -> None:
    cloud.world.stop_expected(WEB)
    await cloud.ask(lambda s: s.server_snapshots.revert(WEB, BACK))
    await runs(cloud)


async def runs(cloud: SimulatedCloud) -> None:
    await becomes(
        cloud,
        WEB,
        lambda v: v.state is RunState.RUNNING and v.power.state == "on",
        "to go on",
    )


def writes(cloud: SimulatedCloud) -> int:
    """That its memory knows of."""
    (vmm,) = cloud.world.running(WEB)
    assert vmm.guest is not None
    return sum(vmm.guest.writes.values())


async def tasks(service: CloudService) -> bool:
    return bool(await service.volumes.tasks())


async def names(cloud: SimulatedCloud) -> set[str]:
    volumes = await cloud.ask(lambda s: s.volumes.volumes())
    snapshots = await cloud.ask(lambda s: s.volumes.snapshots())
    return {*(v.spec.id for v in volumes), *(v.spec.id for v in snapshots)}


def test_a_server_goes_back_to_what_it_remembered_and_what_its_disk_held() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        view = await taken(cloud)
        assert view.why_not == ""
        assert cloud.world.facts(WEB).longest_blackout < 0.1
        kept = next(
            s.writes for h in cloud.world.hosts.values() for s in h.snapshots.values() if s.spec.group == THEN
        )
        await asyncio.sleep(20.0)
        cloud.world.disks.touch(VolumeId(view.spec.saved.disks[0].volume))
        assert writes(cloud) > kept
        for _ in range(2):  # as often as one likes
            await goes_back(cloud)
            assert cloud.world.facts(WEB).boots == 1
        assert "then-memory" in await names(cloud)

    played(play)


def test_it_goes_back_at_another_host_by_another_release() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await taken(cloud)
        await cloud.ask(lambda s: s.start_upgrade(NEW, None))

        async def over(service: CloudService) -> bool:
            return (await service.campaign(None)).campaign.ended_at is not None

        await cloud.until(over, timeout=1200, what="the campaign")
        await goes_back(cloud)
        view = await cloud.ask(lambda s: s.server(WEB))
        assert view.release == NEW
        assert cloud.world.facts(WEB).boots == 1

    played(play, memory_mib=1024)


def test_a_suspended_server_goes_back_too_and_memory_leaves_a_drained_host() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await taken(cloud)
        for host in (H1, H2):
            await cloud.ask(lambda s, h=host: s.set_host_intent(h, HostIntent.DRAINED))

            async def left(service: CloudService, h: str = host) -> bool:
                volumes, kept = await service.volumes.volumes(), await service.volumes.snapshots()
                away = all(copy.host != h for view in volumes for copy in view.spec.copies)
                return away and all(h not in view.spec.hosts for view in kept) and not await tasks(service)

            await cloud.until(left, timeout=600, what=f"{host} to be empty")
            await cloud.ask(lambda s, h=host: s.set_host_intent(h, HostIntent.ACTIVE))
        await suspend(cloud, WEB)
        await goes_back(cloud)
        assert cloud.world.facts(WEB).boots == 1
        there = await names(cloud)
        assert [name for name in there if name.startswith("web-memory")] == []

    played(play)


def test_what_is_deleted_in_whatever_order_leaves_nothing() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        view = await taken(cloud)
        memory, (disk,) = view.spec.saved.volume, view.spec.snapshots
        with pytest.raises(Conflict, match="holds the memory of snapshot then"):
            await cloud.ask(lambda s: s.volumes.delete_volume(memory))
        with pytest.raises(Conflict, match="exists"):
            await cloud.ask(lambda s: s.server_snapshots.create(ASKED))
        await cloud.ask(lambda s: s.volumes.delete_snapshot(disk))
        with pytest.raises(Conflict, match="was deleted"):
            await cloud.ask(lambda s: s.server_snapshots.revert(WEB, BACK))
        await cloud.ask(lambda s: s.server_snapshots.delete(THEN))

        async def gone(service: CloudService) -> bool:
            return not await service.volumes.snapshots() and len(await service.volumes.volumes()) == 1

        await cloud.until(gone, timeout=120, what="the end of it")
        await taken(cloud)
        cloud.world.delete_expected(WEB)
        await cloud.ask(lambda s: s.delete_server(WEB))

        async def without(service: CloudService) -> bool:
            return not await service.servers()

        await cloud.until(without, timeout=120, what="the end of the server")
        with pytest.raises(NotFound, match="no server"):
            await cloud.ask(lambda s: s.server_snapshots.revert(WEB, BACK))
        await cloud.ask(lambda s: s.server_snapshots.delete(THEN))
        await cloud.until(_nothing_but_its_disk, timeout=120, what="the end of what its server has left")

    played(play)


async def _nothing_but_its_disk(service: CloudService) -> bool:
    return not await service.volumes.snapshots() and len(await service.volumes.volumes()) <= 1


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (ServerSnapshotRequest(name="x", server=ServerId("who")), NotFound, "no server"),
        (ServerSnapshotRequest(name="X!", server=WEB), Refused, "name"),
        (ServerSnapshotRequest(name="x", server=WEB, pause_seconds=0), Refused, "pause"),
        (ServerSnapshotRequest(name="x", server=WEB, pause_seconds=3600), Refused, "pause"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    request_: ServerSnapshotRequest, error: type[Error], text: str
) -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        before = await names(cloud)
        with pytest.raises(error, match=text) as raised:
            await cloud.ask(lambda s: s.server_snapshots.create(request_))
        assert raised.value.field
        assert raised.value.remedy
        assert await names(cloud) == before

    played(play)


def test_another_servers_snapshot_and_one_that_is_stopped_are_refused() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await created(cloud, ServerId("db"), H2)
        await taken(cloud)
        with pytest.raises(Refused, match="of web, not of db") as refused:
            await cloud.ask(lambda s: s.server_snapshots.revert(ServerId("db"), BACK))
        assert "clone" in refused.value.remedy
        await suspend(cloud, WEB)
        with pytest.raises(Conflict, match="no memory to take"):
            await cloud.ask(
                lambda s: s.server_snapshots.create(ServerSnapshotRequest(name="later", server=WEB))
            )

    played(play)


def test_a_way_back_that_is_given_up_leaves_the_server_stopped_and_says_so() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        view = await taken(cloud)
        disk = VolumeId(view.spec.saved.disks[0].volume)
        cloud.world.stop_expected(WEB)
        await cloud.ask(lambda s: s.server_snapshots.revert(WEB, BACK))
        with pytest.raises(Conflict, match="goes back to snapshot"):
            await cloud.ask(lambda s: s.server_snapshots.revert(WEB, BACK))
        with pytest.raises(Conflict, match="goes back to then"):
            await cloud.ask(lambda s: s.server_snapshots.delete(THEN))
        await cloud.ask(lambda s: s.volumes.cancel_volume_tasks(disk))
        await becomes(cloud, WEB, lambda v: v.state is RunState.STOPPED and not v.power.again, "to stay off")
        assert "then-memory" in await names(cloud)
        await goes_back(cloud)
        assert cloud.world.facts(WEB).boots == 1

    played(play)


def test_a_volume_is_made_of_its_disk_for_another_server() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        (disk,) = (await taken(cloud)).spec.snapshots
        await cloud.ask(lambda s: s.volumes.create_volume(VolumeRequest(name="copy", snapshot=disk)))
        with pytest.raises(Conflict, match="copy"):
            await cloud.ask(lambda s: s.server_snapshots.delete(THEN))

    played(play)


@pytest.mark.parametrize("seed", range(3))
def test_taken_and_gone_back_to_while_agents_and_the_orchestrator_die(seed: int) -> None:
    """It boots once and never again, whatever dies; the world looks at what its memory and disks say."""
    chance = random.Random(seed)

    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        async with asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(killed_for_ever(cloud, chance, (0.1, 4.0)))
            await cloud.ask(lambda s: s.server_snapshots.create(ASKED))
            await asyncio.sleep(chance.uniform(5.0, 40.0))
            killing.cancel()

        async def there(service: CloudService) -> bool:
            return bool(await service.server_snapshots.server_snapshots())

        await cloud.until(there, timeout=300, what="the snapshot")
        async with asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(killed_for_ever(cloud, chance, (0.1, 4.0)))
            cloud.world.stop_expected(WEB)
            await cloud.ask(lambda s: s.server_snapshots.revert(WEB, BACK))
            await asyncio.sleep(chance.uniform(5.0, 40.0))
            killing.cancel()
        await runs(cloud)
        assert cloud.world.facts(WEB).boots == 1

    played(play, seed=seed)
