"""The whole numbered configuration of a host: what its agent converges to.

A host is always sent all of it. The agent's ledger refuses an older generation, and the same generation
with other content. Servers and volumes are removed only when named in `removed_*`: what a configuration
does not mention is reported as drift and left alone.
"""

import ipaddress

from nahtlos.model.availability import Denial, LeaseTerms, PassedOver
from nahtlos.model.ids import (
    HostId,
    NetworkId,
    PortId,
    ReleaseId,
    SecurityGroupId,
    ServerId,
    SnapshotId,
    VolumeId,
)
from nahtlos.model.networking import (
    AddressPair,
    FloatingIpSpec,
    LoadBalancerSpec,
    NetworkSpec,
    PortBandwidth,
    RouterSpec,
    SecurityGroupSpec,
)
from nahtlos.model.nouns import HostSpec, ServerSpec
from nahtlos.model.power import SavedState
from nahtlos.model.storage import DiskBudget, DiskLimits, SnapshotExport, SnapshotSpec, VolumeSpec
from nahtlos.model.values import Value


class VolumeEndpoint(Value, frozen=True, kw_only=True):
    """Where one copy of a volume is served."""

    host: HostId
    address: str
    port: int
    export: str
    joining: bool = False
    """Written to and never read: what it holds is still being copied, or not yet known to be all."""


class RbdEndpoint(Value, frozen=True, kw_only=True):
    """An image of a RADOS pool. The user's key is where the host keeps it, never in a configuration."""

    pool: str
    image: str
    user: str
    configuration: str
    """Path of the cluster's configuration on the host."""


class VolumeAttachment(Value, frozen=True, kw_only=True):
    """Where a server finds its volume."""

    volume: VolumeId
    address: str
    port: int
    export: str
    """`<volume>.e<epoch>`"""
    copies: tuple[VolumeEndpoint, ...] = ()
    """All current copies, where there are several; the first one is what the three fields above say.
    Empty: they are all there is."""
    size_mib: int = 0
    """0: what is served."""
    limits: DiskLimits = DiskLimits()
    limits_group: str = ""
    rbd: RbdEndpoint | None = None
    """Not None: the volume is this image, and address, port and export say nothing."""


class ServerConfig(Value, frozen=True, kw_only=True):
    """A server this host owns at `epoch` and must run. An entry whose epoch the ledger has passed
    (the server was handed over meanwhile) is ignored."""

    spec: ServerSpec
    epoch: int
    volume: VolumeAttachment
    data_volumes: tuple[VolumeAttachment, ...] = ()
    """In the order of `spec.data_volumes`, whose empty places are left out."""
    memory: VolumeAttachment | None = None
    """Where its memory is saved, or is to be."""
    saved: SavedState | None = None
    """What was saved there: it is to go on from that, unless a boot is asked for since."""

    @property
    def all_volumes(self) -> tuple[VolumeAttachment, ...]:
        return (self.volume, *self.data_volumes)


class PortConfig(Value, frozen=True, kw_only=True):
    """A port of a network as seen from every host: `host` says where frames for `mac` must go."""

    id: PortId
    server: ServerId
    mac: str
    ip: str
    host: HostId
    vtep: str
    addresses: tuple[str, ...] = ()
    """Further ones; see `PortSpec`."""
    allowed_pairs: tuple[AddressPair, ...] = ()
    security_groups: tuple[SecurityGroupId, ...] = ()
    bandwidth: PortBandwidth = PortBandwidth()
    queues: int = 1
    """See `PortSpec`."""

    @property
    def all_addresses(self) -> tuple[str, ...]:
        return (self.ip, *self.addresses)


class NetworkConfig(Value, frozen=True, kw_only=True):
    spec: NetworkSpec
    ports: tuple[PortConfig, ...]
    gateway_vtep: str
    vteps: tuple[str, ...]
    """Underlay addresses of all hosts of this network, this host's own included."""

    @property
    def prefix_length(self) -> int:
        return ipaddress.ip_network(self.spec.cidr).prefixlen


