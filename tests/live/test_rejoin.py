"""Copies that come back on real storage daemons: only what differs is copied, while the volume is written,
and afterwards they are the same, whatever the returning one has that the others lack."""

import asyncio
import os
import random
import signal
import threading
from collections.abc import AsyncIterator

import msgspec
import pytest
from inside_place import inside
from physical_host import Host, Place, release, volume_on

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import Changes, CopyPhase, CopyProgress, ReplicaState, VolumeFormat, VolumeSpec
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage.nbd import NbdClient

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
MIB = 1 << 20
SIZE_MIB = 256
WRITTEN_MIB = 48
"""Before the copy goes away."""
CHANGED_MIB = 8
"""While it is away."""
VOLUME = VolumeId("data")


class Died(BaseException):
    """An agent ends here, as by kill -9."""


class Pair:
    """Two copies of a volume; who writes writes to both, as a server does."""

    def __init__(self, place: Place, form: VolumeFormat, written: int = WRITTEN_MIB) -> None:
        self.one, self.two = place.host("host-1"), place.host("host-2")
        self._form = form
        self.written = written
        self._random = random.Random(1)

    def spec(self, host: Host, epoch: int = 1, state: ReplicaState = ReplicaState.CURRENT) -> VolumeSpec:
        blank = volume_on(host, VOLUME, size_mib=SIZE_MIB, epoch=epoch, empty=True)
        return msgspec.structs.replace(blank, format=self._form, state=state)

    @property
    def coming(self) -> VolumeSpec:
        return self.spec(self.two, 2, ReplicaState.STALE)

    @property
    def target(self) -> VolumeEndpoint:
        settings = self.two.settings
        return VolumeEndpoint(
            host=settings.host, address=settings.address, port=settings.nbd_port, export=self.coming.export
        )

    async def begin(self, under: str) -> None:
        for host in (self.one, self.two):
            wanted = StorageDesired(volumes=(self.spec(host),), release=release(under))
            await host.storage.reconcile(wanted)
        await self.write(range(self.written), self.one, self.two)

    async def in_step(self, step: str) -> None:
        for host in (self.one, self.two):
            await host.storage.step_begin(VOLUME, step)
        for host in (self.one, self.two):
            await host.storage.step_reached(VOLUME, step)

    async def write(self, numbers: range, *hosts: Host, epoch: int = 1) -> None:
        """A MiB each, of which nobody has the like."""
        data = {number: self._random.randbytes(MIB) for number in numbers}

        def work(host: Host) -> None:
            with client(host, epoch) as opened:
                for number, block in data.items():
                    opened.write(number * MIB, block)

        for host in hosts:
            await asyncio.to_thread(work, host)

    async def start(self, changes: Changes | None, speed: int = 0) -> None:
        await self.one.storage.relocate_start(
            self.spec(self.one), self.target, bytes_per_second=speed, changes=changes
        )

    async def until_ready(self) -> CopyProgress:
        async with asyncio.timeout(60):
            while True:
                progress = await self.one.storage.relocate_progress(VOLUME)
                if progress.phase is CopyPhase.READY:
                    return progress
                assert progress.phase is CopyPhase.COPYING, progress
                await asyncio.sleep(0.02)

    async def alike(self) -> bool:
        first, second = [await h.storage.digest(VOLUME, 0, SIZE_MIB * MIB) for h in (self.one, self.two)]
        return first == second


