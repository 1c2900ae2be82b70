"""Policy, blueprint and the planner's report.

Policy is what people want; a Blueprint is a complete, immutable decision with a parent; the target is the
one current blueprint. Executing a blueprint leaves no meaningful choice: which host runs which server,
which release each host has, which moves may run now.
"""

from enum import StrEnum

from nahtlos.model.availability import Denial, LeaseTerms, Off
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import (
    BackupId,
    BlueprintId,
    CampaignId,
    HostId,
    OperationId,
    ReleaseId,
    RouterId,
    ServerGroupId,
    ServerId,
    SnapshotId,
    VolumeId,
)
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import Assignment, Component, HostSpec, ServerSpec, Size
from nahtlos.model.placement import ReserveReport, ServerGroup
from nahtlos.model.power import SavedState
from nahtlos.model.prediction import Estimate, Experience, Means
from nahtlos.model.storage import BackupSpec, SnapshotSpec, VolumeSpec
from nahtlos.model.values import Value
from nahtlos.model.volume_work import PlannedVolumeTask, VolumeEnd, VolumeWish


class HostIntent(StrEnum):
    """What an operator wants of a host."""

    ACTIVE = "active"
    CORDONED = "cordoned"
    """Takes no further servers; keeps those it has."""
    DRAINED = "drained"
    """Takes none and gives away those it has."""


