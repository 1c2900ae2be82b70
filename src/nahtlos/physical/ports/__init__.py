"""The lowest line: what an agent asks of its host, a module for each port; all of it is imported from here.
Real drivers and the simulated world serve the same protocols, and one contract suite (tests/contract) runs
against both.

A VMM is named by (server, epoch): the source of a move runs epoch n, the destination n + 1, so both can
exist on one host. Taps are named by their port. File descriptors never pass through these protocols:
they live in the supervisor's store under a name (as in systemd's FDSTORE), where they outlive the agent.

Every call has a deadline of its own inside; it raises Unavailable when that passes, Refused when asked
for something impossible.
"""

import msgspec

from nahtlos.physical.ports.hypervisor import (
    CONSOLE_KEPT,
    DiskProblem,
    DiskTrouble,
    DisplayLine,
    Hypervisor,
    MigrationPhase,
    MigrationProgress,
    Missing,
    Sink,
    VmmId,
    VmmStatus,
    no_channel,
)
from nahtlos.physical.ports.network import (
    MoveRole,
    Network,
    NetworkCapabilities,
    NetworkDesired,
    NetworkObservation,
)
from nahtlos.physical.ports.storage import (
    BackupResult,
    FileWritten,
    Keyring,
    OnCopied,
    OnMoment,
    RawVolume,
    SnapshotFetch,
    Speed,
    Storage,
    StorageDesired,
)
from nahtlos.physical.ports.supervisor import Supervisor, Unit, UnitStatus

__all__ = [
    "BackupResult",
    "CONSOLE_KEPT",
    "Crash",
    "DiskProblem",
    "DiskTrouble",
    "DisplayLine",
    "Drivers",
    "FileWritten",
    "Hypervisor",
    "Keyring",
    "MigrationPhase",
    "MigrationProgress",
    "Missing",
    "MoveRole",
    "Network",
    "NetworkCapabilities",
    "NetworkDesired",
    "NetworkObservation",
    "OnCopied",
    "OnMoment",
    "RawVolume",
    "Sink",
    "SnapshotFetch",
    "Speed",
    "Storage",
    "StorageDesired",
    "Supervisor",
    "Unit",
    "UnitStatus",
    "VmmId",
    "VmmStatus",
    "no_channel",
]


class Drivers(msgspec.Struct, frozen=True, kw_only=True):
    """The physical layer of one host, as its agent holds it."""

    supervisor: Supervisor
    hypervisor: Hypervisor
    network: Network
    storage: Storage


class Crash(BaseException):
    """Raised by a simulated world to end an agent as kill -9 would: nothing may catch it."""
