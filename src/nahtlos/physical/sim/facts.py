"""What there is in the simulated world and what was seen of it: hosts, servers, steps, violations."""

import asyncio
from dataclasses import dataclass, field

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, ReleaseId, SnapshotId, VolumeId
from nahtlos.model.nouns import HostRole, Size
from nahtlos.physical.ports import Unit, UnitStatus, VmmId
from nahtlos.physical.sim.faults import Call
from nahtlos.physical.sim.guests import Vmm
from nahtlos.physical.sim.taps import Switchboard
from nahtlos.physical.sim.volumes import Snapshot, Volume


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    kind: str
    subject: str
    text: str


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the trace."""

    at: float
    host: str
    what: str
    """A verb with its driver (`hypervisor.pause`), or what happened by itself."""
    subject: str
    moment: str = ""
    call: Call | None = None

    def __str__(self) -> str:
        return f"{self.at:12.6f}  {self.host:<10} {self.what:<28} {self.subject} {self.moment}"


@dataclass(eq=False)
class ServerFacts:
    """What the world has seen of one server."""

    boots: int = 0
    excuses: list[str] = field(default_factory=list[str])
    """What outside our hands has ended it: a killed VMM, a host without power."""
    gone: bool = False
    """Ended from outside and not booted since."""
    deleted: bool = False
    may_stop: bool = False
    """Its owner has asked that it be stopped or booted anew."""
    up: bool = False
    """Its guest has booted and answers."""
    stopped_at: float | None = None
    """Since when no copy runs."""
    longest_blackout: float = 0.0
    epoch: int = 0
    """The highest by which it has run."""


@dataclass
class SimGateway:
    """A router's way out, or what was made to become one."""

    answers: bool = False
    """To the outside."""
    passes: bool = False
    """It has left, and leads out what others still send here."""
    prepared: bool = False
    connections: set[int] = field(default_factory=set[int])


@dataclass(eq=False)
class SimHost:
    id: HostId
    role: HostRole
    address: str
    capacity: Size
    board: Switchboard
    releases: list[ReleaseId]
    broken_releases: dict[ReleaseId, str] = field(default_factory=dict[ReleaseId, str])
    no_userfault: str = ""
    """Why its kernel can do no post-copy."""
    cpu_models: tuple[str, ...] = ("qemu64",)
    """Of which it can give guests every feature."""
    """Present, but a probe under them does not boot; with the reason."""
    vmms: dict[VmmId, Vmm] = field(default_factory=dict[VmmId, Vmm])
    consoles: dict[VmmId, bytearray] = field(default_factory=dict[VmmId, bytearray])
    """What each VMM's guest has said, also of those that have ended."""
    no_shares: str = ""
    """Why its processors cannot be shared by anything but the default."""
    volumes: dict[VolumeId, Volume] = field(default_factory=dict[VolumeId, Volume])
    disks_told: asyncio.Event = field(default_factory=asyncio.Event)
    """Disks have stopped a guest here."""
    snapshots: dict[SnapshotId, Snapshot] = field(default_factory=dict[SnapshotId, Snapshot])
    offered: set[SnapshotId] = field(default_factory=set[SnapshotId])
    """Which other hosts can read. In the storage daemon's memory."""
    storage_up: bool = True
    storage_restarts: int = 0
    storage_release: ReleaseId | None = None
    network_release: ReleaseId | None = None
    gateways: dict[int, "SimGateway"] = field(default_factory=dict[int, "SimGateway"])
    """By number of their router."""
    leads_to: dict[int, str] = field(default_factory=dict[int, str])
    """Likewise: the tunnel end that what is for outside is sent to."""
    fds: dict[str, int] = field(default_factory=dict[str, int])
    """Stored descriptors: real ones, except taps, which are -1."""
    listening: dict[str, int] = field(default_factory=dict[str, int])
    """Stored listening sockets: the port of each."""
    units: dict[str, tuple[Unit, UnitStatus]] = field(default_factory=dict[str, tuple[Unit, UnitStatus]])
    boots: int = 1
    powered: bool = True
    clock_rate: float = 1.0
    """Of its clock, which is 0 at the beginning of time."""
    lease: float | None = 0.0
    """The supervisor's: until when, by that clock, leased VMMs run; None: for ever."""
    supervisor_up: bool = True
    keeper_up: bool = True
    """Ends what is leased, too, if its supervisor does not."""

    @property
    def boot_id(self) -> str:
        return f"{self.id}-boot-{self.boots}"

    def check_release(self, release: ReleaseId) -> None:
        """Refused if nothing can be run by it here."""
        if release not in self.releases or release in self.broken_releases:
            why = self.broken_releases.get(release, "it is not on this host")
            raise Refused(f"{release} cannot be used: {why}", field="release")
