"""What operators see of volumes, put together from the state of the store and a plan. Pure."""

from collections.abc import Collection, Iterable

from nahtlos.model.blueprint import PlanReport
from nahtlos.model.ids import HostId, OperationId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import Inventory, OperationStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.snapshot_places import left_over_snapshots, snapshots_on
from nahtlos.model.storage import Replica, ReplicaState, VolumeSpec
from nahtlos.model.volume_work import (
    BackingUp,
    PlannedVolumeTask,
    Rebuilding,
    Relocation,
    Restoring,
    Scrubbing,
    SnapshotMove,
    VolumeWish,
    VolumeWork,
    WritingFile,
    kind_of,
    new_names,
    volumes_of,
    words,
)
from nahtlos.planner.volumes import kept_on
from nahtlos.runtime.controllers.cloud import KeptVolumes
from nahtlos.runtime.controllers.known_volumes import holder_of
from nahtlos.runtime.controllers.snapshot_requests import (
    clones_of,
    export_uri,
    is_being_deleted,
    rested_on_by,
)
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volumes import (
    BackupView,
    CopyView,
    ExportView,
    SnapshotView,
    TaskView,
    VolumeView,
)

MIB = 1 << 20


def volume_view(
    state: State, inventory: Inventory, report: PlanReport, behind: Collection[HostId], volume: VolumeId
) -> VolumeView:
    """`behind`: hosts that have not converged to what is wanted now."""
    row = state.volumes[volume]
    server = holder_of(state, volume)
    tasks = tuple(
        task for task, volumes in _all_tasks(state, inventory, _waiting(report)) if volume in volumes
    )
    copies = tuple(_copy(inventory, row.spec, copy) for copy in row.spec.copies)
    waits = "; ".join(dict.fromkeys(w.reason for w in report.waiting if w.subject == volume))
    waits = waits or "; ".join(f"{c.host}: {c.problem} ({c.remedy})" for c in copies if c.problem)
    whole = all(copy.served and copy.state is ReplicaState.CURRENT and not copy.problem for copy in copies)
    concerned = [copy.host for copy in row.spec.copies]
    if server is not None:
        concerned.append(_place(state, server))
    return VolumeView(
        spec=row.spec,
        server=server,
        server_host=(_place(state, server) or None) if server is not None else None,
        system=server is not None and state.servers[server].spec.volume == volume,
        copies=copies,
        snapshots=tuple(
            s for s, r in state.kept.snapshots.items() if r.spec.volume == volume and not r.removed
        ),
        tasks=tasks,
        waits_for=waits,
        settled=not tasks and whole and not any(host in behind for host in concerned),
        removed=row.removed,
        trouble=_trouble(state, inventory, volume, server) if server is not None else "",
    )


def _trouble(state: State, inventory: Inventory, volume: VolumeId, server: ServerId) -> str:
    """As the agent at its server says it; see `agent.volumes.replicas.DiskKeeper`."""
    seen = inventory.hosts.get(_place(state, server))
    told = seen.disk_problems if seen else ()
    about = (f"{volume} of {server}: ", f"{server} stands still: ")
    return "; ".join(text for text in told if any(words in text for words in about))


def _place(state: State, server: str) -> HostId:
    assignments = state.blueprint.servers if state.blueprint else {}
    return next((a.host for s, a in assignments.items() if s == server), HostId(""))


def _copy(inventory: Inventory, volume: VolumeSpec, copy: Replica) -> CopyView:
    seen = inventory.hosts.get(copy.host)
    told = next((v for v in (seen.volumes if seen else ()) if v.id == volume.id), None)
    return CopyView(
        host=copy.host,
        state=copy.state,
        connected=copy.host in inventory.connected,
        served=_is_served(told, volume, copy),
        allocated_bytes=told.allocated_bytes if told is not None else 0,
        problem=told.problem if told is not None else "",
        remedy=remedy(volume, copy.host) if told is not None and told.problem else "",
        clients=told.clients if told is not None else -1,
    )


def remedy(volume: VolumeSpec, host: HostId) -> str:
    """Of a copy that is in trouble."""
    if any(current != host for current in volume.current):
        return f"nahtlos volume rebuild {volume.id} --copy {host}"
    return f"restore it from a backup: nahtlos backup list --volume {volume.id}"


def _is_served(told: VolumeStatus | None, volume: VolumeSpec, copy: Replica) -> bool:
    """By the epoch and in the size that it should be."""
    if told is None or not told.served:
        return False
    return told.epoch == copy.epoch and told.size_mib >= volume.size_mib


# --- operations --------------------------------------------------------------------------------------


def tasks(state: State, inventory: Inventory, report: PlanReport) -> tuple[TaskView, ...]:
    return tuple(task for task, _ in _all_tasks(state, inventory, _waiting(report)))


def _all_tasks(
    state: State, inventory: Inventory, waiting: dict[str, str]
) -> Iterable[tuple[TaskView, tuple[VolumeId, ...]]]:
    planned = state.blueprint.volume_tasks if state.blueprint else ()
    running = [task for task in planned if task.id not in state.volume_ends]
    for task in running:
        yield _task(state, inventory, task), volumes_of(task.work)
    served = {task.wish for task in running}
    for wish in state.kept.wishes:
        if wish.id not in served and not wish.cancelled:
            yield _wish(state, wish, waiting), volumes_of(wish.work)


