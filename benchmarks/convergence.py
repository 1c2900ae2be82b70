"""`make bench-convergence`: live moves of servers that dirty their memory at 0, 40, 200 and 400 MB/s, over a
link capped at 128 MiB/s. A part of `make bench-moves`, too.

Two hosts of a lab; the switch between them sends to each at most as fast as the cap, and the cloud is told so
(`network underlay set`): a move has a share reserved, and takes all of the link if it would not end by that.
Every server has a blackout budget. A move either ends within it, or is refused beforehand, by the rate that
was measured and the prediction made of it; what was refused is then permitted to be slowed down, and moved
all the same. Of some servers the memory may follow them from the start. The first moves of each way teach the
model; of all later ones what was predicted as they began is held against what was measured: the pause
between the stop and the run, and the time from the order to the end.

Moves get little of this link, so their memory is compressed; the guest's own is easy to (`--compress never`
sends it as it is).

`--undivided` leaves the hosts' interfaces alone: the cap then drops what comes when its queue is full,
whoever sent it, which a control without moves shows (`--control`).
"""

import argparse
import asyncio
import contextlib
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from benchmarks.capped_link import cap_links, dropped, fill
from benchmarks.client_gaps import Series, Side, merge, probing, read_series
from benchmarks.figures import Figures, Goal
from nahtlos.lab.datacentre import Datacentre, LabShape, unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.paths import BuildPaths
from nahtlos.model.blackout import wake_ms
from nahtlos.model.blueprint import HostPhase, OperationRecord
from nahtlos.model.config import UnderlayShares
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.nouns import Size
from nahtlos.model.prediction import Means
from nahtlos.model.topology import MoveCompression, Underlay
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import ServerChange, ServerRequest
from nahtlos.runtime.evidence.gaps import Window, percentile
from nahtlos.runtime.releases import list_releases

CAP = 128 << 20
"""Bytes a second."""
CASES = ("0", "40", "200", "400", "200-post-copy", "400-post-copy")
"""MB a second, and what is permitted from the start. What is refused beforehand is then slowed down."""
POST_COPY = "post-copy"
SHARES = UnderlayShares(bits_per_second=int(CAP * 8 * 0.97), control=10, moves=60, tenants=30)
"""Of what the cap lets through, so that queues are at the hosts, where they are divided."""
DIVIDED = Underlay(shares=SHARES)
CONTROL_SECONDS = 10.0
MEMORY_MIB, DIRTIED_MIB = 256, 64
BUDGET_MS = 350
QUICK_MOVES, LONG_MOVES = (5, 5, 4, 4, 4, 4), (20, 20, 10, 10, 10, 10)
TEACHING = 3
"""The first moves of each way."""
ERROR_GOAL = Goal(at_most=0.3)
UP_SECONDS = 180.0
MOVE_SECONDS = 180.0
MEASURED_SECONDS = 120.0
AFTER_SECONDS = 0.6
REFUSED = "is left where it is"


class Outcome(msgspec.Struct, kw_only=True):
    """What became of the moves of one server."""

    ended: int = 0
    refused: int = 0
    failed: int = 0
    seconds: list[float] = []
    series: Series


