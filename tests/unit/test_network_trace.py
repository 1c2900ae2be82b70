"""What a trace says of a packet: every way it can go, and every place where it can end."""

from typing import Any

import msgspec
import pytest
from virtual_network import (
    ALONE,
    BLUE,
    EDGE,
    H1,
    PLACES,
    WAN,
    WEB,
    A,
    B,
    C,
    D,
    E,
    topology,
    with_balancer,
    with_group,
    with_port,
    with_router,
)

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import PortId, RouterId, SecurityGroupId, SubnetId
from nahtlos.model.networking import (
    AddressPair,
    Direction,
    Family,
    Member,
    Route,
    RouterGateway,
    RouterInterface,
    RouterSpec,
    SecurityRule,
)
from nahtlos.model.topology import Topology
from nahtlos.runtime.controllers.networks import Fate, Outcome, Trace, TraceRequest
from nahtlos.runtime.controllers.trace import trace

IN, OUT = Direction.INGRESS, Direction.EGRESS


def asked(port: PortId, address: str, found: Topology | None = None, **more: Any) -> Trace:
    places = more.pop("places", PLACES)
    return trace(found or topology(), places, TraceRequest(port=port, address=address, **more))


def dropped(seen: Trace, because: str) -> None:
    assert seen.fate is Fate.DROPPED, seen
    assert because in seen.reason, seen.reason
    assert seen.steps[-1].outcome is Outcome.DROPPED


def said(seen: Trace) -> str:
    return "\n".join(f"{s.where}: {s.what}" for s in seen.steps)


def strict(*rules: SecurityRule, of: PortId = B, found: Topology | None = None) -> Topology:
    """`of` is in the group `web`, which has exactly these rules."""
    return with_port(with_group(found or topology(), rules=rules), of, security_groups=(WEB,))


# --- in one network ----------------------------------------------------------------------------------


def test_neighbours_on_two_hosts_reach_each_other_through_the_tunnel() -> None:
    seen = asked(A, "10.1.0.11")
    assert (seen.fate, seen.reason) == (Fate.DELIVERED, "to port b-eth0 of b at host-2")
    assert (seen.source, seen.destination) == ("10.1.0.10", "10.1.0.11")
    assert "tunnel to host host-2" in said(seen)
    assert "no security group: open" in said(seen)
    assert "tunnel" not in said(asked(A, "10.1.0.11", places={**PLACES, B: H1}))
    assert "same host" in said(asked(A, "10.1.0.11", places={**PLACES, B: H1}))


def test_ipv6_goes_from_the_ports_ipv6_address() -> None:
    seen = asked(A, "2001:db8:1:0::b")
    assert seen.fate is Fate.DELIVERED
    assert seen.source == "2001:db8:1::a"


@pytest.mark.parametrize("address", ["10.1.0.10", "2001:db8:1::a"])
def test_ones_own_address_never_leaves_the_server(address: str) -> None:
    assert asked(A, address).reason == "within the server"


def test_nobody_answers_for_an_address_that_nobody_has() -> None:
    dropped(asked(A, "10.1.0.99"), "nobody has 10.1.0.99")


def test_an_allowed_pair_may_answer_for_an_address() -> None:
    pair = (AddressPair(cidr="10.1.0.96/28"),)
    seen = asked(A, "10.1.0.99", with_port(topology(), B, allowed_pairs=pair))
    assert seen.fate is Fate.DELIVERED
    assert "may be answered for by b-eth0" in said(seen)


def test_what_every_port_gets() -> None:
    for address in ("255.255.255.255", "10.1.0.255", "224.0.0.251"):
        assert asked(A, address).reason == "to all of blue"


def test_the_host_itself_answers_dhcp_and_names() -> None:
    found = strict(of=A)
    assert asked(A, "10.1.0.2", found, protocol="udp", number=53).reason == "by host-1 itself"


def test_the_router_answers_at_the_gateway_address() -> None:
    assert asked(A, "10.1.0.1").reason == "to router wan, which answers pings"
    assert asked(E, "10.77.0.1").reason == "to the gateway at edge-1"


def test_a_server_that_is_nowhere_neither_sends_nor_receives() -> None:
    dropped(asked(A, "10.1.0.11", places={B: H1}), "its server is on no host")
    dropped(asked(A, "10.1.0.11", places={A: H1}), "its server is on no host")


