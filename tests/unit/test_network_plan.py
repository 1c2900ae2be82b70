"""The network driver's decisions as tables, and its wire formats without a kernel."""

import msgspec
import pytest

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, Uplink
from nahtlos.model.ids import HostId, NetworkId, PortId, ServerId, SubnetId
from nahtlos.model.networking import NetworkSpec, SubnetSpec
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import device_names, netlink, nft, packet, plan
from nahtlos.physical.network.device_names import tap_name
from nahtlos.physical.network.items import (
    Address,
    Device,
    Forward,
    Item,
    Neighbour,
    PortFlood,
    Setting,
    TunnelEntry,
)
from nahtlos.physical.network.plan import DELIVERING, SILENT, Change, Place, changes, desired_items

SPEC = NetworkSpec(
    id=NetworkId("tenant"),
    vni=100,
    cidr="10.77.0.0/24",
    gateway_ip="10.77.0.1",
    gateway_mac="02:00:00:4d:00:01",
    gateway_host=HostId("edge-1"),
    dhcp_ip="10.77.0.2",
)
ADDRESSES = {"host-1": "10.99.0.11", "host-2": "10.99.0.12", "edge-1": "10.99.0.5"}
MAC = "52:54:00:4d:00:10"
PORT = PortId("web-port")


def port(host: str) -> PortConfig:
    return PortConfig(
        id=PORT, server=ServerId("web"), mac=MAC, ip="10.77.0.10", host=HostId(host), vtep=ADDRESSES[host]
    )


def config(host: str, at: str = "host-1") -> HostConfig:
    network = NetworkConfig(
        spec=SPEC, ports=(port(at),), gateway_vtep="10.99.0.5", vteps=tuple(ADDRESSES.values())
    )
    uplinks = (Uplink(network=SPEC.id, interface="out0"),) if host == "edge-1" else ()
    return HostConfig(host=HostId(host), generation=1, release=None, networks=(network,), uplinks=uplinks)


def items(host: str, *, at: str = "host-1", taps: dict[PortId, str] | None = None) -> frozenset[Item]:
    role = HostRole.EDGE if host == "edge-1" else HostRole.COMPUTE
    return desired_items(config(host, at), Place(HostId(host), role, ADDRESSES[host]), taps or {})


@pytest.mark.parametrize(
    ("host", "at", "has_tap", "expected", "absent"),
    [
        ("host-1", "host-1", True, Forward("br100", MAC, tap_name(PORT)), "10.99.0.12"),
        ("host-2", "host-1", False, Forward("br100", MAC, "vx100"), ""),
        ("host-2", "host-1", False, TunnelEntry("vx100", MAC, "10.99.0.11"), ""),
        ("edge-1", "host-2", False, TunnelEntry("vx100", MAC, "10.99.0.12"), "10.99.0.11"),
        ("host-1", "host-2", True, Forward("br100", MAC, "vx100"), "10.99.0.11"),
        ("host-1", "host-2", True, PortFlood(tap_name(PORT), SILENT), ""),
        ("host-1", "host-1", True, PortFlood(tap_name(PORT), DELIVERING), ""),
        ("host-1", "host-1", False, Neighbour("br100", "10.77.0.10", MAC), ""),
        ("host-1", "host-1", False, TunnelEntry("vx100", SPEC.gateway_mac, "10.99.0.5"), ""),
        ("edge-1", "host-1", False, Address("br100", "10.77.0.1/24", routed=True), ""),
    ],
)
def test_where_frames_go(host: str, at: str, has_tap: bool, expected: Item, absent: str) -> None:
    found = items(host, at=at, taps={PORT: MAC} if has_tap else {})
    assert expected in found
    towards = {i.vtep for i in found if isinstance(i, TunnelEntry) and i.mac == MAC}
    assert absent not in towards


def test_a_port_without_its_tap_is_sent_nowhere() -> None:
    assert not [i for i in items("host-1") if isinstance(i, Forward) and i.mac == MAC]


