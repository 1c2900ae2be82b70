"""Decides what the devices and tables of a host should be, and what to change to get there.

Pure: (configuration, which taps exist) -> items that should be there; (items that should be there, items
that are there) -> changes in the order in which they are safe. An item is one fact about the kernel that
can be true or not, and says in words what it is. Acting is in `kernel`, reading too.

The order of changes: devices, then settings and addresses, then what tunnels need, then the entry that
decides where frames go; what is to be removed goes last, the other way round. So a port that left is sent
through a tunnel entry that is there already, and one that came is delivered before its tunnel entry goes.
"""

import functools
import socket
from collections.abc import Iterable, Mapping

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, Uplink
from nahtlos.model.ids import HostId, NetworkId, PortId
from nahtlos.model.networking import Family, NetworkSpec, ProviderLink, SubnetSpec
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network.device_names import (
    bridge_mac,
    bridge_name,
    gate_name,
    gate_port_name,
    network_alias,
    port_alias,
    provider_alias,
    provider_far_name,
    provider_name,
    tap_name,
    tunnel_name,
)
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
from nahtlos.physical.network.links import Flood
from nahtlos.physical.network.netlink import ANY_MAC
from nahtlos.physical.network.provider.ways import Way
from nahtlos.physical.network.tap import QUEUE

REMEMBERED_PORTS = 1 << 15
NO_WAYS: Mapping[NetworkId, Way] = {}

TUNNEL_FLOOD = Flood(unicast=True, multicast=True, broadcast=True, suppress=True)
"""Unicast too: a server that has just been created is found before every host has been told of it."""
TUNNEL_ASIDE = Flood(suppress=True)
"""Of a network that is one with an outside one: hosts reach each other there, and the tunnel only passes on
what came to the old host of a server that moves. Frames that went both ways would go round for ever."""
OUTWARD = Flood(unicast=True, multicast=True, broadcast=True)
DELIVERING = Flood(multicast=True, broadcast=True)
SILENT = Flood()


# --- what should be there ----------------------------------------------------------------------------


class Place(msgspec.Struct, frozen=True):
    """The host for which is planned."""

    host: HostId
    role: HostRole
    address: str
    forced: bool = True
    """See `forwarding_ipv6`."""


def desired_items(
    config: HostConfig, place: Place, taps: Mapping[PortId, str], ways: Mapping[NetworkId, Way] = NO_WAYS
) -> frozenset[Item]:
    """`taps` are the ports that have a tap here, with their MAC. Taps themselves come and go by
    `port_create` and `port_delete`; one that is there is kept enslaved and, if its port belongs here,
    delivered to. `ways`: networks that reach an outside one from this host."""
    items: set[Item] = set(desired_settings(config, place))
    reflected = frozenset(config.reflect)
    for network in config.networks:
        spec = _normal_spec(network.spec)
        way = ways.get(spec.id)
        items.update(_devices(spec, place, way), _own_address(network, place), _paths(network, spec, place))
        tunnel, outward = tunnel_name(spec.vni), leads_out(spec, way)
        for port in network.ports:
            out = outward if outward and port.id not in reflected else tunnel
            items.update(_port_items(port, spec.vni, spec.mtu, place, port.id in taps, out))
    return frozenset(items)


def desired_settings(config: HostConfig, place: Place) -> frozenset[Setting]:
    return frozenset(
        setting
        for network in config.networks
        for setting in _settings(network, [u for u in config.uplinks if u.network == network.spec.id], place)
    )


def normal(network: NetworkConfig) -> NetworkConfig:
    """MACs as the kernel writes them, so that comparing finds no difference where there is none."""
    ports = tuple(map(_normal_port, network.ports))
    return msgspec.structs.replace(network, spec=_normal_spec(network.spec), ports=ports)


def _normal_spec(spec: NetworkSpec) -> NetworkSpec:
    return msgspec.structs.replace(spec, gateway_mac=spec.gateway_mac.lower())


def _normal_port(port: PortConfig) -> PortConfig:
    return port if port.mac.islower() else msgspec.structs.replace(port, mac=port.mac.lower())


def network_items(network: NetworkConfig, place: Place, way: Way | None = None) -> frozenset[Item]:
    """One network without its ports: enough to attach a tap to."""
    spec = _normal_spec(network.spec)
    return frozenset(
        (
            *_devices(spec, place, way),
            *_own_address(network, place),
            *_paths(network, spec, place),
            *_settings(network, (), place),
        )
    )


