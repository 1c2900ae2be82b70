"""Many rounds of a writer that checks itself, while storage daemons and agents are killed at steps of what is
done to its volume, and at moments between them.

A round is either of one volume that goes from host to host, is snapshotted, enlarged and served by other
releases; or of one with three copies of which hosts are lost and come back, daemons are killed, hung and
replaced. An agent's death is its driver dropped in the middle of a call; another one begins with what it
finds. What is done is repeated until it is done, as agents do. At the end of a round the copies are compared.
Each round has a seed; a bad one is named.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from itertools import count

import msgspec

from benchmarks.figures import Figures, Goal
from benchmarks.storage_copies import Copies
from benchmarks.storage_relocation import relocated
from benchmarks.storage_site import Disk, Host, Load, Site, remote
from nahtlos.model.errors import Error
from nahtlos.model.ids import ReleaseId, SnapshotId
from nahtlos.model.storage import SnapshotSpec
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.storage.definition import UNIT

QUICK_SECONDS, LONG_ROUNDS = 55.0, 40
HOSTS = 3
EVENTS = 5
SIZE_MIB = 16
STEPS_AHEAD = 6
"""Of the steps of what is done next one so far ahead is struck, where there are so many."""
SOON = 0.4
AGAIN = 0.1
"""Seconds between attempts."""
HUNG_SECONDS = 2.5
DONE_WITHIN = 60.0
VERSIONS = ("10.0", "11.1")
NONE = Goal(at_most=0)


class Died(BaseException):
    """An agent ends here, as by kill -9: nothing of it catches this."""


class Strikes:
    """Who is killed, and when: at a step of the storage of any host, or after a moment."""

    def __init__(self, hosts: list[Host], chance: random.Random) -> None:
        self._hosts = hosts
        self._chance = chance
        self.away = set[Host]()
        """Without power at the moment."""
        self.kills = 0
        self.told: Callable[[], str] = str
        """What the agents have said last."""
        self.at = Counter[str]()
        self.story: list[str] = []
        """What happened, and when: told of a round that went badly."""
        self._began = time.monotonic()
        self._ahead: int | None = None
        for host in hosts:
            host.hear(lambda name, host=host: self._stepped(host, name))

    def note(self, what: str) -> None:
        self.story.append(f"{time.monotonic() - self._began:7.3f} {what}")

    async def around(self, attempt: "asyncio.Future[None]") -> None:
        """Once, while this is tried."""
        if self._chance.random() < 0.6:
            self._ahead = self._chance.randrange(STEPS_AHEAD)
            await asyncio.wait((attempt,), timeout=DONE_WITHIN)
            self._ahead = None
            return
        await asyncio.wait((attempt,), timeout=self._chance.random() * SOON)
        if not attempt.done():
            self.at["a moment"] += 1
            daemon, agent = self._victims()
            if daemon:
                await self._kill(self._chance.choice(self._there()))
            if agent:
                self.kills += 1
                self.note("the agent is killed")
                attempt.cancel()
                await asyncio.wait((attempt,))

    def _victims(self) -> tuple[bool, bool]:
        """Whether a daemon, and whether an agent; one of them at least."""
        return self._chance.choice(((True, False), (False, True), (True, True)))

    def _there(self) -> list[Host]:
        return [host for host in self._hosts if host not in self.away]

    async def _stepped(self, host: Host, name: str) -> None:
        self.note(f"{host.settings.host}: {name}")
        if self._ahead is None:
            return
        self._ahead -= 1
        if self._ahead >= 0:
            return
        self._ahead = None
        self.at[name] += 1
        daemon, agent = self._victims()
        if daemon:
            await self._kill(host if self._chance.random() < 0.6 else self._chance.choice(self._there()))
        if agent:
            self.kills += 1
            self.note("the agent is killed")
            raise Died

    async def _kill(self, host: Host) -> None:
        self.kills += 1
        self.note(f"the daemon of {host.settings.host} is killed")
        await host.kill(UNIT)

    async def until_done(
        self, what: str, act: Callable[[], Awaitable[None]], again: Callable[[bool], Awaitable[None]]
    ) -> None:
        """Whoever is killed meanwhile. `again`: what agents do before they try it once more, and whether
        they were killed."""
        until = time.monotonic() + DONE_WITHIN
        self.note(what)
        attempt = asyncio.ensure_future(act())
        try:
            await self.around(attempt)
            while True:
                await asyncio.wait((attempt,), timeout=DONE_WITHIN)
                error = _end_of(attempt)
                self.note(f"{what}: {'done' if error is None else repr(error)}")
                if error is None:
                    return
                if time.monotonic() > until:
                    raise RuntimeError(f"{what} is not done, at last: {error!r}; {self.told()}")
                died = isinstance(error, Died | asyncio.CancelledError)
                for host in self._there() if died else ():
                    await host.restart_driver()
                await again(died)
                await asyncio.sleep(AGAIN)
                attempt = asyncio.ensure_future(act())
        finally:
            attempt.cancel()
            await asyncio.wait((attempt,))


def _end_of(attempt: "asyncio.Future[None]") -> BaseException | None:
    """Raises what is no error that an agent may meet."""
    if not attempt.done():
        return TimeoutError("it takes too long")
    if attempt.cancelled():
        return asyncio.CancelledError()
    error = attempt.exception()
    if error is not None and not isinstance(error, Error | Died | TimeoutError):
        raise error
    return error


class Alone:
    """A round of a volume with one copy."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site = site
        self._seed = seed
        self._chance = random.Random(seed)
        self._hosts = list(site.hosts[:2])
        self.strikes = Strikes(self._hosts, self._chance)
        self._volume = self._hosts[0].volume(f"torture-{seed}", size_mib=SIZE_MIB)
        self._taken = 0

    async def run(self) -> tuple[Load, int]:
        """What the writer saw, and how many copies differ."""
        here = self._hosts[0]
        await here.have(self._volume)
        async with Disk(here, f"torture-{self._seed}", (remote(here.endpoint(self._volume)),)) as disk:
            self._disk = disk
            running = disk.writer(depth=8)
            try:
                for _ in range(EVENTS):
                    act = self._chance.choice((self._relocate, self._snapshot, self._upgrade, self._enlarge))
                    await self.strikes.until_done(f"round {self._seed}: {act.__name__}", act, self._pass)
                load = await running.stop()
            finally:
                running.abandon()
        for host in self._hosts:
            host.hear(None)
            await host.forget(self._volume)
        return load, 0

    async def _pass(self, _died: bool) -> None:
        """As agents do all the time: everything is as it shall be, except for what is being worked on."""
        desired = StorageDesired(volumes=(self._volume,), pinned=frozenset({self._volume.id}))
        for host in self._hosts:
            with suppress(Error, Died):
                await host.storage.reconcile(desired)

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
        await self._hosts[0].have(self._volume, release=_any_release(self._site, self._chance))

    async def _enlarge(self) -> None:
        larger = msgspec.structs.replace(self._volume, size_mib=self._volume.size_mib + 1)
        await self._hosts[0].have(larger)
        self._volume = larger


