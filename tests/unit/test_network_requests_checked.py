"""What is refused of the virtual network, with the field and a remedy, and what is made of what is not."""

import ipaddress
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_network import (
    BLUE,
    BLUE6,
    EDGE,
    GREEN,
    H1,
    H2,
    HOSTS,
    TENANT,
    WAN,
    WEB,
    A,
    B,
    C,
    D,
    topology,
    with_port,
    with_router,
)

from nahtlos.model.config import UnderlayShares
from nahtlos.model.errors import Conflict, NotFound, Refused
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
from nahtlos.model.networking import (
    AddressPair,
    Direction,
    Family,
    HealthCheck,
    Member,
    PortBandwidth,
    Rate,
    Route,
    RouterGateway,
    SecurityRule,
)
from nahtlos.model.topology import Topology, Underlay
from nahtlos.runtime.controllers import (
    addresses,
    balancer_requests,
    network_requests,
    port_requests,
    routing_requests,
    security_requests,
    underlay_requests,
)
from nahtlos.runtime.controllers.networks import (
    Assignment,
    FloatingIpRequest,
    LoadBalancerChange,
    LoadBalancerRequest,
    MemberName,
    NetworkChange,
    NetworkRequest,
    PortChange,
    PortRequest,
    RouterChange,
    RouterRequest,
    SecurityGroupRequest,
    SubnetChange,
    SubnetRequest,
)

OTHER = ProjectId("other")


def refused(call: Callable[[], object], error: type[Refused], field: str, words: str = "") -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, caught.value
    assert caught.value.field == field, caught.value
    assert caught.value.remedy
    assert words in str(caught.value), caught.value


# --- networks and subnets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "field", "words"),
    [
        ({"name": "Blue"}, Refused, "name", ""),
        ({"name": "blue"}, Conflict, "name", "a network 'blue' exists"),
        ({"name": "blue6"}, Conflict, "name", "a subnet 'blue6' exists"),
        ({"cidr": "10.5.0.1/24"}, Refused, "cidr", "write 10.5.0.0/24"),
        ({"cidr": "10.5.0.0/33"}, Refused, "cidr", "no prefix"),
        ({"cidr": "somewhere"}, Refused, "cidr", "no prefix"),
        ({"cidr": "10.5.0.0/30"}, Refused, "cidr", "too small"),
        ({"cidr": "0.0.0.0/1"}, Refused, "cidr", ""),
        ({"cidr": "224.1.0.0/24"}, Refused, "cidr", "no range for machines"),
        ({"cidr": "127.1.0.0/24"}, Refused, "cidr", "no range for machines"),
        ({"cidr": "2001:db8::/64"}, Refused, "cidr", "IPv6"),
        ({"gateway_ip": "10.6.0.1"}, Refused, "gateway_ip", "outside 10.5.0.0/24"),
        ({"gateway_ip": "10.5.0.0"}, Refused, "gateway_ip", ""),
        ({"gateway_ip": "10.5.0.255"}, Refused, "gateway_ip", ""),
        ({"gateway_ip": ""}, Refused, "gateway_ip", ""),
        ({"gateway_ip": "2001:db8::1"}, Refused, "gateway_ip", ""),
        ({"mtu": 575}, Refused, "mtu", "at least 576"),
        ({"mtu": 9217}, Refused, "mtu", "at most 9216"),
        ({"project": ProjectId("No Such")}, Refused, "project", ""),
    ],
)
def test_networks_that_are_refused(
    changes: dict[str, Any], error: type[Refused], field: str, words: str
) -> None:
    request = msgspec.structs.replace(NetworkRequest(name="new", cidr="10.5.0.0/24"), **changes)
    refused(lambda: network_requests.new_network(topology(), request, 0), error, field, words)


def test_what_a_network_is_made_of() -> None:
    made = network_requests.new_network(topology(), NetworkRequest(name="new", cidr="10.5.0.0/29"), 0)
    assert (made.vni, made.mtu, made.gateway_ip, made.dhcp_ip) == (1004, 1500, "10.5.0.1", "10.5.0.2")
    assert (made.gateway_host, made.gateway_mac) == ("", "")
    other = NetworkRequest(name="new", cidr="10.5.0.0/29", gateway_ip="10.5.0.2")
    assert network_requests.new_network(topology(), other, 0).dhcp_ip == "10.5.0.3"


@pytest.mark.parametrize(("underlay", "mtu"), [(0, 1500), (1600, 1500), (1500, 1450), (9000, 1500)])
def test_the_mtu_leaves_room_for_the_tunnel(underlay: int, mtu: int) -> None:
    request = NetworkRequest(name="new", cidr="10.5.0.0/24")
    assert network_requests.new_network(topology(), request, underlay).mtu == mtu
    if underlay:
        large = msgspec.structs.replace(request, mtu=underlay - 49)
        refused(
            lambda: network_requests.new_network(topology(), large, underlay),
            Refused,
            "mtu",
            f"leave {underlay - 50}",
        )


def test_the_mtu_of_a_network_that_is_there() -> None:
    blue, tenant = topology().networks[BLUE], topology().networks[TENANT]
    change = network_requests.changed_network
    assert change(blue, NetworkChange(), 0) is blue
    assert change(blue, NetworkChange(mtu=1280), 0).mtu == 1280
    refused(lambda: change(blue, NetworkChange(mtu=1279), 0), Refused, "mtu", "too small for ipv6")
    refused(lambda: change(tenant, NetworkChange(mtu=1400), 0), Conflict, "network", "settings")


