"""What was built here: releases, the guest image, and by which accelerator they run."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from nahtlos.model.errors import Error
from nahtlos.model.inventory import Accelerator
from nahtlos.model.nouns import Release
from nahtlos.ops.examined import Finding, Level, Machine, required
from nahtlos.ops.version_rows import rows_that_matter
from nahtlos.runtime.releases import TRACKS, broken_releases, list_images, list_releases, load_release


def releases(build: Path) -> list[Finding]:
    folder = build / "releases"
    built = list_releases(folder)
    findings = [_track(name, [r for r in built if r.suite == track.suite], folder)
                for name, track in TRACKS.items()]  # fmt: skip
    findings.extend(
        required("release", False, str(error), error.remedy or "build it again")
        for error in broken_releases(folder)
    )
    return findings


def _track(name: str, built: list[Release], folder: Path) -> Finding:
    title = f"release {name}"
    if not built:
        return required(title, False, "not built", "make releases")
    release = built[-1]
    try:
        load_release(folder, release.id)
    except Error as error:
        return required(title, False, f"{error.field}: {error.message}", error.remedy)
    return required(title, True, f"{release.id}, every file as in its manifest", "")


def version_pairs(build: Path) -> list[Finding]:
    """What the table says of those that were built, as guests run here."""
    known = _newest(build / "cache", lambda _: True)
    rows = rows_that_matter(list_releases(build / "releases"), known.name if known is not None else "tcg")
    return [
        Finding(
            name=f"hypervisor {row.title}",
            ok=row.ok,
            level=Level.USEFUL,
            detail=row.detail,
            remedy="" if row.ok else "go by a release between them: docs/version-pairs.md",
        )
        for row in rows
    ]


def image(build: Path) -> Finding:
    images = list_images(build / "images")
    return required(
        "guest image", bool(images), images[-1].id if images else "not built", "build it: make image"
    )


def accelerator(machine: Machine, cache: Path) -> Finding:
    """What the last probe that booted a guest on this machine, since it was started, found."""
    boot = machine.text("/proc/sys/kernel/random/boot_id").strip()
    remembered = _newest(cache, lambda path: not boot or boot in path.name)
    if remembered is None:
        return Finding(
            name="accelerator",
            ok=True,
            level=Level.USEFUL,
            detail="not known yet: the first host that starts boots a probe to find out",
        )
    slow = remembered.name == "tcg"
    return Finding(
        name="accelerator",
        ok=not slow,
        level=Level.USEFUL,
        detail=f"{remembered.name}: {remembered.reason}",
        remedy="use a machine whose KVM works, for figures near those of production" if slow else "",
    )


def _newest(cache: Path, wanted: Callable[[Path], bool]) -> Accelerator | None:
    paths = [path for path in cache.glob("accelerator-*.json") if wanted(path)] if cache.is_dir() else []
    for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            return msgspec.json.decode(path.read_bytes(), type=Accelerator)
        except (msgspec.MsgspecError, OSError):
            continue
    return None
