"""Copies compared on real daemons: raw and qcow2 and encrypted ones alike, holes like zeros, damage on disk
found although it is remembered otherwise, and said until the copy is made anew."""

import asyncio
import os
from collections.abc import AsyncIterator

import msgspec
import pytest
from inside_place import BLOCK, inside, write
from physical_host import Host, Place, volume_on

from nahtlos.model.errors import NotFound
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.ports import StorageDesired

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
DATA = VolumeId("data")
SIZE = 16 << 20


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("scr")
    with inside(place):
        try:
            yield place
        finally:
            await place.close()


async def copy_on(place: Place, name: str, form: VolumeFormat) -> Host:
    host = place.host(name)
    volume = msgspec.structs.replace(volume_on(host, DATA, empty=True, size_mib=16), format=form)
    await host.storage.reconcile(StorageDesired(volumes=(volume,)))
    return host


async def test_copies_of_different_formats_have_the_same_digests(place: Place) -> None:
    raw = await copy_on(place, "host-1", VolumeFormat.RAW)
    qcow2 = await copy_on(place, "host-2", VolumeFormat.QCOW2)
    data = os.urandom(BLOCK)
    for host in (raw, qcow2):
        write(host, DATA, 3, data)
    write(qcow2, DATA, 100, bytes(BLOCK))  # written zeros here, a hole there
    for offset, length in ((0, SIZE), (0, 1 << 20), (3 * BLOCK, BLOCK), (100 * BLOCK, BLOCK), (SIZE, BLOCK)):
        digests = {await host.storage.digest(DATA, offset, length) for host in (raw, qcow2)}
        assert len(digests) == 1, (offset, length)
    assert await raw.storage.digest(DATA, 0, BLOCK) != await raw.storage.digest(DATA, 3 * BLOCK, BLOCK)
    with pytest.raises(NotFound):
        await raw.storage.digest(VolumeId("none"), 0, BLOCK)


async def test_digest_is_not_disturbed_by_a_writer_elsewhere(place: Place) -> None:
    host = await copy_on(place, "host-1", VolumeFormat.RAW)
    write(host, DATA, 3, os.urandom(BLOCK))
    before = await host.storage.digest(DATA, 0, 1 << 20)
    ends = False

    async def writer() -> None:
        number = 64
        while not ends:
            await asyncio.to_thread(write, host, DATA, number, os.urandom(BLOCK))
            number = 64 + (number + 1) % 100

    writing = asyncio.create_task(writer())
    try:
        for _ in range(10):
            assert await host.storage.digest(DATA, 0, 1 << 20) == before
    finally:
        ends = True
        await writing


async def test_damage_on_disk_is_found_and_said_until_the_copy_is_made_anew(place: Place) -> None:
    host = await copy_on(place, "host-1", VolumeFormat.RAW)
    write(host, DATA, 3, os.urandom(BLOCK))
    before = await host.storage.digest(DATA, 0, SIZE)
    with (host.settings.state_dir / "volumes" / "data.raw").open("r+b") as file:
        file.seek(200 * BLOCK + 7)
        file.write(b"!")
        file.flush()
        os.fsync(file.fileno())
    assert await host.storage.digest(DATA, 0, SIZE) != before
    await host.storage.mark(DATA, 1, "differs: rebuild it")
    assert [s.problem for s in await host.storage.observe()] == ["differs: rebuild it"]
    await host.restart_drivers()
    assert [s.problem for s in await host.storage.observe()] == ["differs: rebuild it"]
    attached = volume_on(host, DATA, empty=True, size_mib=16, epoch=2)
    await host.storage.reconcile(StorageDesired(volumes=(attached,)))
    assert [s.problem for s in await host.storage.observe()] == ["differs: rebuild it"]
    assert await host.storage.rejoin(volume_on(host, DATA, empty=True, size_mib=16, epoch=3)) is None
    await host.storage.reconcile(StorageDesired(removed=(DATA,)))
    await host.storage.reconcile(StorageDesired(volumes=(attached,)))
    assert [s.problem for s in await host.storage.observe()] == [""]
