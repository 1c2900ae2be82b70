"""How operations of volumes are paced, and where images of volumes in Ceph are."""

from nahtlos.model.storage import DiskBudget
from nahtlos.model.values import Value


class CephPlace(Value, frozen=True, kw_only=True):
    """Where images of volumes are. The user's key is on every host, where the configuration says."""

    pool: str
    user: str = "nahtlos"
    configuration: str = "/etc/ceph/ceph.conf"


class VolumeSettings(Value, frozen=True, kw_only=True):
    parallel: int = 4
    """Operations of volumes at the same time, in all."""
    parallel_per_host: int = 2
    rebuild_bytes_per_second: int = 0
    """Of one copy that is rebuilt, or leaves a host that is drained; 0: no limit."""
    elsewhere_seconds: float = 600.0
    """After a host was away for so long, its copies are made on others."""
    ceph: CephPlace | None = None
    budget: DiskBudget = DiskBudget()
    """Of every host's disks."""
