"""Snapshots as files and backups taken away, as an agent carries them out: killed between any two of its
writes, the file that is there afterwards is known to be its own, and no other one is taken for it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from test_volume_acts import Store, begun, context

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import BackupId, HostId, OperationId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import BackupSpec, VolumeFormat
from nahtlos.physical.agent.report import operation_status
from nahtlos.physical.agent.volumes.tasks import task_for
from nahtlos.physical.ports import Crash, FileWritten
from nahtlos.wire.volumes import DeleteBackupOrder, SnapshotFileOrder

ME = HostId("host-1")
ID = OperationId("op-1")
CONTENT = b"what it held"


class FileStore(Store):
    """Writes as the driver does: a file appears complete, and is refused where there is one."""

    async def snapshot_file(self, _: object, file: Path, *__: object, again: bool, **___: Any) -> FileWritten:
        self.asked.append("again" if again else "write")
        if not (again and file.exists()):
            if file.exists():
                raise Conflict(f"{file} is there already", field="file")
            file.write_bytes(CONTENT)
        return FileWritten(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())

    async def backup_delete(self, backup: BackupSpec) -> None:
        await self._do(f"delete {backup.id}")


def order(file: Path) -> SnapshotFileOrder:
    return SnapshotFileOrder(
        id=ID,
        coordinator=ME,
        volume=VolumeId("v"),
        snapshot=SnapshotId("s"),
        file=str(file),
        format=VolumeFormat.RAW,
    )


async def test_a_killed_agent_finds_its_own_file_again(tmp_path: Path) -> None:
    for crash_at in range(3, 14):
        folder = tmp_path / str(crash_at)
        folder.mkdir()
        file, store = folder / "then.raw", FileStore()
        given = context(folder, store, crash_at)
        journal = begun(given, order(file))
        crashed = False
        try:
            journal = await task_for(given, journal).run(recovering=False)
        except (Crash, BaseExceptionGroup):
            crashed = True
        given.ledger.close()
        given = context(folder, store)
        (known,) = given.ledger.operations()
        if crashed:
            known = await task_for(given, known).run(recovering=True)
        assert known.state is OperationState.DONE, known.error
        told = operation_status(known, "", 0.0).result
        assert told == {
            "host": ME,
            "file": str(file),
            "bytes": str(len(CONTENT)),
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
        }
        given.ledger.close()
        if not crashed:
            assert crash_at > 3, "it was killed at some writes"
            return
    pytest.fail("it has no end")


async def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    file, store = tmp_path / "then.raw", FileStore()
    file.write_bytes(b"another's")
    given = context(tmp_path, store)
    journal = await task_for(given, begun(given, order(file))).run(recovering=False)
    assert journal.state is OperationState.UNDONE
    assert journal.error is not None and (journal.error.kind, journal.error.field) == ("conflict", "file")
    assert file.read_bytes() == b"another's" and store.asked == []
    given.ledger.close()


async def test_a_backup_is_taken_away_by_who_has_it(tmp_path: Path) -> None:
    store = FileStore()
    given = context(tmp_path, store)
    backup = BackupSpec(id=BackupId("b"), volume=VolumeId("v"), target="/srv")
    delete = DeleteBackupOrder(id=ID, coordinator=ME, backup=backup)
    journal = await task_for(given, begun(given, delete)).run(recovering=False)
    assert (journal.state, store.asked) == (OperationState.DONE, ["delete b"])
    given.ledger.close()
