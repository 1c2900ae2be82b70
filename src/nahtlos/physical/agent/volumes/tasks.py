"""Which operation an order becomes. Owns nothing of what they do."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from nahtlos.model.errors import Refused
from nahtlos.model.inventory import OperationKind
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes.backup import Backup, DeleteBackup, Restore, SnapshotFile
from nahtlos.physical.agent.volumes.rebuild import Rebuild
from nahtlos.physical.agent.volumes.relocation import Relocation
from nahtlos.physical.agent.volumes.revert import Revert
from nahtlos.physical.agent.volumes.scrub import Scrub
from nahtlos.physical.agent.volumes.snapshot import GroupSnapshot
from nahtlos.physical.agent.volumes.snapshot_move import SnapshotMove
from nahtlos.wire.volumes import (
    BackupOrder,
    DeleteBackupOrder,
    MoveSnapshotsOrder,
    RebuildOrder,
    RelocateOrder,
    RestoreOrder,
    RevertOrder,
    ScrubOrder,
    SnapshotFileOrder,
    SnapshotOrder,
    VolumeOrder,
    VolumeTask,
)


class VolumeTaskRun(Protocol):
    """One operation as its coordinator runs it. `run` may be called again after a restart of the agent."""

    @property
    def journal(self) -> Journal: ...

    def cancel(self) -> None:
        """Raises Conflict past its point of no return."""
        ...

    async def run(self, *, recovering: bool) -> Journal: ...


@runtime_checkable
class PacedRun(Protocol):
    """One whose copying can be made faster or slower."""

    def set_speed(self, bytes_per_second: int) -> None: ...


_KINDS: dict[type[VolumeOrder], OperationKind] = {
    RelocateOrder: OperationKind.RELOCATE,
    RebuildOrder: OperationKind.REBUILD,
    SnapshotOrder: OperationKind.SNAPSHOT,
    BackupOrder: OperationKind.BACKUP,
    RestoreOrder: OperationKind.BACKUP,
    DeleteBackupOrder: OperationKind.BACKUP,
    SnapshotFileOrder: OperationKind.SNAPSHOT_FILE,
    ScrubOrder: OperationKind.SCRUB,
    RevertOrder: OperationKind.REVERT,
    MoveSnapshotsOrder: OperationKind.SNAPSHOT_MOVE,
}
_RUNS: dict[type[VolumeOrder], Callable[[Context, Journal], VolumeTaskRun]] = {
    RelocateOrder: Relocation,
    RebuildOrder: Rebuild,
    SnapshotOrder: GroupSnapshot,
    BackupOrder: Backup,
    RestoreOrder: Restore,
    DeleteBackupOrder: DeleteBackup,
    SnapshotFileOrder: SnapshotFile,
    ScrubOrder: Scrub,
    RevertOrder: Revert,
    MoveSnapshotsOrder: SnapshotMove,
}


def kind_of(order: VolumeTask) -> OperationKind:
    """Refused for an order this agent cannot carry out."""
    if type(order) not in _RUNS:
        raise Refused(f"{type(order).__name__} is not carried out by this agent", field="order")
    return _KINDS[type(order)]


def task_for(context: Context, journal: Journal) -> VolumeTaskRun:
    assert journal.task is not None, f"operation {journal.id} is none of a volume"
    return _RUNS[type(journal.task)](context, journal)
