"""What the end of an operation of volumes means for the record. The record decides which copies are current,
so what is written here is all that makes a copy one: in one transaction with the operation's end, and only
as far as no loss has come between.

    relocated   the copy is at its destination, by its new epoch
    rebuilt     the copy is current, unless it was lost again since it was decided
    snapshots, backups, a restored volume: they are there from here on (`server_snapshot_records`: of servers)
    snapshots moved  they are kept at their destination, and their host is told to let go of them
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import Blueprint, OperationRecord
from nahtlos.model.errors import Conflict, ErrorRecord, NotFound, Refused
from nahtlos.model.ids import BackupId, HostId, OperationId, VolumeId
from nahtlos.model.inventory import OperationState, OperationStatus
from nahtlos.model.storage import (
    BackupSpec,
    Consistency,
    Replica,
    ReplicaState,
    SnapshotExport,
    SnapshotSpec,
    VolumeSpec,
)
from nahtlos.model.volume_work import (
    BackingUp,
    DeletingBackup,
    PlannedVolumeTask,
    Rebuilding,
    Relocation,
    Restoring,
    Reverting,
    Scrubbing,
    SnapshotGroup,
    SnapshotMove,
    VolumeWork,
    WritingFile,
    kind_of,
    volumes_of,
    words,
)
from nahtlos.runtime.controllers import server_snapshot_records
from nahtlos.runtime.controllers.server_snapshot_records import RESULT, disk_is_back, given_up
from nahtlos.runtime.store import intent, operations, volumes
from nahtlos.runtime.store.events import EventDraft
from nahtlos.runtime.store.volumes import pinned_epochs, with_state

EXPORT_PORTS = (10900, 10999)
"""At which a host serves snapshots to who has a credential; the first and the last."""


@dataclass(frozen=True, kw_only=True)
class EndedTask:
    task: PlannedVolumeTask
    status: OperationStatus
    cancelled: bool
    """Its wish was taken back: it is not tried again."""

    @property
    def done(self) -> bool:
        return self.status.state is OperationState.DONE

    @property
    def hopeless(self) -> bool:
        """It would be refused again: what is in its way is people's."""
        error = self.status.error
        refused = error is not None and error.kind in (Refused.kind, Conflict.kind, NotFound.kind)
        work = self.task.work
        strict = isinstance(work, SnapshotGroup | BackingUp) and work.consistency is Consistency.FILESYSTEM
        strict |= isinstance(work, BackingUp) and error is not None and error.field in ("target", "backup")
        strict |= isinstance(work, SnapshotGroup) and work.memory is not None
        return (
            not self.done
            and refused
            and (strict or isinstance(work, Restoring | SnapshotMove | WritingFile | DeletingBackup))
        )


async def write_end(tx: AsyncConnection, end: EndedTask, now: float) -> EventDraft:
    """The operation's end, and what follows from it."""
    if end.done:
        await _apply(tx, end.task, end.status.result, now)
    elif isinstance(end.task.work, Rebuilding):
        await _rebuilt(tx, end.task, end.task.work, done=False)
    if end.task.wish and (end.done or end.cancelled or end.hopeless):
        await volumes.forget_wish(tx, end.task.wish)
        if not end.done and isinstance(end.task.work, SnapshotGroup):
            await given_up(tx, end.task.work)
    record = record_of(
        end.task,
        state=end.status.state.value,
        error=None if end.done else end.status.error,
        times=end.status.times,
        result=end.status.result,
    )
    await operations.end(tx, record, now)
    return _announcement("ended", record, end.task.work)


