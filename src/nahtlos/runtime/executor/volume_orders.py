"""From a planned operation of volumes to the order its coordinator is given. Pure."""

import msgspec

from nahtlos.model.config import VolumeAttachment, VolumeEndpoint
from nahtlos.model.ids import HostId, OperationId
from nahtlos.model.storage import ReplicaState, StorageBackend, VolumeSpec
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
    WritingFile,
    volumes_of,
)
from nahtlos.runtime.executor.attachments import NBD_PORT, attachment, endpoint
from nahtlos.runtime.executor.volumes import all_know, clients
from nahtlos.runtime.executor.world import World
from nahtlos.wire.volumes import (
    BackupOrder,
    BeginVolumeTask,
    DeleteBackupOrder,
    MemoryTarget,
    MoveSnapshotsOrder,
    PeerAddress,
    RebuildOrder,
    RelocateOrder,
    RestoreOrder,
    RevertOrder,
    ScrubOrder,
    SetCopySpeed,
    SnapshotFileOrder,
    SnapshotOrder,
    VolumeClient,
    VolumeTask,
)


def begin_volume_tasks(world: World, host: HostId) -> tuple[BeginVolumeTask, ...]:
    return tuple(
        BeginVolumeTask(order=order)
        for task in world.blueprint.volume_tasks
        if task.coordinator == host and _may_begin(world, task) and (order := volume_order(world, task))
    )


def _may_begin(world: World, task: PlannedVolumeTask) -> bool:
    if task.id in world.refused | world.held_back | world.policy.volume_ends.keys():
        return False
    if task.wish in _cancelled(world):
        return False
    return world.status(task.coordinator, task.id) is None and all_know(world, task)


def cancellations(world: World, host: HostId) -> tuple[OperationId, ...]:
    """Operations that run at `host` and whose wish was taken back."""
    cancelled = _cancelled(world)
    return tuple(
        task.id
        for task in world.blueprint.volume_tasks
        if task.coordinator == host and task.wish in cancelled and world.is_running(host, task.id)
    )


def speeds(world: World, host: HostId) -> tuple[SetCopySpeed, ...]:
    """How fast copies that run at `host` may be now: what was asked for may have changed since they began."""
    wished = {wish.id: wish.work for wish in world.policy.volume_wishes}
    found: list[SetCopySpeed] = []
    for task in world.blueprint.volume_tasks:
        if task.coordinator != host or not world.is_running(host, task.id):
            continue
        if not isinstance(task.work, Relocation | Rebuilding | SnapshotMove):
            continue
        asked = wished.get(task.wish)
        rate = world.policy.rebuild_bytes_per_second
        if isinstance(asked, Relocation | SnapshotMove):
            rate = asked.bytes_per_second
        found.append(SetCopySpeed(id=task.id, bytes_per_second=rate))
    return tuple(found)


def _cancelled(world: World) -> set[str]:
    return {wish.id for wish in world.policy.volume_wishes if wish.cancelled}


def volume_order(world: World, task: PlannedVolumeTask) -> VolumeTask | None:
    """None if something it names is gone, or is not as it was when this was decided: it can never begin."""
    match task.work:
        case Relocation():
            return _relocate(world, task, task.work)
        case Rebuilding():
            return _rebuild(world, task, task.work)
        case SnapshotGroup():
            return _snapshot(world, task, task.work)
        case Reverting():
            volume = world.policy.volumes.get(task.work.volume)
            if volume is None or task.work.snapshot not in world.policy.snapshots:
                return None
            return RevertOrder(
                id=task.id,
                coordinator=task.coordinator,
                hosts=_peers(world),
                volume=volume.at(task.coordinator),
                snapshot=task.work.snapshot,
            )
        case SnapshotMove():
            return _move_snapshots(world, task, task.work)
        case BackingUp():
            volume = world.policy.volumes.get(task.work.backup.volume)
            if volume is None:
                return None
            return BackupOrder(
                id=task.id,
                coordinator=task.coordinator,
                hosts=_peers(world),
                volume=volume.at(task.coordinator),
                backup=task.work.backup,
                base=task.work.base,
                bytes_per_second=task.work.bytes_per_second,
                clients=_clients(world, task),
                consistency=task.work.consistency,
            )
        case Restoring():
            return RestoreOrder(
                id=task.id,
                coordinator=task.coordinator,
                hosts=_peers(world),
                volume=task.work.volume,
                chain=task.work.chain,
            )
        case Scrubbing():
            volume = world.policy.volumes.get(task.work.volume)
            if volume is None or task.coordinator not in volume.current:
                return None
            return ScrubOrder(
                id=task.id,
                coordinator=task.coordinator,
                hosts=_peers(world),
                volume=volume,
                bytes_per_second=task.work.bytes_per_second,
            )
        case WritingFile():
            snapshot = world.policy.snapshots.get(task.work.snapshot)
            if snapshot is None or task.coordinator not in snapshot.hosts:
                return None
            return SnapshotFileOrder(
                id=task.id,
                coordinator=task.coordinator,
                hosts=_peers(world),
                volume=task.work.volume,
                snapshot=task.work.snapshot,
                file=task.work.file,
                format=task.work.format,
            )
        case DeletingBackup():
            return DeleteBackupOrder(
                id=task.id, coordinator=task.coordinator, hosts=_peers(world), backup=task.work.backup
            )


