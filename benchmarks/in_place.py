"""`make bench-in-place`: what a client notices when a server's VMM is replaced on its host; part of
`make bench-moves`.

A server is taken from QEMU 7.2 to 10.0, to 11.1, and back, again and again, for each size of touched memory.
Meanwhile a client counts 1,000 numbered datagrams a second each way, the guest changes its memory and
writes, fsynced, to its volume (NBD); after each replacement it must have found every page it touched and
every block it wrote as it left them. Beside it in the same run: the floor and a tuned local copy
(`benchmarks.in_place_bare`) with a guest of the same size under the same load. Further replacements are not
timed but looked at: how much memory they take (`benchmarks.in_place_memory`).
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.client_gaps import PACKETS_PER_SECOND, Series, Side, merge, probing, read_series
from benchmarks.figures import Figures
from benchmarks.in_place_bare import baselines
from benchmarks.in_place_guest import Guest, memory_of
from benchmarks.in_place_memory import Memory
from benchmarks.in_place_results import Result, add, add_size, add_totals, keep, kept, listed, say
from nahtlos.lab.datacentre import Datacentre, LabShape, unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.paths import RAM, BuildPaths
from nahtlos.model.blueprint import HostPhase
from nahtlos.model.ids import HostId, ReleaseId, ServerId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.model.nouns import Component, Size
from nahtlos.ops.client import OperatorClient
from nahtlos.physical.agent.ledger import Journal
from nahtlos.planner.estimate import ENOUGH_SAMPLES
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.outcomes import REPLACE
from nahtlos.runtime.evidence.gaps import Window
from nahtlos.runtime.releases import list_releases

HOST = HostId("host-1")
FIRST, ROUND = "7.2", ("10.0", "11.1", "10.0", "7.2")
COPIED = ("10.0", "11.1")
"""The local copy is none of 7.2's business: a live copy from it corrupts emulated guests."""
LOOKED_AT = 2
UP_SECONDS, REPLACED_SECONDS = 90.0, 60.0
WARM_SECONDS, AFTER_SECONDS = 1.5, 0.8
MIB = 1 << 20
BUDGET_MS = 60_000
"""Nothing is refused by it; but of servers that have one is predicted by what was measured here."""

PHASES = (
    ("prepare", "switch", "begin to switch"),
    ("switch", "stopped", "switch to stop"),
    ("stopped", "arrived", "stop to arrival"),
    ("arrived", "running", "arrival to go-on"),
    ("running", "answered", "go-on to the guest's first frame"),
)
"""The last but one contains the durable record of who owns the server."""


@dataclass(frozen=True)
class Form:
    """`touched`: MiB of memory the guest fills."""

    touched: tuple[int, ...]
    hops: int
    baselines: bool = True
    looked_at: int = LOOKED_AT


QUICK = Form(touched=(256, 1024), hops=3)
LONG = Form(touched=(256, 1024, 4096, 8192), hops=10)


# --- replacements --------------------------------------------------------------------------------------


