"""The memory of a server that runs is saved on a volume, of the moment at which it stands still for the
snapshots of its disks.

    runs, and is saved in passes --little is left--> stands still: the rest, and the snapshots --> runs
                                                              the rest is written from here --> complete

What comes while it stands still waits in this process, up to a bound, so that the guest does not wait for the
volume. Nothing of this is durable before all of it is: an agent that is started again begins anew, after it
has let the guest go on (`let_go`).
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from nahtlos.model.errors import Conflict, Error, Refused, Unavailable
from nahtlos.model.ids import OperationId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.power import PowerState
from nahtlos.model.server_snapshots import Taken
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold, Ownership
from nahtlos.physical.agent.saved_state import Writer
from nahtlos.physical.agent.suspension import described
from nahtlos.physical.agent.volumes.freeze import check_not_frozen, owned
from nahtlos.physical.agent.volumes.passes import Passes, Verdict
from nahtlos.physical.ports import RawVolume, VmmId, VmmStatus
from nahtlos.wire.volumes import SnapshotOrder

LOOK_SECONDS = 0.02
LONGEST_SECONDS = 3600.0
GO_ON_SECONDS = 0.2
"""Between attempts to let a guest go on."""
AHEAD = 8 << 20
"""Bytes that wait here while the guest runs."""
AHEAD_STOPPED = 128 << 20
"""And while it stands still."""


class Pipe:
    """What comes, in order, to who takes it more slowly."""

    def __init__(self, add: Callable[[bytes], Awaitable[None]]) -> None:
        self._bound = AHEAD
        self._add = add
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def put(self, piece: bytes) -> None:
        """Raises what it was not taken for."""
        while self._bytes >= self._bound and self._error is None:
            await self._change()
        if self._error is not None:
            raise self._error
        self._waiting.append(piece)
        self._bytes += len(piece)
        self._changed.set()

    async def run(self) -> None:
        """Until the end was told and all is taken, or something was not."""
        while self._error is None:
            while not self._waiting:
                if self._ended:
                    return
                await self._change()
            piece = self._waiting.popleft()
            try:
                await self._add(piece)
            except Exception as error:
                self._error = error
            self._bytes -= len(piece)
            self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def widen(self, bound: int) -> None:
        self._bound = bound
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def check(self) -> None:
        if self._error is not None:
            raise self._error


class MemorySave:
    """Of the server of one order, once."""

    def __init__(self, context: Context, order: SnapshotOrder) -> None:
        assert order.memory is not None, f"{order.id} is of no memory"
        self._context = context
        self._order = order
        self._memory = order.memory
        self._server = order.memory.server
        self._failed: Exception | None = None

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """It is saved while this is open; its guest runs when this is left, whatever happened."""
        held = self._claim()
        try:
            status = await self._checked(held)
            volume = await self._context.drivers.storage.open_raw(self._memory.attachment, writing=True)
            try:
                self._begin(held, status, volume)
                async with self._flowing():
                    yield
            finally:
                await volume.close()
        finally:
            del self._context.saving[self._server]

    def _claim(self) -> Ownership:
        held = owned(self._context, self._server)
        check_not_frozen(self._context, self._server)
        self._context.saving[self._server] = self._order.id
        return held

    async def _checked(self, held: Ownership) -> VmmStatus:
        vmm = VmmId(self._server, held.epoch)
        status = await _observed(self._context, vmm)
        if status is None or status.state is not RunState.RUNNING or status.disk_problems:
            raise Unavailable(f"{self._server} does not run, or its disks have stopped it", field="server")
        if status.release is None:
            raise Unavailable(f"it is not known what runs {self._server}", field="server")
        return status

    def _begin(self, held: Ownership, status: VmmStatus, volume: RawVolume) -> None:
        self._vmm, self._status = VmmId(self._server, held.epoch), status
        self._writer = Writer(volume)
        self._pipe = Pipe(self._writer.add)
        memory = held.server.spec.size.memory_mib << 20
        room = volume.size - memory // 64
        self._passes = Passes(seconds=self._order.stop_seconds, room=room, memory=memory)

    @asynccontextmanager
    async def _flowing(self) -> AsyncGenerator[None]:
        raised: Exception | None = None
        async with asyncio.TaskGroup() as tasks:
            self._stream = tasks.create_task(self._save())
            self._writing = tasks.create_task(self._pipe.run())
            try:
                yield
            except Exception as error:  # a task group would bundle it
                raised = error
            finally:
                self._stream.cancel()
                self._writing.cancel()
        await let_go(self._context, self._order.id, self._server)
        if raised is not None:
            raise raised

    async def _save(self) -> None:
        try:
            await self._context.drivers.hypervisor.save(self._vmm, self._pipe.put, running=True)
        except Exception as error:
            self._failed = error

    def _check(self) -> None:
        self._pipe.check()
        if self._failed is not None:
            raise self._failed

    # --- the three parts of it -------------------------------------------------------------------------

    async def until_little_is_left(self, cancelled: Callable[[], bool]) -> None:
        """Refused if it writes faster than it can be saved."""
        hypervisor, loop = self._context.drivers.hypervisor, asyncio.get_running_loop()
        until = loop.time() + LONGEST_SECONDS
        while not self._stream.done():
            self._check()
            if cancelled():
                raise Refused("cancelled by an operator", field="operation")
            if loop.time() > until:
                raise Unavailable(f"{self._server} was not saved within {LONGEST_SECONDS:g} s")
            seen = await hypervisor.migrate_progress(self._vmm)
            if seen.total:
                self._context.progress[self._order.id] = min(seen.transferred / seen.total, 0.99)
            verdict = self._passes.seen(
                passes=seen.passes,
                left=seen.remaining,
                sent=seen.transferred,
                now=loop.time(),
            )
            if verdict is Verdict.GIVE_UP:
                raise self._too_fast()
            if verdict is Verdict.STOP:
                return
            await asyncio.sleep(LOOK_SECONDS)
        self._check()

    def _too_fast(self) -> Refused:
        left, takes = self._passes.left >> 20, self._passes.takes(self._passes.left)
        return Refused(
            f"{self._server} writes to its memory as fast as it is saved: {left} MiB are left over, for "
            f"which it would stand still for {takes:.1f} s, and {self._passes.seconds:g} s are allowed",
            field="pause",
            remedy=f"allow it: --pause {max(1.0, 2 * takes):.0f}; or wait until it has less to do",
        )

    async def rest(self) -> None:
        """While it stands still: returns when it may go on."""
        self._check_disks()
        self._pipe.widen(AHEAD_STOPPED)
        done, _ = await asyncio.wait((self._stream,), timeout=self._order.stop_seconds)
        if not done:
            raise Unavailable(f"{self._server} was not saved within {self._order.stop_seconds:g} s")
        self._check()

    def _check_disks(self) -> None:
        """What it remembers of disks is only true of those whose snapshots are taken."""
        held = self._context.ledger.owner(self._server)
        has = {each.volume for each in held.server.all_volumes} if held is not None else set[str]()
        if has != {snapshot.volume for snapshot in self._order.snapshots}:
            raise Refused(
                f"{self._server} was given other disks meanwhile", field="server", remedy="take it again"
            )

    async def finished(self, pause_seconds: float) -> Taken:
        """What was saved is durable; the guest runs on meanwhile."""
        self._pipe.end()
        await asyncio.wait((self._writing,))
        self._check()
        digest = await self._writer.finish()
        held = self._context.ledger.owner(self._server)
        if held is None or held.hold is not Hold.OWNED or held.epoch != self._vmm.epoch:
            raise Conflict(f"{self._server} is not owned here any more", field="server")
        saved = described(
            self._context,
            held.server,
            self._status,
            volume=self._memory.attachment.volume,
            digest=digest,
            size=self._writer.bytes,
        )
        return Taken(saved=saved, pause_seconds=round(pause_seconds, 4))


async def let_go(context: Context, operation: OperationId, server: ServerId) -> None:
    """A guest that was saved, or stopped for that, goes on, if it is to run and nothing else has it: nobody
    else lets one go on whose stream has ended."""
    while True:
        held = context.ledger.owner(server)
        if held is None or held.hold is not Hold.OWNED or context.ledger.running(server) is not None:
            return
        if held.server.spec.power.state is not PowerState.ON:
            return
        vmm = VmmId(server, held.epoch)
        try:
            status = await _observed(context, vmm)
            if status is None or status.state is not RunState.PAUSED or status.disk_problems:
                return
            await context.drivers.hypervisor.resume(vmm)
        except Error as error:
            context.waits[operation] = f"{server} to go on ({error.message})"
            await asyncio.sleep(GO_ON_SECONDS)
        else:
            context.waits.pop(operation, None)
            return


async def _observed(context: Context, vmm: VmmId) -> VmmStatus | None:
    vmms = await context.drivers.hypervisor.observe()
    return next((each for each in vmms if each.id == vmm), None)
