"""A copy of a volume is brought up to the others while it is written. Its coordinator is the host of a
current one.

    begin -> leave -> receive -> copy -> join -> joined -> done
      \\________\\________\\_______/  undo: nobody reaches the copy that was to come

Who has the volume open leaves the stale copy before it is shut to him: one that an operator gave up is
reached until then, and would fail under him instead.

The copying goes on until every write that is acknowledged here is on the new copy as well. Then the server
that has the volume open writes to it itself, beside all others; only if the copying was still in step after
that, the new copy lacks nothing. Until it is recorded as current nobody reads it. So no moment is needed at
which the guest stands still. From `joined` on it has everything as long as it is written to; that it counts
is the orchestrator's to record, which refuses if it was lost since.

Should this agent end in between, the storage tells whether it still copies in step. If it does not, nobody
can tell what was missed: the server leaves the copy, which is made anew.
"""

import asyncio

import msgspec

from nahtlos.model.config import VolumeAttachment
from nahtlos.model.errors import Conflict, Error, NotFound, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import Changes, CopyPhase, CopyProgress, ReplicaState, VolumeSpec
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes.copy_operation import (
    ASK_AGAIN_SECONDS,
    RECEIVE_SECONDS,
    SILENCE_SECONDS,
    CopyOperation,
)
from nahtlos.physical.agent.volumes.copying import Pace
from nahtlos.physical.agent.volumes.replicas import LOST_BEFORE, reached_by_copies
from nahtlos.wire.message import Message
from nahtlos.wire.volumes import (
    RebuildOrder,
    VolumeAttach,
    VolumeForget,
    VolumeRanOn,
    VolumeReceive,
    VolumeRejoin,
    VolumeRejoined,
)

ATTACH_SECONDS = 20.0
FORGET_SECONDS = 3.0
ATTEMPTS = 5
REJOIN_ATTEMPTS = 2
OWNERLESS_SECONDS = 60.0
"""After so long a server that no host owns is taken for gone."""
_DECIDED = ("joined", "done")


