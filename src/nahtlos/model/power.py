"""Whether a server is to run: what its owner asked for, as a numbered request, and what was saved of one that
was suspended. Values and one pure decision.

    ON --stop--> OFF --start--> ON --suspend--> SUSPENDED --resume--> ON
    ON --reboot--> ON, booted anew             SUSPENDED --stop, hard--> OFF (what was saved is given up)

Every request raises `serial`, so that each is carried out once, by whoever owns the server then.
"""

from enum import StrEnum

from nahtlos.model.ids import ReleaseId, VolumeId
from nahtlos.model.values import Value

STOP_SECONDS = 60.0


class PowerState(StrEnum):
    ON = "on"
    OFF = "off"
    SUSPENDED = "suspended"
    """Its memory and its devices' state are saved; no process runs it."""


class Power(Value, frozen=True, kw_only=True):
    """A request, and what it asks for. What an agent holds of it is what it has carried out."""

    state: PowerState = PowerState.ON
    serial: int = 0
    boot: int = 0
    """The newest request that asks for a boot: a server that runs since before it is booted anew."""
    hard: bool = False
    """The guest is not asked."""
    again: bool = False
    """Off only until what is to be done to its disks meanwhile is done."""
    seconds: float = STOP_SECONDS
    """For which a guest that was asked is waited for; then its power is cut."""


class SavedDisk(Value, frozen=True, kw_only=True):
    volume: VolumeId
    size_mib: int


class SavedState(Value, frozen=True, kw_only=True):
    """A server's memory and devices' state, complete on a volume of its own."""

    volume: VolumeId
    serial: int
    """Of the request it was saved by: nothing ran since."""
    digest: str
    """SHA-256 of the list of digests of its parts, hexadecimal."""
    bytes: int
    release: ReleaseId
    """Of the VMM that saved it."""
    machine: str
    vcpus: int
    memory_mib: int
    accelerator: str = ""
    disks: tuple[SavedDisk, ...] = ()
    """As they were attached: what the guest remembers of them is only true of these."""
