"""Images: files people send become raw images in the images folder, and snapshots become files to send.

    judged (headers) -> looked at (confined: info, check) -> converted range by range (confined)
                     -> digest -> manifest -> renamed to its place

What an image is made from is opened once and read through that descriptor, so it cannot become another file
in between. Conversion goes by ranges and notes how far it has come, so that it goes on after a crash; a
file under its final name is complete and its manifest is beside it. Never detects a format by itself.
"""

import asyncio
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import ImageId, checked_name
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.storage import probe
from nahtlos.physical.storage.confinement import Allowance, Confined, TooMuch, run_confined
from nahtlos.physical.storage.jail import INPUT, OUTPUT
from nahtlos.physical.storage.probe import Found, ImageLimits
from nahtlos.physical.storage.record import sync_folder
from nahtlos.wire.credentials import write_file

SUFFIX = ".raw"
MANIFEST_SUFFIX = ".manifest.json"
RANGE_BYTES = 1 << 30
CHUNK = 4 << 20
SPACE_LEFT = 1 << 30
"""What a conversion leaves free on the file system."""
LOOK_SECONDS = 60.0
CONVERT_SECONDS = 600.0
"""For one range."""
WORKING_MEMORY = 1 << 30

OnProgress = Callable[[int, int], None]
"""Bytes done, bytes in all."""


class ImageManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an image that was taken in, beside it as `<image>.manifest.json`."""

    image: ImageId
    sha256: str
    """Of its raw content, holes read as zeros."""
    virtual_bytes: int
    stored_bytes: int
    source_format: VolumeFormat
    source_bytes: int


class _Begun(msgspec.Struct, frozen=True, kw_only=True):
    """How far a conversion has come, and of which file."""

    source: tuple[int, int, int, int]
    """Device, number, size and time of change of the file it is made from."""
    done: int


class ImageFolder:
    """`bundle`: of a release whose `qemu-img` is used. `jail`: an empty folder."""

    def __init__(self, folder: Path, jail: Path) -> None:
        self._folder = folder
        self._jail = jail

    def path(self, image: ImageId) -> Path:
        return self._folder / f"{image}{SUFFIX}"

    def manifest(self, image: ImageId) -> ImageManifest | None:
        try:
            return msgspec.json.decode(self._manifest_path(image).read_bytes(), type=ImageManifest)
        except FileNotFoundError:
            return None

    async def inspect(self, bundle: Bundle, source: Path, form: VolumeFormat, limits: ImageLimits) -> Found:
        """What `source` is. Refused with field and remedy if it cannot become an image."""
        descriptor = _opened(source)
        try:
            return await self._judged(bundle, descriptor, form, limits)
        finally:
            os.close(descriptor)

    async def take_in(
        self,
        bundle: Bundle,
        image: ImageId,
        source: Path,
        form: VolumeFormat,
        *,
        limits: ImageLimits,
        progress: OnProgress,
    ) -> ImageManifest:
        """The image is there when this returns, and not before. Repeatable; goes on where it was interrupted.
        Conflict if another image has that name."""
        checked_name(image, "image")
        descriptor = _opened(source)
        try:
            if self.path(image).exists():
                return self._held_already(image, descriptor, form)
            found = await self._judged(bundle, descriptor, form, limits)
            await self._convert(bundle, image, descriptor, found, limits, progress)
            return await self._settle(image, descriptor, found)
        finally:
            os.close(descriptor)

    def forget(self, image: ImageId) -> None:
        """What an interrupted `take_in` has left. The image itself stays if it is there."""
        self._unfinished(image).unlink(missing_ok=True)
        self._begun_path(image).unlink(missing_ok=True)

    # --- judging -----------------------------------------------------------------------------------

    async def _judged(self, bundle: Bundle, source: int, form: VolumeFormat, limits: ImageLimits) -> Found:
        size = os.fstat(source).st_size
        head = os.pread(source, probe.HEAD_BYTES, 0)
        if form is VolumeFormat.RAW:
            return probe.judged_raw(head, size, limits)
        found, l1 = probe.judged_qcow2(head, size, limits)
        probe.check_l1(await asyncio.to_thread(os.pread, source, l1.entries * 8, l1.offset), l1, size)
        await self._second_opinion(bundle, source, found)
        return found

    async def _second_opinion(self, bundle: Bundle, source: int, found: Found) -> None:
        """QEMU's own: the same size, no other file named, every cluster inside, every count right."""
        arguments = ("info", "--output=json", "-f", found.format, INPUT)
        info = _Info.read(await self._look(bundle, arguments, source))
        if info.format != found.format or info.virtual_size != found.virtual_bytes:
            raise Refused(
                f"the image is read in two ways: {found.virtual_bytes} and {info.virtual_size} bytes",
                field="image",
                remedy="make it anew",
            )
        if info.backing_filename or info.encrypted:
            raise Refused(
                "the image names another file, or is encrypted",
                field="image",
                remedy="send it in one piece and unencrypted",
            )
        check = await self._look(bundle, ("check", "--output=json", "-f", found.format, INPUT), source)
        if check.exit_code not in (0, 3):  # 3: space that nothing refers to, which does no harm
            raise Refused(
                f"the image is damaged: {_first_line(check)}",
                field="image",
                remedy="send the whole file, or repair it with qemu-img check -r all",
            )

    async def _look(self, bundle: Bundle, arguments: tuple[str, ...], source: int) -> Confined:
        return await run_confined(
            bundle,
            (*image_tool(bundle), *arguments),
            folder=self._jail,
            read=source,
            allowance=Allowance(
                seconds=LOOK_SECONDS, cpu_seconds=int(LOOK_SECONDS), memory_bytes=WORKING_MEMORY
            ),
        )

    # --- converting --------------------------------------------------------------------------------

    async def _convert(
        self,
        bundle: Bundle,
        image: ImageId,
        source: int,
        found: Found,
        limits: ImageLimits,
        progress: OnProgress,
    ) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_room(found)
        identity = _identity(source)
        begun = self._begun(image)
        if begun is None or begun.source != identity:
            self.forget(image)
            begun = _Begun(source=identity, done=0)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        target = os.open(self._unfinished(image), flags, 0o600)
        try:
            os.ftruncate(target, found.virtual_bytes)
            os.fchown(target, os.fstat(source).st_uid, -1)
            for begin in range(begun.done, found.virtual_bytes, RANGE_BYTES):
                progress(begin, found.virtual_bytes)
                length = min(RANGE_BYTES, found.virtual_bytes - begin)
                await self._convert_range(bundle, source, target, found, begin, length, limits)
                await asyncio.to_thread(os.fsync, target)
                self._note(image, _Begun(source=identity, done=begin + length))
            os.fchown(target, os.geteuid(), -1)
            os.fchmod(target, 0o644)
        finally:
            os.close(target)
        progress(found.virtual_bytes, found.virtual_bytes)

    async def _convert_range(
        self,
        bundle: Bundle,
        source: int,
        target: int,
        found: Found,
        begin: int,
        length: int,
        limits: ImageLimits,
    ) -> None:
        def bounded() -> None:
            if os.fstat(target).st_blocks * 512 > limits.stored_bytes:
                raise TooMuch(
                    f"the image takes more than {limits.stored_bytes} bytes once it is unpacked",
                    field="size",
                    remedy="make it smaller, or ask for a higher limit",
                )
            if shutil.disk_usage(self._folder).free < SPACE_LEFT:
                raise TooMuch(
                    "the images folder has no room left", field="images_dir", remedy="make room first"
                )

        os.ftruncate(target, begin)  # what a range that was interrupted has left
        os.ftruncate(target, found.virtual_bytes)
        window = {"driver": "raw", "offset": begin, "size": length}
        read = {**window, "file": _opened_by_name(INPUT, found.format)}
        write = {**window, "file": {"driver": "file", "filename": OUTPUT}}
        arguments = ("convert", "-n", "--target-is-zero", "-t", "writeback", _json(read), _json(write))
        try:
            converted = await run_confined(
                bundle,
                (*image_tool(bundle), *arguments),
                folder=self._jail,
                read=source,
                write=target,
                allowance=Allowance(
                    seconds=CONVERT_SECONDS,
                    cpu_seconds=int(CONVERT_SECONDS),
                    memory_bytes=WORKING_MEMORY,
                    file_bytes=found.virtual_bytes,
                ),
                watch=bounded,
            )
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        bounded()
        if converted.exit_code != 0:
            raise Refused(
                f"the image cannot be read: {_first_line(converted)}",
                field="image",
                remedy="check it with qemu-img check, then send it again",
            )

    def _check_room(self, found: Found) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < SPACE_LEFT:
            raise Refused(
                f"the images folder has {free >> 20} MiB left", field="images_dir", remedy="make room first"
            )

    async def _settle(self, image: ImageId, source: int, found: Found) -> ImageManifest:
        unfinished = self._unfinished(image)
        digest = await asyncio.to_thread(digest_of, unfinished)
        about = os.fstat(source)
        manifest = ImageManifest(
            image=image,
            sha256=digest,
            virtual_bytes=found.virtual_bytes,
            stored_bytes=unfinished.stat().st_blocks * 512,
            source_format=found.format,
            source_bytes=about.st_size,
        )
        write_file(self._manifest_path(image), msgspec.json.encode(manifest), mode=0o644)
        unfinished.replace(self.path(image))
        sync_folder(self._folder)
        self._begun_path(image).unlink(missing_ok=True)
        return manifest

    def _held_already(self, image: ImageId, source: int, form: VolumeFormat) -> ImageManifest:
        held = self.manifest(image)
        if held is None or (held.source_format, held.source_bytes) != (form, os.fstat(source).st_size):
            raise Conflict(f"there is an image '{image}'", field="image", remedy="choose another name")
        self._begun_path(image).unlink(missing_ok=True)
        return held

    # --- files -------------------------------------------------------------------------------------

    def _unfinished(self, image: ImageId) -> Path:
        return self._folder / f".unfinished-{image}"

    def _begun_path(self, image: ImageId) -> Path:
        return self._folder / f".begun-{image}"

    def _manifest_path(self, image: ImageId) -> Path:
        return self._folder / f"{image}{MANIFEST_SUFFIX}"

    def _begun(self, image: ImageId) -> _Begun | None:
        try:
            return msgspec.json.decode(self._begun_path(image).read_bytes(), type=_Begun)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def _note(self, image: ImageId, begun: _Begun) -> None:
        write_file(self._begun_path(image), msgspec.json.encode(begun), mode=0o600)


