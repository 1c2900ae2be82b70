"""Snapshots that follow their volume between real storage daemons while it is written, with kill -9 of agents
and daemons at every step: they hold the same at the new place, work there, and nothing is left at the old."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
from inside_place import inside
from physical_host import Host, Place
from relocation_stage import Died, Stage
from test_relocation import kill_daemon

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Error
from nahtlos.model.ids import OperationId, SnapshotId, VolumeId
from nahtlos.model.storage import SnapshotSpec, VolumeFormat, VolumeSpec
from nahtlos.physical.ports import SnapshotFetch, StorageDesired
from nahtlos.physical.storage.snapshot_arrivals import ARRIVING, SUFFIX

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
OLD, NEW = SnapshotId("old"), SnapshotId("new")
STRIKES = (
    ("offer.made", "agent"),
    ("offer.made", "daemon"),
    ("fetch.layer", "agent"),
    ("fetch.layer", "other daemon"),
    ("fetch.recorded", "agent"),
    ("fetch.recorded", "daemon"),
)


class Journey:
    """Of the snapshots of the stage's volume, from the host it has left to the one it went to."""

    def __init__(self, play: Stage) -> None:
        self.play = play
        self.source, self.target = play.home, play.other
        self.copied: list[int] = []
        self.speed = 0

    @property
    def fetch(self) -> SnapshotFetch:
        at = self.source.settings
        source = VolumeEndpoint(host=at.host, address=at.address, port=at.nbd_port, export="")
        return SnapshotFetch(operation=OperationId("volume-1"), volume=self.play.spec.id, source=source)

    async def once(self) -> None:
        """As the operation of an agent does it."""
        offer = await self.source.storage.offer_snapshots(self.play.spec.id, (OLD, NEW))
        await self.target.storage.fetch_snapshots(
            self.fetch, offer, speed=lambda: self.speed, on_copied=lambda done, _: self.copied.append(done)
        )
        await self.source.storage.end_offer(self.play.spec.id)

    async def until_done(self) -> None:
        async with asyncio.timeout(30):
            while True:
                try:
                    return await self.once()
                except Died:
                    await self.source.restart_drivers()
                    await self.target.restart_drivers()
                except Error:
                    await asyncio.sleep(0.05)

    def strike(self, step: str, who: str) -> list[str]:
        struck: list[str] = []

        def at(here: Host, there: Host) -> Callable[[str], Awaitable[None]]:
            async def on_step(name: str) -> None:
                if name == step and not struck:
                    struck.append(name)
                    if who != "agent":
                        await kill_daemon(there if who == "other daemon" else here)
                    else:
                        raise Died(name)

            return on_step

        self.source.storage.serving.on_step = at(self.source, self.target)
        self.target.storage.serving.on_step = at(self.target, self.source)
        return struck


async def digest(host: Host, snapshot: str) -> str:
    """What it reads as, by another program than the daemon."""
    file = host.settings.run_dir / f"{snapshot}.raw"
    await host.storage.snapshot_file(
        SnapshotId(snapshot), file, VolumeFormat.RAW, on_copied=lambda _done, _all: None
    )
    content = await asyncio.to_thread(file.read_bytes)
    file.unlink()
    return hashlib.sha256(content).hexdigest()


async def digests(host: Host) -> dict[str, str]:
    return {each.id: await digest(host, each.id) for each in await host.storage.snapshots()}


async def taken(play: Stage, name: str, volume: VolumeId | None = None, host: Host | None = None) -> None:
    spec = SnapshotSpec(id=SnapshotId(name), volume=volume or play.spec.id)
    await (host or play.home).storage.snapshot((spec,))


async def written(play: Stage, more: int) -> None:
    until = play.writer.acknowledged + more
    async with asyncio.timeout(30):
        while play.writer.acknowledged < until:
            await asyncio.sleep(0.005)


def files(host: Host) -> list[str]:
    return sorted(path.name for path in (host.settings.state_dir / "volumes").iterdir())


@pytest.fixture
async def play() -> AsyncIterator[Stage]:
    """A raw volume with two snapshots, written all the time. Its agents are in its namespace: they connect to
    each other's daemons themselves."""
    place = Place("snm")
    made = Stage(place, VolumeFormat.RAW)
    try:
        with inside(place):
            await made.begin()
            await written(made, 1500)
            await taken(made, OLD)
            await written(made, 300)
            await taken(made, NEW)
            yield made
            await made.end()
    finally:
        if hasattr(made, "writer"):
            made.writer.ends.set()
        await place.close()
        if hasattr(made, "writer"):
            await asyncio.to_thread(made.writer.join)
            made.writer.disk.close()


