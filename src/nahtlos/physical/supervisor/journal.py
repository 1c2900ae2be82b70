"""What a supervisor leaves behind so that its successor can adopt the running units: two JSON files,
each replaced atomically. Nothing is synced to disk: after a crash of the host no unit runs any more.

Intent is journaled before a unit is spawned, its process after; a process spawned in between is found by
the marks in its environment (`find_marked`).
"""

from enum import StrEnum
from pathlib import Path

import msgspec

from nahtlos.physical.ports import Unit
from nahtlos.physical.supervisor.protocol import encoder

UNIT_MARK = "NAHTLOS_UNIT"
SUPERVISOR_MARK = "NAHTLOS_SUPERVISOR"


class HandedFd(msgspec.Struct, frozen=True, kw_only=True):
    """A stored descriptor as a unit has it."""

    number: int
    identity: str


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    start_time: int
    """Clock ticks since boot; with the pid it names a process for ever."""
    fds: dict[str, HandedFd] = {}


class UnitRecord(msgspec.Struct, frozen=True, kw_only=True):
    unit: Unit
    """As it will be started the next time; the running process may be of an earlier definition."""
    process: ProcessRecord | None = None
    exit_code: int | None = None
    restarts: int = 0
    ended: bool = False
    """False with no process: a spawn was intended and its outcome is unknown."""


class FdKind(StrEnum):
    TCP = "tcp"
    UNIX = "unix"
    STORED = "stored"
    """Made by someone else: if no unit holds it, it cannot be made again."""


class FdRecord(msgspec.Struct, frozen=True, kw_only=True):
    kind: FdKind
    identity: str
    address: str = ""
    port: int = 0
    path: str = ""
    mode: int = 0


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Until when leased units may run, in seconds of `CLOCK_BOOTTIME`; None: while the host is up."""

    deadline: float | None = 0.0


NO_LEASE = Lease()


class Units(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    lease: Lease = Lease()
    units: dict[str, UnitRecord] = {}


class Descriptors(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    fds: dict[str, FdRecord] = {}


class Journal:
    """The two files in `folder`. A file of another boot is read as if every process had ended."""

    def __init__(self, folder: Path) -> None:
        self._units = folder / "units.json"
        self._fds = folder / "descriptors.json"
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def load_units(self) -> dict[str, UnitRecord]:
        if not self._units.exists():
            return {}
        found = msgspec.json.decode(self._units.read_bytes(), type=Units, dec_hook=_path)
        if found.boot_id == self._boot_id:
            return found.units
        return {
            name: msgspec.structs.replace(record, process=None, ended=True)
            for name, record in found.units.items()
        }

    def load_lease(self) -> Lease:
        """That of an earlier boot has run out."""
        if not self._units.exists():
            return Lease()
        found = msgspec.json.decode(self._units.read_bytes(), type=Units, dec_hook=_path)
        return found.lease if found.boot_id == self._boot_id else Lease()

    def save_units(self, units: dict[str, UnitRecord], lease: Lease = NO_LEASE) -> None:
        _replace(self._units, encoder.encode(Units(boot_id=self._boot_id, lease=lease, units=units)))

    def load_descriptors(self) -> dict[str, FdRecord]:
        if not self._fds.exists():
            return {}
        found = msgspec.json.decode(self._fds.read_bytes(), type=Descriptors)
        if found.boot_id == self._boot_id:
            return found.fds
        return {name: record for name, record in found.fds.items() if record.kind is not FdKind.STORED}

    def save_descriptors(self, fds: dict[str, FdRecord]) -> None:
        _replace(self._fds, encoder.encode(Descriptors(boot_id=self._boot_id, fds=fds)))


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"cannot decode {kind.__name__}")


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)