class Ours:
    """One host of a lab."""

    def __init__(
        self, datacentre: Datacentre, client: OperatorClient, releases: dict[str, ReleaseId]
    ) -> None:
        assert datacentre.topology is not None
        self._client = client
        self._releases = releases
        self._host = datacentre.paths.node(HOST)
        self._namespace = datacentre.topology.node("client").namespace
        self._outside = Outside(self._namespace)
        self._round = itertools.cycle(ROUND)

    async def measure(self, touched: int, form: Form, folder: Path, result: Result) -> None:
        hops = form.hops
        server, self._round = ServerId(f"vm-{touched}"), itertools.cycle(ROUND)
        view = await self._client.create_server(
            ServerRequest(name=server, memory_mib=memory_of(touched), blackout_budget_ms=BUDGET_MS)
        )
        await self._outside.until_up(view.ip, timeout=UP_SECONDS)
        guest = Guest(self._outside, view.ip, touched)
        await guest.fill()
        side = Side("in-place", view.ip, self._outside, self._namespace, lambda: self._replace(server))
        merge(result.replaced, await series(side, guest, hops, folder, result))
        result.errors = await self._errors(server, result.replaced.gaps_ms)
        for _ in range(form.looked_at):
            await self._look_at(server, result)
            await guest.check()
        journals = [
            j
            for j in read_journals(self._host.state / "ledger.sqlite")
            if j.server == server and j.kind is OperationKind.REPLACE
        ]
        result.phases = {name: values[:hops] for name, values in phases_of(journals).items()}
        result.undone = sum(j.state is OperationState.UNDONE for j in journals)
        await self._remove(server)

    async def _errors(self, server: ServerId, gaps_ms: list[float]) -> list[float]:
        """Of what was predicted of each as it began, from the first that could be learned for on."""
        views = await self._client.volumes.care.operations(subject=server, kind=REPLACE, limit=len(gaps_ms))
        done = sorted((v for v in views if v.record.state == "done"), key=lambda v: v.begun_at)
        if len(done) != len(gaps_ms):
            return []  # one was tried again: whose gap was whose is not known
        said = [view.record.predicted for view in done]
        pairs = list(zip(said, gaps_ms, strict=True))[ENOUGH_SAMPLES:]
        return [abs(one.blackout_ms - gap) / gap for one, gap in pairs if one is not None]

    async def _replace(self, server: ServerId) -> None:
        release = self._releases[next(self._round)]
        await self._client.replace_vmm(server, release)
        async with asyncio.timeout(REPLACED_SECONDS):
            while True:
                view = await self._client.server(server)
                if view.release == release and view.replaced_by is None:
                    return
                await asyncio.sleep(0.1)

    async def _look_at(self, server: ServerId, result: Result) -> None:
        memory = Memory(self._host.supervisor, self._host.ram)
        try:
            before = await memory.now()
            async with memory.watched():
                await self._replace(server)
        finally:
            memory.close()
        if not memory.beside:
            raise RuntimeError("the two VMMs were not seen beside each other")
        result.overhead_mib.append((memory.peak - before) / MIB)
        result.samples += memory.samples

    async def _remove(self, server: ServerId) -> None:
        """Until its memory is free again."""
        await self._client.delete_server(server)
        async with asyncio.timeout(UP_SECONDS):
            while any(self._host.ram.iterdir()):
                await asyncio.sleep(0.1)


async def series(side: Side, guest: Guest, count: int, folder: Path, result: Result | None) -> Series:
    """`count` times what the side does, each within its window; checked afterwards if there is a result."""
    windows: list[Window] = []
    async with probing(side, folder):
        for _ in range(count):
            await asyncio.sleep(WARM_SECONDS)
            began = time.time()
            await side.move()
            await asyncio.sleep(AFTER_SECONDS)
            windows.append(Window(begin=began, end=time.time()))
            pages, blocks = await guest.check()
            if result is not None:
                result.pages += pages
                result.blocks += blocks
    return read_series(folder, windows)


def read_journals(ledger: Path) -> list[Journal]:
    """What the agent has written down of its operations, oldest first."""
    with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
        rows: list[tuple[bytes]] = db.execute("select body from operations order by number").fetchall()
    return [msgspec.msgpack.decode(body, type=Journal) for (body,) in rows]


def phases_of(replacements: list[Journal]) -> dict[str, list[float]]:
    """Milliseconds of each phase of those that ended well."""
    times = [j.times for j in replacements if j.state is OperationState.DONE]
    return {
        name: [(t[end] - t[begin]) * 1e3 for t in times if begin in t and end in t]
        for begin, end, name in PHASES
    }


@contextlib.asynccontextmanager
async def ours(largest: int, releases: dict[str, ReleaseId]) -> AsyncGenerator[Ours]:
    size = Size(vcpus=1, memory_mib=memory_of(largest))
    shape = LabShape(hosts=1, capacity=size, promised=size)
    datacentre = Datacentre(unique_name("inpl"), shape, BuildPaths.default())
    await datacentre.open()
    try:
        async with datacentre.client as client:
            for release in releases.values():
                await client.register_release(release)
            async with asyncio.timeout(UP_SECONDS):
                while any(h.phase is not HostPhase.SERVING for h in await client.hosts()):
                    await asyncio.sleep(0.2)
            yield Ours(datacentre, client, releases)
    finally:
        await datacentre.close()


