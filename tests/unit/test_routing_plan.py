"""What routers, gateways and load balancers need on a host: decided without a kernel."""

from pathlib import Path

import msgspec
import pytest

from nahtlos.model.config import HostConfig, LoadBalancerConfig, NetworkConfig, PortConfig, RouterConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    PortId,
    RouterId,
    ServerId,
    SubnetId,
)
from nahtlos.model.networking import (
    AddressPair,
    FloatingIpSpec,
    LoadBalancerSpec,
    Member,
    NetworkSpec,
    Route,
    RouterGateway,
    RouterInterface,
    RouterSpec,
    SubnetSpec,
)
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network.items import Forward, TunnelEntry
from nahtlos.physical.network.items import Neighbour as BridgeNeighbour
from nahtlos.physical.network.plan import Place
from nahtlos.physical.network.routing import announcement, balancer, connections, facts, plan, translation
from nahtlos.physical.network.routing.facts import Address, Neighbour, Proxy, Setting, Space
from nahtlos.physical.network.routing.facts import Entry as PortEntry
from nahtlos.physical.network.routing.facts import Route as Way
from nahtlos.physical.network.tracking.conntrack import Entry

HOST, OTHER, EDGE = HostId("host-1"), HostId("host-2"), HostId("edge-1")
VTEPS = {HOST: "10.99.0.11", OTHER: "10.99.0.12", EDGE: "10.99.0.5"}


def network(name: str, vni: int, third: int, *ports: PortConfig) -> NetworkConfig:
    id_ = NetworkId(name)
    six = SubnetSpec(
        id=SubnetId(f"{name}-6"), network=id_, cidr=f"fd0{third}::/64", gateway_ip=f"fd0{third}::1"
    )
    spec = NetworkSpec(
        id=id_,
        vni=vni,
        cidr=f"10.{third}.0.0/24",
        gateway_ip=f"10.{third}.0.1",
        gateway_mac="",
        gateway_host=HostId(""),
        dhcp_ip=f"10.{third}.0.2",
        subnets=(six,),
    )
    return NetworkConfig(spec=spec, ports=ports, gateway_vtep="", vteps=tuple(VTEPS.values()))


def port(name: str, mac: str, *ips: str, pairs: tuple[AddressPair, ...] = ()) -> PortConfig:
    return PortConfig(
        id=PortId(name),
        server=ServerId(name),
        mac=mac,
        ip=ips[0],
        addresses=ips[1:],
        allowed_pairs=pairs,
        host=OTHER,
        vtep=VTEPS[OTHER],
    )


RED_PORT = port("p1", "52:54:00:00:00:0A", "10.1.0.10", "fd01::10")
BLUE_PORT = port("p2", "52:54:00:00:00:0b", "10.2.0.10", pairs=(AddressPair(cidr="10.2.0.77"),))
RED, BLUE = network("red", 101, 1, RED_PORT), network("blue", 102, 2, BLUE_PORT)
ROUTER = RouterSpec(
    id=RouterId("main"),
    number=0x102,
    interfaces=tuple(
        RouterInterface(subnet=s.id, network=n.spec.id, ip=s.gateway_ip)
        for n in (BLUE, RED)
        for s in n.spec.all_subnets
    ),
    routes=(Route(destination="192.168.9.0/24", next_hop="10.2.0.10"),),
    gateway=RouterGateway(host=EDGE, address="203.0.113.100"),
)
FLOATING = FloatingIpSpec(
    id=FloatingIpId("f"), address="203.0.113.150", port=PortId("p2"), fixed_ip="10.2.0.10"
)
BALANCER = LoadBalancerSpec(
    id=LoadBalancerId("web"),
    number=3,
    network=RED.spec.id,
    vip="10.1.0.200",
    port=80,
    host=OTHER,
    members=(
        Member(address="10.1.0.10", port=80, weight=600),
        Member(address="10.2.0.10", port=80, weight=300),
    ),
)