SIX = SubnetRequest(name="six", network=GREEN, cidr="2001:db8:2::/64")


@pytest.mark.parametrize(
    ("changes", "error", "field", "words"),
    [
        ({"network": NetworkId("nowhere")}, NotFound, "network", "networks: alone, blue, green, tenant"),
        ({"name": "green"}, Conflict, "name", "a network 'green' exists"),
        ({"name": "blue6"}, Conflict, "name", "a subnet"),
        ({"cidr": "10.2.0.128/25"}, Conflict, "cidr", "overlaps 10.2.0.0/24 of subnet green"),
        ({"cidr": "10.0.0.0/8"}, Conflict, "cidr", "overlaps"),
        ({"cidr": "2001:db8:2::1/64"}, Refused, "cidr", "host bits"),
        ({"cidr": "2001:db8:2::/72"}, Refused, "cidr", "64 bits"),
        ({"cidr": "2001:db8:2::/124", "dhcp": False}, Refused, "cidr", "too small"),
        ({"cidr": "fe80::/64"}, Refused, "cidr", "no range for machines"),
        ({"gateway_ip": "10.2.0.1"}, Refused, "gateway_ip", "outside"),
        ({"dns": ("resolver",)}, Refused, "dns", "no IP address"),
        ({"dns": ("fe80::1%eth0",)}, Refused, "dns", "zone"),
        ({"dns": ("224.0.0.1",)}, Refused, "dns", "no address of a machine"),
    ],
)
def test_subnets_that_are_refused(
    changes: dict[str, Any], error: type[Refused], field: str, words: str
) -> None:
    request = msgspec.structs.replace(SIX, **changes)
    refused(lambda: network_requests.new_subnet(topology(), request), error, field, words)


def test_what_a_subnet_is_made_of() -> None:
    made = network_requests.new_subnet(topology(), msgspec.structs.replace(SIX, dns=("2001:DB8::53",) * 2))
    assert (made.gateway_ip, made.dns, made.dhcp) == ("2001:db8:2::1", ("2001:db8::53",), True)
    plain = msgspec.structs.replace(SIX, cidr="2001:db8:2::/72", dhcp=False, gateway_ip="")
    assert network_requests.new_subnet(topology(), plain).gateway_ip == ""


def test_a_network_too_small_for_ipv6() -> None:
    found = topology()
    small = msgspec.structs.replace(found.networks[GREEN], mtu=1279)
    found = msgspec.structs.replace(found, networks={**found.networks, GREEN: small})
    refused(lambda: network_requests.new_subnet(found, SIX), Refused, "network", "--mtu 1280")


def test_what_uses_a_network_or_a_subnet_is_named() -> None:
    found = topology()
    for network, words in ((BLUE, "load balancer lb, port a-eth0, port b-eth0, router wan"), (TENANT, "")):
        refused(lambda n=network: network_requests.check_network_unused(found, n), Conflict, "network", words)
    refused(
        lambda: network_requests.check_subnet_unused(found, BLUE6), Conflict, "subnet", "port a-eth0, port b"
    )
    refused(lambda: network_requests.check_subnet_unused(found, SubnetId(BLUE)), Conflict, "subnet", "first")
    many = {PortId(f"p{n}"): msgspec.structs.replace(found.ports[C], id=PortId(f"p{n}")) for n in range(8)}
    crowded = msgspec.structs.replace(found, ports=many, routers={}, balancers={})
    refused(lambda: network_requests.check_network_unused(crowded, GREEN), Conflict, "network", "and 3 more")
    network_requests.check_network_unused(crowded, BLUE)
    network_requests.check_subnet_unused(crowded, BLUE6)


def test_a_subnets_gateway_changes_only_while_nobody_answers_there() -> None:
    change = network_requests.changed_subnet
    changed = change(topology(), BLUE6, SubnetChange(gateway_ip="2001:db8:1::ff", dns=("2001:db8::53",)))
    assert (changed.gateway_ip, changed.dns) == ("2001:db8:1::ff", ("2001:db8::53",))
    refused(
        lambda: change(topology(), BLUE6, SubnetChange(gateway_ip="2001:db8:1::a")), Conflict, "gateway_ip"
    )
    refused(lambda: change(topology(), SubnetId(BLUE), SubnetChange(dhcp=False)), Conflict, "subnet", "first")
    attached = routing_requests.changed_router(topology(), HOSTS, WAN, RouterChange(attach=(BLUE6,)))
    found = msgspec.structs.replace(topology(), routers={WAN: attached})
    refused(
        lambda: change(found, BLUE6, SubnetChange(gateway_ip="")),
        Conflict,
        "gateway_ip",
        "used by router wan",
    )