class Uplink(Value, frozen=True, kw_only=True):
    """A way out of the cloud, held by an edge host: it routes between `network` and `interface`."""

    network: NetworkId
    interface: str


class RouterConfig(Value, frozen=True, kw_only=True):
    """A router as every host needs it: `gateway_vtep` is the tunnel end of the host that holds its way out
    (empty: none). `interface` is that host's interface to the outside, told to that host only."""

    spec: RouterSpec
    gateway_vtep: str = ""
    interface: str = ""
    floating_ips: tuple[FloatingIpSpec, ...] = ()
    gateway_epoch: int = 0
    """Rises with every change of the way out's place."""
    passing: bool = False
    """The way out has left this host, which still leads out what others send here, because some host has not
    yet converged to the new place. To the outside it does not answer any more."""
    settled: bool = False
    """Passing, and every host sends to the new place now: it ends once that knows what was learned here."""


class LoadBalancerConfig(Value, frozen=True, kw_only=True):
    spec: LoadBalancerSpec
    vtep: str
    """Tunnel end of the host that carries it."""


class UnderlayShares(Value, frozen=True, kw_only=True):
    """How a host's underlay interface is divided when it is full, in percent of `bits_per_second`; what one
    does not use the others may."""

    bits_per_second: int
    control: int = 10
    """Agents, orchestrator, volumes."""
    moves: int = 30
    tenants: int = 60


class HostConfig(Value, frozen=True, kw_only=True):
    host: HostId
    generation: int
    release: ReleaseId | None
    """Hypervisor release for servers that start (or arrive) here from now on; running ones keep theirs.
    None on a host without the compute role."""
    storage_release: ReleaseId | None = None
    """None: the storage daemon is left as it is."""
    disk_budget: DiskBudget = DiskBudget()
    network_release: ReleaseId | None = None
    """Of what serves networks beside the kernel. None: the host's own programs."""
    networks: tuple[NetworkConfig, ...] = ()
    uplinks: tuple[Uplink, ...] = ()
    servers: tuple[ServerConfig, ...] = ()
    removed_servers: tuple[ServerId, ...] = ()
    volumes: tuple[VolumeSpec, ...] = ()
    removed_volumes: tuple[VolumeId, ...] = ()
    snapshots: tuple[SnapshotSpec, ...] = ()
    """Those kept here. They are taken by operations; named here so that they are missed if they are gone."""
    removed_snapshots: tuple[SnapshotId, ...] = ()
    snapshot_exports: tuple[SnapshotExport, ...] = ()
    """Served here; one that is not named is withdrawn."""
    pinned_volumes: tuple[VolumeId, ...] = ()
    """Volumes of operations whose end is not recorded yet: what this configuration says of them, and of how
    servers reach them, is not acted on. No operation begins before all who are concerned hold such a one."""
    reflect: tuple[PortId, ...] = ()
    """Ports that left this host and whose frames it must still pass on, because some host has not
    yet converged to their new place."""
    security_groups: tuple[SecurityGroupSpec, ...] = ()
    """Every group that a port of `networks` is in or a rule of such a group names."""
    routers: tuple[RouterConfig, ...] = ()
    load_balancers: tuple[LoadBalancerConfig, ...] = ()
    underlay: UnderlayShares | None = None
    """None: the underlay interface is left alone."""
    hosts: tuple[HostSpec, ...] = ()
    """Every host of the cloud, so that agents can check who is speaking to them."""
    lease: LeaseTerms | None = None
    """Under which servers run here that shall be restarted elsewhere. None: they need none."""
    denials: tuple[Denial, ...] = ()
    """Hosts that are granted no lease."""
    passed_over: tuple[PassedOver, ...] = ()
    """Servers that were restarted elsewhere because this host had failed."""