class Busy(threading.Thread):
    """Writes to the one copy that is open until told to stop: half of it where nothing differed before."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self._host = host
        self.ends = threading.Event()
        self.written = 0

    def run(self) -> None:
        chance = random.Random(2)
        with client(self._host, 1) as opened:
            while not self.ends.is_set():
                opened.write(96 * MIB + chance.randrange(8 * 256) * 4096, chance.randbytes(4096))
                self.written += 1
                self.ends.wait(0.001)


def client(host: Host, epoch: int) -> NbdClient:
    return host.storage.copies.door.client(f"{VOLUME}.e{epoch}")


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("rejoin")
    with inside(place):
        try:
            yield place
        finally:
            await place.close()


@pytest.mark.parametrize(
    ("under", "form"),
    [("10.0", VolumeFormat.RAW), ("11.1", VolumeFormat.RAW), ("11.1", VolumeFormat.QCOW2)],
)
async def test_only_what_differs_is_copied_while_it_is_written(
    place: Place, under: str, form: VolumeFormat
) -> None:
    pair = Pair(place, form)
    await pair.begin(under)
    await pair.in_step("2-a")
    await pair.write(range(100, 100 + CHANGED_MIB), pair.one)
    await pair.write(range(200, 201), pair.two)  # which the other never got, and nobody acknowledged
    changes = await pair.two.storage.rejoin(pair.coming)
    assert changes == Changes(since="2-a", ranges=((200 * MIB, MIB),))
    busy = Busy(pair.one)
    busy.start()
    try:
        await pair.start(changes, speed=16 * MIB)
        progress = await pair.until_ready()
        await asyncio.to_thread(busy.ends.wait, 0.3)  # every write goes to both
    finally:
        busy.ends.set()
        await asyncio.to_thread(busy.join)
    assert (await pair.one.storage.relocate_progress(VOLUME)).phase is CopyPhase.READY
    differed = (CHANGED_MIB + 1) * MIB
    print(f"{under} {form}: {progress.done / MIB:.1f} MiB copied, {busy.written} writes meanwhile")
    assert differed <= progress.done <= differed + 4 * MIB
    assert busy.written > 20
    await pair.one.storage.relocate_cancel(VOLUME)
    assert await pair.alike()
    current = pair.spec(pair.two, 2)
    await pair.two.storage.reconcile(StorageDesired(volumes=(current,)))
    await pair.write(range(30, 33), pair.one)
    await pair.write(range(30, 33), pair.two, epoch=2)


async def test_what_is_not_known_is_never_guessed(place: Place) -> None:
    """After kill -9 of a daemon nobody knows what was written there: everything is copied."""
    pair = Pair(place, VolumeFormat.RAW, written=8)
    await pair.begin("11.1")
    assert await pair.two.storage.rejoin(pair.coming) is None  # they were never in step
    await pair.in_step("2-a")
    await pair.write(range(200, 201), pair.two)
    await kill_daemon(pair.two)
    changes = await pair.two.storage.rejoin(pair.coming)
    assert changes == Changes(since="2-a", ranges=None)
    await pair.write(range(100, 101), pair.one)
    await kill_daemon(pair.one)
    with pytest.raises(Conflict, match="not known here"):
        await pair.start(changes)
    with pytest.raises(Refused, match="not known"):
        await pair.one.storage.step_reached(VOLUME, "2-a")
    await pair.two.storage.receive(pair.coming)
    assert await pair.two.storage.rejoin(pair.coming) is None  # from here on it is nothing to begin from
    await pair.start(None)
    progress = await pair.until_ready()
    assert progress.done > pair.written * MIB
    await pair.one.storage.relocate_cancel(VOLUME)
    assert await pair.alike()


@pytest.mark.parametrize("step", ["rejoin.mirrored", "rejoin.started"])
async def test_agent_is_killed_while_it_begins(place: Place, step: str) -> None:
    """A mirror without what has to be filled in never counts as a copy that is in step."""
    pair = Pair(place, VolumeFormat.RAW, written=8)
    await pair.begin("10.0")
    await pair.in_step("2-a")
    await pair.write(range(100, 104), pair.one)
    changes = await pair.two.storage.rejoin(pair.coming)

    async def dies(name: str) -> None:
        if name == step:
            raise Died

    pair.one.storage.serving.on_step = dies
    with pytest.raises(Died):
        await pair.start(changes)
    await pair.one.restart_drivers()
    phase = (await pair.one.storage.relocate_progress(VOLUME)).phase
    if step == "rejoin.mirrored":
        assert phase is CopyPhase.FAILED
        await pair.start(await pair.two.storage.rejoin(pair.coming))
    progress = await pair.until_ready()
    assert progress.done == 4 * MIB
    await pair.one.storage.relocate_cancel(VOLUME)
    assert await pair.alike()


async def test_copy_that_dies_again_ends_the_rejoin_and_no_write(place: Place) -> None:
    pair = Pair(place, VolumeFormat.RAW, written=8)
    await pair.begin("11.1")
    await pair.in_step("2-a")
    await pair.write(range(100, 140), pair.one)
    await pair.start(await pair.two.storage.rejoin(pair.coming), speed=2 * MIB)
    daemon = await pair.two.pid("qsd")
    os.kill(pair.two.running.process.pid, signal.SIGKILL)
    os.kill(daemon, signal.SIGKILL)
    await pair.write(range(104, 110), pair.one)
    async with asyncio.timeout(20):
        while (await pair.one.storage.relocate_progress(VOLUME)).phase is not CopyPhase.FAILED:
            await asyncio.sleep(0.05)
    await pair.two.restart_supervisor()
    await pair.two.restart_drivers()


async def kill_daemon(host: Host) -> None:
    pid = await host.pid("qsd")
    os.kill(pid, signal.SIGKILL)
    await host.until_pid("qsd", other_than=pid)
