"""Units: daemons with a name that outlive the agent and, once started, the supervisor too.

            start                    exit, restart=True
  (none) ---------> RUNNING ----------------------------> WAITING --(backoff, or start)--> RUNNING
                       |  exit, restart=False
                       |----------------------------> ENDED          stop, from any state: (none)

The table belongs to one event loop; every method runs on it. It never decides what should run.
"""

import asyncio
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.ports import Unit, UnitStatus
from nahtlos.physical.supervisor import processes
from nahtlos.physical.supervisor.descriptors import DescriptorStore, Holder
from nahtlos.physical.supervisor.journal import (
    SUPERVISOR_MARK,
    UNIT_MARK,
    HandedFd,
    Journal,
    Lease,
    ProcessRecord,
    UnitRecord,
)
from nahtlos.physical.supervisor.leases import LeaseWatch, boot_clock

FIRST_BACKOFF = 0.02
LONGEST_BACKOFF = 2.0
STABLE_AFTER = 1.0
"""Seconds; a unit that ran this long is started again at once when it ends: others wait for it."""
KILL_DEADLINE = 10.0
log = logging.getLogger(__name__)
_FD = re.compile(r"\{fd:([^}]+)\}")


def substituted(argv: tuple[str, ...], numbers: dict[str, int]) -> list[str]:
    """`argv` with every `{fd:NAME}` replaced; Refused for a name that is not handed over."""

    def number(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in numbers:
            raise Refused(f"'{match.group(0)}' names no descriptor of this unit", field="argv")
        return str(numbers[name])

    return [_FD.sub(number, argument) for argument in argv]


def next_backoff(last: float | None, ran_for: float) -> float:
    """Seconds to wait before the next start; `last` is None before the first."""
    if last is None or ran_for >= STABLE_AFTER:
        return 0.0
    return min(max(last * 2, FIRST_BACKOFF), LONGEST_BACKOFF)


class _Process:
    """A running process, child or adopted, watched by its pidfd."""

    def __init__(self, record: ProcessRecord) -> None:
        self.record = record
        self.pidfd = os.pidfd_open(record.pid)
        self.ended = asyncio.Event()
        self.since = asyncio.get_running_loop().time()

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)


class _Entry:
    def __init__(self, record: UnitRecord) -> None:
        self.record = record
        self.process: _Process | None = None
        self.restart: asyncio.TimerHandle | None = None
        self.backoff: float | None = None
        self.lock = asyncio.Lock()
        self.stopping = False


