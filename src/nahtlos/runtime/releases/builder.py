"""Builds release bundles from Debian's packages.

    index -> download -> unpack -> select -> hash -> ask -> rename into place

Everything before the last step happens in a hidden folder that the next build throws away, so a build may be
killed at any time; downloads are kept. A track that is built already is answered from disk, without network.
Never installs anything on the machine and never runs a maintainer script.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from nahtlos.model.errors import Error, Refused
from nahtlos.model.manifest import MANIFEST_NAME, ROOT_NAME, BundleFile, Manifest, digest_of
from nahtlos.model.nouns import Component, Release
from nahtlos.model.values import Value
from nahtlos.runtime.releases import selection
from nahtlos.runtime.releases.apt import Package, PrivateApt
from nahtlos.runtime.releases.commands import run
from nahtlos.runtime.releases.lock import exclusive
from nahtlos.runtime.releases.progress import OnProgress, Progress, silent
from nahtlos.wire.bundle import (
    describe,
    files_under,
    list_releases,
    load_release,
    release_id,
    version_key,
)

PACKAGES = ("qemu-system-x86", "qemu-utils", "qemu-block-extra")
NETWORK_PACKAGES = ("haproxy", "dnsmasq-base")
_UNPACK_DEADLINE = 120.0
_QEMU_DEADLINE = 60.0


class Track(Value, frozen=True, kw_only=True):
    """A line of releases to follow: the newest version in `suite`, which must not be older than `oldest`."""

    name: str
    suite: str
    sources: tuple[str, ...]
    oldest: str
    """Of the first of `packages`, which gives the release its version."""
    component: Component = Component.HYPERVISOR
    packages: tuple[str, ...] = PACKAGES


TRACKS = {
    track.name: track
    for track in (
        # Servers under it are replaced in place and never moved (docs/version-pairs.md).
        Track(name="7.2", suite="bookworm", sources=("bookworm",), oldest="7.2"),
        # Not trixie: its 10.0.13 gives virtio queues 1024 entries, and 11.1 refuses streams from it
        # (docs/decisions/0003).
        Track(
            name="10.0",
            suite="bookworm-backports",
            sources=("bookworm", "bookworm-backports"),
            oldest="10.0",
        ),
        Track(name="11.1", suite="trixie-backports", sources=("trixie", "trixie-backports"), oldest="11.1"),
    )
}
NETWORK_TRACKS = {
    track.name: track
    for track in (
        Track(
            name=f"network-{number}",
            suite=suite,
            sources=(suite, f"{suite}-backports"),
            oldest=oldest,
            component=Component.NETWORK,
            packages=NETWORK_PACKAGES,
        )
        for number, suite, oldest in ((12, "bookworm", "2.6"), (13, "trixie", "3.0"))
    )
}
"""By the number of the Debian they come from; their version is haproxy's."""


def find_track(name: str) -> Track:
    known = {**TRACKS, **NETWORK_TRACKS}
    if name not in known:
        raise Refused(f"unknown track '{name}'", field="track", remedy=f"use one of {', '.join(known)}")
    return known[name]


def upstream_version(debian: str) -> str:
    """`10.0.13` of `1:10.0.13+ds-0+deb13u1`."""
    return debian.rpartition(":")[2].partition("+")[0].partition("-")[0].partition("~")[0]


def build_release(
    version_track: str,
    releases_dir: Path,
    downloads_dir: Path,
    on_progress: OnProgress = silent,
    *,
    refresh: bool = False,
) -> Release:
    """The release of a track, built if it is not there yet.

    `refresh` looks for a newer version even if one is built. Refused if the machine cannot build it,
    Unavailable if the mirror does not answer; either way it may be called again."""
    track = find_track(version_track)
    releases_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(releases_dir / f".lock-{track.name}"):
        built = None if refresh else _already_built(track, releases_dir)
        if built is None:
            built = _build(track, releases_dir.resolve(), downloads_dir.resolve(), on_progress)
        on_progress(Progress(step="done", text=built.id, done=1, total=1))
        return built


def _already_built(track: Track, releases_dir: Path) -> Release | None:
    """The newest intact release of the track. A damaged one is built again, not used."""
    for release in reversed(list_releases(releases_dir, track.component)):
        if release.suite == track.suite:
            with contextlib.suppress(Error):
                return load_release(releases_dir, release.id)
    return None


def _build(track: Track, releases_dir: Path, downloads_dir: Path, on_progress: OnProgress) -> Release:
    with PrivateApt(downloads_dir / "apt" / track.sources[0], track.sources, on_progress) as apt:
        packages = apt.download(track.packages, track.suite)
    version = _checked_version(track, packages)
    staging = releases_dir / f".building-{track.name}"
    shutil.rmtree(staging, ignore_errors=True)
    root = staging / ROOT_NAME
    root.mkdir(parents=True)
    owners = _unpack(packages, staging / "unpack", root, on_progress)
    loader = _keep_needed(root, owners, _contents(track), on_progress)
    manifest = _manifest(track, version, root, loader, packages, owners, on_progress)
    (staging / MANIFEST_NAME).write_bytes(
        msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    )
    _put_in_place(staging, releases_dir / manifest.release.id)
    return manifest.release


def _checked_version(track: Track, packages: Sequence[Package]) -> str:
    version = next(upstream_version(p.version) for p in packages if p.name == track.packages[0])
    if version_key(version) < version_key(track.oldest):
        raise Refused(
            f"{track.suite} has {track.packages[0]} {version}, older than {track.oldest} of {track.name}",
            field="track",
            remedy="point the machine's apt sources to a current mirror",
        )
    return version