class CampaignState(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    """Nothing further is started; what has begun is ended in order; hosts return to service."""
    DONE = "done"


class Strategy(StrEnum):
    """How a campaign carries the servers of a host to the new hypervisor."""

    MOVE = "move"
    """All of them to other hosts: the host is emptied."""
    IN_PLACE = "in-place"
    """None: each is taken over by a new process where it is, one after another."""
    AUTO = "auto"
    """Moved where a move is proven, fits and keeps the server's budget; in place otherwise."""


class Campaign(Value, frozen=True, kw_only=True):
    """Bring `component` of `hosts` to release `to_release`, servers running throughout."""

    id: CampaignId
    to_release: ReleaseId
    hosts: tuple[HostId, ...]
    state: CampaignState
    component: Component = Component.HYPERVISOR
    strategy: Strategy = Strategy.AUTO
    """Of the hypervisor; what else is replaced leaves servers where they are."""
    from_releases: tuple[ReleaseId, ...] = ()
    created_at: float = 0.0
    ended_at: float | None = None
    no_way_back: bool = False
    """Its operator does not ask that servers can return."""
    committed: bool = False
    """It is past its point of no return; its end is that, too."""
    rolled_back: bool = False
    """`to_release` is what its hosts came from: it goes back there."""

    @property
    def returns(self) -> bool:
        """Whether everything has to be able to go back."""
        return not (self.no_way_back or self.committed or self.rolled_back)


class Policy(Value, frozen=True, kw_only=True):
    """Intent, whole: what operators and customers want at one moment."""

    hosts: dict[HostId, HostSpec]
    intents: dict[HostId, HostIntent]
    servers: dict[ServerId, ServerSpec]
    """Servers that shall exist."""
    removed_servers: frozenset[ServerId] = frozenset()
    volumes: dict[VolumeId, VolumeSpec] = {}
    snapshots: dict[SnapshotId, SnapshotSpec] = {}
    backups: dict[BackupId, BackupSpec] = {}
    volume_wishes: tuple[VolumeWish, ...] = ()
    """Oldest first. They are taken out when their end is recorded."""
    volume_ends: dict[OperationId, VolumeEnd] = {}
    """Of the parent's volume tasks, those whose end is recorded: what follows from it is in `volumes`,
    `snapshots` and `backups` already."""
    copy_losses: dict[VolumeId, dict[HostId, int]] = {}
    """How often a copy was lost on a host."""
    given_up: frozenset[HostId] = frozenset()
    """Hosts away for so long that copies they have are made elsewhere."""
    parallel_volume_tasks: int = 4
    parallel_volume_tasks_per_host: int = 2
    rebuild_bytes_per_second: int = 0
    """0: no limit. Also of copies that leave a host which is drained."""
    networks: tuple[NetworkSpec, ...] = ()
    release: ReleaseId | None = None
    """The hypervisor release of hosts no campaign has reached."""
    storage_release: ReleaseId | None = None
    network_release: ReleaseId | None = None
    """What hosts that join are given of these; None: what they come with."""
    campaign: Campaign | None = None
    """The one campaign that is not over (or whose cancellation is not complete)."""
    gateways: dict[RouterId, HostId] = {}
    """Routers with a way out, and the host that is asked for as its place."""
    outside: frozenset[HostId] = frozenset()
    """Hosts that could be such a place: they have an interface to the outside."""
    placements: dict[ServerId, HostId] = {}
    """Hosts that were asked for when a server was created; only looked at until it is placed."""
    server_groups: dict[ServerGroupId, ServerGroup] = {}
    members: dict[ServerId, ServerGroupId] = {}
    """The group of each server that is in one."""
    pins: dict[ServerId, HostId] = {}
    """Servers that are to be on no other host."""
    reserve: int = 0
    """So many hosts may fail at once, and their servers be started on the others."""
    requested_moves: dict[ServerId, HostId | None] = {}
    """Moves an operator asked for, by server; None: the planner chooses the destination. To be taken out
    once `Blueprint.served_requests` names them; until then they are not carried out a second time."""
    requested_replacements: dict[ServerId, ReleaseId] = {}
    """Servers whose VMM an operator wants replaced in place, by one of that release; taken out once it is."""
    release_versions: dict[ReleaseId, str] = {}
    """Of every registered hypervisor release: what the table of version pairs goes by."""
    machine_types: dict[ReleaseId, tuple[str, ...]] = {}
    """What each release can run, where known: a server is not sent to a release without its machine type."""
    promised: Size = Size()
    """What customers were promised in total: it must stay placeable on hosts in service."""
    parallel_moves: int = 1
    """In the whole cloud."""
    parallel_moves_per_host: int = 4
    """From one host; and, counted apart, to one host."""
    move_bytes_per_second: int = 0
    """What a host's link gives to moves, in each direction; 0: not known, and moves are only counted."""
    lost: frozenset[HostId] = frozenset()
    """Hosts that have reported nothing for so long that they may have failed."""
    off: dict[HostId, Off] = {}
    """Hosts for which somebody vouches that they have no power."""
    power: frozenset[HostId] = frozenset()
    """Hosts that the orchestrator can switch off."""
    lease_seconds: float = 20.0
    experience: Experience = Experience()


class HostPhase(StrEnum):
    """Where a host stands. In a campaign: serving -> emptying -> switching -> serving."""

    SERVING = "serving"
    CORDONED = "cordoned"
    EMPTYING = "emptying"
    """Takes no further servers. Those it has go elsewhere, or, by a campaign's strategy, are taken over where
    they are."""
    DRAINED = "drained"
    SWITCHING = "switching"
    """Its release is switched and verified by booting a probe under it. It has no servers, or only such
    as run by the release already."""


class HostPlan(Value, frozen=True, kw_only=True):
    phase: HostPhase
    release: ReleaseId | None
    previous: ReleaseId | None = None
    """While a campaign switches it: the release it is put back to if the switch is given up."""
    storage_release: ReleaseId | None = None
    """None: the storage daemon is left as it is."""
    network_release: ReleaseId | None = None
    """None: the host's own programs."""
    replacing: Component | None = None
    """Replaced right now while servers stay: until the host reports it and is healthy."""
    lease: LeaseTerms | None = None
    """As it is told."""
    lease_kept: LeaseTerms | None = None
    """As it last said that it keeps to: this one or the one above is what it may have."""
    denial: Denial | None = None
    """It is lost, and members of its lease are told to grant it nothing."""
    denial_terms: int = 0
    """The last that was used."""
    fenced: str = ""
    """How it is known that none of what shall be restarted runs there any more; empty: it is not."""

    def release_of(self, component: Component) -> ReleaseId | None:
        match component:
            case Component.HYPERVISOR:
                return self.release
            case Component.STORAGE:
                return self.storage_release
            case Component.NETWORK:
                return self.network_release


class Failure(Value, frozen=True, kw_only=True):
    """The last failed attempt of something that may be tried again."""

    operation: OperationId
    attempts: int
    """Failed ones in a row; 0 once an operator's pause or drain has excused them."""
    error: ErrorRecord | None = None
    host: HostId
    """The destination of a move; the host of a verify."""


class PlannedMove(Value, frozen=True, kw_only=True):
    """One move, decided: the executor starts it and leaves the rest to the two agents.
    `epoch` is the server's epoch after it."""

    id: OperationId
    server: ServerId
    source: HostId
    destination: HostId
    epoch: int
    reason: str
    patience_seconds: float = 0.0
    """Not to be started earlier than this long after the blueprint that first holds it: doubles with every
    failed attempt."""
    release: ReleaseId | None = None
    """In place: `source` and `destination` are one host, a VMM of this release takes the server over."""
    slow_down: bool = False
    """The server is slowed down until the move converges."""
    post_copy: bool = False
    """The server runs at the destination before the last of its memory is there."""

    @property
    def in_place(self) -> bool:
        return self.release is not None


class PlannedVerify(Value, frozen=True, kw_only=True):
    id: OperationId
    host: HostId
    release: ReleaseId


class GatewayPlace(Value, frozen=True, kw_only=True):
    """Where a router's way out is. Every change of place raises the epoch."""

    host: HostId
    epoch: int


class PlannedGatewayMove(Value, frozen=True, kw_only=True):
    """One move of a router's way out, decided. `epoch` is that of its place after it."""

    id: OperationId
    router: RouterId
    source: HostId
    destination: HostId
    epoch: int
    reason: str
    patience_seconds: float = 0.0
    """As of a server's move."""


class Blueprint(Value, frozen=True, kw_only=True):
    id: BlueprintId
    """`bp-<number>`, numbers rising by one along the chain."""
    parent: BlueprintId | None
    hosts: dict[HostId, HostPlan]
    servers: dict[ServerId, Assignment]
    """Owner of each server once no move of it runs. A server that is moving is still its source's here."""
    off: dict[ServerId, int] = {}
    """Servers that do not run and hold no room of their host: the request by which they were stopped. They
    are told to stay so until they are taken out of here, whatever is asked for meanwhile."""
    saved: dict[ServerId, SavedState] = {}
    """Of those that are suspended, and those that are to go on from it."""
    moves: tuple[PlannedMove, ...] = ()
    """Moves that run, or shall start now."""
    verifies: tuple[PlannedVerify, ...] = ()
    gateways: dict[RouterId, GatewayPlace] = {}
    """A way out that is moving is still its source's here."""
    gateway_moves: tuple[PlannedGatewayMove, ...] = ()
    failed_gateway_moves: dict[RouterId, Failure] = {}
    volume_tasks: tuple[PlannedVolumeTask, ...] = ()
    """Operations of volumes that run, or shall start now."""
    failed_volume_tasks: dict[str, Failure] = {}
    """By `PlannedVolumeTask.key`."""
    attempts: dict[ServerId, int] = {}
    """Failed moves of a server in a row; a success clears it, and so does the end of the wish to move it."""
    failed_moves: dict[ServerId, Failure] = {}
    failed_verifies: dict[HostId, Failure] = {}
    passed_over: dict[HostId, dict[ServerId, int]] = {}
    """Servers that were restarted elsewhere, by what epoch, and hosts that have not learned it yet."""
    served_requests: dict[ServerId, HostId | None] = {}
    """Those of `Policy.requested_moves` that have been fulfilled."""
    campaign: CampaignId | None = None
    """The campaign `ended_moves` counts for."""
    upgrading: HostId | None = None
    """The one host that the campaign empties, or switches, or puts back."""
    ended_moves: int = 0
    """Moves that ended well since the campaign began."""
    counter: int = 0
    """Numbers operations, so that their ids are never reused."""
    reason: str = ""
    """What changed against the parent, in words."""


class WaitKind(StrEnum):
    CAPACITY = "capacity"
    MOVE = "move"
    HOST = "host"
    OPERATOR = "operator"
    BLOCKED = "blocked"
    """Will not come right by waiting; a remedy is given."""


class Waiting(Value, frozen=True, kw_only=True):
    """A step not taken, and why. `subject` is a server's or a host's id."""

    subject: str
    kind: WaitKind
    reason: str
    remedy: str = ""


class CapacityReport(Value, frozen=True, kw_only=True):
    promised: Size
    in_service: Size
    """Total of hosts that could take servers now."""
    share: float
    """Share of what was promised that could be placed now, 0.0 to 1.0, by the scarcer of vCPU and memory."""
    reserve: ReserveReport | None = None
    """None: none is asked for."""


class PlanReport(Value, frozen=True, kw_only=True):
    changes: tuple[str, ...]
    waiting: tuple[Waiting, ...]
    capacity: CapacityReport
    converged: bool
    """Nothing to do and nothing waits."""


class ObstacleKind(StrEnum):
    PIN = "pin"
    GROUP = "group"
    VERSION_PAIR = "version-pair"
    """A row of the table of version pairs refuses it."""
    PLUGGED_MEMORY = "plugged-memory"
    """As above, the row for servers with places for memory."""
    MACHINE = "machine"
    """No other host has its machine type, or its CPU model."""
    ROOM = "room"
    BUDGET = "budget"
    WAY_BACK = "way-back"
    """It could not return to what a campaign comes from, which is not final yet."""
    STATE = "state"
    """It does not run, or something else is done with it."""


class Obstacle(Value, frozen=True, kw_only=True):
    """Why a server does not leave its host by a move, known beforehand."""

    server: ServerId
    host: HostId
    kind: ObstacleKind
    reason: str
    remedy: str
    instead: str = ""
    """What a campaign does with it all the same; empty: it is in the way."""


class DrainMove(Value, frozen=True, kw_only=True):
    server: ServerId
    destination: HostId
    seconds: float
    gap_ms: float


class DrainForecast(Value, frozen=True, kw_only=True):
    """A dry run of a drain: what would move where, and what would not."""

    host: HostId
    moves: tuple[DrainMove, ...]
    obstacles: tuple[Obstacle, ...]
    reserve: str = ""
    """Why the drain is refused: it would break the reserve. Empty: it is not."""
    remedy: str = ""


class ForecastMove(Value, frozen=True, kw_only=True):
    server: ServerId
    source: HostId
    destination: HostId
    seconds: float
    gap_ms: float
    """Predicted blackout, as a client sees it."""
    gap_ms_max: float
    brownout_seconds: float = 0.0
    means: Means = Means.PRE_COPY
    row: str = ""
    """Of the table of version pairs, the one that decides; empty while it is not known what it runs under."""
    row_source: str = ""
    """Where that row's verdict comes from."""
    why: str = ""
    """Why this way and not another."""
    alternatives: tuple[Estimate, ...] = ()
    """The other ways, the best first; those that are not to be had say why."""


class ForecastHost(Value, frozen=True, kw_only=True):
    host: HostId
    from_release: ReleaseId | None
    to_release: ReleaseId
    moves: tuple[ForecastMove, ...]
    """Servers that are replaced in place among them."""
    seconds: float
    note: str = ""
    """What this does not bring, in words."""


class Forecast(Value, frozen=True, kw_only=True):
    """A dry run: what a campaign would do, in order, with predictions and blockers."""

    to_release: ReleaseId
    component: Component = Component.HYPERVISOR
    hosts: tuple[ForecastHost, ...]
    total_moves: int
    moves_per_server: float
    seconds: float
    gap_ms_p50: float
    capacity_floor: float
    blockers: tuple[Waiting, ...]
    basis: str
    """Where the predictions come from: measured moves of this cloud, or the table in the documentation."""
    strategy: Strategy = Strategy.AUTO
    obstacles: tuple[Obstacle, ...] = ()
    """Per server, as the cloud stands now. Those with no way around them are in the way of the campaign."""
    reserve: ReserveReport | None = None
    """As it stands at the worst step; None: none is asked for."""
    returns: bool = False
    """Until its point of no return the campaign can be rolled back."""
    ways_back: tuple[str, ...] = ()
    """Rows of the table of version pairs by which servers that have come to the release could return to one
    that is in use now."""
    error_p90: float | None = None
    """Of nine in ten of the measured ones, the predicted blackout was off by no more than this share."""


class OperationRecord(Value, frozen=True, kw_only=True):
    """What the runtime remembers of an operation that ended."""

    id: OperationId
    kind: str
    subject: str
    state: str
    source: HostId | None = None
    destination: HostId | None = None
    reason: str = ""
    error: ErrorRecord | None = None
    times: dict[str, float] = {}
    campaign: CampaignId | None = None
    release_before: ReleaseId | None = None
    release_after: ReleaseId | None = None
    result: dict[str, str] = {}
    """What came of it, as the agent that carried it out tells (`OperationStatus.result`)."""
    predicted: Estimate | None = None
    """As it was begun."""
