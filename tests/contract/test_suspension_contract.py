"""What every hypervisor driver must do with a guest that is saved and goes on elsewhere, and every storage
one with a volume that agents themselves write: on simulated hosts and, where it can be, on real ones."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from hypervisor_worlds import WORLDS, Hosts, Stage, stage_of
from test_hypervisor_contract import booted, seen, state

from nahtlos.model.config import VolumeAttachment
from nahtlos.model.errors import Error, Refused
from nahtlos.model.ids import VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.saved_state import PART_BYTES, Writer, parts_of
from nahtlos.physical.ports import StorageDesired, VmmId

KEPT = VolumeId("web-memory")


@pytest.fixture(params=WORLDS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    return stage_of(request.param, tmp_path)


async def kept_volume(hosts: Hosts, disk: VolumeId) -> VolumeAttachment:
    volume = msgspec.structs.replace(hosts.volume(KEPT), size_mib=700)
    await hosts.first.storage.reconcile(StorageDesired(volumes=(hosts.volume(disk), volume)))
    return VolumeAttachment(
        volume=KEPT, address=hosts.first.address, port=10809, export=volume.export, size_mib=700
    )


def test_a_guest_is_saved_and_goes_on_at_another_host(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        kept = await kept_volume(hosts, server.volume.volume)
        volume = await hosts.first.storage.open_raw(kept, writing=True)
        writer = Writer(volume)
        with pytest.raises(Refused):
            await hosts.first.hypervisor.save(leaving, writer.add)
        await hosts.first.hypervisor.pause(leaving)
        await hosts.first.hypervisor.save(leaving, writer.add)
        digest = await writer.finish()
        await volume.close()
        assert writer.bytes > 0
        assert await state(hosts.first, leaving) is RunState.PAUSED
        await hosts.first.hypervisor.kill(leaving)

        going_on = msgspec.structs.replace(server, epoch=server.epoch + 1)
        await hosts.second.plug(going_on)
        read = await hosts.second.storage.open_raw(kept, writing=False)
        await hosts.second.hypervisor.restore(going_on, hosts.release, parts_of(read, writer.bytes, digest))
        await read.close()
        arrived = await seen(hosts.second, VmmId(server.spec.id, going_on.epoch))
        assert arrived is not None
        assert (arrived.state, arrived.migrated) == (RunState.PAUSED, True)
        for _ in range(2):
            await hosts.second.hypervisor.resume(arrived.id)
        assert await state(hosts.second, arrived.id) is RunState.RUNNING
        await hosts.second.hypervisor.kill(arrived.id)

    stage(play)


def test_a_guest_is_saved_while_it_runs_as_it_was_when_it_stood_still(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, vmm = await booted(hosts)
        got = bytearray()

        async def add(piece: bytes) -> None:
            got.extend(piece)

        async with asyncio.TaskGroup() as tasks:
            saving = tasks.create_task(hosts.first.hypervisor.save(vmm, add, running=True))
            while (await hosts.first.hypervisor.migrate_progress(vmm)).passes < 2 and not saving.done():
                await asyncio.sleep(0.02)
            await hosts.first.hypervisor.pause(vmm)
            await saving
            assert await state(hosts.first, vmm) is RunState.PAUSED
        await hosts.first.hypervisor.resume(vmm)
        assert await state(hosts.first, vmm) is RunState.RUNNING
        seen_again = await seen(hosts.first, vmm)
        assert seen_again is not None
        assert not seen_again.sent
        await hosts.first.hypervisor.kill(vmm)

        async def pieces() -> AsyncIterator[bytes]:
            yield bytes(got)

        await hosts.first.hypervisor.restore(server, hosts.release, pieces())
        assert await state(hosts.first, vmm) is RunState.PAUSED
        await hosts.first.hypervisor.resume(vmm)
        assert await state(hosts.first, vmm) is RunState.RUNNING
        await hosts.first.hypervisor.kill(vmm)

    stage(play)


def test_a_guest_goes_on_where_it_is_when_it_could_not_be_saved(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        _, vmm = await booted(hosts)

        async def full(piece: bytes) -> None:
            raise Refused(f"no room for {len(piece)} bytes", field="memory")

        await hosts.first.hypervisor.pause(vmm)
        with pytest.raises(Refused, match="no room"):
            await hosts.first.hypervisor.save(vmm, full)
        await hosts.first.hypervisor.resume(vmm)
        assert await state(hosts.first, vmm) is RunState.RUNNING
        await hosts.first.hypervisor.kill(vmm)

    stage(play)


def test_what_is_not_what_was_saved_is_not_loaded(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        kept = await kept_volume(hosts, hosts.server().volume.volume)
        volume = await hosts.first.storage.open_raw(kept, writing=True)
        writer = Writer(volume)
        body = bytes(range(256)) * (PART_BYTES // 64)
        for at in range(0, len(body), 700_001):
            await writer.add(body[at : at + 700_001])
        digest = await writer.finish()
        assert await gathered(parts_of(volume, writer.bytes, digest)) == body
        with pytest.raises(Error, match="not what was written"):
            await gathered(parts_of(volume, writer.bytes, "0" * 64))
        await volume.write(2 * PART_BYTES, b"\0" * 4096)
        got = bytearray()
        with pytest.raises(Error, match="part 3"):
            async for part in parts_of(volume, writer.bytes, digest):
                got += part
        assert got == body[: 2 * PART_BYTES]
        await volume.close()

    stage(play)


async def gathered(parts: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in parts])
