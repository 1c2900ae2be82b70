"""Processes as the kernel shows them: spawning one with chosen descriptors, recognising it later, and
reaching into it for a descriptor. Knows nothing of units.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

FIRST_HANDED = 3
"""Handed descriptors are 3, 4, 5, … in the order of `Unit.fds`."""
_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def start_time(pid: int) -> int | None:
    """Clock ticks since boot; None if there is no such process or it has ended (a zombie included)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def spawn(
    argv: list[str], environment: dict[str, str], log: Path, fds: tuple[int, ...], *, nice: int = 0
) -> int:
    """Start `argv` in a session of its own, standard output and error appended to `log`, each of `fds`
    at FIRST_HANDED and up. Raises OSError if it cannot be started.

    posix_spawn, because it neither copies a big process nor runs Python between fork and exec. Never
    PR_SET_PDEATHSIG: it fires when the thread that spawned ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # The sources are above every target (see `descriptors.FLOOR`), so no dup2 overwrites a later source.
    actions += [(os.POSIX_SPAWN_DUP2, fd, FIRST_HANDED + i) for i, fd in enumerate(fds)]
    pid = os.posix_spawnp(
        argv[0],
        argv,
        environment,
        file_actions=actions,  # pyright: ignore[reportArgumentType]  # typeshed wants fixed tuples
        setsid=True,
        setsigmask=[],
        # Python ignores SIGPIPE and SIGXFSZ, and that would be inherited.
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM],
    )
    with suppress(ProcessLookupError, PermissionError):  # it has ended; or we may only make it nicer
        os.setpriority(os.PRIO_PROCESS, pid, nice)
    return pid


def reap(pid: int) -> int | None:
    """The exit code of an ended child (negative: the signal); None for a process that is not ours."""
    try:
        waited, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if waited == pid else None


def take_descriptor(pidfd: int, number: int) -> int:
    """A duplicate (close-on-exec) of descriptor `number` of another process. Raises OSError."""
    fd: int = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def identity(fd: int) -> str:
    """Names the open file behind a descriptor: a socket's inode, a tap's interface."""
    target = str(Path(f"/proc/self/fd/{fd}").readlink())
    details = Path(f"/proc/self/fdinfo/{fd}").read_text()
    interface = [line.split()[1] for line in details.splitlines() if line.startswith("iff:")]
    return " ".join([target, *interface])


def find_marked(marks: dict[str, str]) -> int | None:
    """A living session leader whose environment has all of `marks`."""
    for pid in _all_pids():
        with suppress(OSError):
            if os.getsid(pid) == pid and _has_marks(pid, marks) and start_time(pid) is not None:
                return pid
    return None


def _all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _has_marks(pid: int, marks: dict[str, str]) -> bool:
    environment = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return all(f"{name}={value}".encode() in environment for name, value in marks.items())
