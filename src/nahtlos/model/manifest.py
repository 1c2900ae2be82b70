"""The manifest of a release bundle: written by whoever builds it, checked by every host before it runs
anything from it.

A bundle is a folder `<releases_dir>/<release id>/` with `manifest.json` (this struct) and `root/` (the
unpacked files). It carries its own loader and libraries, so it runs on any host of the architecture.
"""

import hashlib

import msgspec

from nahtlos.model.nouns import Release
from nahtlos.model.values import Value

MANIFEST_NAME = "manifest.json"
ROOT_NAME = "root"


class BundleFile(Value, frozen=True, kw_only=True):
    path: str
    """Relative to `root/`."""
    sha256: str
    """Of the content; of the target text for a symbolic link."""
    size: int
    mode: int
    link: str | None = None


class Manifest(Value, frozen=True, kw_only=True):
    release: Release
    loader: str
    """Paths relative to `root/`."""
    library_path: tuple[str, ...]
    system: str = ""
    """qemu-system-x86_64; empty, as what follows, in a bundle of something else."""
    storage_daemon: str = ""
    image_tool: str = ""
    data_path: tuple[str, ...] = ()
    """Folders for `-L`: firmware and option ROMs."""
    module_dir: str = ""
    programs: dict[str, str] = {}
    """Of a bundle of network functions: each program's name to its path."""
    files: tuple[BundleFile, ...]


def digest_of(files: tuple[BundleFile, ...]) -> str:
    """sha256 over the sorted list of files: the release's content address."""
    lines = (
        f"{f.path}\0{f.sha256}\0{f.mode:o}\0{f.link or ''}\n" for f in sorted(files, key=lambda f: f.path)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def decode_manifest(data: bytes) -> Manifest:
    return msgspec.json.decode(data, type=Manifest)
