"""A frame on its way from a tap's ring to another device, held where a killed agent's successor finds it.

Reading a ring takes the frame out of it, so for a moment only the reading process has it. It is read straight
into a file's page in memory (one system call: it is in the ring or in the page, never in neither), and the
page outlives the process. A frame that was sent in the very moment of the kill is sent twice; none is lost.

Owns one small file per tap in the run directory, for as long as frames are passed on. Never sends.

    length 0            nothing is held
    length READING      the page is filled with a pattern, or holds a frame whose length was not yet noted
    else                a frame is held
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from nahtlos.physical.network import tap

START = 16
SPAN = tap.LONGEST_FRAME
READING = 0xFFFFFFFF
PATTERN = b"\xa5"
ETHERNET = 14


class Parking:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, START + SPAN)
            self._memory = mmap.mmap(fd, START + SPAN)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """The file goes unless it may still hold something."""
        if self._held() == 0:
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(BufferError):  # somebody who was interrupted still looks at a frame
            self._memory.close()

    def left_behind(self, header: int) -> Iterator[memoryview]:
        """What an earlier process held, if it held anything. Call this before `frames`."""
        length = self._held()
        if length == READING:
            length = length_of(self._memory[START:], header)
        if length:
            yield memoryview(self._memory[START : START + length])
        self._note(0)

    def frames(self, fd: int) -> Iterator[memoryview]:
        """All of the ring of `fd`, oldest first. Each is valid, and held, until the next is asked for."""
        used = SPAN
        for _ in range(tap.QUEUE):
            self._memory[START : START + used] = PATTERN * used
            used = self._read(fd)
            if not used:
                return
            yield memoryview(self._memory)[START : START + used]
            self._note(0)

    def _read(self, fd: int) -> int:
        self._note(READING)
        try:
            length = os.readv(fd, [memoryview(self._memory)[START:]])
        except OSError:  # nothing is left, or the queue is not in use
            length = 0
        self._note(length)
        return length

    def _held(self) -> int:
        return int(struct.unpack_from("I", self._memory)[0])

    def _note(self, length: int) -> None:
        struct.pack_into("I", self._memory, 0, length)


def length_of(page: bytes, header: int) -> int:
    """Bytes of what was read into `page`, virtio-net header included; 0 if nothing was. What is not IP ends
    where the pattern begins."""
    if page[:header] == PATTERN * header:
        return 0
    frame = page[header:]
    kind = frame[12:14]
    if kind == b"\x08\x00":
        return header + ETHERNET + int(struct.unpack_from("!H", frame, 16)[0])
    payload = int(struct.unpack_from("!H", frame, 18)[0])
    if kind == b"\x86\xdd" and payload:
        return header + ETHERNET + 40 + payload
    return len(page.rstrip(PATTERN))
