"""An agent that is killed anywhere in a move: a new one carries on or reverts, and no frame is lost.

Between any two acts of a verb (messages to the kernel, descriptors stored, files written, rules applied) the
driver is ended as kill -9 would end it, and a new one that knows only the kernel, the supervisor's store and
the run directory takes over.
"""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handover_play import BROADCAST, STREAM, A, B, C, Count, Machine, Move, Stage, Talker, counted, until
from network_namespaces import MemorySupervisor, missing_programs

from nahtlos.model.errors import Error
from nahtlos.physical.network import netlink, nft, packet, tap
from nahtlos.physical.network.baseline import Baseline
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.ports import MoveRole

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
ACTS: tuple[tuple[Any, str], ...] = (
    (Netlink, "_exchange"),
    (MemorySupervisor, "store_fd"),
    (MemorySupervisor, "drop_fd"),
    (nft, "run"),
    (Baseline, "save"),
    (tap, "open_tap"),
    (packet, "_send"),
)


class Killed(BaseException):
    """What kill -9 would be: nothing may catch it."""


class Reaper:
    """Counts the acts of one host's driver, and ends it before the one it was told."""

    def __init__(self) -> None:
        self.acts: list[str] = []
        self.fatal: int | None = None
        self._thread = ""

    def watch(self, host: str, fatal: int | None) -> None:
        self.acts, self.fatal, self._thread = [], fatal, f"host-{host}"

    def rest(self) -> None:
        self._thread = ""

    def before(self, act: str) -> None:
        if threading.current_thread().name != self._thread:
            return
        self.acts.append(act)
        if self.fatal is not None and len(self.acts) == self.fatal + 1:
            raise Killed(act)


