"""Conversations with agents: who is there, what they report, what they are told.

    channel --Hello accepted--> greeted --first Report--> connected --silence, break, newer channel--> gone

An agent speaks for the host its certificate names and for no other. Everything here is memory of open
connections; a restarted orchestrator starts with none and is told everything again. Decides nothing about
servers: orders come from the planning loop (`post`), reports go to the store.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

import msgspec

from nahtlos import __version__
from nahtlos.model.errors import Conflict, Error, ErrorRecord, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId, KeyId, OperationId
from nahtlos.model.inventory import HostInventory
from nahtlos.runtime.controllers import replica_records
from nahtlos.runtime.controllers.event_log import EventLog
from nahtlos.runtime.executor.act import Outbox
from nahtlos.runtime.executor.decide import HostOrders
from nahtlos.runtime.store import availability, intent, inventories, operations
from nahtlos.runtime.store.events import EventDraft
from nahtlos.runtime.store.store import Store
from nahtlos.wire.messages import (
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    Done,
    Event,
    Hello,
    Message,
    Ping,
    Report,
    Welcome,
)
from nahtlos.wire.session import Session
from nahtlos.wire.transport import Channel
from nahtlos.wire.volumes import KeyData, KeyRead, ReplicaLost

HELLO_SECONDS = 10.0
PING_SECONDS = 2.0
PONG_SECONDS = 8.0
"""An agent that does not answer a ping for that long counts as disconnected. Longer than a host that is
busy with emulated guests may keep its agent from running."""
STORE_SECONDS = 2.0
"""A report that says nothing new is written down that often."""

UPGRADE_FIRST = f"orchestrators (this one is {__version__}) are upgraded before agents"

_log = logging.getLogger("nahtlos.runtime.agents")


class _Over(Exception):
    """Ends a connection's tasks."""


class _Connection:
    """One channel to one agent, from its Hello on."""

    def __init__(self, session: Session, outbox: Outbox) -> None:
        self.session = session
        self.outbox = outbox
        self.hello: Hello | None = None
        self.greeted = asyncio.Event()
        self.ended = asyncio.Event()
        self.reported = False


