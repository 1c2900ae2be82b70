"""What the runtime offers to operators of whole servers' snapshots, disks and memory of one moment."""

from nahtlos.model.ids import ServerId, SnapshotId
from nahtlos.model.server_snapshots import PAUSE_SECONDS, ServerSnapshot
from nahtlos.model.values import Value


class ServerSnapshotRequest(Value, frozen=True, kw_only=True):
    name: str
    server: ServerId
    pause_seconds: float = PAUSE_SECONDS
    """The longest its guest may stand still for it; else none is taken."""


class ServerRevertRequest(Value, frozen=True, kw_only=True):
    snapshot: SnapshotId


class ServerSnapshotView(Value, frozen=True, kw_only=True):
    spec: ServerSnapshot
    missing: tuple[SnapshotId, ...] = ()
    """Snapshots of its disks that were deleted: its server cannot go back to it any more."""
    memory_mib: int = 0
    """Of the volume its memory is on."""
    allocated_bytes: int = 0
    """What memory and disks' snapshots take, all copies."""
    why_not: str = ""
    """Why its server cannot go back to it now; empty if it can."""
