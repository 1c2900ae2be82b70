"""What servers are told about their addresses, as tables: subnets, DHCP, names, metadata, advertisements."""

import json
import struct
from pathlib import Path

import msgspec
import pytest

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, RouterConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, NetworkId, PortId, ProjectId, RouterId, ServerId, SubnetId, VolumeId
from nahtlos.model.networking import NetworkSpec, PortSpec, RouterInterface, RouterSpec, SubnetSpec
from nahtlos.model.nouns import HostRole, ServerSpec, Size
from nahtlos.physical.network.device_names import anycast_mac
from nahtlos.physical.network.items import Address, Forward, Neighbour, Setting, TunnelEntry
from nahtlos.physical.network.plan import Place, desired_items
from nahtlos.physical.network.services import addressing, advertiser, dhcp, metadata
from nahtlos.physical.network.services.metadata_pages import page, pages

RED = NetworkId("red")
MAC = "52:54:00:4d:00:10"
MADE = "fd00:77::5054:ff:fe4d:10"
SERVICE = "fd00:77::6e:6cff:fe00:64"


def subnet(cidr: str, **other: object) -> SubnetSpec:
    return msgspec.convert({"id": f"s-{cidr[:4]}", "network": RED, "cidr": cidr, **other}, SubnetSpec)


def spec(*subnets: SubnetSpec, mtu: int = 1500, gateway: str = "10.77.0.1") -> NetworkSpec:
    return NetworkSpec(
        id=RED,
        vni=100,
        mtu=mtu,
        cidr="10.77.0.0/24",
        gateway_ip=gateway,
        gateway_mac="",
        gateway_host=HostId(""),
        dhcp_ip="10.77.0.2",
        subnets=subnets,
    )


def port(name: str = "web", **other: object) -> PortConfig:
    given = {
        "id": f"{name}-p",
        "server": name,
        "mac": MAC,
        "ip": "10.77.0.10",
        "host": "host-1",
        "vtep": "10.0.0.1",
    }
    return msgspec.convert({**given, **other}, PortConfig)


def network(of: NetworkSpec, *ports: PortConfig) -> NetworkConfig:
    return NetworkConfig(spec=of, ports=ports, gateway_vtep="", vteps=("10.0.0.1",))


SIX, SECOND = subnet("fd00:77::/64"), subnet("10.78.0.0/24", gateway_ip="10.78.0.1")


def told(of: NetworkSpec) -> tuple[str, ...]:
    return dhcp.arguments(of, hosts=Path("/h"), names=Path("/n"), leases=Path("/l"), user="nobody")


# --- subnets -----------------------------------------------------------------------------------------


def test_every_address_of_a_port_has_a_neighbour_and_nothing_else_is_there() -> None:
    both = port(addresses=("10.78.0.10", MADE))
    config = HostConfig(
        host=HostId("host-1"), generation=1, release=None, networks=(network(spec(SIX, SECOND), both),)
    )
    found = desired_items(config, Place(HostId("host-1"), HostRole.COMPUTE, "10.0.0.1"), {})
    neighbours = {i.ip: i.mac for i in found if isinstance(i, Neighbour)}
    assert neighbours == dict.fromkeys(("10.77.0.10", "10.78.0.10", MADE), MAC)
    assert not [i for i in found if isinstance(i, Address | Forward | TunnelEntry)], "no gateway, no uplink"
    assert Setting("net/ipv6/conf/br100/disable_ipv6", "0") in found
    assert Setting("net/ipv6/conf/br100/addr_gen_mode", "1") in found


def test_services_have_an_address_where_they_need_one_and_the_same_everywhere() -> None:
    inside = addressing.inside(spec(SIX, SECOND, subnet("fd00:99::/64", dhcp=False)))
    assert inside.mac == anycast_mac(100)
    assert inside.addresses == {
        "10.77.0.2/24",
        "169.254.169.254/32",
        "fe80::6e:6cff:fe00:64/64",
        "fe80::a9fe:a9fe/64",
        f"{SERVICE}/64",
    }
    assert (inside.links, inside.source) == ({"10.78.0.0/24"}, "10.77.0.2")
    assert addressing.inside(spec()).addresses == {"10.77.0.2/24", "169.254.169.254/32"}
    known = {n.ip for n in addressing.service_neighbours(spec())}
    assert known == {"10.77.0.2", "169.254.169.254"}


