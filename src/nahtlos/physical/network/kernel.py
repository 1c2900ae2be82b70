"""The kernel's view of this driver's items: read them, and carry out changes to them.

Owns the translation between items (see plan) and rtnetlink, sysctls. Reads only devices that carry the
driver's alias or a name that is about to be used, so nothing foreign is ever seen as surplus. Decides
nothing.
"""

import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import PortId
from nahtlos.physical.network import links, netlink
from nahtlos.physical.network.device_names import OWNED, far_end, is_lent, port_of_alias
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
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Netlink, Request
from nahtlos.physical.network.plan import SILENT, Change

SYSCTL = Path("/proc/sys")
NEIGHBOUR_HEADER = "BxxxiHBB"


class Observed(msgspec.Struct, frozen=True):
    """What is there that belongs to this driver."""

    items: frozenset[Item]
    links: dict[str, LinkInfo]
    taps: dict[PortId, tuple[str, str]]
    """Device and MAC of each port that has a tap here."""


# --- reading -----------------------------------------------------------------------------------------


def taps_of(devices: dict[str, LinkInfo]) -> dict[PortId, tuple[str, str]]:
    """Device and MAC of each port that has a tap among `devices`."""
    found: dict[PortId, tuple[str, str]] = {}
    for link in devices.values():
        named = port_of_alias(link.alias)
        if named is not None:
            found[named[0]] = (link.name, named[1])
    return found


def device_of(link: LinkInfo, master: str, lower: str = "") -> Device:
    if is_lent(link.alias):
        return Device(link.name, "interface", link.alias, 0, master=master, up=link.up)
    return Device(
        name=link.name,
        kind=link.kind,
        alias=link.alias,
        mtu=link.mtu,
        mac=link.mac if link.kind == "bridge" else "",
        master=master,
        vni=link.vni,
        local=link.local,
        up=link.up,
        snooping=link.snooping,
        ring=link.queue if link.kind == "tun" else 0,
        lower=lower,
        vlan=link.vlan,
    )


def addresses(socket_: Netlink) -> Iterable[tuple[int, str, int]]:
    """Device, address with its prefix length, and flags of every address in the namespace."""
    for family, own in ((socket.AF_INET, 2), (socket.AF_INET6, 1)):
        for body in socket_.dump(netlink.RTM_GETADDR, struct.pack("BBBBI", family, 0, 0, 0, 0)):
            _, prefix, _, _, index = struct.unpack_from("BBBBI", body)
            values = netlink.attributes(body[8:])
            if own in values:
                flags = int.from_bytes(values.get(8, b""), "little")
                yield index, f"{socket.inet_ntop(family, values[own])}/{prefix}", flags


def setting(path: str) -> Setting | None:
    try:
        return Setting(path, (SYSCTL / path).read_text().strip())
    except OSError:
        return None


def forces_forwarding() -> bool:
    """Single devices can be let route IPv6 (since 6.17)."""
    return (SYSCTL / "net/ipv6/conf/all/force_forwarding").exists()


# --- acting ------------------------------------------------------------------------------------------


def refuse_foreign(wanted: Iterable[Item], devices: dict[str, LinkInfo]) -> None:
    """Conflict if a device with a name that this driver needs belongs to somebody else."""
    for item in wanted:
        if isinstance(item, Device) and item.kind != "interface":
            there = devices.get(item.name)
            if there is not None and not there.alias.startswith(OWNED):
                raise Conflict(
                    f"interface {item.name} exists and was not made by nahtlos",
                    field="network",
                    remedy=f"remove or rename {item.name}, or choose another VNI for the network",
                )


def create_devices(socket_: Netlink, todo: Sequence[Change]) -> None:
    """First half: devices are born and take their settings, one that is of the wrong kind goes first."""
    wrong = [links.delete(c.item.name) for c in todo if isinstance(c.item, Device) and _reborn(c)]
    born: list[Request] = []
    for change in todo:
        item = change.item
        if isinstance(item, Device) and not change.remove and (change.before is None or _reborn(change)):
            born += _birth(item)
    if wrong:
        socket_.change(wrong)
    if born:
        socket_.change(born)
    devices = links.read_links(socket_) if any(isinstance(c.item, Device) for c in todo) else {}
    settings = [_settings(c.item, devices) for c in todo if isinstance(c.item, Device) and not c.remove]
    if settings:
        socket_.change([request for requests in settings for request in requests])


