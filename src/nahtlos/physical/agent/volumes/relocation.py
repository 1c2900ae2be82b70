"""The copy of a volume at this host goes to another place while it is written.

    begin -> receive -> copy -> complete -> pivot -> finish -> done
      \\_________\\________\\______/ as long as the driver has not completed it: undo

The driver alone knows whether it was completed; it writes that down before it acts, so after any crash the
operation asks it (`relocate_progress`) and goes on from there: nothing copies any more -> from the start;
completed -> forward only. From then on this host passes everything on, so there is no hurry: who has the
volume open is told where it is now, at whichever host it has moved to meanwhile, and the copy here goes once
nobody comes here any more.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from nahtlos.model.config import RbdEndpoint, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Error, ErrorRecord, NotFound, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import CopyPhase, CopyProgress, StorageBackend
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes import holds
from nahtlos.physical.agent.volumes.copying import Act, Pace, fraction, next_act, told
from nahtlos.physical.agent.volumes.hosts import Hosts
from nahtlos.wire.volumes import RelocateOrder, VolumeAttach, VolumeForget, VolumeKeep, VolumeReceive

POLL_SECONDS = 0.05
ASK_AGAIN_SECONDS = 0.25
RECEIVE_SECONDS = 60.0
ATTACH_SECONDS = 20.0
FORGET_SECONDS = 3.0
ATTEMPTS = 5
"""So often a copy that broke off is begun again."""
SILENCE_SECONDS = 60.0
"""A destination that cannot be reached for so long, or a copy that has not come forward, is given up."""
OWNERLESS_SECONDS = 60.0
"""After so long a server that no host owns is taken for gone; who still had the volume open would be noticed
by the driver."""


class Relocation:
    """`run` may be called again after a restart of the agent."""

    def __init__(self, context: Context, journal: Journal) -> None:
        assert isinstance(journal.task, RelocateOrder), f"operation {journal.id} is no relocation"
        self._context = context
        self._journal = journal
        self._order = journal.task
        self._storage = context.drivers.storage
        self._hosts = Hosts(context, self._order.hosts)
        self._speed = int(journal.notes.get("speed", self._order.bytes_per_second))
        self._cancelled = False
        self._wake = asyncio.Event()
        self._pace = Pace()
        self._ownerless_since: float | None = None

    @property
    def journal(self) -> Journal:
        return self._journal

    def cancel(self) -> None:
        if self._journal.step in ("complete", "pivot", "finish"):
            raise Conflict("the relocation is past the point where it can be undone", field="operation")
        self._cancelled = True
        self._wake.set()

    def set_speed(self, bytes_per_second: int) -> None:
        """From now on, also after a restart."""
        if bytes_per_second == self._speed:
            return
        self._speed = bytes_per_second
        notes = {**self._journal.notes, "speed": str(bytes_per_second), "speed_set": ""}
        self._journal = self._context.ledger.note(msgspec.structs.replace(self._journal, notes=notes))
        self._wake.set()

    async def run(self, *, recovering: bool) -> Journal:
        try:
            await self._carry_out()
        finally:
            await self._hosts.close()
            self._context.waits.pop(self._order.id, None)
            self._context.progress.pop(self._order.id, None)
        return self._journal

    async def _carry_out(self) -> None:
        if self._journal.step not in ("pivot", "finish"):
            try:
                self._check()
                await self._copy()
            except Exception as error:
                if not await self._undone(self._context.error_of(error)):
                    return
        await self._pass_on()

    def _check(self) -> None:
        order, me = self._order, self._context.settings.host
        same = order.destination.backend is order.volume.backend
        if same and order.destination.host == me:
            raise Refused(f"{order.volume.id} is at {me} already", field="destination")
        if order.source.host != me or order.destination.epoch <= order.volume.epoch:
            raise Refused(f"{order.volume.id} of {order.source.host} cannot leave {me} so", field="order")

    # --- until it was completed ---

    async def _copy(self) -> None:
        """Returns once the driver has completed it. Raises why that is given up."""
        began = self._context.now()
        while True:
            if self._cancelled:
                raise Refused("cancelled by an operator", field="operation")
            if self._context.now() - began > self._order.deadline:
                raise Unavailable(
                    f"the copy had not caught up within {self._order.deadline:g} s",
                    remedy="give it more bandwidth, or wait until the volume is written less",
                )
            progress = await self._observed()
            act = next_act(progress.phase)
            if act is Act.FORWARD:
                return
            await self._take(act, progress)

    async def _take(self, act: Act, progress: CopyProgress) -> None:
        match act:
            case Act.BEGIN:
                await self._begin(progress)
            case Act.COMPLETE:
                await self._complete()
            case Act.WAIT | Act.FORWARD:
                await self._wait(progress)

    async def _begin(self, progress: CopyProgress) -> None:
        attempt = int(self._journal.notes.get("attempts", "0")) + 1
        if attempt > ATTEMPTS:
            raise Unavailable(
                f"the copy broke off {ATTEMPTS} times, at last: {progress.error or 'no reason'}"
            )
        notes = {**self._journal.notes, "attempts": str(attempt)}
        self._journal = msgspec.structs.replace(self._journal, notes=notes)
        self._record("receive")
        order = self._order
        await self._reach(VolumeReceive(id=order.id, volume=order.destination))
        self._record("copy")
        self._pace = Pace()
        await self._start()

    async def _reach(self, body: VolumeReceive) -> None:
        """Asks the destination again and again for a while; a refusal is its last word."""
        since = self._context.now()
        while True:
            try:
                await self._hosts.ask(self._order.destination.host, body, RECEIVE_SECONDS)
            except Unavailable as error:
                if self._cancelled or self._context.now() - since > SILENCE_SECONDS:
                    raise
                self._say_wait(f"{self._order.destination.host} to make room ({error.message})")
                await self._sleep(ASK_AGAIN_SECONDS)
            else:
                return

    async def _start(self) -> None:
        """An error here is followed by a look at what came of it."""
        order = self._order
        try:
            await self._come_through_here()
            await self._storage.relocate_start(order.volume, order.target, bytes_per_second=self._speed)
        except Unavailable as error:
            self._say_wait(f"the storage to begin copying ({error.message})")
            await self._sleep(ASK_AGAIN_SECONDS)

    async def _come_through_here(self) -> None:
        """What a server writes past this host is not copied."""
        if not self._passed_by:
            return
        await self._storage.serve(self._order.volume)
        await self._lead_to(_attachment(self._order.volume.id, self._order.source))

    @property
    def _passed_by(self) -> bool:
        """Whether servers reach the volume without this host, and it leaves the pool it is in."""
        embedded = StorageBackend.EMBEDDED
        order = self._order
        return order.volume.backend is not embedded and order.destination.backend is embedded

    async def _wait(self, progress: CopyProgress) -> None:
        now = self._context.now()
        self._pace = self._pace.seen(now, progress)
        self._context.progress[self._order.id] = fraction(progress)
        self._say_wait(told(progress, self._pace, self._order.destination.host))
        if now - self._pace.moved_at > SILENCE_SECONDS:
            raise Unavailable(
                f"the copy has not come forward for {SILENCE_SECONDS:g} s: {progress.error or 'no reason'}",
                remedy=f"look at the storage of {self._order.destination.host}",
            )
        if self._wake.is_set() and not self._cancelled:
            self._wake.clear()
            await self._start()
        await self._sleep(POLL_SECONDS)

    async def _complete(self) -> None:
        """Whether an error came before or after it was done, only a look can tell."""
        self._record("complete", durable=True)
        try:
            await self._storage.relocate_complete(self._order.volume.id)
        except Exception as error:
            why = self._context.error_of(error)
            self._context.say("volume.relocation", self._order.volume.id, f"not completed yet: {why}")
            if (await self._observed()).phase not in (CopyPhase.DONE, CopyPhase.READY):
                self._record("copy", durable=True)
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def _observed(self) -> CopyProgress:
        """What the driver says; nothing is decided before it has said something."""
        while True:
            try:
                return await self._storage.relocate_progress(self._order.volume.id)
            except NotFound:
                raise
            except Exception as error:
                self._say_wait(f"the storage to say how far it is ({self._context.error_of(error).message})")
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    # --- back ---

    async def _undone(self, error: Error) -> bool:
        """True if it was completed all the same: then only forward."""
        order = self._order
        self._context.say("volume.relocation", order.volume.id, f"given up: {error}", id=order.id)
        completed: list[Conflict] = []

        async def cancel() -> None:
            try:
                await self._storage.relocate_cancel(order.volume.id)
            except Conflict as conflict:
                completed.append(conflict)
            except NotFound:
                return

        await self._until_done("the storage to stop copying", cancel)
        if completed:
            return True
        if self._passed_by:
            await self._until_done("who has it open to go back", self._lead_back)
        await self._forget()
        self._end(OperationState.UNDONE, error)
        return False

    async def _forget(self) -> None:
        """Spares the destination what it has received; it counts for nothing anyhow."""
        order = self._order
        if "attempts" not in self._journal.notes:
            return
        for _ in range(3):
            try:
                await self._hosts.ask(
                    order.destination.host, VolumeForget(id=order.id, volume=order.volume.id), FORGET_SECONDS
                )
            except Exception as error:
                why = self._context.error_of(error)
                self._context.say("volume.relocation", order.volume.id, f"not taken back: {why}")
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            else:
                return

    # --- forward ---

    async def _pass_on(self) -> None:
        if self._journal.step not in ("pivot", "finish"):
            self._mark("pivot")
            await self._until_done("the ledger to be written", self._leave)
            self._context.changed()
        await self._until_done(f"{self._order.destination.host} to keep it", self._keep)
        await self._until_done("who has it open to go there", self._pivot)
        if self._journal.step != "finish":
            self._record("finish")
        await self._until_done("nobody to come here any more", self._finish)
        self._end(OperationState.DONE, None)

    async def _leave(self) -> None:
        holds.leave(self._context.ledger, self._order.volume, self._journal, "pivot")

    async def _keep(self) -> None:
        """Said before the copy here may go: nothing is received over the one there from then on."""
        body = VolumeKeep(id=self._order.id, volume=self._order.destination)
        try:
            await self._hosts.ask(self._order.destination.host, body, RECEIVE_SECONDS)
        except Stale:
            return
        except Refused as refused:
            if refused.field != "message":
                raise  # else an agent of an earlier release, which keeps it until it is asked otherwise

    async def _finish(self) -> None:
        try:
            await self._storage.relocate_finish(self._order.volume.id)
        except Conflict:  # somebody still comes here: perhaps a server that was started meanwhile
            await self._pivot()
            raise

    async def _pivot(self) -> None:
        order = self._order
        instead_of = order.source if order.rbd is None else None
        await self._lead_to(_attachment(order.volume.id, order.target, order.rbd), instead_of)

    async def _lead_back(self) -> None:
        client, volume = self._order.client, self._order.volume.id
        for before in client.attachments if client else ():
            if before.volume == volume:
                await self._lead_to(before)

    async def _lead_to(self, attachment: VolumeAttachment, instead_of: VolumeEndpoint | None = None) -> None:
        """Returns when the server reaches the volume so, wherever it is."""
        client = self._order.client
        if client is None:
            return
        body = VolumeAttach(
            id=self._order.id, server=client.server, attachment=attachment, instead_of=instead_of
        )
        answers = list[str]()
        for host in dict.fromkeys((client.at.host, *self._hosts.all)):
            answer = await self._attached(host, body)
            if answer is None:
                return
            answers.append(answer)
        self._note_ownerless(all(answer == _NOT_MINE for answer in answers))

    async def _attached(self, host: HostId, body: VolumeAttach) -> str | None:
        """None once it was done; else why not."""
        try:
            await self._hosts.ask(host, body, ATTACH_SECONDS)
        except Stale:
            return None
        except Conflict as conflict:
            return _NOT_MINE if conflict.field == "server" else f"{host}: {conflict.message}"
        except Error as error:
            return f"{host}: {error.message}"
        return None

    def _note_ownerless(self, ownerless: bool) -> None:
        now = self._context.now()
        if not ownerless:
            self._ownerless_since = None
        elif self._ownerless_since is None:
            self._ownerless_since = now
        elif now - self._ownerless_since > OWNERLESS_SECONDS:
            return
        raise Unavailable(f"no host says that it owns {self._order.client and self._order.client.server}")

    # --- record ---

    async def _until_done(self, what: str, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await act()
            except Exception as error:
                self._say_wait(f"{what} ({self._context.error_of(error).message})")
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            else:
                self._context.waits.pop(self._order.id, None)
                return

    async def _sleep(self, seconds: float) -> None:
        """Or until it is cancelled or given another speed."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _say_wait(self, text: str) -> None:
        self._context.waits[self._order.id] = text

    def _mark(self, step: str) -> None:
        times = {**self._journal.times, step: self._context.now()}
        self._journal = msgspec.structs.replace(self._journal, step=step, times=times)

    def _record(self, step: str, *, durable: bool = False) -> None:
        self._mark(step)
        if durable or step == "receive":
            self._journal = self._context.ledger.note(self._journal, step)
        self._context.say("volume.step", self._order.volume.id, step, id=self._order.id)
        self._context.changed()

    def _end(self, state: OperationState, error: Error | None) -> None:
        self._mark("done")
        record = ErrorRecord.of(error) if error else None
        self._journal = msgspec.structs.replace(self._journal, state=state, error=record)
        self._context.ledger.note(self._journal, "end")
        self._context.say("volume.step", self._order.volume.id, state, id=self._order.id)
        self._context.changed()


_NOT_MINE = "not mine"


def _attachment(
    volume: VolumeId, endpoint: VolumeEndpoint, rbd: RbdEndpoint | None = None
) -> VolumeAttachment:
    return VolumeAttachment(
        volume=volume,
        address=endpoint.address,
        port=endpoint.port,
        export=endpoint.export,
        copies=(endpoint,),
        rbd=rbd,
    )