class Rebuild(CopyOperation[RebuildOrder]):
    too_late = _DECIDED
    why_too_late = "the copy is complete already"

    def __init__(self, context: Context, journal: Journal) -> None:
        assert isinstance(journal.task, RebuildOrder), f"operation {journal.id} rebuilds nothing"
        super().__init__(context, journal, journal.task)

    @property
    def _to(self) -> HostId:
        return self._order.target.host

    async def _carry_out(self) -> None:
        if self._journal.step not in _DECIDED:
            try:
                self._check()
                await self._copy()
            except Exception as error:
                await self._undo(self._context.error_of(error))
                return
        await self._until_done("the storage to stop copying", self._stop)
        self._end(OperationState.DONE, None)

    def _check(self) -> None:
        order, me = self._order, self._context.settings.host
        if order.source.host != me or order.target.host == me:
            raise Refused(
                f"{order.volume.id} cannot be copied from {me} to {order.target.host}", field="order"
            )
        if order.target.host in order.volume.current:
            raise Refused(f"the copy of {order.volume.id} on {order.target.host} is current", field="target")

    @property
    def _coming(self) -> VolumeSpec:
        """As the target is to have it."""
        order = self._order
        _, _, epoch = order.target.export.rpartition(".e")
        return msgspec.structs.replace(
            order.volume,
            host=order.target.host,
            epoch=int(epoch),
            state=ReplicaState.STALE,
            replicas=(),
            image=None,
            snapshot=None,
        )

    # --- until it is joined ---

    async def _copy(self) -> None:
        """Returns once the copy lacks nothing and is written to. Raises why that is given up."""
        while True:
            if self._cancelled:
                raise Refused("cancelled by an operator", field="operation")
            progress = await self._observed()
            match progress.phase:
                case CopyPhase.NONE | CopyPhase.FAILED:
                    await self._begin(progress)
                case CopyPhase.COPYING:
                    await self._wait(progress)
                case CopyPhase.READY:
                    if await self._join():
                        return
                case CopyPhase.DONE:
                    raise Refused(f"{self._order.volume.id} has left this host", field="volume")

    async def _begin(self, progress: CopyProgress) -> None:
        attempt = int(self._journal.notes.get("attempts", "0")) + 1
        if attempt > ATTEMPTS:
            raise Unavailable(f"the copy broke off {ATTEMPTS} times: {progress.error or 'no reason'}")
        if self._journal.step == "join":  # whatever it has missed since
            await self._until_done("who has it open to leave the copy", self._lead_back)
        elif self._before is not None:
            await self._lead_to(self._before, for_ever=False)
        self._note("attempts", str(attempt))
        self._record("receive", durable=True)
        changes = await self._rejoined(attempt)
        if changes is None:
            await self._reach(self._make_room)
        self._record("copy")
        self._pace = Pace()
        try:
            await self._start(changes)
        except Conflict as conflict:
            if changes is None:
                raise
            self._say_full(conflict.message)
            await self._reach(self._make_room)
            await self._start()

    async def _make_room(self) -> None:
        body = VolumeReceive(id=self._order.id, volume=self._coming)
        await self._hosts.request(self._to, body, Message, RECEIVE_SECONDS)

    # --- only what differs ---

    async def _rejoined(self, attempt: int) -> Changes | None:
        """What the copy that comes back says of itself; None: everything is to be copied."""
        if "full" in self._journal.notes:
            return None
        if attempt > REJOIN_ATTEMPTS:
            return self._say_full(f"it broke off {REJOIN_ATTEMPTS} times")
        try:
            body = VolumeRejoin(id=self._order.id, volume=self._coming)
            answer = await self._reach(
                lambda: self._hosts.request(self._to, body, VolumeRejoined, RECEIVE_SECONDS)
            )
            changes = answer.changes
            if changes is None:
                return self._say_full(f"the copy on {self._order.target.host} is nothing to begin from")
            if changes.ranges is None:
                await self._check_ran_on()
        except (Refused, Conflict) as error:
            return self._say_full(error.message)
        return changes

    async def _check_ran_on(self) -> None:
        """The copy does not know what was written to it last. Its server does, if it has run on since."""
        client, order = self._order.client, self._order
        if client is None:
            raise Conflict("nobody knows what was written to it last")
        epoch = order.volume.at(order.target.host).epoch
        gone = msgspec.structs.replace(order.target, export=f"{order.volume.id}.e{epoch}")
        body = VolumeRanOn(server=client.server, gone=gone)
        try:
            await self._hosts.ask(client.at.host, body, ATTACH_SECONDS)
        except Error as error:
            raise Conflict(f"nobody knows what was written to it last: {error.message}") from error

    def _say_full(self, why: str) -> None:
        self._note("full", why)
        self._journal = self._context.ledger.note(self._journal)
        text = f"everything is copied to {self._order.target.host}: {why}"
        self._context.say("volume.rebuild", self._order.volume.id, text, id=self._order.id)

    async def _start(self, changes: Changes | None = None) -> None:
        order = self._order
        try:
            await self._storage.relocate_start(
                order.volume.at(self._context.settings.host),
                order.target,
                bytes_per_second=self._speed,
                changes=changes,
            )
        except Unavailable as error:
            self._say_wait(f"the storage to begin copying ({error.message})")
            await self._sleep(ASK_AGAIN_SECONDS)

    async def _join(self) -> bool:
        """False if the copying fell out of step before the copy was written to."""
        if self._journal.step != "join":
            self._record("join", durable=True)
        before = self._before
        if before is None:
            await self._check_unused()
        else:
            order = self._order
            others = tuple(e for e in before.copies or (order.source,) if e.host != order.target.host)
            coming = msgspec.structs.replace(order.target, joining=True)
            await self._lead_to(reached_by_copies(before, (*others, coming)), for_ever=False)
        progress = await self._observed()
        if progress.phase is not CopyPhase.READY:
            return False
        self._note("copied", str(progress.done))
        self._record("joined", durable=True)
        text = f"the copy on {self._order.target.host} took {progress.done / (1 << 20):.1f} MiB"
        self._context.say(
            "volume.rebuild", self._order.volume.id, text, id=self._order.id, bytes=progress.done
        )
        return True

    async def _check_unused(self) -> None:
        """Somebody who has it open would write past the copy."""
        for status in await self._storage.observe():
            if status.id == self._order.volume.id and status.clients > 0:
                raise Unavailable(
                    f"{status.id} is open by {status.clients}, of whom the order says nothing",
                    remedy="it is planned again",
                )

    # --- who has it open ---

    @property
    def _before(self) -> VolumeAttachment | None:
        """How its server reached it when the order was made; None if nobody has it open."""
        client = self._order.client
        found = (a for a in (client.attachments if client else ()) if a.volume == self._order.volume.id)
        return next(found, None)

    async def _lead_back(self) -> None:
        before = self._before
        if before is not None:
            await self._lead_to(before, for_ever=True)

    async def _lead_to(self, attachment: VolumeAttachment, *, for_ever: bool) -> None:
        """Returns when the server reaches the volume so, wherever it is. Not `for_ever`: Unavailable if it
        does not for long, Refused if that is cancelled."""
        client = self._order.client
        assert client is not None
        body = VolumeAttach(
            id=self._order.id, server=client.server, epoch=client.epoch, attachment=attachment
        )
        since = self._context.now()
        while True:
            others = [host for host in self._hosts.all if host != client.at.host]
            reasons: list[str | None] = []
            for host in (client.at.host, *others):
                reasons.append(await self._attached(host, body))
                if reasons[-1] is None:
                    return
            told_why = [reason for reason in reasons if reason]
            late = self._context.now() - since
            if not told_why and late > OWNERLESS_SECONDS:
                return  # it is gone
            if self._cancelled and not for_ever:
                raise Refused("cancelled by an operator", field="operation")
            if late > SILENCE_SECONDS and not for_ever:
                why = "; ".join(told_why)
                raise Unavailable(f"{client.server} does not reach {self._order.volume.id} anew: {why}")
            self._say_wait(f"{client.server} to reach {self._order.volume.id} anew ({'; '.join(told_why)})")
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def _attached(self, host: HostId, body: VolumeAttach) -> str | None:
        """None once it was done; empty if the server is not there; else why not."""
        try:
            await self._hosts.ask(host, body, ATTACH_SECONDS)
        except Stale as stale:
            return stale.message
        except Conflict as conflict:
            return "" if conflict.field == "server" else f"{host}: {conflict.message}"
        except Error as error:
            if error.field == LOST_BEFORE:
                raise  # for good: it is ordered anew
            return f"{host}: {error.message}"
        return None

    # --- the end ---

    async def _undo(self, error: Error) -> None:
        order = self._order
        self._context.say("volume.rebuild", order.volume.id, f"given up: {error}", id=order.id)
        if self._journal.step == "join":
            await self._until_done("who has it open to leave the copy", self._lead_back)
        await self._until_done("the storage to stop copying", self._stop)
        await self._forget()
        self._end(OperationState.UNDONE, error)

    async def _stop(self) -> None:
        try:
            await self._storage.relocate_cancel(self._order.volume.id)
        except NotFound:
            return

    async def _forget(self) -> None:
        """Spares the target what it has received; it counts for nothing anyhow."""
        if "attempts" not in self._journal.notes:
            return
        body = VolumeForget(id=self._order.id, volume=self._order.volume.id)
        try:
            await self._hosts.ask(self._order.target.host, body, FORGET_SECONDS)
        except Exception as error:
            why = self._context.error_of(error)
            self._context.say("volume.rebuild", self._order.volume.id, f"not taken back: {why}")