def site(host: HostId, router: RouterSpec = ROUTER) -> plan.Site:
    role = HostRole.EDGE if host == EDGE else HostRole.COMPUTE
    config = HostConfig(
        host=host,
        generation=1,
        release=None,
        networks=(RED, BLUE),
        routers=(
            RouterConfig(
                spec=router,
                gateway_vtep=VTEPS[EDGE],
                interface="out0" if host == EDGE else "",
                floating_ips=(FLOATING,),
            ),
        ),
        load_balancers=(LoadBalancerConfig(spec=BALANCER, vtep=VTEPS[OTHER]),),
    )
    return plan.site(config, Place(host, role, VTEPS[host]))


def spaces(host: HostId, router: RouterSpec = ROUTER) -> dict[str, Space]:
    return {space.name: space for space in plan.spaces(site(host, router))}


MAC, GATEWAY, BALANCER_MAC = "02:6e:72:00:01:02", "02:6e:72:01:01:02", "02:6e:72:04:00:03"


def test_each_host_has_what_belongs_there() -> None:
    assert set(spaces(HOST)) == {"router-258"}
    assert set(spaces(OTHER)) == {"router-258", "balancer-3"}
    assert set(spaces(EDGE)) == {"router-258", "gateway-258"}


def test_a_router_is_the_same_on_every_host() -> None:
    assert spaces(HOST)["router-258"] == spaces(OTHER)["router-258"]
    router = spaces(HOST)["router-258"]
    assert {c.mac for c in router.cables} == {MAC}
    assert all(len(c.outer) <= 15 for c in router.cables)
    assert Address("n101", "10.1.0.1/24") in router.inside
    assert Address("n102", "fd02::1/64") in router.inside


def test_everybody_is_known_and_nobody_asked_for() -> None:
    router = spaces(HOST)["router-258"].inside
    assert Neighbour("n101", "10.1.0.10", "52:54:00:00:00:0a") in router, "as the kernel writes it"
    assert Neighbour("n101", "fd01::10", "52:54:00:00:00:0a") in router
    assert Neighbour("n102", "10.2.0.77", "52:54:00:00:00:0b") in router, "an address only one may have"
    assert Neighbour("n101", "10.1.0.200", BALANCER_MAC) in router
    assert Setting("net/ipv4/neigh/n101/mcast_solicit", "0") in router
    assert Setting("net/ipv6/neigh/n102/mcast_solicit", "0") in router


def test_what_is_for_outside_goes_by_the_first_network_to_the_gateways_own_mac() -> None:
    router = spaces(HOST)["router-258"].inside
    assert Way("0.0.0.0/0", "n101", plan.GATEWAY_SIDE) in router
    assert Neighbour("n101", plan.GATEWAY_SIDE, GATEWAY) in router
    items = plan.bridge_items(site(HOST))
    assert TunnelEntry("vx101", GATEWAY, VTEPS[EDGE]) in items
    assert Forward("br101", GATEWAY, "vx101") in items
    assert not [i for i in plan.bridge_items(site(EDGE)) if getattr(i, "mac", "") == GATEWAY]
    gateway = spaces(EDGE)["gateway-258"]
    assert PortEntry("g258-101", GATEWAY) in gateway.outside
    own = ("203.", "fe80::")
    assert not [f for f in gateway.inside if isinstance(f, Address) and not f.cidr.startswith(own)]


def test_the_routers_mac_never_leads_into_the_tunnel() -> None:
    items = plan.bridge_items(site(HOST))
    assert TunnelEntry("vx101", MAC, VTEPS[HOST]) in items
    assert not [i for i in items if isinstance(i, Forward) and i.mac == MAC]
    assert BridgeNeighbour("br101", "fd01::1", MAC, router=True) in items
    assert BridgeNeighbour("br101", plan.link_local(MAC), MAC, router=True) in items


def test_a_default_route_that_was_asked_for_takes_the_place_of_the_gateways() -> None:
    own = msgspec.structs.replace(ROUTER, routes=(Route(destination="0.0.0.0/0", next_hop="10.2.0.10"),))
    found = [f for f in spaces(HOST, own)["router-258"].inside if f.key == ("route", "0.0.0.0/0")]
    assert found == [Way("0.0.0.0/0", "n102", "10.2.0.10")]


def test_a_route_by_nobody_in_its_subnets_is_left_out() -> None:
    lost = msgspec.structs.replace(
        ROUTER, routes=(Route(destination="192.168.9.0/24", next_hop="172.16.0.1"),)
    )
    assert not [f for f in spaces(HOST, lost)["router-258"].inside if f.key == ("route", "192.168.9.0/24")]


