"""Watching over the disks of VMMs that run: what stopped a guest, which copy of a volume is lost, how it is
reached again. Knows connections and graphs; never decides that a copy does not count any more, nor lets a
guest run.

A copy counts as lost for a VMM when its daemon does not answer (see `disks_live.doors`), or answers and fails
the same VMM again and again. A connection over which a request stays unanswered is ended from outside: the
quorum then fails, and the guest stands still until somebody has decided.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Error
from nahtlos.physical.hypervisor import disks
from nahtlos.physical.hypervisor.connections import Address, Silence, answers, bound, end, ends, silences
from nahtlos.physical.hypervisor.disks import Disk, disks_of
from nahtlos.physical.hypervisor.disks_live import CONNECT_WITHIN, LiveDisks, doors, statuses
from nahtlos.physical.hypervisor.vmm import Vmm
from nahtlos.physical.ports import DiskProblem, DiskTrouble, Supervisor, VmmId

STOPPED_BY_DISK = "io-error"
"""QEMU's run state."""
HUNG_SECONDS = 1.5
"""A request unanswered for so long, and no greeting at the door: its daemon hangs."""
GREET_SECONDS = 0.5
BREAKS = "its connection breaks again and again: a block of it cannot be read, or its daemon does not stay"
HUNG_KNOWN_SECONDS = 5.0
IDLE_LOOK_SECONDS = 1.0
SLOW_SECONDS = 15.0
"""The same, of a daemon that greets: its disk hangs."""
UNSTEADY_LOOKS, UNSTEADY_SECONDS = 3, 1.0
"""Looks in a row that find another connection than the one before, and the time between two."""
BLAMED_TIMES, BLAMED_SECONDS = 3, 30.0
"""A copy that answers and still fails so often within so long is lost."""


class Unsteady:
    """Of a VMM's connections that come back by themselves: whether they break again and again. A storage
    daemon ends the connection over which a block is asked for that it cannot read; the request then waits for
    ever."""

    def __init__(self) -> None:
        self._ends: frozenset[Address] = frozenset()
        self._changes = 0

    def seen(self, ends: frozenset[Address]) -> bool:
        """`ends`: where they begin now. Called at even times."""
        self._changes = self._changes + 1 if self._ends and self._ends - ends else 0
        self._ends = ends or self._ends
        return self._changes >= UNSTEADY_LOOKS


