"""The kernel's view of facts: read those of a namespace, and make changes to them in one batch.

Owns the translation between facts and rtnetlink or sysctls, for both families. Acts in the namespace its
socket was opened in (sysctls: of the calling thread). Routes and proxied neighbours carry a protocol number
of their own, so that on a host nobody else's are touched. Decides nothing.
"""

import errno
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

from nahtlos.physical.network import links, netlink
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Netlink, Request, attribute, attributes, u8, u32
from nahtlos.physical.network.routing.facts import (
    Address,
    Change,
    Entry,
    Fact,
    Link,
    Neighbour,
    Proxy,
    Route,
    Setting,
)

SYSCTL = Path("/proc/sys")
PROTOCOL = 110
"""Who made a route (rtm_protocol, NDA_PROTOCOL): this driver."""
BY_KERNEL = 2
MAIN = 254
UNICAST = 1
ON_LINK = 4
LINK_SCOPE, GLOBAL_SCOPE = 253, 0
NO_DETECTION = 0x02
"""IPv6: the same address is on every host on purpose."""
NTF_PROXY = 0x08
RTM_DELROUTE, RTM_GETROUTE = 25, 26
NEIGHBOUR_HEADER = "BxxxiHBB"
ROUTE_HEADER = "BBBBBBBBI"
FAMILIES = (socket.AF_INET, socket.AF_INET6)


# --- reading -----------------------------------------------------------------------------------------


def inside(socket_: Netlink, settings: Iterable[Setting]) -> frozenset[Fact]:
    """Everything in a namespace that is this driver's alone."""
    devices = links.read_links(socket_)
    names = {link.index: link.name for link in devices.values() if link.name != "lo"}
    found: set[Fact] = {Link(d.name, d.mac, d.mtu) for d in devices.values() if d.up and d.name != "lo"}
    found.update(_addresses(socket_, names), _neighbours(socket_, names))
    found.update(_routes(socket_, names, only=None))
    found.update(_settings(settings))
    return frozenset(found)


def outside(
    socket_: Netlink, devices: Mapping[str, LinkInfo], own: Iterable[str], settings: Iterable[Setting]
) -> frozenset[Fact]:
    """What this driver has on the host because of its namespaces; `own` are its devices there."""
    every = {link.index: link.name for link in devices.values()}
    names = {devices[name].index: name for name in own if name in devices}
    found: set[Fact] = set(_entries(socket_, names))
    found.update(_neighbours(socket_, names), _proxies(socket_, every))
    found.update(_routes(socket_, every, only=PROTOCOL))
    found.update(_settings(settings))
    return frozenset(found)


def _addresses(socket_: Netlink, names: Mapping[int, str]) -> Iterable[Fact]:
    for family in FAMILIES:
        for body in socket_.dump(netlink.RTM_GETADDR, struct.pack("BBBBI", family, 0, 0, 0, 0)):
            _, prefix, _, _, index = struct.unpack_from("BBBBI", body)
            values = attributes(body[8:])
            ip = values.get(2, values.get(1))
            if index in names and ip:
                yield Address(names[index], f"{socket.inet_ntop(family, ip)}/{prefix}")


def _neighbours(socket_: Netlink, names: Mapping[int, str]) -> Iterable[Fact]:
    for family in FAMILIES:
        header = struct.pack(NEIGHBOUR_HEADER, family, 0, 0, 0, 0)
        for body in socket_.dump(netlink.RTM_GETNEIGH, header):
            _, index, state, _, _ = struct.unpack_from(NEIGHBOUR_HEADER, body)
            values = attributes(body[12:])
            if index in names and state == netlink.NUD_PERMANENT and 1 in values and 2 in values:
                mac = netlink.mac_text(values[2])
                yield Neighbour(names[index], socket.inet_ntop(family, values[1]), mac)


def _proxies(socket_: Netlink, names: Mapping[int, str]) -> Iterable[Fact]:
    header = struct.pack(NEIGHBOUR_HEADER, socket.AF_INET, 0, 0, NTF_PROXY, 0)
    for body in socket_.dump(netlink.RTM_GETNEIGH, header):
        _, index, _, _, _ = struct.unpack_from(NEIGHBOUR_HEADER, body)
        values = attributes(body[12:])
        if index in names and 1 in values and values.get(12, b"") == bytes((PROTOCOL,)):
            yield Proxy(names[index], socket.inet_ntoa(values[1]))


def _entries(socket_: Netlink, names: Mapping[int, str]) -> Iterable[Fact]:
    header = struct.pack(NEIGHBOUR_HEADER, netlink.AF_BRIDGE, 0, 0, 0, 0)
    for body in socket_.dump(netlink.RTM_GETNEIGH, header):
        _, index, state, flags, _ = struct.unpack_from(NEIGHBOUR_HEADER, body)
        values = attributes(body[12:])
        by_bridge = state == netlink.NUD_NOARP and not flags & netlink.NTF_SELF
        if index in names and by_bridge and 9 in values and 2 in values:
            yield Entry(names[index], netlink.mac_text(values[2]))