async def test_snapshots_follow_their_volume_whoever_is_killed(play: Stage) -> None:
    journey, before = Journey(play), await digests(play.home)
    assert len(set(before.values())) == 2
    source, target = journey.source, journey.target
    await play.relocate()
    assert await digests(source) == before
    await interrupted_and_gone_on_with(journey)
    missed: list[str] = []
    for step, who in STRIKES:
        struck = journey.strike(step, who)
        await journey.until_done()
        missed += [] if struck else [f"{who} at {step}"]
        assert await digests(target) == before == await digests(source), (step, who)
        if (step, who) != STRIKES[-1]:
            await target.storage.forget_fetched(journey.fetch)
            assert await target.storage.snapshots() == ()
            assert not [name for name in files(target) if SUFFIX in name]
    assert not missed, missed
    await let_go(source)
    assert await digests(target) == before
    assert await play.wrong() == [] and not play.writer.errors
    await work_there(play, target, before)


async def interrupted_and_gone_on_with(journey: Journey) -> None:
    """What is here of a layer is not copied again."""
    journey.speed = 8 << 20
    running = asyncio.create_task(journey.once())
    async with asyncio.timeout(20):
        while not journey.copied:
            await asyncio.sleep(0.005)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [name for name in files(journey.target) if name.startswith(ARRIVING)]
    assert await journey.target.storage.snapshots() == ()
    far, journey.speed, journey.copied = max(journey.copied), 0, []
    await journey.until_done()
    assert min(journey.copied) > far
    assert not [name for name in files(journey.target) if name.startswith(ARRIVING)]
    await journey.target.storage.forget_fetched(journey.fetch)


async def let_go(source: Host) -> None:
    """By an agent that is killed in between, and by one that is told of nothing any more."""

    async def on_step(name: str) -> None:
        if name == "left.dropped":
            raise Died(name)

    source.storage.serving.on_step = on_step
    with pytest.raises(Died):
        await source.storage.reconcile(StorageDesired(removed_snapshots=(OLD, NEW)))
    await source.restart_drivers()
    await source.storage.reconcile(StorageDesired())
    assert files(source) == []
    assert (await source.storage.daemon.graph()).nodes == frozenset()
    assert await source.storage.snapshots() == ()


async def work_there(play: Stage, target: Host, before: dict[str, str]) -> None:
    """Cloned, gone back to, deleted."""
    spec = play.spec
    clone = msgspec.structs.replace(spec, id=VolumeId("clone"), epoch=1, snapshot=OLD)
    await settled(target, spec, clone)
    await taken(play, "of-clone", clone.id, target)
    assert await digest(target, "of-clone") == before[OLD]
    await settled(target, spec, without=("of-clone",), removed=(clone.id,))
    await settled(target, spec, without=(OLD,))
    assert await digests(target) == {NEW: before[NEW]}
    play.writer.ends.set()
    await asyncio.to_thread(play.writer.join)
    await play.place.hosts[2].supervisor.stop("client", grace=0)
    await target.storage.revert(spec, NEW)
    await taken(play, "again", host=target)
    assert await digests(target) == {NEW: before[NEW], "again": before[NEW]}
    await settled(target, spec, without=(NEW,))
    await settled(target, spec, without=("again",))
    (record,) = target.storage.serving.records.all().values()
    assert len(record.layers) == 1, "all of it has merged into the base that came"
    await taken(play, "last", host=target)
    assert await digest(target, "last") == before[NEW]


async def settled(
    host: Host, *specs: VolumeSpec, without: tuple[str, ...] = (), removed: tuple[VolumeId, ...] = ()
) -> None:
    gone = tuple(SnapshotId(name) for name in without)
    async with asyncio.timeout(30):
        while True:
            await host.storage.reconcile(
                StorageDesired(volumes=specs, removed_snapshots=gone, removed=removed)
            )
            if not any(host.storage.merging.is_due(v) for v in host.storage.serving.records.all()):
                return


async def test_snapshots_that_follow_stay_where_their_volume_is_received_in_vain(play: Stage) -> None:
    """Before it comes, they are all there is of it; and again after it was called off, or begun anew."""
    journey, before = Journey(play), await digests(play.home)
    target = journey.target
    await journey.until_done()
    assert await digests(target) == before
    for epoch in (2, 3):
        coming = msgspec.structs.replace(play.spec, host=target.settings.host, epoch=epoch)
        await target.storage.receive(coming)
        assert await digests(target) == before
    struck = journey.strike("receive.dropped", "agent")
    gone = StorageDesired(removed=(play.spec.id,))
    with pytest.raises(Died):
        await target.storage.reconcile(gone)
    await target.restart_drivers()
    await target.storage.reconcile(gone)
    assert struck and await target.storage.observe() == ()
    assert await digests(target) == before
    assert [name for name in files(target) if not name.endswith((SUFFIX, ".json"))] == []