# --- spoofing ----------------------------------------------------------------------------------------


def test_only_own_addresses_and_allowed_pairs_may_be_sent_from() -> None:
    dropped(asked(A, "10.1.0.11", source="10.1.0.66"), "anti-spoofing: 10.1.0.66 is none of")
    pair = (AddressPair(cidr="10.1.0.64/26", mac="02:00:00:00:00:01"),)
    found = with_port(topology(), A, allowed_pairs=pair)
    seen = asked(A, "10.1.0.11", found, source="10.1.0.66")
    assert seen.fate is Fate.DELIVERED
    assert "allowed pair 10.1.0.64/26 from 02:00:00:00:00:01" in said(seen)
    with pytest.raises(Refused, match="different families"):
        asked(A, "10.1.0.11", source="2001:db8:1::a")


def test_a_port_without_an_address_of_that_family() -> None:
    dropped(asked(C, "2001:db8::1"), "no address of ipv6")
    assert asked(C, "2001:db8::1", direction=IN).destination == ""


# --- security groups ---------------------------------------------------------------------------------


def rule(direction: Direction = IN, **more: Any) -> SecurityRule:
    return SecurityRule(direction=direction, **more)


HTTP = rule(protocol="tcp", port_min=80, port_max=89)
PEERS = SecurityGroupId("peers")


@pytest.mark.parametrize(
    ("made", "more", "why_not"),
    [
        (HTTP, {"protocol": "tcp", "number": 80}, ""),
        (HTTP, {"protocol": "tcp", "number": 89}, ""),
        (HTTP, {"protocol": "tcp", "number": 90}, "is for port 80-89"),
        (HTTP, {"protocol": "tcp"}, "is for port 80-89, and none is given"),
        (HTTP, {"protocol": "udp", "number": 80}, "is for tcp"),
        (rule(OUT), {}, "is for egress"),
        (rule(family=Family.IPV6), {}, "is for ipv6"),
        (rule(), {}, ""),
        (rule(), {"protocol": "132"}, ""),
        (rule(protocol="132"), {"protocol": "132"}, ""),
        (rule(protocol="icmp", port_min=8), {"number": 8}, ""),
        (rule(protocol="icmp", port_min=8, port_max=0), {"number": 8}, ""),
        (rule(protocol="icmp", port_min=8), {"number": 13}, "is for type 8"),
        (rule(remote_cidr="10.1.0.0/28"), {}, ""),
        (rule(remote_cidr="10.1.0.11/32"), {}, "10.1.0.10 is not in 10.1.0.11/32"),
        (rule(remote_group=WEB), {}, "10.1.0.10 is in no port of web"),
        (rule(remote_group=PEERS), {}, ""),
    ],
)
def test_the_receivers_rules_one_by_one(made: SecurityRule, more: dict[str, Any], why_not: str) -> None:
    found = with_port(with_group(strict(made), PEERS, rules=()), A, security_groups=(PEERS,))
    found = with_group(found, PEERS, rules=(rule(OUT), rule(OUT, family=Family.IPV6)))
    seen = asked(A, "10.1.0.11", found, **more)
    checked = seen.steps[-1].checked
    assert len(checked) == 1
    if why_not:
        dropped(seen, "no rule of web allows it")
        assert checked[0].endswith(f": {why_not}"), checked
    else:
        assert seen.fate is Fate.DELIVERED
        assert checked[0].endswith(": allows it")
        assert "rule 1 of web allows it; answers pass" in seen.steps[-1].what


def test_the_first_rule_that_fits_is_named_and_the_ones_before_it() -> None:
    found = strict(rule(protocol="udp"), HTTP, rule())
    step = asked(A, "10.1.0.11", found, protocol="tcp", number=81).steps[-1]
    assert "rule 2 of web" in step.what
    assert step.checked == (
        "web 1: ingress ipv4 udp from anywhere: is for udp",
        "web 2: ingress ipv4 tcp 80-89 from anywhere: allows it",
    )


def test_a_group_without_memory_says_so() -> None:
    found = with_group(strict(rule()), stateful=False)
    assert "answers need a rule of their own" in asked(A, "10.1.0.11", found).steps[-1].what


