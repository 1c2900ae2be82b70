"""The source's half of a move.

    begin -> prepare -> precopy -> switch -> stopped -> committed -> (memory follows) -> done
      \\________________\\__________/ |          |
               undo locally         undo locally|  only the destination knows: ask it
                                                |    abandoned -> revert the path, resume
                                                `    committed -> forward only

The rule everything rests on: **once `pause` has been asked for, this host never resumes the server unless
the destination has durably abandoned it.** So a guest seen RUNNING here proves that nothing was handed
over, and no write is needed between the decision to switch and the stop. The switch precedes the stop:
the path leads to the destination's tap while the running guest still drains its own ring, so no frame is
lost (docs/decisions/0002).

What firewalls remember of the server's connections goes ahead of it: whole before pre-copy begins, changes
during it, with the switch, and with the commit. A connection that is opened between the last two is known
to this host alone until the commit, which is a few milliseconds; its next frame may be dropped meanwhile.

By post-copy (its owner's consent, and both hosts can) nothing of this changes but two things: the stop is not
the end of the stream, so the old VMM is kept until all memory has followed; and once it was asked for, a
server that the destination does not take is lost here, too: its hypervisor lets it run nowhere else.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from nahtlos.model.blackout import seconds_to_send, slowest_for_post_copy
from nahtlos.model.errors import Conflict, Error, ErrorRecord, Refused, Unavailable
from nahtlos.model.ids import PortId
from nahtlos.model.inventory import OperationState, RunState
from nahtlos.model.prediction import Means
from nahtlos.physical.agent.consoles import serial
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.convergence import (
    Course,
    Measure,
    Permitted,
    after,
    followed,
    held,
    link_speed,
    next_measure,
    remedy_of,
    why_given_up,
    within_budget,
)
from nahtlos.physical.agent.following import (
    HANDED_OVER,
    SOURCE_PATIENCE_SECONDS,
    all_sent,
    why_not_followed,
)
from nahtlos.physical.agent.ledger import Hold, Journal
from nahtlos.physical.agent.peers import Peer
from nahtlos.physical.agent.precopy import (
    FRESH_SECONDS,
    NOT_CONVERGED,
    Look,
    Sync,
    Verdict,
    dirty_rate,
    fraction,
    link_rate,
    look_again,
    seen,
    verdict,
    with_to_come,
)
from nahtlos.physical.agent.report import RESULT
from nahtlos.physical.agent.switch_turn import HELD_BYTES, SwitchTurn
from nahtlos.physical.agent.volumes.freeze import check_paths
from nahtlos.physical.ports import MigrationPhase, MigrationProgress, MoveRole, VmmId, VmmStatus
from nahtlos.wire.messages import (
    Decision,
    Message,
    MoveAbandon,
    MoveCommit,
    MoveFinished,
    MoveOutcome,
    MovePrepare,
    MoveQuery,
    MoveReady,
    MoveReturnFrames,
    MoveState,
    MoveSwitch,
)
from nahtlos.wire.volumes import PeerAddress

WAITING_POLL_SECONDS = 0.02
"""While it waits for its turn: looking costs CPU time that others' guests need."""
DRAIN_SECONDS = 0.5
KILL_AFTER_SECONDS = 0.3
"""The old VMM is kept that long after the destination has answered: what it still sends is reflected."""
ASK_AGAIN_SECONDS = 0.25
TELL_SECONDS = 5.0
CARRY_EVERY_SECONDS = 0.05
"""What firewalls learn during pre-copy is sent so often that little is left for the switch."""
CARRY_SECONDS = 30.0
CONSOLE_SECONDS = 3.0
SETTLING_LOOKS = 200
"""At a stream of a guest that was stopped a moment ago, until it has ended or gone over to post-copy."""


