"""Servers as they were at one moment, disks and memory. Values, and what can be said from them alone.

taken: disks' snapshots (a group), and the memory on a volume of its own, of one moment
back:  the server stops, each disk becomes what its snapshot holds, then it goes on from the memory
"""

from nahtlos.model.ids import ServerId, SnapshotId, VolumeId
from nahtlos.model.power import SavedState
from nahtlos.model.values import Value

MEMORY_SNAPSHOTS = "memory-snapshots"
"""Among what a host's agent knows."""
PAUSE_SECONDS = 2.0


class MemoryOf(Value, frozen=True, kw_only=True):
    """What a group of snapshots is to have beside disks: the memory of the one server that has them all."""

    server: ServerId
    volume: VolumeId
    """For this alone; there from the moment it was asked for."""
    pause_seconds: float = PAUSE_SECONDS
    """The longest the guest may stand still for it."""


class ServerSnapshot(Value, frozen=True, kw_only=True):
    id: SnapshotId
    """The group of its disks' snapshots."""
    server: ServerId
    snapshots: tuple[SnapshotId, ...]
    """Of its disks, in the order of `saved.disks`."""
    saved: SavedState
    """`serial` says nothing here."""
    created_at: float = 0.0
    pause_seconds: float = 0.0
    """For which the guest stood still, as its host measured it."""


class GoingBack(Value, frozen=True, kw_only=True):
    """A server that is to go on from a snapshot of it, once its disks are what they were then."""

    snapshot: SnapshotId
    saved: SavedState
    """`serial`: of the request by which it stops for that."""
    left: tuple[VolumeId, ...]
    """Disks that are not what they were yet."""


class Taken(Value, frozen=True, kw_only=True):
    """What the agent that took it tells."""

    saved: SavedState
    pause_seconds: float
