"""What the runtime offers to operators of the virtual network: nouns to create, change, look at and delete.

As in `cloud`: every method answers at once from the store or writes intent and returns. Names are unique in
the whole cloud, also across projects. In a change, what is left out (UNSET) stays as it is.
"""

from enum import StrEnum
from typing import Protocol

from msgspec import UNSET, UnsetType

from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    PortId,
    ProjectId,
    RouterId,
    SecurityGroupId,
    ServerId,
    SubnetId,
)
from nahtlos.model.inventory import LoadBalancerStatus
from nahtlos.model.networking import (
    DEFAULT_PROJECT,
    AddressPair,
    Direction,
    FloatingIpSpec,
    HealthCheck,
    LoadBalancerSpec,
    Member,
    PortBandwidth,
    ProviderLink,
    Rate,
    Route,
    RouterGateway,
    RouterSpec,
    SecurityGroupSpec,
    SecurityRule,
    SubnetSpec,
)
from nahtlos.model.topology import Underlay
from nahtlos.model.values import Value

# --- requests ----------------------------------------------------------------------------------------


class NetworkRequest(Value, frozen=True, kw_only=True):
    name: str
    cidr: str
    """IPv4, of the first subnet, which gets the network's name."""
    mtu: int = 0
    """0: 1500, or what the underlay leaves if that is less."""
    gateway_ip: str | None = None
    """None: the subnet's first address."""
    provider_interface: str = ""
    """Of every host: the network is one with the outside network there. Empty: it is inside of the cloud."""
    vlan: int = 0
    """Tag of the outside network's frames at that interface; 0: none."""
    project: ProjectId = DEFAULT_PROJECT


class NetworkChange(Value, frozen=True, kw_only=True):
    mtu: int | UnsetType = UNSET


class SubnetRequest(Value, frozen=True, kw_only=True):
    name: str
    network: NetworkId
    cidr: str
    gateway_ip: str | None = None
    """None: the subnet's first address; empty: it has none."""
    dhcp: bool = True
    dns: tuple[str, ...] = ()


class SubnetChange(Value, frozen=True, kw_only=True):
    gateway_ip: str | UnsetType = UNSET
    dhcp: bool | UnsetType = UNSET
    dns: tuple[str, ...] | UnsetType = UNSET


class PortRequest(Value, frozen=True, kw_only=True):
    """A port of a server that is to be created."""

    network: NetworkId
    ip: str = ""
    """Empty: the lowest free one."""
    mac: str = ""
    addresses: tuple[str, ...] = ()
    """Further ones. Of IPv6 subnets with `dhcp`, the one that the port's MAC makes is added to them."""
    allowed_pairs: tuple[AddressPair, ...] = ()
    security_groups: tuple[SecurityGroupId, ...] = ()
    bandwidth: PortBandwidth = PortBandwidth()
    queues: int = 1


class PortChange(Value, frozen=True, kw_only=True):
    allowed_pairs: tuple[AddressPair, ...] | UnsetType = UNSET
    security_groups: tuple[SecurityGroupId, ...] | UnsetType = UNSET
    ingress: Rate | UnsetType | None = UNSET
    """What the server receives; None: not limited."""
    egress: Rate | UnsetType | None = UNSET


class SecurityGroupRequest(Value, frozen=True, kw_only=True):
    name: str
    rules: tuple[SecurityRule, ...] | None = None
    """None: everything may go out, nothing may come in but answers."""
    stateful: bool = True
    project: ProjectId = DEFAULT_PROJECT


class RouterRequest(Value, frozen=True, kw_only=True):
    name: str
    subnets: tuple[SubnetId, ...] = ()
    project: ProjectId = DEFAULT_PROJECT


