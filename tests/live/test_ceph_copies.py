"""What leaves a Ceph pool and comes back: backups of images, whole and of what changed, restored to either
driver."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from ceph_host import cluster, in_ceph, inside
from ceph_site import Site, stop_clients
from physical_host import Place
from test_storage import block, stand_in

from nahtlos.lab.ceph import CephCluster, missing_programs
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import BackupId, SnapshotId, VolumeId
from nahtlos.model.storage import BackupSpec, SnapshotSpec, VolumeSpec
from nahtlos.physical.ports import BackupResult, StorageDesired
from nahtlos.physical.storage.backends import Backends
from nahtlos.physical.storage.ceph import doors

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(bool(missing_programs()), reason="Ceph is not installed"),
]
DATA = VolumeId("data")


@pytest.fixture(scope="module")
def pool() -> Iterator[tuple[str, CephCluster]]:
    with cluster("ceph-copies") as made:
        yield made


@pytest.fixture
def site(pool: tuple[str, CephCluster]) -> Iterator[Site]:
    namespace, ceph = pool
    with inside(namespace):
        yield Site(Place("ceph", namespace=namespace), ceph)


@pytest.fixture(autouse=True)
async def left_clean(site: Site) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await site.close()


def told(name: str, folder: Path, base: BackupSpec | None = None) -> BackupSpec:
    return BackupSpec(
        id=BackupId(name),
        volume=DATA,
        target=str(folder),
        base=base.id if base else None,
        created_at=time.time(),
    )


async def backed_up(site: Site, backup: BackupSpec, base: BackupSpec | None = None) -> BackupResult:
    both = Backends(site.host.storage, site.storage)
    return await both.backup(DATA, backup, base, bytes_per_second=0, on_copied=lambda done, total: None)


async def backed_up_at_last(site: Site, backup: BackupSpec, base: BackupSpec | None = None) -> BackupResult:
    """Tried again as agents do: a killed daemon counts as a client until the cluster takes it for dead."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await backed_up(site, backup, base)
            except Unavailable:
                await asyncio.sleep(0.1)


def moments(site: Site) -> list[str]:
    listed = site.ceph.run("rbd", "snap", "ls", "volumes/data").split()
    return [word.removeprefix(".backup.") for word in listed if word.startswith(".backup.")]


async def test_changes_are_backed_up_and_restored_to_either_driver(site: Site, tmp_path: Path) -> None:
    both = Backends(site.host.storage, site.storage)
    volume = site.volume("data")
    await site.have(volume)
    disk = await site.client("data")
    for number in range(20):
        disk.write(number * 100, block(number))
    monday = told("monday", tmp_path)
    whole = await backed_up(site, monday)
    assert whole.base is None and 20 * 65536 <= whole.stored_bytes <= 8 << 20
    for number in range(3):
        disk.write(number * 100, block(number + 50))
    tuesday = told("tuesday", tmp_path, monday)
    changed = await backed_up(site, tuesday, monday)
    assert changed.base == monday.id and changed.stored_bytes == 3 * 65536
    assert await backed_up(site, tuesday, monday) == changed, "said again, it is what there is"
    assert moments(site) == ["tuesday"]
    assert await site.storage.snapshots() == (), "moments are nobody's snapshots"

    wanted = {n * 100: block(n + 50 if n < 3 else n) for n in range(20)}
    back = VolumeSpec(id=VolumeId("back"), size_mib=64, image=None, host=volume.host)
    for spec in (in_ceph(back), msgspec.structs.replace(back, id=VolumeId("home"))):
        await both.receive(spec)
        await both.restore(spec, (monday, tuesday), on_copied=lambda done, total: None)
        await site.until_closed(both, spec)
    again = await site.client("back")
    assert {n: again.read(n) for n in wanted} == wanted
    home = site.disk(await stand_in(site.host, "home.e1", name="home"))
    assert {n: home.read(n) for n in wanted} == wanted

    for backup in (tuesday, monday):
        await both.backup_delete(backup)
    assert not list(tmp_path.iterdir()) and moments(site) == []
    await both.reconcile(StorageDesired(removed=(VolumeId("home"),)))


async def test_a_backup_that_was_interrupted_is_of_the_same_moment(site: Site, tmp_path: Path) -> None:
    """The daemon that reads it is killed, the agent forgets everything, the volume is written meanwhile."""
    await site.have(site.volume("data"))
    disk = await site.client("data")
    disk.write(0, block(1))
    monday = told("monday", tmp_path)

    async def killed() -> None:
        os.kill(await site.host.pid(doors.UNIT), signal.SIGKILL)
        raise Unavailable("the agent was killed here")

    with pytest.raises(Unavailable):
        await site.storage.backup(
            DATA, monday, None, bytes_per_second=0, on_copied=lambda done, total: None, on_moment=killed
        )
    disk.write(0, block(2))
    await site.storage.close()
    await backed_up_at_last(site, monday)
    assert (tmp_path / "monday.data").read_bytes()[: len(block(1))] == block(1)
    tuesday = told("tuesday", tmp_path, monday)
    with pytest.raises(Unavailable):
        await site.storage.backup(
            DATA, tuesday, monday, bytes_per_second=0, on_copied=lambda done, total: None, on_moment=killed
        )
    await site.storage.backup_forget(DATA, tuesday)
    assert moments(site) == ["monday"]
    changed = await backed_up_at_last(site, told("wednesday", tmp_path, monday), monday)
    assert (changed.base, changed.stored_bytes) == (monday.id, 65536)


async def test_changes_are_not_told_of_a_volume_that_was_reverted(site: Site, tmp_path: Path) -> None:
    volume = site.volume("data")
    await site.have(volume)
    disk = await site.client("data")
    disk.write(0, block(1))
    await site.storage.snapshot((SnapshotSpec(id=SnapshotId("then"), volume=DATA),))
    disk.write(0, block(2))
    monday = told("monday", tmp_path)
    await backed_up(site, monday)
    await stop_clients(site)
    await site.storage.revert(volume, SnapshotId("then"))
    result = await backed_up(site, told("tuesday", tmp_path, monday), monday)
    assert result.base is None and "reverted" in result.why_full
    await site.storage.reconcile(StorageDesired(removed=(DATA,), removed_snapshots=(SnapshotId("then"),)))
    await site.until_gone(".gone.")
    assert site.images() == []
