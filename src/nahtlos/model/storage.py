"""Volumes, their copies, snapshots and limits, as frozen values. Sizes are in MiB unless the name says
otherwise; rates are per second."""

from enum import StrEnum

import msgspec

from nahtlos.model.ids import (
    BackupId,
    HostId,
    ImageId,
    KeyId,
    ProjectId,
    SnapshotId,
    VolumeId,
)
from nahtlos.model.networking import DEFAULT_PROJECT
from nahtlos.model.values import Value


class StorageBackend(StrEnum):
    EMBEDDED = "embedded"
    """Files of hosts, served over NBD by each host's storage daemon."""
    CEPH = "ceph"
    """Images of a RADOS pool. `VolumeSpec.host` only administers them."""


class VolumeFormat(StrEnum):
    RAW = "raw"
    QCOW2 = "qcow2"


class Deletion(StrEnum):
    DISCARD = "discard"
    """Its blocks are given back as they are."""
    ZERO = "zero"
    """Overwritten first."""


class ReplicaState(StrEnum):
    CURRENT = "current"
    """Holds every acknowledged write. Recorded before any write is acknowledged that others lack."""
    STALE = "stale"
    """Was lost; may lack writes. Never served to a server until it was rebuilt."""


class Replica(Value, frozen=True, kw_only=True):
    host: HostId
    state: ReplicaState = ReplicaState.CURRENT
    epoch: int = 0
    """By which it is served; 0: by the volume's. Every copy that comes anew has one nothing ever had."""


class DiskLimits(Value, frozen=True, kw_only=True):
    """0: no limit. A total excludes limits of its parts, as QEMU has it. `*_burst` may be used for
    `burst_seconds` on end; 0: no more than the rate itself."""

    iops: int = 0
    iops_read: int = 0
    iops_write: int = 0
    bytes: int = 0
    bytes_read: int = 0
    bytes_write: int = 0
    iops_burst: int = 0
    bytes_burst: int = 0
    burst_seconds: int = 1


class DiskBudget(Value, frozen=True, kw_only=True):
    """What a host's disks may be asked for. Volumes of one kind take turns within it."""

    tenants: DiskLimits = DiskLimits()
    """All volumes that are served."""
    copies: DiskLimits = DiskLimits()
    """All volumes a copy is being written into: rebuilds and relocations that arrive."""


class VolumeSpec(Value, frozen=True, kw_only=True):
    """A volume and the host that serves it. `epoch` is part of the export's name and fences old clients."""

    id: VolumeId
    size_mib: int
    image: ImageId | None
    """What it was made from; neither this nor `snapshot`: blank."""
    host: HostId
    """Home: where its first copy is."""
    epoch: int = 1
    project: ProjectId = DEFAULT_PROJECT
    backend: StorageBackend = StorageBackend.EMBEDDED
    format: VolumeFormat = VolumeFormat.RAW
    snapshot: SnapshotId | None = None
    state: ReplicaState = ReplicaState.CURRENT
    """Of the copy at `host`."""
    replicas: tuple[Replica, ...] = ()
    """Synchronous copies beside the one at `host`: a write is acknowledged when every current one has it."""
    limits: DiskLimits = DiskLimits()
    """Enforced where its server runs, once for all copies."""
    limits_group: str = ""
    """Volumes of one server that name the same group share the limits of the first of them."""
    encryption_key: KeyId | None = None
    """LUKS; the key itself is in the cloud's keyring."""
    deletion: Deletion = Deletion.DISCARD
    preallocated: bool = False
    """A blank qcow2 volume has all of its tables from the start: small writes are several times as fast."""

    @property
    def export(self) -> str:
        return f"{self.id}.e{self.epoch}"

    @property
    def copies(self) -> tuple[Replica, ...]:
        """All, the one at `host` first, each with the epoch it is served by."""
        home = Replica(host=self.host, state=self.state, epoch=self.epoch)
        others = (Replica(host=r.host, state=r.state, epoch=r.epoch or self.epoch) for r in self.replicas)
        return (home, *others)

    @property
    def newest_epoch(self) -> int:
        return max(copy.epoch for copy in self.copies)

    def at(self, host: HostId) -> "VolumeSpec":
        """As `host` has it: `epoch` is that of its own copy."""
        epoch = next((copy.epoch for copy in self.copies if copy.host == host), self.epoch)
        if epoch == self.epoch:
            return self
        return msgspec.structs.replace(self, epoch=epoch, replicas=self.copies[1:])

    @property
    def current(self) -> tuple[HostId, ...]:
        """Hosts whose copy holds every acknowledged write."""
        return tuple(c.host for c in self.copies if c.state is ReplicaState.CURRENT)


