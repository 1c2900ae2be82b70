"""Network namespaces of this host's routers, gateways and load balancers, by name.

Owns `/run/netns/nr-<host>-<name>`, where each is held by a bind mount: it outlives the agent and its
supervisor, is found again by its name, and is there for `ip netns`. `<host>` is a digest of the host's run
directory, because hosts of a lab share a file system. An agent killed while it makes one leaves nothing.
Decides nothing.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import namespaces

FOLDER = Path("/run/netns")
MS_BIND = 0x1000
MNT_DETACH = 0x2

T = TypeVar("T")


class Namespaces:
    """Those of one host."""

    def __init__(self, run_dir: Path) -> None:
        self._prefix = f"nr-{hashlib.sha256(bytes(run_dir.absolute())).hexdigest()[:10]}-"

    def path(self, name: str) -> Path:
        return FOLDER / f"{self._prefix}{name}"

    def names(self) -> tuple[str, ...]:
        """Whether they live or are only files left over."""
        return tuple(sorted(e.name.removeprefix(self._prefix) for e in FOLDER.glob(f"{self._prefix}*")))

    def exists(self, name: str) -> bool:
        return is_namespace(self.path(name))

    def create(self, name: str) -> None:
        """A new, empty one. Nothing if it is there."""
        path = self.path(name)
        if is_namespace(path):
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        fd = namespaces.create()
        try:
            source = f"/proc/self/fd/{fd}".encode()
            _checked(_libc().mount(source, bytes(path), b"none", MS_BIND, None), f"hold {path}")
        finally:
            os.close(fd)

    def destroy(self, name: str) -> None:
        """It ends with the last process in it. Nothing if it is not there."""
        path = self.path(name)
        while is_namespace(path):
            _checked(_libc().umount2(bytes(path), MNT_DETACH), f"let go of {path}")
        path.unlink(missing_ok=True)

    @contextmanager
    def opened(self, name: str) -> Generator[int]:
        """A descriptor of it. Unavailable if it is gone."""
        path = self.path(name)
        if not is_namespace(path):
            raise Unavailable(f"network namespace {path} is gone", field="network")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def within(self, name: str, act: Callable[[], T]) -> T:
        """What `act` returns when called inside, by a thread of its own. Blocks."""
        with self.opened(name) as fd:
            return namespaces.within(fd, act)


def is_namespace(path: Path) -> bool:
    try:
        return path.stat().st_dev == namespaces.OWN.stat().st_dev
    except OSError:
        return False


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        reason = os.strerror(ctypes.get_errno())
        raise Unavailable(f"cannot {what}: {reason}", field="network", remedy="run as root")