class Replicated:
    """A round of a volume with three copies."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site = site
        self._seed = seed
        self._chance = random.Random(seed)
        self._hosts = list(site.hosts)
        self.strikes = Strikes(self._hosts, self._chance)
        self._copies = Copies(self._hosts, f"torture-{seed}", size_mib=SIZE_MIB)
        self.strikes.told = lambda: "; ".join(self._copies.said[-5:])
        self._copies.on_said = self._hear

    def _hear(self, text: str) -> None:
        self._copies.said.append(text)
        self.strikes.note(text)

    async def run(self) -> tuple[Load, int]:
        async with self._copies as copies:
            running = copies.writer(depth=8)
            try:
                for _ in range(EVENTS):
                    act = self._chance.choice((self._lose, self._step, self._upgrade, self._hang, self._rest))
                    await act()
                await self._all_back()
                load = await running.stop()
            finally:
                running.abandon()
            for host in self._hosts:
                host.hear(None)
            return load, len(await copies.differ())

    async def _surely(self, what: str, act: Callable[[], Awaitable[None]]) -> None:
        await self.strikes.until_done(f"round {self._seed}: {what}", act, self._pass)

    async def _pass(self, died: bool) -> None:
        """An agent that was killed with its drivers is there again, and looks after what is there."""
        if died:
            await self._copies.kill_agent()
            await self._copies.start_agent()
        for host in self._hosts:
            if host not in self.strikes.away:
                spec = self._copies.spec(host.settings.host)
                desired = StorageDesired(volumes=(spec,), pinned=frozenset({spec.id}))
                with suppress(Error, Died):
                    await host.storage.reconcile(desired)

    def _other(self) -> Host:
        """Not the server's own."""
        return self._chance.choice(self._hosts[1:])

    async def _lose(self) -> None:
        host = self._other()
        name = host.settings.host
        self.strikes.away.add(host)
        self.strikes.kills += 1
        self.strikes.note(f"{name} loses power")
        await host.lose_power()
        try:
            await self._surely("a copy is lost", lambda: self._copies.recorded(name))
            await asyncio.sleep(self._chance.random() * SOON)
        finally:
            await host.come_back()
            self.strikes.note(f"{name} is back")
            self.strikes.away.discard(host)
        await self._all_back()

    async def _all_back(self) -> None:
        for host in self._hosts:
            await self._surely("a copy comes back", lambda host=host: self._comes_back(host))

    async def _comes_back(self, host: Host) -> None:
        if host.settings.host not in self._copies.rejoined:
            await self._copies.rejoin(host.settings.host)

    async def _step(self) -> None:
        await self._surely("the copies are in step", self._copies.in_step)

    async def _upgrade(self) -> None:
        host, release = self._chance.choice(self._hosts), _any_release(self._site, self._chance)
        await self._surely(
            "a daemon is replaced",
            lambda: host.have(self._copies.spec(host.settings.host), release=release),
        )

    async def _hang(self) -> None:
        host = self._other()
        pid = await host.pid(UNIT)
        if pid is None:
            return
        self.strikes.note(f"the daemon of {host.settings.host} hangs")
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(HUNG_SECONDS)
        self.strikes.note("it goes on")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        await self._all_back()

    async def _rest(self) -> None:
        await self._surely("nothing", lambda: asyncio.sleep(SOON))