@pytest.fixture
def reaper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reaper]:
    reaper = Reaper()
    for owner, name in ACTS:
        original = getattr(owner, name)

        def watched(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            reaper.before(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
    yield reaper
    reaper.rest()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path, hosts=3)
    try:
        yield stage
    finally:
        await asyncio.to_thread(stage.close)


class Play:
    """One server that is sent to all the time, and moves."""

    def __init__(self, stage: Stage, reaper: Reaper, mover: Machine, talkers: list[Talker]) -> None:
        self.stage, self.reaper, self.mover, self.talkers = stage, reaper, mover, talkers

    async def survive(self, host: str, act: Callable[[], Awaitable[object]], fatal: int | None) -> bool:
        """True if the driver of `host` was ended before its act number `fatal`, and replaced."""
        self.reaper.watch(host, fatal)
        try:
            await act()
        except Killed:
            self.stage.hosts[host].restart_agent()
            return True
        finally:
            self.reaper.rest()
        return False

    async def check(self, what: str) -> None:
        """Everything sent so far has come; nothing for it alone twice."""
        sent = [t.sent for t in self.talkers]
        await until(lambda: not any(self._count(t, n).lost for t, n in zip(self.talkers, sent, strict=True)))
        for talker, so_far in zip(self.talkers, sent, strict=True):
            found = self._count(talker, so_far)
            assert found.lost == [], (what, talker.stream)
            if talker.stream != 2:
                assert found.duplicated == [], (what, talker.stream)

    def _count(self, talker: Talker, sent: int) -> Count:
        return counted(sent, [n - talker.stream * STREAM for n in list(self.mover.received)])


@pytest.fixture
async def play(stage: Stage, reaper: Reaper) -> Play:
    mover, near, far = stage.machine(10, A), stage.machine(11, A), stage.machine(12, C)
    await stage.opened(mover, near, far)
    talkers = [
        stage.talk(near, 1, mover.mac, mover.ip),
        stage.talk(far, 2, BROADCAST, "255.255.255.255", 0.005),
        stage.talk(far, 3, mover.mac, mover.ip),
    ]
    return Play(stage, reaper, mover, talkers)


Step = tuple[str, str]
"""An act of the move, and whose it is."""
BEFORE: tuple[Step, ...] = (
    ("create", "destination"),
    ("prepare_destination", "destination"),
    ("sacrifice", ""),
    ("prepare_source", "source"),
    ("switch_destination", "destination"),
    ("switch_source", "source"),
    ("drain", "source"),
    ("stop", ""),
)
AFTER: tuple[Step, ...] = (
    ("resume", ""),
    ("settle_destination", "destination"),
    ("settle_source", "source"),
)
UNDO: tuple[Step, ...] = (
    ("revert_source", "source"),
    ("resume_at_source", ""),
    ("revert_destination", "destination"),
    ("clear_destination", "destination"),
)


async def run(play: Play, move: Move, steps: tuple[Step, ...], fatal: Step, number: int | None) -> bool:
    """All steps in order; `fatal` is interrupted before its act `number` and begun again by a new driver.
    False if it has no such act."""
    found = True
    for name, side in steps:
        act = getattr(move, name)
        if (name, side) == fatal:
            found = await play.survive(getattr(move, side), act, number)
            await act() if found else None
        else:
            await act()
    return found


async def every_act(
    play: Play, steps: tuple[Step, ...], watched: tuple[Step, ...]
) -> AsyncIterator[tuple[Move, Step, int]]:
    """Moves that were interrupted once each, at every act of every watched step."""
    for step in watched:
        number, more = 0, True
        while more:
            places = play.stage.places[play.mover.port]
            move = play.stage.move(B if places == A else A, play.mover)
            more = await run(play, move, steps, step, number)
            yield move, step, number
            number += 1


def acting(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    return tuple(s for s in steps if s[1])


async def test_a_new_agent_carries_on(play: Play) -> None:
    steps, total = (*BEFORE, *AFTER), 0
    async for _, step, number in every_act(play, steps, acting(steps)):
        await play.check(f"{step}, act {number}")
        total += 1
    assert total > 20, "every verb has acts between which it can be ended"
    for passing in play.stage.reflect.values():
        passing.clear()
    await play.stage.reconcile_all()
    assert await play.stage.reconcile_all() == dict.fromkeys(play.stage.hosts, ())


async def test_a_new_agent_reverts(play: Play) -> None:
    """Ended at any act of the last step before the undo, or at any act of the undo."""
    total = 0
    for steps in range(1, len(BEFORE) + 1):
        forward = BEFORE[:steps]
        async for move, step, number in undone(play, forward, acting(forward[-1:])):
            await play.check(f"{step}, act {number}, undone")
            assert play.stage.places[play.mover.port] == move.source
            total += 1
    async for _, step, number in every_act(play, (*BEFORE, *UNDO), acting(UNDO)):
        await play.check(f"{step}, act {number}")
        total += 1
    assert total > 20
    assert await play.stage.reconcile_all() == dict.fromkeys(play.stage.hosts, ())


async def undone(
    play: Play, forward: tuple[Step, ...], watched: tuple[Step, ...]
) -> AsyncIterator[tuple[Move, Step, int]]:
    """The interrupted step is not begun again: the new agent undoes."""
    for step in watched:
        number, ended = 0, True
        while ended:
            move = play.stage.move(B, play.mover)
            for name, _ in forward[:-1]:
                await getattr(move, name)()
            ended = await play.survive(getattr(move, step[1]), getattr(move, step[0]), number)
            for name, _ in UNDO:
                await getattr(move, name)()
            yield move, step, number
            number += 1


async def test_reconcile_disturbs_no_move(play: Play) -> None:
    """By old and new drivers, at every step, with configurations of either place."""
    pinned = play.mover.port
    for steps in ((*BEFORE, *AFTER), (*BEFORE, *UNDO)):
        move = play.stage.move(B if play.stage.places[pinned] == A else A, play.mover)
        for name, _ in steps:
            await getattr(move, name)()
            for host in (A, B):
                assert await play.stage.reconcile(host, pinned) == (), name
                play.stage.hosts[host].restart_agent()
                before = play.stage.hosts[host].driver.writes
                assert await play.stage.reconcile(host, pinned) == (), name
                assert play.stage.hosts[host].driver.writes == before, name
            assert await play.stage.reconcile(C) == ()
        await play.check(str(steps[-1]))


async def test_a_move_waits_for_no_reconcile(play: Play) -> None:
    """Reconciles without end on both hosts, while it moves to and fro."""
    stop = asyncio.Event()

    async def again(host: str) -> None:
        while not stop.is_set():
            try:
                await play.stage.reconcile(host, play.mover.port)
            except Error as error:
                raise AssertionError(error.message) from error

    async with asyncio.TaskGroup() as group:
        for host in (A, B):
            group.create_task(again(host))
        for to in (B, A, B):
            await play.stage.move(to, play.mover).whole(hold=0.05)
        stop.set()
    await play.check("under reconciles")


async def test_a_switch_is_one_message_to_the_kernel(play: Play) -> None:
    """No process, no file, nothing stored; and it takes little longer than the bare message."""
    stage, mover = play.stage, play.mover
    move = stage.move(B, mover)
    await move.begin()
    for host, step in ((B, move.switch_destination), (A, move.switch_source)):
        play.reaper.watch(host, None)
        await step()
        play.reaper.rest()
        assert play.reaper.acts == ["_exchange"]
    port, network = stage.port(mover), stage.network_of(mover)

    async def timed(driver: Any) -> tuple[float, float, float]:
        """Seconds: the switch, the drain of an empty ring, and the bare flip of one entry."""
        tunnel = socket.if_nametoindex("vx100")
        began = time.perf_counter()
        await driver.move_switch(port, network, MoveRole.SOURCE)
        switched = time.perf_counter()
        assert await driver.move_drain(mover.port, timeout=1.0)
        drained = time.perf_counter()
        driver._shared.fast().change([netlink.forward_to_port(tunnel, port.mac)])
        bare = time.perf_counter()
        return switched - began, drained - switched, bare - drained

    times = [await stage.hosts[A].call(timed) for _ in range(100)]
    switch, drain, bare = (sorted(column)[50] for column in zip(*times, strict=True))
    print(f"switch {switch * 1e6:.0f} us, bare flip {bare * 1e6:.0f} us, empty drain {drain * 1e6:.0f} us")
    assert switch < 5 * bare, "the message carries two requests, and that is all"
    assert drain < 0.005
    await move.give_up()