# --- ports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "field", "words"),
    [
        ({"network": NetworkId("nowhere")}, NotFound, "network", ""),
        ({"ip": "10.1.0.10"}, Conflict, "ip", "port a-eth0 has 10.1.0.10"),
        ({"ip": "10.1.0.200"}, Conflict, "ip", "load balancer lb"),
        ({"ip": "10.2.0.50"}, Refused, "ip", "in no subnet of blue"),
        ({"ip": "10.1.0.0"}, Refused, "ip", "subnet's own address"),
        ({"ip": "10.1.0.255"}, Refused, "ip", "broadcast"),
        ({"ip": "10.1.0.1"}, Refused, "ip", "gateway"),
        ({"ip": "10.1.0.2"}, Refused, "ip", "DHCP"),
        ({"ip": "10.1.0"}, Refused, "ip", "no IP address"),
        ({"ip": "127.0.0.1"}, Refused, "ip", ""),
        ({"addresses": ("2001:db8:1::a",)}, Conflict, "addresses", "a-eth0"),
        ({"addresses": ("2001:db8:1::1",)}, Refused, "addresses", "gateway"),
        ({"addresses": ("10.1.0.50", "10.1.0.50")}, Refused, "addresses", "twice"),
        ({"ip": "10.1.0.50", "addresses": ("10.1.0.50",)}, Refused, "addresses", "twice"),
        ({"mac": "52:54:00:4D:00:0A"}, Conflict, "mac", "a-eth0"),
        ({"mac": "52:54:00:4d:00"}, Refused, "mac", "no MAC"),
        ({"mac": "01:00:5e:00:00:01"}, Refused, "mac", "even"),
        ({"mac": "00:00:00:00:00:00"}, Refused, "mac", ""),
        ({"security_groups": (SecurityGroupId("none"),)}, NotFound, "security_groups", "web"),
        ({"allowed_pairs": (AddressPair(cidr="10.0.0.1/8"),)}, Refused, "allowed_pairs", "host bits"),
        ({"allowed_pairs": (AddressPair(cidr="10.0.0.0/8", mac="x"),)}, Refused, "allowed_pairs", "no MAC"),
        ({"bandwidth": PortBandwidth(ingress=Rate(bits_per_second=99_999))}, Refused, "ingress", "shaped"),
        ({"bandwidth": PortBandwidth(egress=Rate(bits_per_second=10**12))}, Refused, "egress", "shaped"),
        (
            {"bandwidth": PortBandwidth(egress=Rate(bits_per_second=10**6, burst_bytes=100))},
            Refused,
            "egress",
            "burst",
        ),
        ({"queues": 0}, Refused, "queues", ""),
        ({"queues": 9}, Refused, "queues", ""),
    ],
)
def test_ports_that_are_refused(
    changes: dict[str, Any], error: type[Refused], field: str, words: str
) -> None:
    request = msgspec.structs.replace(PortRequest(network=BLUE), **changes)
    refused(lambda: ports(topology(), request), error, field, words)


def ports(found: Topology, *asked: PortRequest, project: ProjectId | None = None) -> Any:
    return port_requests.new_ports(found, ServerId("new"), project or ProjectId("default"), asked)


def test_projects_keep_to_themselves() -> None:
    refused(
        lambda: ports(topology(), PortRequest(network=BLUE), project=OTHER), Refused, "network", "project"
    )
    found = topology()
    foreign = msgspec.structs.replace(found.groups[WEB], project=OTHER)
    found = msgspec.structs.replace(found, groups={WEB: foreign})
    request = PortRequest(network=BLUE, security_groups=(WEB,))
    refused(lambda: ports(found, request), Refused, "security_groups", "belongs to project other")
    change = PortChange(security_groups=(WEB,))
    refused(lambda: port_requests.changed_port(found, A, change), Refused, "security_groups", "project other")


def test_ports_of_one_server_do_not_take_each_others_addresses() -> None:
    first, second = ports(topology(), PortRequest(network=BLUE), PortRequest(network=BLUE))
    assert (first.ip, second.ip) == ("10.1.0.12", "10.1.0.13")
    assert first.mac != second.mac
    assert [p.id for p in (first, second)] == ["new-eth0", "new-eth1"]
    nine = (PortRequest(network=BLUE),) * 9
    refused(lambda: ports(topology(), *nine), Refused, "networks")


def test_the_network_that_goes_without_saying() -> None:
    assert ports(topology())[0].network == TENANT
    found = topology()
    only = msgspec.structs.replace(found, networks={GREEN: found.networks[GREEN]})
    assert ports(only)[0].network == GREEN
    two = msgspec.structs.replace(found, networks={n: found.networks[n] for n in (BLUE, GREEN)})
    refused(lambda: ports(two), Refused, "network", "name one of: blue, green")
    refused(lambda: ports(found, project=OTHER), Conflict, "network", "has no network")


def test_a_full_network() -> None:
    found = topology()
    small = msgspec.structs.replace(
        found.networks[GREEN], cidr="10.2.0.0/29", gateway_ip="10.2.0.1", dhcp_ip="10.2.0.2"
    )
    found = msgspec.structs.replace(found, networks={**found.networks, GREEN: small})
    four = ports(found, *(PortRequest(network=GREEN),) * 4)
    assert [p.ip for p in four] == ["10.2.0.3", "10.2.0.4", "10.2.0.5", "10.2.0.6"]
    refused(lambda: ports(found, *(PortRequest(network=GREEN),) * 5), Conflict, "network", "no free address")


