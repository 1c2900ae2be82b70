"""Builds a small Debian image: Debian's packages, booted by SeaBIOS, set up by cloud-init.

    mmdebstrap -> root -> disk -> rename

Packages come by suite from the mirror that the machine's own apt uses, signed by Debian's archive keys. Work
happens in a hidden folder, so a build may be killed at any time, and an image that is built already is found
by its recipe, without network. An image is named by its content; package scripts write some bytes of their
own (caches, logs), so two builds of one recipe are two images.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.ids import ImageId
from nahtlos.model.values import Value
from nahtlos.runtime.releases import debian_contents as contents
from nahtlos.runtime.releases import debian_disk
from nahtlos.runtime.releases.apt import (
    archive_keyring,
    choose_mirror,
    machine_codename,
    machine_settings,
    machine_sources,
)
from nahtlos.runtime.releases.commands import run
from nahtlos.runtime.releases.lock import exclusive
from nahtlos.runtime.releases.progress import OnProgress, Progress, silent

_BOOTSTRAP_DEADLINE = 3600.0
_TOOL_DEADLINE = 60.0


class DebianImage(Value, frozen=True, kw_only=True):
    """A built image. `recipe` is the sha256 over all that is decided in this repository."""

    id: ImageId
    recipe: str
    suite: str
    sha256: str
    """Of its raw content."""
    packages: dict[str, str]
    """Versions by name."""

    def raw(self, folder: Path) -> Path:
        return folder / f"{self.id}.raw"


def build_debian(folder: Path, on_progress: OnProgress = silent, *, refresh: bool = False) -> DebianImage:
    """The image of this recipe, built if it is not in `folder` yet. `refresh`: anew, of today's packages."""
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / ".lock"):
        image = None if refresh else find_debian(folder)
        if image is None:
            image = _build(folder.resolve(), on_progress)
        on_progress(Progress(step="done", text=image.id, done=1, total=1))
        return image


def find_debian(folder: Path) -> DebianImage | None:
    """The newest one of this recipe that is there, whole."""
    for record in sorted(folder.glob("debian-*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(msgspec.MsgspecError, OSError):
            image = msgspec.json.decode(record.read_bytes(), type=DebianImage)
            if image.recipe == recipe() and _sha256(image.raw(folder)) == image.sha256:
                return image
    return None


def recipe() -> str:
    digest = hashlib.sha256()
    for module in (__file__, contents.__file__, debian_disk.__file__):
        digest.update(hashlib.sha256(Path(module).read_bytes()).digest())
    return digest.hexdigest()


def bootstrap_command(root: Path, hook: Path, settings: Path, source: str) -> Sequence[str | Path]:
    """`settings`: a file of apt's on how `source`, a line of `sources.list`, is reached.

    What is mounted below `root` meanwhile is so for these processes alone, and ends with them: whoever
    deletes a root that was left behind deletes nothing else."""
    return [
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"),
        *("--architectures=amd64", "--skip=check/empty"),
        f"--aptopt={settings}",
        '--aptopt=APT::Install-Recommends "false"',
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in contents.LEFT_OUT),
        f"--dpkgopt=path-include={contents.LICENCES}",
        f"--include={','.join(contents.PACKAGES)}",
        f"--customize-hook={hook}",
        *(contents.SUITE, root, source),
    ]


def _build(folder: Path, on_progress: OnProgress) -> DebianImage:
    if os.geteuid() != 0:
        raise Refused("packages are set up as root", field="user", remedy="run it as root")
    staging = folder / ".building"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o755)
    root = staging / "root"
    _bootstrap(root, staging, on_progress)
    packages = _installed(root)
    on_progress(Progress(step="disk", text=f"{len(packages)} packages"))
    raw = staging / "raw"
    debian_disk.make_disk(raw, root, staging)
    digest = _sha256(raw)
    image = DebianImage(
        id=ImageId(f"debian-{contents.VERSION}-{digest[:12]}"),
        recipe=recipe(),
        suite=contents.SUITE,
        sha256=digest,
        packages=packages,
    )
    raw.rename(image.raw(folder))
    os.sync()
    record = staging / "record"
    record.write_bytes(msgspec.json.format(msgspec.json.encode(image)))
    record.rename(folder / f"{image.id}.json")
    shutil.rmtree(staging)
    return image


def _bootstrap(root: Path, staging: Path, on_progress: OnProgress) -> None:
    if shutil.which("mmdebstrap") is None:
        raise Refused("mmdebstrap is not installed", field="packages", remedy="run `make setup`")
    settings, hook = staging / "apt.conf", staging / "hook"
    settings.write_text("\n".join(machine_settings()) + "\n")
    settings.chmod(0o600)
    hook.write_text(contents.hook())
    hook.chmod(0o755)
    mirror = choose_mirror(machine_sources(), machine_codename())
    source = f"deb [signed-by={archive_keyring()}] {mirror} {contents.SUITE} main"
    text = f"Debian {contents.SUITE}, {len(contents.PACKAGES)} packages and what they need"
    on_progress(Progress(step="packages", text=text))
    run(
        bootstrap_command(root, hook, settings, source),
        timeout=_BOOTSTRAP_DEADLINE,
        environment={"SOURCE_DATE_EPOCH": debian_disk.EPOCH, "TMPDIR": str(staging)},
        while_running=lambda: on_progress(_so_far(root, text)),
    )


def _so_far(root: Path, text: str) -> Progress:
    """By dpkg's own list of files: one per package that is unpacked."""
    unpacked = sum(1 for _ in root.glob("var/lib/dpkg/info/*.list"))
    return Progress(step="packages", text=f"{text}: {unpacked} so far")


def _installed(root: Path) -> dict[str, str]:
    form = "--showformat=${Package} ${Version}\\n"
    listed = run(["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show", form], timeout=_TOOL_DEADLINE)
    return dict(sorted(line.split(" ", 1) for line in listed.splitlines()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
