"""Network devices: requests that create and change them, and what the kernel says about them.

Owns the part of the rtnetlink format that deals with links. Never decides which devices there should be
(see plan) and never keeps anything between calls.
"""

import errno
import struct

import msgspec

from nahtlos.physical.network.netlink import (
    AF_BRIDGE,
    CREATE,
    EXCL,
    IFF_PROMISC,
    IFF_UP,
    REPLACE,
    RTM_DELLINK,
    RTM_GETLINK,
    RTM_NEWLINK,
    RTM_SETLINK,
    Netlink,
    Request,
    attribute,
    attributes,
    ipv4,
    mac_bytes,
    mac_text,
    nested,
    text,
    u8,
    u32,
)

IFLA_ADDRESS, IFLA_NAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_PROTINFO = 1, 3, 4, 5, 10, 12
IFLA_TXQUEUE, IFLA_STATE, IFLA_LINKINFO, IFLA_ALIAS, IFLA_STATS, IFLA_NETNS_FD = 13, 16, 18, 20, 23, 28
INFO_KIND, INFO_DATA, INFO_SLAVE_KIND, INFO_SLAVE_DATA = 1, 2, 4, 5
BRIDGE_FORWARD_DELAY, BRIDGE_STP, BRIDGE_SNOOPING = 1, 5, 23
PORT_HAIRPIN, PORT_LEARNING, PORT_UNICAST, PORT_MULTICAST, PORT_BROADCAST, PORT_SUPPRESS = 4, 8, 9, 27, 30, 32
VXLAN_ID, VXLAN_LOCAL, VXLAN_LEARNING, VXLAN_PORT = 1, 4, 7, 15
VETH_PEER = 1
VLAN_ID = 1
RTM_NEWQDISC, RTM_GETQDISC, TC_ROOT = 36, 38, 0xFFFFFFFF
TCA_KIND, TCA_STATS2, TCA_STATS_QUEUE = 1, 7, 3
NO_QUEUE = "noqueue"
STATE_UP = 6

HEADER = "BxHiII"
"""struct ifinfomsg: family, device type, index, flags, mask of flags to change"""


class Flood(msgspec.Struct, frozen=True):
    """What a bridge port may send and learn beyond its own forwarding entries."""

    unicast: bool = False
    multicast: bool = False
    broadcast: bool = False
    suppress: bool = False
    """The bridge answers ARP for neighbours it knows instead of asking behind this port."""
    learning: bool = False


class Stats(msgspec.Struct, frozen=True):
    rx_packets: int
    tx_packets: int
    tx_dropped: int


class LinkInfo(msgspec.Struct, frozen=True):
    """A device as the kernel has it."""

    index: int
    name: str
    kind: str
    up: bool
    mac: str
    mtu: int
    master: int
    alias: str
    flood: Flood | None
    """None unless it is a port of a bridge."""
    vni: int = 0
    local: str = ""
    queue: int = 0
    snooping: bool = False
    lower: int = 0
    """Index of the device that a VLAN is on."""
    vlan: int = 0
    promiscuous: bool = False
    """Asked to take every frame, by somebody who said so (not: by a bridge)."""
    running: bool = False
    """It has a carrier and the kernel has taken note of that: frames pass."""
    stats: Stats = Stats(0, 0, 0)


# --- requests ----------------------------------------------------------------------------------------


def _header(index: int = 0, flags: int = 0, change: int = 0, family: int = 0) -> bytes:
    return struct.pack(HEADER, family, 0, index, flags, change)


def _create(name: str, mtu: int, kind: str, *data: bytes, mac: str = "", index: int = 0) -> Request:
    body = _header(index) + text(IFLA_NAME, name) + u32(IFLA_MTU, mtu)
    if mac:
        body += attribute(IFLA_ADDRESS, mac_bytes(mac))
    info = [text(INFO_KIND, kind)] + ([nested(INFO_DATA, *data)] if data else [])
    body += nested(IFLA_LINKINFO, *info)
    return Request(RTM_NEWLINK, CREATE | EXCL, body, f"create {kind} {name}", frozenset({errno.EEXIST}))


def create_bridge(name: str, mtu: int, mac: str = "") -> Request:
    """No spanning tree, ports forward at once, multicast like broadcast."""
    return _create(
        name,
        mtu,
        "bridge",
        u32(BRIDGE_FORWARD_DELAY, 0),
        u32(BRIDGE_STP, 0),
        u8(BRIDGE_SNOOPING, 0),
        mac=mac,
    )


