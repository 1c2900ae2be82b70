"""The embedded storage on a real storage daemon: what was acknowledged survives its death, whoever is there
to see it. The writer uses QEMU's own NBD client, as a server does: same reconnects, same credentials."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from nbd_writer import Disk, Writer, block, stand_in
from physical_host import Place, volume_on

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import ImageId, VolumeId
from nahtlos.model.inventory import VolumeStatus
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage import serving, silence
from nahtlos.runtime.identity.authority import CertificateAuthority, Issued
from nahtlos.wire.credentials import write_pki_dir

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("sto")
    try:
        yield place
    finally:
        await place.close()


async def test_writer_loses_nothing_through_kills_of_the_daemon(place: Place) -> None:
    host = place.host("host-1")
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "data", empty=True, size_mib=512),)))
    disk = Disk(await stand_in(host, "data.e1"))
    writer = Writer(disk)
    writer.start()
    try:
        for _ in range(3):
            await asyncio.sleep(0.3)
            pid = await host.pid("qsd")
            before = writer.acknowledged
            os.kill(pid, 9)
            await host.until_pid("qsd", other_than=pid)
            await asyncio.sleep(0.7)
            assert writer.acknowledged > before
    finally:
        writer.ends.set()
        await asyncio.to_thread(writer.join)
    assert writer.acknowledged > 10
    assert await asyncio.to_thread(writer.wrong) == []
    assert writer.longest < 3, f"{writer.longest:.3f} s"
    disk.close()


async def test_daemon_serves_again_although_nobody_is_there_to_tell_it(place: Place) -> None:
    """As when agent and daemon die together: what it serves is in its definition."""
    host = place.host("host-1")
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "one", empty=True, size_mib=8),)))
    second = (volume_on(host, "one", empty=True, size_mib=8), volume_on(host, "two", empty=True, size_mib=8))
    await host.storage.reconcile(StorageDesired(volumes=second))
    await host.storage.close()
    pid = await host.pid("qsd")
    os.kill(pid, 9)
    await host.until_pid("qsd", other_than=pid)
    for name in ("one", "two"):
        disk = Disk(await stand_in(host, f"{name}.e1", name=f"client-{name}"))
        assert disk.size == 8 << 20
        disk.close()
    assert await host.storage.reconcile(StorageDesired(volumes=second)) == ()


async def test_a_daemon_that_hangs_is_started_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither ends nor answers, and its monitor stays connected: nobody else would put that right."""
    monkeypatch.setattr(serving, "AWAKE_WITHIN", 0.2)
    monkeypatch.setattr(silence, "SILENT_SECONDS", 1.0)
    host = place.host("host-1")
    wanted = StorageDesired(volumes=(volume_on(host, "data", empty=True, size_mib=8),))
    await host.storage.reconcile(wanted)
    disk = Disk(await stand_in(host, "data.e1"))
    disk.write(0, block(0))
    hung = await host.pid("qsd")
    os.kill(hung, signal.SIGSTOP)
    with pytest.raises(Unavailable, match="does not answer"):
        await host.storage.reconcile(wanted)
    assert await host.pid("qsd") == hung, "it may only be slow"
    with pytest.raises(Unavailable, match="started anew"):
        await host.storage.reconcile(wanted)
    await host.until_pid("qsd", other_than=hung)
    await host.storage.reconcile(wanted)
    assert [status.served for status in await host.storage.observe()] == [True]
    assert await asyncio.to_thread(disk.read, 0) == block(0)
    disk.close()


async def test_volume_from_an_image_is_larger_sparse_and_starts_with_it(place: Place) -> None:
    host = place.host("host-1")
    volume = volume_on(host, "root", size_mib=256)
    done = await host.storage.reconcile(StorageDesired(volumes=(volume,)))
    assert any("created" in line for line in done)
    path = host.settings.state_dir / "volumes" / "root.raw"
    image = host.settings.images_dir / f"{volume.image}.raw"
    assert path.stat().st_size == 256 << 20
    assert path.stat().st_blocks * 512 <= image.stat().st_blocks * 512 + (1 << 20)
    with path.open("rb") as made, image.open("rb") as original:
        assert made.read(1 << 20) == original.read(1 << 20)
    (status,) = await host.storage.observe()
    assert status.allocated_bytes > 1 << 20
    assert msgspec.structs.replace(status, allocated_bytes=0) == VolumeStatus(
        id=VolumeId("root"), epoch=1, served=True, size_mib=256
    )
    await host.restart_drivers()
    assert await host.storage.reconcile(StorageDesired(volumes=(volume,))) == ()


async def test_new_epoch_shuts_out_the_clients_of_the_old_one(place: Place) -> None:
    host = place.host("host-1")
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "data", empty=True, size_mib=8),)))
    old = Disk(await stand_in(host, "data.e1"))
    old.write(0, block(0))
    await host.storage.reconcile(
        StorageDesired(volumes=(volume_on(host, "data", empty=True, size_mib=8, epoch=2),))
    )
    new = Disk(await stand_in(host, "data.e2", name="client-2"))
    assert new.read(0) == block(0)
    assert [v.epoch for v in await host.storage.observe()] == [2]
    new.close()
    old.close()


async def test_only_what_is_named_is_deleted(place: Place) -> None:
    host = place.host("host-1")
    kept, gone = (volume_on(host, name, empty=True, size_mib=8) for name in ("kept", "gone"))
    await host.storage.reconcile(StorageDesired(volumes=(kept, gone)))
    assert await host.storage.reconcile(StorageDesired()) == ()
    assert {v.id: v.served for v in await host.storage.observe()} == {"kept": True, "gone": True}
    await host.storage.reconcile(StorageDesired(removed=(VolumeId("gone"),)))
    assert {v.id: v.served for v in await host.storage.observe()} == {"kept": True}


async def test_operator_and_strangers_are_not_served(place: Place, tmp_path: Path) -> None:
    host = place.host("host-1")
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "data", empty=True, size_mib=8),)))
    operator = place.authority.issue_operator("somebody")
    stranger = CertificateAuthority.open(tmp_path / "other-ca").issue_host(
        host.settings.host, host.settings.address
    )
    for name, issued in (("operator", operator), ("stranger", stranger)):
        with pytest.raises(ConnectionError):
            await stand_in(host, "data.e1", pki=pki(tmp_path / name, issued), name=name)
    said = (host.settings.state_dir / "qsd.log").read_text()
    assert "authz check for CN=operator/somebody is denied" in said


async def test_missing_or_too_large_images_are_refused_by_name(place: Place) -> None:
    host = place.host("host-1")
    missing = VolumeSpec(id=VolumeId("v"), size_mib=8, image=ImageId("no-such"), host=host.settings.host)
    with pytest.raises(Refused, match="no-such") as refusal:
        await host.storage.reconcile(StorageDesired(volumes=(missing,)))
    assert refusal.value.field == "image"
    with pytest.raises(Refused, match="MiB") as refusal:
        await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "v", size_mib=8),)))
    assert refusal.value.field == "size_mib"
    assert await host.storage.observe() == ()


def pki(folder: Path, issued: Issued) -> Path:
    write_pki_dir(folder, issued.ca_pem, issued.certificate_pem, issued.key_pem)
    return folder
