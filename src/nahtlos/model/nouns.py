"""What the cloud consists of, as frozen values: servers, releases, hosts. Networks and volumes are beside it.

Values only. Sizes are in MiB unless the name says otherwise; addresses are strings as people write them.
"""

from enum import StrEnum

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.ids import HostId, ProjectId, ReleaseId, ServerId, VolumeId
from nahtlos.model.networking import DEFAULT_PROJECT, PortSpec
from nahtlos.model.power import Power
from nahtlos.model.server_snapshots import GoingBack
from nahtlos.model.values import Value

USER_DATA_BYTES = 16 << 10


class Size(Value, frozen=True, kw_only=True):
    """What a server takes of a host, or what a host has: whole vCPUs and MiB of memory."""

    vcpus: int = 0
    memory_mib: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(vcpus=self.vcpus + other.vcpus, memory_mib=self.memory_mib + other.memory_mib)

    def __sub__(self, other: "Size") -> "Size":
        return Size(vcpus=self.vcpus - other.vcpus, memory_mib=self.memory_mib - other.memory_mib)

    def fits(self, room: "Size") -> bool:
        return self.vcpus <= room.vcpus and self.memory_mib <= room.memory_mib


class CpuShare(Value, frozen=True, kw_only=True):
    """What a server gets of its host's processors. Changed while it runs."""

    quota: int = 0
    """Per cent of one processor's time, all its vCPUs together: 100 is one whole processor. 0: no limit."""
    weight: int = 100
    """1 to 10000, beside other servers' where processors are short."""


DATA_PLACES = 2
"""Places for data volumes of a server that was asked for without more. Each costs every move a little."""
MOST_DATA_PLACES = 8
"""As many as one slot of the machine has functions."""


class ServerSpec(Value, frozen=True, kw_only=True):
    """A server as its owner asked for it, plus what must never change under it while it lives
    (machine type and CPU model are the guest's hardware)."""

    id: ServerId
    project: ProjectId = DEFAULT_PROJECT
    size: Size
    volume: VolumeId
    """Its system disk."""
    ports: tuple[PortSpec, ...]
    machine: str
    """Versioned machine type, e.g. `pc-q35-10.0`; never an alias."""
    cpu_model: str = "qemu64"
    """Named CPU model; never `host` or `max`."""
    data_volumes: tuple[VolumeId, ...] = ()
    """Further disks; each keeps its place (its index) for as long as it is attached. An empty one is a place
    that a disk has left."""

    cpu: CpuShare = CpuShare()
    data_places: int = DATA_PLACES
    """Of its hardware: how many data volumes it can have."""
    max_vcpus: int = 0
    """Of its hardware: how far `size.vcpus` may be raised while it runs. 0: a server with none to plug."""
    boot_memory_mib: int = 0
    """Of its hardware: memory that is there from the start; what `size.memory_mib` has beyond it is plugged.
    0: all of it is there, and none can be plugged."""
    max_memory_mib: int = 0
    """Of its hardware: how far `size.memory_mib` may be raised while it runs; 0 as above."""
    blackout_budget_ms: int = 0
    """The longest gap its clients may see when it is carried elsewhere; what is predicted to take longer is
    not begun. 0: none was set."""
    allow_slowdown: bool = False
    """Its vCPUs may be slowed down so that a move comes to its end."""
    allow_post_copy: bool = False
    """It may run at its new host before all of its memory is there, if a move does not end otherwise: it is
    lost if the old host, or the way to it, does not come back before the rest has followed."""
    on_host_failure: OnHostFailure = OnHostFailure.EVACUATE_ONLY
    restart_priority: int = 0
    """Of several that are to be restarted, those of higher priority first."""

    power: Power = Power()
    """Whether it is to run."""
    memory_volume: VolumeId | None = None
    """Where its memory is saved while it is suspended; kept from when that is asked for until it runs. Of a
    server that goes back to a snapshot: where that keeps it."""
    going_back: GoingBack | None = None

    display: bool = False
    """Of its hardware: a graphics card, whose picture can be looked at."""

    guest_agent: bool = False
    """Of its hardware: a channel to an agent in the guest, if there is one."""
    user_data: str = ""
    """What its owner tells the guest (cloud-init's user-data); at most `USER_DATA_BYTES`."""

    @property
    def all_volumes(self) -> tuple[VolumeId, ...]:
        """Without empty places."""
        return (self.volume, *(volume for volume in self.data_volumes if volume))


class HostRole(StrEnum):
    COMPUTE = "compute"
    EDGE = "edge"
    """Holds an uplink; runs no servers."""


class HostSpec(Value, frozen=True, kw_only=True):
    """A host that has joined, and where its agent and its tunnels listen."""

    id: HostId
    role: HostRole
    address: str
    """Underlay address: tunnels, volumes, moves."""
    peer_port: int
    """TCP port at which its agent answers other agents."""
    domain: str = ""
    """What fails as one (a rack, a power feed): copies of a volume are in different ones where possible.
    Empty: the host is its own."""


class Component(StrEnum):
    """What a campaign can replace under running servers."""

    HYPERVISOR = "qemu"
    """Servers are moved away first. Its releases contain the storage daemon, too."""
    STORAGE = "storage"
    """The daemon that serves a host's volumes; servers stay where they are."""
    NETWORK = "network"
    """What serves a host's networks beside the kernel: DHCP and names, load balancers. Servers stay."""

    @property
    def released_as(self) -> "Component":
        """What a release it is taken from is a release of."""
        return Component.HYPERVISOR if self is Component.STORAGE else self


class Artifact(Value, frozen=True, kw_only=True):
    """One package a release was made of."""

    name: str
    version: str
    sha256: str


class Release(Value, frozen=True, kw_only=True):
    """A built, content-addressed release, unpacked side by side with others.
    `id` ends in the first 12 digits of `digest`, the sha256 over its manifest of files."""

    id: ReleaseId
    component: Component
    version: str
    suite: str
    digest: str
    machine_types: tuple[str, ...]
    artifacts: tuple[Artifact, ...] = ()
    size_mib: int = 0


class Assignment(Value, frozen=True, kw_only=True):
    """Which host owns a server, and by which epoch. Every change of owner raises the epoch."""

    server: ServerId
    host: HostId
    epoch: int