def set_bridge(name: str) -> Request:
    """Put right what `create_bridge` gives a bridge at its birth."""
    data = nested(INFO_DATA, u32(BRIDGE_FORWARD_DELAY, 0), u32(BRIDGE_STP, 0), u8(BRIDGE_SNOOPING, 0))
    body = _header() + text(IFLA_NAME, name) + nested(IFLA_LINKINFO, text(INFO_KIND, "bridge"), data)
    return Request(RTM_NEWLINK, 0, body, f"configure bridge {name}")


def create_vxlan(name: str, mtu: int, vni: int, local: str) -> Request:
    return _create(
        name,
        mtu,
        "vxlan",
        u32(VXLAN_ID, vni),
        attribute(VXLAN_LOCAL, ipv4(local)),
        u8(VXLAN_LEARNING, 0),
        attribute(VXLAN_PORT, struct.pack(">H", 4789)),
    )


def create_veth(
    name: str, peer: str, mtu: int, *, peer_namespace: int | None = None, index: int = 0
) -> Request:
    """A pair; the peer is born in the namespace of descriptor `peer_namespace`, if given. `index` 0: the
    next that is free."""
    other = _header() + text(IFLA_NAME, peer) + u32(IFLA_MTU, mtu)
    if peer_namespace is not None:
        other += u32(IFLA_NETNS_FD, peer_namespace)
    return _create(name, mtu, "veth", attribute(VETH_PEER, other), index=index)


def create_vlan(name: str, mtu: int, lower: int, vlan: int) -> Request:
    """What device `lower` sends and receives with the tag `vlan`."""
    request = _create(name, mtu, "vlan", attribute(VLAN_ID, struct.pack("H", vlan)))
    return msgspec.structs.replace(request, body=request.body + u32(IFLA_LINK, lower))


def create_ifb(name: str) -> Request:
    """A device whose frames come in again by the device that they were redirected from."""
    return _create(name, 1500, "ifb")


def impossible(kind: str) -> Request:
    """A device with a group address: refused by every kernel, for its kind if that is unknown."""
    return _create("nahtlos-probe", 1500, kind, mac="01:00:00:00:00:01")


def delete(name: str) -> Request:
    return Request(
        RTM_DELLINK, 0, _header() + text(IFLA_NAME, name), f"delete {name}", frozenset({errno.ENODEV})
    )


def configure(
    name: str,
    *,
    up: bool | None = None,
    promiscuous: bool | None = None,
    mtu: int | None = None,
    mac: str | None = None,
    master: int | None = None,
    alias: str | None = None,
    queue: int | None = None,
) -> Request:
    """Change what is given of a device; `master` 0 releases it from its bridge."""
    asked = {IFF_UP: up, IFF_PROMISC: promiscuous}
    change = sum(flag for flag, on in asked.items() if on is not None)
    flags = sum(flag for flag, on in asked.items() if on)
    body = _header(0, flags, change) + text(IFLA_NAME, name)
    if mtu is not None:
        body += u32(IFLA_MTU, mtu)
    if mac is not None:
        body += attribute(IFLA_ADDRESS, mac_bytes(mac))
    if master is not None:
        body += u32(IFLA_MASTER, master)
    if alias is not None:
        body += text(IFLA_ALIAS, alias) if alias else attribute(IFLA_ALIAS, b"")
    if queue is not None:
        body += u32(IFLA_TXQUEUE, queue)
    return Request(RTM_NEWLINK, 0, body, f"configure {name}")


def release(name: str) -> Request:
    """From its bridge; it is nobody's then. Fine if it has gone."""
    request = configure(name, master=0, alias="")
    return msgspec.structs.replace(request, tolerated=frozenset({errno.ENODEV}))


def set_flood(index: int, flood: Flood, what: str) -> Request:
    values = (
        u8(PORT_HAIRPIN, 0),
        u8(PORT_LEARNING, flood.learning),
        u8(PORT_UNICAST, flood.unicast),
        u8(PORT_MULTICAST, flood.multicast),
        u8(PORT_BROADCAST, flood.broadcast),
        u8(PORT_SUPPRESS, flood.suppress),
    )
    body = _header(index, family=AF_BRIDGE) + nested(IFLA_PROTINFO, *values)
    return Request(RTM_SETLINK, 0, body, f"set flooding of {what}")


