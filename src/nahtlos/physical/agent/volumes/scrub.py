"""The copies of a volume are compared range by range, at a bounded rate, while it is written. Of a single one
it is found out whether all of it can be read.

A write reaches the copies at different times, so a difference counts only if it stays: the digests of every
copy are read again, and where they are still as they were and still differ, no write was under way. What
differs is halved until it is small. With three copies two are right; with two the first one is, because it
is the one that servers read (a quorum reads in order): the other is what would be rebuilt. What cannot be
read although its host answers is wrong in any case. Copies that are found equal are marked no more.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import HostId
from nahtlos.model.storage import StorageBackend
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.peers import Peer
from nahtlos.physical.agent.volumes.single import SingleAct
from nahtlos.wire.messages import Message
from nahtlos.wire.volumes import ScrubOrder, VolumeDigest, VolumeDigested, VolumeMark

RANGE_BYTES = 64 << 20
SMALLEST_BYTES = 1 << 20
LOOKS = 3
LOOK_AGAIN_SECONDS = 0.5
"""Longer than a write is under way."""
ANSWER_SECONDS = 120.0
MOST_DIFFERENCES = 64
"""So many are enough to know that a copy is to be made anew."""
UNREADABLE = b""
"""Instead of a digest."""

Digests = Mapping[HostId, bytes]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    offset: int
    length: int
    wrong: tuple[HostId, ...]


def alike(digests: Digests) -> bool:
    return len(set(digests.values())) <= 1 and UNREADABLE not in digests.values()


def wrong_ones(digests: Digests, order: tuple[HostId, ...]) -> tuple[HostId, ...]:
    """Hosts whose copy differs from what most have; where there is no most, from the first in `order`."""
    readable = [digests[host] for host in order if digests[host] != UNREADABLE]
    if not readable:
        return order
    counted = Counter(readable).most_common(2)
    tie = len(counted) > 1 and counted[0][1] == counted[1][1]
    right = readable[0] if tie else counted[0][0]
    return tuple(host for host in order if digests[host] != right)


def stays(first: Digests, second: Digests) -> bool:
    """Nothing was written in between, and they differ."""
    return dict(first) == dict(second) and not alike(first)


def halves(offset: int, length: int) -> tuple[tuple[int, int], ...]:
    half = max(SMALLEST_BYTES, length // 2)
    return ((offset, half), (offset + half, length - half))


class Scrub(SingleAct):
    what = "scrub"

    def __init__(self, context: Context, journal: Journal) -> None:
        super().__init__(context, journal)
        assert isinstance(journal.task, ScrubOrder), f"operation {journal.id} compares nothing"
        self._order = journal.task
        self.subject = self._order.volume.id
        self._compared_bytes = 0
        self._peers = {each.host: Peer(context, each) for each in self._order.hosts}

    async def work(self) -> None:
        volume = self._order.volume
        self._compared_bytes = 0
        try:
            found = await self._compared(volume.size_mib << 20)
            await self._marked(found)
        finally:
            for peer in self._peers.values():
                await peer.close()
        text = ", ".join(f"{each.offset}+{each.length} on {' '.join(each.wrong)}" for each in found)
        self.tell("copies", str(len(volume.current)))
        self.tell("compared_bytes", str(self._compared_bytes))
        self.tell("differences", str(len(found)))
        self.tell("ranges", text)
        self.tell("wrong", " ".join(sorted({host for each in found for host in each.wrong})))

    async def undo(self) -> None:
        """It has changed nothing."""

    async def _compared(self, size: int) -> list[Difference]:
        found: list[Difference] = []
        for offset in range(0, size, RANGE_BYTES):
            length = min(RANGE_BYTES, size - offset)
            found += await self._differences(offset, length)
            self._compared_bytes = offset + length
            self.on_copied(offset + length, size)
            if len(found) >= MOST_DIFFERENCES:
                break
        return found[:MOST_DIFFERENCES]

    async def _differences(self, offset: int, length: int) -> list[Difference]:
        if alike(await self._digests(offset, length)):
            return []
        if length > SMALLEST_BYTES:
            parts = [part for part in halves(offset, length) if part[1] > 0]
            return [each for part in parts for each in await self._differences(*part)]
        last = await self._digests(offset, length)
        for _ in range(LOOKS):
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            now = await self._digests(offset, length)
            if alike(now):
                return []
            if stays(last, now):
                wrong = wrong_ones(now, self._order.volume.current)
                return [Difference(offset=offset, length=length, wrong=wrong)]
            last = now
        return []  # written all the time: compared by the next scrub

    async def _digests(self, offset: int, length: int) -> Digests:
        """Of all current copies at the same time, then as much pause as the rate asks for."""
        volume = self._order.volume
        ask = VolumeDigest(volume=volume.id, offset=offset, length=length)
        began = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(self._digest(host, ask) for host in volume.current))
        if self._order.bytes_per_second > 0:
            took = asyncio.get_running_loop().time() - began
            await asyncio.sleep(max(0.0, length / self._order.bytes_per_second - took))
        return dict(zip(volume.current, answers, strict=True))

    async def _digest(self, host: HostId, ask: VolumeDigest) -> bytes:
        """`UNREADABLE` if its host can be asked and still does not read this."""
        try:
            return await self._ask(host, ask)
        except Unavailable:
            await self._ask(host, VolumeDigest(volume=ask.volume, offset=ask.offset, length=0))
            return UNREADABLE

    async def _ask(self, host: HostId, body: VolumeDigest) -> bytes:
        if host == self._context.settings.host:
            return await self._context.drivers.storage.digest(body.volume, body.offset, body.length)
        answer = await self._peer(host).ask(body, VolumeDigested, ANSWER_SECONDS)
        return answer.sha256

    async def _marked(self, found: list[Difference]) -> None:
        volume = self._order.volume
        if volume.backend is StorageBackend.CEPH:
            return  # it keeps and mends its copies by itself
        if not found:
            for host in volume.current:
                await self._mark(host, "")
        for host in sorted({host for each in found for host in each.wrong}):
            problem = self._problem([each for each in found if host in each.wrong])
            await self._mark(host, problem)
            self._context.say("volume.scrub", volume.id, f"{host}: {problem}", id=self._order.id)

    def _problem(self, ranges: list[Difference]) -> str:
        first = f"the first at byte {ranges[0].offset}"
        if len(self._order.volume.current) < 2:
            return f"{len(ranges)} ranges cannot be read, {first}: restore the volume from a backup"
        return f"{len(ranges)} ranges differ from the other copies, {first}: rebuild this copy"

    async def _mark(self, host: HostId, problem: str) -> None:
        volume = self._order.volume
        epoch = next((copy.epoch for copy in volume.copies if copy.host == host), 0) or volume.epoch
        body = VolumeMark(volume=volume.id, epoch=epoch, problem=problem)
        if host == self._context.settings.host:
            await self._context.drivers.storage.mark(body.volume, body.epoch, body.problem)
        else:
            await self._peer(host).ask(body, Message, ANSWER_SECONDS)

    def _peer(self, host: HostId) -> Peer:
        if host not in self._peers:
            raise Unavailable(f"nothing says where the agent of {host} is reached", field="hosts")
        return self._peers[host]
