"""A VMM's share of its host's processors, by control groups of version 1 or 2, whichever has the controller.

Owns the groups named after VMMs and what is written into them. Only the threads of vCPUs are throttled: the
rest of a VMM (its main loop, its I/O threads) serves the guest's devices and must not stand still because
the guest has calculated for long, or the guest loses far more than was asked for. Touches no other group.

    version 1   <cpu>/nahtlos.<place>.<unit>           shares and quota; the threads of vCPUs alone
    version 2   <root>/nahtlos.<place>.<unit>          weight; the process
                                          /vcpus      quota; the threads of vCPUs (a threaded group)

A weight is that of one vCPU, and a group weighs as much as its vCPUs together: in version 1 a VMM with the
default share may stay outside of any group, where each of its threads weighs the same.
"""

import errno
import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.nouns import CpuShare

DEFAULT = CpuShare()
PERIOD_US = 10_000
"""A guest that has used up its quota stands still for less than this."""
LEAST_QUOTA_US = 1_000
"""The kernel's. Smaller quotas have a longer period."""
ONE_VCPU_SHARES = 1024
"""Version 1: what a thread outside of any group weighs, too."""
SHARES = (2, 262_144)
WEIGHTS = (1, 10_000)
VCPUS = "vcpus"
REMOVED_WITHIN = 1.0
REMEDY = (
    "mount control groups with the cpu controller on this host, and start its agent where it can see them "
    "(`ip netns exec` hides them, `nsenter --net` does not)"
)


class Version(IntEnum):
    ONE = 1
    TWO = 2


class Hierarchy(msgspec.Struct, frozen=True, kw_only=True):
    version: Version
    root: Path


def mounted(mounts: str) -> tuple[Hierarchy, ...]:
    """Of a table of mounts (`/proc/self/mounts`): where the cpu controller may be; version 1 first, for where
    it is mounted the other has none."""
    found: list[Hierarchy] = []
    for line in mounts.splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            found.append(Hierarchy(version=Version.ONE, root=Path(folder)))
        elif kind == "cgroup2":
            found.append(Hierarchy(version=Version.TWO, root=Path(folder)))
    return tuple(sorted(found, key=lambda each: each.version))


def usable() -> Hierarchy | None:
    """The one that is there for this process to use now."""
    for each in mounted(Path("/proc/self/mounts").read_text(encoding="utf-8")):
        if each.version is Version.ONE and (each.root / "cpu.cfs_quota_us").exists():
            return each
        with suppress(OSError):
            controllers = (each.root / "cgroup.controllers").read_text(encoding="utf-8").split()
            if each.version is Version.TWO and "cpu" in controllers:
                return each
    return None


def why_unusable() -> str:
    """In words; empty if groups can be made."""
    hierarchy = usable()
    if hierarchy is None:
        return "no control groups with the cpu controller are to be seen"
    return "" if os.access(hierarchy.root, os.W_OK) else f"{hierarchy.root} cannot be written"


def group_name(run_dir: Path, unit: str) -> str:
    """Of one host's VMM: there may be several hosts on one kernel."""
    return f"nahtlos.{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}.{unit}"


def remove_empty(run_dir: Path) -> None:
    """What VMMs of this host have left behind that nobody has ended by its agent."""
    hierarchy = usable()
    for folder in hierarchy.root.glob(group_name(run_dir, "*")) if hierarchy else ():
        for path in (folder / VCPUS, folder):
            with suppress(OSError):
                path.rmdir()


