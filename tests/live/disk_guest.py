"""A guest of `physical_host` seen from its tap: what it says of its disk, and for how long it does not
answer."""

import asyncio
import contextlib
import ctypes
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from physical_host import CLONE_NEWNET, Host, Place

from nahtlos.model.config import ServerConfig

WITHIN = 60.0


def inside(place: Place, act: Callable[[], Any]) -> Any:
    """`act` in a thread that is in the place's namespace."""
    found: list[Any] = []

    def run() -> None:
        with Path(f"/run/netns/{place.namespace}").open() as namespace:
            assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) == 0
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@contextlib.contextmanager
def entered(place: Place) -> Generator[None]:
    """This thread in the place's namespace: where an agent would be, who asks storage daemons whether they
    live."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as before:
        with Path(f"/run/netns/{place.namespace}").open() as namespace:
            assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0
        try:
            yield
        finally:
            assert libc.setns(before.fileno(), CLONE_NEWNET) == 0


def link_local(mac: str) -> str:
    parts = [int(part, 16) for part in mac.split(":")]
    parts[0] ^= 2
    words = [*parts[:3], 0xFF, 0xFE, *parts[3:]]
    return "fe80::" + ":".join(f"{words[i] << 8 | words[i + 1]:x}" for i in range(0, 8, 2))


class Guest:
    """By its link-local address over the tap, which needs nobody to give it one."""

    def __init__(self, place: Place, host: Host, server: ServerConfig) -> None:
        port = server.spec.ports[0]
        tap = f"{host.settings.host[-6:]}-{port.id[-6:]}"
        self._place = place
        self._address = (link_local(port.mac), 80, 0, inside(place, lambda: socket.if_nametoindex(tap)))

    async def get(self, path: str, *, within: float = 30.0) -> dict[str, Any]:
        return await asyncio.to_thread(self._get, path, within)

    def _get(self, path: str, within: float) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as line:
                line.settimeout(within)
                line.connect(self._address)
                line.sendall(f"GET {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n".encode())
                answer = http.client.HTTPResponse(line)
                answer.begin()
                body = answer.read()
            assert answer.status == 200, body
            return json.loads(body)

        return inside(self._place, ask)

    async def ready(self) -> None:
        async with asyncio.timeout(WITHIN):
            while True:
                with contextlib.suppress(OSError, TimeoutError):
                    await self.get("/status", within=2.0)
                    return
                await asyncio.sleep(0.2)

    async def writes(self, per_s: int) -> None:
        await self.get(f"/set?disk_per_s={per_s}")

    async def disk(self) -> dict[str, Any]:
        return (await self.get("/status"))["disk"]

    async def acknowledges(self, more: int) -> int:
        """Until so many further blocks were acknowledged; how many there are then."""
        first = (await self.disk())["acknowledged"]
        async with asyncio.timeout(WITHIN):
            while True:
                disk = await self.disk()
                assert disk["errors"] == 0, disk
                if disk["acknowledged"] >= first + more:
                    return int(disk["acknowledged"])
                await asyncio.sleep(0.05)

    async def verified(self) -> int:
        """Every block read back by the guest; their number."""
        found = await self.get("/disk/verify", within=60.0)
        assert found["wrong"] == 0, found
        assert found["checked"] == found["acknowledged"] > 0, found
        return int(found["acknowledged"])

    def pulse(self) -> "Pulse":
        return Pulse(self._place, self._address)


class Pulse(threading.Thread):
    """Asks the guest for an echo again and again: its longest silence is how long it stood still."""

    def __init__(self, place: Place, address: tuple[str, int, int, int]) -> None:
        super().__init__()
        self._line: socket.socket = inside(place, lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        self._line.settimeout(0.02)
        self._address = (address[0], 7, 0, address[3])
        self._ends = threading.Event()
        self.longest = 0.0

    def run(self) -> None:
        last = time.monotonic()
        while not self._ends.is_set():
            self._line.sendto(b"beat", self._address)
            try:
                self._line.recv(64)
            except TimeoutError:
                continue
            now = time.monotonic()
            self.longest = max(self.longest, now - last)
            last = now
            time.sleep(0.002)

    def __enter__(self) -> "Pulse":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self.join()
        self._line.close()