def _routes(socket_: Netlink, names: Mapping[int, str], only: int | None) -> Iterable[Fact]:
    """Of the main table, but the kernel's own; with `only`, of that protocol."""
    for family in FAMILIES:
        for body in socket_.dump(RTM_GETROUTE, struct.pack(ROUTE_HEADER, family, *([0] * 8))):
            _, length, _, _, table, protocol, _, kind, flags = struct.unpack_from(ROUTE_HEADER, body)
            values = attributes(body[12:])
            index = int.from_bytes(values.get(4, b""), "little")
            if table != MAIN or kind != UNICAST or index not in names or flags & 0x200:  # a cached copy
                continue
            if protocol == BY_KERNEL or (only is not None and protocol != only):
                continue
            yield Route(
                _destination(family, values.get(1), length), names[index], _text(family, values.get(5))
            )


def _destination(family: int, value: bytes | None, length: int) -> str:
    packed = value if value is not None else bytes(16 if family == socket.AF_INET6 else 4)
    return f"{socket.inet_ntop(family, packed)}/{length}"


def _text(family: int, value: bytes | None) -> str:
    return socket.inet_ntop(family, value) if value else ""


def _settings(settings: Iterable[Setting]) -> Iterable[Fact]:
    for setting in settings:
        try:
            yield Setting(setting.path, (SYSCTL / setting.path).read_text().strip())
        except OSError:
            yield setting  # this kernel has none such


# --- acting ------------------------------------------------------------------------------------------


def make(socket_: Netlink, changes: Sequence[Change], devices: Mapping[str, LinkInfo]) -> None:
    """In order, netlink in batches; each is tried even if one before it failed."""
    for change in changes:
        if isinstance(change.fact, Setting):
            (SYSCTL / change.fact.path).write_text(change.fact.value)
    requests = [
        request
        for change in changes
        if (request := _request(change.fact, devices, remove=change.remove)) is not None
    ]
    if requests:
        socket_.change(requests)


def _request(fact: Fact, devices: Mapping[str, LinkInfo], *, remove: bool) -> Request | None:
    """None for what is no netlink request, or about a device that is not there."""
    if isinstance(fact, Setting) or fact.device not in devices:
        return None
    index = devices[fact.device].index
    match fact:
        case Link():
            return links.configure(fact.device, mac=fact.mac or None, mtu=fact.mtu or None, up=True)
        case Address():
            return remove_address(index, fact.cidr) if remove else address(index, fact.cidr)
        case Neighbour():
            if remove:
                return netlink.remove_neighbour(index, fact.ip)
            return netlink.neighbour(index, fact.ip, fact.mac)
        case Route():
            return route(index, fact, remove=remove)
        case Entry():
            if remove:
                return netlink.remove_forward(index, fact.mac)
            return netlink.forward_to_port(index, fact.mac)
        case Proxy():
            return proxy(index, fact.ip, remove=remove)


def _address_body(index: int, cidr: str, flags: int) -> bytes:
    interface = ip_interface(cidr)
    packed, family = interface.ip.packed, netlink.family_of(cidr)
    body = struct.pack("BBBBI", family, interface.network.prefixlen, flags, 0, index)
    return body + attribute(2, packed) + attribute(1, packed)


def address(index: int, cidr: str) -> Request:
    flags = NO_DETECTION if ":" in cidr else 0
    body = _address_body(index, cidr, flags)
    create = netlink.CREATE | netlink.EXCL
    return Request(netlink.RTM_NEWADDR, create, body, f"address {cidr}", frozenset({errno.EEXIST}))


def remove_address(index: int, cidr: str) -> Request:
    gone = frozenset({errno.EADDRNOTAVAIL, errno.ENODEV})
    return Request(netlink.RTM_DELADDR, 0, _address_body(index, cidr, 0), f"remove address {cidr}", gone)


def route(index: int, fact: Route, *, remove: bool = False) -> Request:
    network, family = ip_network(fact.destination), netlink.family_of(fact.destination)
    scope = LINK_SCOPE if not fact.via and family == socket.AF_INET else GLOBAL_SCOPE
    flags = ON_LINK if fact.via and not remove else 0
    header = (family, network.prefixlen, 0, 0, MAIN, 0 if remove else PROTOCOL, scope, UNICAST, flags)
    body = struct.pack(ROUTE_HEADER, *header)
    if network.prefixlen:
        body += attribute(1, network.network_address.packed)
    body += u32(4, index)
    if fact.via:
        body += attribute(5, ip_address(fact.via).packed)
    if remove:
        return Request(RTM_DELROUTE, 0, body, f"remove {fact}", frozenset({errno.ESRCH}))
    return Request(netlink.RTM_NEWROUTE, netlink.CREATE | netlink.REPLACE, body, str(fact))


def proxy(index: int, ip: str, *, remove: bool = False) -> Request:
    body = struct.pack(NEIGHBOUR_HEADER, socket.AF_INET, index, 0, NTF_PROXY, 0)
    body += attribute(1, ip_address(ip).packed) + u8(12, PROTOCOL)
    if remove:
        gone = frozenset({errno.ENOENT, errno.ENODEV})
        return Request(netlink.RTM_DELNEIGH, 0, body, f"stop answering for {ip}", gone)
    return Request(netlink.RTM_NEWNEIGH, netlink.CREATE | netlink.REPLACE, body, f"answer for {ip}")
