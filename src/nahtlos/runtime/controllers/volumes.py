"""What the runtime offers to operators of volumes: volumes, snapshots, images, backups.

As in `cloud`: every method answers at once from the store or writes intent and returns. What takes time
becomes an operation, seen as a task of its volume. In a change, what is left out (UNSET) stays as it is.
"""

from typing import Protocol

from msgspec import UNSET, UnsetType

from nahtlos.model.blueprint import OperationRecord
from nahtlos.model.ids import (
    BackupId,
    HostId,
    ImageId,
    OperationId,
    ProjectId,
    ServerId,
    SnapshotId,
    VolumeId,
)
from nahtlos.model.networking import DEFAULT_PROJECT
from nahtlos.model.storage import (
    BackupSpec,
    Consistency,
    Deletion,
    DiskLimits,
    ReplicaState,
    SnapshotSpec,
    StorageBackend,
    VolumeFormat,
    VolumeSpec,
)
from nahtlos.model.values import Value
from nahtlos.model.volume_settings import VolumeSettings

# --- requests ----------------------------------------------------------------------------------------


class VolumeRequest(Value, frozen=True, kw_only=True):
    """Blank, or from an image, or from a snapshot (a clone)."""

    name: str
    size_mib: int = 0
    """0: as large as what it is made from."""
    image: ImageId | None = None
    snapshot: SnapshotId | None = None
    copies: int = 1
    """On so many hosts; every write is on all of them before it is acknowledged."""
    format: VolumeFormat = VolumeFormat.RAW
    backend: StorageBackend = StorageBackend.EMBEDDED
    encrypted: bool = False
    limits: DiskLimits = DiskLimits()
    limits_group: str = ""
    deletion: Deletion = Deletion.DISCARD
    host: HostId | None = None
    """Of its first copy; None: chosen."""
    near: ServerId | None = None
    """Chosen at the host of this server, if that has room."""
    project: ProjectId = DEFAULT_PROJECT


class VolumeChange(Value, frozen=True, kw_only=True):
    size_mib: int | UnsetType = UNSET
    copies: int | UnsetType = UNSET
    limits: DiskLimits | UnsetType = UNSET
    limits_group: str | UnsetType = UNSET
    deletion: Deletion | UnsetType = UNSET


class Attaching(Value, frozen=True, kw_only=True):
    server: ServerId


class RelocationRequest(Value, frozen=True, kw_only=True):
    to: HostId | None = None
    """None: chosen."""
    backend: StorageBackend | None = None
    """None: as it is, or embedded where a host is named."""
    copy: HostId | None = None
    """Which of several copies goes; None: the first."""
    format: VolumeFormat | None = None
    bytes_per_second: int = 0
    """0: no limit."""


class SnapshotRequest(Value, frozen=True, kw_only=True):
    """All volumes at one moment. One snapshot has the name; of several each has it with its volume's."""

    name: str
    volumes: tuple[VolumeId, ...]
    consistency: Consistency = Consistency.CRASH


class SnapshotMoveRequest(Value, frozen=True, kw_only=True):
    to: HostId | None = None
    """None: chosen."""
    copy: HostId | None = None
    """Of several hosts that keep it, the one it leaves."""
    bytes_per_second: int = 0
    """0: no limit."""


class ExportRequest(Value, frozen=True, kw_only=True):
    seconds: int = 3600


class RevertRequest(Value, frozen=True, kw_only=True):
    snapshot: SnapshotId
    stop: bool = False
    """The server that has it is stopped for that, and started again."""


class BackupRequest(Value, frozen=True, kw_only=True):
    name: str
    volume: VolumeId
    target: str
    """The name of a target, a folder at the volume's host, or an `nbds://` address."""
    plain: bool = False
    """What is written to an `nbd://` address can be read on its way."""
    incremental: bool = False
    """Only what has changed since the volume's newest backup."""
    bytes_per_second: int = 0
    consistency: Consistency = Consistency.CRASH


class RestoreRequest(Value, frozen=True, kw_only=True):
    name: str
    """Of the new volume."""
    host: HostId | None = None
    project: ProjectId = DEFAULT_PROJECT
    backend: StorageBackend | None = None
    """None: as the volume has it that was backed up, embedded if that is gone."""