class Agents:
    """`epoch`: the epoch under which this orchestrator may act now, if any. `wake`: something changed that
    may call for a new plan."""

    def __init__(
        self, store: Store, log: EventLog, *, epoch: Callable[[], int | None], wake: Callable[[], None]
    ) -> None:
        self._store = store
        self._log = log
        self._epoch = epoch
        self._wake = wake
        self._connections: dict[HostId, _Connection] = {}
        self._latest: dict[HostId, HostInventory] = {}
        self._stored_at: dict[HostId, float] = {}
        self.secret_for: Callable[[HostId, KeyId], Awaitable[bytes]] = _no_keyring
        """A volume's key for a host that may have it (`keys.VolumeKeys`)."""
        self.changes = 0
        """Rises whenever `latest` has news or `connected` changes."""

    # --- what others ask ---

    @property
    def connected(self) -> frozenset[HostId]:
        """Hosts whose agent is there and has reported on this connection."""
        return frozenset(host for host, c in self._connections.items() if c.reported)

    @property
    def latest(self) -> Mapping[HostId, HostInventory]:
        """Reports that came in since this process began; at least as new as the stored ones."""
        return self._latest

    def lacking(self, capability: str, hosts: Iterable[HostId]) -> tuple[HostId, ...]:
        """Those of `hosts` whose agent is here and does not have it."""
        there = ((host, self._connections.get(host)) for host in hosts)
        hellos = ((host, c.hello) for host, c in there if c is not None and c.hello is not None)
        return tuple(host for host, hello in hellos if capability not in hello.capabilities)

    def post(self, orders: Mapping[HostId, HostOrders]) -> None:
        for host, connection in self._connections.items():
            if host in orders:
                connection.outbox.post(orders[host])

    async def request(self, host: HostId, body: Message, *, timeout: float) -> Message:
        connection = self._connections.get(host)
        if connection is None:
            raise Unavailable(f"the agent of {host} is not connected", remedy="try again when it is back")
        return await connection.session.request(body, timeout=timeout)

    async def disconnect_all(self) -> None:
        """This orchestrator does not lead any more."""
        for connection in tuple(self._connections.values()):
            connection.ended.set()
        self._connections.clear()
        self.changes += 1

    # --- one connection ---

    async def serve(self, channel: Channel) -> None:
        """`OnChannel` of the listener for agents. Returns when the conversation is over."""
        epoch = self._epoch()
        if epoch is None:
            await channel.close()  # the agent dials again, and reaches whoever leads then
            return
        connection = self._open(channel, epoch)
        try:
            await self._converse(connection)
        finally:
            self._forget(connection)
            await connection.session.close()

    def _open(self, channel: Channel, epoch: int) -> _Connection:
        async def handle(body: Message, _epoch: int) -> Message:
            return await self._answer(connection, body)

        def on_bug(error: BaseException) -> None:
            _log.error("bug while answering %s", channel.peer, exc_info=error)

        async def on_refused(operation: OperationId, error: ErrorRecord) -> None:
            await self._note_refusal(connection, operation, error)

        def on_trouble(error: Error) -> None:
            self._note_trouble(connection, error)

        session = Session(channel, handle, epoch=epoch, on_bug=on_bug)
        outbox = Outbox(session, on_refused=on_refused, on_accepted=self._wake, on_trouble=on_trouble)
        connection = _Connection(session, outbox)
        return connection

    async def _converse(self, connection: _Connection) -> None:
        async def until_over(work: Coroutine[Any, Any, object]) -> None:
            await work
            raise _Over

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(until_over(connection.session.run()))
                tasks.create_task(until_over(connection.ended.wait()))
                tasks.create_task(until_over(self._watch(connection)))
                tasks.create_task(until_over(connection.outbox.run()))
        except* _Over:
            pass
        except* msgspec.MsgspecError as group:
            why, hello = group.exceptions[0], connection.hello
            _log.warning("%s sent what is no message: %s", connection.session.peer, why)
            if hello is not None:
                version = f"what agent {hello.agent_version} says cannot be read here"
                self._say("agent.unreadable", hello.host, f"{version} ({why}): {UPGRADE_FIRST}")

    async def _watch(self, connection: _Connection) -> None:
        """Returns when the agent has fallen silent, or never says who it is."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                await connection.greeted.wait()
            while True:
                await asyncio.sleep(PING_SECONDS)
                await connection.session.request(Ping(), timeout=PONG_SECONDS)
        except (Error, TimeoutError):
            return

    # --- what agents say ---

    async def _answer(self, connection: _Connection, body: Message) -> Message:
        if isinstance(body, Hello):
            return await self._greet(connection, body)
        if connection.hello is None:
            raise Refused(f"{type(body).__name__} before Hello", field="message", remedy="say Hello first")
        match body:
            case Report():
                await self._take_report(connection, connection.hello.host, body.inventory)
            case Event():
                self._take_event(connection.hello.host, body)
            case KeyRead():
                return KeyData(secret=await self.secret_for(connection.hello.host, body.key))
            case ReplicaLost():
                return await self._lose_copy(connection.hello.host, body, connection.session.epoch)
            case Ping():
                pass
            case _:
                raise Refused(f"{type(body).__name__} is not for an orchestrator", field="message")
        return Done()

    async def _lose_copy(self, host: HostId, body: ReplicaLost, epoch: int) -> Message:
        """The server stands still until this is answered."""
        answer = await replica_records.lose(self._store, epoch, host, body)
        self._say("volume.replica-lost", body.volume, f"the copy on {body.lost} is not current any more")
        self._wake()
        return answer

    async def _greet(self, connection: _Connection, hello: Hello) -> Welcome:
        epoch = connection.session.epoch
        try:
            protocol = await self._check_hello(connection, hello, epoch)
        except Error as error:
            self._say("agent.refused", hello.host, f"{connection.session.peer}: {error}")
            raise
        replaced = self._connections.get(hello.host)
        if replaced is not None:
            replaced.ended.set()
        connection.hello = hello
        self._connections[hello.host] = connection
        connection.greeted.set()
        self._say("agent.connected", hello.host, f"agent {hello.agent_version} is connected")
        if is_newer(hello.agent_version, __version__):
            self._say(
                "agent.newer", hello.host, f"{hello.agent_version} of its agent is newer: {UPGRADE_FIRST}"
            )
        return Welcome(protocol=protocol, orchestrator_epoch=epoch)

    async def _check_hello(self, connection: _Connection, hello: Hello, epoch: int) -> int:
        """The protocol both will speak."""
        if connection.hello is not None:
            raise Conflict("Hello was said already", field="message")
        peer = connection.session.peer
        if peer != f"host/{hello.host}":
            raise Refused(f"{peer} cannot speak for {hello.host}", field="host")
        protocol = min(hello.protocol_max, PROTOCOL_MAX)
        if protocol < max(hello.protocol_min, PROTOCOL_MIN):
            raise Refused(
                f"no common protocol: {hello.protocol_min}..{hello.protocol_max} and "
                f"{PROTOCOL_MIN}..{PROTOCOL_MAX}",
                field="protocol",
                remedy="upgrade the older of the two first",
            )
        async with self._store.reading() as tx:
            known = (await intent.hosts(tx)).get(hello.host)
        if known is None:
            raise Refused(
                f"{hello.host} has not joined", field="host", remedy="join it with a one-time token"
            )
        if known.spec.role is not hello.role:
            raise Refused(f"{hello.host} joined as {known.spec.role}, not as {hello.role}", field="role")
        if hello.orchestrator_epoch > epoch:
            raise Stale(
                f"{hello.host} has obeyed an orchestrator of epoch {hello.orchestrator_epoch}; "
                f"this one's is {epoch}",
                field="orchestrator_epoch",
                remedy="another orchestrator leads, or this one's database is an old copy",
            )
        return protocol

    async def _take_report(self, connection: _Connection, host: HostId, inventory: HostInventory) -> None:
        if inventory.host != host:
            raise Refused(f"{host} cannot report for {inventory.host}", field="host")
        if self._connections.get(host) is not connection:
            raise Stale(f"a newer connection of {host} has taken over")
        before = self._latest.get(host)
        news = before is None or _essence(before) != _essence(inventory)
        first = not connection.reported
        self._latest[host] = inventory
        connection.reported = True
        self.changes += news or first
        connection.outbox.reported()
        now = self._store.clock()
        if news or first or now - self._stored_at.get(host, 0.0) >= STORE_SECONDS:
            self._stored_at[host] = now
            async with self._store.writing() as tx:
                await availability.hear(tx, await inventories.received(tx), now)
                await inventories.put(tx, inventory, now)
        if news or first:
            self._wake()

    def _take_event(self, host: HostId, event: Event) -> None:
        if event.host != host:
            raise Refused(f"{host} cannot speak for {event.host}", field="host")
        data = {**event.data, "host": host}
        draft = EventDraft(kind=event.kind, subject=event.subject, text=event.text, data=data, at=event.at)
        self._log.say(draft)

    # --- what comes of orders ---

    async def _note_refusal(
        self, connection: _Connection, operation: OperationId, error: ErrorRecord
    ) -> None:
        hello = connection.hello
        if hello is None:
            return
        self._say("operation.refused", operation, f"{hello.host} will not begin it: {error.message}")
        async with self._store.deciding(connection.session.epoch) as tx:
            await operations.refuse(tx, operation, hello.host, error)
        self._wake()

    def _note_trouble(self, connection: _Connection, error: Error) -> None:
        host = connection.hello.host if connection.hello else connection.session.peer
        if isinstance(error, Unavailable):
            _log.info("%s: %s", host, error)
            return
        self._say("agent.trouble", host, f"{host} refused an order: {error}")
        if isinstance(error, Stale):
            connection.ended.set()

    def _forget(self, connection: _Connection) -> None:
        hello = connection.hello
        if hello is None or self._connections.get(hello.host) is not connection:
            return
        del self._connections[hello.host]
        self.changes += 1
        self._say("agent.lost", hello.host, "agent is not connected any more")
        self._wake()

    def _say(self, kind: str, subject: str, text: str) -> None:
        self._log.say(EventDraft(kind=kind, subject=subject, text=text))


async def _no_keyring(host: HostId, key: KeyId) -> bytes:
    raise Refused(
        "this orchestrator has no keyring", field="key", remedy="start it with one, beside its authority"
    )


def is_newer(version: str, than: str) -> bool:
    """By the numbers in both; what has none is no newer."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)]

    return numbers(version) > numbers(than)


def _essence(inventory: HostInventory) -> HostInventory:
    """Without what changes with every report."""
    return msgspec.structs.replace(
        inventory,
        taken_at=0.0,
        servers=tuple(msgspec.structs.replace(s, since=0.0) for s in inventory.servers),
        operations=tuple(msgspec.structs.replace(o, progress=0.0) for o in inventory.operations),
    )