def test_a_changed_port_keeps_what_is_not_named() -> None:
    limited = PortBandwidth(ingress=Rate(bits_per_second=10**6), egress=Rate(bits_per_second=10**6))
    found = with_port(topology(), A, security_groups=(WEB,), bandwidth=limited)
    changed = port_requests.changed_port(found, A, PortChange(egress=None))
    assert changed.bandwidth == PortBandwidth(ingress=Rate(bits_per_second=10**6))
    assert changed.security_groups == (WEB,)
    again = PortChange(security_groups=(WEB, WEB), allowed_pairs=(AddressPair(cidr="10.9.0.1"),) * 2)
    changed = port_requests.changed_port(found, A, again)
    assert (changed.security_groups, changed.allowed_pairs) == ((WEB,), (AddressPair(cidr="10.9.0.1/32"),))
    refused(lambda: port_requests.changed_port(found, PortId("none"), PortChange()), NotFound, "port", "port")


def test_an_address_made_of_a_mac() -> None:
    subnet = topology().subnets()[BLUE6]
    assert addresses.made_of_mac(subnet, "52:54:00:4d:00:0a") == "2001:db8:1:0:5054:ff:fe4d:a"


# --- security groups ---------------------------------------------------------------------------------

RULE = SecurityRule(direction=Direction.INGRESS)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"protocol": "tpc"}, "protocol", "no protocol"),
        ({"protocol": "256"}, "protocol", "no protocol"),
        ({"protocol": "-1"}, "protocol", "no protocol"),
        ({"protocol": "icmpv6"}, "protocol", "IPv4"),
        ({"port_min": 80}, "port_min", "any protocol"),
        ({"protocol": "132", "port_min": 80}, "port_min", "protocol 132"),
        ({"protocol": "tcp", "port_min": 0}, "port_min", "no port"),
        ({"protocol": "tcp", "port_min": 1, "port_max": 65536}, "port_max", "no port"),
        ({"protocol": "udp", "port_min": 90, "port_max": 80}, "port_min", "give 80 to 90"),
        ({"protocol": "icmp", "port_min": 256}, "port_min", "ICMP"),
        ({"protocol": "icmp", "port_min": 8, "port_max": 256}, "port_max", "ICMP"),
        ({"protocol": "icmp", "port_max": 0}, "port_min", "without a type"),
        ({"remote_cidr": "10.0.0.1/8"}, "remote_cidr", "write 10.0.0.0/8"),
        ({"remote_cidr": "2001:db8::/32"}, "remote_cidr", "give the family ipv6"),
        ({"remote_cidr": "10.0.0.0/8", "remote_group": WEB}, "remote_group", "two rules"),
    ],
)
def test_rules_that_are_refused(changes: dict[str, Any], field: str, words: str) -> None:
    rule = msgspec.structs.replace(RULE, **changes)
    group = topology().groups[WEB]
    refused(lambda: security_requests.with_rule(topology(), group, rule), Refused, field, words)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"protocol": "TCP", "port_min": 80}, {"protocol": "tcp", "port_min": 80, "port_max": 80}),
        ({"protocol": "6", "port_max": 80}, {"protocol": "tcp", "port_min": 80, "port_max": 80}),
        ({"protocol": "any"}, {}),
        ({"protocol": "1"}, {"protocol": "icmp"}),
        ({"protocol": "58"}, {"protocol": "58"}),
        ({"protocol": "ipv6-icmp", "family": Family.IPV6}, {"protocol": "icmp", "family": Family.IPV6}),
        ({"remote_cidr": "0.0.0.0/0"}, {}),
        ({"remote_cidr": "10.0.0.1"}, {"remote_cidr": "10.0.0.1/32"}),
        (
            {"family": Family.IPV6, "remote_cidr": "2001:DB8:0::/48"},
            {"family": Family.IPV6, "remote_cidr": "2001:db8::/48"},
        ),
        ({"remote_group": WEB}, {"remote_group": WEB}),
    ],
)
def test_rules_have_one_form(asked: dict[str, Any], kept: dict[str, Any]) -> None:
    """So that the same rule is known again, to be removed or refused as a second one."""
    group = topology().groups[WEB]
    rule = msgspec.structs.replace(RULE, **asked)
    made = security_requests.with_rule(topology(), group, rule)
    assert made.rules == (msgspec.structs.replace(RULE, **kept),)
    refused(lambda: security_requests.with_rule(topology(), made, rule), Conflict, "rule", "has that rule")
    assert security_requests.without_rule(topology(), made, rule).rules == ()
    refused(lambda: security_requests.without_rule(topology(), group, rule), NotFound, "rule", "no such rule")


def test_groups() -> None:
    made = security_requests.new_group(topology(), SecurityGroupRequest(name="new"))
    assert [(r.direction, r.family) for r in made.rules] == [("egress", "ipv4"), ("egress", "ipv6")]
    own = SecurityRule(direction=Direction.INGRESS, remote_group=SecurityGroupId("new"))
    selfish = SecurityGroupRequest(name="new", rules=(own,), project=OTHER)
    assert security_requests.new_group(topology(), selfish).rules == (own,)
    foreign = msgspec.structs.replace(selfish, rules=(msgspec.structs.replace(own, remote_group=WEB),))
    new = security_requests.new_group
    refused(lambda: new(topology(), foreign), Refused, "remote_group", "project")
    unknown = msgspec.structs.replace(own, remote_group=SecurityGroupId("none"))
    refused(
        lambda: new(topology(), SecurityGroupRequest(name="new", rules=(unknown,))), NotFound, "remote_group"
    )
    refused(lambda: new(topology(), SecurityGroupRequest(name="web")), Conflict, "name", "exists")
    full = msgspec.structs.replace(made, rules=(RULE,) * 200)
    other = msgspec.structs.replace(RULE, protocol="tcp")
    refused(lambda: security_requests.with_rule(topology(), full, other), Refused, "rule", "second group")


