"""Which snapshots a host has in its files, from what is wanted and what was seen. Pure."""

from nahtlos.model.blueprint import Policy
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import Inventory, SnapshotStatus
from nahtlos.model.storage import SnapshotSpec, StorageBackend


def snapshots_on(policy: Policy, inventory: Inventory, host: HostId) -> tuple[SnapshotSpec, ...]:
    """Those it is to keep in files of its own. What Ceph keeps is on no host."""
    told = {status.id: status for status in reported_snapshots(inventory, host)}

    def in_files(spec: SnapshotSpec) -> bool:
        volume = policy.volumes.get(spec.volume)
        if spec.id in told:
            return told[spec.id].backend is StorageBackend.EMBEDDED
        return volume is None or volume.backend is StorageBackend.EMBEDDED

    kept = (spec for _, spec in sorted(policy.snapshots.items()) if host in spec.hosts)
    return tuple(spec for spec in kept if in_files(spec))


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