class SourceMove:
    """One move away from this host. `run` may be called again after a restart of the agent."""

    def __init__(self, context: Context, journal: Journal) -> None:
        self._context = context
        self._journal = journal
        self._order = journal.move()
        self._vmm = VmmId(self._order.server.spec.id, self._order.server.epoch)
        self._peer = Peer(
            context,
            PeerAddress(
                host=self._order.destination,
                address=self._order.destination_address,
                peer_port=self._order.destination_peer_port,
            ),
        )
        self._turn = SwitchTurn(
            context,
            self._order.id,
            (self._order.source, self._order.destination),
            self._peer,
            self._pace,
            sprint=self._sprint if self._order.boost > self._order.bandwidth else None,
        )
        self._bandwidth = self._order.bandwidth
        self._may_follow = False
        self._follows = False
        self._handing_over_since: float | None = None
        self._pause_asked = False
        self._switched = False
        self._carried: list[PortId] = []
        """Ports of which a firewall remembers connections: changes are noted here and follow the server."""
        self._cancelled = asyncio.Event()

    @property
    def journal(self) -> Journal:
        return self._journal

    def cancel(self) -> None:
        """Raises Conflict once the path is being switched."""
        if self._switched or self._pause_asked or self._journal.step not in ("begin", "prepare", "precopy"):
            raise Conflict("the move is past the point where it can be undone", field="operation")
        self._cancelled.set()

    async def run(self, *, recovering: bool) -> Journal:
        try:
            await (self._recover() if recovering else self._carry_out())
        finally:
            await self._peer.close()
            self._context.waits.pop(self._order.id, None)
            self._context.progress.pop(self._order.id, None)
        return self._journal

    # --- forward ---

    async def _carry_out(self) -> None:
        try:
            await self._prepare()
            await self._precopy()
            outcome = await self._hand_over()
        except Exception as error:
            await self._fail(self._context.error_of(error))
            return
        await self._conclude(outcome)

    async def _prepare(self) -> None:
        context, order = self._context, self._order
        self._check_owned()
        self._record("prepare")
        await context.pass_paths()
        await context.pass_plugging()
        vmm = await self._observed()
        prepare = MovePrepare(
            id=order.id,
            server=order.server.spec.id,
            epoch=order.server.epoch,
            volumes=order.server.all_volumes,
            marks=True,
            vcpus=vmm.compute.vcpus if vmm else 0,
            post_copy=await self._may_follow_here(),
            channels=order.channels,
            compressed=order.compressed,
        )
        ready = await self._peer.ask(prepare, MoveReady, 30.0)
        self._may_follow = prepare.post_copy and ready.post_copy
        if order.post_copy and not self._may_follow:
            raise why_not_followed(order.destination, ready.why_no_post_copy)
        for port in order.ports:
            await context.drivers.network.move_prepare(
                port,
                context.network_of(port),
                MoveRole.SOURCE,
                order.destination_address,
                marked=ready.believes_marks,
            )
        await self._begin_to_carry()
        self._record("precopy", durable=True)
        await context.drivers.hypervisor.migrate_start(
            self._vmm,
            ready.uri,
            peer=order.destination,
            bandwidth=order.bandwidth,
            slow_down=self._may_be_slowed,
            post_copy=self._may_follow,
            channels=ready.channels,
            compressed=ready.compressed,
        )

    async def _may_follow_here(self) -> bool:
        """Memory may follow a server whose owner permits that, if this kernel can. What may follow is not
        compressed: where it is to be, that is tried first, and following only once it was not enough."""
        order = self._order
        if not order.server.spec.allow_post_copy or (order.compressed and not order.post_copy):
            return False
        why = await self._context.drivers.hypervisor.why_no_post_copy()
        if why and self._order.post_copy:
            raise why_not_followed(self._context.settings.host, why)
        return not why

    async def _begin_to_carry(self) -> None:
        """Before anything is sent: a destination that cannot take connections up says so now."""
        states: dict[PortId, bytes] = {}
        for port in self._order.ports:
            state = await self._context.drivers.network.move_state_begin(port.id)
            if state:
                states[port.id] = state
                self._carried.append(port.id)
        await self._carry(states)

    async def _changes(self) -> dict[PortId, bytes]:
        """What firewalls have learned since this was last asked."""
        states = {p: await self._context.drivers.network.move_state_changes(p) for p in self._carried}
        return {port: state for port, state in states.items() if state}

    async def _carry(self, states: dict[PortId, bytes]) -> None:
        if not states:
            return
        try:
            await self._peer.tell(MoveState(id=self._order.id, states=states), CARRY_SECONDS)
        except Refused as refused:
            if refused.field != "message":
                raise
            raise Refused(
                f"the agent of {self._order.destination} cannot take up what the firewall remembers of "
                f"{', '.join(sorted(states))}: their connections would break",
                field="destination",
                remedy=f"upgrade the agent of {self._order.destination} first, or move the server elsewhere",
            ) from refused

    def _check_owned(self) -> None:
        held = self._context.ledger.owner(self._order.server.spec.id)
        if held is None or held.hold is not Hold.OWNED or held.epoch != self._order.server.epoch:
            raise Refused(
                f"{self._context.settings.host} does not own {self._vmm.server} by epoch {self._vmm.epoch}",
                field="server",
                remedy="plan again from the current inventory",
            )
        check_paths(self._order.server, held.server.all_volumes)

    async def _precopy(self) -> None:
        """Returns at a moment at which stopping is cheap; the guest runs on until it is stopped."""
        loop = asyncio.get_running_loop()
        started, sync = loop.time(), Sync()
        course = Course(since=started)
        told = carried = started
        look: Look | None = None
        while True:
            if self._cancelled.is_set():
                raise Refused("cancelled by an operator", field="operation")
            if loop.time() - told > TELL_SECONDS:
                await self._keep_destination()
                told = loop.time()
            if loop.time() - carried > CARRY_EVERY_SECONDS:
                await self._carry(await self._changes())
                carried = loop.time()
            progress = await self._context.drivers.hypervisor.migrate_progress(self._vmm)
            if progress.phase is not MigrationPhase.ACTIVE and progress.phase is not MigrationPhase.NONE:
                raise Unavailable(f"pre-copy {progress.phase}: {progress.error or 'no reason given'}")
            now = loop.time()
            slow = self._turn.is_held
            before, sync = sync, seen(sync, progress, now)
            if sync is not before:
                sync = await self._with_to_come(sync)
            look = look_again(look, progress, now)
            course = held(course, progress, now) if slow else followed(course, progress, now)
            self._context.progress[self._order.id] = fraction(progress)
            began = started + self._turn.waited(now)
            deadline = self._order.precopy_deadline
            permitted = within_budget(self._permitted(), link_speed(course, progress, now - began))
            said = verdict(
                sync, progress, now=now, started=began, deadline=deadline, course=course, permitted=permitted
            )
            said = Verdict.WAIT if slow else said
            if await self._turn.step(now, near=said is Verdict.SWITCH) and loop.time() - now <= FRESH_SECONDS:
                self._note_rates(sync, course, progress, now - began)
                return
            match said:
                case Verdict.MEASURE:
                    measure = next_measure(course, permitted, late=now - began > deadline)
                    assert measure is not None, "no measure is left to take"
                    await self._take_measure(measure)
                    course = after(course, measure, loop.time())
                case Verdict.GIVE_UP:
                    self._note_rates(sync, course, progress, now - began)
                    raise Unavailable(
                        why_given_up(course, progress, permitted, now - began, deadline),
                        field=NOT_CONVERGED,
                        remedy=remedy_of(permitted),
                    )
                case Verdict.WAIT | Verdict.SWITCH:
                    await asyncio.sleep(WAITING_POLL_SECONDS if self._turn.waits else look.again)

    async def _with_to_come(self, sync: Sync) -> Sync:
        in_flight = await self._context.drivers.hypervisor.migrate_in_flight(self._vmm)
        return with_to_come(sync, in_flight, self._context.dirty_rates.get(self._vmm.server))

    def _permitted(self) -> Permitted:
        """By the server's owner, and by whoever divides the links."""
        spec, accelerator = self._order.server.spec, self._context.ledger.verified()
        name = accelerator.name if accelerator else "tcg"
        allowed = {
            Measure.BOOST: self._order.boost > self._order.bandwidth and not self._order.post_copy,
            Measure.SLOW_DOWN: self._may_be_slowed and not self._order.post_copy,
            Measure.POST_COPY: self._may_follow,
        }
        return Permitted(
            pause=seconds_to_send(spec.blackout_budget_ms, name),
            measures=tuple(measure for measure, may in allowed.items() if may),
            post_copy_at_once=self._order.post_copy,
            post_copy_from=slowest_for_post_copy(spec.blackout_budget_ms, name),
        )

    @property
    def _may_be_slowed(self) -> bool:
        return self._order.slow_down or self._order.server.spec.allow_slowdown

    async def _take_measure(self, measure: Measure) -> None:
        hypervisor = self._context.drivers.hypervisor
        self._context.say(
            "move.measure",
            self._vmm.server,
            f"the move to {self._order.destination} would not end as it goes: {measure}",
            id=self._order.id,
        )
        match measure:
            case Measure.BOOST:
                self._bandwidth = self._order.boost
                await hypervisor.migrate_pace(self._vmm, self._bandwidth)
            case Measure.SLOW_DOWN:
                await hypervisor.migrate_slow_down(self._vmm)
                self._note("means", Means.SLOWED)
            case Measure.POST_COPY:
                await hypervisor.migrate_post_copy(self._vmm)
                self._follows = True
                self._note("means", Means.POST_COPY)

    def _note(self, name: str, text: str) -> None:
        """For those who predict the next move of this server."""
        notes = {**self._journal.notes, f"{RESULT}{name}": text}
        self._journal = msgspec.structs.replace(self._journal, notes=notes)

    def _note_rates(self, sync: Sync, course: Course, progress: MigrationProgress, elapsed: float) -> None:
        rates = {"dirty_rate": dirty_rate(sync), "link": link_rate(course, progress, elapsed)}
        for name, rate in rates.items():
            if rate is not None:
                self._note(name, str(rate))

    async def _pace(self, slow: bool) -> None:
        """While it waits for its turn to be switched."""
        bandwidth = min(HELD_BYTES, self._bandwidth) if slow else self._bandwidth
        await self._context.drivers.hypervisor.migrate_pace(self._vmm, bandwidth)

    async def _sprint(self) -> None:
        await self._context.drivers.hypervisor.migrate_pace(self._vmm, self._order.boost)

    async def _keep_destination(self) -> None:
        """It gives up a source that is silent for long. While its turn is waited for, it may be away."""
        try:
            outcome = await self._peer.ask(MoveQuery(id=self._order.id), MoveOutcome, 10.0)
        except Unavailable:
            if self._turn.waits:
                return
            raise
        if outcome.decision is Decision.ABANDONED:
            raise Unavailable(f"{self._order.destination} gave the move up")

    async def _hand_over(self) -> MoveOutcome:
        self._context.switches(self._order.id)
        try:
            return await self._switch_and_stop()
        finally:
            self._context.switched(self._order.id)

    async def _switch_and_stop(self) -> MoveOutcome:
        """The path, then the stop, then the ownership. What is done here is paid for in blackout."""
        network, order = self._context.drivers.network, self._order
        self._check_owned()
        self._switched = True
        self._mark("switch")
        await self._peer.tell(MoveSwitch(id=order.id, states=await self._changes()), 5.0)
        for port in order.ports:
            await network.move_switch(port, self._context.network_of(port), MoveRole.SOURCE)
        for port in order.ports:
            if not await network.move_drain(port.id, timeout=DRAIN_SECONDS):
                raise Unavailable(f"the guest did not take the frames waiting at {port.id}")
        self._pause_asked = True
        await self._context.drivers.hypervisor.pause(self._vmm)
        self._mark("stopped")
        commit = MoveCommit(id=order.id, states=await self._changes(), post_copy=self._follows)
        return await self._peer.ask(commit, MoveOutcome, 30.0)

    # --- when something failed ---

    async def _fail(self, error: Error) -> None:
        self._context.say(
            "move.failed", self._vmm.server, f"move to {self._order.destination}: {error}", id=self._order.id
        )
        if self._pause_asked:
            await self._conclude(await self._resolve(error))
        else:
            await self._undo(error)

    async def _recover(self) -> None:
        """The agent was restarted in the middle. What the guest does says what may have happened."""
        error = Unavailable("the source's agent was restarted during the move")
        vmm = await self._observed_at_last()
        if self._journal.step == "committed":
            await self._finish_source()
        elif vmm is not None and vmm.state is RunState.RUNNING and not vmm.sent:
            self._switched = True
            await self._undo(error)
        else:
            await self._conclude(await self._resolve(error))

    async def _observed(self) -> VmmStatus | None:
        vmms = await self._context.drivers.hypervisor.observe()
        return next((v for v in vmms if v.id == self._vmm), None)

    async def _observed_at_last(self) -> VmmStatus | None:
        while True:
            try:
                return await self._observed()
            except Exception as error:
                why = self._context.error_of(error).message
                self._context.waits[self._order.id] = f"the hypervisor to say what runs ({why})"
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def _undo(self, error: Error) -> None:
        """Before the stop: the server never ceased to be here. Unless its guest stopped without being told
        to (a disk error, for instance): then nothing held the stream back, and the destination may have all
        of it."""
        await self._until_done("the hypervisor to stop sending", self._cancel_stream)
        vmm = await self._observed_at_last()
        if vmm is not None and vmm.sent:
            await self._conclude(await self._resolve(error))
            return
        if self._switched or self._carried:
            await self._until_done("the path to lead back here", self._revert_path)
        if await self._abandon_if_reachable() is Decision.COMMITTED:
            await self._finish_source()
        else:
            self._end(OperationState.UNDONE, error)

    async def _cancel_stream(self) -> None:
        vmm = await self._observed()
        if vmm is not None and vmm.state is not RunState.CRASHED:
            await self._context.drivers.hypervisor.migrate_cancel(self._vmm)

    async def _abandon_if_reachable(self) -> Decision:
        """Spares the destination its time-out; of what has not arrived whole it cannot take ownership."""
        decision = Decision.UNDECIDED
        try:
            decision = (await self._peer.ask(MoveAbandon(id=self._order.id), MoveOutcome, 3.0)).decision
            if decision is Decision.ABANDONED:
                await self._peer.tell(MoveReturnFrames(id=self._order.id), 3.0)
        except Exception as error:
            why = self._context.error_of(error)
            self._context.say("move.undo", self._vmm.server, f"{self._order.destination} not told: {why}")
        return decision

    async def _resolve(self, error: Error) -> MoveOutcome:
        """The guest stands still here and may run there: ask until there is an answer, however long."""
        said = ""
        while True:
            self._context.waits[self._order.id] = (
                f"{self._order.destination} to say whether it owns {self._vmm.server} ({error.message})"
            )
            self._context.changed()
            try:
                outcome = await self._peer.ask(await self._last_word(), MoveOutcome, 5.0)
            except Exception as again:
                text = f"{self._order.destination}: {self._context.error_of(again)}"
                said = self._context.say_anew("move.waits", self._vmm.server, text, last=said)
            else:
                if outcome.decision is not Decision.UNDECIDED:
                    self._context.waits.pop(self._order.id, None)
                    return msgspec.structs.replace(outcome, error=outcome.error or ErrorRecord.of(error))
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def _last_word(self) -> Message:
        """Give it up if you can; but what was handed over by post-copy can only go on there."""
        abandon = MoveAbandon(id=self._order.id)
        if not self._order.server.spec.allow_post_copy:
            return abandon
        vmm = await self._observed()
        if vmm is None or vmm.state is RunState.CRASHED:
            return abandon
        if await self._settled_phase() in HANDED_OVER and not self._is_hopeless():
            return MoveCommit(id=self._order.id, states=await self._changes(), post_copy=True)
        return abandon

    async def _settled_phase(self) -> MigrationPhase:
        phase = MigrationPhase.ACTIVE
        for _ in range(SETTLING_LOOKS):
            phase = (await self._context.drivers.hypervisor.migrate_progress(self._vmm)).phase
            if phase is not MigrationPhase.ACTIVE:
                break
            await asyncio.sleep(WAITING_POLL_SECONDS)
        return phase

    def _is_hopeless(self) -> bool:
        """Its server has not arrived for so long after it was handed over that it never will."""
        now = asyncio.get_running_loop().time()
        self._handing_over_since = self._handing_over_since or now
        return now - self._handing_over_since > SOURCE_PATIENCE_SECONDS

    async def _conclude(self, outcome: MoveOutcome) -> None:
        if outcome.decision is Decision.COMMITTED:
            await self._finish_source()
        elif outcome.decision is Decision.ABANDONED:
            await self._take_back(outcome.error)
        else:
            await self._conclude(await self._resolve(Unavailable("the destination was undecided")))

    async def _take_back(self, error: ErrorRecord | None) -> None:
        """The destination will never own it: the guest goes on here."""
        await self._until_done("the path to lead back here", self._revert_path)
        await self._until_done("the hypervisor to resume the server", self._resume_here)
        try:
            await self._peer.tell(MoveReturnFrames(id=self._order.id), 5.0)
        except Exception as late:
            why = self._context.error_of(late)
            self._context.say("move.undo", self._vmm.server, f"parked frames not returned: {why}")
        reason = error.raised() if error else Unavailable("the destination gave it up")
        self._end(OperationState.UNDONE, reason)

    async def _revert_path(self) -> None:
        if await self._observed() is None:
            return  # the host was restarted: its taps are gone, and convergence makes new ones
        for port in self._order.ports:
            await self._context.drivers.network.move_revert(
                port, self._context.network_of(port), MoveRole.SOURCE
            )

    async def _resume_here(self) -> None:
        """A VMM that died meanwhile is left to convergence, which starts the server again; likewise one that
        had begun to hand its server over by post-copy, since its hypervisor runs it no more."""
        vmm = await self._observed()
        if vmm is None or vmm.state is RunState.CRASHED:
            self._context.say("server.crashed", self._vmm.server, "its VMM ended during a move")
            return
        progress = await self._context.drivers.hypervisor.migrate_progress(self._vmm)
        if progress.phase in HANDED_OVER:
            text = f"lost: {self._order.destination} did not take it after it was handed over by post-copy"
            self._context.say("server.lost", self._vmm.server, text, id=self._order.id)
            await self._context.drivers.hypervisor.kill(self._vmm)
            return
        await self._context.drivers.hypervisor.migrate_cancel(self._vmm)
        await self._context.drivers.hypervisor.resume(self._vmm)

    # --- the end ---

    async def _finish_source(self) -> None:
        """Forward only: the server is the destination's."""
        if self._journal.step != "committed":
            self._mark("committed")
            await self._cease_judging()
            await self._until_done("the ledger to be written", self._yield)
            self._context.changed()
            await asyncio.sleep(KILL_AFTER_SECONDS)
        await all_sent(self._context, self._order, self._vmm, self._peer)
        await self._until_done("the old VMM to end", self._kill_old)
        await self._send_console()
        await self._until_done("what its console said to be forgotten", self._forget_console)
        try:
            await self._peer.tell(MoveFinished(id=self._order.id), 5.0)
        except Exception as error:
            why = self._context.error_of(error)
            self._context.say("move.finish", self._vmm.server, f"{self._order.destination} not told: {why}")
        self._end(OperationState.DONE, None)

    async def _send_console(self) -> None:
        """What the server said here goes after it. Not worth waiting for long: without it the destination
        begins a history anew, and says so to whoever reads."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CONSOLE_SECONDS
        while True:
            try:
                said = await serial.leaving(self._context, self._vmm, self._order.id)
                await self._peer.tell(said, CONSOLE_SECONDS)
            except Exception as error:
                why = self._context.error_of(error)
                if isinstance(why, Unavailable) and loop.time() < until:
                    await asyncio.sleep(ASK_AGAIN_SECONDS)
                    continue
                text = f"what its console said until now stays behind: {why}"
                self._context.say("move.console", self._vmm.server, text, id=self._order.id)
            return

    async def _forget_console(self) -> None:
        await serial.forgotten(self._context, self._vmm)

    async def _cease_judging(self) -> None:
        """Answers to what the server begins at its new place still come by this host. A failure is made good
        when the move is settled, a moment later."""
        try:
            for port in self._order.ports:
                await self._context.drivers.network.move_commit(port, self._context.network_of(port))
        except Exception as error:
            why = self._context.error_of(error)
            self._context.say("move.commit", self._vmm.server, f"frames are judged here still: {why}")

    async def _yield(self) -> None:
        self._context.ledger.hand_over(self._journal)

    async def _kill_old(self) -> None:
        if not self._switched:  # the server left before its path did, or an earlier process switched it
            for port in self._order.ports:
                await self._context.drivers.network.move_switch(
                    port, self._context.network_of(port), MoveRole.SOURCE
                )
        await self._context.drivers.hypervisor.kill(self._vmm)
        for port in self._order.ports:
            await self._context.drivers.network.move_settle(
                port, self._context.network_of(port), MoveRole.SOURCE
            )

    async def _until_done(self, what: str, act: Callable[[], Awaitable[None]]) -> None:
        """Repeat an act that must succeed before anything else may happen, and say what is waited for."""
        while True:
            try:
                await act()
            except Exception as error:
                self._context.waits[self._order.id] = f"{what} ({self._context.error_of(error).message})"
                self._context.changed()
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            else:
                self._context.waits.pop(self._order.id, None)
                return

    # --- record ---

    def _mark(self, step: str) -> None:
        """In memory only: written with the next record, so that nothing is written while packets wait."""
        self._journal = msgspec.structs.replace(
            self._journal, step=step, times={**self._journal.times, step: self._context.now()}
        )

    def _record(self, step: str, *, durable: bool = False) -> None:
        self._mark(step)
        if durable:
            self._journal = self._context.ledger.note(self._journal, step)
        self._context.say("move.step", self._vmm.server, step, id=self._order.id)
        self._context.changed()

    def _end(self, state: OperationState, error: Error | None) -> None:
        self._mark("done")
        self._journal = msgspec.structs.replace(
            self._journal, state=state, error=ErrorRecord.of(error) if error else None
        )
        self._context.ledger.note(self._journal, "end")
        self._context.say("move.step", self._vmm.server, state, id=self._order.id)
        self._context.changed()