class Consistency(StrEnum):
    """Of what a snapshot or backup of a volume that is written holds."""

    CRASH = "crash"
    """As after a power failure: every write that was acknowledged, of one moment."""
    FILESYSTEM = "filesystem"
    """The guest had frozen its file systems then. As a wish: this or nothing."""
    PREFERRED = "preferred"
    """Only as a wish: FILESYSTEM where the guest can, else CRASH."""


class SnapshotSpec(Value, frozen=True, kw_only=True):
    """A volume as it was at one moment. Snapshots of one `group` are of the same moment."""

    id: SnapshotId
    volume: VolumeId
    group: str = ""
    size_mib: int = 0
    hosts: tuple[HostId, ...] = ()
    """Where it is kept: its volume's current copies when it was taken."""
    created_at: float = 0.0
    consistent: Consistency = Consistency.CRASH


class SnapshotExport(Value, frozen=True, kw_only=True):
    """A snapshot readable over NBD by whoever holds its credential, until it expires."""

    id: str
    snapshot: SnapshotId
    host: HostId
    port: int
    expires_at: float
    """Wall clock, seconds."""
    key_hex: str
    """TLS pre-shared key; its identity is `id`."""


class OfferedLayer(Value, frozen=True, kw_only=True):
    """A layer of snapshots as its host offers it to another one: the bytes of a file that does not change."""

    export: str
    length: int
    """Bytes of the file."""
    size: int
    """Bytes its reader sees."""
    format: VolumeFormat
    below: int | None = None
    """What it rests on: its place in the offer."""
    encryption_key: KeyId | None = None


class OfferedSnapshot(Value, frozen=True, kw_only=True):
    id: SnapshotId
    layer: int
    """Its place in the offer."""
    group: str = ""
    size: int = 0
    created_at: float = 0.0


class SnapshotOffer(Value, frozen=True, kw_only=True):
    """Snapshots of one volume, and all they rest on."""

    snapshots: tuple[OfferedSnapshot, ...]
    layers: tuple[OfferedLayer, ...]
    """Each after the one it rests on."""
    deletion: Deletion = Deletion.DISCARD


class BackupSpec(Value, frozen=True, kw_only=True):
    """What one backup holds: the whole volume, or what changed since `base`."""

    id: BackupId
    volume: VolumeId
    target: str
    """A folder at the volume's host, or an `nbds://` or `nbd://` address."""
    host: HostId = HostId("")
    """Who wrote it: whose folder it is. A backup from a folder is restored there."""
    base: BackupId | None = None
    created_at: float = 0.0
    size_mib: int = 0
    """Of the volume then."""
    stored_bytes: int = 0
    consistent: Consistency = Consistency.CRASH
    encryption_key: KeyId | None = None
    """Of the volume then; what is restored from it is encrypted by it, too."""


class Changes(Value, frozen=True, kw_only=True):
    """What a copy that comes back says of itself."""

    since: str
    """The last moment at which it was in step with all others."""
    ranges: tuple[tuple[int, int], ...] | None = None
    """(offset, length) of what was written here since; None: that is not known any more."""


class CopyPhase(StrEnum):
    NONE = "none"
    COPYING = "copying"
    READY = "ready"
    """Both sides hold the same; every further write goes to both."""
    DONE = "done"
    FAILED = "failed"


class CopyProgress(Value, frozen=True, kw_only=True):
    """How far a copy that runs beside writes has come, in bytes. `total` grows while there are writes."""

    phase: CopyPhase
    done: int = 0
    total: int = 0
    error: str = ""