class DiskCare:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._event = asyncio.Event()
        self._looked: dict[Address, float] = {}
        self._hung: dict[Address, float] = {}
        self._unsteady: dict[VmmId, Unsteady] = {}
        self._breaks: frozenset[VmmId] = frozenset()
        """Whose connections to an only copy break again and again."""
        self._looked_at_ends = 0.0

    def heard(self) -> None:
        """Some VMM has told something about its disks."""
        self._event.set()

    # --- changes ---

    async def reconcile(self, vmm: Vmm, server: ServerConfig) -> tuple[str, ...]:
        """The record names what is wanted before it is: an interrupted change is completed by the next
        call."""
        record = vmm.record
        disks_of(server)
        if record is not None and record.server != server:
            vmm.write_record(msgspec.structs.replace(record, server=server))
        live, failed = LiveDisks(vmm, server), await self._failed(vmm, server)
        if failed:
            return await live.connect_anew(failed)  # `watch` bounds what is new, once the guest runs
        done = await live.reconcile()
        await self._bound(vmm, server)
        return done

    async def complete(self, vmm: Vmm) -> None:
        """Before a guest runs again: what was begun and interrupted."""
        record = vmm.record
        if record is None or all(len(disk.keys) == 1 for disk in disks_of(record.server)):
            return
        if not await LiveDisks(vmm, record.server).is_whole():
            await self.reconcile(vmm, record.server)

    async def settled(self, vmm: Vmm, server: ServerConfig) -> bool:
        """See `ports.Hypervisor.disks_settled`."""
        return await LiveDisks(vmm, server).settled()

    async def settle(self, vmm: Vmm) -> None:
        """A VMM was started: its connections are bounded from now on."""
        record = vmm.record
        if record is not None:
            await self._bound(vmm, record.server)

    async def _failed(self, vmm: Vmm, server: ServerConfig) -> frozenset[str]:
        """Roots of quorums with a connection that broke."""
        if await vmm.state() != STOPPED_BY_DISK:
            return frozenset()
        found = await statuses(vmm)
        several = {disk.root for disk in disks_of(server) if len(disk.keys) > 1}
        return frozenset(root for root, status in found.items() if status == "failed" and root in several)

    async def _bound(self, vmm: Vmm, server: ServerConfig) -> None:
        pid, addresses = await self._pid(vmm), _addresses(server)
        if pid is not None and addresses:
            await asyncio.to_thread(bound, pid, addresses)

    async def _pid(self, vmm: Vmm) -> int | None:
        unit = (await self._supervisor.units()).get(vmm.id.unit)
        return unit.pid if unit else None

    # --- what is wrong ---

    async def stopped(self, vmm: Vmm) -> tuple[DiskProblem, ...]:
        """Why a guest that its disks have stopped stands still, as its VMM tells it. Quick."""
        record = vmm.record
        if record is None:
            return ()
        found = await statuses(vmm)
        told = tuple(
            problem
            for disk in disks_of(record.server)
            if (problem := _problem(disk, found.get(disk.root, "ok"))) is not None
        )
        if told or vmm.id not in self._breaks:
            return told
        single = (disk for disk in disks_of(record.server) if len(disk.keys) == 1)
        return tuple(
            DiskProblem(volume=disk.volume, trouble=DiskTrouble.ERROR, text=BREAKS) for disk in single
        )

    async def check(self, vmm: Vmm) -> tuple[DiskProblem, ...]:
        """The same, with the copies that are lost."""
        record = vmm.record
        told = await self.stopped(vmm)
        if record is None:
            return told
        trouble = {problem.volume: problem.trouble for problem in told}
        several = [d for d in disks_of(record.server) if d.volume in trouble and len(d.keys) > 1]
        silent = [d for d in several if trouble[d.volume] is DiskTrouble.ERROR]
        lost = await lost_copies(silent, hung=self._known_hung())
        known = {problem.volume for problem in lost}
        failed, vmm.failed_nodes = vmm.failed_nodes, set()
        keys = {key for node in failed if (key := disks.key_in(node)) is not None}
        blamed = [
            blame
            for disk in several
            if disk.volume not in known
            for blame in _blamed(vmm, disk, keys, full=trouble[disk.volume] is DiskTrouble.NO_SPACE)
        ]
        return (*told, *lost, *blamed)

    # --- watching ---

    async def watch(self, vmms: Mapping[VmmId, Vmm], timeout: float) -> tuple[VmmId, ...]:
        """Those whose guest its disks have stopped: at once when a VMM tells so, else after `timeout`."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            await self._end_silences(vmms.values())
            await self._look_at_ends(vmms.values())
        self._event.clear()
        there = [(v, vmm) for v, vmm in vmms.items() if vmm.record is not None]
        return tuple([v for v, vmm in there if v in self._breaks or await _stopped(vmm)])

    async def _look_at_ends(self, vmms: Iterable[Vmm]) -> None:
        now = time.monotonic()
        if now - self._looked_at_ends < UNSTEADY_SECONDS:
            return
        self._looked_at_ends = now
        units, breaks, known = await self._supervisor.units(), set[VmmId](), dict[VmmId, Unsteady]()
        for vmm in tuple(vmms):
            unit, record = units.get(vmm.id.unit), vmm.record
            addresses = _addresses(record.server, several=False) if record else frozenset[Address]()
            if unit is None or unit.pid is None or not addresses:
                continue
            unsteady = known[vmm.id] = self._unsteady.get(vmm.id, Unsteady())
            try:
                found = await asyncio.to_thread(ends, unit.pid, addresses)
            except OSError:
                continue  # it has just ended
            if unsteady.seen(found):
                breaks.add(vmm.id)
        self._unsteady, self._breaks = known, frozenset(breaks)

    async def _end_silences(self, vmms: Iterable[Vmm]) -> None:
        """Of daemons that hang, and of those whose disk does."""
        found = [each for each in await self._silences(vmms) if each[1].seconds > HUNG_SECONDS]
        addresses = {s.address for _, s in found if s.unanswered or self._due(s.address)}
        async with asyncio.TaskGroup() as group:
            looks = {address: group.create_task(_greets(address)) for address in addresses}
        hung = {address for address, look in looks.items() if not look.result()}
        slow = {s.address for _, s in found if s.unanswered and s.seconds > SLOW_SECONDS}
        self._hung.update(dict.fromkeys(hung | slow, time.monotonic()))
        for pid, silence in found:
            if silence.address in hung | slow:
                await asyncio.to_thread(end, pid, silence.address)

    def _known_hung(self) -> frozenset[Address]:
        """Whose connections were ended a moment ago: they had their time."""
        now = time.monotonic()
        return frozenset(address for address, at in self._hung.items() if now - at < HUNG_KNOWN_SECONDS)

    def _due(self, address: Address) -> bool:
        """A connection that may only be idle is looked into now and then."""
        now = time.monotonic()
        if now - self._looked.get(address, 0.0) < IDLE_LOOK_SECONDS:
            return False
        self._looked[address] = now
        return True

    async def _silences(self, vmms: Iterable[Vmm]) -> list[tuple[int, Silence]]:
        units = await self._supervisor.units()
        found: list[tuple[int, Silence]] = []
        for vmm in tuple(vmms):
            unit, record = units.get(vmm.id.unit), vmm.record
            addresses = _addresses(record.server) if record else frozenset[Address]()
            if unit is None or unit.pid is None or not addresses:
                continue
            try:
                await asyncio.to_thread(bound, unit.pid, addresses)
                found += [(unit.pid, s) for s in await asyncio.to_thread(silences, unit.pid, addresses)]
            except OSError:
                continue  # it has just ended
        return found


async def lost_copies(
    several: Iterable[Disk], *, hung: frozenset[Address] = frozenset()
) -> tuple[DiskProblem, ...]:
    """Copies whose daemon does not answer. `hung`: of which that is known."""
    found: list[DiskProblem] = []
    for disk in several:
        for endpoint, open_ in zip(disk.endpoints, await doors(disk, shut=hung), strict=True):
            if not open_:
                text = f"nobody answers at {endpoint.address}:{endpoint.port}"
                found.append(
                    DiskProblem(
                        volume=disk.volume,
                        trouble=DiskTrouble.REPLICA_LOST,
                        replica=endpoint.host,
                        text=text,
                    )
                )
    return tuple(found)


def _blamed(vmm: Vmm, disk: Disk, failed: set[str], *, full: bool) -> Iterable[DiskProblem]:
    """Of copies that answer. `failed`: those that did now. `full`: they had no room; where none of them has,
    room is waited for, and nobody is to blame."""
    now = time.monotonic()
    times = {key: _lately(vmm, key, now, failed=key in failed) for key in disk.keys}
    if full and all(times.values()):
        return
    for key, endpoint in zip(disk.keys, disk.endpoints, strict=True):
        if key in vmm.refused_keys:
            vmm.refused_keys.discard(key)
            text = f"its daemon does not serve {endpoint.export}"
        elif key in failed and len(times[key]) >= BLAMED_TIMES:
            what = "has no room left for what is written" if full else "answers and failed"
            text = f"its daemon {what}, {len(times[key])} times in {BLAMED_SECONDS:g} s"
        else:
            continue
        yield DiskProblem(
            volume=disk.volume, trouble=DiskTrouble.REPLICA_LOST, replica=endpoint.host, text=text
        )


def _lately(vmm: Vmm, key: str, now: float, *, failed: bool) -> list[float]:
    times = [at for at in vmm.blamed.get(key, []) if now - at < BLAMED_SECONDS]
    vmm.blamed[key] = times = [*times, now] if failed else times
    return times


def _problem(disk: Disk, status: str) -> DiskProblem | None:
    match status:
        case "nospace":
            return DiskProblem(
                volume=disk.volume, trouble=DiskTrouble.NO_SPACE, text="the pool under it is full"
            )
        case "failed":
            return DiskProblem(
                volume=disk.volume, trouble=DiskTrouble.ERROR, text="it does not take requests"
            )
        case _:
            return None


async def _stopped(vmm: Vmm) -> bool:
    try:
        return await vmm.state() == STOPPED_BY_DISK
    except Error:
        return False


async def _greets(address: Address) -> bool:
    return await answers(address, connect_within=CONNECT_WITHIN, greet_within=GREET_SECONDS)


def _addresses(server: ServerConfig, *, several: bool = True) -> frozenset[Address]:
    """Of volumes with several copies, or of the others: these wait for their only one as long as it takes."""
    return frozenset(
        (each.address, each.port)
        for disk in disks_of(server)
        if (len(disk.keys) > 1) is several and disk.attachment.rbd is None
        for each in disk.endpoints
    )
