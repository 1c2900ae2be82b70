"""A client of a volume that comes while its daemon drains does not keep it from going on."""

import asyncio
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator

import pytest
from nbd_writer import BLOCK, REPLY, REQUEST, WRITE, block
from physical_host import Host, Place, volume_on

from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage import newcomers

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
START_TLS, GO, FIXED_NEWSTYLE, ACK = 5, 7, 3, 1
OPTION = struct.Struct(">8sII")


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    place = Place("new")
    try:
        host = place.host("host-1")
        await host.storage.reconcile(
            StorageDesired(volumes=(volume_on(host, "data", empty=True, size_mib=64),))
        )
        yield host
    finally:
        await place.close()


class Client:
    """Negotiates step by step, and sends its writes piece by piece. Blocks the calling thread."""

    def __init__(self, host: Host) -> None:
        at = (host.settings.address, host.settings.nbd_port)
        plain = host.place.inside(lambda: socket.create_connection(at, timeout=10))
        assert plain.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGICIHAVEOPT")
        plain.sendall(struct.pack(">I", FIXED_NEWSTYLE) + OPTION.pack(b"IHAVEOPT", START_TLS, 0))
        assert struct.unpack(">QIII", plain.recv(20, socket.MSG_WAITALL))[2] == ACK
        pki = host.settings.pki_dir
        tls = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
        tls.check_hostname = False
        tls.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
        self._socket = tls.wrap_socket(plain)
        self._socket.settimeout(10)

    def go(self, export: str) -> None:
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(OPTION.pack(b"IHAVEOPT", GO, len(body)) + body)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._exactly(20))
            self._exactly(length)
            if kind == ACK:
                return

    def begin_write(self, number: int) -> None:
        """As much of one that the daemon waits for the rest."""
        head = REQUEST.pack(0x25609513, 0, WRITE, 1, number * BLOCK, BLOCK)
        self._socket.sendall(head + block(number)[: BLOCK // 2])

    def end_write(self, number: int) -> None:
        self._socket.sendall(block(number)[BLOCK // 2 :])
        assert REPLY.unpack(self._exactly(16))[:2] == (0x67446698, 0)

    def read(self, number: int) -> bytes:
        self._socket.sendall(REQUEST.pack(0x25609513, 0, 0, 1, number * BLOCK, BLOCK))
        assert REPLY.unpack(self._exactly(16))[:2] == (0x67446698, 0)
        return self._exactly(BLOCK)

    def ended(self) -> bool:
        try:
            return self._socket.recv(1) == b""
        except (ssl.SSLEOFError, ConnectionResetError):
            return True

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError("the daemon has disconnected")
            data += part
        return data


@pytest.mark.parametrize("known", [True, False])
async def test_client_that_comes_during_a_drain_is_sent_back(host: Host, known: bool) -> None:
    """A drain has to wait for a write, and somebody's negotiation ends meanwhile. `known`: whether the agent
    has been there for longer than the clients."""
    daemon = host.storage.daemon
    if not known:
        await daemon.close()
    old, young = await asyncio.to_thread(lambda: (Client(host), Client(host)))
    await asyncio.to_thread(old.go, "data.e1")
    if known:
        await asyncio.sleep(newcomers.LOOK_AGAIN_SECONDS)
        await daemon.exports()
        await asyncio.sleep(newcomers.NEW_FOR_SECONDS + 0.1)
        young.close()
        young = await asyncio.to_thread(Client, host)
    old.begin_write(7)
    began = time.monotonic()
    draining = asyncio.create_task(daemon.transaction([]))
    await asyncio.sleep(0.2)
    assert not draining.done()
    await asyncio.to_thread(young.go, "data.e1")
    await asyncio.to_thread(old.end_write, 7)
    await draining
    took = time.monotonic() - began
    assert await asyncio.to_thread(young.ended)
    later = newcomers.PATIENCE_SECONDS if known else newcomers.DOUBTFUL_AFTER_SECONDS
    assert later < took < 5, took
    if known:
        assert await asyncio.to_thread(old.read, 7) == block(7), "nobody else was sent back"
    for client in (old, young):
        client.close()
    await host.storage.daemon.exports()
    again = await asyncio.to_thread(Client, host)
    await asyncio.to_thread(again.go, "data.e1")
    assert await asyncio.to_thread(again.read, 7) == block(7)
    again.close()


async def test_slow_write_sends_nobody_back(host: Host) -> None:
    """A drain that waits for what will come spins no more than a daemon at rest."""
    daemon = host.storage.daemon
    await daemon.exports()
    client = await asyncio.to_thread(Client, host)
    await asyncio.to_thread(client.go, "data.e1")
    client.begin_write(3)
    draining = asyncio.create_task(daemon.transaction([]))
    await asyncio.sleep(newcomers.PATIENCE_SECONDS + 3 * newcomers.AGAIN_SECONDS)
    assert not draining.done()
    await asyncio.to_thread(client.end_write, 3)
    await draining
    assert await asyncio.to_thread(client.read, 3) == block(3)
    client.close()
