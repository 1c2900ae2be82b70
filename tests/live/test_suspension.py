"""A guest that writes to its memory and its disk is saved under one release on one host and goes on under
another on a second host: the same boot, with all that it remembers, and every block that was acknowledged."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from disk_guest import Guest
from inside_place import inside
from physical_host import Place, release, server_on, volume_on
from test_guest_agent import whole_blocks

from nahtlos.model.config import VolumeAttachment
from nahtlos.model.ids import SnapshotId
from nahtlos.model.inventory import RunState
from nahtlos.model.storage import SnapshotSpec, VolumeFormat
from nahtlos.physical.agent.saved_state import PART_BYTES, Writer, parts_of
from nahtlos.physical.agent.volumes.memory import AHEAD_STOPPED, Pipe
from nahtlos.physical.agent.volumes.passes import Passes, Verdict
from nahtlos.physical.ports import StorageDesired, VmmId

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(200),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
KEPT_MIB = 336
WRITES_PER_SECOND = 100


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


async def test_memory_and_disk_are_of_one_moment_while_the_guest_goes_on(place: Place) -> None:
    """Saved in passes while it runs, stopped for the last one and its disk's snapshot; then it goes back."""
    host = place.host("host-a")
    server = server_on(host, "web")
    kept = volume_on(host, "then-memory", size_mib=2 * KEPT_MIB, empty=True)
    disk = volume_on(host, "web-root")
    await host.storage.reconcile(StorageDesired(volumes=(disk, kept)))
    await host.plug(server)
    await host.hypervisor.start(server, release("10.0"))
    guest = Guest(place, host, server)
    await guest.ready()
    await guest.get(f"/set?memory_mib=48&memory_mb_per_s=20&disk_per_s={WRITES_PER_SECOND}")
    await guest.acknowledges(100)
    was = await renewed(guest, 1)

    vmm = VmmId(server.spec.id, 1)
    at = VolumeAttachment(
        volume=kept.id, address=host.settings.address, port=10809, export=kept.export, size_mib=kept.size_mib
    )
    volume = await host.storage.open_raw(at, writing=True)
    writer = Writer(volume)
    pipe = Pipe(writer.add)
    passes = Passes(seconds=2.0, room=volume.size, memory=256 << 20)
    taken = SnapshotId("then-web-root")
    with guest.pulse() as pulse:
        async with asyncio.TaskGroup() as tasks:
            saving = tasks.create_task(host.hypervisor.save(vmm, pipe.put, running=True))
            writing = tasks.create_task(pipe.run())
            verdict = Verdict.GO_ON
            while verdict is Verdict.GO_ON and not saving.done():
                seen = await host.hypervisor.migrate_progress(vmm)
                verdict = passes.seen(
                    passes=seen.passes, left=seen.remaining, sent=seen.transferred, now=time.monotonic()
                )
                await asyncio.sleep(0.02)
            assert verdict is not Verdict.GIVE_UP, passes
            pipe.widen(AHEAD_STOPPED)
            began = time.monotonic()
            await host.hypervisor.pause(vmm)
            await host.storage.snapshot((SnapshotSpec(id=taken, volume=disk.id),))
            await saving
            await host.hypervisor.resume(vmm)
            stopped = time.monotonic() - began
            pipe.end()
            await writing
        digest = await writer.finish()
        await guest.acknowledges(20)
    await volume.close()
    gap = f"stopped for {stopped * 1000:.0f} ms, {pulse.longest * 1000:.0f} ms for its clients"
    print(f"{writer.bytes >> 20} MiB saved; {gap}")
    file = place.folder / "then.raw"
    await host.storage.snapshot_file(taken, file, VolumeFormat.RAW, on_copied=lambda done, total: None)
    blocks = whole_blocks(file.read_bytes())

    await guest.acknowledges(3 * WRITES_PER_SECOND)
    lost = await renewed(guest, 1)
    assert lost["disk"]["acknowledged"] > blocks + 2 * WRITES_PER_SECOND
    await host.hypervisor.kill(vmm)
    await host.storage.revert(disk, taken)

    volume = await host.storage.open_raw(at, writing=False)
    await host.hypervisor.restore(server, release("11.1"), parts_of(volume, writer.bytes, digest))
    await volume.close()
    await host.hypervisor.resume(vmm)
    resumed = time.monotonic()
    await guest.ready()
    now = await guest.get("/status")
    since = time.monotonic() - resumed
    assert now["boot_id"] == was["boot_id"]
    assert was["heartbeat"] < now["heartbeat"] < lost["heartbeat"]
    assert blocks - 1 <= now["disk"]["acknowledged"] <= blocks + since * WRITES_PER_SECOND + 10
    again = await renewed(guest, 1)
    assert again["memory"]["errors"] == 0
    await guest.writes(0)
    assert await guest.verified() >= blocks
    (status,) = await host.hypervisor.observe()
    assert (status.state, status.release) == (RunState.RUNNING, release("11.1"))