def test_what_uses_a_group_is_named() -> None:
    found = with_port(topology(), A, security_groups=(WEB,))
    other = SecurityGroupRequest(name="other", rules=(msgspec.structs.replace(RULE, remote_group=WEB),))
    made = security_requests.new_group(found, other)
    found = msgspec.structs.replace(found, groups={**found.groups, made.id: made})
    refused(
        lambda: security_requests.check_group_unused(found, WEB),
        Conflict,
        "security_group",
        "port a-eth0, security group other",
    )
    security_requests.check_group_unused(found, made.id)
    refused(
        lambda: security_requests.check_group_unused(found, SecurityGroupId("x")), NotFound, "security_group"
    )


# --- routers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "field", "words"),
    [
        ({"attach": ("nowhere",)}, NotFound, "subnet", ""),
        ({"attach": ("blue",)}, Conflict, "subnet", "attached to router wan"),
        ({"attach": ("alone",)}, Conflict, "subnet", "10.1.0.0/24 of alone overlaps 10.1.0.0/24 of blue"),
        ({"attach": ("tenant",)}, Conflict, "subnet", "its uplink at edge-1"),
        ({"detach": ("alone",)}, NotFound, "subnet", "attached: blue, green"),
        ({"detach": ("green",)}, Conflict, "subnet", "used by route 192.168.0.0/16"),
        ({"detach": ("blue",)}, Conflict, "subnet", "used by floating IP front"),
        ({"gateway": None}, Conflict, "gateway", "floating IP front"),
        (
            {"gateway": RouterGateway(host=HostId("x"), address="203.0.113.3")},
            NotFound,
            "gateway.host",
            "edge-1",
        ),
        ({"gateway": RouterGateway(host=H1, address="203.0.113.3")}, Refused, "gateway.host", "compute"),
        ({"gateway": RouterGateway(host=EDGE, address="203.0.113.10")}, Conflict, "gateway.address", "front"),
        (
            {"gateway": RouterGateway(host=EDGE, address="10.1.0.9")},
            Conflict,
            "gateway.address",
            "lies in blue",
        ),
        ({"gateway": RouterGateway(host=EDGE, address="10.77.0.9")}, Conflict, "gateway.address", "tenant"),
        ({"gateway": RouterGateway(host=EDGE, address="::1")}, Refused, "gateway.address", "no address of"),
    ],
)
def test_changes_of_a_router_that_are_refused(
    change: dict[str, Any], error: type[Refused], field: str, words: str
) -> None:
    asked = RouterChange(**change)
    refused(lambda: routing_requests.changed_router(topology(), HOSTS, WAN, asked), error, field, words)


@pytest.mark.parametrize(
    ("destination", "next_hop", "error", "field", "words"),
    [
        ("192.168.1.1/24", "10.1.0.10", Refused, "destination", "host bits"),
        ("192.168.0.0/16", "10.1.0.10", Conflict, "destination", "has a route"),
        ("172.16.0.0/12", "10.9.0.1", Refused, "next_hop", "in no subnet attached"),
        ("172.16.0.0/12", "10.1.0.1", Refused, "next_hop", "itself"),
        ("172.16.0.0/12", "2001:db8:1::a", Refused, "next_hop", "family"),
        ("172.16.0.0/12", "0.0.0.0", Refused, "next_hop", ""),
        ("10.2.0.0/24", "10.1.0.10", Conflict, "destination", "is attached"),
    ],
)
def test_routes_that_are_refused(
    destination: str, next_hop: str, error: type[Refused], field: str, words: str
) -> None:
    asked = RouterChange(add_routes=(Route(destination=destination, next_hop=next_hop),))
    refused(lambda: routing_requests.changed_router(topology(), HOSTS, WAN, asked), error, field, words)


def test_one_change_can_exchange_things() -> None:
    asked = RouterChange(
        remove_routes=(Route(destination="192.168.0.0/16", next_hop="10.2.0.10"),),
        detach=(SubnetId(GREEN),),
        attach=(BLUE6,),
        add_routes=(Route(destination="2001:db8:9::/48", next_hop="2001:db8:1::a"),),
    )
    changed = routing_requests.changed_router(topology(), HOSTS, WAN, asked)
    assert [i.subnet for i in changed.interfaces] == ["blue", "blue6"]
    assert [r.destination for r in changed.routes] == ["2001:db8:9::/48"]
    gone = RouterChange(remove_routes=(Route(destination="1.0.0.0/8", next_hop="10.2.0.10"),))
    refused(
        lambda: routing_requests.changed_router(topology(), HOSTS, WAN, gone), NotFound, "destination", "by"
    )


