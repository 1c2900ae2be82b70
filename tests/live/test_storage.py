"""The embedded storage on a real storage daemon: what was acknowledged survives its death, whoever is there
to see it. The writer uses QEMU's own NBD client, as a server does: same reconnects, same credentials."""

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from physical_host import Host, Place, volume_on

from nahtlos.model.errors import Refused
from nahtlos.model.ids import ImageId, VolumeId
from nahtlos.model.inventory import VolumeStatus
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.hypervisor.bundle import read_bundle
from nahtlos.physical.hypervisor.commandline import TLS_CLIENT, tls_object
from nahtlos.physical.ports import StorageDesired, Unit
from nahtlos.runtime.identity.authority import CertificateAuthority, Issued
from nahtlos.wire.credentials import write_pki_dir

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
BLOCK = 4096
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
READ, WRITE, FLUSH = 0, 1, 3


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("sto")
    try:
        yield place
    finally:
        await place.close()


def newest(host: Host) -> Path:
    folders = host.settings.releases_dir.glob("qemu-*")
    return max(folders, key=lambda path: read_bundle(path).version)


async def stand_in(
    host: Host, export: str, *, pki: Path | None = None, name: str = "client", port: int = 0
) -> Path:
    """A daemon that has the volume as a server would, and offers it on a unix socket without TLS."""
    bundle = read_bundle(newest(host))
    door = host.settings.run_dir / f"{name}.nbd"
    _, credentials = tls_object(TLS_CLIENT, "client", pki or host.settings.pki_dir)
    node = {
        "driver": "nbd",
        "node-name": "volume",
        "server": {"type": "inet", "host": host.settings.address, "port": str(port or host.settings.nbd_port)},
        "export": export,
        "reconnect-delay": 30,
        "tls-creds": TLS_CLIENT,
    }
    unit = Unit(
        name=name,
        argv=(
            *bundle.storage_daemon(),
            *("--object", credentials, "--blockdev", msgspec.json.encode(node).decode()),
            *("--nbd-server", f"addr.type=unix,addr.path={door}"),
            *("--export", "type=nbd,id=e,node-name=volume,name=volume,writable=on"),
        ),
        environment=bundle.environment,
        log=host.settings.state_dir / f"{name}.log",
    )
    await host.supervisor.start(unit)
    async with asyncio.timeout(20):
        while True:
            if door.is_socket():
                return door
            status = (await host.supervisor.units())[name]
            if status.pid is None:
                raise ConnectionError(unit.log.read_text())
            await asyncio.sleep(0.01)


class Disk:
    """The few words of NBD a checker needs; blocks the calling thread."""

    def __init__(self, door: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(40)
        self._socket.connect(str(door))
        assert self._exactly(16) == b"NBDMAGICIHAVEOPT"
        self._exactly(2)
        self._socket.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 6) + b"volume")
        self.size, _ = struct.unpack(">QH", self._exactly(10))

    def write(self, number: int, data: bytes) -> None:
        self._ask(WRITE, number * BLOCK, len(data), data)

    def flush(self) -> None:
        self._ask(FLUSH, 0, 0)

    def read(self, number: int) -> bytes:
        return self._ask(READ, number * BLOCK, BLOCK)

    def close(self) -> None:
        self._socket.close()

    def _ask(self, kind: int, offset: int, length: int, data: bytes = b"") -> bytes:
        self._socket.sendall(REQUEST.pack(0x25609513, 0, kind, 1, offset, length) + data)
        magic, error, _ = REPLY.unpack(self._exactly(16))
        assert (magic, error) == (0x67446698, 0)
        return self._exactly(length) if kind == READ else b""

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError("the disk is gone")
            data += part
        return data


def block(number: int) -> bytes:
    return struct.pack("<Q", number + 1) * (BLOCK // 8)


class Writer(threading.Thread):
    """Writes numbered blocks and counts what was flushed; remembers the longest it waited."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self.disk = disk
        self.acknowledged = 0
        self.longest = 0.0
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.is_set():
            began = time.monotonic()
            self.disk.write(self.acknowledged, block(self.acknowledged))
            self.disk.flush()
            self.acknowledged += 1
            self.longest = max(self.longest, time.monotonic() - began)

    def wrong(self) -> list[int]:
        return [n for n in range(self.acknowledged) if self.disk.read(n) != block(n)]


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
    assert await host.storage.observe() == (
        VolumeStatus(id=VolumeId("root"), epoch=1, served=True, size_mib=256),
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