def test_several_groups_and_one_that_is_gone() -> None:
    found = with_port(strict(), B, security_groups=(WEB, SecurityGroupId("gone"), PEERS))
    seen = asked(A, "10.1.0.11", with_group(found, PEERS, rules=(HTTP,)))
    dropped(seen, "no rule of web, gone, peers allows it")
    assert seen.steps[-1].checked[0] == "gone: there is no such group"


def test_the_senders_rules_come_first() -> None:
    found = strict(rule(), of=A)
    seen = asked(A, "10.1.0.11", found)
    dropped(seen, "egress: no rule of web allows it")
    allowed = strict(rule(OUT, remote_cidr="10.1.0.11/32"), of=A)
    assert asked(A, "10.1.0.11", allowed).fate is Fate.DELIVERED
    dropped(asked(A, "10.1.0.12", allowed), "no rule of web")


# --- routers -----------------------------------------------------------------------------------------


def test_a_router_joins_its_subnets_where_the_sender_is() -> None:
    seen = asked(A, "10.2.0.10")
    assert seen.reason == "to port c-eth0 of c at host-2"
    assert "router wan at host-1: 10.2.0.10 is in green, attached here" in said(seen)
    dropped(asked(A, "10.2.0.99"), "nobody has 10.2.0.99")


def test_two_networks_with_the_same_addresses_never_meet() -> None:
    assert asked(D, "10.1.0.10").reason == "within the server"
    dropped(asked(D, "10.1.0.11"), "network alone: nobody has 10.1.0.11")
    dropped(asked(D, "10.2.0.10"), "attached to no router")
    assert asked(C, "10.1.0.10").reason == "to port a-eth0 of a at host-1"


def test_without_a_gateway_there_is_no_way_out() -> None:
    blue = topology().networks[BLUE]
    six = msgspec.structs.replace(blue.subnets[0], gateway_ip="")
    networks = {**topology().networks, BLUE: msgspec.structs.replace(blue, subnets=(six,))}
    dropped(asked(A, "2001:db8:9::9", topology(networks=networks)), "has no gateway")
    dropped(asked(A, "2001:db8:9::9"), "attached to no router")
    dropped(asked(A, "8.8.8.8", with_router(topology(), gateway=None)), "no route to 8.8.8.8 and no gateway")


def test_a_source_of_no_subnet_knows_no_gateway() -> None:
    found = with_port(topology(), A, allowed_pairs=(AddressPair(cidr="172.16.0.0/12"),))
    dropped(asked(A, "8.8.8.8", found, source="172.16.0.1"), "is in none of its subnets")


def test_a_static_route_leads_to_its_next_hop() -> None:
    seen = asked(A, "192.168.5.5")
    assert seen.reason == "to port c-eth0, the next hop to 192.168.5.5"
    assert "route 192.168.0.0/16 by 10.2.0.10" in said(seen)
    dropped(asked(A, "192.168.5.5", strict(HTTP, of=C)), "no rule of web allows it")


def test_the_most_exact_route_wins() -> None:
    routes = (*topology().routers[WAN].routes, Route(destination="192.168.5.0/24", next_hop="10.1.0.11"))
    assert "b-eth0, the next hop" in asked(A, "192.168.5.5", with_router(topology(), routes=routes)).reason


def test_a_next_hop_that_nobody_has() -> None:
    routes = (Route(destination="192.168.0.0/16", next_hop="10.2.0.66"),)
    dropped(asked(A, "192.168.5.5", with_router(topology(), routes=routes)), "nobody has 10.2.0.66, the next")
    away = (Route(destination="192.168.0.0/16", next_hop="10.8.0.66"),)
    dropped(asked(A, "192.168.5.5", with_router(topology(), routes=away)), "in no subnet attached here")


# --- the way out -------------------------------------------------------------------------------------


def test_a_router_translates_what_leaves() -> None:
    seen = asked(A, "8.8.8.8")
    assert (seen.fate, seen.reason) == (Fate.LEAVES, "by out0 of edge-1 as 203.0.113.2")
    assert "SNAT: 10.1.0.10 becomes 203.0.113.2" in said(seen)
    assert "tunnel to host edge-1" in said(seen)


def test_a_floating_ip_takes_the_place_of_the_routers_address() -> None:
    seen = asked(B, "8.8.8.8")
    assert seen.reason == "by out0 of edge-1 as 203.0.113.10"
    assert [s.outcome for s in seen.steps].count(Outcome.TRANSLATED) == 1