class TargetRequest(Value, frozen=True, kw_only=True):
    name: str
    place: str
    """A folder on every host, or an `nbds://` address."""
    plain: bool = False
    """An `nbd://` address, too."""


class ImageRequest(Value, frozen=True, kw_only=True):
    name: str
    file: str
    """On the orchestrator's machine."""
    format: VolumeFormat


class ScrubRequest(Value, frozen=True, kw_only=True):
    bytes_per_second: int = 0
    repair: bool = False
    """Copies that differ are made anew."""


class RebuildRequest(Value, frozen=True, kw_only=True):
    copy: HostId | None = None
    """None: the only one that is in trouble."""


class SpeedRequest(Value, frozen=True, kw_only=True):
    bytes_per_second: int
    """0: no limit."""


class SnapshotFileRequest(Value, frozen=True, kw_only=True):
    file: str
    """Its whole path, on a host that keeps the snapshot."""
    format: VolumeFormat
    host: HostId | None = None
    """None: any that keeps it."""


class ImageFileRequest(Value, frozen=True, kw_only=True):
    file: str
    """Its whole path, on the orchestrator's machine."""
    format: VolumeFormat


# --- views -------------------------------------------------------------------------------------------


class OperationView(Value, frozen=True, kw_only=True):
    """Of any kind, from its decision on."""

    record: OperationRecord
    begun_at: float
    ended_at: float | None
    """None: it runs, or is to."""


class FileView(Value, frozen=True, kw_only=True):
    """An image that is written to a file, or was."""

    file: str
    image: ImageId
    format: VolumeFormat
    progress: float = 0.0
    bytes: int = 0
    sha256: str = ""
    """Empty until it is complete."""
    problem: str = ""


class TaskView(Value, frozen=True, kw_only=True):
    """An operation that runs, or is to run."""

    id: OperationId | None
    """None: it is wished, and has not begun."""
    what: str
    kind: str
    volume: VolumeId = VolumeId("")
    """The first, of several."""
    step: str = ""
    progress: float = 0.0
    bytes_total: int = 0
    """0: nothing is copied."""
    bytes_per_second: float = 0.0
    """As measured so far; 0: not known yet."""
    seconds_left: float | None = None
    makes: tuple[str, ...] = ()
    """Names of what there is once it is done."""
    waits_for: str = ""
    attempts: int = 0
    """Failed ones so far."""


class CopyView(Value, frozen=True, kw_only=True):
    host: HostId
    state: ReplicaState
    connected: bool
    served: bool
    allocated_bytes: int
    problem: str
    remedy: str = ""
    """Of the problem."""
    clients: int = -1
    """So many have it open; -1: that cannot be told of it."""


class VolumeView(Value, frozen=True, kw_only=True):
    spec: VolumeSpec
    server: ServerId | None
    server_host: HostId | None = None
    """Where that server is."""
    system: bool
    """Whether it is its server's system disk."""
    copies: tuple[CopyView, ...]
    snapshots: tuple[SnapshotId, ...]
    tasks: tuple[TaskView, ...]
    waits_for: str
    settled: bool
    """Everything asked for has come about: nothing is under way, every copy is current and served, and who
    has it reaches it as recorded."""
    removed: bool = False
    trouble: str = ""
    """Why its server stands still because of it, and what to do."""
    ended: tuple[OperationView, ...] = ()
    """Newest operations of it and what came of them. Only in the view of a single volume."""


class SnapshotView(Value, frozen=True, kw_only=True):
    spec: SnapshotSpec
    clones: tuple[VolumeId, ...]
    allocated_bytes: int
    exports: tuple["ExportView", ...]
    removed: bool = False


class ExportView(Value, frozen=True, kw_only=True):
    id: str
    uri: str
    expires_at: float


class ExportTicket(Value, frozen=True, kw_only=True):
    """Shown once: the credential is not told again."""

    export: ExportView
    credential: str
    """A line of a file of TLS pre-shared keys: `identity:key`."""


class BackupView(Value, frozen=True, kw_only=True):
    spec: BackupSpec
    rested_on_by: tuple[BackupId, ...]
    deleting: bool = False
    """It is being taken away from its target."""


class ImageView(Value, frozen=True, kw_only=True):
    id: ImageId
    size_mib: int
    volumes: tuple[VolumeId, ...]
    """Made from it."""
    progress: float = 1.0
    """Less while it is being taken in."""
    problem: str = ""


