"""The longest a writer waits while something is done to its disk: how long the one request took that took the
longest, from its sending to its answer.

The writer checks itself (see `storage_load.c`): every event must leave 0 errors, 0 lost and 0 wrong blocks.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from benchmarks.figures import Figures, Goal
from benchmarks.storage_copies import EPOCH_WRITE, Copies
from benchmarks.storage_relocation import at, relocated
from benchmarks.storage_site import Disk, Host, Load, Offered, Site, remote
from nahtlos.model.ids import SnapshotId
from nahtlos.model.storage import SnapshotSpec, VolumeFormat, VolumeSpec
from nahtlos.physical.storage.definition import UNIT

SIZE_MIB = 64
COPIES_MIB = 256
"""A writer at random changes something everywhere in a smaller one at once: nothing is left to be spared."""
VERSIONS = ("10.0", "11.1")
AROUND = 0.4
"""Seconds of writing before and after an event."""
QUICK, LONG = 4, 20
DEPTH = 4
NONE = Goal(at_most=0)
PART = Goal(at_most=0.95, of_ratio=True)


class Writing:
    """What a writer saw of every event of one kind."""

    def __init__(self) -> None:
        self.loads: list[Load] = []
        self.quiet: list[float] = []
        """The longest it waited where nothing was done, in ms."""

    async def around(self, disk: Offered, event: Callable[[], Awaitable[None]]) -> None:
        await self._run(disk, None)
        await self._run(disk, event)

    async def _run(self, disk: Offered, event: Callable[[], Awaitable[None]] | None) -> None:
        running = disk.writer(depth=DEPTH)
        try:
            await asyncio.sleep(AROUND)
            if event is not None:
                await event()
            await asyncio.sleep(AROUND)
            load = await running.stop()
        finally:
            running.abandon()
        if event is None:
            self.quiet.append(load.longest * 1000)
        else:
            self.loads.append(load)

    def report(
        self,
        figures: Figures,
        what: str,
        *,
        p50: float | None = None,
        most: float | None = None,
        less: float = 0.0,
    ) -> None:
        """`less`: ms that are not to be counted."""
        waits = [load.longest * 1000 - less for load in self.loads]
        count = len(waits)
        quiet = statistics.median(self.quiet)
        goal = Goal(at_most=p50) if p50 is not None else None
        median, longest = statistics.median(waits), max(waits)
        figures.add(f"longest wait, {what}, p50", median, "ms", baseline=quiet, goal=goal, samples=count)
        goal = Goal(at_most=most) if most is not None else None
        figures.add(f"longest wait, {what}, all", longest, "ms", goal=goal, samples=count)
        bad = sum(load.errors + load.lost + load.wrong for load in self.loads)
        written = sum(load.operations for load in self.loads)
        figures.add(f"lost, wrong or failed, {what}", bad, "writes", goal=NONE, samples=written)


async def measure(figures: Figures, *, long: bool) -> None:
    rounds = LONG if long else QUICK
    async with Site(2) as site:
        for subject in (_kills, _upgrades, _parts):
            await subject(figures, site.hosts[0], rounds)
        for form in (VolumeFormat.RAW, VolumeFormat.QCOW2):
            await _snapshots(figures, site.hosts[0], rounds, form)
            await _resizes(figures, site.hosts[0], rounds, form)
        await _relocations(figures, site, rounds)
        await _called_off(figures, site, rounds)
        await _copies(figures, site, rounds)


@contextlib.asynccontextmanager
async def served(
    host: Host, name: str, form: VolumeFormat = VolumeFormat.RAW
) -> AsyncGenerator[tuple[VolumeSpec, Disk]]:
    volume = msgspec.structs.replace(host.volume(name, size_mib=SIZE_MIB), format=form)
    await host.have(volume)
    async with Disk(host, name, (remote(host.endpoint(volume)),)) as disk:
        yield volume, disk
    await host.forget(volume)


async def _kills(figures: Figures, host: Host, rounds: int) -> None:
    writing = Writing()
    async with served(host, "killed") as (_, disk):
        for _ in range(rounds):
            await writing.around(disk, lambda: host.kill(UNIT))
    writing.report(figures, "storage daemon killed", most=100)


async def _snapshots(figures: Figures, host: Host, rounds: int, form: VolumeFormat) -> None:
    """The first of them and those over others."""
    writing = Writing()
    async with served(host, "taken", form) as (volume, disk):
        for number in range(rounds):
            taken = SnapshotSpec(id=SnapshotId(f"taken-{number}"), volume=volume.id)
            await writing.around(disk, lambda taken=taken: host.storage.snapshot((taken,)))
    writing.report(figures, f"snapshot{_of(form)}", most=20)


def _of(form: VolumeFormat) -> str:
    return "" if form is VolumeFormat.RAW else f" of a {form} volume"


async def _parts(figures: Figures, host: Host, rounds: int) -> None:
    """What a host does of a group over several, for which servers stand still: prepared, beside all of it."""
    took: dict[bool, list[float]] = {True: [], False: []}
    async with served(host, "part") as (volume, disk):
        await disk.load("randwrite", seconds=AROUND, depth=DEPTH)
        for number in range(2 * rounds):
            prepared = bool(number % 2)
            taken = (SnapshotSpec(id=SnapshotId(f"part-{number}"), volume=volume.id),)
            if prepared:
                await host.storage.snapshot_prepare(taken)
            began = time.monotonic()
            await host.storage.snapshot(taken)
            took[prepared].append((time.monotonic() - began) * 1000)
    median, before = statistics.median(took[True]), statistics.median(took[False])
    figures.add("a host's part of a group, prepared, p50", median, "ms", baseline=before, samples=rounds)


async def _upgrades(figures: Figures, host: Host, rounds: int) -> None:
    """From one release to the other and back."""
    writing = Writing()
    async with served(host, "kept") as (volume, disk):
        for version in (VERSIONS * rounds)[: rounds + 1]:
            release = host.site.bundle(version).release
            await writing.around(disk, lambda release=release: host.have(volume, release=release))
    writing.report(figures, "storage daemon of another release", most=250)


async def _resizes(figures: Figures, host: Host, rounds: int, form: VolumeFormat) -> None:
    writing = Writing()
    async with served(host, "grows", form) as (volume, disk):
        for more in range(1, rounds + 1):
            larger = msgspec.structs.replace(volume, size_mib=volume.size_mib + 4 * more)
            await writing.around(disk, lambda larger=larger: host.have(larger))
    writing.report(figures, f"enlarged{_of(form)}", most=100)


async def _copies(figures: Figures, site: Site, rounds: int) -> None:
    """Two copies: the daemon of one is killed; then all of its host, which comes back later."""
    killed, lost, back = Writing(), Writing(), Writing()
    copied: list[int] = []
    away = site.hosts[1]
    name = away.settings.host
    async with Copies(site.hosts, "copied", size_mib=COPIES_MIB) as copies:
        for _ in range(rounds):
            await killed.around(copies, lambda: away.kill(UNIT))
            await copies.in_step()

            async def loses() -> None:
                await away.lose_power()
                await copies.recorded(name)

            await lost.around(copies, loses)
            await away.come_back()

            async def rejoins() -> None:
                copied.append(await copies.rejoin(name))

            await back.around(copies, rejoins)
        differ = len(await copies.differ())
    killed.report(figures, "storage daemon of a copy killed")
    what = f"a copy lost, without the {EPOCH_WRITE * 1000:.0f} ms of its record"
    lost.report(figures, what, p50=100, less=EPOCH_WRITE * 1000)
    back.report(figures, "a copy comes back")
    whole = COPIES_MIB * rounds
    mib = sum(copied) / (1 << 20)
    figures.add("copied of a copy that came back", mib, "MiB", baseline=whole, goal=PART, samples=rounds)
    figures.add("copies that differ after all that", differ, "copies", goal=NONE, samples=rounds)


async def _relocations(figures: Figures, site: Site, rounds: int) -> None:
    writing, hosts = Writing(), list(site.hosts)
    volume = hosts[0].volume("moving", size_mib=SIZE_MIB)
    await hosts[0].have(volume)
    async with Disk(hosts[0], "moving", (remote(hosts[0].endpoint(volume)),)) as disk:
        for _ in range(rounds):
            moved: list[VolumeSpec] = []

            async def move(moved: list[VolumeSpec] = moved, volume: VolumeSpec = volume) -> None:
                moved.append(await relocated(hosts[0], hosts[1], volume, disk))

            await writing.around(disk, move)
            volume = moved[0]
            hosts.reverse()
    await hosts[0].forget(volume)
    writing.report(figures, "relocation", p50=50, most=250)


async def _called_off(figures: Figures, site: Site, rounds: int) -> None:
    """In the middle of the copying."""
    writing, (home, other) = Writing(), site.hosts
    volume = home.volume("stays", size_mib=SIZE_MIB)
    there = at(volume, other)
    await home.have(volume)
    pid = await home.pid(UNIT)

    async def begin_and_cancel() -> None:
        await other.storage.receive(there)
        await home.storage.relocate_start(volume, other.endpoint(there), bytes_per_second=1 << 20)
        await asyncio.sleep(AROUND / 2)
        await home.storage.relocate_cancel(volume.id)

    async with Disk(home, "stays", (remote(home.endpoint(volume)),)) as disk:
        for _ in range(rounds):
            await writing.around(disk, begin_and_cancel)
    writing.report(figures, "relocation called off")
    ended = int(await home.pid(UNIT) != pid)
    figures.add(
        "storage daemons that ended as one was called off", ended, "daemons", goal=NONE, samples=rounds
    )
    await other.forget(there)
    await home.forget(volume)
