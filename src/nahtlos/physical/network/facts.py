"""Entries of the kernel's tables as they are read and as they are told of: by the index of their device.

Owns decoding forwarding entries, neighbours and addresses. An entry is a fact until the names of its devices
are known, which makes it an item (see plan). Keeps nothing.
"""

import socket
import struct
from collections.abc import Iterable

import msgspec

from nahtlos.physical.network import netlink
from nahtlos.physical.network.items import Address, Forward, Item, Neighbour, TunnelEntry
from nahtlos.physical.network.netlink import ANY_MAC, Netlink

HEADER = "BxxxiHBB"
"""struct ndmsg: family, device, state, flags, type"""
ADDRESS_HEADER = "BBBBI"
"""struct ifaddrmsg: family, prefix length, flags, scope, device"""
FAMILIES = (socket.AF_INET, socket.AF_INET6)
KINDS = frozenset(
    (netlink.RTM_NEWNEIGH, netlink.RTM_DELNEIGH, netlink.RTM_NEWADDR, netlink.RTM_DELADDR),
)

Key = tuple[str, ...]
"""Which of its device's entries it is."""


class Fact(msgspec.Struct, frozen=True):
    """`port` is the enslaved device that a bridge's entry leads to, 0 for other kinds of entries."""

    item: type[Forward] | type[TunnelEntry] | type[Neighbour] | type[Address]
    values: tuple[str, str]
    flag: bool = False
    port: int = 0


Told = tuple[int, Key, Fact | None, int]
"""Device, entry, what it is now (None: gone, or no business of ours), and the port that was told of."""


def item_of(fact: Fact, device: str, port: str) -> Item:
    first, second = fact.values
    if fact.item is Forward:
        return Forward(device, first, port)
    if fact.item is TunnelEntry:
        return TunnelEntry(device, first, second)
    if fact.item is Neighbour:
        return Neighbour(device, first, second, fact.flag)
    return Address(device, first, routed=fact.flag)


def read(socket_: Netlink) -> Iterable[Told]:
    """Every entry of the namespace."""
    for family in (netlink.AF_BRIDGE, *FAMILIES):
        header = struct.pack(HEADER, family, 0, 0, 0, 0)
        for body in socket_.dump(netlink.RTM_GETNEIGH, header):
            yield from _some(decode(netlink.RTM_NEWNEIGH, body))
    for family in FAMILIES:
        for body in socket_.dump(netlink.RTM_GETADDR, struct.pack(ADDRESS_HEADER, family, 0, 0, 0, 0)):
            yield from _some(decode(netlink.RTM_NEWADDR, body))


def _some(told: Told | None) -> Iterable[Told]:
    return () if told is None else (told,)


def decode(kind: int, body: bytes) -> Told | None:
    """What one message of the kernel tells; None if it is about no entry of these tables."""
    if kind in (netlink.RTM_NEWADDR, netlink.RTM_DELADDR):
        return _address(body, gone=kind == netlink.RTM_DELADDR)
    family, index, state, flags, _ = struct.unpack_from(HEADER, body)
    gone, values = kind == netlink.RTM_DELNEIGH, netlink.attributes(body[12:])
    if family in FAMILIES:
        return _neighbour(family, index, state, flags, values, gone=gone)
    if family != netlink.AF_BRIDGE:
        return None
    mac = netlink.mac_text(values.get(2, b""))
    if flags & netlink.NTF_SELF:
        return _tunnel(index, mac, values, gone=gone)
    if 9 not in values:
        return None
    # A bridge's entry belongs to the bridge: it may lead to another port and still be the same.
    bridge = int(struct.unpack("I", values[9])[0])
    static = state == netlink.NUD_NOARP and not gone
    return bridge, ("forward", mac), Fact(Forward, (mac, ""), port=index) if static else None, index


def _tunnel(index: int, mac: str, values: dict[int, bytes], *, gone: bool) -> Told | None:
    if 1 not in values or len(values[1]) != 4:
        return None
    vtep = socket.inet_ntoa(values[1])
    key = ("tunnel", mac, vtep if mac == ANY_MAC else "")
    return index, key, None if gone else Fact(TunnelEntry, (mac, vtep)), 0


def _neighbour(
    family: int, index: int, state: int, flags: int, values: dict[int, bytes], *, gone: bool
) -> Told | None:
    if 1 not in values:
        return None
    ip = socket.inet_ntop(family, values[1])
    if gone or state != netlink.NUD_PERMANENT or 2 not in values:
        return index, ("neighbour", ip), None, 0
    router = bool(flags & netlink.NTF_ROUTER)
    return index, ("neighbour", ip), Fact(Neighbour, (ip, netlink.mac_text(values[2])), router), 0


def _address(body: bytes, *, gone: bool) -> Told | None:
    family, prefix, _, _, index = struct.unpack_from(ADDRESS_HEADER, body)
    values = netlink.attributes(body[8:])
    own = 2 if family == socket.AF_INET else 1
    if own not in values:
        return None
    cidr = f"{socket.inet_ntop(family, values[own])}/{prefix}"
    if cidr.startswith("fe80:"):
        return None  # the kernel's own doing, which goes with the setting that allows it
    flags = int.from_bytes(values.get(8, b""), "little")
    fact = None if gone else Fact(Address, (cidr, ""), not flags & netlink.NO_PREFIX_ROUTE)
    return index, ("address", cidr), fact, 0
