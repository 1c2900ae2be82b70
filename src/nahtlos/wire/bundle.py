"""Release bundles on disk, as the runtime builds them and hosts run them: found, read, verified. Never
changes one.

A bundle is trusted only after every file it consists of was hashed and compared with its manifest, and the
manifest with the release id it stands under.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from nahtlos.model.errors import Error, NotFound, Refused
from nahtlos.model.ids import ReleaseId
from nahtlos.model.manifest import MANIFEST_NAME, ROOT_NAME, BundleFile, Manifest, decode_manifest, digest_of
from nahtlos.model.nouns import Component, Release


def release_id(component: str, version: str, digest: str) -> ReleaseId:
    return ReleaseId(f"{component}-{version}-{digest[:12]}")


def describe(root: Path, path: Path) -> BundleFile:
    """The manifest's line for one file or symbolic link under `root`."""
    status = path.lstat()
    relative = str(path.relative_to(root))
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(path)  # noqa: PTH115 - Path.readlink would normalise the text that is hashed
        digest = hashlib.sha256(target.encode()).hexdigest()
        return BundleFile(path=relative, sha256=digest, size=len(target), mode=0o777, link=target)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return BundleFile(path=relative, sha256=digest, size=status.st_size, mode=stat.S_IMODE(status.st_mode))


def files_under(root: Path) -> Iterator[Path]:
    """Every file and symbolic link, in a fixed order."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`, checked against itself but not against the files."""
    path = folder / MANIFEST_NAME
    remedy = f"delete {folder} and build the release again"
    try:
        manifest = decode_manifest(path.read_bytes())
    except FileNotFoundError as error:
        raise Refused("the bundle has no manifest", field=str(path), remedy=remedy) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused(f"the manifest is broken: {error}", field=str(path), remedy=remedy) from error
    release = manifest.release
    if release.digest != digest_of(manifest.files):
        raise Refused("the manifest's digest is not that of its files", field=str(path), remedy=remedy)
    expected = release_id(release.component, release.version, release.digest)
    if release.id != expected or folder.name != expected:
        raise Refused(
            f"the manifest belongs to {expected}, not to {folder.name}", field=str(path), remedy=remedy
        )
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest; Refused names the first that differs."""
    root = folder / ROOT_NAME
    remedy = f"delete {folder} and build the release again"
    for expected in manifest.files:
        path = root / expected.path
        if not path.is_symlink() and not path.is_file():
            raise Refused("a file of the release is missing", field=str(path), remedy=remedy)
        found = describe(root, path)
        if found != expected:
            raise Refused(f"the file differs from the manifest: {_difference(found, expected)}",
                          field=str(path), remedy=remedy)  # fmt: skip


def _difference(found: BundleFile, expected: BundleFile) -> str:
    if found.link != expected.link:
        return f"it points to {found.link or 'nothing'} instead of {expected.link or 'nothing'}"
    if found.sha256 != expected.sha256:
        return f"its sha256 is {found.sha256[:12]}… instead of {expected.sha256[:12]}…"
    return f"its mode is {found.mode:o} instead of {expected.mode:o}"


def load_manifest(releases_dir: Path, release: ReleaseId) -> Manifest:
    """The manifest of a built release, every file of it verified."""
    folder = releases_dir / release
    if "/" in release or release.startswith(".") or not folder.is_dir():
        built = ", ".join(_names(releases_dir)) or "none"
        raise NotFound(
            f"release '{release}' is not built (built: {built})",
            field="release",
            remedy="build it with `nahtlos release build`",
        )
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    return manifest


def load_release(releases_dir: Path, release: ReleaseId) -> Release:
    return load_manifest(releases_dir, release).release


def _names(releases_dir: Path) -> list[str]:
    if not releases_dir.is_dir():
        return []
    return sorted(p.name for p in releases_dir.iterdir() if p.is_dir() and not p.name.startswith("."))


def list_releases(
    releases_dir: Path, component: Component | None = Component.HYPERVISOR
) -> tuple[Release, ...]:
    """What is built of `component` (None: any), oldest version first. Files are not hashed; folders without
    a sound manifest are left out (`broken_releases` names them)."""
    built = [m.release for m in _readable(releases_dir) if isinstance(m, Manifest)]
    found = [release for release in built if component in (None, release.component)]
    return tuple(sorted(found, key=lambda release: version_key(release.version)))


def broken_releases(releases_dir: Path) -> tuple[Error, ...]:
    """What is wrong with folders that should hold a bundle and do not."""
    return tuple(found for found in _readable(releases_dir) if isinstance(found, Error))


def _readable(releases_dir: Path) -> Iterator[Manifest | Error]:
    for name in _names(releases_dir):
        try:
            yield read_manifest(releases_dir / name)
        except Error as error:
            yield error


def version_key(version: str) -> tuple[int, ...]:
    """For comparing versions as people do: 10.0.9 is older than 10.0.13."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))