def _unpack(
    packages: Sequence[Package], folder: Path, root: Path, on_progress: OnProgress
) -> dict[str, Package]:
    """Unpack all packages into `root`; returns which package each file came from."""
    owners: dict[str, Package] = {}
    for number, package in enumerate(packages):
        text = f"{package.name} {package.version}"
        on_progress(Progress(step="unpack", text=text, done=number, total=len(packages)))
        own = folder / package.name
        own.mkdir(parents=True)
        run(["dpkg-deb", "--extract", package.path, own], timeout=_UNPACK_DEADLINE)
        for path in files_under(own):
            relative = selection.merged(str(path.relative_to(own)))
            if selection.may_be_needed(relative):
                target = root / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
                owners[relative] = package
        shutil.rmtree(own)
    folder.rmdir()
    return owners


def _contents(track: Track) -> selection.Contents:
    return selection.NETWORK if track.component is Component.NETWORK else selection.HYPERVISOR


def _keep_needed(
    root: Path, owners: dict[str, Package], contents: selection.Contents, on_progress: OnProgress
) -> str:
    """Delete from `root` what the component does not need; returns the loader's path."""
    on_progress(Progress(step="select", text="files that are needed"))
    loader = next((path for path in selection.LOADERS if path in owners), None)
    if loader is None:
        raise Refused("the packages hold no loader", field="suite", remedy="report this")
    code, other = selection.named(owners, contents)
    keep = {*code, *other, loader}
    for path in code:
        keep.update(_libraries(root, loader, path))
    keep = selection.with_link_targets(keep, root)
    for relative in owners:
        if relative not in keep:
            (root / relative).unlink()
    _remove_empty_folders(root)
    for path in files_under(root):
        if not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return loader


def _libraries(root: Path, loader: str, path: str) -> list[str]:
    command = [root / loader, "--inhibit-cache", "--library-path", _library_path(root), "--list", root / path]
    return selection.resolved_libraries(run(command, timeout=_QEMU_DEADLINE), root)


def _library_path(root: Path) -> str:
    return ":".join(str(root / path) for path in selection.LIBRARY_PATH)


def _remove_empty_folders(root: Path) -> None:
    for folder in sorted((p for p in root.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _manifest(
    track: Track,
    version: str,
    root: Path,
    loader: str,
    packages: Sequence[Package],
    owners: dict[str, Package],
    on_progress: OnProgress,
) -> Manifest:
    files = _described(root, on_progress)
    digest = digest_of(files)
    used = {owners[file.path].name for file in files}
    network = track.component is Component.NETWORK
    on_progress(Progress(step="ask", text="what it can do"))
    release = Release(
        id=release_id(track.component, version, digest),
        component=track.component,
        version=version,
        suite=track.suite,
        digest=digest,
        machine_types=() if network else _machine_types(root, loader),
        artifacts=tuple(p.artifact() for p in packages if p.name in used),
        size_mib=-(-sum(file.size for file in files) // (1 << 20)),
    )
    library_path = tuple(path for path in selection.LIBRARY_PATH if (root / path).is_dir())
    if network:
        _try(root, loader)
        return Manifest(
            release=release,
            loader=loader,
            library_path=library_path,
            programs=selection.NETWORK_PROGRAMS,
            files=files,
        )
    return Manifest(
        release=release,
        loader=loader,
        library_path=library_path,
        system=selection.SYSTEM,
        storage_daemon=selection.STORAGE_DAEMON,
        image_tool=selection.IMAGE_TOOL,
        data_path=tuple(path for path in selection.DATA if (root / path).is_dir()),
        module_dir=selection.MODULES,
        files=files,
    )


def _described(root: Path, on_progress: OnProgress) -> tuple[BundleFile, ...]:
    paths = list(files_under(root))
    on_progress(Progress(step="hash", text=f"{len(paths)} files", total=len(paths)))
    return tuple(describe(root, path) for path in paths)


def _try(root: Path, loader: str) -> None:
    """Each program starts by what the bundle holds."""
    for name, path in selection.NETWORK_PROGRAMS.items():
        option = "-vv" if name == "haproxy" else "-v"
        run(
            [root / loader, "--library-path", _library_path(root), root / path, option],
            timeout=_QEMU_DEADLINE,
        )


def _machine_types(root: Path, loader: str) -> tuple[str, ...]:
    data = [word for path in selection.DATA for word in ("-L", str(root / path))]
    answer = run(
        [root / loader, "--library-path", _library_path(root), root / selection.SYSTEM, *data,
         "-machine", "help"],
        timeout=_QEMU_DEADLINE,
        environment={"QEMU_MODULE_DIR": str(root / selection.MODULES)},
    )  # fmt: skip
    types = selection.machine_types(answer)
    if not types:
        raise Refused(
            "the new hypervisor offers no versioned machine type", field="suite", remedy="report this"
        )
    return types


def _put_in_place(staging: Path, target: Path) -> None:
    """Make the bundle visible in one step. What stands there under the same id was found damaged, or is
    the same."""
    _to_disk(staging)
    if target.exists():
        old = target.with_name(f".old-{target.name}")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(target)


def _to_disk(folder: Path) -> None:
    """A machine that loses power after the rename must not find empty files under a good name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.sync()