def test_routers() -> None:
    new = routing_requests.new_router
    made = new(topology(), RouterRequest(name="new", subnets=(SubnetId("alone"),)))
    assert (made.number, made.interfaces[0].ip) == (3, "10.1.0.1"), "after the router's and the balancer's"
    refused(lambda: new(topology(), RouterRequest(name="wan")), Conflict, "name", "exists")
    mine = RouterRequest(name="new", project=OTHER, subnets=(SubnetId("alone"),))
    refused(lambda: new(topology(), mine), Refused, "subnet", "project default")
    refused(
        lambda: routing_requests.check_router_unused(topology(), WAN),
        Conflict,
        "router",
        "floating IP front, subnet blue, subnet green",
    )
    refused(lambda: routing_requests.known_router(topology(), RouterId("x")), NotFound, "router", "wan")
    no_way = msgspec.structs.replace(topology(), uplinks={})
    gateway = RouterChange(gateway=RouterGateway(host=EDGE, address="203.0.113.9"))
    refused(
        lambda: routing_requests.changed_router(no_way, HOSTS, WAN, gateway),
        Conflict,
        "gateway.host",
        "external",
    )


# --- floating IPs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "fixed_ip", "error", "field", "words"),
    [
        ("nobody", "", NotFound, "port", "no port"),
        (A, "10.1.0.11", Refused, "fixed_ip", "no address of a-eth0"),
        (A, "2001:db8:1::a", Refused, "fixed_ip", "another family"),
        (B, "", Conflict, "port", "has floating IP front"),
        (D, "", Conflict, "port", "attached to no router"),
    ],
)
def test_assignments_that_are_refused(
    port: str, fixed_ip: str, error: type[Refused], field: str, words: str
) -> None:
    spare = topology().floating_ips[FloatingIpId("spare")]
    asked = Assignment(port=PortId(port), fixed_ip=fixed_ip)
    refused(lambda: routing_requests.assigned(topology(), spare, asked), error, field, words)


def test_floating_ips() -> None:
    spare = topology().floating_ips[FloatingIpId("spare")]
    made = routing_requests.assigned(topology(), spare, Assignment(port=C))
    assert (made.port, made.fixed_ip, made.router) == (C, "10.2.0.10", WAN)
    front = topology().floating_ips[FloatingIpId("front")]
    assert routing_requests.assigned(topology(), front, Assignment(port=B)) == front, "again is no conflict"
    closed = with_router(topology(), gateway=None)
    refused(
        lambda: routing_requests.assigned(closed, spare, Assignment(port=C)), Conflict, "port", "no gateway"
    )
    foreign = msgspec.structs.replace(spare, project=OTHER)
    refused(
        lambda: routing_requests.assigned(topology(), foreign, Assignment(port=C)), Refused, "port", "project"
    )
    new = routing_requests.new_floating_ip
    for address, error in (("203.0.113.2", Conflict), ("203.0.113.11", Conflict), ("10.77.0.50", Conflict)):
        request = FloatingIpRequest(name="new", address=address)
        refused(lambda r=request, e=error: new(topology(), r), error, "address")
    refused(lambda: new(topology(), FloatingIpRequest(name="new", address="ff02::1")), Refused, "address")
    refused(lambda: new(topology(), FloatingIpRequest(name="spare", address="1.2.3.4")), Conflict, "name")
    six = FloatingIpRequest(name="six", address="2001:db8:f::1")
    refused(lambda: new(topology(), six), Refused, "address", "give an IPv4 address")


# --- load balancers ----------------------------------------------------------------------------------

LB = LoadBalancerId("lb")


@pytest.mark.parametrize(
    ("changes", "error", "field", "words"),
    [
        ({"name": "lb"}, Conflict, "name", "exists"),
        ({"network": NetworkId("nowhere")}, NotFound, "network", ""),
        ({"project": OTHER}, Refused, "network", "project"),
        ({"port": 0}, Refused, "port", "no port"),
        ({"vip": "10.9.0.1"}, Refused, "vip", "in no subnet"),
        ({"vip": "10.1.0.1"}, Refused, "vip", "gateway"),
        ({"vip": "10.1.0.10"}, Conflict, "vip", "a-eth0"),
        ({"vip": "10.1.0.200"}, Conflict, "vip", "load balancer lb"),
        ({"host": HostId("x")}, NotFound, "host", "host-1"),
        ({"host": EDGE}, Refused, "host", "edge"),
        ({"members": (Member(address="10.9.0.1", port=80),)}, Refused, "members.address", "not in network"),
        (
            {"members": (Member(address="10.1.0.5", port=80, weight=-1),)},
            Refused,
            "members.weight",
            "0 to 256",
        ),
        ({"members": (Member(address="10.1.0.5", port=80, weight=257),)}, Refused, "members.weight", ""),
        ({"members": (Member(address="10.1.0.5", port=65536),)}, Refused, "members.port", ""),
        ({"members": (Member(address="2001:db8:1::a", port=80),)}, Refused, "members.address", "family"),
        (
            {"vip": "10.1.0.7", "members": (Member(address="10.1.0.7", port=80),)},
            Refused,
            "members.address",
            "itself",
        ),
        ({"health": HealthCheck(interval_ms=99)}, Refused, "health.interval_ms", "100"),
        ({"health": HealthCheck(timeout_ms=600_001)}, Refused, "health.timeout_ms", ""),
        ({"health": HealthCheck(fall=0)}, Refused, "health.fall", ""),
        ({"health": HealthCheck(rise=101)}, Refused, "health.rise", ""),
    ],
)
def test_load_balancers_that_are_refused(
    changes: dict[str, Any], error: type[Refused], field: str, words: str
) -> None:
    request = msgspec.structs.replace(LoadBalancerRequest(name="new", network=BLUE, port=80), **changes)
    refused(lambda: balancer_requests.new_balancer(topology(), HOSTS, request), error, field, words)


