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

from nahtlos.model.config import RbdEndpoint, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Error, NotFound, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import CopyPhase, CopyProgress, StorageBackend
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes import holds
from nahtlos.physical.agent.volumes.copy_operation import (
    ASK_AGAIN_SECONDS,
    RECEIVE_SECONDS,
    CopyOperation,
)
from nahtlos.physical.agent.volumes.copying import Act, Pace, next_act
from nahtlos.wire.volumes import RelocateOrder, VolumeAttach, VolumeForget, VolumeKeep, VolumeReceive

ATTACH_SECONDS = 20.0
FORGET_SECONDS = 3.0
ATTEMPTS = 5
"""So often a copy that broke off is begun again."""
OWNERLESS_SECONDS = 60.0
"""After so long a server that no host owns is taken for gone; who still had the volume open would be noticed
by the driver."""


class Relocation(CopyOperation[RelocateOrder]):
    too_late = ("complete", "pivot", "finish")
    why_too_late = "the relocation is past the point where it can be undone"

    def __init__(self, context: Context, journal: Journal) -> None:
        assert isinstance(journal.task, RelocateOrder), f"operation {journal.id} is no relocation"
        super().__init__(context, journal, journal.task)
        self._ownerless_since: float | None = None

    @property
    def _to(self) -> HostId:
        return self._order.destination.host

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
        self._note("attempts", str(attempt))
        self._record("receive", durable=True)
        order = self._order
        body = VolumeReceive(id=order.id, volume=order.destination)
        await self._reach(lambda: self._hosts.ask(self._to, body, RECEIVE_SECONDS))
        self._record("copy")
        self._pace = Pace()
        await self._start()

    async def _start(self) -> None:
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
            id=self._order.id,
            server=client.server,
            epoch=client.epoch,
            attachment=attachment,
            instead_of=instead_of,
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
