"""A virtual network to ask about: two networks joined by a router with a way out, one with an uplink of its
own, one by itself; servers a (blue), b (blue), c (green), d (alone), e (tenant)."""

from typing import Any

import msgspec

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
    FloatingIpSpec,
    LoadBalancerSpec,
    Member,
    NetworkSpec,
    PortSpec,
    Route,
    RouterGateway,
    RouterInterface,
    RouterSpec,
    SecurityGroupSpec,
    SubnetSpec,
)
from nahtlos.model.nouns import HostRole, HostSpec
from nahtlos.model.topology import Topology

H1, H2, EDGE = HostId("host-1"), HostId("host-2"), HostId("edge-1")
BLUE, GREEN, ALONE, TENANT = (NetworkId(n) for n in ("blue", "green", "alone", "tenant"))
BLUE6 = SubnetId("blue6")
A, B, C, D, E = (PortId(f"{name}-eth0") for name in "abcde")
WAN, WEB = RouterId("wan"), SecurityGroupId("web")


def network(name: NetworkId, vni: int, third: int, **changes: Any) -> NetworkSpec:
    plain = NetworkSpec(
        id=name,
        vni=vni,
        cidr=f"10.{third}.0.0/24",
        gateway_ip=f"10.{third}.0.1",
        gateway_mac="",
        gateway_host=HostId(""),
        dhcp_ip=f"10.{third}.0.2",
    )
    return msgspec.structs.replace(plain, **changes)


def port(name: PortId, net: NetworkId, ip: str, number: int, *further: str) -> PortSpec:
    return PortSpec(id=name, network=net, mac=f"52:54:00:4d:00:{number:02x}", ip=ip, addresses=further)


def topology(**changes: Any) -> Topology:
    six = SubnetSpec(id=BLUE6, network=BLUE, cidr="2001:db8:1::/64", gateway_ip="2001:db8:1::1")
    networks = (
        network(BLUE, 1001, 1, subnets=(six,)),
        network(GREEN, 1002, 2),
        network(ALONE, 1003, 1),
        network(TENANT, 100, 77, gateway_host=EDGE, gateway_mac="02:00:00:4d:00:01"),
    )
    ports = (
        port(A, BLUE, "10.1.0.10", 10, "2001:db8:1::a"),
        port(B, BLUE, "10.1.0.11", 11, "2001:db8:1::b"),
        port(C, GREEN, "10.2.0.10", 12),
        port(D, ALONE, "10.1.0.10", 13),
        port(E, TENANT, "10.77.0.10", 14),
    )
    router = RouterSpec(
        id=WAN,
        number=1,
        interfaces=(
            RouterInterface(subnet=SubnetId(BLUE), network=BLUE, ip="10.1.0.1"),
            RouterInterface(subnet=SubnetId(GREEN), network=GREEN, ip="10.2.0.1"),
        ),
        routes=(Route(destination="192.168.0.0/16", next_hop="10.2.0.10"),),
        gateway=RouterGateway(host=EDGE, address="203.0.113.2"),
    )
    front = FloatingIpSpec(
        id=FloatingIpId("front"), address="203.0.113.10", port=B, fixed_ip="10.1.0.11", router=WAN
    )
    spare = FloatingIpSpec(id=FloatingIpId("spare"), address="203.0.113.11")
    balancer = LoadBalancerSpec(
        id=LoadBalancerId("lb"),
        number=2,
        network=BLUE,
        vip="10.1.0.200",
        port=80,
        host=H2,
        members=(
            Member(address="10.1.0.10", port=8080, weight=3),
            Member(address="10.1.0.11", port=8080),
            Member(address="10.1.0.12", port=8080, draining=True),
        ),
    )
    plain = Topology(
        networks={n.id: n for n in networks},
        ports={p.id: p for p in ports},
        servers={p.id: ServerId(p.id[0]) for p in ports},
        groups={WEB: SecurityGroupSpec(id=WEB)},
        routers={WAN: router},
        floating_ips={f.id: f for f in (front, spare)},
        balancers={balancer.id: balancer},
        uplinks={TENANT: "out0"},
    )
    return msgspec.structs.replace(plain, **changes)


PLACES = {A: H1, B: H2, C: H2, D: H1, E: H1}
HOSTS = {
    host: HostSpec(
        id=host,
        role=HostRole.EDGE if host == EDGE else HostRole.COMPUTE,
        address=f"10.99.0.{number}",
        peer_port=7444,
    )
    for number, host in enumerate((EDGE, H1, H2), 5)
}


def with_port(found: Topology, name: PortId, **changes: Any) -> Topology:
    changed = msgspec.structs.replace(found.ports[name], **changes)
    return msgspec.structs.replace(found, ports={**found.ports, name: changed})


def with_router(found: Topology, **changes: Any) -> Topology:
    changed = msgspec.structs.replace(found.routers[WAN], **changes)
    return msgspec.structs.replace(found, routers={**found.routers, WAN: changed})


def with_balancer(found: Topology, **changes: Any) -> Topology:
    name = LoadBalancerId("lb")
    changed = msgspec.structs.replace(found.balancers[name], **changes)
    return msgspec.structs.replace(found, balancers={**found.balancers, name: changed})


def with_group(found: Topology, name: SecurityGroupId = WEB, **changes: Any) -> Topology:
    changed = msgspec.structs.replace(found.groups.get(name, SecurityGroupSpec(id=name)), **changes)
    return msgspec.structs.replace(found, groups={**found.groups, name: changed})
