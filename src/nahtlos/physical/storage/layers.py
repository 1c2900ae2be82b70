"""Files of layers: made, measured, and got rid of.

A file under its final name is complete before a record names it; a leftover has a name that says so, or is
named by no record, and is swept. What blocks for as long as a copy takes runs in a thread.
"""

import asyncio
import errno
import os
from contextlib import suppress
from pathlib import Path

from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import ImageId, VolumeId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.daemon import Daemon
from nahtlos.physical.storage.encryption import make_layer
from nahtlos.physical.storage.graph import Places
from nahtlos.physical.storage.record import Layer, LayerRef, RecordMap, VolumeRecord, sync_folder
from nahtlos.physical.storage.sparse import copy_sparse

_UNFINISHED = ".unfinished-"
_GOING = ".going-"
"""Begins the names of files that are to be overwritten before they go."""


def base_file(volume: VolumeId, form: VolumeFormat) -> str:
    return f"{volume}.{form.value}"


def overlay_file(volume: VolumeId, number: int) -> str:
    return f"{volume}.{number}.{VolumeFormat.QCOW2.value}"


class LayerFiles:
    """Those of one folder, and the images they are made from."""

    def __init__(self, places: Places, images: Path, daemon: Daemon) -> None:
        self._places = places
        self._images = images
        self._daemon = daemon

    def path(self, layer: Layer) -> Path:
        return self._places.volumes / layer.file

    def image(self, image: ImageId, size: int, volume: VolumeId) -> Path:
        """Refused if it is not here or does not fit."""
        path = self._images / f"{image}.raw"
        try:
            needed = path.stat().st_size
        except OSError:
            raise Refused(
                f"image '{image}' is not on this host", field="image", remedy="build or copy it here"
            ) from None
        if needed > size:
            raise Refused(
                f"image '{image}' needs {-(-needed >> 20)} MiB, '{volume}' has {size >> 20}",
                field="size_mib",
                remedy="ask for a larger volume",
            )
        return path

    # --- made --------------------------------------------------------------------------------------

    async def make_raw(self, layer: Layer, image: Path | None) -> None:
        try:
            await asyncio.to_thread(_make_raw, self.path(layer), layer.size, image)
        except OSError as error:
            raise _no_room(error, self.path(layer)) from error

    async def make_encrypted(self, bundle: Bundle, layer: Layer, image: Path | None) -> None:
        assert layer.encryption_key is not None
        key = self._places.key_file(layer.encryption_key)
        await make_layer(bundle, self.path(layer), layer.size, key, image=image)

    async def make_qcow2(self, ref: LayerRef, layer: Layer, *, preallocated: bool = False) -> None:
        """Through the daemon, which holds the file open afterwards only as long as it is told to."""
        file = graph.file_node(ref)
        options = {"driver": "qcow2", "file": file, "size": layer.size}
        if preallocated:
            options["preallocation"] = "metadata"
        path = self.path(layer)
        try:
            await self._daemon.remove_nodes((graph.format_node(ref), file))
            await asyncio.to_thread(_touch, path)
            node = {"driver": "file", "node-name": file, "filename": str(path), "auto-read-only": True}
            await self._daemon.execute("blockdev-add", node)
            await self._daemon.execute("blockdev-create", {"job-id": f"create-{file}", "options": options})
            await self._daemon.job_end(f"create-{file}")
            await self._daemon.remove_nodes((file,))
            await asyncio.to_thread(_sync, path)
        except Error as error:
            await self.unmake(ref, layer)
            raise Unavailable(
                f"{path.name} cannot be made: {error.message}",
                field="pool",
                remedy="see that the host's pool has room",
            ) from error

    async def unmake(self, ref: LayerRef, layer: Layer) -> None:
        """What no record names."""
        with suppress(Unavailable):
            await self._daemon.remove_nodes((graph.format_node(ref), graph.luks_node(ref)))
            await self._daemon.remove_nodes((graph.file_node(ref),))
        await asyncio.to_thread(self.path(layer).unlink, missing_ok=True)

    # --- got rid of --------------------------------------------------------------------------------

    def drop(self, layers: tuple[Layer, ...], kept: tuple[Layer, ...], *, overwrite: bool) -> None:
        """Files of layers that are not recorded any more; one may be kept for another layer. Blocks shortly:
        what is to be overwritten first only gets another name."""
        for layer in layers:
            if layer.file in {each.file for each in kept}:
                continue
            path = self.path(layer)
            if overwrite:
                with suppress(FileNotFoundError):
                    path.rename(path.with_name(f"{_GOING}{path.name}.{os.urandom(4).hex()}"))
            else:
                path.unlink(missing_ok=True)
        if layers:
            sync_folder(self._places.volumes)

    def going(self) -> tuple[Path, ...]:
        return tuple(sorted(self._places.volumes.glob(f"{_GOING}*")))

    def sweep(self, records: RecordMap) -> None:
        """Overlays that are not recorded, of volumes that are, and what was never finished."""
        named = {layer.file for record in records.values() for layer in record.layers}
        for path in self._places.volumes.glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)
        for path in self._places.volumes.glob(f"*.{VolumeFormat.QCOW2.value}"):
            volume, _, number = path.stem.partition(".")
            if VolumeId(volume) in records and number.isdecimal() and path.name not in named:
                path.unlink(missing_ok=True)

    # --- measured ----------------------------------------------------------------------------------

    def allocated(self, record: VolumeRecord) -> int:
        return sum(self.allocated_by(layer) for layer in record.layers)

    def allocated_by(self, layer: Layer) -> int:
        try:
            return self.path(layer).stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def problem(self, record: VolumeRecord) -> str:
        """What the file system says of its files."""
        for layer in record.layers:
            try:
                with self.path(layer).open("rb") as file:
                    file.read(1)
            except OSError as error:
                return f"{layer.file}: {error.strerror}"
        return ""


def _make_raw(path: Path, size: int, image: Path | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "r+b") as target:
            if image is not None:
                with image.open("rb") as source:
                    copy_sparse(source.fileno(), target.fileno())
            target.truncate(size)
            os.fsync(target.fileno())
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)
    sync_folder(path.parent)


def _touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _no_room(error: OSError, path: Path) -> Error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(
            f"the pool has no room for {path.name}",
            field="pool",
            remedy="delete something there, or choose another host",
        )
    return Unavailable(f"{path.name} cannot be made: {error.strerror}", field="volume")
