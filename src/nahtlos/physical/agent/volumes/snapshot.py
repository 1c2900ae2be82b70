"""A group of snapshots of one moment, over volumes, their copies and hosts.

    one host has all of it:   begin -> take -> done                the driver makes one moment of it
    else:                     begin -> take -> (prepare, freeze, take, thaw) -> done
                                        |  \\___ broken: undo, again
                                        `---- given up: undo everywhere -> done (undone)

Where several hosts take part nothing but the guests themselves can be one moment: they stand still while
every host takes its part, and each says afterwards whether it stood still all the time. If one did not, or a
host did not answer in time, what was taken is deleted again and the guests go on; then it is tried anew.
Every host prepares its part before anybody stands still, so that little is left to be done meanwhile.
Where file systems are to be consistent they are frozen around all of it (`guests.group`). Where the memory of
the server is taken, too, it is saved before, around and after it (`memory`) by this agent, its host's.
Guests never wait for this agent: each host lets its own go on by itself when the time is over (`freeze`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord, Refused, Unavailable
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import Consistency, SnapshotSpec
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.guests.group import FILESYSTEM, FrozenGuests
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes.hosts import Hosts
from nahtlos.physical.agent.volumes.memory import MemorySave, let_go
from nahtlos.physical.agent.volumes.peers import ForVolume
from nahtlos.wire.volumes import (
    SnapshotOrder,
    VolumeFreeze,
    VolumeSnapshot,
    VolumeSnapshotPrepare,
    VolumeThaw,
)

ATTEMPTS = 5
ASK_AGAIN_SECONDS = 0.25
TAKE_SECONDS = 30.0
UNDO_SECONDS = 10.0
THAW_SECONDS = 5.0
MEMORY = "result.memory"
"""Note, and result: what was saved, and for how long its guest stood still."""
STOOD_STILL = "result.stood_still_ms"
"""Note, and result: for how long servers of several hosts stood still at most."""
FIND_SECONDS = 30.0
"""The longest that is waited for a server that moves."""


class GroupSnapshot:
    """`run` may be called again after a restart of the agent."""

    def __init__(self, context: Context, journal: Journal) -> None:
        assert isinstance(journal.task, SnapshotOrder), f"operation {journal.id} takes no snapshots"
        self._context = context
        self._journal = journal
        self._order = journal.task
        self._hosts = Hosts(context, self._order.hosts)
        self._guests = FrozenGuests(context, self._hosts, self._order)
        self._parts = parts(self._order.snapshots, self._order.coordinator)
        self._cancelled = False
        self._taking = False

    @property
    def journal(self) -> Journal:
        return self._journal

    def cancel(self) -> None:
        if self._taking:
            raise Conflict("the snapshots are being taken", field="operation")
        self._cancelled = True

    async def run(self, *, recovering: bool) -> Journal:
        try:
            await self._carry_out(recovering=recovering)
        finally:
            await self._hosts.close()
            self._context.waits.pop(self._order.id, None)
        return self._journal

    async def _carry_out(self, *, recovering: bool) -> None:
        self._record("take")
        memory = self._order.memory
        if recovering and memory is not None:
            await let_go(self._context, self._order.id, memory.server)
        if recovering and (self._several or self._freezes or memory is not None):
            # Whether all of it is of one moment, and of frozen file systems, nobody knows any more.
            await self._undo()
        error: Error = Unavailable("nothing was tried")
        for attempt in range(ATTEMPTS):
            if self._cancelled:
                error = Refused("cancelled by an operator", field="operation")
                break
            if attempt:
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            try:
                await self._take()
            except Exception as raised:
                error = self._context.error_of(raised)
                self._context.say("snapshot.again", self._order.group, str(error), id=self._order.id)
                await self._undo()
                if isinstance(error, Refused) and not isinstance(error, Conflict):
                    break
            else:
                self._end(OperationState.DONE, None)
                return
        self._end(OperationState.UNDONE, error)

    @property
    def _several(self) -> bool:
        return len(self._parts) > 1

    @property
    def _freezes(self) -> bool:
        return self._order.consistency is not Consistency.CRASH

    async def _take(self) -> None:
        if self._order.memory is not None:
            await self._take_with_memory()
            return
        self._taking = True
        try:
            if self._several or self._freezes:
                await self._prepare()
            async with self._guests.frozen():
                if self._several:
                    self._note(STOOD_STILL, str(round(1000 * await self._stand_still_and_take())))
                else:
                    await self._take_alone()
        finally:
            self._taking = False
        if self._freezes:
            held = (each.id for each in self._order.snapshots if each.volume in self._guests.consistent)
            self._note(FILESYSTEM, " ".join(held))

    def _note(self, name: str, text: str) -> None:
        self._journal = msgspec.structs.replace(self._journal, notes={**self._journal.notes, name: text})

    async def _prepare(self) -> None:
        """Agents of an earlier release do not know that, and do all of it later."""
        asked = [
            self._hosts.ask(host, VolumeSnapshotPrepare(id=self._order.id, snapshots=part), TAKE_SECONDS)
            for host, part in self._parts.items()
        ]
        for result in await asyncio.gather(*asked, return_exceptions=True):
            unknown = isinstance(result, Refused) and result.field == "message"
            if isinstance(result, BaseException) and not unknown:
                raise result

    async def _take_with_memory(self) -> None:
        """The disks are of the moment the memory is of: the guest stands still from before its last page is
        sent until after the last disk was taken."""
        save = MemorySave(self._context, self._order)
        async with save.running():
            await save.until_little_is_left(lambda: self._cancelled)
            self._taking = True
            try:
                await self._prepare()
                stood_still = await self._stand_still_and_take(save.rest)
                taken = await save.finished(stood_still)
            finally:
                self._taking = False
        self._note(MEMORY, msgspec.json.encode(taken).decode())

    async def _take_alone(self) -> None:
        ((host, part),) = self._parts.items()
        await self._hosts.ask(host, VolumeSnapshot(id=self._order.id, snapshots=part), TAKE_SECONDS)

    async def _stand_still_and_take(self, beside: Callable[[], Awaitable[None]] | None = None) -> float:
        """Every server that was told to stand still is told to go on, whatever happens in between. `beside`:
        what else is done meanwhile. Seconds it took, as seen from here."""
        order, frozen = self._order, dict[ServerId, HostId]()
        held: list[Error] = []
        loop = asyncio.get_running_loop()
        began = loop.time()
        places = {client.server: client.at.host for client in order.clients}
        try:
            async with asyncio.timeout(FIND_SECONDS + order.stop_seconds):
                await self._freeze_all(places, frozen)
                await self._side_by_side(
                    {host: VolumeSnapshot(id=order.id, snapshots=part) for host, part in self._parts.items()},
                    order.stop_seconds,
                    beside,
                )
        except TimeoutError:
            raise Unavailable(f"not all servers stood still within {FIND_SECONDS:g} s") from None
        finally:
            async with asyncio.TaskGroup() as tasks:
                for server, host in frozen.items():
                    tasks.create_task(self._thaw(server, host, held))
        if held:
            raise held[0]
        return loop.time() - began

    async def _freeze_all(self, places: Mapping[ServerId, HostId], frozen: dict[ServerId, HostId]) -> None:
        """`frozen` is filled with those that stand still, also if another one could not be told to."""
        asked = [self._freeze(server, place) for server, place in places.items()]
        results = await asyncio.gather(*asked, return_exceptions=True)
        stand = zip(places, results, strict=True)
        frozen |= {server: result for server, result in stand if not isinstance(result, BaseException)}
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _freeze(self, server: ServerId, expected: HostId) -> HostId:
        """Where it was frozen: there, or wherever it has moved to meanwhile."""
        epoch = next((each.epoch for each in self._order.clients if each.server == server), 0)
        body = VolumeFreeze(id=self._order.id, server=server, epoch=epoch, seconds=self._order.stop_seconds)
        others = [host for host in self._hosts.all if host != expected]
        why = ""
        for host in (expected, *others):
            try:
                await self._hosts.ask(host, body, self._order.stop_seconds)
            except Error as error:
                if not (isinstance(error, Conflict) and error.field == "server"):
                    # It may stand still: let it go on, before anything else.
                    await self._thaw(server, host, [])
                    raise
                why = error.message
            else:
                return host
        raise Unavailable(f"no host says that it owns {server}: {why}", field="server")

    async def _thaw(self, server: ServerId, host: HostId, errors: list[Error]) -> None:
        try:
            await self._hosts.ask(host, VolumeThaw(id=self._order.id, server=server), THAW_SECONDS)
        except Exception as error:
            errors.append(self._context.error_of(error))

    async def _side_by_side(
        self,
        bodies: Mapping[HostId, ForVolume],
        timeout: float,
        beside: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Raises the first error, when all have answered."""
        asked: list[Awaitable[None]] = [beside()] if beside is not None else []
        asked += [self._hosts.ask(host, body, timeout) for host, body in bodies.items()]
        for result in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    # --- back ---

    async def _undo(self) -> None:
        """Until every host has said that it has none of them: one that kept its part would pass for another
        moment's."""
        for host, part in self._parts.items():
            body = VolumeSnapshot(id=self._order.id, snapshots=part, undo=True)
            while True:
                try:
                    await self._hosts.ask(host, body, UNDO_SECONDS)
                except Exception as error:
                    why = self._context.error_of(error).message
                    self._context.waits[self._order.id] = f"{host} to delete its part again ({why})"
                    await asyncio.sleep(ASK_AGAIN_SECONDS)
                else:
                    break
        self._context.waits.pop(self._order.id, None)

    # --- record ---

    def _mark(self, step: str) -> None:
        times = {**self._journal.times, step: self._context.now()}
        self._journal = msgspec.structs.replace(self._journal, step=step, times=times)

    def _record(self, step: str) -> None:
        self._mark(step)
        self._journal = self._context.ledger.note(self._journal, step)
        self._context.changed()

    def _end(self, state: OperationState, error: Error | None) -> None:
        self._mark("done")
        record = ErrorRecord.of(error) if error else None
        self._journal = msgspec.structs.replace(self._journal, state=state, error=record)
        self._context.ledger.note(self._journal, "end")
        self._context.say("volume.step", self._order.group, state, id=self._order.id)
        self._context.changed()


def parts(snapshots: Iterable[SnapshotSpec], coordinator: HostId) -> dict[HostId, tuple[SnapshotSpec, ...]]:
    """What each host keeps; where nothing is said the coordinator does."""
    found: dict[HostId, list[SnapshotSpec]] = {}
    for snapshot in snapshots:
        for host in snapshot.hosts or (coordinator,):
            found.setdefault(host, []).append(snapshot)
    return {host: tuple(part) for host, part in found.items()}