def _any_release(site: Site, chance: random.Random) -> ReleaseId:
    return site.bundle(chance.choice(VERSIONS)).release


class Total:
    def __init__(self) -> None:
        self.failed = self.lost = self.written = self.kills = self.rounds = self.differ = self.compared = 0
        self.at = Counter[str]()

    def add(self, round_: "Alone | Replicated", load: Load, differ: int) -> None:
        self.failed, self.lost = self.failed + load.errors, self.lost + load.lost + load.wrong
        self.written, self.rounds = self.written + load.operations, self.rounds + 1
        self.kills, self.at = self.kills + round_.strikes.kills, self.at + round_.strikes.at
        self.differ += differ
        self.compared += isinstance(round_, Replicated)

    def report(self, figures: Figures) -> None:
        what, written = f"in {self.rounds} rounds with {self.kills} kills", self.written
        steps = len(self.at)
        figures.add(f"acknowledged writes lost, {what}", self.lost, "writes", goal=NONE, samples=written)
        figures.add(f"writes failed, {what}", self.failed, "writes", goal=NONE, samples=written)
        what = f"copies that differ, after {self.compared} rounds"
        figures.add(what, self.differ, "copies", goal=NONE, samples=self.compared)
        figures.add("kinds of steps at which somebody was killed", steps, "steps", samples=self.at.total())


async def one_round(site: Site, seed: int, total: Total) -> None:
    """Of one kind or the other, by turns."""
    began = time.monotonic()
    round_ = (Replicated if seed % 2 else Alone)(site, seed)
    try:
        load, differ = await round_.run()
    except BaseException:
        _tell(seed, round_)
        raise
    total.add(round_, load, differ)
    bad = load.errors + load.lost + load.wrong + differ
    if bad:
        _tell(seed, round_)
    print(
        f"  round {seed} ({type(round_).__name__.lower()}, {time.monotonic() - began:.0f} s): "
        f"{load.operations} writes, {round_.strikes.kills} kills, longest wait {load.longest:.2f} s"
        + (f": {load.errors} FAILED, {load.lost} LOST, {load.wrong} WRONG, {differ} DIFFER" if bad else ""),
        file=sys.stderr,
    )


def _tell(seed: int, round_: Alone | Replicated) -> None:
    print(f"  round {seed}:", *round_.strikes.story, sep="\n    ", file=sys.stderr)


async def measure(figures: Figures, *, long: bool, rounds: Iterable[int] | None = None) -> None:
    """`rounds`: their seeds; else as many as there is time for."""
    total = Total()
    until = time.monotonic() + QUICK_SECONDS
    seeds = rounds or (range(LONG_ROUNDS) if long else count())
    async with Site(HOSTS) as site:
        for seed in seeds:
            if rounds is None and not long and time.monotonic() > until:
                break
            await one_round(site, seed, total)
    total.report(figures)
