"""A backup is taken away from a folder: that one, whole or not, and no other of its name."""

from pathlib import Path

import pytest

from nahtlos.model.errors import Conflict, Unavailable
from nahtlos.model.ids import BackupId, VolumeId
from nahtlos.physical.storage.backup_targets import BackupManifest, FolderTarget, Range, packed

SIZE = 1 << 20
MINE, OTHER = VolumeId("mine"), VolumeId("other")


def kept(folder: Path, volume: VolumeId) -> FolderTarget:
    target = FolderTarget(folder, BackupId("b"))
    target.begin(SIZE)
    target.write(0, b"held")
    target.finish(
        BackupManifest(
            backup=BackupId("b"),
            volume=volume,
            base=None,
            created_at=1.0,
            size=SIZE,
            map=packed((Range(0, 4),), SIZE),
            sha256="",
            stored_bytes=4,
        )
    )
    target.close()
    return target


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_goes_with_all_its_files_and_again_is_fine(tmp_path: Path) -> None:
    target = kept(tmp_path, MINE)
    (tmp_path / "another.data").write_bytes(b"x")
    target.remove(MINE)
    assert left(tmp_path) == ["another.data"]
    target.remove(MINE)


def test_what_was_never_whole_or_is_damaged_goes_too(tmp_path: Path) -> None:
    target = FolderTarget(tmp_path, BackupId("b"))
    target.begin(SIZE)
    target.close()
    target.remove(MINE)
    assert left(tmp_path) == []
    kept(tmp_path, MINE)
    (tmp_path / "b.json").write_text("{")
    target.remove(MINE)
    assert left(tmp_path) == []


def test_another_volumes_backup_of_that_name_stays(tmp_path: Path) -> None:
    target = kept(tmp_path, OTHER)
    with pytest.raises(Conflict, match="of 'other'") as refused:
        target.remove(MINE)
    assert "--keep-files" in refused.value.remedy
    assert left(tmp_path) == ["b.data", "b.json"]


def test_a_folder_that_is_not_there_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as error:
        FolderTarget(tmp_path / "not-mounted", BackupId("b")).remove(MINE)
    assert error.value.field == "target"