async def _apply(tx: AsyncConnection, task: PlannedVolumeTask, result: Mapping[str, str], now: float) -> None:
    match task.work:
        case Relocation():
            await _relocated(tx, task, task.work)
        case Rebuilding():
            await _rebuilt(tx, task, task.work, done=True)
        case Reverting():
            spec = await volumes.get(tx, task.work.volume)
            if spec is not None:
                await volumes.put(tx, reverted(spec, task.coordinator, task.epoch))
            await disk_is_back(tx, task.work.volume, task.work.snapshot)
        case SnapshotGroup():
            taken = snapshots_taken(task.work.snapshots, result, now)
            await volumes.add_snapshots(tx, taken)
            await server_snapshot_records.taken(tx, task.work, result.get(RESULT, ""), now)
        case SnapshotMove():
            await _snapshots_moved(tx, task.work)
        case BackingUp():
            await volumes.add_backup(tx, backup_made(task.work.backup, result, now))
        case Restoring():
            if await volumes.get(tx, task.work.volume.id) is None:
                await volumes.add(tx, task.work.volume)
        case Scrubbing():
            if task.work.repair:
                await _distrust(tx, task.work.volume, result.get("wrong", ""))
        case DeletingBackup():
            await volumes.forget_backup(tx, task.work.backup.id)
        case WritingFile():
            pass


async def _distrust(tx: AsyncConnection, volume: VolumeId, hosts: str) -> None:
    """Copies that were found wrong are made anew. The last one is what there is."""
    for host in hosts.split():
        spec = await volumes.get(tx, volume)
        if spec is None or HostId(host) not in spec.current:
            continue
        try:
            await volumes.lose_copy(tx, volume, HostId(host))
        except (Conflict, NotFound):
            return


def snapshots_taken(
    specs: Iterable[SnapshotSpec], result: Mapping[str, str], now: float
) -> tuple[SnapshotSpec, ...]:
    """As their host tells: those for which the guests had frozen their file systems."""
    frozen = result.get("filesystem", "").split()
    return tuple(
        msgspec.structs.replace(
            spec,
            created_at=now,
            consistent=Consistency.FILESYSTEM if spec.id in frozen else Consistency.CRASH,
        )
        for spec in specs
    )


def backup_made(spec: BackupSpec, result: Mapping[str, str], now: float) -> BackupSpec:
    """As its host tells: where it did not know any more what had changed, it has made a whole one."""
    base = BackupId(result["base"]) if result.get("base") else None
    stored = result.get("stored_bytes", "")
    frozen = result.get("filesystem", "").split()
    return msgspec.structs.replace(
        spec,
        base=base if "base" in result else spec.base,
        stored_bytes=int(stored) if stored.isdecimal() else spec.stored_bytes,
        created_at=now,
        consistent=Consistency.FILESYSTEM if spec.id in frozen else Consistency.CRASH,
    )


async def _relocated(tx: AsyncConnection, task: PlannedVolumeTask, work: Relocation) -> None:
    spec = await volumes.get(tx, work.volume)
    if spec is None or work.destination is None or work.source is None:
        return
    lost = await volumes.losses_at(tx, work.volume, work.destination) != task.losses
    await volumes.put(tx, relocated(spec, work, task.epoch, lost=lost))


async def _rebuilt(tx: AsyncConnection, task: PlannedVolumeTask, work: Rebuilding, *, done: bool) -> None:
    """What was lost meanwhile does not count, and its epoch is used up as well: hosts it was lost to never
    reach a copy by that again, so that the next one would never be written to."""
    spec = await volumes.get(tx, work.volume)
    if spec is None or all(copy.host != work.target for copy in spec.copies):
        return
    lost = await volumes.losses_at(tx, work.volume, work.target) != task.losses
    if done and not lost:
        await volumes.put(tx, with_state(spec, work.target, ReplicaState.CURRENT, task.epoch))
    elif lost and work.target not in spec.current:
        epoch = max(task.epoch, spec.at(work.target).epoch)
        await volumes.put(tx, with_state(spec, work.target, ReplicaState.STALE, epoch))