# --- the whole run -------------------------------------------------------------------------------------


def releases_by_track(build: BuildPaths) -> dict[str, ReleaseId]:
    """The newest of each track, the first the one that servers are started under."""
    found: dict[str, ReleaseId] = {}
    known = [r for r in list_releases(build.releases) if r.component is Component.HYPERVISOR]
    for track in dict.fromkeys((FIRST, *ROUND)):
        built = [r.id for r in known if f"{r.version}.".startswith(f"{track}.")]
        if not built:
            raise RuntimeError(f"no release of QEMU {track} is built: make releases")
        found[track] = built[-1]
    return found


def check_room(largest: int) -> None:
    """Says what /dev/shm has; RuntimeError if the largest server or its local copy would not fit."""
    disk, needed = shutil.disk_usage(RAM), memory_of(largest)
    free, total = disk.free // MIB, disk.total // MIB
    print(f"{RAM}: {total} MiB, {free} free; the largest server needs {needed}, nothing was changed")
    if free < needed:
        raise RuntimeError(f"mount -o remount,size={total + needed - free}m {RAM}")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available = int(found[1]) // 1024 if found else 0
    if available < 2 * needed:
        raise RuntimeError(f"a local copy of {needed} MiB needs twice that; {available} MiB are available")


async def run(form: Form, work: Path, figures: Figures, *, going_on: bool = False) -> None:
    """`going_on`: what earlier runs have kept counts as well."""
    check_room(max(form.touched))
    build = BuildPaths.default()
    releases = releases_by_track(build)
    results: dict[int, Result] = {}
    async with ours(max(form.touched), releases) as lab:
        for touched in form.touched:
            result = results[touched] = Result()
            await lab.measure(touched, form, work / f"in-place-{touched}", result)
            print(f"{touched} MB: {listed(result.replaced.gaps_ms)} ms in place", flush=True)
            if form.baselines:
                await measure_bare(build, releases, touched, form.hops, work, result)
            say(touched, result)
            known = kept().get(touched) if going_on else None
            if known is not None:
                add(known, result)
            keep(touched, known or result)
    results = kept() if going_on else results
    for touched, result in results.items():
        add_size(figures, touched, result)
    add_totals(figures, results)


async def measure_bare(
    build: BuildPaths, releases: dict[str, ReleaseId], touched: int, count: int, work: Path, result: Result
) -> None:
    """After ours of this size has gone: both at once would not fit."""
    old, new = (build.releases / releases[track] for track in COPIED)
    image = next(build.images.glob("guest-*.raw"))
    name = f"{os.getpid()}-{touched}"
    async with baselines(name, (old, new), image, memory_of(touched), work / "bare") as (floor, copy):
        guest = Guest(floor.outside, floor.ip, touched)
        await guest.fill()
        merge(result.floor, await series(floor, guest, count, work / f"floor-{touched}", None))
        merge(result.copied, await series(copy, guest, count, work / f"copy-{touched}", None))


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.in_place")
    parser.add_argument("--long", action="store_true", help=f"up to {max(LONG.touched)} MB, {LONG.hops} each")
    parser.add_argument("--touched", type=int, nargs="+", help="MiB, instead of the form's sizes")
    parser.add_argument("--hops", type=int, help="of each size")
    parser.add_argument("--add", action="store_true", help="to what earlier runs have found out")
    parser.add_argument("--alone", action="store_true", help="without the floor and the local copy")
    parser.add_argument("--looked-at", type=int, default=LOOKED_AT, help="replacements whose memory is seen")
    arguments = parser.parse_args()
    form = LONG if arguments.long else QUICK
    form = Form(
        touched=tuple(arguments.touched or form.touched),
        hops=arguments.hops or form.hops,
        baselines=not arguments.alone,
        looked_at=arguments.looked_at,
    )
    figures = Figures()
    asyncio.run(run(form, Path("build/bench/moves"), figures, going_on=arguments.add))
    return figures.finish("in_place", f"Replacements in place at {PACKETS_PER_SECOND} packets a second")


if __name__ == "__main__":
    sys.exit(main())
