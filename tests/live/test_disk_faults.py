"""Disks that fail under a real guest: no space, I/O errors. The guest stands still without having seen an
error, the operator is told why and what to do, and it goes on by itself once that is mended."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from disk_guest import Guest, entered
from physical_host import Host, Place, release, server_on, volume_on
from small_pool import LEFT_KIB, fill, pool, with_small_pool, without_pool
from test_replicas import WRITES_PER_S, Cloudlet, replicated

from nahtlos.lab.disk_check import check_volume
from nahtlos.model.ids import VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.agent.volumes.replicas import DiskKeeper
from nahtlos.physical.ports import DiskTrouble, StorageDesired
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.graph import Options

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
VOLUME = VolumeId("server-root")
TOLD_WITHIN = 20.0
WAITED_SECONDS = 6.0
"""For which it is tried again and again: some ten times."""


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("flt")
    try:
        with entered(place):
            yield place
    finally:
        for host in place.hosts:
            without_pool(host)
        await place.close()


async def started(place: Place) -> Cloudlet:
    """On a pool of its own that is soon full."""
    host = place.host("host-1")
    with_small_pool(host)
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, VOLUME),)))
    server = server_on(host, "server")
    ledger = Ledger(place.folder / "ledger.db")
    ledger.own(server)
    await host.plug(server)
    await host.hypervisor.start(server, release("10.0"))
    guest = Guest(place, host, server)
    await guest.ready()
    await guest.writes(WRITES_PER_S)
    await guest.acknowledges(20)
    return Cloudlet(place, [host], server, guest, ledger)


@contextlib.asynccontextmanager
async def kept(cloudlet: Cloudlet) -> AsyncGenerator[Context]:
    context = cloudlet.context()
    task = asyncio.create_task(DiskKeeper(context).run())
    try:
        yield context
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def told(context: Context) -> str:
    async with asyncio.timeout(TOLD_WITHIN):
        while not context.disk_problems:
            await asyncio.sleep(0.02)
    return "; ".join(context.disk_problems.values())


async def troubles_as_it_stands(host: Host) -> list[DiskTrouble]:
    """It is let go on now and then, to see whether the disk takes requests again."""
    async with asyncio.timeout(TOLD_WITHIN):
        while True:
            (status,) = await host.hypervisor.observe()
            if status.state is RunState.PAUSED and status.disk_problems:
                return [problem.trouble for problem in status.disk_problems]
            await asyncio.sleep(0.01)


async def goes_on(cloudlet: Cloudlet, context: Context) -> None:
    """With every block it has acknowledged, and nothing is said of trouble any more."""
    await cloudlet.guest.acknowledges(100)
    async with asyncio.timeout(TOLD_WITHIN):
        while context.disk_problems:
            await asyncio.sleep(0.05)
    await cloudlet.guest.writes(0)
    assert (await cloudlet.guest.disk())["errors"] == 0
    written = await cloudlet.guest.verified()
    found = check_volume(pool(cloudlet.hosts[0]) / f"{VOLUME}.raw", written)
    assert (found.lost, found.wrong) == (0, 0)


async def test_full_pool_stops_the_guest_until_there_is_room(place: Place) -> None:
    cloudlet = await started(place)
    host = cloudlet.hosts[0]
    async with kept(cloudlet) as context:
        ballast = fill(host)
        text = await told(context)
        assert text.startswith(f"{VOLUME} of server: the pool under it is full")
        assert "free space in its pool" in text
        assert await troubles_as_it_stands(host) == [DiskTrouble.NO_SPACE]
        known = await host.storage.pool()
        assert known is not None
        assert known.free < LEFT_KIB << 10
        await host.restart_drivers()  # its agent is killed meanwhile; the next one goes on by what it finds
    await host.hypervisor.observe()
    async with kept(cloudlet) as context:
        await told(context)
        ballast.unlink()
        await goes_on(cloudlet, context)


async def test_of_two_copies_the_one_without_room_is_given_up_and_the_other_one_is_written(
    place: Place,
) -> None:
    cloudlet = await replicated(place, 2, prepared=with_small_pool)
    full = cloudlet.hosts[1]
    async with kept(cloudlet) as context:
        fill(full)
        async with asyncio.timeout(TOLD_WITHIN):
            while cloudlet.lost != [full.settings.host]:
                await asyncio.sleep(0.05)
        assert any("has no room left for what is written" in text for text in cloudlet.said)
        await goes_on(cloudlet, context)


async def test_where_no_copy_has_room_it_is_waited_for_and_none_is_given_up(place: Place) -> None:
    cloudlet = await replicated(place, 2, prepared=with_small_pool)
    async with kept(cloudlet) as context:
        await cloudlet.guest.writes(0)  # or one of them would be full before the other one
        ballasts = [fill(host, 0) for host in cloudlet.hosts]
        await cloudlet.guest.writes(WRITES_PER_S)
        text = await told(context)
        assert text.startswith(f"{VOLUME} of server: the pool under it is full")
        await asyncio.sleep(WAITED_SECONDS)
        assert cloudlet.lost == []
        for ballast in ballasts:
            ballast.unlink()
        await goes_on(cloudlet, context)
        assert cloudlet.lost == []
    written = await cloudlet.guest.verified()
    for host in cloudlet.hosts:
        found = check_volume(pool(host) / f"{VOLUME}.raw", written)
        assert (found.lost, found.wrong) == (0, 0)


async def test_of_two_copies_the_one_that_fails_is_given_up_and_the_other_one_is_written(
    place: Place,
) -> None:
    cloudlet = await replicated(place, 2)
    bad = cloudlet.hosts[1]
    async with kept(cloudlet) as context:
        await failing(bad, "write")
        async with asyncio.timeout(TOLD_WITHIN):
            while cloudlet.lost != [bad.settings.host]:
                await asyncio.sleep(0.05)
        await goes_on(cloudlet, context)


async def failing(host: Host, kind: str) -> None:
    """From now on every request of this kind to the file under the volume fails."""
    record = host.storage.serving.records[VOLUME]
    below = graph.data_nodes(host.storage.serving.records.all(), VOLUME, host.storage.serving.places)[-1]
    bad: Options = {
        "driver": "blkdebug",
        "node-name": "bad",
        "image": below["node-name"],
        "inject-error": [{"event": "none", "iotype": kind, "errno": 5, "once": False}],
    }
    await host.storage.daemon.execute("blockdev-add", bad)
    await reopen(host, graph.filter_nodes(record, "bad")[0])


async def mended(host: Host) -> None:
    record = host.storage.serving.records[VOLUME]
    below = graph.data_nodes(host.storage.serving.records.all(), VOLUME, host.storage.serving.places)[-1]
    await reopen(host, graph.filter_nodes(record, str(below["node-name"]))[0])
    await host.storage.daemon.execute("blockdev-del", {"node-name": "bad"})


async def reopen(host: Host, fair: Options) -> None:
    await host.storage.daemon.execute("blockdev-reopen", {"options": [fair]})


async def test_write_errors_stop_the_guest_until_the_disk_is_mended(place: Place) -> None:
    cloudlet = await started(place)
    host = cloudlet.hosts[0]
    async with kept(cloudlet) as context:
        await failing(host, "write")
        text = await told(context)
        assert text.startswith(f"{VOLUME} of server: it does not take requests")
        assert "look at the disk under the volume" in text
        assert await troubles_as_it_stands(host) == [DiskTrouble.ERROR]
        await mended(host)
        await goes_on(cloudlet, context)


async def test_read_errors_are_told_and_read_again(place: Place) -> None:
    cloudlet = await started(place)
    host = cloudlet.hosts[0]
    await cloudlet.guest.acknowledges(100)
    await cloudlet.guest.writes(0)
    async with kept(cloudlet) as context:
        await failing(host, "read")
        reading = asyncio.create_task(cloudlet.guest.verified())
        try:
            text = await told(context)
            assert text.startswith(f"{VOLUME} of server: ")
            await mended(host)
            assert await reading > 100
            await cloudlet.guest.writes(WRITES_PER_S)
            await goes_on(cloudlet, context)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
