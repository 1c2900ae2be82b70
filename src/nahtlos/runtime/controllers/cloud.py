"""What the runtime offers to operators: one method for each thing an operator can ask.

The operator API and the command line are thin over this. Every method either answers at once from the
store, or writes intent and returns; nothing here waits for hosts. Errors are those of `model.errors`.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from msgspec import UNSET, UnsetType

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.blueprint import (
    Campaign,
    CapacityReport,
    Forecast,
    HostIntent,
    HostPhase,
    OperationRecord,
    Strategy,
    Waiting,
)
from nahtlos.model.guest import GuestStatus
from nahtlos.model.ids import (
    CampaignId,
    HostId,
    ImageId,
    OperationId,
    PortId,
    ProjectId,
    ReleaseId,
    ServerGroupId,
    ServerId,
    SnapshotId,
    VolumeId,
)
from nahtlos.model.inventory import Accelerator, ComputeStatus, HostInventory, OperationStatus, RunState
from nahtlos.model.networking import DEFAULT_PROJECT, PortBandwidth, Rate
from nahtlos.model.nouns import DATA_PLACES, Component, CpuShare, HostRole, Release, Size
from nahtlos.model.power import Power
from nahtlos.model.storage import DiskLimits, VolumeFormat
from nahtlos.model.values import Value
from nahtlos.runtime.controllers.availability import AvailabilityApi
from nahtlos.runtime.controllers.consoles import Consoles
from nahtlos.runtime.controllers.networks import Networks, PortRequest
from nahtlos.runtime.controllers.placement import Placement
from nahtlos.runtime.controllers.powers import StopRequest
from nahtlos.runtime.controllers.projects import Projects
from nahtlos.runtime.controllers.server_snapshots import (
    ServerRevertRequest,
    ServerSnapshotRequest,
    ServerSnapshotView,
)
from nahtlos.runtime.controllers.volumes import Volumes


class KeptVolumes(Value, frozen=True, kw_only=True):
    """What a host keeps of volumes; and where it gives them away, how far that has come."""

    volumes: tuple[VolumeId, ...] = ()
    snapshots: tuple[SnapshotId, ...] = ()
    bytes: int = 0
    leaving: tuple[OperationId, ...] = ()
    """Operations that bring copies and snapshots elsewhere now."""
    bytes_left: int = 0
    bytes_per_second: float = 0.0
    """As measured; 0: not known."""
    seconds_left: float | None = None


class HostChange(Value, frozen=True, kw_only=True):
    """What is left out stays as it is."""

    domain: str | UnsetType = UNSET
    """What it fails together with; empty: nothing."""


class HostView(Value, frozen=True, kw_only=True):
    id: HostId
    role: HostRole
    address: str
    intent: HostIntent
    phase: HostPhase
    connected: bool
    release: ReleaseId | None
    """Decided for it."""
    verified_release: ReleaseId | None
    """A probe last booted under this one."""
    accelerator: Accelerator | None
    capacity: Size
    used: Size
    servers: tuple[ServerId, ...]
    generation: int
    target_generation: int
    seen_at: float | None
    domain: str = ""
    """What it fails together with (`HostSpec.domain`)."""
    kept: KeptVolumes = KeptVolumes()
    failure: str = ""
    """`lost`, `denied`, `fenced: why`, `back`: see `availability`."""
    inventory: HostInventory | None = None
    """Only in the view of a single host."""


class ServerView(Value, frozen=True, kw_only=True):
    id: ServerId
    host: HostId | None
    epoch: int
    state: RunState | None
    """As observed; None if it has not been seen yet."""
    release: ReleaseId | None
    """Of the VMM that runs it."""
    size: Size
    ip: str
    mac: str
    """These two are of its first port."""
    volume_host: HostId
    moving_to: HostId | None
    waits_for: str
    """Why it is not where it should be; empty if it is."""
    created_at: float
    project: ProjectId = DEFAULT_PROJECT
    ports: tuple[PortId, ...] = ()
    blackout_budget_ms: int = 0
    allow_slowdown: bool = False
    allow_post_copy: bool = False
    dirty_rate: int | None = None
    """Bytes of memory a second it touches, as measured last."""
    display: bool = False
    """It has a graphics card (`Consoles.display`)."""
    on_host_failure: OnHostFailure = OnHostFailure.EVACUATE_ONLY
    restart_priority: int = 0
    replaced_by: ReleaseId | None = None
    """The release whose VMM takes it over in place, or is to."""
    cpu: CpuShare = CpuShare()
    data_places: int = DATA_PLACES
    max_vcpus: int = 0
    boot_memory_mib: int = 0
    max_memory_mib: int = 0
    """These five, and `size`, are what was asked for; see `ServerSpec`."""
    compute: ComputeStatus = ComputeStatus()
    """What it has of its host, as measured there; without vCPUs: its host has not said."""
    guest_agent: bool = False
    """Its machine has a channel to an agent in the guest."""
    guest: GuestStatus | None = None
    """What that agent last said; None: nothing yet."""
    bandwidth: dict[PortId, PortBandwidth] = {}
    limits: dict[VolumeId, DiskLimits] = {}
    converged: bool = True
    """Its host has come to the configuration in which everything asked of the server is."""
    power: Power = Power()
    """Whether it is to run."""
    power_pending: bool = False
    """That was asked for, and is not carried out yet."""
    group: ServerGroupId | None = None
    pin: HostId | None = None
    """The one host it is to be on."""


class CampaignView(Value, frozen=True, kw_only=True):
    campaign: Campaign
    hosts_total: int
    hosts_upgraded: int
    moves_done: int
    moves_failed: int
    moves_total_forecast: int
    running: tuple[OperationStatus, ...]
    waiting: tuple[Waiting, ...]
    capacity: CapacityReport
    capacity_floor: float
    """Least share of what was promised that could have been placed, since the campaign began."""
    operations: tuple[OperationRecord, ...]
    """All that ended in it, oldest first."""


class CloudEvent(Value, frozen=True, kw_only=True):
    number: int
    """Rising; ask for the events after one."""
    at: float
    kind: str
    subject: str
    text: str
    data: dict[str, str | int | float] = {}


class Status(Value, frozen=True, kw_only=True):
    version: str
    orchestrator_epoch: int
    leader: bool
    blueprint: str
    converged: bool
    waiting: tuple[Waiting, ...]
    capacity: CapacityReport
    time: float


class ServerRequest(Value, frozen=True, kw_only=True):
    name: str
    vcpus: int = 1
    memory_mib: int = 256
    image: ImageId | None = None
    """None: the only one there is."""
    volume_mib: int = 160
    host: HostId | None = None
    """Asks for a host; refused with by how much it lacks and where it would fit."""
    project: ProjectId = DEFAULT_PROJECT
    volumes: tuple[VolumeId, ...] = ()
    """Attached from the start, in this order."""
    copies: int = 1
    """Of its system disk."""
    volume_format: VolumeFormat = VolumeFormat.RAW
    user_data: str = ""
    """For the guest: a cloud-init document or script."""
    networks: tuple[PortRequest, ...] = ()
    """One port each. None: one in the project's only network, or the only one with an uplink."""
    data_places: int = DATA_PLACES
    """How many data volumes it can have; decided once."""
    max_vcpus: int = 0
    """How far its vCPUs may be raised while it runs. 0: they may not be changed."""
    max_memory_mib: int = 0
    """How far its memory may be raised while it runs. 0: it may not be changed."""
    cpu: CpuShare = CpuShare()
    limits: DiskLimits = DiskLimits()
    """Of its system disk."""
    blackout_budget_ms: int | None = None
    """The longest gap its clients may see when it is carried elsewhere. None: none is set."""
    allow_slowdown: bool = False
    display: bool = False
    """It has a graphics card, whose picture `Consoles.display` shows."""
    on_host_failure: OnHostFailure = OnHostFailure.EVACUATE_ONLY
    restart_priority: int = 0
    """-100 to 100; of several that are restarted, the highest first."""
    allow_post_copy: bool = False
    """See `ServerSpec`: where the host lets it run before all of its memory is there."""
    group: ServerGroupId | None = None
    """The server group it is in, for as long as it exists."""
    pin: HostId | None = None
    """Starts it on this host, and keeps it there."""


