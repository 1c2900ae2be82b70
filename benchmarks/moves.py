"""`make bench-moves`: what a client notices of a move, against the same move by bare QEMU commands.

Both kinds of move carry the same guest image, of the same size, dirtying memory at the same rate, under the
same QEMU release, on this machine, by turns within one run; one prober counts numbered datagrams at 1,000 a
second for both. The gap of a move is the longest silence the client heard around it. The baseline is
described in `benchmarks.bare`; unlike it, nahtlos' moves run over TLS with both sides verified, keep a
journal and are ordered through the operator API.

Moves over a capped link (`benchmarks.convergence`), replacements in place (`benchmarks.in_place`) and
evacuations of hosts (`benchmarks.evacuation`) are parts of it.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from benchmarks import convergence, evacuation, in_place
from benchmarks.bare import GUEST_IP, BareGuest, BareLab
from benchmarks.client_gaps import PACKETS_PER_SECOND, Series, Side, merge, probing, read_series
from benchmarks.figures import Figures, Goal
from nahtlos.lab.datacentre import Datacentre, LabShape, unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.paths import BuildPaths
from nahtlos.model.blueprint import HostPhase
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.nouns import Release, Size
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.evidence.gaps import Window, percentile
from nahtlos.runtime.releases import list_releases

MEMORY_SIZES = (256, 1024)
DIRTY_RATES = (0, 40, 200)
DIRTIED_MIB = {256: 64, 1024: 128}
QUICK_MOVES, LONG_MOVES = 4, 20
UP_SECONDS = 60.0
MOVE_SECONDS = 120.0
AFTER_SECONDS = 0.6
GAP_GOAL = Goal(at_most=1.2, of_ratio=True)


async def measure(side: Side, moves: int, rate: int, mib: int, folder: Path) -> Series:
    await side.outside.set_load(side.ip, memory_mib=mib, memory_mb_per_s=rate)
    await asyncio.sleep(1.0)
    windows: list[Window] = []
    async with probing(side, folder):
        for _ in range(moves):
            began = time.time()
            await side.move()
            await asyncio.sleep(AFTER_SECONDS)
            windows.append(Window(begin=began, end=time.time()))
    status = await side.outside.set_load(side.ip, memory_mb_per_s=0)
    if status.memory.errors:
        raise RuntimeError(f"{side.name}: {status.memory.errors} pages of the guest's memory are wrong")
    return read_series(folder, windows)


class Ours:
    """Two hosts of a lab with one server of each size."""

    def __init__(self, datacentre: Datacentre, client: OperatorClient) -> None:
        self._datacentre = datacentre
        self._client = client
        assert datacentre.topology is not None
        self._namespace = datacentre.topology.node("client").namespace
        self._outside = Outside(self._namespace)

    async def side(self, memory_mib: int) -> Side:
        name = f"vm-{memory_mib}"
        view = await self._client.create_server(ServerRequest(name=name, memory_mib=memory_mib))
        await self._outside.until_up(view.ip, timeout=UP_SECONDS)
        await self._outside.set_load(view.ip, memory_mb_per_s=0)

        async def move() -> None:
            await self._move(ServerId(name))

        return Side("nahtlos", view.ip, self._outside, self._namespace, move)

    async def remove(self, memory_mib: int) -> None:
        """So that the next size is measured beside nobody, as with bare QEMU."""
        await self._client.delete_server(ServerId(f"vm-{memory_mib}"))

    async def _move(self, server: ServerId) -> None:
        here = (await self._client.server(server)).host
        there = HostId("host-1" if here == "host-2" else "host-2")
        await self._client.move_server(server, there)
        async with asyncio.timeout(MOVE_SECONDS):
            while True:
                view = await self._client.server(server)
                if view.host == there and view.moving_to is None:
                    return
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def ours(release: Release) -> AsyncGenerator[Ours]:
    shape = LabShape(
        hosts=2, capacity=Size(vcpus=4, memory_mib=2048), promised=Size(vcpus=2, memory_mib=1280)
    )
    datacentre = Datacentre(unique_name("bench"), shape, BuildPaths.default())
    await datacentre.open()
    try:
        async with datacentre.client as client:
            await client.register_release(release.id)
            async with asyncio.timeout(UP_SECONDS):
                while any(h.phase is not HostPhase.SERVING for h in await client.hosts()):
                    await asyncio.sleep(0.2)
            yield Ours(datacentre, client)
    finally:
        await datacentre.close()


@contextlib.asynccontextmanager
async def bare(release: Release, memory_mib: int, work: Path) -> AsyncGenerator[Side]:
    build = BuildPaths.default()
    lab = BareLab(str(os.getpid()), work / "bare")
    image = next(build.images.glob("guest-*.raw"))
    bundle = build.releases / release.id
    lab.open()
    try:
        guest = BareGuest(lab, image, memory_mib, (bundle, bundle))
        try:
            await guest.boot()
            outside = Outside(lab.namespace("client"))
            await outside.until_up(GUEST_IP, timeout=UP_SECONDS)
            await outside.set_load(GUEST_IP, memory_mb_per_s=0)
            yield Side("bare", GUEST_IP, outside, lab.namespace("client"), guest.move)
        finally:
            await guest.close()
    finally:
        lab.close()


async def run(moves: int, work: Path) -> Figures:
    release = list_releases(BuildPaths.default().releases)[-1]
    figures = Figures()
    every, every_bare = Series(), Series()
    async with ours(release) as lab:
        for memory in MEMORY_SIZES:
            own = await lab.side(memory)
            async with bare(release, memory, work) as other:
                for rate in DIRTY_RATES:
                    got = await by_turns(own, other, moves, rate, DIRTIED_MIB[memory], work)
                    case = f"{memory} MB, dirtying {rate} MB/s"
                    say(case, got)
                    add_case(figures, case, got[own.name], got[other.name])
                    merge(every, got[own.name])
                    merge(every_bare, got[other.name])
            await lab.remove(memory)
    add_totals(figures, every, every_bare)
    return figures


async def by_turns(own: Side, other: Side, moves: int, rate: int, mib: int, work: Path) -> dict[str, Series]:
    """Half of the moves of each, then the other half the other way round: what else the machine does falls
    on both alike."""
    got = {own.name: Series(), other.name: Series()}
    for turn, side in enumerate((other, own, own, other), start=1):
        folder = work / f"{mib}-{rate}-{turn}-{side.name}"
        merge(got[side.name], await measure(side, moves // 2, rate, mib, folder))
    return got


def say(case: str, got: dict[str, Series]) -> None:
    seen = ", ".join(f"{name} {g.p50:.0f} ms, {g.lost} lost" for name, g in sorted(got.items()))
    print(f"{case}: {seen}", flush=True)


def add_case(figures: Figures, case: str, got: Series, baseline: Series) -> None:
    moves = len(got.gaps_ms)
    figures.add(f"gap p50, {case}", got.p50, "ms", baseline=baseline.p50, goal=GAP_GOAL, samples=moves)
    figures.add(
        f"lost per move, {case}",
        got.lost / moves,
        "packets",
        baseline=baseline.lost / len(baseline.gaps_ms),
        goal=Goal(at_most=0),
        samples=moves,
    )


def add_totals(figures: Figures, got: Series, baseline: Series) -> None:
    moves = len(got.gaps_ms)
    figures.add("gap p50, all", got.p50, "ms", baseline=baseline.p50, goal=GAP_GOAL, samples=moves)
    figures.add(
        "gap p99, all",
        percentile(got.gaps_ms, 0.99) or 0.0,
        "ms",
        baseline=percentile(baseline.gaps_ms, 0.99),
        samples=moves,
    )
    figures.add(
        "lost, all", got.lost, "packets", baseline=baseline.lost, goal=Goal(at_most=0), samples=got.sent
    )
    figures.add("duplicated, all", got.duplicated, "packets", goal=Goal(at_most=0), samples=got.sent)
    figures.add("moves counted", moves, "moves", goal=Goal(at_least=20), samples=moves)


async def measure_all(*, long: bool) -> Figures:
    work = Path("build/bench/moves")
    figures = await run(LONG_MOVES if long else QUICK_MOVES, work)
    await convergence.run(convergence.counts_of(long=long), work, figures)
    await in_place.run(in_place.LONG if long else in_place.QUICK, work, figures)
    await evacuation.run(evacuation.LONG_ROUNDS if long else evacuation.QUICK_ROUNDS, work, figures)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.moves")
    parser.add_argument("--long", action="store_true", help=f"{LONG_MOVES} moves of each kind")
    figures = asyncio.run(measure_all(long=parser.parse_args().long))
    return figures.finish("moves", f"Moves seen by a client at {PACKETS_PER_SECOND} packets a second")


if __name__ == "__main__":
    sys.exit(main())