# --- what is there -----------------------------------------------------------------------------------


def read_links(netlink: Netlink) -> dict[str, LinkInfo]:
    """Every device of the namespace, by name."""
    found = (_decode(body) for body in netlink.dump(RTM_GETLINK, _header()))
    return {link.name: link for link in found}


def read_link(netlink: Netlink, which: int | str) -> LinkInfo | None:
    """One device, by index or name."""
    body = _header(which) if isinstance(which, int) else _header() + text(IFLA_NAME, which)
    found = netlink.query(RTM_GETLINK, body)
    return None if found is None else _decode(found)


def no_queue(index: int, what: str) -> Request:
    """Frames are handed to a device at once, in the place of whatever kept them before. A tap that was made
    for many queues would else be given 256 queueing disciplines as it is set up, each with room for three
    times what its ring holds: 98 MB of the kernel's memory, cleared in one go (13 ms at best, 400 ms were
    seen), in which that processor forwards for nobody."""
    body = struct.pack("BxxxiIII", 0, index, 0, TC_ROOT, 0) + text(TCA_KIND, NO_QUEUE)
    return Request(RTM_NEWQDISC, CREATE | REPLACE, body, f"take the queue from {what}")


def waiting(netlink: Netlink, index: int) -> int:
    """Frames that wait in the queueing discipline of a device, not yet handed to it."""
    found = netlink.query(RTM_GETQDISC, struct.pack("BxxxiIII", 0, index, 0, TC_ROOT, 0))
    if found is None:
        return 0
    stats = attributes(attributes(found[20:]).get(TCA_STATS2, b"")).get(TCA_STATS_QUEUE, b"")
    return int(struct.unpack_from("I", stats)[0]) if stats else 0


def _decode(body: bytes) -> LinkInfo:
    _, index, flags, _ = struct.unpack_from(HEADER, body)[-4:]
    values = attributes(body[16:])
    info = attributes(values.get(IFLA_LINKINFO, b""))
    data = attributes(info.get(INFO_DATA, b""))
    kind = _string(info.get(INFO_KIND))
    vxlan, bridge = kind == "vxlan", kind == "bridge"
    return LinkInfo(
        index=index,
        name=_string(values.get(IFLA_NAME)),
        kind=kind,
        up=bool(flags & IFF_UP),
        mac=mac_text(values.get(IFLA_ADDRESS, b"")),
        mtu=_number(values.get(IFLA_MTU)),
        master=_number(values.get(IFLA_MASTER)),
        alias=_string(values.get(IFLA_ALIAS)),
        flood=_flood(info) if _string(info.get(INFO_SLAVE_KIND)) == "bridge" else None,
        vni=_number(data.get(VXLAN_ID)) if vxlan else 0,
        local=".".join(str(b) for b in data.get(VXLAN_LOCAL, b"")) if vxlan else "",
        queue=_number(values.get(IFLA_TXQUEUE)),
        snooping=bool(_number(data.get(BRIDGE_SNOOPING))) if bridge else False,
        lower=_number(values.get(IFLA_LINK)) if kind == "vlan" else 0,
        vlan=_number(data.get(VLAN_ID)) if kind == "vlan" else 0,
        promiscuous=bool(flags & IFF_PROMISC),
        running=_number(values.get(IFLA_STATE)) == STATE_UP,
        stats=_stats(values.get(IFLA_STATS, b"")),
    )


def _flood(info: dict[int, bytes]) -> Flood:
    data = attributes(info.get(INFO_SLAVE_DATA, b""))
    return Flood(
        unicast=bool(_number(data.get(PORT_UNICAST))),
        multicast=bool(_number(data.get(PORT_MULTICAST))),
        broadcast=bool(_number(data.get(PORT_BROADCAST))),
        suppress=bool(_number(data.get(PORT_SUPPRESS))),
        learning=bool(_number(data.get(PORT_LEARNING))),
    )


def _stats(data: bytes) -> Stats:
    if len(data) < 64:
        return Stats(0, 0, 0)
    rx, tx, _, _, _, _, _, dropped = struct.unpack_from("8Q", data)
    return Stats(rx_packets=rx, tx_packets=tx, tx_dropped=dropped)


def _string(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "little")