def test_load_balancers() -> None:
    request = LoadBalancerRequest(name="new", network=BLUE, port=80)
    made = balancer_requests.new_balancer(topology(), HOSTS, request)
    assert (made.vip, made.host, made.number) == ("10.1.0.12", H1, 3), "host-2 carries one already"
    six = msgspec.structs.replace(request, vip="2001:db8:1::7", host=H2)
    assert balancer_requests.new_balancer(topology(), HOSTS, six).vip == "2001:db8:1::7"
    refused(lambda: balancer_requests.new_balancer(topology(), {}, request), Conflict, "host", "joined")
    change = balancer_requests.changed_balancer
    gone = LoadBalancerChange(remove_members=(MemberName(address="10.1.0.99", port=1),))
    refused(lambda: change(topology(), HOSTS, LB, gone), NotFound, "members", "10.1.0.10:8080")
    many = tuple(Member(address="10.1.0.10", port=n + 1) for n in range(101))
    refused(lambda: change(topology(), HOSTS, LB, LoadBalancerChange(put_members=many)), Refused, "members")
    slow = LoadBalancerChange(health=HealthCheck(interval_ms=5000), host=H1)
    changed = change(topology(), HOSTS, LB, slow)
    assert (changed.health.interval_ms, changed.host, len(changed.members)) == (5000, H1, 3)


# --- the underlay ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("underlay", "error", "field"),
    [
        (Underlay(mtu=1329), Refused, "mtu"),
        (Underlay(mtu=65536), Refused, "mtu"),
        (Underlay(mtu=1549), Conflict, "mtu"),
        (Underlay(shares=UnderlayShares(bits_per_second=999_999)), Refused, "bits_per_second"),
        (Underlay(shares=UnderlayShares(bits_per_second=10**9, control=20)), Refused, "control"),
        (Underlay(shares=UnderlayShares(bits_per_second=10**9, control=40, tenants=30)), None, ""),
        (Underlay(shares=UnderlayShares(bits_per_second=10**9, control=0, moves=40)), Refused, "control"),
        (Underlay(mtu=1550), None, ""),
        (Underlay(), None, ""),
    ],
)
def test_the_underlay(underlay: Underlay, error: type[Refused] | None, field: str) -> None:
    def check() -> object:
        return underlay_requests.checked_underlay(underlay, topology().networks)

    if error is None:
        assert check() == underlay
    else:
        refused(check, error, field)


# --- properties --------------------------------------------------------------------------------------

ranges = st.tuples(st.integers(0, 2**32 - 1), st.integers(8, 29)).map(
    lambda drawn: ipaddress.ip_network((drawn[0] >> (32 - drawn[1]) << (32 - drawn[1]), drawn[1]))
)


@given(cidr=ranges)
def test_whatever_range_is_accepted_holds_its_own_addresses_and_servers(cidr: Any) -> None:
    request = NetworkRequest(name="new", cidr=str(cidr))
    try:
        made = network_requests.new_network(topology(), request, 0)
    except Refused as refusal:
        assert refusal.field == "cidr"
        assert refusal.remedy
        return
    found = msgspec.structs.replace(topology(), networks={made.id: made}, routers={}, balancers={})
    first, second = ports(found, PortRequest(network=made.id), PortRequest(network=made.id))
    special = [made.gateway_ip, made.dhcp_ip, str(cidr.network_address), str(cidr.broadcast_address)]
    given_out = [*special, first.ip, second.ip]
    assert len(set(given_out)) == len(given_out)
    assert all(ipaddress.ip_address(address) in cidr for address in given_out)
    for address in special:
        refused(lambda a=address: ports(found, PortRequest(network=made.id, ip=a)), Refused, "ip")


@given(first=ranges, second=ranges)
def test_two_subnets_meet_in_a_router_only_if_they_share_no_address(first: Any, second: Any) -> None:
    found = msgspec.structs.replace(topology(), networks={}, ports={}, routers={}, balancers={})
    try:
        for name, cidr in (("one", first), ("two", second)):
            made = network_requests.new_network(found, NetworkRequest(name=name, cidr=str(cidr)), 0)
            found = msgspec.structs.replace(found, networks={**found.networks, made.id: made})
    except Refused:
        return
    request = RouterRequest(name="both", subnets=(SubnetId("one"), SubnetId("two")))
    if first.overlaps(second):
        refused(lambda: routing_requests.new_router(found, request), Conflict, "subnet", "overlaps")
    else:
        assert len(routing_requests.new_router(found, request).interfaces) == 2


