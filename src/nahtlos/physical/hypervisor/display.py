"""One connection to a VMM's display: QEMU speaks RFB on a unix socket of its host, and nowhere else."""

import asyncio
from pathlib import Path

from nahtlos.model.errors import Unavailable

CONNECT_WITHIN = 3.0
WRITE_WITHIN = 5.0


class SocketDisplay:
    """`physical.ports.DisplayLine`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, path: Path) -> "SocketDisplay":
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                return cls(*await asyncio.open_unix_connection(str(path)))
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"the display does not answer: {error or 'in time'}", field="server") from error

    async def read(self, limit: int) -> bytes:
        try:
            return await self._reader.read(limit)
        except OSError:
            return b""

    async def write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_WITHIN):
                self._writer.write(data)
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise Unavailable("the display takes nothing any more", field="display") from error

    async def close(self) -> None:
        self._writer.transport.abort()
