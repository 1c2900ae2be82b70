"""Which of the unpacked files a bundle needs: what is named here, and the libraries those load.

Decides only; `builder` moves the files. Libraries are found by asking the bundle's own loader, so what is
kept is what will be mapped at run time.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from nahtlos.model.errors import Refused
from nahtlos.model.values import Value

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LIBRARY_PATH = (LIBRARIES, f"{LIBRARIES}/ceph")
"""The second is found by an absolute path within its users, which a bundle cannot satisfy."""
LOADERS = (f"{LIBRARIES}/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2")
SYSTEM = "usr/bin/qemu-system-x86_64"
STORAGE_DAEMON = "usr/bin/qemu-storage-daemon"
IMAGE_TOOL = "usr/bin/qemu-img"
MODULES = f"{LIBRARIES}/qemu"
DATA = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")

PROGRAMS = (SYSTEM, STORAGE_DAEMON, IMAGE_TOOL)
_PLUGINS = (f"{MODULES}/accel-*.so", f"{MODULES}/block-*.so")
"""Accelerators and block drivers. Displays, sound and USB pass-through have no place in a server."""
_LOADED_BY_NAME = (f"{LIBRARIES}/libgcc_s.so.1",)
"""Opened by the C library when a thread ends: no list of needed libraries mentions it."""
_FIRMWARE = (
    "usr/share/seabios/*",
    "usr/lib/ipxe/qemu/*.rom",
    "usr/share/qemu/*.rom",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot*.bin",
    "usr/share/qemu/multiboot*.bin",
    "usr/share/qemu/pvh.bin",
)
_NEVER = ("usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/lintian/", "etc/", "var/")

_RESOLVED = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)
_MISSING = re.compile(r"^\s*(\S+) => not found", re.MULTILINE)


class Contents(Value, frozen=True, kw_only=True):
    """What a bundle of a component consists of, besides what that loads."""

    programs: tuple[str, ...]
    plugins: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


HYPERVISOR = Contents(programs=PROGRAMS, plugins=_PLUGINS, data=_FIRMWARE)
NETWORK_PROGRAMS = {"dnsmasq": "usr/sbin/dnsmasq", "haproxy": "usr/sbin/haproxy"}
NETWORK = Contents(programs=tuple(NETWORK_PROGRAMS.values()))


def merged(path: str) -> str:
    """Where a package's file belongs. Packages of bookworm still ship `lib/` beside `usr/lib/`, which are
    one folder on every machine (merged /usr)."""
    top = path.partition("/")[0]
    return f"usr/{path}" if top in ("bin", "lib", "lib64", "sbin") else path


def may_be_needed(path: str) -> bool:
    """False for what no program reads; spares moving and naming it."""
    return not path.startswith(_NEVER)


def named(paths: Iterable[str], contents: Contents = HYPERVISOR) -> tuple[list[str], list[str]]:
    """Of `paths` the code that must run (programs, plug-ins) and the other files that are kept by name."""
    code: list[str] = []
    other: list[str] = []
    for path in paths:
        if path in contents.programs or _matches(path, contents.plugins):
            code.append(path)
        elif path in LOADERS or path in _LOADED_BY_NAME or _matches(path, contents.data):
            other.append(path)
    absent = sorted(set(contents.programs) - set(code))
    if absent:
        raise Refused(f"the packages hold no {', '.join(absent)}", field="suite", remedy="report this")
    return sorted(code), sorted(other)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def resolved_libraries(listing: str, root: Path) -> list[str]:
    """From the answer of `ld.so --list`: paths relative to `root`.
    Refused if one is missing, or would come from the machine instead of the bundle."""
    missing = _MISSING.findall(listing)
    paths = [Path(path) for path in _RESOLVED.findall(listing)]
    outside = [str(path) for path in paths if not path.is_relative_to(root)]
    if missing or outside:
        raise Refused(
            f"the packages do not bring {', '.join([*missing, *outside])}",
            field="suite",
            remedy="report this",
        )
    return [str(path.relative_to(root)) for path in paths]


def with_link_targets(paths: Iterable[str], root: Path) -> set[str]:
    """`paths`, and for symbolic links also what they lead to, step by step, within `root`."""
    kept: set[str] = set()
    for start in paths:
        path = root / start
        while str(path.relative_to(root)) not in kept:
            kept.add(str(path.relative_to(root)))
            if not path.is_symlink():
                break
            target = path.readlink()
            path = root / str(target).lstrip("/") if target.is_absolute() else _normal(path.parent / target)
            if not path.is_relative_to(root):
                raise Refused(f"link {start} leads out of the bundle", field="suite", remedy="report this")
    return kept


def _normal(path: Path) -> Path:
    """Resolve `..` by text: no link of the bundle may be followed while looking."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)


def machine_types(answer: str) -> tuple[str, ...]:
    """Versioned machine types in QEMU's answer to `-machine help`, aliases left out."""
    names = (line.split(maxsplit=1)[0] for line in answer.splitlines() if line.strip())
    return tuple(sorted(name for name in names if re.fullmatch(r"pc-(q35|i440fx)-\d+\.\d+", name)))
