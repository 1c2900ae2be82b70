"""What the virtual network consists of, as frozen values: networks, subnets, ports, security groups, routers,
floating IPs, load balancers, bandwidth.

Values only. Addresses are strings as people write them, rates are bit/s, bursts bytes. What belongs to
different projects may have the same addresses.
"""

from enum import StrEnum

from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    PortId,
    ProjectId,
    RouterId,
    SecurityGroupId,
    SubnetId,
)
from nahtlos.model.values import Value

DEFAULT_PROJECT = ProjectId("default")


class Family(StrEnum):
    IPV4 = "ipv4"
    IPV6 = "ipv6"


class SubnetSpec(Value, frozen=True, kw_only=True):
    """A range of addresses of a network."""

    id: SubnetId
    network: NetworkId
    cidr: str
    gateway_ip: str = ""
    """Where its servers send what is for elsewhere; answered by the router the subnet is attached to, on
    every host. Empty: told to nobody."""
    dhcp: bool = True
    """IPv4: addresses by DHCP. IPv6: router advertisements and stateless DHCPv6."""
    dns: tuple[str, ...] = ()
    """Name servers told to servers; empty: the network's own, which knows their names."""

    @property
    def family(self) -> Family:
        return Family.IPV6 if ":" in self.cidr else Family.IPV4


class ProviderLink(Value, frozen=True, kw_only=True):
    """A network outside of the cloud that a network of the cloud is one with: its frames go out of and come
    in by `interface` of every host that has it."""

    interface: str
    vlan: int = 0
    """1 to 4094: frames carry this tag. 0: they carry none."""


class NetworkSpec(Value, frozen=True, kw_only=True):
    """A tenant network: one bridge and one VXLAN device on every host that takes part."""

    id: NetworkId
    project: ProjectId = DEFAULT_PROJECT
    vni: int
    cidr: str
    """Of the first subnet, which is IPv4 and has the network's name; others are in `subnets`."""
    mtu: int = 1500
    gateway_ip: str
    """The first subnet's gateway. With a `gateway_host`: its port in this network; without: the router's."""
    gateway_mac: str
    """Of the port at `gateway_host`; empty without one."""
    gateway_host: HostId
    """The host (role edge) that holds the network's own routed uplink; empty: it has none, and the way out
    is a router."""
    dhcp_ip: str
    """Answered by every host for its own servers: the same address and MAC everywhere."""
    provider: ProviderLink | None = None
    """None: it exists inside of the cloud only."""
    subnets: tuple[SubnetSpec, ...] = ()

    @property
    def all_subnets(self) -> tuple[SubnetSpec, ...]:
        first = SubnetSpec(id=SubnetId(self.id), network=self.id, cidr=self.cidr, gateway_ip=self.gateway_ip)
        return (first, *self.subnets)


class AddressPair(Value, frozen=True, kw_only=True):
    """What a port may send from besides its own addresses: a prefix, and a MAC if not the port's own."""

    cidr: str
    mac: str = ""


class Rate(Value, frozen=True, kw_only=True):
    bits_per_second: int
    burst_bytes: int = 0
    """0: what passes in 10 ms at that rate, and at least 6 kB."""


class PortBandwidth(Value, frozen=True, kw_only=True):
    """`ingress` is what the server receives. None: not limited."""

    ingress: Rate | None = None
    egress: Rate | None = None


class PortSpec(Value, frozen=True, kw_only=True):
    """A server's connection to a network. `mac` and the addresses are fixed for its life."""

    id: PortId
    network: NetworkId
    mac: str
    ip: str
    addresses: tuple[str, ...] = ()
    """Further ones, each within a subnet of the network; IPv6 among them."""
    allowed_pairs: tuple[AddressPair, ...] = ()
    security_groups: tuple[SecurityGroupId, ...] = ()
    """None: everything may come and go but what is spoofed. With groups: only what one of them allows."""
    bandwidth: PortBandwidth = PortBandwidth()
    queues: int = 1
    """Pairs of queues of the server's interface, for servers with several processors. Fixed for its life."""

    @property
    def all_addresses(self) -> tuple[str, ...]:
        return (self.ip, *self.addresses)