def _devices(spec: NetworkSpec, place: Place, way: Way | None) -> Iterable[Item]:
    bridge, tunnel, alias = bridge_name(spec.vni), tunnel_name(spec.vni), network_alias(spec.id)
    gate, gate_port = gate_name(spec.vni), gate_port_name(spec.vni)
    mac = spec.gateway_mac if _is_gateway(spec, place) else bridge_mac(spec.vni)
    yield Device(bridge, "bridge", alias, spec.mtu, mac=mac)
    yield Device(tunnel, "vxlan", alias, spec.mtu, master=bridge, vni=spec.vni, local=place.address)
    yield Device(gate, "veth", alias, spec.mtu)
    yield Device(gate_port, "veth", alias, spec.mtu, master=bridge)
    yield PortFlood(tunnel, TUNNEL_FLOOD if spec.provider is None else TUNNEL_ASIDE)
    yield PortFlood(gate_port, SILENT)
    if spec.provider is not None and way is not None:
        yield from _provider_devices(spec, spec.provider, way)


def _provider_devices(spec: NetworkSpec, provider: ProviderLink, way: Way) -> Iterable[Item]:
    bridge, name, alias = bridge_name(spec.vni), provider_name(spec.vni), network_alias(spec.id)
    match way:
        case Way.FLAT:
            name = provider.interface
            yield Device(name, "interface", provider_alias(spec.id), 0, master=bridge)
        case Way.VLAN_DEVICE:
            yield Device(
                name,
                "vlan",
                alias,
                spec.mtu,
                master=bridge,
                lower=provider.interface,
                vlan=provider.vlan,
            )
        case Way.PROGRAMS:
            yield Device(provider_far_name(spec.vni), "veth", alias, spec.mtu)
            yield Device(name, "veth", alias, spec.mtu, master=bridge)
    yield PortFlood(name, OUTWARD)


def leads_out(spec: NetworkSpec, way: Way | None) -> str:
    """The port of the bridge that leads to the outside network; empty if none does."""
    if spec.provider is None or way is None:
        return ""
    return spec.provider.interface if way is Way.FLAT else provider_name(spec.vni)


def _is_gateway(spec: NetworkSpec, place: Place) -> bool:
    return spec.gateway_host == place.host


def _own_address(network: NetworkConfig, place: Place) -> Iterable[Item]:
    """Of the network's own gateway, where that is: in each subnet."""
    spec = network.spec
    bridge = bridge_name(spec.vni)
    if _is_gateway(spec, place):
        yield Address(bridge, f"{spec.gateway_ip}/{network.prefix_length}", routed=True)
        for subnet in _ipv6_with_gateway(spec):
            yield Address(bridge, f"{canonical(subnet.gateway_ip)}/{subnet.cidr.split('/')[1]}", routed=True)


def _ipv6_with_gateway(spec: NetworkSpec) -> Iterable[SubnetSpec]:
    return (s for s in spec.all_subnets if s.family is Family.IPV6 and s.gateway_ip)


def _paths(network: NetworkConfig, spec: NetworkSpec, place: Place) -> Iterable[Item]:
    """What leads to other hosts, whatever ports there are."""
    bridge, tunnel = bridge_name(spec.vni), tunnel_name(spec.vni)
    for vtep in network.vteps:
        if vtep != place.address and spec.provider is None:
            yield TunnelEntry(tunnel, ANY_MAC, vtep)
    if spec.gateway_mac and not _is_gateway(spec, place):
        yield Neighbour(bridge, spec.gateway_ip, spec.gateway_mac)
        for subnet in _ipv6_with_gateway(spec):
            for address in (subnet.gateway_ip, link_local(spec.gateway_mac)):
                yield Neighbour(bridge, canonical(address), spec.gateway_mac, router=True)
        yield TunnelEntry(tunnel, spec.gateway_mac, network.gateway_vtep)
        yield Forward(bridge, spec.gateway_mac, tunnel)


def link_local(mac: str) -> str:
    """By which servers know a router (RFC 4291, appendix A)."""
    b = bytes.fromhex(mac.replace(":", ""))
    tail = bytes((b[0] ^ 2, b[1], b[2], 0xFF, 0xFE, b[3], b[4], b[5]))
    return socket.inet_ntop(socket.AF_INET6, b"\xfe\x80" + bytes(6) + tail)