def quota_us(quota: int) -> tuple[int, int]:
    """Microseconds of processor time, and of the period they are for."""
    period = max(PERIOD_US, -(-LEAST_QUOTA_US * 100 // quota))
    return period * quota // 100, period


def weight_of(version: Version, weight: int, vcpus: int) -> int:
    """As the kernel is told it: of all vCPUs together, within what it takes."""
    if version is Version.ONE:
        return min(max(weight * ONE_VCPU_SHARES * vcpus // 100, SHARES[0]), SHARES[1])
    return min(max(weight * vcpus, WEIGHTS[0]), WEIGHTS[1])


def wanted_files(version: Version, share: CpuShare, vcpus: int) -> dict[str, str]:
    """What the files of a group must say, in the order in which they are written."""
    weight = str(weight_of(version, share.weight, vcpus))
    if version is Version.TWO:
        limit = f"max {PERIOD_US}" if not share.quota else "{} {}".format(*quota_us(share.quota))
        return {"cpu.weight": weight, f"{VCPUS}/cpu.max": limit}
    quota, period = quota_us(share.quota) if share.quota else (-1, PERIOD_US)
    return {"cpu.shares": weight, "cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": str(quota)}


def share_of(version: Version, files: Mapping[str, str], vcpus: int, expected: CpuShare) -> CpuShare:
    """What the files of a group say. They hold rounded figures: it is as expected if they hold its."""
    if dict(files) == wanted_files(version, expected, vcpus):
        return expected
    if version is Version.TWO:
        limit, period = files[f"{VCPUS}/cpu.max"].split()
        quota = 0 if limit == "max" else round(int(limit) * 100 / int(period))
        return CpuShare(quota=quota, weight=round(int(files["cpu.weight"]) / vcpus))
    limit_us, period_us = int(files["cpu.cfs_quota_us"]), int(files["cpu.cfs_period_us"])
    return CpuShare(
        quota=0 if limit_us < 0 else round(limit_us * 100 / period_us),
        weight=round(int(files["cpu.shares"]) * 100 / (ONE_VCPU_SHARES * vcpus)),
    )


class CpuGroup:
    """That of one VMM. Everything here blocks for a moment, as the kernel waits for its own readers: call it
    in a thread."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self._version = hierarchy.version
        self._root = hierarchy.root
        self._path = hierarchy.root / name

    @property
    def needed(self) -> bool:
        """Also for the default share: it has a group, or (version 2) shares one with others until it has."""
        return self._version is Version.TWO or self._path.exists()

    def observe(self, threads: tuple[int, ...], expected: CpuShare) -> CpuShare:
        """What holds for all of these threads."""
        try:
            held = self._threads()
            names = wanted_files(self._version, DEFAULT, 1)
            files = {name: (self._path / name).read_text(encoding="utf-8").strip() for name in names}
        except FileNotFoundError:
            return DEFAULT
        return share_of(self._version, files, len(threads), expected) if held >= set(threads) else DEFAULT

    def apply(self, pid: int, threads: tuple[int, ...], share: CpuShare) -> bool:
        """Whether anything had to be changed. A VMM that runs already is taken in."""
        if share == DEFAULT and not self.needed:
            return False
        try:
            self._make(pid)
            changed = self._write(wanted_files(self._version, share, len(threads)))
            return self._take_in(threads) or changed
        except ProcessLookupError:
            raise Unavailable("the VMM has ended") from None
        except OSError as error:
            raise Refused(
                f"the control group {self._path} cannot be used: {error.strerror}", field="cpu", remedy=REMEDY
            ) from error

    def remove(self) -> None:
        """Once the VMM has ended. What is still on its way out of the kernel is waited for a moment."""
        until = time.monotonic() + REMOVED_WITHIN
        for folder in (self._path / VCPUS, self._path):
            while folder.exists():
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > until:
                        return
                    time.sleep(0.01)

    def _make(self, pid: int) -> None:
        self._path.mkdir(exist_ok=True)
        if self._version is Version.TWO:
            inner = self._path / VCPUS
            _enable(self._root)
            inner.mkdir(exist_ok=True)
            if (inner / "cgroup.type").read_text(encoding="utf-8").strip() != "threaded":
                (inner / "cgroup.type").write_text("threaded", encoding="utf-8")
            _enable(self._path)
            if str(pid) not in (self._path / "cgroup.procs").read_text(encoding="utf-8").split():
                (self._path / "cgroup.procs").write_text(str(pid), encoding="utf-8")

    def _write(self, files: Mapping[str, str]) -> bool:
        changed = False
        for name, text in files.items():
            path = self._path / name
            if path.read_text(encoding="utf-8").strip() != text:
                path.write_text(text, encoding="utf-8")
                changed = True
        return changed

    def _take_in(self, threads: tuple[int, ...]) -> bool:
        missing = set(threads) - self._threads()
        for thread in sorted(missing):
            self._members.write_text(str(thread), encoding="utf-8")
        return bool(missing)

    @property
    def _members(self) -> Path:
        if self._version is Version.ONE:
            return self._path / "tasks"
        return self._path / VCPUS / "cgroup.threads"

    def _threads(self) -> frozenset[int]:
        return frozenset(int(each) for each in self._members.read_text(encoding="utf-8").split())


def _enable(folder: Path) -> None:
    control = folder / "cgroup.subtree_control"
    if "cpu" not in control.read_text(encoding="utf-8").split():
        control.write_text("+cpu", encoding="utf-8")