def test_a_router_that_does_not_translate() -> None:
    plain = RouterGateway(host=EDGE, address="203.0.113.2", snat=False)
    seen = asked(A, "8.8.8.8", with_router(topology(), gateway=plain))
    assert seen.reason == "by out0 of edge-1 as 10.1.0.10"


def test_ipv6_is_not_translated_to_an_ipv4_address() -> None:
    six = RouterInterface(subnet=SubnetId("blue6"), network=BLUE, ip="2001:db8:1::1")
    interfaces = (*topology().routers[WAN].interfaces, six)
    seen = asked(A, "2001:db8:9::9", with_router(topology(), interfaces=interfaces))
    assert seen.reason == "by out0 of edge-1 as 2001:db8:1::a"


def test_a_gateway_host_without_an_interface() -> None:
    dropped(asked(A, "8.8.8.8", topology(uplinks={})), "no interface to the outside")
    assert asked(A, "8.8.8.8", topology(external={EDGE: "wan0"})).reason.startswith("by wan0 of edge-1")


def test_an_uplink_of_its_own_translates_nothing() -> None:
    seen = asked(E, "8.8.8.8")
    assert (seen.fate, seen.reason) == (Fate.LEAVES, "by out0 of edge-1")
    assert "as it is" in said(seen)


def test_a_floating_ip_is_reached_from_inside_too() -> None:
    seen = asked(A, "203.0.113.10")
    assert seen.reason == "to port b-eth0 of b at host-2"
    assert [s.what for s in seen.steps if s.outcome is Outcome.TRANSLATED] == [
        "SNAT: 10.1.0.10 becomes 203.0.113.2",
        "floating IP front: 203.0.113.10 becomes 10.1.0.11",
    ]
    only_inside = strict(rule(remote_cidr="10.1.0.0/24"))
    dropped(asked(A, "203.0.113.10", only_inside), "no rule of web allows it")
    dropped(asked(A, "203.0.113.11"), "203.0.113.11 is assigned to no port")


# --- the way in --------------------------------------------------------------------------------------


def test_a_router_answers_at_its_outside_address() -> None:
    assert asked(A, "203.0.113.2").reason == "to router wan, which answers pings"


def test_from_a_neighbour_its_own_rules_count() -> None:
    assert asked(B, "10.1.0.10", direction=IN).reason == "to port b-eth0 of b at host-2"
    dropped(asked(B, "10.1.0.10", strict(of=A), direction=IN), "port a-eth0: egress")
    dropped(asked(B, "10.1.0.99", direction=IN), "nobody in it has 10.1.0.99")


def test_from_the_other_side_of_the_router() -> None:
    seen = asked(C, "10.1.0.10", direction=IN, protocol="tcp", number=5432)
    assert (seen.source, seen.destination) == ("10.1.0.10", "10.2.0.10")
    assert seen.steps[0].where == "port a-eth0"
    assert seen.fate is Fate.DELIVERED


def test_from_the_outside_by_a_floating_ip() -> None:
    seen = asked(B, "8.8.8.8", direction=IN, protocol="tcp", number=80)
    assert seen.fate is Fate.DELIVERED
    assert seen.steps[0].what == "floating IP front: 203.0.113.10 becomes 10.1.0.11"
    dropped(asked(B, "8.8.8.8", strict(), direction=IN), "ingress: no rule")


def test_from_the_outside_without_one() -> None:
    dropped(asked(A, "8.8.8.8", direction=IN), "nothing outside leads to 10.1.0.10")


def test_from_the_outside_into_a_network_with_an_uplink() -> None:
    seen = asked(E, "8.8.8.8", direction=IN)
    assert seen.fate is Fate.DELIVERED
    assert "comes in by out0" in said(seen)


# --- load balancers ----------------------------------------------------------------------------------


def test_a_load_balancer_shares_among_members_that_take_connections() -> None:
    seen = asked(A, "10.1.0.200", protocol="tcp", number=80)
    assert seen.reason == "by lb to 10.1.0.10:8080 or 10.1.0.11:8080"
    assert "10.1.0.10:8080 75%, 10.1.0.11:8080 25%" in said(seen)
    assert "10.1.0.12" not in said(seen), "it drains"