class RouterChange(Value, frozen=True, kw_only=True):
    """What to add and what to take away, so that two changes at once both count."""

    attach: tuple[SubnetId, ...] = ()
    detach: tuple[SubnetId, ...] = ()
    add_routes: tuple[Route, ...] = ()
    remove_routes: tuple[Route, ...] = ()
    gateway: RouterGateway | UnsetType | None = UNSET
    """None: take it away."""


class FloatingIpRequest(Value, frozen=True, kw_only=True):
    name: str
    address: str
    port: PortId | None = None
    fixed_ip: str = ""
    project: ProjectId = DEFAULT_PROJECT


class Assignment(Value, frozen=True, kw_only=True):
    """Of a floating IP. `port` None: to nothing."""

    port: PortId | None = None
    fixed_ip: str = ""
    """Empty: the port's first address of the same family."""


class LoadBalancerRequest(Value, frozen=True, kw_only=True):
    name: str
    network: NetworkId
    port: int
    vip: str = ""
    """Empty: the lowest free address."""
    host: HostId | None = None
    """None: the host that carries fewest."""
    members: tuple[Member, ...] = ()
    health: HealthCheck = HealthCheck()
    project: ProjectId = DEFAULT_PROJECT


class MemberName(Value, frozen=True, kw_only=True):
    address: str
    port: int


class LoadBalancerChange(Value, frozen=True, kw_only=True):
    host: HostId | UnsetType = UNSET
    put_members: tuple[Member, ...] = ()
    """Added, or, where address and port are known, changed."""
    remove_members: tuple[MemberName, ...] = ()
    health: HealthCheck | UnsetType = UNSET


# --- views -------------------------------------------------------------------------------------------


class SubnetView(Value, frozen=True, kw_only=True):
    spec: SubnetSpec
    project: ProjectId
    router: RouterId | None


class NetworkView(Value, frozen=True, kw_only=True):
    id: NetworkId
    project: ProjectId
    vni: int
    mtu: int
    dhcp_ip: str
    gateway_host: HostId | None
    """Of its own uplink; None: routers lead out of it."""
    provider: ProviderLink | None
    subnets: tuple[SubnetView, ...]
    ports: tuple[PortId, ...]
    load_balancers: tuple[LoadBalancerId, ...]


class LoadBalancerView(LoadBalancerSpec, frozen=True, kw_only=True):
    """As asked for, and as its host last found it."""

    status: LoadBalancerStatus | None = None
    """None: not served yet, or its host is not connected."""


class PortView(Value, frozen=True, kw_only=True):
    id: PortId
    server: ServerId
    project: ProjectId
    network: NetworkId
    mac: str
    addresses: tuple[str, ...]
    allowed_pairs: tuple[AddressPair, ...]
    security_groups: tuple[SecurityGroupId, ...]
    bandwidth: PortBandwidth
    floating_ips: tuple[str, ...]
    host: HostId | None
    """Where its server is by the plan; None: nowhere yet."""


class SecurityGroupView(Value, frozen=True, kw_only=True):
    spec: SecurityGroupSpec
    ports: tuple[PortId, ...]


class Settling(Value, frozen=True, kw_only=True):
    """How far what was asked for has come: hosts that have not converged to it yet."""

    hosts: tuple[HostId, ...]
    away: tuple[HostId, ...]
    """Of these, the ones not connected."""


# --- tracing a packet --------------------------------------------------------------------------------


class TraceRequest(Value, frozen=True, kw_only=True):
    """A packet between a port and an address that begins a connection."""

    port: PortId
    address: str
    direction: Direction = Direction.EGRESS
    """Egress: from the port to the address; ingress: from the address to the port."""
    protocol: str = "icmp"
    number: int | None = None
    """Destination port; for ICMP the type."""
    source: str = ""
    """Address of the port that it is sent from; empty: the one that fits."""


class Outcome(StrEnum):
    PASSES = "passes"
    TRANSLATED = "translated"
    DROPPED = "dropped"