def _waiting(report: PlanReport) -> dict[str, str]:
    """By subject, the first reason."""
    return {waiting.subject: waiting.reason for waiting in reversed(report.waiting)}


def _wish(state: State, wish: VolumeWish, waiting: dict[str, str]) -> TaskView:
    failures = state.blueprint.failed_volume_tasks if state.blueprint else {}
    failure = failures.get(wish.id)
    return TaskView(
        id=None,
        makes=tuple(new_names(wish.work)),
        what=words(wish.work),
        kind=kind_of(wish.work).value,
        volume=volumes_of(wish.work)[0],
        bytes_total=_bytes(state, wish.work),
        waits_for=waiting.get(volumes_of(wish.work)[0], "its turn"),
        attempts=failure.attempts if failure is not None else 0,
    )


def _task(state: State, inventory: Inventory, task: PlannedVolumeTask) -> TaskView:
    seen = inventory.hosts.get(task.coordinator)
    status = next((o for o in (seen.operations if seen else ()) if o.id == task.id), None)
    total = _bytes(state, task.work)
    failures = state.blueprint.failed_volume_tasks if state.blueprint else {}
    failure = failures.get(task.key)
    rate = _rate(status, total, seen.taken_at if seen else 0.0)
    left = total * (1.0 - status.progress) / rate if status is not None and rate else None
    return TaskView(
        id=task.id,
        makes=tuple(new_names(task.work)),
        what=words(task.work),
        kind=kind_of(task.work).value,
        volume=volumes_of(task.work)[0],
        step=status.step if status is not None else "not begun yet",
        progress=status.progress if status is not None else 0.0,
        bytes_total=total,
        bytes_per_second=rate,
        seconds_left=left,
        waits_for=status.waits_for if status is not None else "",
        attempts=failure.attempts if failure is not None else 0,
    )


def _rate(status: OperationStatus | None, total: int, taken_at: float) -> float:
    """By the host's own clock, from the operation's begin."""
    if status is None or not status.times or not status.progress:
        return 0.0
    passed = taken_at - min(status.times.values())
    return total * status.progress / passed if passed > 0 else 0.0


def _bytes(state: State, work: VolumeWork) -> int:
    if isinstance(work, Restoring):
        return work.volume.size_mib * MIB
    if isinstance(work, SnapshotMove):
        return sum(_allocated(state, work.source, name) for name in work.snapshots)
    if not isinstance(work, Relocation | Rebuilding | BackingUp | Scrubbing | WritingFile):
        return 0
    row = state.volumes.get(volumes_of(work)[0])
    return row.spec.size_mib * MIB if row is not None else 0


def _allocated(state: State, host: HostId, snapshot: SnapshotId) -> int:
    """What it takes there, as last seen."""
    seen = state.inventories.get(host)
    told = (s.allocated_bytes for s in (seen.snapshots if seen is not None else ()) if s.id == snapshot)
    return next(told, 0)


def kept_volumes(state: State, inventory: Inventory, host: HostId) -> KeptVolumes:
    """What `host` keeps, and, while it gives that away, how long it will take at the pace measured now."""
    specs = [row.spec for row in state.volumes.values() if not row.removed]
    kept = kept_on(specs, host)
    policy = state.policy()
    snapshots = {spec.id for spec in snapshots_on(policy, inventory, host)}
    snapshots |= {status.id for status in left_over_snapshots(policy, inventory, host)}
    planned = state.blueprint.volume_tasks if state.blueprint else ()
    leaving: dict[OperationId, TaskView] = {
        task.id: _task(state, inventory, task)
        for task in planned
        if isinstance(task.work, Relocation | SnapshotMove)
        and task.work.source == host
        and task.id not in state.volume_ends
    }
    total = sum(volume.size_mib for volume in kept) * MIB
    total += sum(_allocated(state, host, name) for name in snapshots)
    done = sum(int(view.bytes_total * view.progress) for view in leaving.values())
    rate = sum(view.bytes_per_second for view in leaving.values())
    return KeptVolumes(
        volumes=tuple(sorted(volume.id for volume in kept)),
        snapshots=tuple(sorted(snapshots)),
        bytes=total,
        leaving=tuple(sorted(leaving)),
        bytes_left=max(0, total - done),
        bytes_per_second=rate,
        seconds_left=max(0, total - done) / rate if rate else None,
    )


# --- snapshots and backups ---------------------------------------------------------------------------


def snapshot_view(state: State, inventory: Inventory, snapshot: SnapshotId) -> SnapshotView:
    row = state.kept.snapshots[snapshot]
    told: list[SnapshotStatus] = [
        status
        for host in row.spec.hosts
        if (seen := inventory.hosts.get(host)) is not None
        for status in seen.snapshots
        if status.id == snapshot
    ]
    return SnapshotView(
        spec=row.spec,
        clones=clones_of(state, row.spec),
        allocated_bytes=sum(status.allocated_bytes for status in told),
        exports=tuple(
            ExportView(id=e.id, uri=export_uri(state, e), expires_at=e.expires_at)
            for e in state.kept.exports
            if e.snapshot == snapshot and e.expires_at > state.now
        ),
        removed=row.removed,
    )


def backup_views(state: State) -> tuple[BackupView, ...]:
    return tuple(
        BackupView(spec=spec, rested_on_by=rested_on_by(state, name), deleting=is_being_deleted(state, name))
        for name, spec in state.kept.backups.items()
    )
