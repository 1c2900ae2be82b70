"""Disks of a guest that runs, changed on a real QEMU: limits, further disks, sizes; by an agent that was
started a moment ago as well. The guest writes blocks that prove themselves all the while."""

import asyncio
import os
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
from disk_guest import Guest, entered
from physical_host import Host, Place, release, server_on, volume_on
from test_hypervisor import moved

from nahtlos.model.config import ServerConfig, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Refused
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import DiskLimits
from nahtlos.physical.agent.volumes.replicas import reached_by_copies
from nahtlos.physical.hypervisor.disks_live import graph_of
from nahtlos.physical.ports import StorageDesired, VmmId

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("dsk")
    try:
        with entered(place):
            yield place
    finally:
        await place.close()


def data_disk(host: Host, name: str, *, epoch: int = 1) -> VolumeAttachment:
    return VolumeAttachment(
        volume=VolumeId(name),
        address=host.settings.address,
        port=host.settings.nbd_port,
        export=f"{name}.e{epoch}",
    )


def with_data(server: ServerConfig, *volumes: VolumeAttachment) -> ServerConfig:
    spec = msgspec.structs.replace(server.spec, data_volumes=tuple(v.volume for v in volumes))
    return msgspec.structs.replace(server, spec=spec, data_volumes=volumes)


async def console(host: Host, vmm: VmmId) -> str:
    data, _ = await host.hypervisor.console(vmm, 0, 1 << 20)
    return data.decode(errors="replace")


async def started(place: Place, host: Host, name: str) -> tuple[ServerConfig, Guest]:
    server = server_on(host, name)
    blank = tuple(volume_on(host, each, size_mib=16, empty=True) for each in ("one", "two", "three"))
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, f"{name}-root"), *blank)))
    await host.plug(server)
    await host.hypervisor.start(server, release("10.0"))
    guest = Guest(place, host, server)
    await guest.ready()
    return server, guest


async def test_disks_come_and_go_are_limited_and_grow_under_a_writer(place: Place) -> None:
    host = place.host("host-1")
    server, guest = await started(place, host, "server")
    vmm = VmmId(server.spec.id, 1)
    await guest.writes(500)
    await guest.acknowledges(20)

    two = with_data(server, data_disk(host, "one"), data_disk(host, "two"))
    assert set(await host.hypervisor.disks_reconcile(vmm, two)) == {"one attached", "two attached"}
    assert await host.hypervisor.disks_reconcile(vmm, two) == ()
    await host.restart_drivers()
    assert await host.hypervisor.disks_reconcile(vmm, two) == ()
    three = with_data(server, *two.data_volumes, data_disk(host, "three"))
    with pytest.raises(Refused) as refused:
        await host.hypervisor.disks_reconcile(vmm, three)
    assert refused.value.field == "data_volumes"
    assert refused.value.remedy

    slow = msgspec.structs.replace(
        two, volume=msgspec.structs.replace(server.volume, limits=DiskLimits(iops=20))
    )
    assert await host.hypervisor.disks_reconcile(vmm, slow) == ("limits limits",)
    await asyncio.sleep(0.5)
    began, before = time.monotonic(), (await guest.disk())["acknowledged"]
    await asyncio.sleep(2.0)
    rate = ((await guest.disk())["acknowledged"] - before) / (time.monotonic() - began)
    assert rate < 25, rate
    await host.hypervisor.disks_reconcile(vmm, two)
    began = time.monotonic()
    await guest.acknowledges(50)
    assert time.monotonic() - began < 50 / rate

    second = msgspec.structs.replace(
        two.spec, data_volumes=(VolumeId(""), VolumeId("two"))
    )  # keeps its place
    only = msgspec.structs.replace(two, spec=second, data_volumes=two.data_volumes[1:])
    assert len(await host.hypervisor.disks_reconcile(vmm, only)) == 1
    graph = await graph_of(host.hypervisor._running(vmm))  # pyright: ignore[reportPrivateUsage]
    assert sorted(name[:6] for name in graph.devices) == ["data1-", "disk"]
    assert not graph.orphans()
    assert len(graph.groups) == 2

    larger = volume_on(host, "two", size_mib=24, empty=True)
    await host.storage.reconcile(StorageDesired(volumes=(larger,)))
    grown = msgspec.structs.replace(
        only, data_volumes=(msgspec.structs.replace(only.data_volumes[0], size_mib=24),)
    )
    assert "two has 24 MiB" in await host.hypervisor.disks_reconcile(vmm, grown)
    assert await host.hypervisor.disks_reconcile(vmm, grown) == ()

    assert (await guest.disk())["errors"] == 0
    assert await guest.verified() > 70


async def test_a_server_has_as_many_data_volumes_as_it_was_made_with_places_for(place: Place) -> None:
    host = place.host("host-1")
    names = ("one", "two", "three", "four", "five", "six")
    server = server_on(host, "many")
    server = msgspec.structs.replace(server, spec=msgspec.structs.replace(server.spec, data_places=6))
    blank = tuple(volume_on(host, each, size_mib=4, empty=True) for each in names)
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "many-root"), *blank)))
    await host.plug(server)
    await host.hypervisor.start(server, release("10.0"))
    guest = Guest(place, host, server)
    await guest.ready()
    vmm = VmmId(server.spec.id, 1)
    await guest.writes(200)
    all_six = with_data(server, *(data_disk(host, each) for each in names))
    assert len(await host.hypervisor.disks_reconcile(vmm, all_six)) == 6
    assert await host.hypervisor.disks_reconcile(vmm, all_six) == ()
    assert len(await host.hypervisor.disks_reconcile(vmm, server)) == 6
    assert await host.hypervisor.disks_reconcile(vmm, server) == ()
    await guest.acknowledges(20)
    assert (await guest.disk())["errors"] == 0


async def test_server_moves_with_its_disks_plugged_and_copied(place: Place) -> None:
    """To the next release: a hot-plugged disk is at the same place there, a quorum is opened by both."""
    host, other = place.host("host-1"), place.host("host-2")
    server, guest = await started(place, host, "mover")
    await other.storage.reconcile(StorageDesired(volumes=(volume_on(other, "one", size_mib=16, empty=True),)))
    copies = tuple(
        VolumeEndpoint(
            host=h.settings.host, address=h.settings.address, port=h.settings.nbd_port, export="one.e1"
        )
        for h in (host, other)
    )
    plugged = with_data(server, reached_by_copies(data_disk(host, "one"), copies))
    await host.hypervisor.disks_reconcile(VmmId(server.spec.id, 1), plugged)
    await guest.writes(200)
    before = (await guest.get("/status"))["boot_id"]
    await guest.acknowledges(20)

    arrived = await moved(plugged, host, other, release("11.1"))
    there = Guest(place, other, server)
    await there.ready()
    assert (await there.get("/status"))["boot_id"] == before
    await there.acknowledges(20)
    moved_config = msgspec.structs.replace(plugged, epoch=2)
    assert await other.hypervisor.disks_reconcile(arrived, moved_config) == ()
    gone = msgspec.structs.replace(
        with_data(moved_config), spec=msgspec.structs.replace(plugged.spec, data_volumes=())
    )
    assert len(await other.hypervisor.disks_reconcile(arrived, gone)) == 1
    assert (await there.disk())["errors"] == 0
    await there.verified()
