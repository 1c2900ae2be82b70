"""What can be done to volumes beside bringing hosts to their configuration: asked for, and planned.

A wish may leave open what the planner decides; a planned task leaves nothing open.
"""

from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import BackupId, HostId, OperationId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationKind
from nahtlos.model.server_snapshots import MemoryOf
from nahtlos.model.storage import (
    BackupSpec,
    Consistency,
    SnapshotSpec,
    StorageBackend,
    VolumeFormat,
    VolumeSpec,
)
from nahtlos.model.values import Value


class Relocation(Value, frozen=True, kw_only=True, tag="relocation"):
    """One copy goes elsewhere. `source` None: the volume's first; `destination` None: chosen."""

    volume: VolumeId
    source: HostId | None = None
    destination: HostId | None = None
    backend: StorageBackend = StorageBackend.EMBEDDED
    format: VolumeFormat | None = None
    """None: as it is."""
    bytes_per_second: int = 0


class Rebuilding(Value, frozen=True, kw_only=True, tag="rebuilding"):
    """The copy at `target` is brought up to the one at `source`."""

    volume: VolumeId
    source: HostId
    target: HostId
    bytes_per_second: int = 0


class SnapshotGroup(Value, frozen=True, kw_only=True, tag="snapshot"):
    group: str
    snapshots: tuple[SnapshotSpec, ...]
    """Without hosts in a wish: those that are current when it is planned."""
    consistency: Consistency = Consistency.CRASH
    memory: MemoryOf | None = None


class Reverting(Value, frozen=True, kw_only=True, tag="revert"):
    volume: VolumeId
    snapshot: SnapshotId


class SnapshotMove(Value, frozen=True, kw_only=True, tag="snapshot-move"):
    """What `source` keeps of these snapshots of one volume goes to `destination`."""

    volume: VolumeId
    snapshots: tuple[SnapshotId, ...]
    source: HostId
    destination: HostId
    bytes_per_second: int = 0


class BackingUp(Value, frozen=True, kw_only=True, tag="backup"):
    backup: BackupSpec
    base: BackupSpec | None = None
    bytes_per_second: int = 0
    consistency: Consistency = Consistency.CRASH


class Restoring(Value, frozen=True, kw_only=True, tag="restore"):
    """`volume` is known to nobody else until this is done."""

    volume: VolumeSpec
    chain: tuple[BackupSpec, ...]
    """Oldest first."""


class Scrubbing(Value, frozen=True, kw_only=True, tag="scrub"):
    """Its copies are compared; a single one is read."""

    volume: VolumeId
    bytes_per_second: int = 0
    repair: bool = False
    """A copy that differs is made anew."""


class WritingFile(Value, frozen=True, kw_only=True, tag="snapshot-file"):
    """What a snapshot holds becomes a file of one of its hosts."""

    volume: VolumeId
    snapshot: SnapshotId
    file: str
    format: VolumeFormat
    host: HostId | None = None
    """None: any that keeps it."""


class DeletingBackup(Value, frozen=True, kw_only=True, tag="backup-deletion"):
    """It is taken away from its target, and known no more."""

    backup: BackupSpec


VolumeWork = (
    Relocation
    | Rebuilding
    | SnapshotGroup
    | Reverting
    | SnapshotMove
    | BackingUp
    | Restoring
    | Scrubbing
    | WritingFile
    | DeletingBackup
)


class VolumeWish(Value, frozen=True, kw_only=True):
    id: str
    work: VolumeWork
    asked_at: float = 0.0
    cancelled: bool = False


class PlannedVolumeTask(Value, frozen=True, kw_only=True):
    """One operation, decided: the executor orders it from its coordinator, who does the rest."""

    id: OperationId
    work: VolumeWork
    coordinator: HostId
    hosts: tuple[HostId, ...]
    """Which have to work for it."""
    epoch: int = 0
    """By which the copy that comes is served; 0: none comes."""
    losses: int = 0
    """How often copies at the host it comes to had been lost then: once more, and it is not current."""
    wish: str = ""
    """What it fulfils; empty: the planner's own decision."""
    key: str = ""
    """Under which failed attempts are counted."""
    reason: str = ""
    patience_seconds: float = 0.0
    """Not to be started earlier than this long after the blueprint that first holds it."""


class VolumeEnd(Value, frozen=True, kw_only=True):
    """How a task ended, as it is recorded; what follows from it is recorded, too."""

    done: bool
    error: ErrorRecord | None = None


def volumes_of(work: VolumeWork) -> tuple[VolumeId, ...]:
    """Volumes nothing else may be done to meanwhile."""
    match work:
        case SnapshotGroup():
            kept = (work.memory.volume,) if work.memory is not None else ()
            return (*(snapshot.volume for snapshot in work.snapshots), *kept)
        case BackingUp() | DeletingBackup():
            return (work.backup.volume,)
        case Restoring():
            return (work.volume.id,)
        case Relocation() | Rebuilding() | Reverting() | SnapshotMove() | Scrubbing() | WritingFile():
            return (work.volume,)


def kind_of(work: VolumeWork) -> OperationKind:
    match work:
        case Relocation():
            return OperationKind.RELOCATE
        case Rebuilding():
            return OperationKind.REBUILD
        case SnapshotGroup():
            return OperationKind.SNAPSHOT
        case Reverting():
            return OperationKind.REVERT
        case SnapshotMove():
            return OperationKind.SNAPSHOT_MOVE
        case BackingUp() | Restoring() | DeletingBackup():
            return OperationKind.BACKUP
        case Scrubbing():
            return OperationKind.SCRUB
        case WritingFile():
            return OperationKind.SNAPSHOT_FILE


def words(work: VolumeWork) -> str:
    """What is done, for people."""
    match work:
        case Relocation():
            to = "Ceph" if work.backend is StorageBackend.CEPH else work.destination or "another host"
            return f"relocate {work.volume}" + (f" from {work.source}" if work.source else "") + f" to {to}"
        case Rebuilding():
            return f"rebuild the copy of {work.volume} on {work.target}"
        case SnapshotGroup():
            if work.memory is not None:
                return f"snapshot {work.memory.server} with its memory as {work.group}"
            return f"snapshot {', '.join(s.id for s in work.snapshots)}"
        case Reverting():
            return f"revert {work.volume} to {work.snapshot}"
        case SnapshotMove():
            return f"bring {', '.join(work.snapshots)} from {work.source} to {work.destination}"
        case BackingUp():
            return f"back up {work.backup.volume} as {work.backup.id}"
        case Restoring():
            return f"restore {work.volume.id} from {work.chain[-1].id}"
        case Scrubbing():
            return f"scrub {work.volume}"
        case WritingFile():
            return f"write {work.snapshot} to {work.file}"
        case DeletingBackup():
            return f"delete backup {work.backup.id}"


def new_names(work: VolumeWork) -> tuple[VolumeId | SnapshotId | BackupId, ...]:
    """Names of what there is once it is done."""
    match work:
        case SnapshotGroup():
            return tuple(snapshot.id for snapshot in work.snapshots)
        case BackingUp():
            return (work.backup.id,)
        case Restoring():
            return (work.volume.id,)
        case Relocation() | Rebuilding() | Reverting() | SnapshotMove():
            return ()
        case Scrubbing() | WritingFile() | DeletingBackup():
            return ()
