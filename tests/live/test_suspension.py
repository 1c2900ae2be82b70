"""A guest that writes to its memory and its disk is saved under one release on one host and goes on under
another on a second host: the same boot, with all that it remembers, and every block that was acknowledged."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from disk_guest import Guest
from inside_place import inside
from physical_host import Place, release, server_on, volume_on

from nahtlos.model.config import VolumeAttachment
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.saved_state import PART_BYTES, Writer, parts_of
from nahtlos.physical.ports import StorageDesired, VmmId

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
KEPT_MIB = 336


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("susp")
    try:
        with inside(place):
            yield place
    finally:
        await place.close()


async def renewed(guest: Guest, passes: int) -> dict[str, Any]:
    """Its status, once it has read all of that memory back and written it anew so many times more."""
    first = (await guest.get("/status"))["memory"]["passes"]
    async with asyncio.timeout(60):
        while True:
            status = await guest.get("/status")
            if status["memory"]["passes"] >= first + passes:
                return status
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(("before", "after"), [("10.0", "11.1"), ("11.1", "10.0")])
async def test_a_guest_is_suspended_and_goes_on_by_another_release_elsewhere(
    place: Place, before: str, after: str
) -> None:
    here, there = place.host("host-a"), place.host("host-b")
    server = server_on(here, "web")
    kept = volume_on(here, "web-memory", size_mib=KEPT_MIB, empty=True)
    await here.storage.reconcile(StorageDesired(volumes=(volume_on(here, "web-root"), kept)))
    await here.plug(server)
    await here.hypervisor.start(server, release(before))
    guest = Guest(place, here, server)
    await guest.ready()
    await guest.get("/set?memory_mib=64&memory_mb_per_s=40&disk_per_s=100")
    await guest.acknowledges(100)
    was = await renewed(guest, 1)

    vmm = VmmId(server.spec.id, 1)
    at = VolumeAttachment(
        volume=kept.id, address=here.settings.address, port=10809, export=kept.export, size_mib=KEPT_MIB
    )
    volume = await here.storage.open_raw(at, writing=True)
    writer = Writer(volume)
    await here.hypervisor.pause(vmm)
    await here.hypervisor.save(vmm, writer.add)
    digest = await writer.finish()
    await volume.close()
    assert writer.bytes > 64 << 20 > PART_BYTES
    await here.hypervisor.kill(vmm)
    assert not list(here.settings.ram_dir.iterdir())

    going_on = msgspec.structs.replace(server, epoch=2)
    await there.plug(going_on)
    volume = await there.storage.open_raw(at, writing=False)
    await there.hypervisor.restore(going_on, release(after), parts_of(volume, writer.bytes, digest))
    await volume.close()
    await there.hypervisor.resume(VmmId(server.spec.id, 2))
    guest = Guest(place, there, going_on)
    await guest.ready()
    await guest.acknowledges(100)
    now = await renewed(guest, 1)
    assert now["boot_id"] == was["boot_id"]
    assert now["heartbeat"] > was["heartbeat"]
    assert now["memory"]["errors"] == 0
    assert now["memory"]["verified_pages"] > was["memory"]["verified_pages"]
    assert now["disk"]["acknowledged"] > was["disk"]["acknowledged"]
    await guest.writes(0)
    assert await guest.verified() > was["disk"]["acknowledged"]
    (status,) = await there.hypervisor.observe()
    assert (status.state, status.release) == (RunState.RUNNING, release(after))
