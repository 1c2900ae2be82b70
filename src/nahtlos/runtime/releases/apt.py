"""A private apt: its own sources, indexes, cache and an empty list of installed packages.

Owns one folder under the downloads. It reads the machine's own apt sources to learn where its Debian mirror
is, and the machine's settings for reaching it (proxy, credentials); it never changes either, installs
nothing, and trusts only what Debian's archive keys, as installed on the machine, have signed.
"""

import contextlib
import hashlib
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.nouns import Artifact
from nahtlos.model.values import Value
from nahtlos.runtime.releases.commands import run
from nahtlos.runtime.releases.lock import exclusive
from nahtlos.runtime.releases.progress import OnProgress, Progress

ETC_APT = Path("/etc/apt")
KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
_SIDE_SUITE = re.compile(r"(-security|-updates|-backports|-backports-sloppy|-proposed-updates|/updates)$")
_KEPT_SETTINGS = re.compile(
    r"^Acquire::(http|https|tor|Retries|ForceIPv4|ForceIPv6|Check-Valid-Until|Check-Date)\b"
)
_INST = re.compile(r"^Inst (\S+)(?: \[[^\]]*\])? \((\S+) .*\[(\w+)\]\)", re.MULTILINE)
_INDEX_DEADLINE = 300.0
_SOLVE_DEADLINE = 60.0
_DOWNLOAD_DEADLINE = 1800.0


class Source(Value, frozen=True, kw_only=True):
    """One line of apt's sources, whichever way it was written."""

    uri: str
    suite: str
    components: tuple[str, ...]


