"""Release bundles as a host sees them: which are present and sound, and how to run what is in them.

Every file is hashed against the manifest before anything of a bundle runs, once per process and again
when its manifest changes. Never writes into a bundle.
"""

import asyncio
from pathlib import Path

import msgspec

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import ReleaseId
from nahtlos.model.manifest import MANIFEST_NAME, ROOT_NAME, Manifest
from nahtlos.wire.bundle import read_manifest, verify_files, version_key


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose files are what its manifest says."""

    root: Path
    manifest: Manifest

    @property
    def release(self) -> ReleaseId:
        return self.manifest.release.id

    @property
    def version(self) -> tuple[int, ...]:
        return version_key(self.manifest.release.version)

    @property
    def environment(self) -> dict[str, str]:
        return {"QEMU_MODULE_DIR": str(self.root / self.manifest.module_dir)}

    def system(self) -> tuple[str, ...]:
        """What a command line of qemu-system begins with."""
        folders = [part for path in self.manifest.data_path for part in ("-L", str(self.root / path))]
        return (*self._run(self.manifest.system), *folders)

    def storage_daemon(self) -> tuple[str, ...]:
        return self._run(self.manifest.storage_daemon)

    def program(self, name: str) -> tuple[str, ...]:
        """One of a bundle of network functions."""
        return self._run(self.manifest.programs[name])

    def _run(self, program: str) -> tuple[str, ...]:
        """Through the bundle's own loader, so that nothing of the host's libraries is used."""
        libraries = ":".join(str(self.root / path) for path in self.manifest.library_path)
        loader = str(self.root / self.manifest.loader)
        return (loader, "--library-path", libraries, str(self.root / program))


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
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    return Bundle(root=folder / ROOT_NAME, manifest=manifest)
