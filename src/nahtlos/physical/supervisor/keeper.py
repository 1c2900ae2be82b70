"""A lease is enforced by two processes: by the supervisor, and by a keeper beside it that reads the same
journal and ends what is leased once the deadline there has passed, whatever has become of the supervisor.

    (none) --arm--> keeps --deadline passed: kills what is leased--> nothing to keep for LINGER_SECONDS: ends

Nothing is told to the keeper: the journal is all it knows, so it can be killed and started at any moment. It
starts nothing, and of units that are not leased it knows nothing.
"""

import asyncio
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from nahtlos.model.errors import Unavailable
from nahtlos.physical.supervisor import processes
from nahtlos.physical.supervisor.journal import SUPERVISOR_MARK, UNIT_MARK, Journal, UnitRecord
from nahtlos.physical.supervisor.leases import LOOK_SECONDS, boot_clock

START_SECONDS = 8.0
"""Within which a keeper has to be there. Less than what an agent waits for its supervisor's answer."""
LOCK_SECONDS = 2.0
LINGER_SECONDS = 10.0
"""With nothing to keep: it is started before the first lease is armed."""
log = logging.getLogger(__name__)


# --- the keeper itself ---------------------------------------------------------------------------------


def run_keeper(state_dir: Path) -> None:
    """Returns once there is nothing to keep, or at once if another one keeps it."""
    with _lock_file(state_dir).open("w") as lock:
        if not _locked(lock.fileno(), LOCK_SECONDS):
            return
        journal = Journal(state_dir)
        needed_at = time.monotonic()
        while time.monotonic() < needed_at + LINGER_SECONDS and state_dir.exists():
            if keep(journal, str(state_dir.resolve()), boot_clock):
                needed_at = time.monotonic()
            time.sleep(LOOK_SECONDS)


def keep(journal: Journal, identity: str, clock: Callable[[], float]) -> bool:
    """One look. Whether there is something to keep after it: a lease that has not run out, or a leased unit
    that has not ended yet."""
    deadline = journal.load_lease().deadline
    if deadline is None:
        return False
    if clock() < deadline:
        return True
    running = list(_leased(journal, identity))
    for name, pid, started in running:
        log.warning("unit %s is killed: its lease has run out", name)
        _kill(pid, started)
    return bool(running)


def _leased(journal: Journal, identity: str) -> Iterator[tuple[str, int, int]]:
    """Name, pid and start time of each leased unit that runs."""
    for name, record in journal.load_units().items():
        if record.unit.leased and (found := _process(name, record, identity)):
            yield name, *found


def _process(name: str, record: UnitRecord, identity: str) -> tuple[int, int] | None:
    process = record.process
    if process is not None:
        alive = processes.start_time(process.pid) == process.start_time
        return (process.pid, process.start_time) if alive else None
    if record.ended:
        return None
    pid = processes.find_marked({UNIT_MARK: name, SUPERVISOR_MARK: identity})
    started = processes.start_time(pid) if pid is not None else None
    return (pid, started) if pid is not None and started is not None else None


def _kill(pid: int, started: int) -> None:
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if processes.start_time(pid) == started:  # still the same one: a pid may be used again
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


# --- as its supervisor sees it ---------------------------------------------------------------------------


class KeeperProcess:
    """The keeper of one state folder: started when it is needed, and again when it is gone."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._one_at_a_time = asyncio.Lock()
        self._started: int | None = None

    async def ensure(self) -> None:
        """Returns while a keeper is there; Unavailable if none comes up: then no lease must be held."""
        async with self._one_at_a_time:
            if self._is_kept():
                return
            self._spawn()
            try:
                async with asyncio.timeout(START_SECONDS):
                    while not self._is_kept():
                        await asyncio.sleep(0.02)
            except TimeoutError:
                raise Unavailable(
                    f"nothing but its supervisor would end what is leased: no keeper came up within "
                    f"{START_SECONDS:g} s",
                    remedy=f"see {self._state_dir / 'keeper.log'}",
                ) from None

    def _spawn(self) -> None:
        if self._started is not None:
            processes.reap(self._started)
        entry = [sys.executable, "-m", "nahtlos.entry.supervisor", "--keeper", "--state"]
        log_path = self._state_dir / "keeper.log"
        self._started = processes.spawn([*entry, str(self._state_dir)], dict(os.environ), log_path, ())

    def _is_kept(self) -> bool:
        with _lock_file(self._state_dir).open("w") as lock:
            return not _locked(lock.fileno(), 0.0)


def _lock_file(state_dir: Path) -> Path:
    return state_dir / "keeper.lock"


def _locked(fd: int, within: float) -> bool:
    """Whether this process has the lock now. Who only asks whether it is free holds it for a moment."""
    until = time.monotonic() + within
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        else:
            return True
