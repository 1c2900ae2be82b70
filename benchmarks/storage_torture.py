"""Many rounds of a writer that checks itself, while its volume goes from host to host, is snapshotted and
served by other releases, and while storage daemons and agents are killed at random moments of that.

An agent's death is its driver dropped in the middle of a call; another one begins with what it finds. What is
done is repeated until it is done, as agents do. Each round has a seed; a bad one is named.
"""

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from benchmarks.figures import Figures, Goal
from benchmarks.storage_relocation import relocated
from benchmarks.storage_site import Disk, Running, Site, remote
from nahtlos.model.errors import Error
from nahtlos.model.ids import SnapshotId
from nahtlos.model.storage import SnapshotSpec
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage.definition import UNIT

QUICK_ROUNDS, LONG_ROUNDS = 3, 100
EVENTS = 4
SIZE_MIB = 16
DONE_WITHIN = 60.0
NONE = Goal(at_most=0)


class Round:
    def __init__(self, site: Site, seed: int) -> None:
        self._site = site
        self._random = random.Random(seed)
        self._seed = seed
        self._hosts = list(site.hosts)
        self._volume = self._hosts[0].volume(f"torture-{seed}", size_mib=SIZE_MIB)
        self._taken = 0
        self.kills = 0

    async def run(self, total: "Total") -> None:
        here = self._hosts[0]
        await here.have(self._volume)
        async with Disk(here, f"torture-{self._seed}", (remote(here.endpoint(self._volume)),)) as disk:
            self._disk = disk
            running = Running(disk, "check", depth=8)
            try:
                for _ in range(EVENTS):
                    await self._surely(self._random.choice((self._relocate, self._snapshot, self._upgrade)))
                load = await running.stop()
            finally:
                running.abandon()
        total.add(self._seed, load.errors, load.lost + load.wrong, load.operations, self.kills)
        for host in self._hosts:
            snapshots = tuple(each.id for each in await host.storage.snapshots())
            await host.storage.reconcile(StorageDesired(removed_snapshots=snapshots))
            await host.forget(self._volume)

    async def _surely(self, act: Callable[[], Awaitable[None]]) -> None:
        """Whoever is killed meanwhile, and then until it is done."""
        error: BaseException | None = None
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(2 * DONE_WITHIN):
            attempt = asyncio.ensure_future(act())
            await asyncio.sleep(self._random.random() * 0.4)
            await self._kill(attempt)
            while True:
                await asyncio.wait((attempt,))
                if not attempt.cancelled():
                    error = attempt.exception()
                    if error is None:
                        return
                    if not isinstance(error, Error):
                        raise error
                if asyncio.get_running_loop().time() > began + DONE_WITHIN:
                    raise RuntimeError(f"round {self._seed}: {act.__name__} is not done, at last: {error}")
                await self._pass()
                attempt = asyncio.ensure_future(act())

    async def _pass(self) -> None:
        """As agents do all the time: everything is as it shall be, except for what is being worked on."""
        await asyncio.sleep(0.05)
        desired = StorageDesired(volumes=(self._volume,), pinned=frozenset({self._volume.id}))
        for host in self._hosts:
            with suppress(Error):
                await host.storage.reconcile(desired)

    async def _kill(self, attempt: "asyncio.Future[None]") -> None:
        self.kills += 1
        host = self._random.choice(self._hosts)
        if self._random.random() < 0.6:
            await host.kill(UNIT)
        if self._random.random() < 0.6:
            attempt.cancel()
            await asyncio.wait((attempt,))
            for each in self._hosts:
                await each.restart_driver()

    async def _relocate(self) -> None:
        source, target = self._hosts
        there = await relocated(source, target, self._volume, self._disk)
        self._volume = there
        self._hosts.reverse()

    async def _snapshot(self) -> None:
        self._taken += 1
        name = SnapshotId(f"t{self._seed}-{self._taken}")
        await self._hosts[0].storage.snapshot((SnapshotSpec(id=name, volume=self._volume.id),))

    async def _upgrade(self) -> None:
        release = self._site.bundle(self._random.choice(("10.0", "11.1"))).release
        await self._hosts[0].have(self._volume, release=release)


class Total:
    def __init__(self) -> None:
        self.failed = self.lost = self.written = self.kills = self.rounds = 0

    def add(self, seed: int, failed: int, lost: int, written: int, kills: int) -> None:
        if failed or lost:
            print(f"round {seed}: {failed} failed, {lost} lost or wrong", file=sys.stderr)
        self.failed, self.lost = self.failed + failed, self.lost + lost
        self.written, self.kills, self.rounds = self.written + written, self.kills + kills, self.rounds + 1


async def measure(figures: Figures, *, long: bool) -> None:
    total = Total()
    async with Site(2) as site:
        for seed in range(LONG_ROUNDS if long else QUICK_ROUNDS):
            await Round(site, seed).run(total)
    samples = total.written
    what = f"in {total.rounds} rounds with {total.kills} kills"
    figures.add(f"acknowledged writes lost, {what}", total.lost, "writes", goal=NONE, samples=samples)
    figures.add(f"writes failed, {what}", total.failed, "writes", goal=NONE, samples=samples)
