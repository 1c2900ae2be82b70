"""One agent, one host: serves its orchestrator and its peers, keeps its host as configured, runs operations.

Owns the tasks: the line to the orchestrator (dialled out, again and again), the listener for other agents,
the convergence loop and one task per operation. Decides nothing about placement; refuses what an older
orchestrator says. Daemons belong to the supervisor and outlive this process.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import msgspec

from nahtlos import __version__
from nahtlos.model.errors import Conflict, Error, ErrorRecord, NotFound, Refused, Unavailable
from nahtlos.model.ids import OperationId, ReleaseId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.physical.agent.consoles import serial
from nahtlos.physical.agent.consoles.displays import Displays
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.converge import Converger
from nahtlos.physical.agent.destination import DestinationMove
from nahtlos.physical.agent.gateways import ForGateway, Gateways
from nahtlos.physical.agent.guests.keeper import GuestKeeper
from nahtlos.physical.agent.leases import Leases
from nahtlos.physical.agent.ledger import Hold, Journal, Ledger, Role
from nahtlos.physical.agent.power import PowerOff
from nahtlos.physical.agent.replacement import Replacement
from nahtlos.physical.agent.report import inventory
from nahtlos.physical.agent.source import SourceMove
from nahtlos.physical.agent.suspension import Resume, Suspend
from nahtlos.physical.agent.touching import TouchRates
from nahtlos.physical.agent.volumes.freeze import check_movable, check_not_frozen, check_settled
from nahtlos.physical.agent.volumes.peers import ForVolume, answer_volume
from nahtlos.physical.agent.volumes.replicas import DiskKeeper
from nahtlos.physical.agent.volumes.steps import Stepper
from nahtlos.physical.agent.volumes.tasks import PacedRun, VolumeTaskRun, kind_of, task_for
from nahtlos.physical.ports import Drivers
from nahtlos.physical.settings import AgentSettings
from nahtlos.wire.displays import DisplayClose, DisplayOpen, DisplayRead, DisplayWrite
from nahtlos.wire.gateways import BeginGateway
from nahtlos.wire.messages import (
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    Acknowledge,
    BeginMove,
    BeginReplace,
    BeginVerify,
    CancelOperation,
    Configure,
    ConsoleRead,
    ConsoleWrite,
    Done,
    Event,
    Hello,
    LeaseAsk,
    Message,
    MoveAbandon,
    MoveCommit,
    MoveConsole,
    MoveFinished,
    MoveOrder,
    MovePrepare,
    MoveQuery,
    MoveRecover,
    MoveReturnFrames,
    MoveState,
    MoveSwitch,
    MoveTurn,
    MoveTurnBack,
    PeerHello,
    Ping,
    ReplaceOrder,
    Report,
    SetCopySpeed,
    Welcome,
)
from nahtlos.wire.session import Session
from nahtlos.wire.transport import Channel, Transport
from nahtlos.wire.volumes import BeginVolumeTask, VolumeTask

CONVERGE_SECONDS = 5.0
RETRY_SECONDS = 1.0
REPORT_SECONDS = 2.0
REPORT_PAUSE_SECONDS = 0.05
REDIAL_SECONDS = 0.3
DIAL_SECONDS = 5.0
EVENTS_KEPT = 1000

ForMove = (
    MovePrepare
    | MoveState
    | MoveTurn
    | MoveTurnBack
    | MoveSwitch
    | MoveCommit
    | MoveAbandon
    | MoveQuery
    | MoveRecover
    | MoveReturnFrames
    | MoveConsole
    | MoveFinished
)


class Agent:
    """`on_write` is the ledger's crash point for tests; `on_bug` hears of exceptions that are none of
    `model.errors`."""

    def __init__(
        self,
        settings: AgentSettings,
        drivers: Drivers,
        transport: Transport,
        ledger_path: Path | str,
        *,
        boot_id: str,
        now: Callable[[], float] = time.time,
        on_write: Callable[[str], None] | None = None,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._changed = asyncio.Event()
        self._dirty = asyncio.Event()
        self._events: asyncio.Queue[Event] = asyncio.Queue(EVENTS_KEPT)
        self._context = Context(
            settings=settings,
            drivers=drivers,
            ledger=Ledger(ledger_path, on_write),
            transport=transport,
            now=now,
            emit=self._emit,
            changed=self._note_change,
            on_bug=on_bug or _ignore,
            ask=self.ask,
            spawn=self._spawn,
        )
        self._leases = Leases(self._context, boot_id)
        self._converger = Converger(self._context, self._begin, self._leases)
        self._leases.on_lapse = self._converger.bring_network
        self._gateways = Gateways(self._context, self._converger.bring_network)
        self._displays = Displays(self._context)
        self._boot_id = boot_id
        self._on_bug = on_bug
        self._sources: dict[OperationId, SourceMove] = {}
        self._destinations: dict[OperationId, DestinationMove] = {}
        self._volume_tasks: dict[OperationId, VolumeTaskRun] = {}
        self._replacements: dict[OperationId, Replacement] = {}
        self._powers: dict[OperationId, PowerOff | Suspend | Resume] = {}
        self._operations: asyncio.TaskGroup | None = None
        self._orchestrator: Session | None = None
        """Once it has welcomed this agent."""
        self._releases: tuple[ReleaseId, ...] = ()

    async def run(self) -> None:
        """Until cancelled."""
        settings = self._context.settings
        await self._context.drivers.network.host_init()
        listener = await self._context.transport.listen(
            settings.address, settings.peer_port, self._serve_peer
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                self._operations = tasks
                self._resume_operations()
                tasks.create_task(self._converge_loop(), name="converge")
                tasks.create_task(self._leases.run(), name="leases")
                tasks.create_task(DiskKeeper(self._context).run(), name="disks")
                tasks.create_task(Stepper(self._context).run(), name="steps")
                tasks.create_task(TouchRates(self._context).run(), name="touch rates")
                tasks.create_task(self._displays.run(), name="displays")
                tasks.create_task(GuestKeeper(self._context).run(), name="guests")
                tasks.create_task(self._orchestrator_loop(), name="orchestrator")
        finally:
            self._operations = None
            await listener.close()
            self._context.ledger.close()

    def _emit(self, event: Event) -> None:
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(event)

    def _note_change(self) -> None:
        self._changed.set()
        self._dirty.set()

    # --- operations ---

    def _resume_operations(self) -> None:
        """What an earlier process of this agent began and did not end. A stuck move, too, is taken up: to
        recover is to look at what runs, and starting the agent again is what an operator can do about it."""
        for journal in self._context.ledger.operations():
            if journal.state is OperationState.STUCK and journal.kind is not OperationKind.VERIFY:
                anew = msgspec.structs.replace(journal, state=OperationState.RUNNING, error=None)
                self._start_operation(self._context.ledger.note(anew, "again"), recovering=True)
            elif journal.running:
                self._start_operation(journal, recovering=True)

    def _start_operation(self, journal: Journal, *, recovering: bool) -> None:
        assert self._operations is not None, "the agent does not run"
        match journal.role:
            case _ if journal.gateway is not None:
                work = self._gateways.run(journal, recovering=recovering)
            case Role.SOURCE:
                source = self._sources[journal.id] = SourceMove(self._context, journal)
                work = source.run(recovering=recovering)
            case Role.DESTINATION:
                target = self._destinations[journal.id] = DestinationMove(self._context, journal)
                work = target.run(recovering=recovering)
            case Role.COORDINATOR:
                task = self._volume_tasks[journal.id] = task_for(self._context, journal)
                work = task.run(recovering=recovering)
            case Role.HOST if journal.kind is OperationKind.REPLACE:
                replacement = self._replacements[journal.id] = Replacement(self._context, journal)
                work = replacement.run(recovering=recovering)
            case Role.HOST if journal.kind in (OperationKind.STOP, OperationKind.REBOOT):
                stop = self._powers[journal.id] = PowerOff(self._context, journal)
                work = stop.run(recovering=recovering)
            case Role.HOST if journal.kind in (OperationKind.SUSPEND, OperationKind.RESUME):
                suspension = Suspend if journal.kind is OperationKind.SUSPEND else Resume
                held = self._powers[journal.id] = suspension(self._context, journal)
                work = held.run(recovering=recovering)
            case Role.HOST:
                work = self._verify(journal)
        self._operations.create_task(self._guard(journal, work), name=f"operation {journal.id}")

    async def _guard(self, journal: Journal, work: Coroutine[None, None, Journal]) -> None:
        """A bug in one operation stops that operation, names it, and leaves the others alone."""
        try:
            await work
        except Exception as error:
            self._note_stuck(journal, error)
        finally:
            self._sources.pop(journal.id, None)
            self._destinations.pop(journal.id, None)
            self._gateways.ended(journal.id)
            self._volume_tasks.pop(journal.id, None)
            self._replacements.pop(journal.id, None)
            self._powers.pop(journal.id, None)
            self._context.switched(journal.id)
            self._note_change()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        assert self._operations is not None, "the agent does not run"
        self._operations.create_task(work)

    def _note_stuck(self, journal: Journal, error: Exception) -> None:
        record = ErrorRecord(
            kind="bug",
            message=f"{type(error).__name__}: {error}",
            remedy=f"read the log of the agent of {self._context.settings.host}, then restart that agent: "
            "it looks at what runs and goes on from there",
        )
        self._context.on_bug(error)
        self._context.say("operation.stuck", journal.id, record.message)
        held = self._context.ledger.operation(journal.id) or journal
        try:
            self._context.ledger.note(
                msgspec.structs.replace(held, state=OperationState.STUCK, error=record), "stuck"
            )
        except Error as unwritten:  # it stays RUNNING, with nobody at it, until this agent is restarted
            self._context.waits[journal.id] = f"{record.remedy} ({unwritten.message})"

    async def _verify(self, journal: Journal) -> Journal:
        """Boot a probe under the release. Interrupted, it is simply done again."""
        assert journal.release is not None, "a verification names its release"
        self._note_change()
        now = self._context.now
        times = {**journal.times, "begin": journal.times.get("begin", now())}
        try:
            accelerator = await self._context.drivers.hypervisor.verify(journal.release)
        except Error as error:
            ended = msgspec.structs.replace(
                journal,
                state=OperationState.UNDONE,
                step="done",
                error=ErrorRecord.of(error),
                times={**times, "done": now()},
            )
            return self._context.ledger.note(ended, "end")
        ended = msgspec.structs.replace(
            journal, state=OperationState.DONE, step="done", times={**times, "done": now()}
        )
        verified = msgspec.structs.replace(accelerator, release=journal.release)
        return self._context.ledger.verify_done(ended, verified)

    def _journals(self) -> tuple[Journal, ...]:
        """As the running operations know them: also the steps they have only marked so far."""
        return tuple(self._current(j) for j in self._context.ledger.operations())

    def _current(self, journal: Journal) -> Journal:
        running = (
            self._sources.get(journal.id)
            or self._destinations.get(journal.id)
            or self._gateways.get(journal.id)
            or self._volume_tasks.get(journal.id)
            or self._replacements.get(journal.id)
            or self._powers.get(journal.id)
        )
        return running.journal if running and journal.running else journal

    # --- convergence ---

    async def _converge_loop(self) -> None:
        while True:
            await self._context.calm()
            self._changed.clear()
            await self._converge_once()
            self._dirty.set()
            try:
                async with asyncio.timeout(RETRY_SECONDS if self._converger.problems else CONVERGE_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _converge_once(self) -> None:
        try:
            self._releases = await self._context.drivers.hypervisor.releases()
            await self._converger.attempt()
        except Error as error:
            self._converger.problems = (ErrorRecord.of(error),)
        except Exception as error:
            if self._on_bug:
                self._on_bug(error)
            self._converger.problems = (ErrorRecord.of(error),)

    # --- orchestrator ---

    async def _orchestrator_loop(self) -> None:
        settings = self._context.settings
        said = ""
        while True:
            try:
                channel = await self._context.transport.dial(
                    settings.orchestrator_address,
                    settings.orchestrator_port,
                    expect="orchestrator",
                    timeout=DIAL_SECONDS,
                )
                said = ""
                await self._converse(channel)
            except Exception as error:
                # Whatever it was, it is about this line: operations and convergence go on.
                why = self._context.error_of(error)
                said = self._context.say_anew("agent.unconnected", settings.host, str(why), last=said)
            await asyncio.sleep(REDIAL_SECONDS)

    async def _converse(self, channel: Channel) -> None:
        session = Session(channel, self._obey, on_bug=self._on_bug)
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(session.run())
                welcome = await session.request(self._hello(), timeout=DIAL_SECONDS)
                assert isinstance(welcome, Welcome), welcome
                self._context.ledger.obey(welcome.orchestrator_epoch)
                speaking = tasks.create_task(self._speak(session))
                self._orchestrator = session
                await reading
                speaking.cancel()
        except* Error as group:
            raise group.exceptions[0] from None
        finally:
            self._orchestrator = None
            await session.close()

    async def ask(self, body: Message, timeout: float) -> Message:
        """The orchestrator's answer. Unavailable while none is connected."""
        if self._orchestrator is None:
            raise Unavailable("no orchestrator is connected", remedy="it dials again by itself")
        return await self._orchestrator.request(body, timeout=timeout)

    def _hello(self) -> Hello:
        return Hello(
            host=self._context.settings.host,
            role=self._context.settings.role,
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL_MAX,
            agent_version=__version__,
            capabilities=(
                "move",
                "verify",
                "console",
                "volumes",
                "gateways",
                "replace",
                "power",
                "display",
                "data-places",
                "rebuild-in-use",
                "snapshot-move",
            ),
            boot_id=self._boot_id,
            orchestrator_epoch=self._context.ledger.orchestrator_epoch(),
        )

    async def _speak(self, session: Session) -> None:
        """Reports: at once after a change (but bundled), and regularly; events in between."""
        # Files are checked anew when an agent starts; a report before that would say there is no release.
        self._releases = await self._context.drivers.hypervisor.releases()
        while True:
            await self._context.calm()
            self._dirty.clear()
            while not self._events.empty():
                await session.notify(self._events.get_nowait())
            report = await inventory(
                self._context,
                self._converger,
                self._journals(),
                self._boot_id,
                self._releases,
                self._leases,
            )
            await session.notify(Report(inventory=report))
            await asyncio.sleep(REPORT_PAUSE_SECONDS)
            try:
                async with asyncio.timeout(REPORT_SECONDS):
                    await self._dirty.wait()
            except TimeoutError:
                pass

    async def _obey(self, body: Message, epoch: int) -> Message:
        self._context.ledger.obey(epoch)
        match body:
            case Configure():
                if body.config.host != self._context.settings.host:
                    raise Refused(f"configuration is for {body.config.host}", field="host")
                news = self._context.ledger.accept(body.config)
                self._leases.configured()
                if news:
                    self._note_change()
            case BeginMove():
                self._begin_move(body.order)
            case BeginReplace():
                self._begin_replace(body.order)
            case BeginVerify():
                self._begin(
                    Journal(id=body.id, kind=OperationKind.VERIFY, role=Role.HOST, release=body.release)
                )
            case BeginVolumeTask():
                self._begin_volume_task(body.order)
            case BeginGateway():
                await self._gateways.supersede(body.order)
                self._begin(self._gateways.begun(body.order))
            case CancelOperation():
                self._cancel(body.id)
            case SetCopySpeed():
                self._set_speed(body)
            case Acknowledge():
                self._context.ledger.acknowledge(body.ids)
            case ConsoleRead():
                return await serial.read(self._context, body)
            case DisplayOpen() | DisplayRead() | DisplayWrite() | DisplayClose():
                return await self._displays.answer(body)
            case ConsoleWrite():
                return await serial.write(self._context, body)
            case Ping():
                pass
            case _:
                raise Refused(f"{type(body).__name__} is not for an agent", field="message")
        return Done()

    def _begin_move(self, order: MoveOrder) -> None:
        me = self._context.settings.host
        if me not in (order.source, order.destination) or order.source == order.destination:
            raise Refused(f"the move {order.source} -> {order.destination} is not for {me}", field="order")
        role = Role.SOURCE if me == order.source else Role.DESTINATION
        known = self._context.ledger.operation(order.id)
        if known is None and role is Role.SOURCE:
            held = self._context.ledger.owner(order.server.spec.id)
            if held is None or held.hold is not Hold.OWNED or held.epoch != order.server.epoch:
                raise Conflict(
                    f"{me} does not own {order.server.spec.id} by epoch {order.server.epoch}", field="server"
                )
            check_movable(self._context, held, order.server)
        self._begin(Journal(id=order.id, kind=OperationKind.MOVE, role=role, order=order))

    def _begin_replace(self, order: ReplaceOrder) -> None:
        me = self._context.settings.host
        if order.host != me:
            raise Refused(f"{order.id} is for {order.host}, not {me}", field="order")
        held = self._context.ledger.owner(order.server.spec.id)
        check_not_frozen(self._context, order.server.spec.id)
        if self._context.ledger.operation(order.id) is None and held is not None:
            check_settled(self._context, held, order.server)
        self._begin(Journal(id=order.id, kind=OperationKind.REPLACE, role=Role.HOST, replace=order))

    def _begin_volume_task(self, order: VolumeTask) -> None:
        me = self._context.settings.host
        if order.coordinator != me:
            raise Refused(
                f"operation {order.id} is coordinated by {order.coordinator}, not {me}", field="order"
            )
        self._begin(Journal(id=order.id, kind=kind_of(order), role=Role.COORDINATOR, task=order))

    def _begin(self, journal: Journal) -> None:
        if self._context.ledger.operation(journal.id) is not None:
            return
        begun = msgspec.structs.replace(journal, times={"begin": self._context.now()})
        self._start_operation(self._context.ledger.begin(begun), recovering=False)
        self._note_change()

    def _cancel(self, operation: OperationId) -> None:
        running = (
            self._sources.get(operation)
            or self._gateways.get(operation)
            or self._volume_tasks.get(operation)
            or self._replacements.get(operation)
        )
        if running:
            running.cancel()
        elif arriving := self._destinations.get(operation):
            arriving.source_fenced()
        elif self._context.ledger.operation(operation) is None:
            raise NotFound(f"operation {operation} is not known here", field="operation")

    def _set_speed(self, body: SetCopySpeed) -> None:
        task = self._volume_tasks.get(body.id)
        if not isinstance(task, PacedRun):
            raise NotFound(f"no copy {body.id} runs here", field="operation")
        task.set_speed(body.bytes_per_second)

    # --- peers ---

    async def _serve_peer(self, channel: Channel) -> None:
        spoken: set[OperationId] = set()

        async def answer(body: Message, epoch: int) -> Message:
            if isinstance(body, PeerHello):
                return _welcome(body, channel.peer)
            if isinstance(body, Ping):
                return Done()
            if isinstance(body, LeaseAsk):
                return self._leases.answer(body, channel.peer)
            if isinstance(body, ForVolume):
                return await answer_volume(self._context, body, channel.peer)
            if isinstance(body, ForGateway):
                return await self._gateways.answer(body, channel.peer)
            if not isinstance(body, ForMove):
                raise Refused(f"{type(body).__name__} is not for a peer", field="message")
            spoken.add(body.id)
            return await self._answer_move(body, channel.peer)

        session = Session(channel, answer, on_bug=self._on_bug)
        try:
            await session.run()
        finally:
            for operation in spoken:
                move = self._destinations.get(operation)
                if move:
                    move.source_lost()

    async def _answer_move(self, body: ForMove, peer: str) -> Message:
        journal = self._context.ledger.operation(body.id)
        if journal is None or journal.role is not Role.DESTINATION:
            raise NotFound(
                f"{self._context.settings.host} has no order for operation {body.id}",
                field="operation",
                remedy="the orchestrator orders the destination before the source",
            )
        if peer != f"host/{journal.move().source}":
            raise Refused(f"{peer} is not the source of {body.id}", field="peer")
        move = self._destinations.get(body.id) or DestinationMove(self._context, journal)
        return await move.answer(body)


def _ignore(error: BaseException) -> None:
    """Nobody wants to hear of bugs."""


def _welcome(hello: PeerHello, peer: str) -> Welcome:
    if peer != f"host/{hello.host}":
        raise Refused(f"{peer} cannot speak for {hello.host}", field="host")
    protocol = min(hello.protocol_max, PROTOCOL_MAX)
    if protocol < max(hello.protocol_min, PROTOCOL_MIN):
        raise Refused(
            f"no common protocol: theirs {hello.protocol_min}..{hello.protocol_max}, "
            f"ours {PROTOCOL_MIN}..{PROTOCOL_MAX}",
            field="protocol",
            remedy="upgrade the older agent first",
        )
    return Welcome(protocol=protocol)