class Site:
    """The lab, and one server for each rate."""

    def __init__(self, datacentre: Datacentre, client: OperatorClient) -> None:
        assert datacentre.topology is not None
        self._datacentre = datacentre
        self._client = client
        self._database = datacentre.paths.node("ctl").state / "runtime.sqlite"
        self._namespace = datacentre.topology.node("client").namespace
        self._outside = Outside(self._namespace)

    async def control(self, folder: Path) -> Series:
        """The link is filled by a stream of nobody's, and nothing moves."""
        server = ServerId("vm-control")
        view = await self._client.create_server(
            ServerRequest(name=server, memory_mib=MEMORY_MIB, host=HostId("host-2"))
        )
        await self._outside.until_up(view.ip, timeout=UP_SECONDS)
        side = Side(server, view.ip, self._outside, self._namespace, _nothing)
        began = time.time()
        async with probing(side, folder):
            await fill(self._datacentre, CONTROL_SECONDS)
            await asyncio.sleep(AFTER_SECONDS)
        await self._client.delete_server(server)
        return read_series(folder, [Window(begin=began, end=time.time())])

    def dropped(self) -> dict[str, int]:
        return dropped(self._datacentre)

    async def run(self, case: str, moves: int, folder: Path) -> Outcome:
        rate, consent = int(case.partition("-")[0]), case.partition("-")[2]
        server, outcome = ServerId(f"vm-{case}"), Outcome(series=Series())
        request = ServerRequest(
            name=server,
            memory_mib=MEMORY_MIB,
            blackout_budget_ms=BUDGET_MS,
            allow_post_copy=consent == POST_COPY,
        )
        view = await self._client.create_server(request)
        await self._outside.until_up(view.ip, timeout=UP_SECONDS)
        await self._outside.set_load(view.ip, memory_mib=DIRTIED_MIB, memory_mb_per_s=rate)
        await self._until_measured(server, rate)
        windows: list[Window] = []
        side = Side(server, view.ip, self._outside, self._namespace, _nothing)
        async with probing(side, folder):
            while outcome.ended + outcome.failed < moves:
                began = time.time()
                await self._move(server, outcome)
                await asyncio.sleep(AFTER_SECONDS)
                windows.append(Window(begin=began, end=time.time()))
        status = await self._outside.set_load(view.ip, memory_mb_per_s=0)
        if status.memory.errors:
            raise RuntimeError(f"{server}: {status.memory.errors} pages of its memory are wrong")
        merge(outcome.series, read_series(folder, windows))
        await self._client.delete_server(server)
        return outcome

    async def _until_measured(self, server: ServerId, rate: int) -> None:
        """The agent looks at it now and then; what it wrote while it booted does not count."""
        async with asyncio.timeout(MEASURED_SECONDS):
            while True:
                seen = (await self._client.server(server)).dirty_rate
                low, high = rate / 3 * 1e6, max(rate * 2.0, 20.0) * 1e6
                if seen is not None and low <= seen <= high:
                    return
                await asyncio.sleep(0.5)

    async def _move(self, server: ServerId, outcome: Outcome) -> None:
        """To its end. One that is refused beforehand may be slowed down from then on."""
        before = self._records()
        here = (await self._client.server(server)).host
        there = HostId("host-1" if here == "host-2" else "host-2")
        await self._client.move_server(server, there)
        async with asyncio.timeout(MOVE_SECONDS):
            while True:
                view = await self._client.server(server)
                if view.host == there and view.moving_to is None:
                    break
                if REFUSED in view.waits_for and not view.allow_slowdown:
                    outcome.refused += 1
                    print(f"  refused beforehand: {view.waits_for}", flush=True)
                    await self._client.change_server(server, ServerChange(allow_slowdown=True))
                await asyncio.sleep(0.1)
        outcome.ended += 1
        made = [r for r in self._records().values() if r.id not in before and r.subject == server]
        outcome.failed += sum(record.state != "done" for record in made)
        outcome.seconds += [seconds_of(record) for record in made if record.state == "done"]
        for record in made:
            print(f"  {told(record)}", flush=True)

    def _records(self) -> dict[str, OperationRecord]:
        """Of moves that have ended, oldest first."""
        with contextlib.closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "select id, document from operations where kind = 'move' and ended_at is not null "
                "order by ended_at"
            ).fetchall()
        return {name: msgspec.json.decode(text, type=OperationRecord) for name, text in rows}

    def done(self) -> list[OperationRecord]:
        return [record for record in self._records().values() if record.state == "done"]


async def _nothing() -> None:
    """Its caller moves it."""


# --- predicted against measured --------------------------------------------------------------------------


def seconds_of(record: OperationRecord) -> float:
    return max(record.times.values()) - min(record.times.values())


def told(record: OperationRecord) -> str:
    if record.state != "done":
        return f"{record.state}: {record.error.message if record.error else ''}"
    said, times = record.predicted, record.times
    if "stopped" not in times or "running" not in times:
        return f"{means_of(record)}: {seconds_of(record):.1f} s, not seen from both sides"
    pause = (times["running"] - times["stopped"]) * 1000
    foretold = f" (predicted {said.pause_ms:.0f} ms, {said.seconds:.1f} s)" if said else ""
    return f"{means_of(record)}: pause {pause:.0f} ms, {seconds_of(record):.1f} s{foretold}"


def means_of(record: OperationRecord) -> Means:
    assert record.predicted is not None
    return Means(record.result.get("means", record.predicted.means))


def errors(records: list[OperationRecord]) -> tuple[list[float], list[float]]:
    """Of the blackout (the pause, and what a cold process takes, which is the same on both sides) and of the
    total, as shares of what was measured: of moves begun after as many of their way as teach the model."""
    seen: dict[Means, int] = {}
    blackouts: list[float] = []
    totals: list[float] = []
    for record in records:
        said = record.predicted
        if said is None or "stopped" not in record.times or "running" not in record.times:
            continue
        taught = seen.get(said.means, 0) >= TEACHING
        seen[means_of(record)] = seen.get(means_of(record), 0) + 1
        if taught:
            measured = (record.times["running"] - record.times["stopped"]) * 1000 + wake_ms("tcg")
            blackouts.append(abs(said.pause_ms + wake_ms("tcg") - measured) / measured)
            totals.append(abs(said.seconds - seconds_of(record)) / seconds_of(record))
    return blackouts, totals


