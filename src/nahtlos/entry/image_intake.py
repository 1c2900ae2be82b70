"""Images taken in by the orchestrator: its folder of images with the host's own way of judging and converting
files that nobody trusts, which runs confined.

Owns the tasks that convert. What is under way when this process ends is begun again by asking again, and goes
on where it was.
"""

import asyncio
from pathlib import Path

from nahtlos.model.errors import Conflict, Error, ErrorRecord
from nahtlos.model.ids import ImageId
from nahtlos.model.nouns import Component
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles
from nahtlos.physical.storage.images import ImageFolder
from nahtlos.physical.storage.probe import ImageLimits
from nahtlos.runtime.controllers.catalogues import FolderImages
from nahtlos.runtime.controllers.volumes import ImageRequest, ImageView
from nahtlos.runtime.releases import list_releases

MIB = 1 << 20


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
