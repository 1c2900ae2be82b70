"""Standing outside the cloud: calls made from a lab's client namespace, by a process that is elsewhere."""

import asyncio
import http.client

import msgspec

from nahtlos.lab.topology import within
from nahtlos.model.errors import Unavailable

HTTP_SECONDS = 5.0


class GuestMemory(msgspec.Struct, frozen=True, kw_only=True):
    mib: int
    mb_per_s: float
    verified_pages: int
    passes: int
    errors: int


class GuestDisk(msgspec.Struct, frozen=True, kw_only=True):
    acknowledged: int
    errors: int
    per_s: float


class GuestStatus(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    uptime_ms: float
    heartbeat: int
    heartbeat_longest_gap_ms: float
    memory: GuestMemory
    disk: GuestDisk


class Outside:
    """A customer's machine in front of the cloud."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    async def get(self, ip: str, path: str, *, timeout: float = HTTP_SECONDS) -> bytes:
        """Unavailable if the server does not answer 200 within `timeout` seconds."""
        return await asyncio.to_thread(within, self._namespace, lambda: _get(ip, path, timeout))

    async def status(self, ip: str) -> GuestStatus:
        return msgspec.json.decode(await self.get(ip, "/status"), type=GuestStatus)

    async def set_load(
        self,
        ip: str,
        *,
        memory_mib: int | None = None,
        memory_mb_per_s: float | None = None,
        disk_per_s: float | None = None,
    ) -> GuestStatus:
        named = {"memory_mib": memory_mib, "memory_mb_per_s": memory_mb_per_s, "disk_per_s": disk_per_s}
        query = "&".join(f"{name}={value:g}" for name, value in named.items() if value is not None)
        return msgspec.json.decode(await self.get(ip, f"/set?{query}"), type=GuestStatus)

    async def until_up(self, ip: str, *, timeout: float) -> float:
        """Seconds until the server answered HTTP."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            try:
                await self.get(ip, "/", timeout=1.0)
            except Unavailable as error:
                if loop.time() - began > timeout:
                    raise Unavailable(f"{ip} did not come up within {timeout:g} s") from error
                await asyncio.sleep(0.05)
            else:
                return loop.time() - began


def _get(ip: str, path: str, timeout: float) -> bytes:
    connection = http.client.HTTPConnection(ip, 80, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{ip} does not answer: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise Unavailable(f"{ip} answered {response.status} to {path}")
    return body