class ServerChange(Value, frozen=True, kw_only=True):
    """What a server is given while it runs. What is left out (UNSET) stays as it is."""

    vcpus: int | UnsetType = UNSET
    memory_mib: int | UnsetType = UNSET
    cpu_quota: int | UnsetType = UNSET
    """See `CpuShare`."""
    cpu_weight: int | UnsetType = UNSET
    net_in: Rate | UnsetType | None = UNSET
    """What each of its ports may receive; None: not limited."""
    net_out: Rate | UnsetType | None = UNSET
    iops: int | UnsetType = UNSET
    """Of each of its disks; 0: no limit."""
    bytes_per_second: int | UnsetType = UNSET
    """As above."""
    blackout_budget_ms: int | UnsetType | None = UNSET
    """None: none is set."""
    allow_slowdown: bool | UnsetType = UNSET
    allow_post_copy: bool | UnsetType = UNSET
    on_host_failure: OnHostFailure | UnsetType = UNSET
    restart_priority: int | UnsetType = UNSET
    pin: HostId | UnsetType | None = UNSET
    """The host it is to stay on, which is the one it is on; None: it may be moved."""


class JoinRequest(Value, frozen=True, kw_only=True):
    token: str
    host: HostId
    role: HostRole
    address: str
    peer_port: int
    csr_pem: str
    domain: str = ""
    """Empty: none, or as it was when it joined before."""


class JoinAnswer(Value, frozen=True, kw_only=True):
    certificate_pem: str
    ca_pem: str


