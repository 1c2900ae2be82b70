"""A client of a volume as a server is one, and a writer that checks what it was told. The client is QEMU's
own NBD client: same reconnects, same credentials."""

import asyncio
import socket
import struct
import threading
import time
from pathlib import Path

import msgspec
from physical_host import Host

from nahtlos.physical.hypervisor.bundle import read_bundle
from nahtlos.physical.hypervisor.commandline import TLS_CLIENT, tls_object
from nahtlos.physical.ports import Unit

BLOCK = 4096
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
READ, WRITE, FLUSH, TRIM = 0, 1, 3, 4


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
        "server": {
            "type": "inet",
            "host": host.settings.address,
            "port": str(port or host.settings.nbd_port),
        },
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

    def discard(self, number: int, length: int) -> None:
        self._ask(TRIM, number * BLOCK, length)

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

    def __init__(self, disk: Disk, *, flush_every: int = 1, pause: float = 0.0) -> None:
        """`flush_every` 0: never, so that only what a daemon has passed on at once survives its death."""
        super().__init__()
        self.disk = disk
        self.failed = ""
        self._flush_every = flush_every
        self._pause = pause
        self.acknowledged = 0
        self.longest = 0.0
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.is_set():
            began = time.monotonic()
            try:
                self._once()
            except (AssertionError, OSError) as error:
                self.failed = f"block {self.acknowledged}: {error!r}"
                return
            self.longest = max(self.longest, time.monotonic() - began)
            time.sleep(self._pause)

    def _once(self) -> None:
        self.disk.write(self.acknowledged, block(self.acknowledged))
        if self._flush_every and self.acknowledged % self._flush_every == 0:
            self.disk.flush()
        self.acknowledged += 1

    def wrong(self) -> list[int]:
        return [n for n in range(self.acknowledged) if self.disk.read(n) != block(n)]