@given(low=st.integers(-5, 70000) | st.none(), high=st.integers(-5, 70000) | st.none())
def test_a_range_of_ports_is_valid_or_refused(low: int | None, high: int | None) -> None:
    rule = SecurityRule(direction=Direction.INGRESS, protocol="tcp", port_min=low, port_max=high)
    group = topology().groups[WEB]
    try:
        kept = security_requests.with_rule(topology(), group, rule).rules[0]
    except Refused as refusal:
        assert refusal.field in ("port_min", "port_max")
        return
    if low is None and high is None:
        assert (kept.port_min, kept.port_max) == (None, None)
    else:
        assert kept.port_min is not None and kept.port_max is not None
        assert 1 <= kept.port_min <= kept.port_max <= 65535
    assert security_requests.checked_rule(topology(), group, kept) == kept, "canonical once, canonical always"


@given(text=st.text(max_size=40))
def test_no_text_makes_validation_fail_otherwise_than_by_refusing(text: str) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: addresses.checked_unicast(text, "f"),
        lambda: addresses.checked_prefix(text, "f"),
        lambda: addresses.checked_mac(text, "f"),
        lambda: security_requests.checked_protocol(text, Family.IPV4),
        lambda: network_requests.new_network(topology(), NetworkRequest(name=text, cidr=text), 0),
    )
    for call in calls:
        try:
            call()
        except Refused as refusal:
            assert refusal.field


# --- networks that are one with an outside one -----------------------------------------------------------


def _outside(**asked: Any) -> NetworkRequest:
    return NetworkRequest(name="office", cidr="10.50.0.0/24", **{"provider_interface": "eth1", **asked})


def test_a_network_is_made_one_with_an_outside_one() -> None:
    flat = network_requests.new_network(topology(), _outside(), 0)
    tagged = network_requests.new_network(topology(), _outside(vlan=205), 0)
    assert flat.provider is not None
    assert tagged.provider is not None
    assert (flat.provider.interface, flat.provider.vlan) == ("eth1", 0)
    assert tagged.provider.vlan == 205
    assert network_requests.new_network(topology(), _outside(provider_interface=""), 0).provider is None


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"vlan": 4095}, "vlan"),
        ({"vlan": -1}, "vlan"),
        ({"provider_interface": "", "vlan": 5}, "provider_interface"),
        ({"provider_interface": "x" * 16}, "provider_interface"),
        ({"provider_interface": "eth 1"}, "provider_interface"),
        ({"provider_interface": "../eth1"}, "provider_interface"),
    ],
)
def test_what_is_no_outside_network(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(Refused) as refused:
        network_requests.new_network(topology(), _outside(**asked), 0)
    assert refused.value.field == field
    assert refused.value.remedy


def test_what_an_interface_carries_only_one_network_can_be() -> None:
    there = topology()
    for vlan, field in ((0, "provider_interface"), (205, "vlan")):
        first = network_requests.new_network(there, _outside(vlan=vlan), 0)
        known = msgspec.structs.replace(there, networks={**there.networks, first.id: first})
        with pytest.raises(Conflict, match="belongs to network office") as refused:
            network_requests.new_network(known, msgspec.structs.replace(_outside(vlan=vlan), name="other"), 0)
        assert refused.value.field == field
        beside = msgspec.structs.replace(_outside(vlan=vlan + 1), name="other")
        assert network_requests.new_network(known, beside, 0).provider is not None


def test_a_way_out_is_not_given_away() -> None:
    there = topology(external={EDGE: "eth1"})
    with pytest.raises(Conflict) as refused:
        network_requests.new_network(there, _outside(), 0)
    assert refused.value.field == "provider_interface"
    assert network_requests.new_network(there, _outside(vlan=7), 0).provider is not None


def test_what_belongs_to_the_outside_is_not_made_inside() -> None:
    there = topology()
    office = network_requests.new_network(there, _outside(), 0)
    known = msgspec.structs.replace(there, networks={**there.networks, office.id: office})
    with pytest.raises(Refused) as refused:
        routing_requests.new_router(known, RouterRequest(name="r", subnets=(SubnetId("office"),)))
    assert refused.value.field == "subnet"
    with pytest.raises(Refused) as refused:
        balancer_requests.new_balancer(
            known, HOSTS, LoadBalancerRequest(name="lb9", network=office.id, port=80)
        )
    assert refused.value.field == "network"


def test_a_named_ipv6_address_is_beside_the_one_that_the_mac_makes() -> None:
    """A machine gives itself that one in any case, and its guard lets through what its port knows."""
    there = topology()

    def asked(*further: str, mac: str = "52:54:00:4d:00:77") -> tuple[str, ...]:
        request = PortRequest(network=BLUE, mac=mac, addresses=further)
        (port,) = port_requests.new_ports(there, ServerId("new"), ProjectId("default"), (request,))
        return port.addresses

    made = addresses.made_of_mac(there.subnets()[BLUE6], "52:54:00:4d:00:77")
    assert asked() == (made,)
    assert asked("2001:db8:1::77") == ("2001:db8:1::77", made)
    assert asked(made) == (made,)
    taken = with_port(there, A, addresses=(made,))
    request = PortRequest(network=BLUE, mac="52:54:00:4d:00:77")
    with pytest.raises(Conflict) as refused:
        port_requests.new_ports(taken, ServerId("new"), ProjectId("default"), (request,))
    assert refused.value.field == "mac"