async def _snapshots_moved(tx: AsyncConnection, work: SnapshotMove) -> None:
    """Also of those that are being deleted: their new host is told to."""
    kept = await volumes.read(tx)
    for name in work.snapshots:
        row = kept.snapshots.get(name)
        if row is None:
            continue
        after = moved_snapshot(row.spec, work.source, work.destination)
        await volumes.put_snapshot(tx, after)
        for volume in (await intent.volumes(tx)).values():
            if volume.spec.snapshot == name and not rests_on(volume.spec, after):
                await volumes.put(tx, msgspec.structs.replace(volume.spec, snapshot=None))
    for export in kept.exports:
        if export.snapshot in work.snapshots and export.host == work.source:
            others = [e for e in (await volumes.read(tx)).exports if e.id != export.id]
            await volumes.forget_export(tx, export.id)
            if (after := moved_export(export, work.destination, others)) is not None:
                await volumes.put_export(tx, after)


# --- what snapshots are then -------------------------------------------------------------------------


def moved_snapshot(spec: SnapshotSpec, source: HostId, destination: HostId) -> SnapshotSpec:
    hosts = (destination if host == source else host for host in spec.hosts)
    return msgspec.structs.replace(spec, hosts=tuple(dict.fromkeys(hosts)))


def rests_on(volume: VolumeSpec, snapshot: SnapshotSpec) -> bool:
    """Whether a clone may still rest on a snapshot that has moved: where that was before, too."""
    return any(copy.host in snapshot.hosts for copy in volume.copies)


def moved_export(
    export: SnapshotExport, to: HostId, others: Iterable[SnapshotExport]
) -> SnapshotExport | None:
    """By the same name and credential until the same moment, at another address. None: no port is free."""
    used = {each.port for each in others if each.host == to}
    first, last = EXPORT_PORTS
    ports = (export.port, *range(first, last + 1))
    port = next((each for each in ports if each not in used), None)
    return None if port is None else msgspec.structs.replace(export, host=to, port=port)


# --- what a volume is then ---------------------------------------------------------------------------


def relocated(spec: VolumeSpec, work: Relocation, epoch: int, *, lost: bool = False) -> VolumeSpec:
    """`lost`: writes were acknowledged without the copy that came. It counts all the same if it is the only
    one: then nobody can have written elsewhere."""
    source, destination = work.source, work.destination
    assert source is not None and destination is not None, f"{spec.id} went from or to nowhere"
    before = next((copy for copy in spec.copies if copy.host == source), None)
    if before is None:
        return spec
    others = [copy for copy in spec.copies if copy.host != source]
    stale = lost or before.state is ReplicaState.STALE
    current_elsewhere = any(copy.state is ReplicaState.CURRENT for copy in others)
    state = ReplicaState.STALE if stale and current_elsewhere else ReplicaState.CURRENT
    if source != spec.host:
        came = Replica(host=destination, state=state, epoch=epoch)
        replicas = tuple(came if replica.host == source else replica for replica in spec.replicas)
        return msgspec.structs.replace(spec, replicas=replicas)
    return msgspec.structs.replace(
        spec,
        host=destination,
        epoch=epoch,
        state=state,
        replicas=pinned_epochs(spec),
        backend=work.backend,
        format=work.format or spec.format,
        snapshot=spec.snapshot if others else None,
    )


def reverted(spec: VolumeSpec, host: HostId, epoch: int) -> VolumeSpec:
    """The copy at `host` is what counts now; the others are made like it."""
    for copy in spec.copies:
        if copy.host != host:
            spec = with_state(spec, copy.host, ReplicaState.STALE)
    return with_state(spec, host, ReplicaState.CURRENT, epoch)


def rehomed(spec: VolumeSpec, lost: HostId, to: HostId) -> VolumeSpec:
    """The stale copy at `lost` is given up, and one at `to` is to be made."""
    new = Replica(host=to, state=ReplicaState.STALE, epoch=spec.newest_epoch + 1)
    kept = [copy for copy in spec.copies if copy.host != lost]
    return _of_copies(spec, [*kept, new])


def without_copy(spec: VolumeSpec, host: HostId) -> VolumeSpec:
    return _of_copies(spec, [copy for copy in spec.copies if copy.host != host])


def _of_copies(spec: VolumeSpec, copies: list[Replica]) -> VolumeSpec:
    """The home stays what it is if it is among them; else a current copy becomes it."""
    home = next((copy for copy in copies if copy.host == spec.host), None) or next(
        (copy for copy in copies if copy.state is ReplicaState.CURRENT), copies[0]
    )
    others = tuple(copy for copy in copies if copy.host != home.host)
    return msgspec.structs.replace(spec, host=home.host, state=home.state, epoch=home.epoch, replicas=others)