def _snapshot(world: World, task: PlannedVolumeTask, work: SnapshotGroup) -> SnapshotOrder | None:
    if any(volume not in world.policy.volumes for volume in volumes_of(work)):
        return None
    order = SnapshotOrder(
        id=task.id,
        coordinator=task.coordinator,
        hosts=_peers(world),
        group=work.group,
        snapshots=work.snapshots,
        clients=_clients(world, task),
        consistency=work.consistency,
    )
    if work.memory is None:
        return order
    kept = _attachment(world, world.policy.volumes.get(work.memory.volume))
    if kept is None or world.place_of(work.memory.server) != task.coordinator:
        return None
    return msgspec.structs.replace(
        order,
        stop_seconds=work.memory.pause_seconds,
        memory=MemoryTarget(server=work.memory.server, attachment=kept),
    )


def _relocate(world: World, task: PlannedVolumeTask, work: Relocation) -> RelocateOrder | None:
    volume = world.policy.volumes.get(work.volume)
    if volume is None or work.source is None or work.destination is None:
        return None
    if task.epoch <= volume.newest_epoch:
        return None  # it was attached anew since this was decided
    after = copy_after(volume, work, task.epoch)
    source = endpoint(volume, work.source, world.policy.hosts)
    target = endpoint(after, work.destination, world.policy.hosts, epoch=task.epoch)
    if source is None or target is None:
        return None
    reached = attachment(after, world.policy.hosts, world.ceph)
    return RelocateOrder(
        id=task.id,
        coordinator=task.coordinator,
        hosts=_peers(world),
        volume=volume.at(work.source),
        source=source,
        destination=after,
        target=target,
        rbd=reached.rbd if reached else None,
        client=next(iter(_clients(world, task)), None),
        bytes_per_second=work.bytes_per_second,
    )


def _move_snapshots(world: World, task: PlannedVolumeTask, work: SnapshotMove) -> MoveSnapshotsOrder | None:
    known = [world.policy.snapshots.get(snapshot) for snapshot in work.snapshots]
    source = world.policy.hosts.get(work.source)
    if source is None or any(spec is None or work.source not in spec.hosts for spec in known):
        return None
    return MoveSnapshotsOrder(
        id=task.id,
        coordinator=task.coordinator,
        hosts=_peers(world),
        volume=work.volume,
        snapshots=work.snapshots,
        source=VolumeEndpoint(host=work.source, address=source.address, port=NBD_PORT, export=""),
        bytes_per_second=work.bytes_per_second,
    )


def copy_after(volume: VolumeSpec, work: Relocation, epoch: int) -> VolumeSpec:
    """The copy that comes, told as if it were the only one: what its host has to know of it."""
    assert work.destination is not None, f"{volume.id} goes nowhere"
    return VolumeSpec(
        id=volume.id,
        size_mib=volume.size_mib,
        image=volume.image,
        host=work.destination,
        epoch=epoch,
        project=volume.project,
        backend=work.backend,
        format=work.format or volume.format,
        state=ReplicaState.CURRENT,
        limits=volume.limits,
        limits_group=volume.limits_group,
        encryption_key=volume.encryption_key,
        deletion=volume.deletion,
    )


def _rebuild(world: World, task: PlannedVolumeTask, work: Rebuilding) -> RebuildOrder | None:
    volume = world.policy.volumes.get(work.volume)
    if volume is None or volume.backend is not StorageBackend.EMBEDDED or task.epoch <= volume.newest_epoch:
        return None
    source = endpoint(volume, work.source, world.policy.hosts)
    target = endpoint(volume, work.target, world.policy.hosts, epoch=task.epoch)
    if source is None or target is None:
        return None
    return RebuildOrder(
        id=task.id,
        coordinator=task.coordinator,
        hosts=_peers(world),
        volume=volume,
        source=source,
        target=target,
        client=next(iter(_clients(world, task)), None),
        bytes_per_second=work.bytes_per_second,
    )


def _clients(world: World, task: PlannedVolumeTask) -> tuple[VolumeClient, ...]:
    concerned = set(volumes_of(task.work))
    found: list[VolumeClient] = []
    for server in clients(world, task):
        place = world.place_of(server)
        peer = _peer(world, place) if place is not None else None
        if peer is not None:
            found.append(
                VolumeClient(
                    server=server,
                    at=peer,
                    epoch=world.blueprint.servers[server].epoch,
                    attachments=tuple(
                        told
                        for name in world.policy.servers[server].all_volumes
                        if name in concerned and (told := _attachment(world, world.policy.volumes.get(name)))
                    ),
                )
            )
    return tuple(found)


def _attachment(world: World, volume: VolumeSpec | None) -> VolumeAttachment | None:
    return None if volume is None else attachment(volume, world.policy.hosts, world.ceph)


def _peers(world: World) -> tuple[PeerAddress, ...]:
    found = (_peer(world, host) for host in sorted(world.policy.hosts))
    return tuple(peer for peer in found if peer is not None)


def _peer(world: World, host: HostId) -> PeerAddress | None:
    spec = world.policy.hosts.get(host)
    return None if spec is None else PeerAddress(host=host, address=spec.address, peer_port=spec.peer_port)
