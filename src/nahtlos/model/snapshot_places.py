"""Which snapshots a host has in its files, from what is wanted and what was seen. Pure."""

from collections.abc import Mapping

from nahtlos.model.blueprint import Policy
from nahtlos.model.ids import HostId, SnapshotId
from nahtlos.model.inventory import Inventory, SnapshotStatus
from nahtlos.model.storage import SnapshotSpec, StorageBackend, VolumeSpec


def snapshots_on(policy: Policy, inventory: Inventory, host: HostId) -> tuple[SnapshotSpec, ...]:
    """Those it is to keep in files of its own. What Ceph keeps is on no host."""
    told = {status.id: status for status in reported_snapshots(inventory, host)}
    kept = (spec for _, spec in sorted(policy.snapshots.items()) if host in spec.hosts)
    return tuple(
        spec
        for spec in kept
        if _backend(spec, told, policy.volumes.get(spec.volume)) is StorageBackend.EMBEDDED
    )


def backend_of(snapshot: SnapshotSpec, inventory: Inventory, volume: VolumeSpec | None) -> StorageBackend:
    """Where it is kept, as far as is known; its `volume` may have gone elsewhere since."""
    told = {status.id: status for host in snapshot.hosts for status in reported_snapshots(inventory, host)}
    return _backend(snapshot, told, volume)


def _backend(
    snapshot: SnapshotSpec, told: Mapping[SnapshotId, SnapshotStatus], volume: VolumeSpec | None
) -> StorageBackend:
    if snapshot.id in told:
        return told[snapshot.id].backend
    return volume.backend if volume is not None else StorageBackend.EMBEDDED


def left_over_snapshots(policy: Policy, inventory: Inventory, host: HostId) -> tuple[SnapshotStatus, ...]:
    """Those it still has although they are kept elsewhere."""
    return tuple(
        status
        for status in reported_snapshots(inventory, host)
        if status.backend is StorageBackend.EMBEDDED
        and status.id in policy.snapshots
        and host not in policy.snapshots[status.id].hosts
    )


def reported_snapshots(inventory: Inventory, host: HostId) -> tuple[SnapshotStatus, ...]:
    seen = inventory.hosts.get(host)
    return seen.snapshots if seen is not None else ()
