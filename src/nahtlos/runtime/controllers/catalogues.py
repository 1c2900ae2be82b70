"""What the cloud's service needs of its surroundings: who signs certificates, which releases are built,
which images there are. Protocols, and the plain ones over folders."""

import asyncio
from pathlib import Path
from typing import Protocol

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, ImageId, ReleaseId
from nahtlos.model.nouns import Release
from nahtlos.runtime.controllers.volumes import FileView, ImageFileRequest, ImageRequest, ImageView
from nahtlos.runtime.releases import list_releases, load_release

HASHING_SECONDS = 120.0
LISTING_SECONDS = 10.0
IMAGE_SUFFIX = ".raw"


class Identity(Protocol):
    @property
    def certificate_pem(self) -> str:
        """Of the authority."""
        ...

    def sign_host_csr(self, csr_pem: str, host: HostId, address: str) -> str: ...


class ReleaseCatalog(Protocol):
    async def built(self) -> tuple[Release, ...]: ...

    async def verified(self, release: ReleaseId) -> Release:
        """The release after comparing every file with its manifest. NotFound if it is not built, Refused
        if anything differs."""
        ...


class ImageCatalog(Protocol):
    async def images(self) -> dict[ImageId, int]:
        """Every image, and its size in MiB, rounded up."""
        ...

    def coming(self) -> tuple[ImageView, ...]:
        """Those that are being taken in, or could not be."""
        ...

    async def take_in(self, request: ImageRequest) -> ImageView:
        """Begin to; it is among `coming` from then on, and in the end among the images."""
        ...

    async def write_out(self, image: ImageId, request: ImageFileRequest) -> FileView:
        """Begin to; it is among `files` from then on."""
        ...

    def files(self) -> tuple[FileView, ...]:
        """Those that are being written, and what became of them."""
        ...

    async def delete(self, image: ImageId) -> None: ...


class FolderReleases:
    """Bundles under `<folder>/<release>/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def built(self) -> tuple[Release, ...]:
        async with asyncio.timeout(LISTING_SECONDS):
            return await asyncio.to_thread(list_releases, self._folder, None)

    async def verified(self, release: ReleaseId) -> Release:
        async with asyncio.timeout(HASHING_SECONDS):
            return await asyncio.to_thread(load_release, self._folder, release)


class FolderImages:
    """`<folder>/<image>.raw`"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def images(self) -> dict[ImageId, int]:
        async with asyncio.timeout(LISTING_SECONDS):
            return await asyncio.to_thread(self._list)

    def coming(self) -> tuple[ImageView, ...]:
        return ()

    async def take_in(self, request: ImageRequest) -> ImageView:
        raise Refused(
            "this orchestrator takes in no images",
            field="file",
            remedy="put the raw image into its images folder, and into that of every host",
        )

    async def write_out(self, image: ImageId, request: ImageFileRequest) -> FileView:
        raise Refused(
            "this orchestrator writes no images",
            field="file",
            remedy="copy the raw image from its images folder",
        )

    def files(self) -> tuple[FileView, ...]:
        return ()

    async def delete(self, image: ImageId) -> None:
        async with asyncio.timeout(LISTING_SECONDS):
            await asyncio.to_thread(self._delete, image)

    def _delete(self, image: ImageId) -> None:
        for path in self._folder.glob(f"{image}.*"):
            path.unlink()

    def _list(self) -> dict[ImageId, int]:
        return {
            ImageId(path.stem): -(-path.stat().st_size // (1 << 20))
            for path in sorted(self._folder.glob(f"*{IMAGE_SUFFIX}"))
        }