class Powers(Protocol):
    """Whether servers run. Asking again for what is asked for already changes nothing."""

    async def stop(self, server: ServerId, request: StopRequest) -> ServerView: ...
    async def start(self, server: ServerId) -> ServerView: ...
    async def reboot(self, server: ServerId, request: StopRequest) -> ServerView: ...
    async def suspend(self, server: ServerId) -> ServerView:
        """Its memory is saved on a volume of its own, made for that and deleted once it runs again."""
        ...

    async def resume(self, server: ServerId) -> ServerView: ...


class ServerSnapshots(Protocol):
    async def server_snapshots(self) -> tuple[ServerSnapshotView, ...]: ...
    async def server_snapshot(self, snapshot: SnapshotId) -> ServerSnapshotView: ...
    async def create(self, request: ServerSnapshotRequest) -> tuple[SnapshotId, ...]:
        """The names of its disks' snapshots; it is there once they are."""
        ...

    async def delete(self, snapshot: SnapshotId) -> None:
        """With its disks' snapshots and its memory, or nothing of it."""
        ...

    async def revert(self, server: ServerId, request: ServerRevertRequest) -> ServerView:
        """What it is now is lost: it stops at once, its disks become what they were, and it goes on from its
        memory."""
        ...


class Cloud(Protocol):
    @property
    def availability(self) -> AvailabilityApi: ...
    @property
    def networks(self) -> Networks: ...

    @property
    def volumes(self) -> Volumes: ...

    @property
    def projects(self) -> Projects: ...

    @property
    def power(self) -> Powers: ...
    @property
    def server_snapshots(self) -> ServerSnapshots: ...

    @property
    def consoles(self) -> Consoles: ...

    @property
    def placement(self) -> Placement: ...

    async def status(self) -> Status: ...

    async def hosts(self) -> tuple[HostView, ...]: ...
    async def host(self, host: HostId) -> HostView: ...
    async def set_host_intent(self, host: HostId, intent: HostIntent) -> HostView: ...
    async def change_host(self, host: HostId, change: HostChange) -> HostView: ...
    async def create_join_token(self, host: HostId, role: HostRole, ttl_seconds: int) -> str:
        """A token that lets one host of this name join once."""
        ...

    async def join(self, request: JoinRequest) -> JoinAnswer: ...

    async def releases(self) -> tuple[Release, ...]: ...
    async def release(self, release: ReleaseId) -> Release: ...
    async def register_release(self, release: ReleaseId) -> Release:
        """Take up a built bundle from the releases folder; Refused if its files differ from its manifest."""
        ...

    async def images(self) -> tuple[ImageId, ...]: ...

    async def servers(self) -> tuple[ServerView, ...]: ...
    async def server(self, server: ServerId) -> ServerView: ...
    async def create_server(self, request: ServerRequest) -> ServerView: ...
    async def change_server(self, server: ServerId, change: ServerChange) -> ServerView:
        """All of it, or nothing. Conflict if its host cannot give it, with what it could."""
        ...

    async def move_server(self, server: ServerId, to: HostId | None) -> ServerView: ...
    async def replace_vmm(self, server: ServerId, by: ReleaseId | None) -> ServerView:
        """In place, by a VMM of `by` (None: of its host's release). Refused where the table of version pairs
        knows no way."""
        ...

    async def delete_server(self, server: ServerId) -> ServerView: ...
    async def console_read(self, server: ServerId, offset: int) -> tuple[bytes, int]: ...
    async def console_write(self, server: ServerId, data: bytes) -> None: ...

    async def plan_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> Forecast: ...
    async def start_upgrade(
        self,
        to: ReleaseId,
        hosts: tuple[HostId, ...] | None,
        component: Component = Component.HYPERVISOR,
        strategy: Strategy = Strategy.AUTO,
        no_way_back: bool = False,
    ) -> CampaignView: ...
    async def campaigns(self) -> tuple[Campaign, ...]: ...
    async def campaign(self, campaign: CampaignId | None) -> CampaignView:
        """None: the newest."""
        ...

    async def pause_upgrade(self) -> CampaignView: ...
    async def resume_upgrade(self) -> CampaignView: ...
    async def cancel_upgrade(self) -> CampaignView: ...
    async def commit_upgrade(self) -> CampaignView:
        """Nothing has to be able to return any more; Conflict without a campaign."""
        ...

    async def rollback_upgrade(self) -> CampaignView:
        """Its hosts go back to the release they came from; Conflict past the point of no return."""
        ...

    async def set_promised(self, promised: Size) -> None:
        """What customers were promised in total; Refused if the hosts could not hold it."""
        ...

    async def events(self, after: int, limit: int) -> tuple[CloudEvent, ...]: ...
    def follow(self, after: int) -> AsyncIterator[CloudEvent]:
        """Events after `after`, then every new one as it happens."""
        ...
