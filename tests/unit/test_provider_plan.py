"""Networks that are one with an outside one: what is decided and composed, also for other kernels."""

import struct

import msgspec
import pytest

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import HostId, NetworkId, PortId, ServerId
from nahtlos.model.networking import NetworkSpec, ProviderLink
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import bpf, device_names, kernel, links, netlink, nft, plan
from nahtlos.physical.network.items import Device, Forward, Item, PortFlood, TunnelEntry
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import ANY_MAC, RTM_DELLINK, RTM_NEWLINK
from nahtlos.physical.network.plan import Change, Place
from nahtlos.physical.network.provider import announcement, tagging
from nahtlos.physical.network.provider.ways import Interface, Way, obstacle, way_of

NET, MAC, PORT = NetworkId("office"), "52:54:00:4d:00:10", PortId("web-port")
ADDRESSES = {"host-1": "10.99.0.11", "host-2": "10.99.0.12"}
FLAT = NetworkSpec(
    id=NET,
    vni=1001,
    cidr="10.77.0.0/24",
    gateway_ip="10.77.0.1",
    gateway_mac="",
    gateway_host=HostId(""),
    dhcp_ip="10.77.0.2",
    provider=ProviderLink(interface="eth1"),
)
TAGGED = msgspec.structs.replace(FLAT, provider=ProviderLink(interface="eth1", vlan=205))


def port(at: str) -> PortConfig:
    addresses = ("fd00:77::10",)
    return PortConfig(
        id=PORT,
        server=ServerId("web"),
        mac=MAC,
        ip="10.77.0.10",
        addresses=addresses,
        host=HostId(at),
        vtep=ADDRESSES[at],
    )


def items(
    spec: NetworkSpec, way: Way | None, *, at: str = "host-2", reflect: tuple[PortId, ...] = ()
) -> frozenset[Item]:
    network = NetworkConfig(spec=spec, ports=(port(at),), gateway_vtep="", vteps=tuple(ADDRESSES.values()))
    config = HostConfig(
        host=HostId("host-1"), generation=1, release=None, networks=(network,), reflect=reflect
    )
    place = Place(HostId("host-1"), HostRole.COMPUTE, ADDRESSES["host-1"])
    return plan.desired_items(config, place, {}, {NET: way} if way else {})


@pytest.mark.parametrize(
    ("spec", "way", "outward"),
    [(FLAT, Way.FLAT, "eth1"), (TAGGED, Way.VLAN_DEVICE, "pv1001"), (TAGGED, Way.PROGRAMS, "pv1001")],
)
def test_hosts_reach_each_other_outside_and_the_tunnel_floods_nothing(
    spec: NetworkSpec, way: Way, outward: str
) -> None:
    """What went both ways would go round for ever."""
    found = items(spec, way)
    assert Forward("br1001", MAC, outward) in found
    assert PortFlood(outward, plan.OUTWARD) in found
    assert PortFlood("vx1001", plan.TUNNEL_ASIDE) in found
    assert not [i for i in found if isinstance(i, TunnelEntry) and i.mac == ANY_MAC]
    assert not (plan.TUNNEL_ASIDE.unicast or plan.TUNNEL_ASIDE.multicast or plan.TUNNEL_ASIDE.broadcast)


def test_what_left_is_passed_on_by_the_tunnel_as_long_as_it_is_to_be() -> None:
    assert Forward("br1001", MAC, "vx1001") in items(FLAT, Way.FLAT, reflect=(PORT,))
    assert TunnelEntry("vx1001", MAC, "10.99.0.12") in items(FLAT, Way.FLAT)


def test_devices_of_each_way() -> None:
    def made(spec: NetworkSpec, way: Way | None) -> set[Device]:
        ours = {"br1001", "vx1001", "gm1001", "gb1001"}
        return {i for i in items(spec, way) if isinstance(i, Device) and i.name not in ours}

    assert made(FLAT, Way.FLAT) == {
        Device("eth1", "interface", "nahtlos/provider/office", 0, master="br1001")
    }
    alias = device_names.network_alias(NET)
    assert made(TAGGED, Way.VLAN_DEVICE) == {
        Device("pv1001", "vlan", alias, 1500, master="br1001", lower="eth1", vlan=205)
    }
    assert made(TAGGED, Way.PROGRAMS) == {
        Device("pw1001", "veth", alias, 1500),
        Device("pv1001", "veth", alias, 1500, master="br1001"),
    }
    assert made(TAGGED, None) == set()


# --- what cannot be --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "found", "tagging_by", "underlay", "why"),
    [
        (FLAT, Interface(mtu=1500), None, "eth0", ""),
        (TAGGED, Interface(mtu=1500, addresses=("10.0.0.1/24",)), Way.PROGRAMS, "eth1", ""),
        (FLAT, Interface(mtu=1500, lent_to="office"), None, "eth0", ""),
        (FLAT, None, None, "eth0", "no interface eth1"),
        (FLAT, Interface(mtu=1400), None, "eth0", "MTU of 1400"),
        (FLAT, Interface(mtu=1500), None, "eth1", "carries the underlay"),
        (FLAT, Interface(mtu=1500, addresses=("10.0.0.1/24",)), None, "eth0", "addresses of the host"),
        (FLAT, Interface(mtu=1500, master="bond0"), None, "eth0", "belongs to bond0"),
        (FLAT, Interface(mtu=1500, lent_to="lab"), None, "eth0", "belongs to network lab"),
        (TAGGED, Interface(mtu=1500), None, "eth0", "neither VLAN devices"),
    ],
)
def test_why_a_host_cannot_connect_it(
    spec: NetworkSpec, found: Interface | None, tagging_by: Way | None, underlay: str, why: str
) -> None:
    said = obstacle(spec, found, tagging_by, underlay)
    assert why in said if why else said == ""


