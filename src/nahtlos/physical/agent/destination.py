"""The destination's half of a move: it alone decides who owns the server.

    begin -> incoming -> (switched) -> committed -> (memory follows) -> done
        \\________\\___________\\
                abandoned: durable, final; a source that stopped may then resume

Driven by the source's messages. Each is answered the same when it is repeated. A destination that hears
nothing from its source for SILENCE_SECONDS gives up what it has not committed; at once if it is told that its
source is fenced.

By post-copy a server counts as arrived once it may run, though memory is still to follow (`following`). Its
source cannot run it any more by then: it is taken even if that asks for it to be given up.
"""

import asyncio

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord, Refused, Stale, Unavailable
from nahtlos.model.ids import PortId, ReleaseId
from nahtlos.model.inventory import OperationState, RunState
from nahtlos.model.nouns import HostRole
from nahtlos.physical.agent.consoles import serial
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.following import (
    WATCH_SECONDS,
    Following,
    check_missed,
    ended_by_source,
    looked,
    wait_anew,
)
from nahtlos.physical.agent.giving import with_vcpus
from nahtlos.physical.agent.hearing import ANSWERED, first_heard
from nahtlos.physical.agent.ledger import Hold, Journal
from nahtlos.physical.agent.report import RESULT
from nahtlos.physical.agent.volumes.freeze import check_paths
from nahtlos.physical.ports import Missing, MoveRole, VmmId, VmmStatus
from nahtlos.wire.messages import (
    Decision,
    Done,
    Message,
    MoveAbandon,
    MoveCommit,
    MoveConsole,
    MoveFinished,
    MoveOutcome,
    MovePrepare,
    MoveQuery,
    MoveReady,
    MoveRecover,
    MoveRecovers,
    MoveReturnFrames,
    MoveState,
    MoveSwitch,
    MoveTurn,
    MoveTurnBack,
    MoveTurnSaid,
)

SILENCE_SECONDS = 30.0
INCOMING_SECONDS = 25.0
FINISH_GRACE_SECONDS = 10.0
RESUME_AGAIN_SECONDS = 0.1
CLEAR_AGAIN_SECONDS = 0.5
LOST_SECONDS = 1.0
"""After the source's connection broke: time for it to come back before a server that has arrived
completely is taken without its word."""