class UnitTable:
    def __init__(
        self,
        journal: Journal,
        store: DescriptorStore,
        identity: str,
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        """`identity` marks the processes of this supervisor, in their environment."""
        self._journal = journal
        self._store = store
        self._identity = identity
        self._entries: dict[str, _Entry] = {}
        self._lease = LeaseWatch(Lease(), self._lease_ended, clock)

    def statuses(self) -> dict[str, UnitStatus]:
        return {name: _status(name, entry) for name, entry in sorted(self._entries.items())}

    async def start(self, unit: Unit) -> UnitStatus:
        entry = self._entries.setdefault(unit.name, _Entry(UnitRecord(unit=unit, ended=True)))
        async with entry.lock:
            if self._entries.setdefault(unit.name, entry) is not entry:
                return await self.start(unit)  # stopped and started anew while we waited
            if entry.process is not None:
                if entry.record.unit != unit:
                    self._note(entry, unit=unit)  # used when it is started the next time
            elif entry.restart is not None:  # who asks for it does not wait for the backoff
                entry.restart.cancel()
                self._note(entry, unit=unit)
                self._again(entry)
            else:
                entry.record = UnitRecord(unit=unit)
                try:
                    self._spawn(entry)
                except Refused:
                    del self._entries[unit.name]
                    self._save()
                    raise
            return _status(unit.name, entry)

    async def stop(self, name: str, grace: float) -> None:
        entry = self._entries.get(name)
        if entry is None:
            return
        async with entry.lock:
            entry.stopping = True
            if entry.restart is not None:
                entry.restart.cancel()
            if entry.process is not None:
                await _end(entry.process, name, grace)
            if self._entries.get(name) is entry:
                del self._entries[name]
                self._save()

    # --- leases -------------------------------------------------------------------------------------

    def arm(self, deadline: float | None, leased: dict[str, bool]) -> None:
        """See `ports.Supervisor.arm`."""
        for name, needs in leased.items():
            entry = self._entries.get(name)
            if entry is not None and entry.record.unit.leased != needs:
                unit = msgspec.structs.replace(entry.record.unit, leased=needs)
                entry.record = msgspec.structs.replace(entry.record, unit=unit)
        self._lease.arm(deadline)
        self._save()

    def _lease_ended(self) -> None:
        for name, entry in self._entries.items():
            if entry.record.unit.leased and entry.process is not None:
                log.warning("unit %s is killed: its lease has run out", name)
                entry.process.signal(signal.SIGKILL)

    # --- what an earlier supervisor left -----------------------------------------------------------

    def adopt(self) -> None:
        """Take over units that still run. Call before the store recovers, then `resume`."""
        self._lease.lease = self._journal.load_lease()
        for name, record in self._journal.load_units().items():
            entry = self._entries[name] = _Entry(record)
            process = self._living(name, record)
            if process is not None:
                self._watch(entry, process)
        self._save()
        self._lease.look()

    def holders(self) -> Iterator[Holder]:
        for entry in self._entries.values():
            if entry.process is not None:
                yield entry.process.pidfd, entry.process.record.fds

    def resume(self) -> None:
        """Start again what ended while nobody looked and wants to be restarted."""
        for entry in self._entries.values():
            if entry.process is None:
                self._ended(entry, exit_code=None, ran_for=STABLE_AFTER)

    def _living(self, name: str, record: UnitRecord) -> _Process | None:
        process = record.process
        if process is None and not record.ended:
            process = self._spawned_unnoticed(name, record.unit)
        if process is None or processes.start_time(process.pid) != process.start_time:
            return None
        with suppress(ProcessLookupError):
            return _Process(process)
        return None

    def _spawned_unnoticed(self, name: str, unit: Unit) -> ProcessRecord | None:
        pid = processes.find_marked({UNIT_MARK: name, SUPERVISOR_MARK: self._identity})
        started = processes.start_time(pid) if pid is not None else None
        if pid is None or started is None:
            return None
        numbers = _numbers(unit)
        known = self._journal.load_descriptors()
        fds = {
            name: HandedFd(number=number, identity=known[name].identity)
            for name, number in numbers.items()
            if name in known
        }
        return ProcessRecord(pid=pid, start_time=started, fds=fds)

    # --- one unit ----------------------------------------------------------------------------------

    def _spawn(self, entry: _Entry) -> None:
        unit = entry.record.unit
        if unit.leased and not self._lease.held:
            raise Refused(f"{unit.name} runs only while this host has its lease", field="lease")
        numbers = _numbers(unit)
        stored = {name: self._store.required(name) for name in unit.fds}
        argv = substituted(unit.argv, numbers)
        marks = {UNIT_MARK: unit.name, SUPERVISOR_MARK: self._identity}
        self._note(entry, process=None, ended=False)
        try:
            pid = processes.spawn(
                argv,
                {**os.environ, **unit.environment, **marks},
                unit.log,
                tuple(fd for fd, _ in stored.values()),
                nice=unit.nice,
            )
        except OSError as error:
            raise Refused(f"cannot start {argv[0]}: {error.strerror}", field="argv") from error
        handed = {
            name: HandedFd(number=numbers[name], identity=identity) for name, (_, identity) in stored.items()
        }
        record = ProcessRecord(pid=pid, start_time=processes.start_time(pid) or 0, fds=handed)
        self._note(entry, process=record, exit_code=None)
        self._watch(entry, _Process(record))

    def _watch(self, entry: _Entry, process: _Process) -> None:
        entry.process = process
        asyncio.get_running_loop().add_reader(process.pidfd, self._exited, entry, process)

    def _exited(self, entry: _Entry, process: _Process) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(process.pidfd)
        exit_code = processes.reap(process.record.pid)
        os.close(process.pidfd)
        entry.process = None
        process.ended.set()
        log.info("unit %s ended: %s", entry.record.unit.name, exit_code)
        self._ended(entry, exit_code, loop.time() - process.since)

    def _ended(self, entry: _Entry, exit_code: int | None, ran_for: float) -> None:
        self._note(entry, process=None, exit_code=exit_code, ended=True)
        if entry.record.unit.restart and not entry.stopping:
            entry.backoff = next_backoff(entry.backoff, ran_for)
            entry.restart = asyncio.get_running_loop().call_later(entry.backoff, self._again, entry)

    def _again(self, entry: _Entry) -> None:
        entry.restart = None
        if entry.stopping:
            return
        self._note(entry, restarts=entry.record.restarts + 1)
        try:
            self._spawn(entry)
        except Refused as error:
            log.warning("unit %s cannot be started again: %s", entry.record.unit.name, error)
            self._ended(entry, exit_code=None, ran_for=0.0)

    def _note(self, entry: _Entry, **changes: object) -> None:
        entry.record = msgspec.structs.replace(entry.record, **changes)
        self._save()

    def _save(self) -> None:
        units = {name: entry.record for name, entry in self._entries.items()}
        self._journal.save_units(units, self._lease.lease)


def _numbers(unit: Unit) -> dict[str, int]:
    return {name: processes.FIRST_HANDED + i for i, name in enumerate(unit.fds)}


def _status(name: str, entry: _Entry) -> UnitStatus:
    process = entry.process
    return UnitStatus(
        name=name,
        pid=process.record.pid if process else None,
        exit_code=entry.record.exit_code,
        restarts=entry.record.restarts,
    )


async def _end(process: _Process, name: str, grace: float) -> None:
    if grace > 0:
        process.signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await process.ended.wait()
    if process.ended.is_set():
        return
    process.signal(signal.SIGKILL)
    try:
        async with asyncio.timeout(KILL_DEADLINE):
            await process.ended.wait()
    except TimeoutError:
        raise Unavailable(f"unit {name} does not end, not even killed") from None


def lock_path(folder: Path) -> Path:
    return folder / "lock"
