"""A simulated server's display: RFB 3.8 without security, one small picture in raw encoding.

What is shown says who shows it: every pixel is the number of times the guest has booted (blue), the VMM's
epoch (green) and the last key that was pressed (red). Answers every request for an update; ends with its
VMM."""

import asyncio
import struct

from nahtlos.model.errors import Unavailable
from nahtlos.physical.sim.guests import Vmm

WIDTH, HEIGHT = 32, 16
FORMAT = struct.pack(">BBBBHHHBBB3x", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
NAME = b"simulated"
LENGTHS = {0: 20, 3: 10, 4: 8, 5: 6}
LOOK_SECONDS = 0.05


class SimDisplay:
    """`physical.ports.DisplayLine`."""

    def __init__(self, vmm: Vmm) -> None:
        self._vmm = vmm
        self._out = bytearray(b"RFB 003.008\n")
        self._in = bytearray()
        self._steps = [self._version, self._security, self._init]
        self._key = 0
        self._told = asyncio.Event()
        self._closed = False

    async def read(self, limit: int) -> bytes:
        while not self._out:
            if self._closed or self._vmm.ended:
                return b""
            self._told.clear()
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._told.wait()
            except TimeoutError:
                continue
        data = bytes(self._out[:limit])
        del self._out[:limit]
        return data

    async def write(self, data: bytes) -> None:
        if self._closed or self._vmm.ended:
            raise Unavailable("the display takes nothing any more", field="display")
        self._in += data
        while self._steps[0]() if self._steps else self._message():
            self._told.set()

    async def close(self) -> None:
        self._closed = True
        self._told.set()

    def _take(self, count: int) -> bytes:
        taken = bytes(self._in[:count])
        del self._in[:count]
        return taken

    def _step(self, count: int, answer: bytes) -> bool:
        if len(self._in) < count:
            return False
        self._take(count)
        self._out += answer
        self._steps.pop(0)
        return True

    def _version(self) -> bool:
        return self._step(12, b"\x01\x01")

    def _security(self) -> bool:
        return self._step(1, b"\0\0\0\0")

    def _init(self) -> bool:
        init = struct.pack(">HH", WIDTH, HEIGHT) + FORMAT + struct.pack(">I", len(NAME)) + NAME
        return self._step(1, init)

    def _message(self) -> bool:
        if len(self._in) < 4:
            return False
        kind = self._in[0]
        count = 4 + 4 * struct.unpack_from(">H", self._in, 2)[0] if kind == 2 else LENGTHS.get(kind, 1)
        if len(self._in) < count:
            return False
        message = self._take(count)
        if kind == 4 and message[1]:
            self._key = struct.unpack_from(">I", message, 4)[0] & 0xFF
        if kind == 3:
            boots = self._vmm.guest.boot if self._vmm.guest else 0
            pixel = bytes((boots & 0xFF, self._vmm.id.epoch & 0xFF, self._key, 0))
            self._out += struct.pack(">BxHHHHHi", 0, 1, 0, 0, WIDTH, HEIGHT, 0) + pixel * (WIDTH * HEIGHT)
        return True
