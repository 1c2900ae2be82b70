"""`make bench-evacuation`: what clients notice when a host's eight servers leave it, one after another and in
parallel; part of `make bench-moves`.

The same eight guests, in one lab of two hosts, are sent from one host to the other and back, by turns with
one move at a time and with eight (`parallel_moves`): what else the machine does falls on both alike. Every
evacuation is ordered in one go through the operator API, so that waiting for an order is no part of it. A
client counts numbered datagrams of every server; the gap of a move is the longest silence around the moment
its path was switched. After each evacuation every guest must answer, with the boot it began with and its
memory as it wrote it.
"""

import argparse
import asyncio
import contextlib
import itertools
import re
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.client_gaps import Series, prober, read_gaps
from benchmarks.figures import Figures, Goal
from benchmarks.in_place import read_journals
from nahtlos.lab.datacentre import Datacentre, LabShape, unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.paths import BuildPaths
from nahtlos.model.blueprint import HostPhase
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.model.nouns import Size
from nahtlos.ops.client import OperatorClient
from nahtlos.physical.agent.ledger import Journal, Role
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.evidence.gaps import Window, percentile
from nahtlos.runtime.store.intent import PARALLEL_MOVES

SERVERS, MEMORY_MIB = 8, 256
TOUCHED_MIB, DIRTY_MB_PER_S = 48, 4
PACKETS_PER_SECOND = 250
"""Of each server: a gap is no more exact than 4 ms."""
HOSTS = (HostId("host-1"), HostId("host-2"))
UP_SECONDS, EVACUATED_SECONDS, AFTER_SECONDS = 180.0, 240.0, 1.5
BEFORE_SWITCH_SECONDS, AFTER_RUN_SECONDS = 0.5, 1.0
BESIDE_MIB = 2048
QUICK_ROUNDS, LONG_ROUNDS = 1, 4
TURNS = ("one", "all", "all", "one")

GAP_GOAL = Goal(at_most=1.3, of_ratio=True)
TIME_GOAL = Goal(at_most=0.6, of_ratio=True)
NONE = Goal(at_most=0)


@dataclass
class Evacuations:
    """All of one kind."""

    seen: Series = field(default_factory=Series)
    seconds: list[float] = field(default_factory=list[float])
    undone: int = 0

    @property
    def p99(self) -> float:
        return percentile(self.seen.gaps_ms, 0.99) or 0.0

    @property
    def mean_seconds(self) -> float:
        return sum(self.seconds) / len(self.seconds)


class Ours:
    """Two hosts of a lab, all servers on the first."""

    def __init__(self, datacentre: Datacentre, client: OperatorClient) -> None:
        assert datacentre.topology is not None
        self._client = client
        self._paths = datacentre.paths
        self._namespace = datacentre.topology.node("client").namespace
        self._outside = Outside(self._namespace)
        self._ips: dict[ServerId, str] = {}
        self._boots: dict[ServerId, str] = {}

    async def fill(self, servers: int) -> None:
        """One after another: emulated guests that boot beside each other take minutes on few cores."""
        for number in range(1, 1 + servers):
            server = ServerId(f"vm-{number}")
            view = await self._client.create_server(
                ServerRequest(name=server, memory_mib=MEMORY_MIB, host=HOSTS[0])
            )
            took = await self._outside.until_up(view.ip, timeout=UP_SECONDS)
            print(f"{server} is up after {took:.1f} s", flush=True)
            status = await self._outside.set_load(view.ip, memory_mb_per_s=0, disk_per_s=0)
            self._ips[server], self._boots[server] = view.ip, status.boot_id
        for ip in self._ips.values():
            await self._outside.set_load(ip, memory_mib=TOUCHED_MIB, memory_mb_per_s=DIRTY_MB_PER_S)

    async def evacuate(self, at_once: int, to: HostId, folder: Path, result: Evacuations) -> None:
        self._permit(at_once)
        known = {journal.id for journal in self._journals()}
        async with prober(self._ips, self._namespace, folder, PACKETS_PER_SECOND):
            began = time.monotonic()
            for server in self._ips:
                await self._client.move_server(server, to)
            await self._until_all_on(to)
            result.seconds.append(time.monotonic() - began)
            await asyncio.sleep(AFTER_SECONDS)
        journals = [journal for journal in self._journals() if journal.id not in known]
        result.undone += sum(journal.state is OperationState.UNDONE for journal in journals)
        windows = {str(server): window_of(server, journals) for server in self._ips}
        add_seen(result.seen, read_gaps(folder, windows))
        await self._check()

    def _permit(self, at_once: int) -> None:
        """The orchestrator reads it anew with every decision."""
        database = sqlite3.connect(self._paths.node("ctl").state / "runtime.sqlite", timeout=10.0)
        with contextlib.closing(database), database:
            database.execute(
                "UPDATE settings SET document = ? WHERE name = ?", (str(at_once), PARALLEL_MOVES)
            )

    def _journals(self) -> list[Journal]:
        """Of moves, as their sources and destinations tell of them."""
        found = [j for host in HOSTS for j in read_journals(self._paths.node(host).state / "ledger.sqlite")]
        return [journal for journal in found if journal.kind is OperationKind.MOVE]

    async def _until_all_on(self, host: HostId) -> None:
        try:
            async with asyncio.timeout(EVACUATED_SECONDS):
                while True:
                    views = {view.id: view for view in await self._client.servers()}
                    if all(views[s].host == host and views[s].moving_to is None for s in self._ips):
                        return
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            waits = "; ".join(f"{v.id}: {v.waits_for}" for v in views.values() if v.waits_for)
            raise Unavailable(f"not evacuated within {EVACUATED_SECONDS:g} s: {waits}") from error

    async def _check(self) -> None:
        for server, ip in self._ips.items():
            status = await self._outside.status(ip)
            if status.memory.errors or status.boot_id != self._boots[server]:
                raise RuntimeError(
                    f"{server}: {status.memory.errors} pages of its memory are wrong, "
                    f"boot {status.boot_id}, was {self._boots[server]}"
                )


