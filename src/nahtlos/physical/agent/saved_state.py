"""What was saved of a server on a volume: parts of one size, then the list of their digests.

    0            parts * PART_BYTES       + 32 per part
    [part][part]…[part, padded]          [sha256][sha256]…

The digest of the list is kept apart from it, in the ledger and by the orchestrator; a part is handed on only
after its own digest was found right.
"""

import hashlib
from collections.abc import AsyncIterator

from nahtlos.model.errors import Refused
from nahtlos.physical.ports import RawVolume

PART_BYTES = 4 << 20
DIGEST_BYTES = 32
SECTOR = 4096


class Writer:
    """Takes pieces of any size, in order."""

    def __init__(self, volume: RawVolume) -> None:
        self._volume = volume
        self._pending = bytearray()
        self._digests = bytearray()
        self.bytes = 0

    async def add(self, piece: bytes) -> None:
        self.bytes += len(piece)
        self._pending += piece
        while len(self._pending) >= PART_BYTES:
            part = bytes(self._pending[:PART_BYTES])
            del self._pending[:PART_BYTES]
            await self._put(part)

    async def finish(self) -> str:
        """Everything is durable on return; the digest of the list."""
        if self._pending:
            await self._put(bytes(self._pending))
        listed = bytes(self._digests)
        at = len(listed) // DIGEST_BYTES * PART_BYTES
        await self._write(at, listed)
        await self._volume.flush()
        return hashlib.sha256(listed).hexdigest()

    async def _put(self, part: bytes) -> None:
        at = len(self._digests) // DIGEST_BYTES * PART_BYTES
        self._digests += hashlib.sha256(part).digest()
        await self._write(at, part)

    async def _write(self, at: int, data: bytes) -> None:
        padded = data + bytes(-len(data) % SECTOR)
        if at + len(padded) > self._volume.size:
            raise Refused(
                f"what is saved does not fit into the {self._volume.size >> 20} MiB there are for it",
                field="memory",
            )
        for begin in range(0, len(padded), PART_BYTES):
            await self._volume.write(at + begin, padded[begin : begin + PART_BYTES])


async def parts_of(volume: RawVolume, size: int, digest: str) -> AsyncIterator[bytes]:
    """In order. Refused, before it is handed on, at whatever is not what was written."""
    count = -(-size // PART_BYTES)
    length = count * DIGEST_BYTES
    listed = await _read(volume, count * PART_BYTES, length + -length % SECTOR)
    listed = listed[:length]
    if hashlib.sha256(listed).hexdigest() != digest:
        raise _other("the list of its parts")
    for number in range(count):
        wanted = min(PART_BYTES, size - number * PART_BYTES)
        part = (await _read(volume, number * PART_BYTES, wanted + -wanted % SECTOR))[:wanted]
        if hashlib.sha256(part).digest() != listed[number * DIGEST_BYTES :][:DIGEST_BYTES]:
            raise _other(f"part {number + 1} of {count}")
        yield part


async def _read(volume: RawVolume, at: int, length: int) -> bytes:
    found = bytearray()
    for begin in range(0, length, PART_BYTES):
        found += await volume.read(at + begin, min(PART_BYTES, length - begin))
    return bytes(found)


def _other(what: str) -> Refused:
    return Refused(
        f"what was saved is not what was written: {what}",
        field="memory",
        remedy="look at its volume; to give up what was saved: nahtlos server stop --hard, then start",
    )