class DestinationMove:
    """One move to this host."""

    def __init__(self, context: Context, journal: Journal) -> None:
        self._context = context
        self._order = journal.move()
        self._vmm = VmmId(self._order.server.spec.id, self._order.epoch)
        self._lock = asyncio.Lock()
        """One message at a time prepares or commits; abandoning never waits for it."""
        self._heard = asyncio.Event()
        self._ended = asyncio.Event()
        self._lost = False
        self._fenced = False
        """The source runs nothing any more, and will say nothing."""
        self._path_is_back = False
        """The source has asked for its frames: nothing more is to be waited for before clearing away."""
        self._ready: MoveReady | None = None
        self._following: Following | None = None
        """Memory of the server is still to come."""
        self._marks: dict[str, float] = {}
        self._listened = self._listens = False
        self._finished = False
        """The source has said so, or was not heard for long."""
        self._said = ""

    @property
    def journal(self) -> Journal:
        journal = self._context.ledger.operation(self._order.id)
        assert journal is not None, f"the ledger lost operation {self._order.id}"
        return msgspec.structs.replace(journal, times={**journal.times, **self._marks})

    async def run(self, *, recovering: bool) -> Journal:
        """Until the operation has ended here."""
        recovered = not recovering
        while not recovered:
            try:
                await self._recover()
                recovered = True
            except Exception as error:
                self._say_waits(error)
                await asyncio.sleep(CLEAR_AGAIN_SECONDS)
        while not self._ended.is_set():
            await self._listen_for_source()
        return self.journal

    def source_lost(self) -> None:
        """The connection the source spoke through broke. It may come back, and asks for its turn again."""
        if self._order.id not in self._context.switching:
            self._context.turns.give_back(self._order.id)
        self._lost = True
        self._heard.set()

    def source_fenced(self) -> None:
        """Told by the orchestrator. What has arrived whole is taken; nothing else is waited for."""
        self._fenced = True
        self._heard.set()

    async def _listen_for_source(self) -> None:
        self._heard.clear()
        try:
            async with asyncio.timeout(self._patience()):
                await self._heard.wait()
        except TimeoutError:
            try:
                await self._after_silence()
            except Exception as error:
                self._say_waits(error)

    def _say_waits(self, error: Exception) -> None:
        why = str(self._context.error_of(error))
        self._context.say("move.waits", self._vmm.server, why, id=self._order.id)

    def _patience(self) -> float:
        """Seconds of silence after which this host acts alone."""
        if self.journal.decision is Decision.COMMITTED and self._following is not None:
            return WATCH_SECONDS
        if self._path_is_back or self._fenced:
            return CLEAR_AGAIN_SECONDS
        if self.journal.decision is Decision.COMMITTED:
            return FINISH_GRACE_SECONDS
        return LOST_SECONDS if self._lost else SILENCE_SECONDS

    async def _after_silence(self) -> None:
        if self._lock.locked():
            return
        if self.journal.decision is Decision.COMMITTED:
            await self._look_at_what_follows() if self._following else self._finish()
        elif await self._arrived():
            await self._take()
        elif self._lost and not self._fenced:
            self._lost = False  # nothing to be gained by haste: full patience from here
        else:
            why = "is fenced" if self._fenced else f"was silent for {SILENCE_SECONDS:g} s"
            self._abandon(Unavailable(f"{self._order.source} {why}"))
            await self._clear_away()

    async def _arrived(self) -> bool:
        """Everything was received. A source sends its last byte only after it was stopped for good, so
        this host may take the server without being told."""
        vmm = await self._observed()
        return (
            self.journal.decision is Decision.UNDECIDED
            and vmm is not None
            and vmm.migrated
            and vmm.state is RunState.PAUSED
        )

    async def _look_at_what_follows(self) -> None:
        assert self._following is not None, "nothing follows"
        now, vmm = asyncio.get_running_loop().time(), await self._observed()
        self._following, fate = looked(self._following, vmm, now)
        if fate.lost:
            self._context.say("server.lost", self._vmm.server, f"lost: {fate.lost}", id=self._order.id)
            await self._context.drivers.hypervisor.kill(self._vmm)
            self._note_lost(fate.lost)
        if fate.over or fate.lost:
            ended, self._following = self._following.ending is not None or bool(fate.lost), None
            if ended:
                self._finish()
            self._context.changed()

    async def _observed(self) -> VmmStatus | None:
        vmms = await self._context.drivers.hypervisor.observe()
        return next((v for v in vmms if v.id == self._vmm), None)

    async def _take(self) -> None:
        try:
            self._context.ledger.take(self._order.id, self._context.now())
        except Stale as error:
            self._abandon(error)
            raise
        await self._make_run()

    # --- messages ---

    async def answer(self, body: Message) -> Message:
        self._lost = False
        self._heard.set()
        match body:
            case MovePrepare():
                async with self._lock:
                    return await self._prepare(body)
            case MoveState():
                async with self._lock:
                    self._check_prepared()
                    await self._take_up(body.states)
                    return Done()
            case MoveTurn():
                self._check_undecided()
                turns, id_ = self._context.turns, self._order.id
                granted = turns.ask(id_, asyncio.get_running_loop().time())
                return MoveTurnSaid(id=id_, granted=granted, ahead=turns.ahead(id_))
            case MoveTurnBack():
                self._context.turns.give_back(self._order.id)
                return Done()
            case MoveSwitch():
                return await self._switch(body)
            case MoveCommit():
                async with self._lock:
                    return await self._commit(body)
            case MoveAbandon():
                if await self._cannot_go_back():
                    await self._take()
                self._abandon(Unavailable(f"given up by {self._order.source}"))
                return self._outcome()
            case MoveReturnFrames():
                self._path_is_back = True
                await self._clear_away()
                return Done()
            case MoveConsole():
                serial.arrived(self._context, self._vmm, body)
                return Done()
            case MoveRecover():
                return await self._wait_anew()
            case MoveFinished():
                if self._following is None:
                    self._finish()
                else:
                    self._following = ended_by_source(self._following, asyncio.get_running_loop().time())
                return Done()
            case MoveQuery():
                return self._outcome()
            case _:
                raise Refused(f"{type(body).__name__} is not for the destination of a move", field="message")

    def _check_undecided(self) -> None:
        if self.journal.decision is not Decision.UNDECIDED:
            raise Conflict(f"operation {self._order.id} is {self.journal.decision}", field="operation")

    async def _prepare(self, body: MovePrepare) -> MoveReady:
        self._check_undecided()
        if body.epoch != self._order.server.epoch or body.server != self._vmm.server:
            raise Stale(f"the order is for {self._vmm.server} at epoch {self._order.server.epoch}")
        if body.volumes:  # else a source of an earlier release
            check_paths(self._order.server, body.volumes)
        if self._ready:
            return self._ready
        drivers, order = self._context.drivers, self._order
        release = self._release()
        await self._context.pass_paths()
        for port in order.ports:
            network = self._context.network_of(port)
            await drivers.network.port_create(port, network, deliver=False)
            await drivers.network.move_prepare(
                port, network, MoveRole.DESTINATION, order.source_address, marked=body.marks
            )
        server = with_vcpus(order.server, body.vcpus)
        await self._context.calm()  # a process that starts takes a core for itself
        why = await drivers.hypervisor.why_no_post_copy() if body.post_copy else ""
        follows = body.post_copy and not why
        channels = 1 if follows else max(1, body.channels)
        compressed = body.compressed and not follows
        await drivers.hypervisor.incoming_start(
            server, order.epoch, release, post_copy=follows, channels=channels, compressed=compressed
        )
        uri = await drivers.hypervisor.incoming_listen(self._vmm, order.destination_address)
        for port in order.ports:
            if not await drivers.network.move_sacrifice(port.id):
                raise Unavailable(f"the waiting VMM did not take the sacrificial frame at {port.id}")
        self._check_undecided()
        self._step("incoming")
        self._ready = MoveReady(
            uri=uri,
            believes_marks=body.marks,
            post_copy=follows,
            why_no_post_copy=why,
            channels=channels,
            compressed=compressed,
        )
        return self._ready

    async def _may_follow(self) -> bool:
        """Its source may have handed it over by post-copy while this agent was away: what arrives is waited
        for, and given up only after the usual silence. What is not that far `_check_prepared` refuses."""
        if not self._order.server.spec.allow_post_copy:
            return False
        vmm = await self._observed_if_it_answers()
        return vmm is not None and vmm.state is RunState.INCOMING

    async def _cannot_go_back(self) -> bool:
        """What may run here, and lacks memory, may run nowhere else any more."""
        undecided = self.journal.decision is Decision.UNDECIDED
        if not undecided or not self._order.server.spec.allow_post_copy:
            return False
        vmm = await self._observed_if_it_answers()
        return vmm is not None and vmm.migrated and vmm.missing is not Missing.NOTHING

    async def _wait_anew(self) -> MoveRecovers:
        if self.journal.decision is not Decision.COMMITTED:
            raise Conflict(f"operation {self._order.id} is {self.journal.decision}", field="operation")
        check_missed(await self._observed())
        uri = await wait_anew(self._context, self._vmm, self._order.destination_address)
        return MoveRecovers(id=self._order.id, uri=uri)

    def _release(self) -> ReleaseId:
        config = self._context.ledger.config()
        if config is None or config.release is None or self._context.settings.role is not HostRole.COMPUTE:
            raise Refused(
                f"{self._context.settings.host} runs no servers",
                field="destination",
                remedy="choose a compute host that has a release",
            )
        return config.release

    def _check_prepared(self) -> None:
        self._check_undecided()
        if self._ready is None:
            raise Conflict("nothing was prepared since this agent started", field="operation")

    async def _take_up(self, states: dict[PortId, bytes]) -> None:
        """What the source's firewall remembers. If the move is abandoned, it is forgotten with the ports."""
        for port, state in states.items():
            if all(port != own.id for own in self._order.ports):
                raise Refused(f"{port} does not take part in {self._order.id}", field="states")
            for words in await self._context.drivers.network.move_state_load(port, state):
                self._context.say("move.state", self._vmm.server, words, id=self._order.id)

    async def _switch(self, body: MoveSwitch) -> Message:
        self._check_prepared()
        await self._take_up(body.states)
        self._context.switches(self._order.id)
        for port in self._order.ports:
            await self._context.drivers.network.move_switch(
                port, self._context.network_of(port), MoveRole.DESTINATION
            )
        self._marks["switch"] = self._context.now()
        return Done()

    async def _commit(self, body: MoveCommit) -> MoveOutcome:
        if self.journal.decision is Decision.UNDECIDED:
            try:
                await self._take_up_at_last(body)  # while the rest of the guest's memory is on its way
                await self._context.drivers.hypervisor.incoming_wait(self._vmm, timeout=INCOMING_SECONDS)
                await self._take()
                return self._outcome()
            except Conflict:
                return self._outcome()  # abandoned while we waited
            except Error as error:
                if not (body.post_copy and await self._lives()):
                    self._abandon(error)
                return self._outcome()
        if self.journal.decision is Decision.COMMITTED and await self._lives():
            await self._make_run()
        return self._outcome()

    async def _take_up_at_last(self, body: MoveCommit) -> None:
        """What cannot be taken up costs connections; a server that can run nowhere else is not given up for
        that."""
        for last in (False, True):
            try:
                await self._take_up(body.states)
            except Error as error:
                if not body.post_copy:
                    raise
                if last:
                    self._context.say("move.state", self._vmm.server, f"connections may break: {error}")
            else:
                return

    async def _lives(self) -> bool:
        """Its VMM, unless that is known to have ended."""
        try:
            vmm = await self._observed()
        except Error:
            return True
        return vmm is not None and vmm.state is not RunState.CRASHED

    def _outcome(self) -> MoveOutcome:
        journal = self.journal
        return MoveOutcome(
            id=journal.id,
            decision=journal.decision,
            running_since=journal.times.get("running"),
            error=journal.error,
        )

    # --- acts ---

    async def _make_run(self) -> None:
        """Committed: the guest runs here, whatever it takes. A VMM that died is left to convergence,
        which starts the server again; so is one that waits for its memory, which is watched from here on."""
        while not await self._let_run():
            await asyncio.sleep(RESUME_AGAIN_SECONDS)
        self._context.waits.pop(self._order.id, None)
        self._context.switched(self._order.id)
        await self._note_what_follows()
        for port in self._order.ports:
            network = self._context.network_of(port)
            if "switch" not in self._marks:  # taken without MoveSwitch, or it was told to an earlier process
                await self._context.drivers.network.move_switch(port, network, MoveRole.DESTINATION)
            await self._context.drivers.network.move_settle(port, network, MoveRole.DESTINATION)
        self._context.changed()

    async def _note_what_follows(self) -> None:
        if not self._order.server.spec.allow_post_copy:
            return
        vmm = await self._observed_if_it_answers()
        if vmm is not None and vmm.missing is not Missing.NOTHING and self._following is None:
            self._following = Following(since=asyncio.get_running_loop().time())
            self._heard.set()

    async def _observed_if_it_answers(self) -> VmmStatus | None:
        try:
            return await self._observed()
        except Error:
            return None

    async def _let_run(self) -> bool:
        """False if it has to be tried again."""
        try:
            await self._context.drivers.hypervisor.resume(self._vmm)
        except Error as error:
            self._context.waits[self._order.id] = f"the hypervisor to resume the server ({error.message})"
            text = f"not resumed yet: {error}"
            self._said = self._context.say_anew("move.resume", self._vmm.server, text, last=self._said)
            return await self._beyond_resuming(unanswered=isinstance(error, Unavailable))
        self._marks.setdefault("running", self._context.now())
        if not self._listened:
            self._listened = True
            self._context.spawn(self._listen())
        return True

    async def _listen(self) -> None:
        """Beside everything else; the end waits for it."""
        self._listens = True
        frames = self._context.frames_of(self._order.ports)
        heard = await first_heard(frames, self._context.now, announced=True)
        if heard is not None:
            self._marks[ANSWERED] = heard
        self._listens = False
        if self._finished:
            self._finish()

    async def _beyond_resuming(self, *, unanswered: bool) -> bool:
        try:
            vmm = await self._observed()
        except Error:
            return False
        if vmm is None or vmm.state is RunState.CRASHED:
            return True
        return vmm.missing is Missing.CUT or (unanswered and vmm.missing is Missing.COMING)

    def _abandon(self, error: Error) -> None:
        before = self.journal.decision
        self._context.switched(self._order.id)
        journal = self._context.ledger.abandon(self._order.id, ErrorRecord.of(error))
        if before is Decision.UNDECIDED and journal.decision is Decision.ABANDONED:
            self._context.say("move.abandoned", self._vmm.server, str(error), id=self._order.id)
            self._context.changed()

    async def _clear_away(self) -> None:
        """After abandoning: frames parked here go back, the waiting VMM goes. Only then is it ended."""
        journal = self.journal
        if journal.decision is not Decision.ABANDONED or not journal.running:
            return
        drivers = self._context.drivers
        await drivers.hypervisor.kill(self._vmm)  # ends what still prepares or waits under the lock
        async with self._lock:
            if not self.journal.running:
                return
            await drivers.hypervisor.kill(self._vmm)
            await drivers.hypervisor.console_forget(self._vmm)
            for port in self._order.ports:
                await drivers.network.move_revert(port, self._context.network_of(port), MoveRole.DESTINATION)
                if self._still_elsewhere():
                    await drivers.network.port_delete(port.id)
            self._end(OperationState.UNDONE)

    def _still_elsewhere(self) -> bool:
        held = self._context.ledger.owner(self._vmm.server)
        return held is None or held.hold is Hold.YIELDED

    def _finish(self) -> None:
        self._finished = True
        if self._listens:
            return
        journal = self.journal
        if journal.decision is Decision.COMMITTED and journal.running:
            self._end(OperationState.DONE)

    async def _recover(self) -> None:
        """This agent was restarted. A guest that has arrived is taken, anything less is given up."""
        if await self._arrived():
            await self._take()
            return
        journal = self.journal
        if (
            journal.decision is Decision.UNDECIDED
            and journal.step != "begin"
            and not await self._may_follow()
        ):
            self._abandon(Unavailable("the destination's agent was restarted during the move"))
        vmm = await self._observed()
        if journal.decision is Decision.COMMITTED and vmm is not None and vmm.state is not RunState.CRASHED:
            await self._make_run()
        elif self.journal.decision is Decision.ABANDONED:
            await self._clear_away_when_told()

    async def _clear_away_when_told(self) -> None:
        """The source may still have to turn its path back before the parked frames can be returned."""
        try:
            async with asyncio.timeout(2.0):
                await self._heard.wait()
        except TimeoutError:
            await self._clear_away()

    # --- record ---

    def _step(self, step: str) -> None:
        journal = msgspec.structs.replace(
            self.journal, step=step, times={**self.journal.times, step: self._context.now()}
        )
        self._context.ledger.note(journal, step)
        self._context.changed()

    def _note_lost(self, why: str) -> None:
        notes = {**self.journal.notes, f"{RESULT}lost": why}
        self._context.ledger.note(msgspec.structs.replace(self.journal, notes=notes), "lost")

    def _end(self, state: OperationState) -> None:
        journal = msgspec.structs.replace(
            self.journal, state=state, step="done", times={**self.journal.times, "done": self._context.now()}
        )
        self._context.ledger.note(journal, "end")
        self._ended.set()
        self._heard.set()
        self._context.changed()