def window_of(server: ServerId, journals: list[Journal]) -> Window:
    """Around the switch of the attempt that moved it."""
    done = [j for j in journals if j.server == server and j.state is OperationState.DONE]
    times = [j.times for role in (Role.SOURCE, Role.DESTINATION) for j in done if j.role is role]
    switches = [t["switch"] for t in times if "switch" in t]
    ends = [t[step] for t in times for step in ("committed", "running") if step in t]
    if not switches or not ends:
        raise RuntimeError(f"the journals do not tell when {server} was switched")
    return Window(begin=min(switches) - BEFORE_SWITCH_SECONDS, end=max(ends) + AFTER_RUN_SECONDS)


def add_seen(total: Series, found: dict[str, Series]) -> None:
    for one in found.values():
        total.gaps_ms.extend(one.gaps_ms)
        total.sent += one.sent
        total.lost += one.lost
        total.duplicated += one.duplicated


@contextlib.asynccontextmanager
async def ours(servers: int) -> AsyncGenerator[Ours]:
    every = Size(vcpus=servers, memory_mib=servers * MEMORY_MIB)
    shape = LabShape(hosts=2, capacity=every, promised=every, parallel_moves_per_host=servers)
    build = BuildPaths.default()
    datacentre = Datacentre(unique_name("bench"), shape, build)
    await datacentre.open()
    try:
        async with datacentre.client as client:
            await client.register_release(build.movable_releases()[-1].id)
            async with asyncio.timeout(UP_SECONDS):
                while any(h.phase is not HostPhase.SERVING for h in await client.hosts()):
                    await asyncio.sleep(0.2)
            lab = Ours(datacentre, client)
            await lab.fill(servers)
            yield lab
    finally:
        await datacentre.close()


def check_room(servers: int) -> None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available, needed = int(found[1]) // 1024 if found else 0, 2 * servers * MEMORY_MIB + BESIDE_MIB
    if available < needed:
        raise RuntimeError(f"{servers} servers, twice, need {needed} MiB; {available} are available")


async def run(rounds: int, work: Path, figures: Figures, servers: int = SERVERS) -> None:
    check_room(servers)
    results = {"one": Evacuations(), "all": Evacuations()}
    places = itertools.cycle((HOSTS[1], HOSTS[0]))
    async with ours(servers) as lab:
        await lab.evacuate(servers, next(places), work / "evacuation-warm", Evacuations())
        for number, kind in enumerate(TURNS * rounds, start=1):
            at_once = 1 if kind == "one" else servers
            result = results[kind]
            await lab.evacuate(at_once, next(places), work / f"evacuation-{number}", result)
            gaps = ", ".join(f"{gap:.0f}" for gap in result.seen.gaps_ms[-servers:])
            print(f"{at_once} at a time: {result.seconds[-1]:.1f} s, gaps {gaps} ms", flush=True)
    add_figures(figures, results["one"], results["all"], servers)


def add_figures(figures: Figures, one: Evacuations, every: Evacuations, servers: int) -> None:
    moves = len(every.seen.gaps_ms)
    figures.add(f"gap p50, {servers} in parallel", every.seen.p50, "ms", baseline=one.seen.p50, samples=moves)
    figures.add(
        f"gap p99, {servers} in parallel", every.p99, "ms", baseline=one.p99, goal=GAP_GOAL, samples=moves
    )
    figures.add(
        f"time of an evacuation, {servers} in parallel",
        every.mean_seconds,
        "s",
        baseline=one.mean_seconds,
        goal=TIME_GOAL,
        samples=len(every.seconds),
    )
    for name, result in (("in parallel", every), ("one after another", one)):
        figures.add(
            f"lost, evacuation {name}", result.seen.lost, "packets", goal=NONE, samples=result.seen.sent
        )
        figures.add(
            f"duplicated, evacuation {name}",
            result.seen.duplicated,
            "packets",
            goal=NONE,
            samples=result.seen.sent,
        )
        figures.add(
            f"moves undone, evacuation {name}",
            result.undone,
            "moves",
            goal=NONE,
            samples=len(result.seen.gaps_ms),
        )


async def measure_all(*, long: bool, servers: int) -> Figures:
    figures = Figures()
    await run(LONG_ROUNDS if long else QUICK_ROUNDS, Path("build/bench/moves"), figures, servers)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.evacuation")
    parser.add_argument("--long", action="store_true", help=f"{4 * LONG_ROUNDS} evacuations")
    parser.add_argument("--servers", type=int, default=SERVERS, choices=range(2, SERVERS + 1))
    asked = parser.parse_args()
    figures = asyncio.run(measure_all(long=asked.long, servers=asked.servers))
    return figures.finish("evacuation", f"Hosts of {asked.servers} servers evacuated, as clients notice it")


if __name__ == "__main__":
    sys.exit(main())
