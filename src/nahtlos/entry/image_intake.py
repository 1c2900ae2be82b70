"""Images taken in and written out by the orchestrator: its folder of images with the host's own way of
judging and converting files that nobody trusts, which runs confined, and of writing files.

Owns the tasks that convert. What is taken in when this process ends is begun again by asking again, and goes
on where it was; a file that was being written does not appear, and is written anew by asking again.
"""

import asyncio
from pathlib import Path

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord
from nahtlos.model.ids import ImageId
from nahtlos.model.nouns import Component
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles
from nahtlos.physical.storage.backups import in_thread
from nahtlos.physical.storage.images import ImageFolder
from nahtlos.physical.storage.probe import ImageLimits
from nahtlos.physical.storage.snapshot_file import check_free, file_facts, write_image
from nahtlos.runtime.controllers.catalogues import IMAGE_SUFFIX, FolderImages
from nahtlos.runtime.controllers.volumes import FileView, ImageFileRequest, ImageRequest, ImageView
from nahtlos.runtime.releases import list_releases

MIB = 1 << 20
FILES_REMEMBERED = 100


class ImageIntake(FolderImages):
    """`releases`: of these the newest QEMU's tools are used."""

    def __init__(self, folder: Path, releases: Path, jail: Path) -> None:
        super().__init__(folder)
        self._releases = releases
        self._bundles = Bundles(releases)
        self._images = ImageFolder(folder, jail)
        self._jail = jail
        self._limits = ImageLimits()
        self._coming: dict[ImageId, ImageView] = {}
        self._tasks: dict[ImageId, asyncio.Task[None]] = {}
        self._folder_of_images = folder
        self._files: dict[str, FileView] = {}
        self._writing: dict[str, asyncio.Task[None]] = {}

    def coming(self) -> tuple[ImageView, ...]:
        return tuple(self._coming.values())

    async def take_in(self, request: ImageRequest) -> ImageView:
        """Judged before it returns, so that a file that is none is refused to who asked."""
        image, source = ImageId(request.name), Path(request.file)
        if image in self._tasks:
            raise Conflict(f"image {image} is being taken in", field="name", remedy="wait until it is there")
        bundle = await self._bundle()
        self._jail.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = await self._images.inspect(bundle, source, request.format, self._limits)
        view = ImageView(id=image, size_mib=-(-found.virtual_bytes // MIB), volumes=(), progress=0.0)
        self._coming[image] = view
        self._tasks[image] = asyncio.get_running_loop().create_task(self._convert(bundle, request, view))
        return view

    async def _convert(self, bundle: Bundle, request: ImageRequest, view: ImageView) -> None:
        def note(done: int, total: int) -> None:
            self._say(view, progress=min(done / total if total else 0.0, 0.99))

        try:
            await self._images.take_in(
                bundle,
                view.id,
                Path(request.file),
                request.format,
                limits=self._limits,
                progress=note,
            )
        except Error as error:
            self._say(view, problem=error.message)
        except Exception as error:
            self._say(view, problem=ErrorRecord.of(error).message)
        else:
            del self._coming[view.id]
        finally:
            del self._tasks[view.id]

    # --- written out ---------------------------------------------------------------------------------

    def files(self) -> tuple[FileView, ...]:
        return tuple(self._files.values())

    async def write_out(self, image: ImageId, request: ImageFileRequest) -> FileView:
        if request.file in self._writing:
            raise Conflict(
                f"{request.file} is being written", field="file", remedy="wait until it is complete"
            )
        bundle = await self._bundle()
        await asyncio.to_thread(check_free, Path(request.file))
        while len(self._files) >= FILES_REMEMBERED and (over := self._files.keys() - self._writing.keys()):
            del self._files[next(name for name in self._files if name in over)]
        view = FileView(file=request.file, image=image, format=request.format)
        self._files[view.file] = view
        self._writing[view.file] = asyncio.get_running_loop().create_task(self._write(bundle, view))
        return view

    async def _write(self, bundle: Bundle, view: FileView) -> None:
        def note(done: int, total: int) -> None:
            self._files[view.file] = msgspec.structs.replace(
                view, progress=min(done / total if total else 0.0, 0.99)
            )

        source, file = self._folder_of_images / f"{view.image}{IMAGE_SUFFIX}", Path(view.file)
        try:
            await write_image(bundle, source, file, view.format, note)
            facts = await in_thread(lambda stop: file_facts(file, stop))
            ended = msgspec.structs.replace(view, progress=1.0, bytes=facts.bytes, sha256=facts.sha256)
        except Error as error:
            ended = msgspec.structs.replace(view, problem=error.message)
        except Exception as error:
            ended = msgspec.structs.replace(view, problem=ErrorRecord.of(error).message)
        finally:
            del self._writing[view.file]
        self._files[view.file] = ended

    def _say(self, view: ImageView, *, progress: float = 0.0, problem: str = "") -> None:
        self._coming[view.id] = ImageView(
            id=view.id, size_mib=view.size_mib, volumes=(), progress=progress, problem=problem
        )

    async def _bundle(self) -> Bundle:
        known = await asyncio.to_thread(list_releases, self._releases)
        qemu = [release for release in known if release.component is Component.HYPERVISOR]
        if not qemu:
            raise Conflict(
                "no release of QEMU is built, whose tools judge images",
                field="file",
                remedy="build one: nahtlos release build",
            )
        newest = max(qemu, key=lambda release: [int(p) for p in release.version.split(".") if p.isdecimal()])
        return await self._bundles.checked(newest.id)
