"""What was observed. Always partial and always a little old: each host's part says when it was taken."""

from enum import StrEnum

from nahtlos.model.availability import Standing
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.guest import GuestStatus
from nahtlos.model.ids import (
    HostId,
    LoadBalancerId,
    OperationId,
    ReleaseId,
    RouterId,
    ServerId,
    SnapshotId,
    VolumeId,
)
from nahtlos.model.nouns import CpuShare, HostRole, Size
from nahtlos.model.power import SavedState
from nahtlos.model.storage import StorageBackend
from nahtlos.model.values import Value


class RunState(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    """The guest does not run; the VMM does."""
    INCOMING = "incoming"
    """A VMM that waits for or receives a server; owns nothing yet."""
    STARTING = "starting"
    CRASHED = "crashed"
    """This host owns the server and no VMM runs it."""
    STOPPED = "stopped"
    """As asked for, or because its guest switched itself off."""
    SUSPENDED = "suspended"


class ComputeStatus(Value, frozen=True, kw_only=True):
    """What a running server has of its host now, as measured there, not as asked for."""

    vcpus: int = 0
    memory_mib: int = 0
    """Which the guest has taken; it may be slow to give some back."""
    cpu: CpuShare = CpuShare()
    waits_for: str = ""
    """Why it is not yet as asked for; empty if it is."""
    took_ms: dict[str, int] = {}
    """`vcpus`, `memory`, `cpu`: of the last change of each, from the agent's beginning until it held."""


class ServerStatus(Value, frozen=True, kw_only=True):
    id: ServerId
    epoch: int
    state: RunState
    release: ReleaseId | None
    """Of the VMM that runs it now, not of the host."""
    size: Size
    since: float = 0.0
    """Wall clock, seconds, of the last change of state."""
    compute: ComputeStatus = ComputeStatus()
    power: int = 0
    """The newest request of `Power` that was carried out here."""
    saved: SavedState | None = None
    dirty_rate: int | None = None
    """Bytes of memory a second it touches, as its host measured last; None: not yet, or its host cannot."""
    under_lease: bool = False
    """It runs, and is started, only while its host has its lease."""
    guest: GuestStatus | None = None
    """None: it has no channel to an agent in the guest, or its host does not know yet."""


class OperationState(StrEnum):
    RUNNING = "running"
    DONE = "done"
    UNDONE = "undone"
    """Failed before its point of no return, everything as before. May be tried again as a new operation."""
    STUCK = "stuck"
    """Neither forward nor back without a person; the reason is in `error`."""


class OperationKind(StrEnum):
    MOVE = "move"
    VERIFY = "verify"
    """Boot a probe under the host's configured release before it is given servers."""
    REPLACE = "replace"
    """A server's VMM, by one of another release on the same host."""
    RELOCATE = "relocate"
    """A volume goes to another host or backend while it is written."""
    REBUILD = "rebuild"
    """A copy of a volume is brought up to the others."""
    SNAPSHOT = "snapshot"
    BACKUP = "backup"
    """And what is made from one."""
    GATEWAY = "gateway"
    """A router's way out goes to another edge host."""
    REVERT = "revert"
    """A volume becomes again what a snapshot holds."""
    SNAPSHOT_FILE = "snapshot-file"
    """A snapshot becomes a file of its own."""
    SCRUB = "scrub"
    """The copies of a volume are compared."""
    SNAPSHOT_MOVE = "snapshot-move"
    """Snapshots of a volume go to another host."""
    STOP = "stop"
    REBOOT = "reboot"
    SUSPEND = "suspend"
    RESUME = "resume"


class OperationStatus(Value, frozen=True, kw_only=True):
    id: OperationId
    kind: OperationKind
    state: OperationState
    step: str
    server: ServerId | None = None
    volume: VolumeId | None = None
    router: RouterId | None = None
    epoch: int = 0
    """Of the server or the way out, after the operation."""
    waits_for: str = ""
    """What it waits for right now, in words; empty if it does not wait."""
    error: ErrorRecord | None = None
    progress: float = 0.0
    """0.0 to 1.0"""
    times: dict[str, float] = {}
    """Wall clock, seconds, at which each step began."""
    result: dict[str, str] = {}
    """What came of it. Of a backup: `base` (empty: it is a full one), `stored_bytes`, `why_full`. Of a scrub:
    `copies`, `compared_bytes`, `differences` (how many ranges), `ranges`, `wrong` (hosts whose copy it is).
    Of a snapshot's file: `host`, `file`, `bytes`, `sha256`."""


class VolumeStatus(Value, frozen=True, kw_only=True):
    id: VolumeId
    epoch: int
    served: bool
    """To whoever uses it. What is on its way here is not: only who copies writes into it."""
    size_mib: int
    allocated_bytes: int = 0
    """What it takes of its pool."""
    clients: int = -1
    """So many have it open; -1: its driver cannot tell."""
    problem: str = ""
    """Why it cannot be used, in words; empty if it can."""
    spent_epoch: int = 0
    """Not 0: the host was restarted since it was served by this epoch. Its clients may believe in writes that
    are gone, so it is served by a later one only."""


class SnapshotStatus(Value, frozen=True, kw_only=True):
    id: SnapshotId
    volume: VolumeId
    group: str = ""
    size_mib: int = 0
    allocated_bytes: int = 0
    clones: tuple[VolumeId, ...] = ()
    """Volumes here that rest on it."""
    backend: StorageBackend = StorageBackend.EMBEDDED


class MemberStatus(Value, frozen=True, kw_only=True):
    """A member of a load balancer as its health checks find it."""

    address: str
    port: int
    up: bool
    connections: int = 0


class LoadBalancerStatus(Value, frozen=True, kw_only=True):
    id: LoadBalancerId
    connections: int
    """That are open."""
    members: tuple[MemberStatus, ...] = ()


class PoolStatus(Value, frozen=True, kw_only=True):
    """Where a host keeps volumes, in bytes."""

    total: int
    free: int


class Accelerator(Value, frozen=True, kw_only=True):
    """What a probe that booted a guest found out. `reason` says it to a person."""

    name: str
    reason: str
    release: ReleaseId | None = None
    cpu_models: tuple[str, ...] = ()
    """Named CPU models of which this release can give a guest every feature here. Empty: not known."""


class HostInventory(Value, frozen=True, kw_only=True):
    host: HostId
    role: HostRole
    boot_id: str
    agent_version: str
    taken_at: float
    """Wall clock of the host, seconds."""
    generation: int
    """The configuration this host has converged to (0: none yet)."""
    target_generation: int
    """The newest configuration it has accepted; differs from `generation` while it converges."""
    capacity: Size
    releases: tuple[ReleaseId, ...] = ()
    """Hypervisor releases present here whose files were checked against their manifest."""
    verified_release: ReleaseId | None = None
    """The release under which a probe last booted here."""
    storage_release: ReleaseId | None = None
    """That the storage daemon runs by; None: not known, or nothing is served and none was asked for."""
    network_release: ReleaseId | None = None
    """That every network function here runs by; None: the host's own programs."""
    accelerator: Accelerator | None = None
    servers: tuple[ServerStatus, ...] = ()
    volumes: tuple[VolumeStatus, ...] = ()
    snapshots: tuple[SnapshotStatus, ...] = ()
    pool: PoolStatus | None = None
    load_balancers: tuple[LoadBalancerStatus, ...] = ()
    """Those it carries and that answer."""
    disk_problems: tuple[str, ...] = ()
    """Disks that stopped a server, or copies that were lost, in words with what to do."""
    operations: tuple[OperationStatus, ...] = ()
    """Running ones, and ended ones until the runtime has acknowledged them."""
    drift: tuple[str, ...] = ()
    """What was found different from the configuration and put right, or left alone, in words."""
    problems: tuple[ErrorRecord, ...] = ()
    """What keeps this host from converging."""
    knows: tuple[str, ...] = ()
    """What its agent can be asked for that older ones cannot: `power`, `suspend`, `guest-agent`,
    `post-copy`."""
    why_no_post_copy: str = ""
    """Why its kernel cannot take part in a post-copy; empty if it can, or its agent does not know of any."""
    no_shares: str = ""
    """Why its servers cannot be given a share of its processors other than the default; empty if they can, or
    its agent does not tell."""
    network: dict[str, str] = {}
    """What the network driver uses here and what is missing: subject to words."""
    standing: Standing | None = None
    """None: its agent knows no leases."""


class Inventory(Value, frozen=True, kw_only=True):
    hosts: dict[HostId, HostInventory]
    connected: frozenset[HostId]
    """Hosts whose agent is connected now; for the others the inventory is the last one seen."""
