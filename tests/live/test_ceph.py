"""The Ceph driver on a real cluster. The writer reaches its image as a server does: by QEMU's own rbd driver,
here in a storage daemon that offers it on a unix socket."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
from ceph_host import ceph_storage, cluster, in_ceph, inside
from ceph_site import Site, answered, relocate, stop_clients
from nbd_writer import BLOCK
from physical_host import Place, volume_on
from test_storage import Writer, block, stand_in

from nahtlos.lab.ceph import GRACE, CephCluster, missing_programs
from nahtlos.model.config import VolumeAttachment
from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import KeyId, SnapshotId, VolumeId
from nahtlos.model.storage import (
    CopyPhase,
    Deletion,
    Replica,
    SnapshotExport,
    SnapshotSpec,
    VolumeFormat,
)
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage.backends import Backends
from nahtlos.physical.storage.ceph import doors
from nahtlos.physical.storage.exports import uri

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(bool(missing_programs()), reason="Ceph is not installed"),
]

OBJECT = 4 << 20
"""Of an image: its bytes are kept in pieces of this size."""


@pytest.fixture(scope="module")
def pool() -> Iterator[tuple[str, CephCluster]]:
    with cluster("ceph") as made:
        yield made


@pytest.fixture
def site(pool: tuple[str, CephCluster]) -> Iterator[Site]:
    """In its own event loop's turn: entering the namespace is the thread's matter, not a task's."""
    namespace, ceph = pool
    with inside(namespace):
        place = Place("ceph", namespace=namespace)
        yield Site(place, ceph)


@pytest.fixture(autouse=True)
async def left_clean(site: Site) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await site.close()


def taken(name: str, volume: str) -> SnapshotSpec:
    return SnapshotSpec(id=SnapshotId(name), volume=VolumeId(volume))


async def test_image_is_reached_by_every_release_and_what_it_was_made_from_is_in_it(site: Site) -> None:
    volume = in_ceph(volume_on(site.host, "root"))
    await site.have(volume)
    original = (site.host.settings.images_dir / f"{volume.image}.raw").read_bytes()[: 8 * 4096]
    for version in ("10.0", "11.1"):
        disk = await site.client("root", version=version)
        assert b"".join(disk.read(n) for n in range(8)) == original
        assert disk.size == volume.size_mib << 20
    (status,) = await site.storage.observe()
    assert 0 < status.allocated_bytes < volume.size_mib << 20
    assert status.clients == 2
    assert site.images() == ["root"]


