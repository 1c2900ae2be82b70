"""Files that are overwritten before they go, by one thread of the lowest priority.

A file is overwritten from its end and becomes shorter as that goes on: how far it has come is its size, so
whoever is started next goes on from there. Holes hold nothing and are skipped.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from nahtlos.physical.storage.record import sync_folder

SLICE = 16 << 20
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
_IOPRIO_SET, _IOPRIO_WHO_THREAD, _IOPRIO_IDLE = 251, 1, 3 << 13
_libc = ctypes.CDLL(None, use_errno=True)


class Overwriting:
    """`waiting` says which files; asked again when those are done."""

    def __init__(self, waiting: Callable[[], Iterable[Path]]) -> None:
        self._waiting = waiting
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()

    def begin(self) -> None:
        """Returns at once. Nothing if there is no file or it is under way."""
        if (self._thread is None or not self._thread.is_alive()) and any(True for _ in self._waiting()):
            self._ends.clear()
            self._thread = threading.Thread(target=self._run, name="overwriting", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """After the slice that is being written; what is left stays as it is."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join(timeout=30)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        _libc.syscall(_IOPRIO_SET, _IOPRIO_WHO_THREAD, 0, _IOPRIO_IDLE)
        while not self._ends.is_set():
            path = next(iter(self._waiting()), None)
            if path is None:
                return
            self._overwrite(path)

    def _overwrite(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            while (size := os.fstat(descriptor).st_size) > 0 and not self._ends.is_set():
                begin = (size - 1) // SLICE * SLICE
                overwrite_slice(descriptor, begin, size)
                os.ftruncate(descriptor, begin)
        finally:
            os.close(descriptor)
        if size == 0:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def overwrite_slice(descriptor: int, begin: int, end: int) -> None:
    """What is stored there, with zeros; on disk on return."""
    while begin < end:
        try:
            begin = os.lseek(descriptor, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # only a hole is left
            raise
        until = min(os.lseek(descriptor, begin, os.SEEK_HOLE), end)
        while begin < until:
            begin += os.pwrite(descriptor, _ZEROS[: min(_CHUNK, until - begin)], begin)
    os.fdatasync(descriptor)