def test_the_way_is_the_kernels_choice_for_vlans_only() -> None:
    assert way_of(FLAT, None) is way_of(FLAT, Way.PROGRAMS) is Way.FLAT
    assert way_of(TAGGED, Way.VLAN_DEVICE) is Way.VLAN_DEVICE
    assert way_of(msgspec.structs.replace(FLAT, provider=None), Way.PROGRAMS) is None


# --- what is asked of the kernel -------------------------------------------------------------------------


def test_a_vlan_device_names_its_interface_and_its_tag() -> None:
    request = links.create_vlan("pv1001", 1500, 7, 205)
    values = netlink.attributes(request.body[16:])
    info = netlink.attributes(values[links.IFLA_LINKINFO])
    assert request.kind == RTM_NEWLINK
    assert struct.unpack("I", values[links.IFLA_LINK]) == (7,)
    assert info[links.INFO_KIND] == b"vlan\0"
    assert struct.unpack("H", netlink.attributes(info[links.INFO_DATA])[links.VLAN_ID]) == (205,)


def test_an_interface_that_was_lent_is_given_back_and_never_deleted() -> None:
    lent = Device("eth1", "interface", device_names.provider_alias(NET), 0, master="br1001")
    link = LinkInfo(7, "eth1", "", True, "02:00:00:00:00:07", 1500, 3, lent.alias, None)
    assert kernel.device_of(link, "br1001") == lent
    (request,) = kernel.requests_of([Change(lent, remove=True)], {"eth1": link})
    assert request.kind == RTM_NEWLINK != RTM_DELLINK
    values = netlink.attributes(request.body[16:])
    assert (values[links.IFLA_MASTER], values[links.IFLA_ALIAS]) == (bytes(4), b"")


def test_an_interface_is_nobodys_device_until_it_is_lent() -> None:
    lent = Device("eth1", "interface", device_names.provider_alias(NET), 0, master="br1001")
    link = LinkInfo(7, "eth1", "", True, "02:00:00:00:00:07", 1500, 0, "", None)
    kernel.refuse_foreign([lent], {"eth1": link})


def test_programs_jump_over_what_is_meant_for_others() -> None:
    """Every jump of the program that takes tags off ends at the same place: on to the next filter."""
    code = tagging.tag_off(7, 9, 205).instructions
    lines = [struct.unpack_from("BBhi", code, at) for at in range(0, len(code), 8)]
    targets = {n + 1 + offset for n, (kind, _, offset, _) in enumerate(lines) if kind in (0x15, 0x55)}
    assert targets == {len(lines) - 2}
    assert lines[-2][3] == tagging.NEXT_FILTER
    assert code.endswith(bpf.leave())
    called = [value for kind, _, _, value in lines if kind == 0x85]
    assert called == [bpf.VLAN_POP, bpf.REDIRECT]


def test_the_name_of_a_program_tells_what_it_does() -> None:
    names = {
        tagging.tag_off(*numbers).name for numbers in ((7, 9, 205), (7, 9, 206), (7, 8, 205), (6, 9, 205))
    }
    assert len(names) == 3, "the interface it hangs at is not in it"
    assert tagging.tag_on(9, 7, 205).place == (9, tagging.EGRESS, 205)


def test_services_do_not_get_out_and_nobody_outside_takes_their_place() -> None:
    text = nft.compose([nft.FilteredNetwork(1001, (), "pv1001", "10.77.0.2")], ())
    mac = device_names.anycast_mac(1001)
    into, out = text.split("chain in1001")[1].split("chain out1001")
    for part in (into, out):
        assert f"ether saddr {mac} drop" in part
        assert "udp dport 67 drop" in part
        assert "arp daddr ip 10.77.0.2 drop" in part
    assert "udp sport 67 drop" in into
    assert "hook ingress device" in into
    assert "hook egress device" in out
    assert "chain in1001" not in nft.compose([nft.FilteredNetwork(1001, ())], ())


# --- announcements ---------------------------------------------------------------------------------------


def test_each_address_is_told_from_the_servers_mac() -> None:
    arp, advertisement = announcement.frames(port("host-2"))
    mac = netlink.mac_bytes(MAC)
    assert arp[:14] == b"\xff" * 6 + mac + b"\x08\x06"
    assert arp[22:42] == mac + bytes((10, 77, 0, 10)) + bytes(6) + bytes((10, 77, 0, 10))
    assert len(arp) == 60
    assert advertisement[:14] == bytes.fromhex("333300000001") + mac + b"\x86\xdd"
    assert advertisement[21] == 255
    message = advertisement[54:]
    assert (message[0], message[4]) == (136, 0x20)
    assert message[8:24] == netlink.packed("fd00:77::10")
    assert message[-6:] == mac
    pseudo = advertisement[22:54] + struct.pack("!II", len(message), 58)
    total = sum(struct.unpack(f"!{(len(pseudo) + len(message)) // 2}H", pseudo + message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF
