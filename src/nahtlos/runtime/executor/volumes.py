"""What of volumes one host is told. Pure.

Between the end of an operation at the agents and its record the configuration would say what was before: so
everybody concerned is told which volumes to leave alone (`pinned`) from before its begin to its record. A
copy is deleted only when no host is told any more to reach it, and has converged to that.
"""

from collections.abc import Iterable

from nahtlos.model.config import HostConfig, VolumeAttachment
from nahtlos.model.ids import HostId, ServerId, SnapshotId, VolumeId
from nahtlos.model.snapshot_places import left_over_snapshots, reported_snapshots
from nahtlos.model.storage import (
    SnapshotExport,
    SnapshotSpec,
    StorageBackend,
    VolumeSpec,
)
from nahtlos.model.volume_work import PlannedVolumeTask, SnapshotMove, volumes_of
from nahtlos.runtime.executor.world import World

# --- what is kept ------------------------------------------------------------------------------------


def volumes_kept(world: World, host: HostId) -> tuple[VolumeSpec, ...]:
    """As their copy here is. A stale one is not named: it stays as it is until it is rebuilt, and nobody
    makes it anew, blank, meanwhile."""
    known = sorted(world.policy.volumes.items())
    return tuple(volume.at(host) for _, volume in known if _keeps(volume, host))


def _keeps(volume: VolumeSpec, host: HostId) -> bool:
    if volume.backend is StorageBackend.CEPH:
        return volume.host == host
    return host in volume.current


def _has_copy(volume: VolumeSpec, host: HostId) -> bool:
    if volume.backend is StorageBackend.CEPH:
        return volume.host == host
    return any(copy.host == host for copy in volume.copies)


def removed_volumes(world: World, host: HostId) -> tuple[VolumeId, ...]:
    """Those that are to be no more, and copies that went elsewhere without this host's knowing, or that a
    volume does without. Snapshots of it that the host keeps stay there."""
    deleted = (v.id for v in world.removed_volumes if _has_copy(v, host) and not is_used(world, v.id, host))
    return tuple(sorted({*deleted, *_left_over(world, host)}))


def _left_over(world: World, host: HostId) -> Iterable[VolumeId]:
    seen = world.inventory.hosts.get(host)
    busy = {volume for task in world.blueprint.volume_tasks for volume in volumes_of(task.work)}
    for status in seen.volumes if seen is not None else ():
        volume = world.policy.volumes.get(status.id)
        if volume is None or status.id in busy or _has_copy(volume, host):
            continue
        if not is_used(world, status.id, host):
            yield status.id


def is_used(world: World, volume: VolumeId, host: HostId) -> bool:
    """Whether some host is told to reach the copy at `host`, or may still do so."""
    at = world.policy.hosts.get(host)
    for other, config in world.configs.items():
        reaches = at is not None and any(
            attached.volume == volume and at.address in _addresses(attached)
            for server in config.servers
            for attached in server.all_volumes
        )
        if reaches and other in world.policy.hosts:
            return True
    attached_to = next((s for s, spec in world.policy.servers.items() if volume in spec.all_volumes), None)
    place = world.place_of(attached_to) if attached_to is not None else None
    return place is not None and not has_converged(world, place)


def _addresses(attached: VolumeAttachment) -> set[str]:
    return {attached.address, *(copy.address for copy in attached.copies)}


def has_converged(world: World, host: HostId) -> bool:
    config, seen = world.configs.get(host), world.inventory.hosts.get(host)
    return config is not None and seen is not None and seen.generation >= config.generation


# --- snapshots ---------------------------------------------------------------------------------------


def snapshots_kept(world: World, host: HostId) -> tuple[SnapshotSpec, ...]:
    return tuple(s for _, s in sorted(world.policy.snapshots.items()) if host in s.hosts)


def removed_snapshots(world: World, host: HostId) -> tuple[SnapshotId, ...]:
    """Those that are to be no more, and those that are kept elsewhere by now. Nothing that an operation
    brings from one host to another goes before its end is recorded."""
    busy = {
        snapshot
        for task in world.blueprint.volume_tasks
        if isinstance(task.work, SnapshotMove)
        for snapshot in task.work.snapshots
    }
    there = {status.id for status in reported_snapshots(world.inventory, host)}
    deleted = {s.id for s in world.removed_snapshots if host in s.hosts or s.id in there}
    left = left_over_snapshots(world.policy, world.inventory, host)
    moved = {status.id for status in left if not status.clones}
    return tuple(sorted((deleted | moved) - busy))


def exports(world: World, host: HostId) -> tuple[SnapshotExport, ...]:
    kept = (e for e in world.exports if e.host == host and e.snapshot in world.policy.snapshots)
    return tuple(sorted(kept, key=lambda export: export.id))


# --- operations --------------------------------------------------------------------------------------


def pinned(world: World, host: HostId) -> tuple[VolumeId, ...]:
    found = (
        volume
        for task in world.blueprint.volume_tasks
        if host in concerned(world, task)
        for volume in volumes_of(task.work)
    )
    return tuple(sorted(set(found)))


def clients(world: World, task: PlannedVolumeTask) -> tuple[ServerId, ...]:
    """Servers that have its volumes, where they are somewhere."""
    volumes = set(volumes_of(task.work))
    return tuple(
        server
        for server, spec in sorted(world.policy.servers.items())
        if volumes & set(spec.all_volumes) and world.place_of(server) is not None
    )


def must_know(world: World, task: PlannedVolumeTask) -> set[HostId]:
    """Who must hold that its volumes are left alone before it begins."""
    places = (world.place_of(server) for server in clients(world, task))
    return {*task.hosts, *(place for place in places if place is not None)}


def concerned(world: World, task: PlannedVolumeTask) -> set[HostId]:
    specs = (world.policy.volumes.get(volume) for volume in volumes_of(task.work))
    return must_know(world, task) | {c.host for spec in specs if spec is not None for c in spec.copies}


def all_know(world: World, task: PlannedVolumeTask) -> bool:
    """Whether everybody who must has accepted a configuration by which its volumes are left alone."""
    return all(_knows(world.configs.get(host), world, host, task) for host in must_know(world, task))


def _knows(config: HostConfig | None, world: World, host: HostId, task: PlannedVolumeTask) -> bool:
    seen = world.inventory.hosts.get(host)
    if config is None or seen is None or not set(volumes_of(task.work)) <= set(config.pinned_volumes):
        return False
    return seen.target_generation >= config.generation