def parse_one_line(text: str) -> Iterator[Source]:
    """`deb [options] uri suite component…` lines of a `.list` file."""
    for line in text.splitlines():
        words = re.sub(r"\[[^\]]*\]", " ", line.partition("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield Source(uri=words[1], suite=words[2], components=tuple(words[3:]))


def parse_deb822(text: str) -> Iterator[Source]:
    """The stanzas of a `.sources` file that are enabled."""
    uncommented = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n[ \t]*\n", uncommented):
        fields = _fields(stanza)
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in ("no", "false", "0", "off", "without", "disable"):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri=uri, suite=suite, components=tuple(fields.get("components", "").split()))


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t"):
            fields[name] = f"{fields.get(name, '')} {line.strip()}"
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
    return fields


def machine_sources(etc_apt: Path = ETC_APT) -> list[Source]:
    """All enabled binary sources of the machine, in apt's order."""
    sources: list[Source] = []
    main = etc_apt / "sources.list"
    parts = sorted((etc_apt / "sources.list.d").glob("*"))
    for path in [main, *parts]:
        if not path.is_file() or (path != main and path.suffix not in (".list", ".sources")):
            continue
        text = path.read_text(errors="replace")
        sources.extend(parse_deb822(text) if path.suffix == ".sources" else parse_one_line(text))
    return sources


def choose_mirror(sources: Iterable[Source], codename: str) -> str:
    """The address from which the machine gets Debian itself. Refused if its sources name none."""
    for source in sources:
        if source.suite not in (codename, "stable", "oldstable") or _SIDE_SUITE.search(source.suite):
            continue
        if "main" in source.components and not source.uri.startswith(("cdrom:", "file:", "copy:")):
            return source.uri.rstrip("/")
    raise Refused(
        f"the machine's apt sources name no mirror for Debian {codename}",
        field="/etc/apt",
        remedy=f"add one, with suite {codename} and component main",
    )


def machine_codename(os_release: Path = Path("/etc/os-release")) -> str:
    for line in os_release.read_text().splitlines() if os_release.is_file() else []:
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip().strip('"')
    raise Refused("this is no Debian machine", field=str(os_release), remedy="use Debian 12")


def archive_keyring(candidates: Sequence[Path] = KEYRINGS) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    raise Refused(
        "Debian's archive keys are not installed",
        field="packages",
        remedy="apt-get install debian-archive-keyring",
    )


def kept_settings(dump: str) -> list[str]:
    """Of the machine's apt settings (`apt-config dump`) those that say how its mirror is reached."""
    return [line for line in dump.splitlines() if _KEPT_SETTINGS.match(line)]


def parse_simulation(text: str) -> tuple[tuple[str, str, str], ...]:
    """Name, version and architecture of what `apt-get --simulate install` would install."""
    return tuple((m[1].partition(":")[0], m[2], m[3]) for m in _INST.finditer(text))


def archive_name(name: str, version: str, architecture: str) -> str:
    """The file name under which apt keeps a package."""
    return f"{name}_{urllib.parse.quote(version, safe='+~.-')}_{architecture}.deb".replace("%3A", "%3a")


class Package(Value, frozen=True, kw_only=True):
    """A downloaded package."""

    name: str
    version: str
    path: Path

    def artifact(self) -> Artifact:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Artifact(name=self.name, version=self.version, sha256=digest)


class PrivateApt:
    """apt over `folder` and nothing else of the machine. `suites` by name; the mirror is the machine's.

    A context: entered, the folder is ours alone and its indexes are fresh."""

    def __init__(self, folder: Path, suites: Sequence[str], on_progress: OnProgress) -> None:
        self._folder = folder
        self._suites = tuple(suites)
        self._on_progress = on_progress
        self._archives = folder / "cache/archives"
        self._before = 0
        self._held = contextlib.ExitStack()
        self._configuration = folder / "apt.conf"

    def __enter__(self) -> Self:
        self._held.enter_context(exclusive(self._folder.with_suffix(".lock")))
        self._prepare()
        self._update()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _prepare(self) -> None:
        """Write the configuration; it follows the machine's, which may have changed."""
        for part in ("lists/partial", "cache/archives/partial", "etc/none"):
            (self._folder / part).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").write_bytes(b"")
        mirror = choose_mirror(machine_sources(), machine_codename())
        keyring = archive_keyring()
        lines = [f"deb [signed-by={keyring}] {mirror} {suite} main\n" for suite in self._suites]
        (self._folder / "etc/sources.list").write_text("".join(lines))
        self._configuration.write_text("\n".join([*self._settings(), *machine_settings()]) + "\n")

    def _settings(self) -> list[str]:
        folder = self._folder.resolve()
        values = {
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::State::extended_states": folder / "extended_states",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "etc/sources.list",
            "Dir::Etc::sourceparts": folder / "etc/none",
            "Dir::Etc::preferences": folder / "etc/preferences",
            "Dir::Etc::preferencesparts": folder / "etc/none",
            "Dir::Etc::main": folder / "etc/apt.conf",
            "Dir::Etc::parts": folder / "etc/none",
            "Dir::Log": folder,
            "APT::Architecture": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::http::Timeout": "30",
            "Acquire::https::Timeout": "30",
            "Acquire::Retries": "3",
        }
        return [f'{name} "{value}";' for name, value in values.items()]

    def _apt(
        self, *words: str, timeout: float, progress: Progress | None = None, cwd: Path | None = None
    ) -> str:
        try:
            return run(
                [*words],
                timeout=timeout,
                cwd=cwd,
                environment={"APT_CONFIG": str(self._configuration), "DEBIAN_FRONTEND": "noninteractive"},
                while_running=(lambda: self._report(progress)) if progress else None,
            )
        except Unavailable as error:
            remedy = "check the network and the machine's apt sources, then run it again"
            if "NO_PUBKEY" in error.message:
                remedy = "apt-get install --only-upgrade debian-archive-keyring, then run it again"
            raise Unavailable(error.message, field=error.field, remedy=remedy) from error

    def _update(self) -> None:
        """Fetch the indexes of the suites, if they are newer than those that are here."""
        text = f"package indexes of {', '.join(self._suites)}"
        self._on_progress(Progress(step="index", text=text))
        self._apt("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update", timeout=_INDEX_DEADLINE)

    def download(self, names: Sequence[str], target: str) -> list[Package]:
        """`names` from suite `target`, with all they depend on; what is here already is not fetched again."""
        install = ("-y", "-q", "--no-install-recommends", "-t", target, "install", *names)
        plan = self._apt("apt-get", "--simulate", *install, timeout=_SOLVE_DEADLINE)
        packages = [
            Package(name=name, version=version, path=self._archives / archive_name(name, version, arch))
            for name, version, arch in parse_simulation(plan)
        ]
        missing = self._apt("apt-get", "--print-uris", *install, timeout=_SOLVE_DEADLINE)
        total = sum(int(m[1]) for m in re.finditer(r"^'[^']+' \S+ (\d+)", missing, re.MULTILINE))
        if total:
            self._fetch(install, total, f"{len(packages)} packages from {target}")
        gone = [package.path.name for package in packages if not package.path.is_file()]
        if gone or not packages:
            raise Unavailable(f"apt did not bring {', '.join(gone) or 'anything'}", remedy="run it again")
        return packages

    def dependency(self, name: str, prefix: str) -> str:
        """The package starting with `prefix` that `name` depends on, as meta-packages do."""
        answer = self._apt("apt-cache", "depends", name, timeout=_SOLVE_DEADLINE)
        found = re.search(rf"^\s*Depends: ({re.escape(prefix)}\S+)", answer, re.MULTILINE)
        if found is None:
            raise Unavailable(f"{name} depends on no {prefix}…", remedy="run it again")
        return found[1]

    def download_alone(self, name: str) -> Package:
        """`name` without what it depends on."""
        shown = self._apt("apt-cache", "show", "--no-all-versions", name, timeout=_SOLVE_DEADLINE)
        fields = dict(re.findall(r"^(Version|Architecture|Size): (\S+)$", shown, re.MULTILINE))
        path = self._archives / archive_name(name, fields["Version"], fields["Architecture"])
        if not path.is_file():
            progress = Progress(step="download", text=name, total=int(fields["Size"]), unit="bytes")
            self._before = self._size()
            # It writes into the current folder, and not in one step: hence a folder of its own.
            incoming = self._archives / "partial" / f"alone-{name}"
            incoming.mkdir(parents=True, exist_ok=True)
            self._apt("apt-get", "-q", "download", name, timeout=_DOWNLOAD_DEADLINE, progress=progress,
                      cwd=incoming)  # fmt: skip
            (incoming / path.name).rename(path)
        return Package(name=name, version=fields["Version"], path=path)

    def _fetch(self, install: Sequence[str], total: int, text: str) -> None:
        self._before = self._size()
        progress = Progress(step="download", text=text, total=total, unit="bytes")
        self._report(progress)
        self._apt("apt-get", "--download-only", *install, timeout=_DOWNLOAD_DEADLINE, progress=progress)
        self._report(progress)

    def _size(self) -> int:
        return sum(path.stat().st_size for path in self._archives.glob("**/*.deb"))

    def _report(self, progress: Progress) -> None:
        """apt renames finished files under our feet: a figure that is late once does not matter."""
        try:
            done = self._size() - self._before
        except FileNotFoundError:
            return
        self._on_progress(
            Progress(
                step=progress.step, text=progress.text, unit=progress.unit, total=progress.total, done=done
            )
        )


def machine_settings() -> list[str]:
    """How the machine reaches its mirror: proxy, certificates, credentials."""
    dump = run(["apt-config", "dump"], timeout=20)
    return [
        *kept_settings(dump),
        'Dir::Etc::netrc "/etc/apt/auth.conf";',
        'Dir::Etc::netrcparts "/etc/apt/auth.conf.d";',
    ]
