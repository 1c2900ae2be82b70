"""The virtual network whole, as it is wanted: which network has which ports, what routes, filters, balances.

Owns how its nouns find each other: an address its holder, a subnet its router, a group its members. Pure,
and never knows where anything runs.
"""

import ipaddress
from collections.abc import Iterator
from enum import StrEnum

from nahtlos.model.config import UnderlayShares
from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    PortId,
    RouterId,
    SecurityGroupId,
    ServerId,
    SubnetId,
)
from nahtlos.model.networking import (
    Family,
    FloatingIpSpec,
    LoadBalancerSpec,
    NetworkSpec,
    PortSpec,
    RouterSpec,
    SecurityGroupSpec,
    SubnetSpec,
)
from nahtlos.model.values import Value

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class MoveCompression(StrEnum):
    """Whether the memory of servers that move is compressed (zstd)."""

    AUTO = "auto"
    """Where moves get less of the underlay than a processor compresses."""
    ALWAYS = "always"
    NEVER = "never"


class Underlay(Value, frozen=True, kw_only=True):
    """What hosts are connected by. `mtu` 0: not known; `shares` None: the interface is left alone."""

    mtu: int = 0
    shares: UnderlayShares | None = None
    move_channels: int = 1
    """Connections by which a server's memory is sent when it moves: more than one take a processor each, and
    are worth it where one does not fill the link. A server whose memory may follow it has one."""
    move_compression: MoveCompression = MoveCompression.AUTO
    """Of a server whose memory may follow it nothing is compressed."""


class Topology(Value, frozen=True, kw_only=True):
    networks: dict[NetworkId, NetworkSpec] = {}
    ports: dict[PortId, PortSpec] = {}
    servers: dict[PortId, ServerId] = {}
    """Whose port it is."""
    groups: dict[SecurityGroupId, SecurityGroupSpec] = {}
    routers: dict[RouterId, RouterSpec] = {}
    floating_ips: dict[FloatingIpId, FloatingIpSpec] = {}
    balancers: dict[LoadBalancerId, LoadBalancerSpec] = {}
    external: dict[HostId, str] = {}
    """Interface to the outside of each host that has one."""
    uplinks: dict[str, str] = {}
    """Interface of the way out that a network has by itself, at its gateway host."""
    underlay: Underlay = Underlay()

    # --- subnets ---

    def subnets(self) -> dict[SubnetId, SubnetSpec]:
        return {subnet.id: subnet for network in self.networks.values() for subnet in network.all_subnets}

    def subnet_of(self, network: NetworkId, address: str) -> SubnetSpec | None:
        """The subnet of `network` that `address` lies in."""
        spec = self.networks.get(network)
        return next((s for s in (spec.all_subnets if spec else ()) if within(address, s.cidr)), None)

    def router_of(self, subnet: SubnetId) -> RouterSpec | None:
        return next((r for r in self.routers.values() if any(i.subnet == subnet for i in r.interfaces)), None)

    # --- ports ---

    def ports_of(self, network: NetworkId) -> Iterator[PortSpec]:
        return (port for port in self.ports.values() if port.network == network)

    def holder(self, network: NetworkId, address: str) -> PortSpec | None:
        """The port of `network` that has `address`."""
        return next((p for p in self.ports_of(network) if same_address(address, p.all_addresses)), None)

    def balancer_at(self, network: NetworkId, address: str) -> LoadBalancerSpec | None:
        return next(
            (b for b in self.balancers.values() if b.network == network and same_address(address, (b.vip,))),
            None,
        )

    def members(self, group: SecurityGroupId) -> tuple[PortSpec, ...]:
        return tuple(port for port in self.ports.values() if group in port.security_groups)

    def floating_of(self, port: PortId, fixed_ip: str) -> FloatingIpSpec | None:
        return next(
            (f for f in self.floating_ips.values() if f.port == port and f.fixed_ip == fixed_ip), None
        )

    def floating_at(self, address: str) -> FloatingIpSpec | None:
        return next((f for f in self.floating_ips.values() if same_address(address, (f.address,))), None)

    # --- the way out ---

    def external_interface(self, host: HostId) -> str:
        """What a router's gateway at `host` leaves by; empty if that host has no way out."""
        if host in self.external:
            return self.external[host]
        own = (n.id for n in self.networks.values() if n.gateway_host == host and n.id in self.uplinks)
        return next((self.uplinks[network] for network in sorted(own)), "")

    def outside_addresses(self) -> dict[str, str]:
        """Addresses of the outside that lead into the cloud, and what has each, in words."""
        found = {f.address: f"floating IP {f.id}" for f in self.floating_ips.values()}
        found |= {r.gateway.address: f"router {r.id}" for r in self.routers.values() if r.gateway}
        return found


def within(address: str, cidr: str) -> bool:
    """False, too, if they are of different families."""
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


def same_address(address: str, among: tuple[str, ...]) -> bool:
    """However they are written: IPv6 has many ways."""
    wanted = ipaddress.ip_address(address)
    return any(ipaddress.ip_address(a) == wanted for a in among if a)


def family_of(address: str) -> Family:
    return Family.IPV6 if ":" in address else Family.IPV4
