"""Volume files: raw, sparse, one per volume, made from an image in one atomic step.

A file under its final name is always complete. What a killed agent left half made has a name of its own
and is swept. Everything here blocks for as long as a copy takes: call it in a thread.
"""

import errno
import fcntl
import os
from pathlib import Path

from nahtlos.model.errors import Refused
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import VolumeSpec

SUFFIX = ".raw"
_UNFINISHED = ".unfinished-"
_FICLONE = 0x40049409
_CHUNK = 64 << 20


class VolumeFolder:
    def __init__(self, folder: Path, images: Path) -> None:
        self._folder = folder
        self._images = images

    def path(self, volume: VolumeId) -> Path:
        return self._folder / f"{volume}{SUFFIX}"

    def present(self) -> dict[VolumeId, int]:
        """Volumes and their sizes in MiB."""
        if not self._folder.is_dir():
            return {}
        return {
            VolumeId(path.name.removesuffix(SUFFIX)): path.stat().st_size >> 20
            for path in sorted(self._folder.glob(f"*{SUFFIX}"))
            if not path.name.startswith(".")
        }

    def sweep(self) -> None:
        for path in self._folder.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)

    def create(self, volume: VolumeSpec) -> None:
        """Refused if its image is not here or does not fit into it."""
        size = volume.size_mib << 20
        image = self._checked_image(volume, size)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = self._folder / f"{_UNFINISHED}{volume.id}"
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b") as target:
            if image is not None:
                with image.open("rb") as source:
                    copy_sparse(source.fileno(), target.fileno())
            target.truncate(size)
            os.fsync(target.fileno())
        unfinished.replace(self.path(volume.id))
        _sync_folder(self._folder)

    def delete(self, volume: VolumeId) -> None:
        self.path(volume).unlink(missing_ok=True)
        _sync_folder(self._folder)

    def _checked_image(self, volume: VolumeSpec, size: int) -> Path | None:
        if volume.image is None:
            return None
        image = self._images / f"{volume.image}.raw"
        try:
            needed = image.stat().st_size
        except OSError:
            raise Refused(
                f"image '{volume.image}' is not on this host", field="image", remedy="build or copy it here"
            ) from None
        if needed > size:
            raise Refused(
                f"image '{volume.image}' needs {-(-needed >> 20)} MiB, '{volume.id}' has {volume.size_mib}",
                field="size_mib",
                remedy="ask for a larger volume",
            )
        return image


def copy_sparse(source: int, target: int) -> None:
    """By sharing extents where the file system can, else data only, holes left out."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        _copy_data(source, target)


def _copy_data(source: int, target: int) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    position = 0
    while position < size:
        try:
            begin = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        position = os.lseek(source, begin, os.SEEK_HOLE)
        _copy_range(source, target, begin, position)


def _copy_range(source: int, target: int, begin: int, end: int) -> None:
    while begin < end:
        copied = os.copy_file_range(source, target, min(_CHUNK, end - begin), begin, begin)
        if copied == 0:
            raise OSError(errno.EIO, "an image became shorter while it was copied")
        begin += copied


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