def test_members_rules_see_the_load_balancer() -> None:
    only_balancer = strict(rule(remote_cidr="10.1.0.200/32", protocol="tcp", port_min=8080))
    seen = asked(A, "10.1.0.200", only_balancer, protocol="tcp", number=80)
    assert seen.reason == "by lb to 10.1.0.10:8080 or 10.1.0.11:8080"
    closed = asked(A, "10.1.0.200", strict(), protocol="tcp", number=80)
    assert closed.reason == "by lb to 10.1.0.10:8080; 1 of 2 members cannot be reached"
    alone = with_balancer(strict(), members=(Member(address="10.1.0.11", port=8080),))
    seen = asked(A, "10.1.0.200", alone, protocol="tcp", number=80)
    assert seen.fate is Fate.DROPPED
    assert "no rule of web" in seen.reason


@pytest.mark.parametrize(
    ("more", "fate", "because"),
    [
        ({"protocol": "tcp", "number": 81}, Fate.DROPPED, "TCP port 80 and nothing else"),
        ({"protocol": "udp", "number": 80}, Fate.DROPPED, "TCP port 80 and nothing else"),
        ({"protocol": "tcp"}, Fate.DROPPED, "TCP port 80 and nothing else"),
        ({}, Fate.DELIVERED, "to load balancer lb"),
    ],
)
def test_a_load_balancer_takes_only_its_port(more: dict[str, Any], fate: Fate, because: str) -> None:
    seen = asked(A, "10.1.0.200", **more)
    assert seen.fate is fate
    assert because in seen.reason


@pytest.mark.parametrize(
    "members",
    [
        (),
        (Member(address="10.1.0.10", port=80, weight=0),),
        (Member(address="10.1.0.10", port=80, draining=True),),
    ],
)
def test_a_load_balancer_that_has_nobody(members: tuple[Member, ...]) -> None:
    found = with_balancer(topology(), members=members)
    dropped(asked(A, "10.1.0.200", found, protocol="tcp", number=80), "no member that takes new connections")


def test_a_load_balancer_is_reached_through_a_router() -> None:
    seen = asked(C, "10.1.0.200", protocol="tcp", number=80)
    assert seen.fate is Fate.DELIVERED
    assert "router wan at host-2" in said(seen)


# --- requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"port": PortId("nobody")}, NotFound, "port"),
        ({"address": "nowhere"}, Refused, "address"),
        ({"address": "10.1.0.0/24"}, Refused, "address"),
        ({"protocol": "carrier-pigeon"}, Refused, "protocol"),
        ({"protocol": "256"}, Refused, "protocol"),
        ({"protocol": "tcp", "number": 0}, Refused, "number"),
        ({"protocol": "tcp", "number": 65536}, Refused, "number"),
        ({"number": 256}, Refused, "number"),
        ({"protocol": "132", "number": 1}, Refused, "number"),
        ({"source": "me"}, Refused, "source"),
    ],
)
def test_bad_requests(changes: dict[str, Any], error: type[Refused], field: str) -> None:
    request = msgspec.structs.replace(TraceRequest(port=A, address="10.1.0.11"), **changes)
    with pytest.raises(error) as caught:
        trace(topology(), PLACES, request)
    assert caught.value.field == field
    assert caught.value.remedy


def test_every_pair_of_ports_has_an_answer_that_says_why() -> None:
    """Whatever is asked, there is a verdict and a reason, and a drop is the last step."""
    other = RouterSpec(
        id=RouterId("side"),
        number=9,
        interfaces=(RouterInterface(subnet=SubnetId(ALONE), network=ALONE, ip="10.1.0.1"),),
    )
    found = topology()
    found = msgspec.structs.replace(found, routers={**found.routers, other.id: other})
    addresses = sorted({a for p in found.ports.values() for a in p.all_addresses})
    addresses += ["10.1.0.200", "203.0.113.2", "203.0.113.10", "8.8.8.8", "ff02::1", "2001:db8::"]
    for name in found.ports:
        for address in addresses:
            for direction in Direction:
                seen = asked(name, address, found, direction=direction)
                assert seen.reason
                assert seen.steps
                assert (seen.fate is Fate.DROPPED) == (seen.steps[-1].outcome is Outcome.DROPPED)
