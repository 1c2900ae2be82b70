"""Which dnsmasq and haproxy this host runs: those of a release, or its own.

Owns the choice and, below the run directory, `programs/<name>`: a script of a fixed path that leads to the
chosen program through its bundle's own loader, so that a process which executes itself again (a reload of
haproxy) becomes the chosen one. Never starts or ends anything: who runs a program asks here for its words.
"""

import shlex
import shutil
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import ReleaseId
from nahtlos.model.nouns import Component
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles

LOADER = "/lib64/ld-linux-x86-64.so.2"
"""The host's own."""
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {"dnsmasq": "dnsmasq-base", "haproxy": "haproxy"}


class _Running(msgspec.Struct, frozen=True):
    release: ReleaseId | None = None


class Programs:
    def __init__(self, releases_dir: Path, run_dir: Path) -> None:
        self._bundles = Bundles(releases_dir)
        self._record = run_dir / "network-release.json"
        self._folder = run_dir / "programs"
        self._bundle: Bundle | None = None

    @property
    def release(self) -> ReleaseId | None:
        """That everything here was last brought to."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=_Running).release
        except (OSError, msgspec.DecodeError):
            return None

    @property
    def chosen(self) -> str:
        """The release by which programs are started; empty: the host's own."""
        return self._bundle.release if self._bundle is not None else ""

    async def choose(self, release: ReleaseId | None) -> None:
        """What is started from now on. Refused, and all as before, if the release cannot serve here."""
        if release is None:
            self._bundle = None
            return
        bundle = await self._bundles.checked(release)
        missing = sorted(PACKAGES.keys() - bundle.manifest.programs.keys())
        if bundle.manifest.release.component is not Component.NETWORK or missing:
            raise Refused(
                f"{release} is no release of network functions",
                field="network_release",
                remedy="build one: nahtlos release build network-12",
            )
        self._bundle = bundle

    def settled(self) -> None:
        """Everything here runs by what was chosen."""
        chosen = self._bundle.release if self._bundle is not None else None
        if self.release != chosen or not self._record.exists():
            _write(self._record, msgspec.json.encode(_Running(chosen)).decode(), mode=0o600)

    def found(self, name: str) -> str | None:
        """The program's path, for people; None if there is none."""
        if self._bundle is not None:
            return str(self._bundle.root / self._bundle.manifest.programs[name])
        return shutil.which(name, path=SYSTEM_PATH)

    def words(self, name: str) -> tuple[str, ...]:
        """What a command line that runs it begins with."""
        if self._bundle is not None:
            return self._bundle.program(name)
        path = self.found(name)
        if path is None:
            remedy = f"apt-get install {PACKAGES[name]}"
            raise Unavailable(f"{name} is not installed", field="network", remedy=remedy)
        return (path,)

    def script(self, name: str) -> Path:
        """A fixed path that runs it, now and when it is executed again later."""
        path, words = self._folder / name, self.words(name)
        # Loader, its options, program: what it takes for its own name, and executes again, is the script.
        loading = words[:-1] or (LOADER,)
        words = (*loading, "--argv0", str(path), words[-1])
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(path, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', mode=0o755)
        return path


def _write(path: Path, text: str, *, mode: int) -> None:
    """At once and whole. Nothing if it is so already."""
    try:
        if path.read_text() == text:
            return
    except OSError:
        pass
    new = path.with_name(f".{path.name}.new")
    new.touch(mode=mode)
    new.chmod(mode)
    new.write_text(text)
    new.replace(path)
