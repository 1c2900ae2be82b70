"""Encrypted volumes on a real storage daemon: nothing readable on disk, served again after kill -9 without
anybody's help, and said in words where the key is missing or wrong."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec
import pytest
from inside_place import BLOCK, content, door, inside, write
from physical_host import Host, Place, image

from nahtlos.model.errors import Error, NotFound, Unavailable
from nahtlos.model.ids import BackupId, KeyId, SnapshotId, VolumeId
from nahtlos.model.storage import BackupSpec, SnapshotSpec, VolumeSpec
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage.embedded import EmbeddedStorage

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
DATA, KEY = VolumeId("data"), KeyId("data-key")
PLAIN = b"what nobody else may read " * 2520 + bytes(16)


class Ring:
    """The keyring, as far as a host is told of it."""

    def __init__(self) -> None:
        self.secrets = {KEY: os.urandom(32)}
        self.away = False
        self.asked = 0

    async def key(self, key: KeyId) -> bytes:
        self.asked += 1
        if self.away:
            raise Unavailable("no orchestrator is connected", field="key")
        if key not in self.secrets:
            raise NotFound(f"there is no key '{key}'", field="key")
        return self.secrets[key]


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("enc")
    with inside(place):
        try:
            yield place
        finally:
            await place.close()


async def anew(host: Host, ring: Ring) -> None:
    """As when an agent is killed and started again."""
    await host.storage.close()
    host.storage = EmbeddedStorage(host.settings, host.supervisor, ring)


def spec(host: Host, name: VolumeId = DATA, *, empty: bool = True, size_mib: int = 24) -> VolumeSpec:
    return VolumeSpec(
        id=name,
        size_mib=size_mib,
        image=None if empty else image(),
        host=host.settings.host,
        encryption_key=KEY,
    )


async def served(place: Place, ring: Ring) -> Host:
    host = place.host("host-1")
    await anew(host, ring)
    await host.storage.reconcile(StorageDesired(volumes=(spec(host),)))
    return host


async def problems(host: Host) -> dict[str, str]:
    return {status.id: status.problem for status in await host.storage.observe()}


def on_disk(host: Host) -> bytes:
    folder = host.settings.state_dir / "volumes"
    return b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


async def test_nothing_readable_is_on_disk(place: Place) -> None:
    ring = Ring()
    host = await served(place, ring)
    assert content(host, DATA) == bytes(24 << 20), "what was never written reads as zeros"
    for number in range(0, 200, 7):
        write(host, DATA, number, PLAIN)
    snapshot = SnapshotSpec(id=SnapshotId("then"), volume=DATA)
    await host.storage.snapshot((snapshot,))
    write(host, DATA, 3, PLAIN)
    point = await host.storage.copies.backups.open_point(
        await host.storage.releases.bundle(), DATA, "aside", since=None
    )
    write(host, DATA, 7, bytes(BLOCK))  # what it overwrites is copied aside
    assert point.export
    held = await asyncio.to_thread(on_disk, host)
    assert b"nobody else" not in held
    assert ring.secrets[KEY] not in held and ring.secrets[KEY].hex().encode() not in held
    kept = host.settings.run_dir / "keys"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in kept.iterdir()] == [0o600]
    await host.storage.copies.backups.close_point(DATA)
    assert PLAIN in content(host, DATA)


async def test_volume_from_an_image_holds_it_encrypted(place: Place) -> None:
    ring = Ring()
    host = place.host("host-1")
    await anew(host, ring)
    volume = spec(host, empty=False, size_mib=192)
    await host.storage.reconcile(StorageDesired(volumes=(volume,)))
    original = (host.settings.images_dir / f"{volume.image}.raw").read_bytes()
    assert (await asyncio.to_thread(content, host, DATA))[: len(original)] == original
    told = next(line for line in (b"SYSLINUX", b"EXTLINUX", b"GRUB") if line in original)
    assert told not in await asyncio.to_thread(on_disk, host)


async def test_kill_of_the_daemon_under_writes_loses_nothing_and_needs_nobody(place: Place) -> None:
    ring = Ring()
    host = await served(place, ring)
    await host.storage.close()  # nobody is there: the supervisor starts it again, keys are where they were
    acknowledged = 0
    ends = threading.Event()

    def writer() -> None:
        nonlocal acknowledged
        while not ends.is_set():
            try:
                with door(host).client("data.e1") as client:
                    while not ends.is_set():
                        client.write(acknowledged % 384 * BLOCK, block(acknowledged))
                        acknowledged += 1
            except Error:
                continue

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        for _ in range(3):
            await asyncio.sleep(0.4)
            pid, before = await host.pid("qsd"), acknowledged
            os.kill(pid, 9)
            await host.until_pid("qsd", other_than=pid)
            async with asyncio.timeout(20):
                while acknowledged <= before + 1:
                    await asyncio.sleep(0.02)
    finally:
        ends.set()
        await asyncio.to_thread(thread.join)
    assert acknowledged > 20
    found = content(host, DATA)
    newest = {number % 384: number for number in range(acknowledged)}
    lost = [n for at, n in newest.items() if not is_block(found, at, n, acknowledged)]
    assert lost == []
    print(f"{acknowledged} writes acknowledged through 3 kills, {len(lost)} lost")


def block(number: int) -> bytes:
    return (number + 1).to_bytes(8, "little") * (BLOCK // 8)


def is_block(found: bytes, at: int, number: int, acknowledged: int) -> bool:
    """Or the one that was under way and never acknowledged."""
    held = found[at * BLOCK : (at + 1) * BLOCK]
    return held == block(number) or (acknowledged % 384 == at and held == block(acknowledged))


async def test_missing_key_is_said_and_others_are_served(place: Place) -> None:
    ring = Ring()
    host = await served(place, ring)
    write(host, DATA, 1, PLAIN)
    other = msgspec.structs.replace(spec(host, VolumeId("other")), encryption_key=None)
    wanted = StorageDesired(volumes=(spec(host), other))
    await host.storage.reconcile(wanted)
    await host.supervisor.stop("qsd", grace=1)  # the host is switched off: what is on the tmpfs is gone
    for path in (host.settings.run_dir / "keys").iterdir():
        path.unlink()
    ring.away = True
    await anew(host, ring)
    with suppress(Error):
        await host.storage.reconcile(wanted)
    said = await problems(host)
    assert "data-key" in said["data"] and said["other"] == ""
    assert not next(s.served for s in await host.storage.observe() if s.id == DATA)
    ring.away = False
    await host.storage.reconcile(wanted)
    assert (await problems(host)) == {"data": "", "other": ""}
    assert PLAIN in content(host, DATA)


async def test_wrong_key_opens_nothing(place: Place) -> None:
    ring = Ring()
    host = await served(place, ring)
    write(host, DATA, 1, PLAIN)
    await host.supervisor.stop("qsd", grace=1)
    for path in (host.settings.run_dir / "keys").iterdir():
        path.unlink()
    right, ring.secrets[KEY] = ring.secrets[KEY], os.urandom(32)
    await anew(host, ring)
    with suppress(Error):
        await host.storage.reconcile(StorageDesired(volumes=(spec(host),)))
    assert (await problems(host))["data"]
    with pytest.raises(Error):
        content(host, DATA)
    ring.secrets[KEY] = right
    for path in (host.settings.run_dir / "keys").iterdir():
        path.unlink()
    await anew(host, ring)
    await host.storage.reconcile(StorageDesired(volumes=(spec(host),)))
    assert PLAIN in content(host, DATA)


async def test_backup_of_an_encrypted_volume_is_restored_into_another(place: Place) -> None:
    ring = Ring()
    host = await served(place, ring)
    write(host, DATA, 5, PLAIN)
    backup = BackupSpec(id=BackupId("b"), volume=DATA, target=str(place.folder / "backups"), created_at=1.0)
    result = await host.storage.backup(DATA, backup, None, bytes_per_second=0, on_copied=lambda d, t: None)
    assert result.stored_bytes == BLOCK
    volume = spec(host, VolumeId("again"))
    await host.storage.receive(volume)
    await host.storage.restore(volume, (backup,), on_copied=lambda d, t: None)
    assert content(host, volume.id) == content(host, DATA)
    assert b"nobody else" not in await asyncio.to_thread(on_disk, host)
