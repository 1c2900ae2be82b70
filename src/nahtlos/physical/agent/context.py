"""What the parts of one agent share: its settings, drivers and ledger, and how they make themselves heard."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Error, ErrorRecord, Refused
from nahtlos.model.guest import GuestStatus
from nahtlos.model.ids import OperationId, ServerId
from nahtlos.physical.agent.consoles.pace import Pace
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.agent.turns import Turns
from nahtlos.physical.ports import Drivers
from nahtlos.physical.settings import AgentSettings
from nahtlos.wire.messages import Event, Message
from nahtlos.wire.transport import Transport

QUIET_SECONDS = 1.0
"""The longest that what can wait does wait for a switch."""
BREATH_SECONDS = 0.25
"""A guest that was resumed a moment ago has its memory and its code to find again: what agents have to tell
and to put right would take the CPUs from it just then."""
BREATHS_OF_PAUSE, LONGEST_BREATH = 3.0, 0.75
"""A busy host takes longer for a switch, and its guest longer for its breath: so many times as long."""

CONSOLE_RATE = 1 << 20
CONSOLE_BURST = 512 << 10
"""Bytes a second, and at once, that all serial consoles of a host may send."""


@dataclass(eq=False)
class Freeze:
    """A server that stands still for a moment because an operation asked for it."""

    operation: OperationId
    stopped: bool = False
    """Its guest ran, and stands still for this."""
    broken: bool = False
    """Its guest was not held still all the time."""


def breath_after(pause: float) -> float:
    """Seconds, after a switch that took `pause` seconds."""
    return min(max(BREATH_SECONDS, BREATHS_OF_PAUSE * pause), LONGEST_BREATH)


def _nowhere(work: Coroutine[None, None, None]) -> None:
    work.close()


def _nothing(server: ServerId) -> None:
    """Nobody tells guests the time."""


@dataclass(frozen=True)
class Context:
    settings: AgentSettings
    drivers: Drivers
    ledger: Ledger
    transport: Transport
    now: Callable[[], float]
    """Wall clock, seconds."""
    emit: Callable[[Event], None]
    changed: Callable[[], None]
    """Something worth a report, and a look at whether the host still is as configured."""
    on_bug: Callable[[BaseException], None]
    """Hears of exceptions that are none of `model.errors`."""
    ask: Callable[[Message, float], Awaitable[Message]]
    """The orchestrator's answer within so many seconds. Unavailable while none is connected."""
    spawn: Callable[[Coroutine[None, None, None]], None] = _nowhere
    """Runs it beside everything else; it must not raise."""
    freezes: dict[ServerId, Freeze] = field(default_factory=dict[ServerId, Freeze])
    """Servers nothing but `volumes.freeze` may start, resume or move. Not durable: an agent that was started
    again finds guests that stand still, and convergence lets them go on."""
    starting: set[ServerId] = field(default_factory=set[ServerId])
    """Servers of which a VMM is being started: how that reaches its disks is settled. Not durable: a start
    ends with its agent."""
    saving: dict[ServerId, OperationId] = field(default_factory=dict[ServerId, OperationId])
    """Servers whose memory is saved while they run, for a snapshot. Not durable: then what is saved counts
    for nothing."""
    guest_freezes: dict[ServerId, Freeze] = field(default_factory=dict[ServerId, Freeze])
    """Servers whose guest has its file systems frozen for an operation. Not durable: the guest remembers."""
    guest_thaws: set[ServerId] = field(default_factory=set[ServerId])
    """Those that may be frozen still, and are to be thawed."""
    guests: dict[ServerId, GuestStatus] = field(default_factory=dict[ServerId, GuestStatus])
    """What agents in guests last said."""
    waits: dict[str, str] = field(default_factory=dict[str, str])
    """By operation: what it waits for right now, in words."""
    progress: dict[str, float] = field(default_factory=dict[str, float])
    dirty_rates: dict[ServerId, int] = field(default_factory=dict[ServerId, int])
    """Bytes of memory a second that servers of this host touch, as last measured."""
    disk_problems: dict[ServerId, str] = field(default_factory=dict[ServerId, str])
    """Servers that stand still because of their disks: why, and what to do."""

    paths: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the network is brought to the configuration. An operation passes through it once after
    its journal began, so that no older decision about its ports is still being carried out."""

    after_pause: Callable[[ServerId], None] = _nothing
    """Called once a guest goes on that stood still for long (it was suspended): its clock is behind."""

    plugging: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while servers are given vCPUs or memory. An operation passes through it, likewise, before it looks
    at what its server has."""

    console_pace: Pace = field(default_factory=lambda: Pace(CONSOLE_RATE, CONSOLE_BURST))

    switching: dict[OperationId, float] = field(default_factory=dict[OperationId, float])
    """Operations from the switch of the path to a breath after the end of the blackout, and since when."""
    turns: Turns = field(default_factory=Turns)
    """Of the moves of this host one at a time is switched."""
    _calmed: asyncio.Event = field(default_factory=asyncio.Event)

    def switches(self, operation: OperationId) -> None:
        """The path of its server is switched from here on."""
        self.switching[operation] = asyncio.get_running_loop().time()

    def frames_of(self, ports: Sequence[PortConfig]) -> Callable[[], Awaitable[int]]:
        """Counts what the server of these has sent so far; what cannot be looked at counts as nothing."""

        async def count() -> int:
            total = 0
            for port in ports:
                with suppress(Error):
                    total += await self.drivers.network.frames_from(port.id)
            return total

        return count

    def switched(self, operation: OperationId) -> None:
        """No frame of `operation` waits any more. Its guest gets a breath before other work is taken up, and
        before the next one is switched."""
        if operation in self.switching:
            loop = asyncio.get_running_loop()
            breath = breath_after(loop.time() - self.switching[operation])
            loop.call_later(breath, self._breathed, operation)
        else:
            self.turns.give_back(operation)

    def _breathed(self, operation: OperationId) -> None:
        self.switching.pop(operation, None)
        self.turns.give_back(operation)
        self._calmed.set()

    async def calm(self) -> None:
        """What can wait (reports, convergence) passes here before each piece of work: this process has one
        thread, and while a path is switched a guest waits for every message through it."""
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                while self.switching:
                    self._calmed.clear()
                    await self._calmed.wait()
        except TimeoutError:
            return

    async def pass_paths(self) -> None:
        async with self.paths:
            pass

    async def pass_plugging(self) -> None:
        async with self.plugging:
            pass

    def error_of(self, exception: Exception) -> Error:
        """`exception` as an error of the contract; one that is none is a bug, and told as such."""
        if isinstance(exception, Error):
            return exception
        self.on_bug(exception)
        record = ErrorRecord.of(exception)
        error = record.raised()
        error.kind = record.kind
        return error

    def say_anew(self, kind: str, subject: str, text: str, *, last: str) -> str:
        """Says `text` unless it is what was said `last`; returns it. What is tried again and again must not
        push everything else out of the events that wait for the orchestrator."""
        if text != last:
            self.say(kind, subject, text)
        return text

    def say(self, kind: str, subject: str, text: str, **data: str | int | float) -> None:
        self.emit(
            Event(
                host=self.settings.host, at=self.now(), kind=kind, subject=subject, text=text, data=dict(data)
            )
        )

    def network_of(self, port: PortConfig) -> NetworkConfig:
        """By the configuration held. Refused if this host has no part in that network."""
        config = self.ledger.config()
        for network in config.networks if config else ():
            if any(p.id == port.id for p in network.ports):
                return network
        raise Refused(
            f"{self.settings.host} has no network with port {port.id}",
            field="port",
            remedy="configure the network on this host first",
        )