@pytest.mark.parametrize(
    ("subnets", "mtu", "underlay", "remedy"),
    [
        ((), 1550, 1600, ""),
        ((), 1551, 1600, "at most 1550"),
        ((), 9000, 9050, ""),
        ((), 1551, 0, ""),
        ((), 1279, 1600, ""),
        ((SIX,), 1280, 1600, ""),
        ((SIX,), 1279, 1600, "at least 1280"),
    ],
)
def test_an_mtu_that_cannot_be_is_refused(
    subnets: tuple[SubnetSpec, ...], mtu: int, underlay: int, remedy: str
) -> None:
    if not remedy:
        addressing.check(spec(*subnets, mtu=mtu), underlay)
        return
    with pytest.raises(Refused) as refused:
        addressing.check(spec(*subnets, mtu=mtu), underlay)
    assert refused.value.field == "mtu"
    assert remedy in refused.value.remedy


# --- DHCP and names ----------------------------------------------------------------------------------


def test_a_network_with_one_subnet_is_told_of_one() -> None:
    argv = told(spec())
    assert "--dhcp-range=set:v4-0,10.77.0.0,static,255.255.255.0,30d" in argv
    assert "--dhcp-option=tag:v4-0,option:router,10.77.0.1" in argv
    assert "--dhcp-option=tag:v4-0,option:dns-server,10.77.0.2" in argv
    assert not [a for a in argv if "ra-" in a or "option6" in a or "shared" in a]
    assert "--no-resolv" in argv
    assert not [a for a in argv if a.startswith("--server")], "nobody else is asked"


def test_without_a_gateway_none_is_told() -> None:
    argv = told(spec(gateway=""))
    assert "--dhcp-option=tag:v4-0,option:router" in argv, "empty: dnsmasq would name itself"
    (routes,) = (a for a in argv if "classless" in a)
    assert routes.endswith("169.254.169.254/32,10.77.0.2")


def test_further_subnets_are_told_with_their_own_way_out() -> None:
    argv = told(spec(SIX, SECOND, mtu=1400))
    assert "--shared-network=eth0,10.78.0.0" in argv
    assert "--dhcp-option=tag:v4-1,option:router,10.78.0.1" in argv
    assert (
        "--dhcp-option=tag:v4-1,option:classless-static-route,"
        "169.254.169.254/32,0.0.0.0,10.77.0.2/32,0.0.0.0,0.0.0.0/0,10.78.0.1"
    ) in argv
    assert "--dhcp-range=set:v6-0,fd00:77::,static,slaac,64,30d" in argv
    assert f"--dhcp-option=tag:v6-0,option6:dns-server,[{SERVICE}]" in argv
    assert "--ra-param=eth0,mtu:1400,600,0" in argv, "no way out is advertised by the service itself"
    assert "--dhcp-option=option:mtu,1400" in argv


def test_name_servers_that_were_named_are_told_instead() -> None:
    argv = told(spec(subnet("fd00:77::/64", dns=("fd00::53",)), subnet("10.78.0.0/24", dns=("9.9.9.9",))))
    assert "--dhcp-option=tag:v6-0,option6:dns-server,[fd00::53]" in argv
    assert "--dhcp-option=tag:v4-1,option:dns-server,9.9.9.9" in argv


def test_the_identity_of_a_dhcpv6_server_is_the_networks() -> None:
    (one,) = (a for a in told(spec(SIX)) if a.startswith("--dhcp-duid"))
    (same,) = (a for a in told(spec(SIX, SECOND)) if a.startswith("--dhcp-duid"))
    assert one == same


def test_hosts_and_names_tell_of_every_address_within_a_subnet() -> None:
    held = network(spec(SIX, SECOND), port(addresses=("10.78.0.10", MADE, "192.0.2.1")))
    assert addressing.dhcp_hosts(held, "30d") == f"{MAC},10.77.0.10,[{MADE}],web,30d\n"
    assert addressing.dns_names(held).splitlines() == [
        "10.77.0.10 web.red.internal web",
        "10.78.0.10 web.red.internal web",
        f"{MADE} web.red.internal web",
    ]


@pytest.mark.parametrize(
    ("cidr", "zone"),
    [
        ("10.77.0.0/24", "0.77.10.in-addr.arpa"),
        ("10.0.0.0/8", "10.in-addr.arpa"),
        ("10.77.0.128/25", "0.77.10.in-addr.arpa"),
        ("fd00:77::/64", "0.0.0.0.0.0.0.0.7.7.0.0.0.0.d.f.ip6.arpa"),
    ],
)
def test_reverse_names_of_the_own_subnets_are_the_networks_business(cidr: str, zone: str) -> None:
    other = subnet(cidr) if cidr != "10.77.0.0/24" else SIX
    assert f"--local=/{zone}/" in told(spec(other))


# --- metadata ----------------------------------------------------------------------------------------