# --- security groups ---------------------------------------------------------------------------------


class Direction(StrEnum):
    INGRESS = "ingress"
    EGRESS = "egress"


class SecurityRule(Value, frozen=True, kw_only=True):
    """Allows; what no rule allows is dropped. Answers to what was allowed pass in a stateful group."""

    direction: Direction
    family: Family = Family.IPV4
    protocol: str = ""
    """`tcp`, `udp`, `icmp` (ICMPv6 where the family is ipv6), a number 0 to 255, or empty: any."""
    port_min: int | None = None
    port_max: int | None = None
    """Destination ports, both ends included; for `icmp` the type and the code. None: all."""
    remote_cidr: str = ""
    """Address or prefix of the other side; empty: any."""
    remote_group: SecurityGroupId | None = None
    """Instead of `remote_cidr`: addresses of all ports in that group."""


class SecurityGroupSpec(Value, frozen=True, kw_only=True):
    id: SecurityGroupId
    project: ProjectId = DEFAULT_PROJECT
    rules: tuple[SecurityRule, ...] = ()
    stateful: bool = True


# --- routers, floating IPs, load balancers -------------------------------------------------------------


class RouterInterface(Value, frozen=True, kw_only=True):
    """A subnet attached to a router. `ip` is the subnet's gateway address, the same on every host."""

    subnet: SubnetId
    network: NetworkId
    ip: str


class Route(Value, frozen=True, kw_only=True):
    destination: str
    next_hop: str


class RouterGateway(Value, frozen=True, kw_only=True):
    """The router's way out, at an edge host: a place of its own (address and MAC), because state such as
    NAT cannot be everywhere."""

    host: HostId
    address: str
    """Outside address of this router: connections from inside appear to come from it."""
    snat: bool = True


class RouterSpec(Value, frozen=True, kw_only=True):
    """`number` (1 to 65535) is unique in the cloud and names devices and MACs of the router."""

    id: RouterId
    project: ProjectId = DEFAULT_PROJECT
    number: int
    interfaces: tuple[RouterInterface, ...] = ()
    routes: tuple[Route, ...] = ()
    gateway: RouterGateway | None = None


class FloatingIpSpec(Value, frozen=True, kw_only=True):
    """An outside address that leads to a port, translated without state at the gateway host of the router
    of that port's subnet."""

    id: FloatingIpId
    project: ProjectId = DEFAULT_PROJECT
    address: str
    port: PortId | None = None
    fixed_ip: str = ""
    """Which address of the port."""
    router: RouterId | None = None


class HealthCheck(Value, frozen=True, kw_only=True):
    interval_ms: int = 1000
    timeout_ms: int = 1000
    fall: int = 3
    """Failed checks in a row after which a member gets no new connections."""
    rise: int = 2


class Member(Value, frozen=True, kw_only=True):
    address: str
    port: int
    weight: int = 1
    draining: bool = False
    """Keeps its connections, gets no new ones."""


class LoadBalancerSpec(Value, frozen=True, kw_only=True):
    """Balances TCP connections to `vip`:`port` inside a network. `number` as for routers."""

    id: LoadBalancerId
    project: ProjectId = DEFAULT_PROJECT
    number: int
    network: NetworkId
    vip: str
    port: int
    host: HostId
    """The host that carries it."""
    members: tuple[Member, ...] = ()
    health: HealthCheck = HealthCheck()


def number_text(rule: SecurityRule) -> str:
    """Its ports, or ICMP type and code; empty: all."""
    if rule.port_min is None:
        return ""
    if rule.protocol == "icmp":
        return str(rule.port_min) if rule.port_max is None else f"{rule.port_min}/{rule.port_max}"
    return (
        str(rule.port_min) if rule.port_max in (None, rule.port_min) else f"{rule.port_min}-{rule.port_max}"
    )
