"""The channel to the agent in a guest, on real QEMU with the project's own guest: it answers, its clock can
be set after a pause, a freeze keeps every write from the disk, over a move between releases, too."""

import asyncio
import os
import time
from collections.abc import AsyncIterator

import msgspec
import pytest
from physical_host import Host, Place, release, server_on, volume_on
from test_hypervisor import console_says, guest_status, moved

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.storage import SnapshotSpec, VolumeFormat
from nahtlos.physical.agent.guests import asking
from nahtlos.physical.ports import StorageDesired, VmmId
from nahtlos.runtime.releases import guest_layout as layout

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("agent")
    try:
        yield place
    finally:
        await place.close()


async def booted(host: Host, name: str, under: ReleaseId) -> ServerConfig:
    server = server_on(host, name)
    server = msgspec.structs.replace(server, spec=msgspec.structs.replace(server.spec, guest_agent=True))
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, f"{name}-root"),)))
    await host.plug(server)
    await host.hypervisor.start(server, under)
    await console_says(host, VmmId(server.spec.id, server.epoch), "boot ")
    return server


async def heard(host: Host, vmm: VmmId) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await asking.is_frozen(host.hypervisor, vmm)
            except Unavailable:
                await asyncio.sleep(0.1)
            else:
                return


async def typed(host: Host, vmm: VmmId, line: str) -> None:
    """No faster than the guest's serial port takes it."""
    for end in range(4, len(line) + 4, 4):
        await host.hypervisor.console_write(vmm, line[end - 4 : end].encode())
        await console_says(host, vmm, line[:end])
    await host.hypervisor.console_write(vmm, b"\n")


def mark_of(data: bytes) -> tuple[bool, int]:
    magic, frozen, blocks, _boot = layout.MARK.unpack_from(data, layout.MARK_OFFSET)
    assert magic == layout.MARK_MAGIC
    return bool(frozen), blocks


def whole_blocks(data: bytes) -> int:
    count = 0
    while layout.block_is_right(
        data[layout.block_offset(count + 1) : layout.block_offset(count + 2)], count + 1
    ):
        count += 1
    return count


async def snapshot(host: Host, volume: str, name: str) -> bytes:
    taken = SnapshotId(name)
    await host.storage.snapshot((SnapshotSpec(id=taken, volume=VolumeId(volume)),))
    file = host.place.folder / f"{name}.raw"
    await host.storage.snapshot_file(taken, file, VolumeFormat.RAW, on_copied=lambda done, total: None)
    return file.read_bytes()


async def test_the_agent_answers_and_goes_with_its_guest_to_another_release(place: Place) -> None:
    one, two = place.host("host-1"), place.host("host-2")
    server = await booted(one, "talker", release("10.0"))
    first = VmmId(server.spec.id, 1)
    await heard(one, first)
    told = await asking.status(one.hypervisor, first, 1.0)
    assert (told.answers, told.version) == (True, "nahtlos-probe-1")
    assert told.system == "nahtlos probe guest"
    with pytest.raises(Refused, match="not been found"):
        await one.hypervisor.guest_ask(first, "guest-dance", within=3)

    await one.hypervisor.pause(first)
    stopped = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer"):
        await one.hypervisor.guest_ask(first, "guest-ping", within=0.5)
    await asyncio.sleep(2.0)
    await one.hypervisor.resume(first)
    stood = time.monotonic() - stopped
    behind = await asking.clock_behind(one.hypervisor, first, time.time())
    assert behind > 1.5, (behind, stood)
    await asking.set_clock(one.hypervisor, first, time.time())
    assert abs(await asking.clock_behind(one.hypervisor, first, time.time())) < 1.0

    await asking.freeze(one.hypervisor, first)
    second = await moved(server, one, two, release("11.1"))
    await two.restart_drivers()
    await heard(two, second)
    assert await asking.is_frozen(two.hypervisor, second)
    await asking.thaw(two.hypervisor, second)
    with pytest.raises(NotFound):
        await one.hypervisor.guest_ask(first, "guest-ping", within=1)


async def test_a_freeze_keeps_every_write_from_the_disk_and_the_disk_says_so(place: Place) -> None:
    host = place.host("host-1")
    server = await booted(host, "writer", release("10.0"))
    vmm = VmmId(server.spec.id, 1)
    await heard(host, vmm)
    await typed(host, vmm, "set disk_per_s=50")
    await console_says(host, vmm, "done")
    async with asyncio.timeout(30):
        while (await guest_status(host, vmm))["disk"]["acknowledged"] < 50:
            await asyncio.sleep(0.1)

    assert await asking.freeze(host.hypervisor, vmm) == 1
    frozen = (await guest_status(host, vmm))["disk"]
    data = await snapshot(host, "writer-root", "quiet")
    assert mark_of(data) == (True, frozen["acknowledged"])
    assert whole_blocks(data) == frozen["acknowledged"]
    await asyncio.sleep(0.5)
    later = (await guest_status(host, vmm))["disk"]
    assert (later["acknowledged"], later["frozen"]) == (frozen["acknowledged"], True)
    with pytest.raises(Refused):
        await asking.freeze(host.hypervisor, vmm)

    await asking.thaw(host.hypervisor, vmm)
    async with asyncio.timeout(30):
        while (await guest_status(host, vmm))["disk"]["acknowledged"] < frozen["acknowledged"] + 50:
            await asyncio.sleep(0.1)
    crashed, _ = mark_of(await snapshot(host, "writer-root", "busy"))
    assert not crashed
    assert (await guest_status(host, vmm))["disk"]["errors"] == 0
