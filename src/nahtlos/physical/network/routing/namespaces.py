"""Network namespaces of this host's routers, gateways and load balancers.

Owns making, entering and ending them, and the folder `netns` of the host's run directory, in which each is
held by a bind mount: it outlives the agent, is found again by its name, and is unique to the host although
hosts of a lab share a file system. A namespace is made by a thread of its own that leaves it behind: no
process is started, and an agent killed in between leaves nothing. Decides nothing.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nahtlos.model.errors import Unavailable

FOLDER = "netns"
"""Below the run directory."""
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MNT_DETACH = 0x2
OWN = "/proc/thread-self/ns/net"

T = TypeVar("T")


class Namespaces:
    """Those of one host, by name."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER

    def path(self, name: str) -> Path:
        return self._folder / name

    def names(self) -> tuple[str, ...]:
        """Whether they live or are only files left over."""
        try:
            return tuple(sorted(entry.name for entry in self._folder.iterdir()))
        except FileNotFoundError:
            return ()

    def exists(self, name: str) -> bool:
        return is_namespace(self.path(name))

    def create(self, name: str) -> None:
        """A new, empty one. Nothing if it is there."""
        path = self.path(name)
        if is_namespace(path):
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)

        def leave_behind() -> None:
            _checked(_libc().unshare(CLONE_NEWNET), "unshare")
            _checked(_libc().mount(OWN.encode(), bytes(path), b"none", MS_BIND, None), f"hold {path}")

        in_thread(leave_behind, f"make {name}")

    def destroy(self, name: str) -> None:
        """It ends with the last process in it. Nothing if it is not there."""
        path = self.path(name)
        while is_namespace(path):
            _checked(_libc().umount2(bytes(path), MNT_DETACH), f"let go of {path}")
        path.unlink(missing_ok=True)

    def within(self, name: str, act: Callable[[], T]) -> T:
        """What `act` returns when called inside, by a thread of its own: the caller stays where it is.
        Blocks."""
        path = self.path(name)

        def inside() -> T:
            enter(path)
            return act()

        return in_thread(inside, f"in {name}")


def enter(path: Path) -> None:
    """Moves the calling thread, and what it starts from now on."""
    if not is_namespace(path):
        raise Unavailable(f"network namespace {path} is gone", field="network")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc().setns(fd, CLONE_NEWNET), f"enter {path}")
    finally:
        os.close(fd)


def is_namespace(path: Path) -> bool:
    try:
        return path.stat().st_dev == Path(OWN).stat().st_dev
    except OSError:
        return False


def in_thread(act: Callable[[], T], name: str) -> T:
    """By a thread that ends with it, because it may be in another namespace afterwards."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise Unavailable(f"{what}: {os.strerror(code)}", field="network", remedy="run as root")
