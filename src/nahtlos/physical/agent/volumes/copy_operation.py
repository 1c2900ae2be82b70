"""An operation that copies a volume to another host while it is written: what relocations and rebuilds share.

    (asked to make room -> copying, watched, given another speed) again if it breaks off -> what is its own

Owns the journal of the operation and the words said while it waits. Never decides what a complete copy is
for.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar, Generic, TypeVar

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord, NotFound, Unavailable
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import CopyProgress
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes.copying import Pace, fraction, told
from nahtlos.physical.agent.volumes.hosts import Hosts
from nahtlos.wire.volumes import RebuildOrder, RelocateOrder

POLL_SECONDS = 0.05
ASK_AGAIN_SECONDS = 0.25
RECEIVE_SECONDS = 60.0
SILENCE_SECONDS = 60.0
"""A host that cannot be reached for so long, or a copy that has not come forward, is given up."""

Order = TypeVar("Order", RelocateOrder, RebuildOrder)
A = TypeVar("A")


class CopyOperation(Generic[Order]):
    """`run` may be called again after a restart of the agent."""

    too_late: ClassVar[tuple[str, ...]] = ()
    """Steps from which on it cannot be cancelled."""
    why_too_late: ClassVar[str] = ""

    def __init__(self, context: Context, journal: Journal, order: Order) -> None:
        self._context = context
        self._journal = journal
        self._order = order
        self._storage = context.drivers.storage
        self._hosts = Hosts(context, order.hosts)
        self._speed = int(journal.notes.get("speed", order.bytes_per_second))
        self._cancelled = False
        self._wake = asyncio.Event()
        self._pace = Pace()

    @property
    def journal(self) -> Journal:
        return self._journal

    def cancel(self) -> None:
        if self._journal.step in self.too_late:
            raise Conflict(self.why_too_late, field="operation")
        self._cancelled = True
        self._wake.set()

    def set_speed(self, bytes_per_second: int) -> None:
        """From now on, also after a restart."""
        if bytes_per_second == self._speed:
            return
        self._speed = bytes_per_second
        self._note("speed", str(bytes_per_second))
        self._journal = self._context.ledger.note(self._journal)
        self._wake.set()

    async def run(self, *, recovering: bool) -> Journal:
        try:
            await self._carry_out()
        finally:
            await self._hosts.close()
            self._context.waits.pop(self._order.id, None)
            self._context.progress.pop(self._order.id, None)
        return self._journal

    # --- what is its own ---

    async def _carry_out(self) -> None:
        raise NotImplementedError

    async def _start(self) -> None:
        """Have the storage copy, or go on with another speed. An error is followed by a look at what came of
        it."""
        raise NotImplementedError

    @property
    def _to(self) -> HostId:
        """The host it is copied to."""
        raise NotImplementedError

    # --- copying ---

    async def _reach(self, ask: Callable[[], Awaitable[A]]) -> A:
        """Asks who is to have the copy again and again for a while; a refusal is its last word."""
        since = self._context.now()
        while True:
            try:
                return await ask()
            except Unavailable as error:
                if self._cancelled or self._context.now() - since > SILENCE_SECONDS:
                    raise
                self._say_wait(f"{self._to} to make room ({error.message})")
                await self._sleep(ASK_AGAIN_SECONDS)

    async def _wait(self, progress: CopyProgress) -> None:
        now = self._context.now()
        self._pace = self._pace.seen(now, progress)
        self._context.progress[self._order.id] = fraction(progress)
        self._say_wait(told(progress, self._pace, self._to))
        if now - self._pace.moved_at > SILENCE_SECONDS:
            raise Unavailable(
                f"the copy has not come forward for {SILENCE_SECONDS:g} s: {progress.error or 'no reason'}",
                remedy=f"look at the storage of {self._to}",
            )
        if self._wake.is_set() and not self._cancelled:
            self._wake.clear()
            await self._start()
        await self._sleep(POLL_SECONDS)

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

    def _note(self, name: str, value: str) -> None:
        notes = {**self._journal.notes, name: value}
        self._journal = msgspec.structs.replace(self._journal, notes=notes)

    def _mark(self, step: str) -> None:
        times = {**self._journal.times, step: self._context.now()}
        self._journal = msgspec.structs.replace(self._journal, step=step, times=times)

    def _record(self, step: str, *, durable: bool = False) -> None:
        self._mark(step)
        if durable:
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