# --- the run -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def site(underlay: Underlay) -> AsyncGenerator[Site]:
    release = list_releases(BuildPaths.default().releases)[-1]
    shape = LabShape(hosts=2, capacity=Size(vcpus=4, memory_mib=1024), promised=Size(vcpus=1, memory_mib=256))
    datacentre = Datacentre(unique_name("bench"), shape, BuildPaths.default())
    await datacentre.open()
    try:
        cap_links(datacentre, CAP)
        async with datacentre.client as client:
            await client.register_release(release.id)
            async with asyncio.timeout(UP_SECONDS):
                while any(h.phase is not HostPhase.SERVING for h in await client.hosts()):
                    await asyncio.sleep(0.2)
            await client.networks.set_underlay(underlay)
            yield Site(datacentre, client)
    finally:
        await datacentre.close()


async def run(
    counts: dict[str, int],
    work: Path,
    figures: Figures,
    *,
    underlay: Underlay = DIVIDED,
    control: bool = False,
) -> None:
    every = Series()
    async with site(underlay) as lab:
        if control:
            before, series = lab.dropped(), await lab.control(work / "capped-control")
            figures.add("lost, link filled, no move", series.lost, "packets", samples=series.sent)
            add_drops(figures, "link filled, no move", before, lab.dropped())
        before = lab.dropped()
        for case, moves in counts.items():
            outcome = await lab.run(case, moves, work / f"capped-{case}")
            add_case(figures, case, outcome)
            merge(every, outcome.series)
        add_drops(figures, "moves", before, lab.dropped())
        blackouts, totals = errors(lab.done())
    lost = Goal(at_most=0)
    figures.add("lost, capped link, all", every.lost, "packets", goal=lost, samples=every.sent)
    for name, found in (("blackout", blackouts), ("total", totals)):
        p90 = percentile(found, 0.9)
        if p90 is not None:
            figures.add(
                f"prediction of the {name} off by, p90, capped link",
                p90,
                "of measured",
                goal=ERROR_GOAL,
                samples=len(found),
            )


def add_drops(figures: Figures, what: str, before: dict[str, int], after: dict[str, int]) -> None:
    """Of all packets, the stream's own too."""
    for hop, count in after.items():
        figures.add(f"dropped, {what}, {hop}", max(0, count - before.get(hop, 0)), "packets")


def add_case(figures: Figures, name: str, outcome: Outcome) -> None:
    rate, _, consent = name.partition("-")
    case, series = f"dirtying {rate} MB/s over {CAP >> 20} MiB/s", outcome.series
    case += f", {consent}" if consent else ""
    print(
        f"{case}: {series.p50:.0f} ms, {series.lost} lost, {outcome.refused} refused beforehand", flush=True
    )
    within = sum(gap <= BUDGET_MS for gap in series.gaps_ms)
    asked = len(series.gaps_ms) + outcome.failed
    figures.add(
        f"ended within {BUDGET_MS} ms, {case}",
        within / asked,
        "of those begun",
        goal=Goal(at_least=1.0),
        samples=asked,
    )
    figures.add(f"refused beforehand, {case}", outcome.refused, "moves", samples=asked)
    figures.add(f"gap p50, {case}", series.p50, "ms", samples=len(series.gaps_ms))
    figures.add(f"gap worst, {case}", max(series.gaps_ms), "ms", goal=Goal(at_most=BUDGET_MS), samples=asked)
    figures.add(f"total p50, {case}", percentile(outcome.seconds, 0.5) or 0.0, "s", samples=asked)
    figures.add(f"lost per move, {case}", series.lost / asked, "packets", goal=Goal(at_most=0), samples=asked)


def counts_of(*, long: bool) -> dict[str, int]:
    """Moves of each case."""
    return dict(zip(CASES, LONG_MOVES if long else QUICK_MOVES, strict=True))


async def measure_all(
    *, long: bool, only: list[str] | None = None, underlay: Underlay = DIVIDED, control: bool = False
) -> Figures:
    figures = Figures()
    counts = counts_of(long=long)
    if only:
        counts = {case: count for case, count in counts.items() if case in only}
    work = Path("build/bench/convergence")
    await run(counts, work, figures, underlay=underlay, control=control)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.convergence")
    parser.add_argument("--long", action="store_true", help=f"{LONG_MOVES[0]} moves of each kind")
    parser.add_argument("--only", nargs="*", choices=CASES, help="these cases alone")
    parser.add_argument("--undivided", action="store_true", help="leave the hosts' interfaces alone")
    parser.add_argument("--control", action="store_true", help="first fill the link without any move")
    parser.add_argument("--channels", type=int, default=1, help="connections that memory is sent by")
    compressions = [each.value for each in MoveCompression]
    parser.add_argument("--compress", choices=compressions, default="auto", help="memory as it is sent")
    asked = parser.parse_args()
    underlay = Underlay(
        shares=None if asked.undivided else SHARES,
        move_channels=asked.channels,
        move_compression=MoveCompression(asked.compress),
    )
    measured = measure_all(long=asked.long, only=asked.only, underlay=underlay, control=asked.control)
    figures = asyncio.run(measured)
    return figures.finish("convergence", f"Live moves over a link capped at {CAP >> 20} MiB/s")


if __name__ == "__main__":
    sys.exit(main())
