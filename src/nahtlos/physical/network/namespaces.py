"""Network namespaces without a name: made, entered by a thread, held by a descriptor.

A name would be shared by everything on the machine; a descriptor in the supervisor's store belongs to one
host, and the namespace goes when the last descriptor and the last process of it do. Never decides what is
inside one.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nahtlos.model.errors import Unavailable

CLONE_NEWNET = 0x40000000
OWN = Path("/proc/thread-self/ns/net")

T = TypeVar("T")


def create() -> int:
    """A descriptor of a new namespace, which the caller closes."""

    def make() -> int:
        _check(_libc().unshare(CLONE_NEWNET), "make a network namespace")
        return os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)

    return in_thread(make)


def of_process(pid: int) -> int | None:
    """A descriptor of the namespace that process `pid` is in; None if that is the caller's own, or gone."""
    try:
        fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(fd).st_ino == OWN.stat().st_ino:
        os.close(fd)
        return None
    return fd


def enter(fd: int) -> None:
    """Moves the calling thread; nobody else must be meant to use it afterwards (see `in_thread`)."""
    _check(_libc().setns(fd, CLONE_NEWNET), "enter a network namespace")


def within(fd: int, act: Callable[[], T]) -> T:
    """What `act` returns when called in the namespace of `fd`: in a thread of its own, so that the caller
    stays where it is."""

    def run() -> T:
        enter(fd)
        return act()

    return in_thread(run)


def identity(fd: int) -> int:
    """The same number for every descriptor of one namespace."""
    return os.fstat(fd).st_ino


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        reason = os.strerror(ctypes.get_errno())
        raise Unavailable(f"cannot {what}: {reason}", field="network", remedy="run as root")


def in_thread(act: Callable[[], T]) -> T:
    """What `act` returns when called in a thread of its own, which may wander."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="in-namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