def fenced(spec: VolumeSpec) -> VolumeSpec:
    """By an epoch nothing had before: who has it open still is shut out."""
    epoch = spec.newest_epoch + 1
    replicas = tuple(msgspec.structs.replace(replica, epoch=0) for replica in spec.replicas)
    return msgspec.structs.replace(spec, epoch=epoch, replicas=replicas)


# --- operations --------------------------------------------------------------------------------------


def record_of(
    task: PlannedVolumeTask,
    *,
    state: str = OperationState.RUNNING.value,
    error: ErrorRecord | None = None,
    times: dict[str, float] | None = None,
    result: dict[str, str] | None = None,
) -> OperationRecord:
    source, destination = places_of(task.work)
    return OperationRecord(
        id=task.id,
        kind=kind_of(task.work).value,
        subject=", ".join(volumes_of(task.work)),
        state=state,
        source=source or task.coordinator,
        destination=destination,
        reason=task.reason,
        error=error,
        times=times or {},
        result=result or {},
    )


def places_of(work: VolumeWork) -> tuple[HostId | None, HostId | None]:
    match work:
        case Relocation() | SnapshotMove():
            return work.source, work.destination
        case Rebuilding():
            return work.source, work.target
        case SnapshotGroup() | Reverting() | BackingUp() | Restoring() | DeletingBackup():
            return None, None
        case Scrubbing() | WritingFile():
            return None, None


def begun(parent: Blueprint | None, blueprint: Blueprint) -> list[tuple[OperationRecord, EventDraft]]:
    """Of the tasks that `blueprint` has and `parent` had not."""
    before = {task.id for task in (parent.volume_tasks if parent else ())}
    found: list[tuple[OperationRecord, EventDraft]] = []
    for task in blueprint.volume_tasks:
        if task.id not in before:
            record = record_of(task)
            found.append((record, _announcement("begun", record, task.work)))
    return found


def _announcement(what: str, record: OperationRecord, work: VolumeWork) -> EventDraft:
    data: dict[str, str | int | float] = {"operation": record.id, "state": record.state}
    if record.times:
        data["seconds"] = max(record.times.values()) - min(record.times.values())
    if record.source:
        data["from"] = record.source
    if record.destination:
        data["to"] = record.destination
    why = f": {record.error.message}" if record.error else ""
    begins = what == "begun"
    text = f"{words(work)}{f' ({record.reason})' if begins and record.reason else ''}"
    text += "" if begins else f": {record.state}{why}{found_by(record)}"
    return EventDraft(kind=f"{record.kind}.{what}", subject=record.subject, text=text, data=data)


def found_by(record: OperationRecord) -> str:
    """What came of a scrub, a file or a group of snapshots, in words to go on with."""
    result = record.result
    if "differences" in result:
        wrong = ", ".join(result.get("wrong", "").split())
        many = "1 range" if result["differences"] == "1" else f"{result['differences']} ranges"
        return f": {many} wrong on {wrong}" if wrong else ": all is as it should be"
    if "sha256" in result:
        return f": sha256 {result['sha256']}"
    if "stood_still_ms" in result:
        return f": servers stood still for {result['stood_still_ms']} ms at most"
    return ""


def ended_tasks(
    tasks: Iterable[PlannedVolumeTask],
    statuses: Mapping[OperationId, OperationStatus],
    recorded: Iterable[str],
    cancelled: frozenset[str],
) -> tuple[EndedTask, ...]:
    """Those whose coordinator says that they have ended, and whose end is not recorded yet."""
    known = set(recorded)
    over = (OperationState.DONE, OperationState.UNDONE)
    return tuple(
        EndedTask(task=task, status=status, cancelled=task.wish in cancelled)
        for task in tasks
        if task.id not in known and (status := statuses.get(task.id)) is not None and status.state in over
    )