class _Info(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    format: str
    virtual_size: int
    backing_filename: str = ""
    encrypted: bool = False

    @classmethod
    def read(cls, said: Confined) -> "_Info":
        if said.exit_code == 0:
            try:
                return msgspec.json.decode(said.output, type=cls)
            except msgspec.MsgspecError:
                pass
        raise Refused(
            f"the image cannot be read: {_first_line(said)}", field="image", remedy="make the image anew"
        )


def image_tool(bundle: Bundle) -> tuple[str, ...]:
    """The bundle's `qemu-img`, through its own loader."""
    return (*bundle.storage_daemon()[:-1], str(bundle.root / bundle.manifest.image_tool))


def digest_of(path: Path) -> str:
    """SHA-256 of a raw file; blocks."""
    digest = hashlib.sha256()
    zeros = bytes(CHUNK)
    with path.open("rb") as file:
        size, position = os.fstat(file.fileno()).st_size, 0
        while position < size:
            data = _next_data(file.fileno(), position, size)
            while position < data:
                step = min(CHUNK, data - position)
                digest.update(zeros[:step] if step < CHUNK else zeros)
                position += step
            if position < size:
                part = os.pread(file.fileno(), CHUNK, position)
                digest.update(part)
                position += len(part)
    return digest.hexdigest()


def _next_data(descriptor: int, position: int, size: int) -> int:
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size  # only a hole is left
        raise


def _opened(source: Path) -> int:
    """Only a plain file, named as it is: no link, no device, nothing that could wait."""
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(
            f"there is no file {source}", field="source", remedy="put it on this host first"
        ) from None
    except OSError as error:
        raise Refused(f"{source}: {error.strerror}", field="source", remedy="name a plain file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused(f"{source} is no plain file", field="source", remedy="name a plain file")
    return descriptor


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _opened_by_name(path: str, form: VolumeFormat) -> dict[str, object]:
    file: dict[str, object] = {"driver": "file", "filename": path}
    if form is VolumeFormat.RAW:
        return file
    return {"driver": "qcow2", "file": file, "backing": None}


def _json(options: Mapping[str, object]) -> str:
    return "json:" + msgspec.json.encode(options).decode()


NO_DEVICES = "OFD lock probing"


def _first_line(said: Confined) -> str:
    """Without what QEMU says of every place that has no /dev."""
    words = [line for line in (said.complaints or said.output).strip().splitlines() if NO_DEVICES not in line]
    return words[0][:300] if words else f"qemu-img ended with {said.exit_code}"