def canonical(address: str) -> str:
    """As the kernel writes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_ntop(family, socket.inet_pton(family, address))


@functools.lru_cache(maxsize=REMEMBERED_PORTS)
def _port_items(
    port: PortConfig, vni: int, mtu: int, place: Place, has_tap: bool, out: str
) -> tuple[Item, ...]:
    """`out`: by which device other hosts are reached. Of a port that has not changed they are the very same
    objects, which compare at once."""
    port = _normal_port(port)
    bridge, tunnel, name = bridge_name(vni), tunnel_name(vni), tap_name(port.id)
    items: list[Item] = [Neighbour(bridge, canonical(ip), port.mac) for ip in port.all_addresses]
    here = port.host == place.host
    if not here:
        items += [TunnelEntry(tunnel, port.mac, port.vtep), Forward(bridge, port.mac, out)]
    elif has_tap:
        items.append(Forward(bridge, port.mac, name))
    if has_tap:
        items += [tap_device(port, vni, mtu), PortFlood(name, DELIVERING if here else SILENT)]
    return tuple(items)


def tap_device(port: PortConfig, vni: int, mtu: int) -> Device:
    alias = port_alias(port.id, port.mac)
    return Device(tap_name(port.id), "tun", alias, mtu, master=bridge_name(vni), ring=QUEUE)


def _settings(network: NetworkConfig, uplinks: Iterable[Uplink], place: Place) -> Iterable[Setting]:
    vni = network.spec.vni
    bridge = bridge_name(vni)
    own = [tunnel_name(vni), gate_name(vni), gate_port_name(vni)]
    if (provider := network.spec.provider) is not None:
        own += [provider_name(vni), provider_far_name(vni)] if provider.vlan else [provider.interface]
    for name in own:
        yield Setting(f"net/ipv6/conf/{name}/disable_ipv6", "1")
    # With IPv6 the bridge knows neighbours, so that it can answer for them; no address is its own by itself.
    ipv6 = any(subnet.family is Family.IPV6 for subnet in network.spec.all_subnets)
    yield Setting(f"net/ipv6/conf/{bridge}/accept_ra", "0")
    yield Setting(f"net/ipv6/conf/{bridge}/addr_gen_mode", "1")
    yield Setting(f"net/ipv6/conf/{bridge}/disable_ipv6", "0" if ipv6 else "1")
    # The bridge answers ARP for its own address only, and never lets the host's other ones out.
    yield Setting(f"net/ipv4/conf/{bridge}/arp_ignore", "1")
    yield Setting(f"net/ipv4/conf/{bridge}/arp_announce", "2")
    yield Setting(f"net/ipv4/conf/{bridge}/rp_filter", "0")
    interfaces = [u.interface for u in uplinks]
    for interface in interfaces:
        yield Setting(f"net/ipv4/conf/{interface}/forwarding", "1")
    yield Setting(f"net/ipv4/conf/{bridge}/forwarding", "1" if interfaces else "0")
    if interfaces and any(True for _ in _ipv6_with_gateway(network.spec)):
        yield from forwarding_ipv6((bridge, *interfaces), forced=place.forced)


def forwarding_ipv6(devices: Iterable[str], *, forced: bool) -> Iterable[Setting]:
    """A host routes IPv6 between all of its devices or none, and then ignores what other routers advertise,
    unless it is told not to. `forced`: its kernel can let single devices route (since 6.17)."""
    if forced:
        yield from (Setting(f"net/ipv6/conf/{device}/force_forwarding", "1") for device in devices)
    else:
        yield Setting("net/ipv6/conf/all/forwarding", "1")


# --- what to change ----------------------------------------------------------------------------------


class Change(msgspec.Struct, frozen=True):
    """Make `item` true, or remove it. `before` is what was there instead of it."""

    item: Item
    remove: bool = False
    before: Item | None = None

    def __str__(self) -> str:
        if self.remove:
            return f"{self.item} was not asked for: removed"
        return f"{self.item} was {'different' if self.before else 'missing'}: put right"


def changes(desired: frozenset[Item], observed: frozenset[Item]) -> tuple[Change, ...]:
    """In the order in which to make them. Nothing if the two agree."""
    missing, surplus = desired - observed, observed - desired
    before = {item.key: item for item in surplus}
    wanted = {item.key for item in missing}
    put = [Change(i, before=before.get(i.key)) for i in missing]
    gone = [Change(i, remove=True) for i in surplus if i.key not in wanted and not _kept(i)]
    put.sort(key=lambda c: (c.item.rank, _birth(c.item), c.item.key))
    gone.sort(key=lambda c: (-c.item.rank, -_birth(c.item), c.item.key))
    return (*put, *gone)


def _kept(item: Item) -> bool:
    """Not removed by being left out: a tap holds frames and a running server, an ifb is looked after by
    `shaping`; the rest of these go with their device."""
    return isinstance(item, PortFlood | Setting) or (isinstance(item, Device) and item.kind in ("tun", "ifb"))


def _birth(item: Item) -> int:
    """Bridges before what is enslaved to them."""
    return 0 if isinstance(item, Device) and item.kind == "bridge" else 1


def without(todo: Iterable[Change], held: frozenset[str]) -> tuple[Change, ...]:
    """Leaves out what decides about ports that take part in a move (`held`: their MACs and taps). Their taps
    stay enslaved, their addresses known."""
    return tuple(
        c
        for c in todo
        if not (isinstance(c.item, Forward | TunnelEntry | PortFlood) and concerns(c.item) in held)
    )


def concerns(item: Item) -> str:
    """The MAC or device an item is about: what a move verb may have changed since it was last put right."""
    match item:
        case Forward() | TunnelEntry() | Neighbour():
            return item.mac
        case PortFlood():
            return item.device
        case Device():
            return item.name
        case _:
            return ""
