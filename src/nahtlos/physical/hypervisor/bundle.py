"""Release bundles as a host sees them: which are present and sound, and how to run what is in them.

Every file is hashed against the manifest before anything of a bundle runs, once per process and again
when its manifest changes. Never writes into a bundle.
"""

import asyncio
import hashlib
import os
import stat
from pathlib import Path

import msgspec

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import ReleaseId
from nahtlos.model.manifest import MANIFEST_NAME, ROOT_NAME, BundleFile, Manifest, decode_manifest, digest_of

REBUILD = "build the release again"


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose files are what its manifest says."""

    root: Path
    manifest: Manifest

    @property
    def release(self) -> ReleaseId:
        return self.manifest.release.id

    @property
    def version(self) -> tuple[int, ...]:
        return version_numbers(self.manifest.release.version)

    @property
    def environment(self) -> dict[str, str]:
        return {"QEMU_MODULE_DIR": str(self.root / self.manifest.module_dir)}

    def system(self) -> tuple[str, ...]:
        """What a command line of qemu-system begins with."""
        folders = [part for path in self.manifest.data_path for part in ("-L", str(self.root / path))]
        return (*self._run(self.manifest.system), *folders)

    def storage_daemon(self) -> tuple[str, ...]:
        return self._run(self.manifest.storage_daemon)

    def _run(self, program: str) -> tuple[str, ...]:
        """Through the bundle's own loader, so that nothing of the host's libraries is used."""
        libraries = ":".join(str(self.root / path) for path in self.manifest.library_path)
        loader = str(self.root / self.manifest.loader)
        return (loader, "--library-path", libraries, str(self.root / program))


def version_numbers(version: str) -> tuple[int, ...]:
    """`10.0.13` -> (10, 0, 13); anything after the first part that is no number is left out."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


class Bundles:
    """The bundles in one folder, with what is known of them by the modification time of their manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, int], Bundle | Refused] = {}
        self._hashing = asyncio.Lock()

    async def available(self) -> tuple[ReleaseId, ...]:
        """Those that are sound; the others are named by `checked`."""
        found: list[ReleaseId] = []
        for path in sorted(self._folder.glob(f"*/{MANIFEST_NAME}")):
            try:
                found.append((await self.checked(ReleaseId(path.parent.name))).release)
            except Refused:
                continue
        return tuple(found)

    async def checked(self, release: ReleaseId) -> Bundle:
        """NotFound if it is not here, Refused with the first difference if it is not what it should be."""
        manifest = self._folder / release / MANIFEST_NAME
        try:
            key = (release, manifest.stat().st_mtime_ns)
        except OSError:
            raise NotFound(
                f"release '{release}' is not on this host", field="release", remedy="build it here first"
            ) from None
        async with self._hashing:
            if key not in self._known:
                self._known[key] = await asyncio.to_thread(_read_or_refusal, self._folder / release)
        known = self._known[key]
        if isinstance(known, Refused):
            raise Refused(known.message, field=known.field, remedy=known.remedy)
        return known


def _read_or_refusal(folder: Path) -> Bundle | Refused:
    try:
        return read_bundle(folder)
    except Refused as refusal:
        return refusal


def read_bundle(folder: Path) -> Bundle:
    """Hash everything. Blocks for as long as that takes; call it in a thread."""
    path = folder / MANIFEST_NAME
    try:
        manifest = decode_manifest(path.read_bytes())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(f"the manifest is broken: {error}", field=str(path), remedy=REBUILD) from error
    if manifest.release.digest != digest_of(manifest.files):
        raise Refused("its digest is not that of its list of files", field=str(path), remedy=REBUILD)
    named = manifest.release.id
    if named != folder.name or not named.endswith(manifest.release.digest[:12]):
        raise Refused(f"it is the manifest of '{named}'", field=str(path), remedy=REBUILD)
    root = folder / ROOT_NAME
    for file in manifest.files:
        difference = difference_of(root, file)
        if difference:
            raise Refused(difference, field=str(root / file.path), remedy=REBUILD)
    return Bundle(root=root, manifest=manifest)


def difference_of(root: Path, expected: BundleFile) -> str:
    """In words how a file differs from its line in the manifest; empty if it does not."""
    path = root / expected.path
    try:
        status = path.lstat()
        if expected.link is not None:
            link = os.readlink(path)  # noqa: PTH115 - the text itself is what counts
            return "" if link == expected.link else f"it points to {link} instead of {expected.link}"
        if not stat.S_ISREG(status.st_mode):
            return "it is no regular file"
        if stat.S_IMODE(status.st_mode) != expected.mode:
            return f"its mode is {stat.S_IMODE(status.st_mode):o} instead of {expected.mode:o}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return "" if digest == expected.sha256 else "its content is not what the manifest says"