def test_a_bridge_has_an_address_of_its_own_only_where_the_gateway_is() -> None:
    macs = {
        host: next(i.mac for i in items(host) if isinstance(i, Device) and i.kind == "bridge")
        for host in ADDRESSES
    }
    assert macs["host-1"] == macs["host-2"] == device_names.bridge_mac(100) != device_names.anycast_mac(100)
    assert macs["edge-1"] == SPEC.gateway_mac
    assert [host for host in ADDRESSES if any(isinstance(i, Address) for i in items(host))] == ["edge-1"]


def test_a_routed_way_out_leads_out_of_ipv6_subnets_that_have_a_gateway() -> None:
    """Not translated: the outside knows the way to them by the edge host."""
    six = SubnetSpec(id=SubnetId("six"), network=SPEC.id, cidr="fd00:77::/64", gateway_ip="fd00:77::1")
    alone = SubnetSpec(id=SubnetId("alone"), network=SPEC.id, cidr="fd00:78::/64")
    spec = msgspec.structs.replace(SPEC, subnets=(six, alone))

    def found(host: str, *, forced: bool = True) -> frozenset[Item]:
        plain = config(host)
        networks = (msgspec.structs.replace(plain.networks[0], spec=spec),)
        role = HostRole.EDGE if host == "edge-1" else HostRole.COMPUTE
        place = Place(HostId(host), role, ADDRESSES[host], forced)
        return desired_items(msgspec.structs.replace(plain, networks=networks), place, {})

    edge, host = found("edge-1"), found("host-1")
    assert Address("br100", "fd00:77::1/64", routed=True) in edge
    mac = SPEC.gateway_mac
    for address in ("fd00:77::1", plan.link_local(mac)):
        assert Neighbour("br100", address, mac, router=True) in host
    for device in ("br100", "out0"):
        assert Setting(f"net/ipv6/conf/{device}/force_forwarding", "1") in edge
    everywhere = Setting("net/ipv6/conf/all/forwarding", "1")
    assert everywhere not in edge
    assert everywhere in found("edge-1", forced=False), "kernels before 6.17"
    assert not [i for i in host if isinstance(i, Setting) and "forward" in i.path and "ipv6" in i.path]
    assert not [i for i in edge | host if "fd00:78" in str(i)]


def test_no_tunnel_entry_leads_to_oneself() -> None:
    for host, address in ADDRESSES.items():
        assert address not in {i.vtep for i in items(host, at=host) if isinstance(i, TunnelEntry)}


def test_nothing_to_change_when_all_is_right() -> None:
    assert changes(items("host-1"), items("host-1")) == ()


def test_a_port_that_left_is_tunnelled_before_it_is_forwarded() -> None:
    todo = changes(items("host-1", at="host-2"), items("host-1", at="host-1", taps={PORT: MAC}))
    about = [c.item for c in todo if isinstance(c.item, Forward | TunnelEntry)]
    assert about == [TunnelEntry("vx100", MAC, "10.99.0.12"), Forward("br100", MAC, "vx100")]


def test_a_port_that_came_is_delivered_before_its_tunnel_goes() -> None:
    todo = changes(items("host-1", taps={PORT: MAC}), items("host-1", at="host-2"))
    about = [c for c in todo if isinstance(c.item, Forward | TunnelEntry)]
    assert about == [
        Change(Forward("br100", MAC, tap_name(PORT)), before=Forward("br100", MAC, "vx100")),
        Change(TunnelEntry("vx100", MAC, "10.99.0.12"), remove=True),
    ]


def test_bridges_are_born_before_their_ports_and_die_after_them() -> None:
    born = [c.item.name for c in changes(items("host-1"), frozenset()) if isinstance(c.item, Device)]
    dead = [c.item.name for c in changes(frozenset(), items("host-1")) if isinstance(c.item, Device)]
    assert born[0] == "br100" == dead[-1]
    assert set(born) == {"br100", "vx100", "gm100", "gb100"}


def test_a_tap_is_never_removed_for_being_left_out() -> None:
    there = items("host-1", taps={PORT: MAC})
    gone = {c.item for c in changes(items("host-1"), there) if c.remove}
    assert not [i for i in gone if isinstance(i, Device)]