def _reborn(change: Change) -> bool:
    """Settings of a device that cannot be changed while it lives."""
    item, before = change.item, change.before
    return (
        isinstance(item, Device)
        and isinstance(before, Device)
        and "interface" not in (item.kind, before.kind)
        and _nature(item) != _nature(before)
    )


def _nature(device: Device) -> tuple[object, ...]:
    return device.kind, device.vni, device.local, device.lower, device.vlan


def _birth(device: Device) -> list[Request]:
    """The alias comes in the same send: no moment at which a device of ours is nobody's."""
    match device.kind:
        case "bridge":
            request = links.create_bridge(device.name, device.mtu, device.mac)
        case "vxlan":
            request = links.create_vxlan(device.name, device.mtu, device.vni, device.local)
        case "vlan":
            request = links.create_vlan(device.name, device.mtu, _present(device.lower), device.vlan)
        case "veth" if not device.master:
            peer = far_end(device.name)
            both = [links.configure(name, alias=device.alias) for name in (device.name, peer)]
            return [links.create_veth(device.name, peer, device.mtu), *both]
        case _:
            return []
    return [request, links.configure(device.name, alias=device.alias)]


def _present(name: str) -> int:
    """Its index; 0 if it has gone, which the kernel then refuses in its own words."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _settings(device: Device, devices: dict[str, LinkInfo]) -> list[Request]:
    there = devices.get(device.name)
    if there is None:
        return []  # the peer of a pair that could not be made: its own request has failed already
    master = devices[device.master].index if device.master in devices else 0
    requests: list[Request] = []
    if device.kind == "bridge" and there.snooping != device.snooping:
        requests.append(links.set_bridge(device.name))
    requests.append(
        links.configure(
            device.name,
            mtu=device.mtu if device.mtu and device.mtu != there.mtu else None,
            mac=device.mac if device.mac and device.mac != there.mac else None,
            master=master if master != there.master else None,
            alias=device.alias if device.alias != there.alias else None,
            queue=device.ring if device.ring and device.ring != there.queue else None,
        )
    )
    if master and master != there.master:
        # A port is born learning and flooding: not for a moment while it is up.
        requests.append(links.set_flood(there.index, SILENT, device.name))
    requests.append(links.configure(device.name, up=device.up))
    return requests


def write_settings(todo: Iterable[Change]) -> int:
    """Sysctls; those this kernel does not have are left out. Returns how many were written."""
    written = 0
    for change in todo:
        if isinstance(change.item, Setting) and not change.remove:
            path = SYSCTL / change.item.path
            if path.exists():
                path.write_text(change.item.value)
                written += 1
    return written


def requests_of(todo: Sequence[Change], devices: dict[str, LinkInfo]) -> list[Request]:
    """Second half: everything but devices and sysctls, in order."""
    requests: list[Request] = []
    for change in todo:
        request = _removal(change.item, devices) if change.remove else _putting(change.item, devices)
        if request is not None:
            requests.append(request)
    return requests


def _index(name: str, devices: dict[str, LinkInfo]) -> int | None:
    link = devices.get(name)
    return link.index if link else None


def _putting(item: Item, devices: dict[str, LinkInfo]) -> Request | None:
    device = item.device if not isinstance(item, Device | Setting) else ""
    index = _index(device, devices)
    if index is None:
        return None
    match item:
        case PortFlood():
            return links.set_flood(index, item.flood, item.device)
        case Address():
            return netlink.address(index, item.cidr, routed=item.routed)
        case Neighbour():
            return netlink.neighbour(index, item.ip, item.mac, router=item.router)
        case TunnelEntry():
            return netlink.tunnel_entry(index, item.mac, item.vtep)
        case Forward():
            return netlink.forward_to_port(index, item.mac)
        case Device() | Setting():
            return None


def _removal(item: Item, devices: dict[str, LinkInfo]) -> Request | None:
    if isinstance(item, Device) and item.kind == "interface":
        return links.release(item.name)
    if isinstance(item, Device):
        # The far end of a pair goes with the near one; asking for both is tolerated.
        return links.delete(item.name)
    index = _index(item.device, devices) if not isinstance(item, Setting) else None
    if index is None:
        return None
    match item:
        case Address():
            return netlink.remove_address(index, item.cidr)
        case Neighbour():
            return netlink.remove_neighbour(index, item.ip)
        case TunnelEntry():
            return netlink.remove_tunnel_entry(index, item.mac, item.vtep)
        case Forward():
            return netlink.remove_forward(index, item.mac)
        case PortFlood() | Setting():
            return None