class TraceStep(Value, frozen=True, kw_only=True):
    """What happens at one place. `checked`: rule by rule, why it does or does not apply."""

    where: str
    what: str
    outcome: Outcome = Outcome.PASSES
    checked: tuple[str, ...] = ()


class Fate(StrEnum):
    DELIVERED = "delivered"
    LEAVES = "leaves"
    """By an interface to the outside; what happens there is not known here."""
    DROPPED = "dropped"


class Trace(Value, frozen=True, kw_only=True):
    source: str
    destination: str
    protocol: str
    number: int | None
    steps: tuple[TraceStep, ...]
    fate: Fate
    reason: str


# --- the offer ---------------------------------------------------------------------------------------


class Networks(Protocol):
    async def networks(self) -> tuple[NetworkView, ...]: ...
    async def network(self, network: NetworkId) -> NetworkView: ...
    async def create_network(self, request: NetworkRequest) -> NetworkView: ...
    async def change_network(self, network: NetworkId, change: NetworkChange) -> NetworkView: ...
    async def delete_network(self, network: NetworkId) -> None: ...

    async def subnets(self) -> tuple[SubnetView, ...]: ...
    async def subnet(self, subnet: SubnetId) -> SubnetView: ...
    async def create_subnet(self, request: SubnetRequest) -> SubnetView: ...
    async def change_subnet(self, subnet: SubnetId, change: SubnetChange) -> SubnetView: ...
    async def delete_subnet(self, subnet: SubnetId) -> None: ...

    async def ports(self) -> tuple[PortView, ...]: ...
    async def port(self, port: PortId) -> PortView: ...
    async def change_port(self, port: PortId, change: PortChange) -> PortView: ...
    async def trace(self, request: TraceRequest) -> Trace: ...

    async def security_groups(self) -> tuple[SecurityGroupView, ...]: ...
    async def security_group(self, group: SecurityGroupId) -> SecurityGroupView: ...
    async def create_security_group(self, request: SecurityGroupRequest) -> SecurityGroupView: ...
    async def delete_security_group(self, group: SecurityGroupId) -> None: ...
    async def add_rule(self, group: SecurityGroupId, rule: SecurityRule) -> SecurityGroupView: ...
    async def remove_rule(self, group: SecurityGroupId, rule: SecurityRule) -> SecurityGroupView: ...

    async def routers(self) -> tuple[RouterSpec, ...]: ...
    async def router(self, router: RouterId) -> RouterSpec: ...
    async def create_router(self, request: RouterRequest) -> RouterSpec: ...
    async def change_router(self, router: RouterId, change: RouterChange) -> RouterSpec: ...
    async def delete_router(self, router: RouterId) -> None: ...

    async def floating_ips(self) -> tuple[FloatingIpSpec, ...]: ...
    async def floating_ip(self, floating_ip: FloatingIpId) -> FloatingIpSpec: ...
    async def create_floating_ip(self, request: FloatingIpRequest) -> FloatingIpSpec: ...
    async def assign_floating_ip(
        self, floating_ip: FloatingIpId, assignment: Assignment
    ) -> FloatingIpSpec: ...
    async def delete_floating_ip(self, floating_ip: FloatingIpId) -> None: ...

    async def load_balancers(self) -> tuple[LoadBalancerView, ...]: ...
    async def load_balancer(self, balancer: LoadBalancerId) -> LoadBalancerView: ...
    async def create_load_balancer(self, request: LoadBalancerRequest) -> LoadBalancerSpec: ...
    async def change_load_balancer(
        self, balancer: LoadBalancerId, change: LoadBalancerChange
    ) -> LoadBalancerSpec: ...
    async def delete_load_balancer(self, balancer: LoadBalancerId) -> None: ...

    async def underlay(self) -> Underlay: ...
    async def set_underlay(self, underlay: Underlay) -> Underlay: ...
    async def settling(self) -> Settling:
        """Which hosts have yet to converge to what is wanted now."""
        ...