def test_what_moves_is_left_out_but_stays_attached() -> None:
    tap = tap_name(PORT)
    todo = changes(items("host-1", taps={PORT: MAC}), frozenset())
    left = [c.item for c in plan.without(todo, frozenset({MAC, tap}))]
    assert not [i for i in left if isinstance(i, Forward | TunnelEntry) and i.mac == MAC]
    assert not [i for i in left if isinstance(i, PortFlood) and i.device == tap]
    assert [i for i in left if isinstance(i, Device) and i.name == tap]


def test_names_fit_the_kernel_whatever_people_choose() -> None:
    long = [PortId("x" * 200), PortId("x" * 201)]
    assert len({tap_name(p) for p in long}) == 2
    assert all(len(tap_name(p)) <= 15 for p in long)
    assert len(device_names.gate_port_name(2**24 - 1)) <= 15
    assert device_names.port_of_alias(device_names.port_alias(PORT, MAC)) == (PORT, MAC)
    assert device_names.port_of_alias("somebody's tap") is None


def test_attributes_survive_the_way_there_and_back() -> None:
    data = netlink.text(3, "br0") + netlink.u32(4, 1500) + netlink.nested(18, netlink.u8(1, 7))
    found = netlink.attributes(data)
    assert found[3] == b"br0\0"
    assert found[4] == (1500).to_bytes(4, "little")
    assert netlink.attributes(found[18]) == {1: b"\7"}


def test_a_flip_is_one_short_request() -> None:
    request = netlink.forward_to_port(7, MAC)
    assert request.kind == netlink.RTM_NEWNEIGH
    assert len(request.body) == 12 + 12
    assert bytes.fromhex(MAC.replace(":", "")) in request.body


GATE = nft.Gate(100, MAC, PORT)


def test_the_filter_names_what_it_lets_through_the_gate() -> None:
    text = nft.compose([nft.FilteredNetwork(100, ("out0",))], [GATE])
    assert f'elements = {{ {MAC} comment "web-port" }}' in text
    assert 'ether daddr @moving100 fwd to "gm100"' in text
    assert 'iifname . oifname { "br100" . "br100", "br100" . "out0", "out0" . "br100"' in text
    assert nft.digest([nft.FilteredNetwork(100, ())]) != nft.digest([nft.FilteredNetwork(100, ("out0",))])


def test_the_filter_is_read_back_without_what_changes_by_itself() -> None:
    def listing(handle: int, *elements: object) -> bytes:
        ours = {"family": "netdev", "table": "nahtlos"}
        return msgspec.json.encode(
            {
                "nftables": [
                    {"metainfo": {"version": "1"}},
                    {"table": {"family": "netdev", "name": "nahtlos", "handle": handle}},
                    {"set": {**ours, "name": "moving100", "handle": handle, "elem": elements}},
                    {"table": {"family": "inet", "name": "foreign", "handle": 9}},
                ]
            }
        )

    with_gate = nft.decode(listing(1, {"elem": {"val": MAC, "comment": "web-port"}}))
    bare = nft.decode(listing(2, "52:54:00:00:00:01"))
    assert with_gate.gates == {GATE}
    assert bare.gates == {nft.Gate(100, "52:54:00:00:00:01", PortId(""))}
    assert with_gate.fingerprint == bare.fingerprint != ""
    assert nft.decode(b'{"nftables": []}') == nft.Ruleset(frozenset(), "")


def test_gates_are_added_and_removed_by_element() -> None:
    assert nft.gate_commands([GATE], []) == (
        f'add element netdev nahtlos moving100 {{ {MAC} comment "web-port" }}\n'
    )
    assert nft.gate_commands([], [GATE]) == f"delete element netdev nahtlos moving100 {{ {MAC} }}\n"
    assert nft.gate_commands([], []) == ""


def test_the_sacrifice_is_told_from_a_servers_frame() -> None:
    dummy = bytes(12) + b"\x88\xb5" + bytes(50)
    assert packet._is_sacrifice(dummy)
    assert not packet._is_sacrifice(bytes(12) + b"\x08\x00" + bytes(50))