def test_a_server_is_told_of_all_its_interfaces_in_its_project_and_of_no_others() -> None:
    blue = msgspec.structs.replace(spec(), id=NetworkId("blue"), vni=200)
    foreign = msgspec.structs.replace(spec(), id=NetworkId("foreign"), project=ProjectId("other"), vni=300)
    own = network(spec(SIX), port(addresses=(MADE,)))
    more = [network(blue, port(id="web-b", mac="52:54:00:00:00:02")), network(foreign, port(id="web-f"))]
    content = json.loads(metadata.directory(own, [own, *more], ()))
    (record,) = content["servers"]
    assert [nic["network"] for nic in record["nics"]] == ["blue", "red"]
    found = pages(record, record["nics"][1])
    assert page(found, "/latest/meta-data/local-ipv4") == "10.77.0.10"
    assert page(found, "/latest/meta-data/ipv6") == MADE
    assert page(found, "/latest/meta-data/public-keys/") == ""
    assert page(found, "/latest") == "meta-data/\nnetwork-config"
    assert page(found, "/") == "2009-04-04/\nlatest/\nnocloud/"
    assert page(found, "/latest/user-data") is None
    assert page(found, "/latest/meta-data/nothing") is None


def test_a_server_is_told_its_user_data_and_nobody_elses() -> None:
    own = network(spec(), port())
    (record,) = json.loads(metadata.directory(own, [own], (), {port().server: "#cloud-config\n"}))["servers"]
    assert page(pages(record, record["nics"][0]), "/latest/user-data") == "#cloud-config\n"
    (other,) = json.loads(metadata.directory(own, [own], (), {ServerId("other"): "#!"}))["servers"]
    assert page(pages(other, other["nics"][0]), "/latest/user-data") is None


def test_a_seed_names_interfaces_in_the_order_of_the_servers_ports() -> None:
    ports = (
        PortSpec(id=PortId("z"), network=RED, mac=MAC.upper(), ip="10.77.0.10", addresses=(MADE,)),
        PortSpec(id=PortId("a"), network=RED, mac="52:54:00:00:00:02", ip="10.78.0.10"),
    )
    server = ServerSpec(
        id=ServerId("web"), size=Size(), volume=VolumeId("v"), ports=ports, machine="pc-q35-10.0"
    )
    files = metadata.seed(server, {RED: spec(SIX, SECOND, mtu=1400)}, user_data="#!/bin/sh\n")
    assert files["user-data"] == "#!/bin/sh\n"
    assert json.loads(files["meta-data"]) == {"instance-id": "web", "local-hostname": "web"}
    ethernets = json.loads(files["network-config"])["ethernets"]
    assert [e["match"]["macaddress"] for e in ethernets.values()] == [MAC, "52:54:00:00:00:02"]
    assert ethernets["nic0"]["addresses"] == ["10.77.0.10/24", f"{MADE}/64"]
    assert ethernets["nic0"]["nameservers"] == {
        "addresses": ["10.77.0.2", SERVICE],
        "search": ["red.internal"],
    }
    assert [e["routes"][0]["via"] for e in ethernets.values()] == ["10.77.0.1", "10.78.0.1"]
    assert ethernets["nic0"]["routes"][0]["metric"] < ethernets["nic1"]["routes"][0]["metric"]
    assert {e["mtu"] for e in ethernets.values()} == {1400}


# --- routers -----------------------------------------------------------------------------------------


def test_routers_of_ipv6_subnets_are_advertised_once() -> None:
    interfaces = tuple(
        RouterInterface(subnet=SubnetId(id_), network=RED, ip=ip)
        for id_, ip in ((RED, "10.77.0.1"), (SIX.id, "fd00:77::1"), (SIX.id, "fd00:77::2"))
    )
    router = RouterConfig(spec=RouterSpec(id=RouterId("r"), number=7, interfaces=interfaces))
    plain = RouterConfig(spec=RouterSpec(id=RouterId("p"), number=8, interfaces=interfaces[:1]))
    (found,) = metadata.routers_of(network(spec(SIX, mtu=1400)), [router, plain])
    assert found["address"] == addressing.link_local(found["mac"])
    frame = advertiser.advertisement(found["mac"], found["address"], found["mtu"], 1800)
    header, body = frame[14:54], frame[54:]
    assert frame[:14] == bytes.fromhex("333300000001" + found["mac"].replace(":", "") + "86dd")
    assert header[7] == 255
    assert struct.unpack_from("!H", body, 6)[0] == 1800
    assert struct.unpack_from("!I", body, 28)[0] == 1400
    pseudo = header[8:40] + struct.pack("!II", len(body), 58)
    assert advertiser.checksum(pseudo + body) == 0
