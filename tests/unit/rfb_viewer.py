"""A small VNC viewer for tests: RFB 3.8, Raw alone, 32 bits a pixel."""

import asyncio
import struct
from collections.abc import Awaitable, Callable

from nahtlos.ops import rfb
from nahtlos.ops.rfb_handshakes import proof_of

FORMAT = struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)


class WrongPassword(Exception):
    pass


class RfbViewer:
    """Over any two ways to read exactly so many bytes and to write some."""

    def __init__(
        self, read: Callable[[int], Awaitable[bytes]], write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self._read, self._write = read, write
        self.size = (0, 0)
        self.name = b""

    @classmethod
    async def over_tcp(cls, port: int, password: str) -> "RfbViewer":
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        viewer = cls(reader.readexactly, write)
        viewer.close = writer.close
        try:
            await viewer.begin(password)
        except BaseException:
            writer.close()
            raise
        return viewer

    def close(self) -> None:
        """Its connection, if it is its own."""

    async def begin(self, password: str = "") -> None:
        assert await self._read(12) == rfb.VERSION
        await self._write(rfb.VERSION)
        kinds = await self._read((await self._read(1))[0])
        await self._write(kinds[:1])
        if kinds[0] == rfb.VNC_AUTHENTICATION:
            await self._write(proof_of(password, await self._read(16)))
        if await self._read(4) != b"\0\0\0\0":
            raise WrongPassword
        await self._write(b"\x01")
        width, height = struct.unpack(">HH", (await self._read(20))[:4])
        self.size = (width, height)
        self.name = await self._read(struct.unpack(">I", await self._read(4))[0])
        await self._write(rfb.set_pixel_format(FORMAT) + rfb.set_encodings((rfb.RAW, rfb.DESKTOP_SIZE)))

    async def ask(self, *, incremental: bool = False) -> None:
        await self._write(rfb.update_request(*self.size, incremental=incremental))

    async def key(self, symbol: int) -> None:
        for down in (1, 0):
            await self._write(struct.pack(">BBxxI", rfb.KEY, down, symbol))

    async def update(self) -> dict[tuple[int, int], bytes]:
        """The rows of the next update that paints something, by where they begin; asks again where it was
        only told a size."""
        while True:
            kind = (await self._read(1))[0]
            if kind == rfb.BELL:
                continue
            assert kind == rfb.FRAMEBUFFER_UPDATE, kind
            rows = await self._rectangles()
            if rows:
                return rows
            await self.ask()

    async def _rectangles(self) -> dict[tuple[int, int], bytes]:
        rows: dict[tuple[int, int], bytes] = {}
        for _ in range(struct.unpack(">xH", await self._read(3))[0]):
            x, y, width, height, encoding = struct.unpack(">HHHHi", await self._read(12))
            if encoding == rfb.DESKTOP_SIZE:
                self.size = (width, height)
                continue
            assert encoding == rfb.RAW, encoding
            for row in range(y, y + height):
                rows[x, row] = await self._read(width * 4)
        return rows
