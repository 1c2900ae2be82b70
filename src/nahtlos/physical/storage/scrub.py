"""What a volume holds, as digests of ranges: for comparing its copies. Reads as a client does, through format
and encryption, so that holes and zeros, raw and qcow2 are alike; drops what the host remembers of a raw file
first, so that what is compared is the disk's. Marks a copy that was found wrong until it is made anew.
"""

import hashlib
import os
import threading
from collections.abc import Collection
from pathlib import Path

import msgspec

from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.storage.backups import Ended, OwnDoor
from nahtlos.physical.storage.graph import Places
from nahtlos.physical.storage.nbd import LONGEST_REQUEST
from nahtlos.physical.storage.record import VolumeRecord
from nahtlos.wire.credentials import write_file


def digest_of_range(
    stop: threading.Event, door: OwnDoor, export: str, offset: int, length: int, file: Path | None
) -> bytes:
    """SHA-256. Beyond the end there is nothing. `file`: forgotten in this range before it is read."""
    if file is not None:
        _forget_cached(file, offset, length)
    digest = hashlib.sha256()
    with door.client(export) as client:
        end = min(offset + length, client.size)
        for begin in range(offset, end, LONGEST_REQUEST):
            if stop.is_set():
                raise Ended
            digest.update(client.read(begin, min(LONGEST_REQUEST, end - begin)))
    return digest.digest()


def readable_file(record: VolumeRecord, places: Places) -> Path | None:
    """The file in which the volume's bytes are at their own places."""
    layer = record.active_layer
    plain = layer.format is VolumeFormat.RAW and layer.encryption_key is None and layer.backing is None
    return places.volumes / layer.file if plain else None


def _forget_cached(file: Path, offset: int, length: int) -> None:
    """What was written and is not on disk yet stays; the rest is read from the disk again."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


_SUFFIX = ".json"


class _Mark(msgspec.Struct, frozen=True, kw_only=True):
    epoch: int
    """By which it was served when it was found wrong. A later one alone makes it no better."""
    problem: str


class Marks:
    """Copies that were found wrong, until they are made anew. A file each: they outlive the agent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, volume: VolumeId, epoch: int, problem: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(self._path(volume), msgspec.json.encode(_Mark(epoch=epoch, problem=problem)), mode=0o600)

    def problem(self, record: VolumeRecord) -> str:
        """Empty if there is none."""
        try:
            mark = msgspec.json.decode(self._path(record.volume).read_bytes(), type=_Mark)
        except FileNotFoundError:
            return ""
        return mark.problem if mark.epoch <= record.epoch else ""

    def clear(self, volume: VolumeId) -> None:
        self._path(volume).unlink(missing_ok=True)

    def keep_only(self, volumes: Collection[VolumeId]) -> None:
        """Forget those of copies that are not here any more."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path.stem not in volumes:
                path.unlink(missing_ok=True)

    def _path(self, volume: VolumeId) -> Path:
        return self._folder / f"{volume}{_SUFFIX}"
