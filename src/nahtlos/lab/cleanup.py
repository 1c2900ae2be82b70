"""Ends what is left of a lab, however it was interrupted, and tells one that runs from one that is left over.

Owns the rule of what belongs to a lab: processes that carry `NAHTLOS_LAB=<lab>` exactly (and dnsmasq inside
one of its namespaces), namespaces of its nodes and of its hosts' routers, and its three directories. Never
ends a process it has not just identified: a signal goes through a descriptor of the process whose start time
was read. Labs whose names begin alike do not touch each other.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from nahtlos.lab import paths, topology
from nahtlos.lab.paths import LAB_VARIABLE
from nahtlos.model.errors import Conflict
from nahtlos.physical.hypervisor import cgroups
from nahtlos.physical.network.routing.namespaces import Namespaces

PROC = Path("/proc")
SUPERVISOR = "nahtlos.entry.supervisor"
DEADLINE = 15.0
"""Seconds for everything; processes that cannot be ended (in the kernel) are named in the result."""


class Roots(msgspec.Struct, frozen=True):
    """Where labs keep their files."""

    run: Path = paths.RUN
    state: Path = paths.STATE
    ram: Path = paths.RAM

    def run_dir(self, lab: str) -> Path:
        return self.run / lab

    def state_dir(self, lab: str) -> Path:
        return self.state / lab

    def ram_dir(self, lab: str) -> Path:
        return self.ram / f"nahtlos-{lab}"

    def lock_file(self, lab: str) -> Path:
        return self.run / f"{lab}.lock"


ROOTS = Roots()


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What a clean-up found and removed."""

    processes: tuple[str, ...] = ()
    """`<pid> <command>`"""
    namespaces: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    """What could not be removed in time."""

    def __bool__(self) -> bool:
        return bool(self.processes or self.namespaces or self.directories)


# --- lock --------------------------------------------------------------------------------------------


class LabLock:
    """Held for as long as a lab runs, by whoever runs it; the kernel lets go of it when that process ends.
    Its file holds the holder's pid, for people."""

    def __init__(self, lab: str, roots: Roots = ROOTS) -> None:
        self.lab = topology.checked_lab(lab)
        self._path = roots.lock_file(lab)
        self._fd = -1

    def acquire(self) -> None:
        """Conflict if the lab runs already."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise Conflict(
                f"lab {self.lab} runs already (process {holder or 'unknown'})",
                field="lab",
                remedy="take it down with `nahtlos lab down`, or choose another name",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def fileno(self) -> int:
        """For handing the lock down to a process that carries the lab on."""
        return self._fd

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lab_is_running(lab: str, roots: Roots = ROOTS) -> bool:
    """Whether somebody holds the lab's lock. False for one that is only left over."""
    try:
        fd = os.open(roots.lock_file(lab), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# --- clean-up ----------------------------------------------------------------------------------------


def cleanup(lab: str, *, keep_state: bool = False, roots: Roots = ROOTS) -> Removed:
    """Ends and removes everything of `lab`, at most DEADLINE seconds. Repeatable; does nothing to a lab
    that left nothing behind. Does not ask whether the lab runs: see lab_is_running."""
    topology.checked_lab(lab)
    deadline = time.monotonic() + DEADLINE
    ended, surviving = _end_processes(lab, deadline)
    namespaces = (*topology.destroy(lab), *_let_go(roots.run_dir(lab)))
    directories = [roots.run_dir(lab), roots.ram_dir(lab)]
    if not keep_state:
        directories.append(roots.state_dir(lab))
    removed = [str(d) for d in directories if _remove_tree(d)]
    return Removed(
        processes=tuple(ended),
        namespaces=namespaces,
        directories=tuple(removed),
        left=(*surviving, *(str(d) for d in directories if d.exists())),
    )


def _let_go(folder: Path) -> Iterator[str]:
    """Ends the namespaces that hosts with their run directory below `folder` hold: cables go with them.
    Control groups of their VMMs go, too."""
    for run_dir in (folder, *(path for path in folder.glob("**") if path.is_dir())):
        cgroups.remove_empty(run_dir)
        held = Namespaces(run_dir)
        for name in held.names():
            held.destroy(name)
            yield f"{name} of {run_dir.name}"


def _remove_tree(path: Path) -> bool:
    if not path.exists():
        return False
    for _ in range(3):  # something that ended a moment ago may still have written
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            break
    return True


class Process(msgspec.Struct, frozen=True):
    pid: int
    parent: int
    started: int
    """Ticks since the machine started: with the pid, it names a process for good."""
    command: str

    def __str__(self) -> str:
        return f"{self.pid} {self.command}"


def processes_of(lab: str) -> tuple[Process, ...]:
    """Processes of `lab`: supervisors, which would start the others again, then parents before what they
    started. Not ourselves, nor whoever started us."""
    spared = set(_ourselves())
    namespaces = _namespace_inodes(lab)
    found = {
        p.pid: p
        for p in (_process(int(e.name)) for e in PROC.iterdir() if e.name.isdigit())
        if p is not None and p.pid not in spared and _belongs(p, lab, namespaces)
    }
    return tuple(sorted(found.values(), key=lambda p: (SUPERVISOR not in p.command, _depth(p, found), p.pid)))


def _depth(process: Process, among: dict[int, Process]) -> int:
    depth = 0
    while process.parent in among and depth < len(among):
        process, depth = among[process.parent], depth + 1
    return depth


def _ourselves() -> Iterator[int]:
    pid = os.getpid()
    while pid > 0:
        yield pid
        process = _process(pid)
        pid = process.parent if process else 0


def _process(pid: int) -> Process | None:
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
        line = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    command = line.replace(b"\0", b" ").decode(errors="replace").strip() or name
    return Process(pid, int(fields[1]), int(fields[19]), command[:120])


def _belongs(process: Process, lab: str, namespaces: frozenset[int]) -> bool:
    folder = PROC / str(process.pid)
    try:
        if f"{LAB_VARIABLE}={lab}".encode() in (folder / "environ").read_bytes().split(b"\0"):
            return True
        program = Path(process.command.split(" ", 1)[0]).name
        return program == "dnsmasq" and (folder / "ns" / "net").stat().st_ino in namespaces
    except OSError:
        return False


def _namespace_inodes(lab: str) -> frozenset[int]:
    inodes: set[int] = set()
    for name in topology.namespaces_of(lab):
        with contextlib.suppress(OSError):
            inodes.add((topology.NAMESPACES / name).stat().st_ino)
    return frozenset(inodes)


def _end_processes(lab: str, deadline: float) -> tuple[list[str], list[str]]:
    """Again and again, because a supervisor may have started something since it was looked for. What was
    ended, and what would not end."""
    ended: dict[tuple[int, int], str] = {}
    while True:
        alive = processes_of(lab)
        if not alive or time.monotonic() >= deadline:
            return list(ended.values()), [str(p) for p in alive]
        for process in alive:
            if _kill(process):
                ended[process.pid, process.started] = str(process)
        _await_end(alive, min(deadline, time.monotonic() + 1.0))


def _kill(process: Process) -> bool:
    """Through a descriptor, checked after it was opened: the pid may be somebody else's by now."""
    try:
        fd = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        again = _process(process.pid)
        if again is None or again.started != process.started:
            return False
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def _await_end(processes: Iterable[Process], deadline: float) -> None:
    for process in processes:
        while time.monotonic() < deadline:
            again = _process(process.pid)
            if again is None or again.started != process.started or _is_zombie(process.pid):
                break
            time.sleep(0.005)


def _is_zombie(pid: int) -> bool:
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
