"""What a server says on its console, followed while it moves, is replaced, and agents die: real agents over
the simulated world, and whoever follows it reads exactly what was said."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from crash_plays import BOUND_SECONDS, Event, Strike, kill_agents
from moving import DESTINATION, SERVER, SOURCE, Run

from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import HostId, ServerId
from nahtlos.physical.ports import CONSOLE_KEPT
from nahtlos.physical.sim.cloudlet import NEW
from nahtlos.physical.sim.faults import Moment
from nahtlos.runtime.controllers import console_service
from nahtlos.runtime.controllers.console_service import ConsoleService
from nahtlos.runtime.controllers.consoles import ConsoleOutput, ConsolePlace
from nahtlos.wire.messages import ConsoleData, ConsoleRead, ConsoleTaken, Message

TALK_SECONDS = 0.02


@dataclass
class Talking(Run):
    """The guest says a numbered line every 20 ms while it runs, and is moved there and back and replaced."""

    said: bytearray = field(default_factory=bytearray)
    read: list[ConsoleOutput] = field(default_factory=list[ConsoleOutput])
    ways: tuple[str, ...] = ("move",)

    async def _go(self) -> None:
        world = self.world
        await self._booted(SERVER)
        self.said += world.hosts[SOURCE].consoles[world.running(SERVER)[0].id]
        async with asyncio.TaskGroup() as tasks:
            others = [tasks.create_task(self._talk()), tasks.create_task(self._follow())]
            await world.until(lambda: len(self.read) > 3, timeout=60, what="the first lines")
            self.begin()
            for way in self.ways:
                await self._carry(way)
            await asyncio.sleep(2.0)
            others[0].cancel()
            with contextlib.suppress(TimeoutError):
                await world.until(self._caught_up, timeout=60, what="the reader to have read all")
            others[1].cancel()

    async def _carry(self, way: str) -> None:
        conductor, world = self.conductor, self.world
        if way == "replace":
            replaced = conductor.replace(SERVER, NEW)
            await world.until(
                lambda: conductor.replaced(replaced) is not None, timeout=BOUND_SECONDS, what="the end"
            )
        else:
            to = SOURCE if conductor.places[SERVER][0] == DESTINATION else DESTINATION
            order = conductor.move(SERVER, to)
            await world.until(
                lambda: conductor.over(order) is not None, timeout=BOUND_SECONDS, what="the end"
            )
        await world.until(conductor.converged, timeout=BOUND_SECONDS, what="convergence")

    def _place_wanted(self) -> tuple[str, int]:
        return self.conductor.places[SERVER]

    def _caught_up(self) -> bool:
        return bool(self.read) and self.read[-1].end.offset == len(self.said)

    async def _talk(self) -> None:
        number = 0
        while True:
            for vmm in self.world.running(SERVER):
                line = f"{number}\n".encode()
                number += 1
                self.said += line
                self.world.hosts[vmm.host].consoles[vmm.id] += line
            await asyncio.sleep(TALK_SECONDS)

    async def _follow(self) -> None:
        async for part in self.service().follow(SERVER, ConsolePlace()):
            self.read.append(part)

    def service(self) -> ConsoleService:
        async def where(_server: ServerId) -> Any:
            return SimpleNamespace(host=self.conductor.places[SERVER][0], moving_to=None)

        return ConsoleService(cast("Any", self), where)

    async def request(self, host: HostId, body: Message, *, timeout: float) -> Message:
        """As `Agents` does."""
        session = self.conductor._sessions.get(host)  # pyright: ignore[reportPrivateUsage]
        if session is None:
            raise Unavailable(f"{host} is not connected")
        return await session.request(body, timeout=timeout)

    @property
    def text(self) -> bytes:
        return b"".join(part.data for part in self.read)


def problems(run: Talking) -> list[str]:
    found = list(run.problems)
    if any(part.dropped != 0 for part in run.read):
        found.append(f"dropped: {[part.dropped for part in run.read if part.dropped != 0]}")
    if run.text != bytes(run.said):
        found.append(f"said {len(run.said)} bytes, read {len(run.text)}")
    if len({part.history for part in run.read}) != 1:
        found.append("the history began anew")
    return found


@pytest.mark.parametrize(
    "ways", [("move",), ("replace",), ("move", "replace", "move"), ("replace", "replace", "move", "move")]
)
def test_nothing_is_lost_or_doubled(ways: tuple[str, ...]) -> None:
    run = Talking(ways=ways)
    run.play()
    assert not problems(run)
    assert len(run.read) > 10


def writes(way: str) -> Iterator[Strike]:
    """Every write of a ledger during a move or a replacement, and what is done around it for the console."""
    clean = Talking(ways=(way,))
    clean.play()
    assert not problems(clean)
    seen: set[Strike] = set()
    for strike in clean.seen:
        about = strike.driver == "ledger" or (strike.verb == "console_forget" and strike.occurrence < 3)
        if about and strike.moment is Moment.AFTER and strike not in seen:
            seen.add(strike)
            yield strike


@pytest.mark.parametrize("way", ["move", "replace"])
@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(SOURCE), id="source-agent-killed"),
        pytest.param(kill_agents(DESTINATION), id="destination-agent-killed"),
    ],
)
def test_agents_killed_at_any_write_lose_and_double_nothing(way: str, event: Event) -> None:
    for at in writes(way):
        run = Talking(at=at, does=event, ways=(way,))
        run.play()
        assert not problems(run), f"at {at}: {problems(run)}"


# --- the orchestrator's side, with scripted agents ---


class Scripted:
    """Answers by a script: what to raise or to answer, in order; `asked` is what it was asked."""

    def __init__(self, *answers: Message | Exception, hosts: tuple[str, ...] = ("host-1",)) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[HostId, Message]] = []
        self.hosts = list(hosts)
        self.moving_to: HostId | None = None

    async def request(self, host: HostId, body: Message, *, timeout: float) -> Message:
        self.asked.append((host, body))
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def where(self, server: ServerId) -> Any:
        if not self.hosts:
            raise NotFound("gone", field="server")
        host = HostId(self.hosts.pop(0) if len(self.hosts) > 1 else self.hosts[0])
        return SimpleNamespace(host=host, moving_to=self.moving_to)

    def service(self) -> ConsoleService:
        return ConsoleService(cast("Any", self), self.where)


def said(text: bytes, end: int, history: str = "h") -> ConsoleData:
    return ConsoleData(data=text, next_offset=end, history=history)


async def followed(script: Scripted, place: ConsolePlace, count: int) -> list[ConsoleOutput]:
    found: list[ConsoleOutput] = []
    async with asyncio.timeout(30), contextlib.aclosing(script.service().follow(SERVER, place)) as parts:
        async for part in parts:
            found.append(part)
            if len(found) == count:
                break
    return found


async def test_a_server_that_left_is_asked_for_where_it_goes_to_at_its_offset() -> None:
    script = Scripted(said(b"abc", 3), NotFound("not here", field="server"), said(b"def", 6))
    script.moving_to = HostId("host-2")
    found = await followed(script, ConsolePlace(), 2)
    assert [(p.data, p.offset, p.dropped) for p in found] == [(b"abc", 0, 0), (b"def", 3, 0)]
    host, body = script.asked[-1]
    assert isinstance(body, ConsoleRead)
    assert (host, body.history, body.offset) == ("host-2", "h", 3)


async def test_what_could_not_be_kept_is_told() -> None:
    script = Scripted(said(b"xyz", 5000), said(b"new", 3, history="i"))
    found = await followed(script, ConsolePlace(history="h", offset=10), 2)
    assert [(p.offset, p.dropped) for p in found] == [(4997, 4987), (0, None)]


async def test_an_agent_of_the_release_before_is_refused_with_a_remedy() -> None:
    old = ConsoleData(data=b"login:", next_offset=6)
    with pytest.raises(Refused) as refused:
        await followed(Scripted(old), ConsolePlace(), 1)
    assert refused.value.field == "host"
    assert "upgrade the agent of host-1" in refused.value.remedy
    log = await Scripted(old, ConsoleData(data=b"", next_offset=6)).service().log(SERVER)
    assert log.data == b"login:"


async def test_what_a_server_has_said_is_looked_for_again_while_it_moves() -> None:
    gone = NotFound("web is not on host-1", field="server")
    script = Scripted(gone, Unavailable("on its way"), said(b"abc", 3), gone, said(b"", 3), hosts=("host-1",))
    log = await script.service().log(SERVER)
    assert (log.data, log.offset) == (b"abc", 0)
    assert not script.answers


async def test_a_server_that_is_nowhere_has_said_nothing_that_could_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console_service, "LOG_SECONDS", 0.2)
    with pytest.raises(Unavailable, match="not on host-1"):
        await Scripted(*[NotFound("web is not on host-1", field="server")] * 99).service().log(SERVER)
    with pytest.raises(NotFound, match="gone"):
        await Scripted(hosts=()).service().log(SERVER)


async def test_whoever_follows_is_one_of_so_many() -> None:
    service = Scripted().service()
    many = [service.follow(SERVER, ConsolePlace()) for _ in range(65)]
    waiting = [asyncio.ensure_future(anext(each)) for each in many[:64]]
    await asyncio.sleep(0)
    with pytest.raises(Conflict, match="64"):
        await anext(many[64])
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_a_moving_server_does_not_take_is_typed_again_and_nothing_twice() -> None:
    script = Scripted(
        ConsoleTaken(taken=2), ConsoleTaken(taken=0), NotFound("not here"), ConsoleTaken(taken=3)
    )
    service = script.service()
    assert service.claim(SERVER, "s", force=False)
    async with asyncio.timeout(30):
        await service.type(SERVER, "s", b"hello")
    typed = [getattr(body, "data", b"") for _, body in script.asked]
    assert typed == [b"hello", b"llo", b"llo", b"llo"]


async def test_what_an_agent_did_not_answer_is_not_typed_again() -> None:
    script = Scripted(Unavailable("no answer in time"), ConsoleTaken(taken=5))
    service = script.service()
    service.claim(SERVER, "s", force=False)
    with pytest.raises(Unavailable):
        await service.type(SERVER, "s", b"hello")
    assert len(script.asked) == 1


async def test_one_session_types_at_a_time() -> None:
    service = Scripted(ConsoleTaken(taken=1)).service()
    assert service.claim(SERVER, "a", force=False)
    assert not service.claim(SERVER, "b", force=False)
    assert service.claim(SERVER, "b", force=True)
    with pytest.raises(Conflict):
        await service.type(SERVER, "a", b"x")
    service.release(SERVER, "a")  # not the one who may
    assert not service.claim(SERVER, "a", force=False)
    service.release(SERVER, "b")
    assert service.claim(SERVER, "a", force=False)


def test_a_guest_that_prints_without_end_is_sent_at_a_bounded_rate_and_laps_are_told() -> None:
    """Of more than is kept, the oldest is left out, and how much is said."""

    class Printing(Talking):
        async def _talk(self) -> None:
            while True:
                for vmm in self.world.running(SERVER):
                    line = b"x" * (1 << 20)
                    self.said += line
                    self.world.hosts[vmm.host].consoles[vmm.id] += line
                await asyncio.sleep(0.25)

    run = Printing(ways=())
    run.play()
    assert not run.problems
    sent, dropped = len(run.text), sum(part.dropped or 0 for part in run.read)
    assert dropped > CONSOLE_KEPT
    assert run.read[0].offset + sent + dropped == run.read[-1].end.offset
    assert sent < 0.6 * len(run.said)