async def test_what_a_server_discards_the_pool_has_back(site: Site) -> None:
    await site.have(site.volume("thin"))
    disk = await site.client("thin")
    for number in range(3):
        disk.write(number * OBJECT // BLOCK, b"x" * OBJECT)
    assert [v.allocated_bytes for v in await site.storage.observe()] == [3 * OBJECT]
    disk.discard(OBJECT // BLOCK, OBJECT)
    assert [v.allocated_bytes for v in await site.storage.observe()] == [2 * OBJECT]
    assert [disk.read(n * OBJECT // BLOCK)[:1] for n in range(3)] == [b"x", b"\0", b"x"]


async def test_snapshots_clones_and_their_volume_go_in_any_order(site: Site) -> None:
    volume = site.volume("one")
    await site.have(volume)
    disk = await site.client("one")
    disk.write(0, block(1))
    await site.storage.snapshot((taken("first", "one"),))
    disk.write(0, block(2))
    clone = msgspec.structs.replace(site.volume("two", size_mib=80), snapshot=SnapshotId("first"))
    await site.have(volume, clone)
    copy = await site.client("two")
    assert (copy.read(0), disk.read(0)) == (block(1), block(2))
    (status,) = await site.storage.snapshots()
    assert (status.volume, status.clones) == ("one", ("two",))

    await site.storage.reconcile(StorageDesired(volumes=(clone,), removed=(volume.id,)))
    assert {v.id for v in await site.storage.observe()} == {"two"}
    assert [s.id for s in await site.storage.snapshots()] == ["first"]
    third = msgspec.structs.replace(site.volume("three"), snapshot=SnapshotId("first"))
    await site.have(clone, third)
    await site.storage.reconcile(StorageDesired(removed_snapshots=(SnapshotId("first"),)))
    await site.until_gone(".gone.")
    assert sorted(site.images()) == ["three", "two"]
    for name in ("two", "three"):
        again = await site.client(name)
        assert again.read(0) == block(1)


async def test_a_volume_is_reverted_only_when_nobody_has_it_open(site: Site) -> None:
    volume = site.volume("back")
    await site.have(volume)
    disk = await site.client("back")
    disk.write(0, block(1))
    await site.storage.snapshot((taken("then", "back"),))
    disk.write(0, block(2))
    with pytest.raises(Conflict, match="is open at"):
        await site.storage.revert(volume, SnapshotId("then"))
    await stop_clients(site)
    await site.storage.revert(volume, SnapshotId("then"))
    disk = await site.client("back")
    assert disk.read(0) == block(1)
    with pytest.raises(NotFound):
        await site.storage.revert(volume, SnapshotId("never"))


async def test_a_snapshot_is_read_from_outside_and_becomes_a_file(site: Site) -> None:
    volume = site.volume("read", size_mib=16)
    await site.have(volume)
    disk = await site.client("read")
    disk.write(0, block(1))
    await site.storage.snapshot((taken("told", "read"),))
    disk.write(0, block(2))
    export = SnapshotExport(
        id="reader",
        snapshot=SnapshotId("told"),
        host=site.host.settings.host,
        port=21000,
        expires_at=time.time() + 600,
        key_hex="0123456789abcdef" * 4,
    )
    site.host.storage.copies.export_from(site.storage.snapshot_node)
    both = Backends(site.host.storage, site.storage)
    wanted = StorageDesired(volumes=(volume,), exports=(export,))
    assert "snapshot told exported as reader" in await both.reconcile(wanted)
    key = site.host.settings.run_dir / "reader.psk"
    key.write_text(f"reader:{export.key_hex}\n")
    copied = site.host.settings.state_dir / "copied"
    address = f"{uri(export, site.host.settings.address)}?tls-psk-file={key}"
    async with asyncio.timeout(20):
        while not await ran("nbdcopy", address, str(copied)):
            await asyncio.sleep(0.1)
    held = copied.read_bytes()
    assert (len(held), held[: len(block(1))]) == (16 << 20, block(1))

    file = site.host.settings.state_dir / "told.raw"
    written = await both.snapshot_file(
        SnapshotId("told"), file, VolumeFormat.RAW, on_copied=lambda done, total: None
    )
    assert file.read_bytes() == held
    assert (written.bytes, written.sha256) == (len(held), hashlib.sha256(held).hexdigest())
    expired = msgspec.structs.replace(export, expires_at=time.time())
    done = await both.reconcile(StorageDesired(volumes=(volume,), exports=(expired,)))
    assert "export reader withdrawn" in done
    assert not await ran("nbdcopy", address, str(copied))


async def ran(*words: str) -> bool:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(20):
        return await process.wait() == 0


async def test_a_higher_epoch_shuts_out_who_writes(site: Site) -> None:
    await site.have(site.volume("data"))
    old = await site.client("data")
    old.write(0, block(0))
    began = time.monotonic()
    await site.have(site.volume("data", epoch=2))
    with pytest.raises((AssertionError, ConnectionError)):
        while time.monotonic() < began + 5:
            old.write(1, block(1))
    assert time.monotonic() - began < 1.0
    new = await site.client("data")
    assert new.read(0) == block(0)
    new.write(2, block(2))
    assert [v.epoch for v in await site.storage.observe()] == [2]


async def test_a_client_that_died_keeps_nobody_waiting(site: Site) -> None:
    """The cluster itself would take it for alive, and holder of the image's lock, for 30 s."""
    volume = site.volume("data")
    await site.have(volume)
    rbd = VolumeAttachment(volume=volume.id, address="", port=0, export="", rbd=site.storage.endpoint("data"))
    first = await site.client("data", name="first")
    first.write(0, block(0))
    await site.storage.snapshot((taken("then", "data"),))
    os.kill(await site.host.pid("first"), signal.SIGKILL)
    with pytest.raises(Unavailable, match="does not answer"):
        await site.storage.snapshot((taken("late", "data"),))
    assert [s.id for s in await site.storage.snapshots()] == ["then"]
    await site.beside.reach_alone((rbd,))
    assert [status.clients for status in await site.storage.observe()] == [0]
    second = await site.client("data", name="second")
    second.write(1, block(1))
    os.kill(await site.host.pid("second"), signal.SIGKILL)
    await site.storage.revert(volume, SnapshotId("then"))
    third = await site.client("data", name="third")
    third.write(2, block(2))
    assert (third.read(0), third.read(2)) == (block(0), block(2))


async def test_one_that_only_stood_still_writes_no_more_once_another_may(site: Site) -> None:
    volume = site.volume("data")
    await site.have(volume)
    rbd = VolumeAttachment(volume=volume.id, address="", port=0, export="", rbd=site.storage.endpoint("data"))
    first = await site.client("data", name="first")
    first.write(0, block(0))
    pid = await site.host.pid("first")
    os.kill(pid, signal.SIGSTOP)
    await site.beside.reach_alone((rbd,))
    second = await site.client("data", name="second")
    second.write(1, block(7))
    os.kill(pid, signal.SIGCONT)
    with pytest.raises((AssertionError, ConnectionError)):
        first.write(1, block(1))
    assert second.read(1) == block(7)
    elsewhere = msgspec.structs.replace(site.storage.endpoint("data"), pool="other")
    with pytest.raises(Unavailable):
        await site.storage.reach_alone((msgspec.structs.replace(rbd, rbd=elsewhere),))


async def test_a_host_that_administers_nothing_shuts_out_all_the_same(site: Site) -> None:
    volume = site.volume("data")
    await site.have(volume)
    rbd = VolumeAttachment(volume=volume.id, address="", port=0, export="", rbd=site.storage.endpoint("data"))
    first = await site.client("data")
    first.write(0, block(0))
    backends = Backends(site.other.storage, None)
    await backends.reach_alone((rbd,))
    with pytest.raises((AssertionError, ConnectionError)):
        first.write(0, block(1))
    second = await site.client("data")
    assert second.read(0) == block(0)
    await backends.close()


async def test_osd_that_dies_costs_a_writer_time_and_nothing_else(site: Site) -> None:
    await site.have(site.volume("data", size_mib=256))
    disk = await site.client("data")
    writer = Writer(disk)
    writer.start()
    try:
        await asyncio.sleep(0.3)
        site.ceph.kill_osd(1)
        before = writer.acknowledged
        async with asyncio.timeout(GRACE + 12):
            while writer.acknowledged < before + 50:
                await asyncio.sleep(0.05)
    finally:
        writer.ends.set()
        await asyncio.to_thread(writer.join)
        site.ceph.return_osd(1)
    assert await asyncio.to_thread(writer.wrong) == []
    assert writer.longest < GRACE + 6, f"{writer.longest:.1f} s"


async def test_volume_goes_to_ceph_and_back_while_it_is_written(site: Site) -> None:
    """As the agents do it, the server's disk being moved by hand from one address to the next."""
    both = Backends(site.host.storage, site.storage)
    embedded = volume_on(site.host, "data", empty=True, size_mib=128)
    await both.reconcile(StorageDesired(volumes=(embedded,)))
    disk = site.disk(await stand_in(site.host, "data.e1"))
    writer = Writer(disk)
    writer.start()
    try:
        there = in_ceph(msgspec.structs.replace(embedded, epoch=2))
        await both.receive(there)
        await relocate(both, embedded, site.endpoint(site.host, there, site.storage.nbd_port))
        for _ in range(3):  # told to keep it, and again: its door is open for who is not led past it yet
            await both.reconcile(StorageDesired(volumes=(there,)))
        before = writer.acknowledged
        async with asyncio.timeout(10):
            while writer.acknowledged < before + 20:
                await asyncio.sleep(0.02)
    finally:
        writer.ends.set()
        await asyncio.to_thread(writer.join)
    assert await asyncio.to_thread(writer.wrong) == []
    with pytest.raises(Conflict, match="open here still"):
        await both.relocate_finish(embedded.id)
    await stop_clients(site)
    await both.relocate_finish(embedded.id)
    await site.until_closed(both, there)
    assert [(v.id, v.epoch) for v in await both.observe()] == [("data", 2)]

    direct = await site.client("data")
    assert all(direct.read(n) == block(n) for n in range(writer.acknowledged))
    home = msgspec.structs.replace(embedded, epoch=3)
    target = site.endpoint(site.host, home, site.host.settings.nbd_port)
    await both.receive(home)
    with pytest.raises(Conflict, match="still open"):
        await answered(lambda: both.relocate_start(there, target, bytes_per_second=0))
    await stop_clients(site)
    await both.serve(there)
    through = site.disk(await stand_in(site.host, "data.e2", name="through", port=site.storage.nbd_port))
    through.write(writer.acknowledged, block(writer.acknowledged))
    await relocate(both, there, target)
    through.write(writer.acknowledged + 1, block(writer.acknowledged + 1))
    await site.host.supervisor.stop("through")
    await both.relocate_finish(there.id)
    await both.reconcile(StorageDesired(volumes=(home,)))
    again = site.disk(await stand_in(site.host, "data.e3", name="home"))
    assert all(again.read(n) == block(n) for n in range(writer.acknowledged + 2))
    await site.until_gone(".gone.")
    assert site.images() == []
    await both.reconcile(StorageDesired(removed=(home.id,)))


async def test_volume_leaves_the_pool_while_it_is_written(site: Site) -> None:
    """The server's disk comes by the gateway first; what it writes past it would not be copied."""
    volume = site.volume("data", size_mib=128)
    await site.have(volume)
    home = volume_on(site.host, "data", size_mib=128, epoch=2, empty=True)
    await site.host.storage.reconcile(StorageDesired(volumes=(home,)))
    target = site.endpoint(site.host, home, site.host.settings.nbd_port)
    direct = await site.client("data")
    with pytest.raises(Conflict, match="still open"):
        await answered(lambda: site.storage.relocate_start(volume, target, bytes_per_second=0))
    for number in range(100, 110):
        direct.write(number, block(number))
    await stop_clients(site)

    await site.storage.serve(volume)
    through = site.disk(await stand_in(site.host, "data.e1", name="through", port=site.storage.nbd_port))
    writer = Writer(through)
    writer.start()
    try:
        await site.storage.relocate_start(volume, target, bytes_per_second=1 << 20)
        assert (await site.storage.relocate_progress(volume.id)).phase is CopyPhase.COPYING
        with pytest.raises(Refused, match="not ready"):
            await site.storage.relocate_complete(volume.id)
        await site.storage.relocate_cancel(volume.id)
        assert (await site.storage.relocate_progress(volume.id)).phase is CopyPhase.NONE
        await relocate(site.storage, volume, target)
        pid = await site.host.pid(doors.UNIT)
        os.kill(pid, signal.SIGKILL)
        await site.host.until_pid(doors.UNIT, other_than=pid)
        await site.storage.relocate_complete(volume.id)
        before = writer.acknowledged
        async with asyncio.timeout(15):
            while writer.acknowledged < before + 20:
                await asyncio.sleep(0.02)
        with pytest.raises(Conflict, match="has left already"):
            await site.storage.relocate_cancel(volume.id)
        with pytest.raises(Conflict, match="still reached"):
            await site.storage.relocate_finish(volume.id)
    finally:
        writer.ends.set()
        await asyncio.to_thread(writer.join)
    assert writer.acknowledged > 10
    assert await asyncio.to_thread(writer.wrong) == []
    await site.host.supervisor.stop("through")
    await site.storage.relocate_finish(volume.id)
    await site.until_gone(".gone.")
    assert site.images() == []
    again = site.disk(await stand_in(site.host, "data.e2", name="home"))
    written = [*range(writer.acknowledged), *(n for n in range(100, 110) if n >= writer.acknowledged)]
    assert [n for n in written if again.read(n) != block(n)] == []


async def test_gateway_that_is_killed_forgets_no_write_it_acknowledged(site: Site) -> None:
    """No flush: what is acknowledged is in the cluster."""
    await site.storage.receive(site.volume("data"))
    disk = site.disk(await stand_in(site.host, "data.e1", port=site.storage.nbd_port))
    for number in range(40):
        disk.write(number, block(number))
    pid = await site.host.pid(doors.UNIT)
    os.kill(pid, signal.SIGKILL)
    await site.host.until_pid(doors.UNIT, other_than=pid)
    assert [n for n in range(40) if disk.read(n) != block(n)] == []


async def test_administration_passes_to_another_host_without_a_copy_and_without_a_fence(site: Site) -> None:
    volume = site.volume("data")
    await site.have(volume)
    disk = await site.client("data")
    disk.write(0, block(0))
    there = msgspec.structs.replace(volume, host=site.other.settings.host, epoch=2)
    with pytest.raises(Refused, match="administered by host-1"):
        await site.beside.reconcile(StorageDesired(volumes=(msgspec.structs.replace(there, epoch=1),)))
    await site.beside.receive(there)
    await relocate(site.storage, volume, site.endpoint(site.other, there, 0))
    await site.storage.relocate_finish(volume.id)
    assert await site.storage.observe() == ()
    await site.storage.reconcile(StorageDesired(removed=(volume.id,)))
    await site.beside.reconcile(StorageDesired(volumes=(there,)))
    assert [(v.id, v.epoch) for v in await site.beside.observe()] == [("data", 2)]
    disk.write(1, block(1))
    assert disk.read(0) == block(0)


async def test_what_an_agent_left_half_made_is_no_volume_and_is_made_anew(site: Site) -> None:
    site.ceph.run("rbd", "create", "volumes/.new.root", "--size", "8")
    volume = in_ceph(volume_on(site.host, "root"))
    assert await site.storage.observe() == ()
    await site.have(volume)
    assert [(v.id, v.size_mib) for v in await site.storage.observe()] == [("root", volume.size_mib)]
    await site.storage.close()
    fresh = ceph_storage(site.host, site.ceph)
    assert await fresh.reconcile(StorageDesired(volumes=(volume,))) == ()
    assert [v.id for v in await fresh.observe()] == ["root"]
    await fresh.close()


async def test_what_no_image_can_be_is_refused_by_field(site: Site) -> None:
    one = site.volume("one")
    await site.have(one)
    wrong = {
        "format": msgspec.structs.replace(one, format=VolumeFormat.QCOW2),
        "replicas": msgspec.structs.replace(one, replicas=(Replica(host=site.other.settings.host),)),
        "encryption_key": msgspec.structs.replace(one, encryption_key=KeyId("k")),
        "size_mib": site.volume("one", size_mib=32),
        "snapshot": msgspec.structs.replace(site.volume("two"), snapshot=SnapshotId("never")),
        "image": msgspec.structs.replace(in_ceph(volume_on(site.host, "three")), image="no-such"),
    }
    for field, volume in wrong.items():
        with pytest.raises(Refused) as refusal:
            await site.have(volume)
        assert refusal.value.field == field
    with pytest.raises(Refused, match="reaches no Ceph"):
        await Backends(site.host.storage, None).reconcile(StorageDesired(volumes=(one,)))


async def test_deleted_volume_may_have_to_be_overwritten_first(site: Site) -> None:
    volume = msgspec.structs.replace(site.volume("secret"), deletion=Deletion.ZERO)
    await site.have(volume)
    disk = await site.client("secret")
    disk.write(5, block(5))
    await stop_clients(site)
    await site.storage.reconcile(StorageDesired(removed=(volume.id,)))
    await site.until_gone(".gone.")
    assert site.images() == []