def test_the_gateways_host_answers_for_its_addresses() -> None:
    outside = spaces(EDGE)["gateway-258"].outside
    assert {f.ip for f in outside if isinstance(f, Proxy)} == {"203.0.113.100", "203.0.113.150"}
    assert Way("203.0.113.150/32", "o258", "203.0.113.100") in outside


def test_rules_translate_by_maps_and_only_what_should_be() -> None:
    way = RouterGateway(host=EDGE, address="203.0.113.100")
    text = translation.rules(way, {"203.0.113.150": "10.2.0.10", "203.0.113.151": "10.2.0.10"})
    assert "10.2.0.10 : 203.0.113.150" in text, "the first of several answers"
    assert "snat to 203.0.113.100" in text
    assert "snat" not in translation.rules(msgspec.structs.replace(way, snat=False), {})
    assert text == translation.rules(way, {"203.0.113.151": "10.2.0.10", "203.0.113.150": "10.2.0.10"})


def test_changes_come_in_an_order_in_which_they_work() -> None:
    wanted = {
        Way("0.0.0.0/0", "n1", "10.0.0.2"),
        Neighbour("n1", "10.0.0.2", MAC),
        Address("n1", "10.0.0.1/24"),
    }
    wanted |= {facts.Link("n1", MAC, 1500), Setting("net/x", "1")}
    kinds = [type(c.fact).__name__ for c in facts.changes(wanted, ())]
    assert kinds == ["Setting", "Link", "Address", "Neighbour", "Route"]
    assert facts.changes(wanted, wanted) == ()
    (gone,) = facts.changes((), {Way("0.0.0.0/0", "n1", "10.0.0.2"), facts.Link("n1", MAC, 1500)})
    assert gone.remove and "was not asked for" in str(gone)


def test_weights_are_shares_and_draining_gives_none() -> None:
    assert balancer.weights(BALANCER.members) == {"10.1.0.10_80": 256, "10.2.0.10_80": 128}
    drained = msgspec.structs.replace(BALANCER.members[0], draining=True)
    assert balancer.weights((drained, BALANCER.members[1])) == {"10.1.0.10_80": 0, "10.2.0.10_80": 128}


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"weight": 7}, False),
        ({"draining": True}, False),
        ({"port": 81}, True),
    ],
)
def test_only_members_need_a_new_worker(change: dict[str, object], anew: bool) -> None:
    path = Path("/run/web.sock")
    members = (msgspec.structs.replace(BALANCER.members[0], **change), BALANCER.members[1])
    changed = msgspec.structs.replace(BALANCER, members=members)
    assert balancer.configuration(changed, path) != balancer.configuration(BALANCER, path)
    assert (balancer.digest(changed, path) != balancer.digest(BALANCER, path)) is anew


def test_status_is_read_by_names() -> None:
    stat = "# pxname,svname,scur,stot,status,weight\nmembers,FRONTEND,2,9,OPEN,\n"
    stat += "members,10.1.0.10_80,2,7,UP 1/2,3\nmembers,10.2.0.10_80,0,2,DOWN,1\n"
    found = balancer.decode(BALANCER.members, "Pid: 1\ndescription: abc\n", stat)
    assert [(m.up, m.weight, m.connections, m.total) for m in found.members] == [
        (True, 3, 2, 7),
        (False, 1, 0, 2),
    ]
    assert (found.connections, found.configuration) == (2, "abc")


def test_connections_travel_and_other_forms_are_refused() -> None:
    entries = [Entry(2, {1: b"orig", 2: b"reply"})]
    state = connections.encode(entries)
    assert connections.decode(state) == entries
    for wrong in (b"", b"NLGW\x02" + state[5:], state[:-4]):
        with pytest.raises(Refused):
            connections.decode(wrong)


def test_an_announcement_is_a_request_and_an_answer_for_itself() -> None:
    first, second = announcement.frames("02:00:00:00:00:01", ["203.0.113.150"])
    for frame, operation in ((first, 1), (second, 2)):
        assert frame[:6] == b"\xff" * 6 and frame[21] == operation
        assert frame[28:32] == frame[38:42] == bytes((203, 0, 113, 150))