class TargetView(Value, frozen=True, kw_only=True):
    name: str
    place: str


# --- the offer ---------------------------------------------------------------------------------------


class VolumeCare(Protocol):
    """What is done about the health, the pace and the outside of what there is."""

    async def scrub(self, volume: VolumeId, request: ScrubRequest) -> VolumeView: ...
    async def rebuild(self, volume: VolumeId, request: RebuildRequest) -> VolumeView:
        """A current copy is not to be trusted: it is made anew from the others."""
        ...

    async def set_speed(self, volume: VolumeId, request: SpeedRequest) -> VolumeView:
        """Of the relocation, or the move of a snapshot, that was asked for, also while it runs."""
        ...

    async def write_snapshot(self, snapshot: SnapshotId, request: SnapshotFileRequest) -> SnapshotView: ...
    async def write_image(self, image: ImageId, request: ImageFileRequest) -> FileView: ...
    async def files(self) -> tuple[FileView, ...]:
        """Of images; as far as this orchestrator's process knows."""
        ...

    async def operations(
        self, *, subject: str = "", kind: str = "", limit: int = 50
    ) -> tuple[OperationView, ...]:
        """Newest first; of a volume, server or host, or of one kind."""
        ...

    async def operation(self, operation: OperationId) -> OperationView: ...


class Volumes(Protocol):
    @property
    def care(self) -> VolumeCare: ...

    async def volumes(self) -> tuple[VolumeView, ...]: ...
    async def volume(self, volume: VolumeId) -> VolumeView: ...
    async def create_volume(self, request: VolumeRequest) -> VolumeView: ...
    async def change_volume(self, volume: VolumeId, change: VolumeChange) -> VolumeView: ...
    async def attach_volume(self, volume: VolumeId, attaching: Attaching) -> VolumeView: ...
    async def detach_volume(self, volume: VolumeId) -> VolumeView: ...
    async def relocate_volume(self, volume: VolumeId, request: RelocationRequest) -> VolumeView: ...
    async def revert_volume(self, volume: VolumeId, request: RevertRequest) -> VolumeView: ...
    async def cancel_volume_tasks(self, volume: VolumeId) -> VolumeView:
        """What was asked for of it is given up, as far as it is not past its point of no return."""
        ...

    async def delete_volume(self, volume: VolumeId) -> None: ...

    async def snapshots(self) -> tuple[SnapshotView, ...]: ...
    async def snapshot(self, snapshot: SnapshotId) -> SnapshotView: ...
    async def create_snapshots(self, request: SnapshotRequest) -> tuple[SnapshotId, ...]:
        """Their names; they are there once the operation has ended."""
        ...

    async def move_snapshot(self, snapshot: SnapshotId, request: SnapshotMoveRequest) -> SnapshotView:
        """As it is before; it goes once the operation has ended."""
        ...

    async def delete_snapshot(self, snapshot: SnapshotId) -> None: ...
    async def export_snapshot(self, snapshot: SnapshotId, request: ExportRequest) -> ExportTicket: ...
    async def unexport_snapshot(self, snapshot: SnapshotId) -> SnapshotView: ...

    async def images(self) -> tuple[ImageView, ...]: ...
    async def import_image(self, request: ImageRequest) -> ImageView: ...
    async def delete_image(self, image: ImageId) -> None: ...

    async def backups(self) -> tuple[BackupView, ...]: ...
    async def backup(self, backup: BackupId) -> BackupView: ...
    async def create_backup(self, request: BackupRequest) -> BackupId: ...
    async def restore_backup(self, backup: BackupId, request: RestoreRequest) -> VolumeId: ...
    async def delete_backup(self, backup: BackupId, *, keep_files: bool = False) -> None:
        """Known no more, once it is taken away from its target; at once if that is left as it is."""
        ...

    async def targets(self) -> tuple[TargetView, ...]: ...
    async def put_target(self, request: TargetRequest) -> TargetView: ...
    async def delete_target(self, name: str) -> None: ...

    async def volume_settings(self) -> VolumeSettings: ...
    async def set_volume_settings(self, settings: VolumeSettings) -> VolumeSettings: ...
    async def tasks(self) -> tuple[TaskView, ...]:
        """Of all volumes."""
        ...
