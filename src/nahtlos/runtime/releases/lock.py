"""One builder at a time: a lock on a file, which the kernel drops when its holder ends, however it ends."""

import contextlib
import fcntl
import time
from collections.abc import Generator
from pathlib import Path

from nahtlos.model.errors import Unavailable

WAIT = 900.0
"""Seconds: as long as the slowest build on a slow network is given."""


@contextlib.contextmanager
def exclusive(path: Path, *, timeout: float = WAIT) -> Generator[None]:
    """Hold the lock at `path`. Unavailable if somebody else holds it for `timeout` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(f"another build holds {path}", remedy="wait for it to end") from error
                time.sleep(0.1)
        yield
