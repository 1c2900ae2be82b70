"""The pair of devices between a network's bridge and the namespace of its services, and what is on both ends.

Owns the devices `sv<vni>` on this host and everything about `eth0` in the namespaces. What is right is not
touched. One thread visits all namespaces in turn, so that looking at many networks costs little. Decides
nothing: what should be inside is in `addressing`.
"""

from collections.abc import Iterable, Mapping

from nahtlos.model.config import NetworkConfig
from nahtlos.model.errors import Error, Unavailable
from nahtlos.model.ids import NetworkId
from nahtlos.physical.network import kernel, links, namespaces, netlink
from nahtlos.physical.network.device_names import anycast_mac, bridge_name
from nahtlos.physical.network.items import Setting
from nahtlos.physical.network.links import LinkInfo
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.plan import DELIVERING, Change
from nahtlos.physical.network.services.addressing import Inside, inside, service_name
from nahtlos.physical.network.services.dhcp import INTERFACE

ALIAS = "nahtlos-service/"
"""Not the driver's own prefix: these devices come and go with their far end, not by the plan."""
INDEX_GAP = 100
"""The near end of a pair takes an index the far one cannot have: the kernel mistakes equal ones for one
device and takes a second to note the carrier."""
SETTINGS = {"accept_ra": "0", "autoconf": "0", "accept_dad": "0", "addr_gen_mode": "1", "disable_ipv6": "0"}


def wire(networks: Iterable[NetworkConfig], fds: Mapping[NetworkId, int]) -> dict[NetworkId, int | Error]:
    """Each network and its namespace connected: the index of the inner device, or why it cannot be."""
    return namespaces.in_thread(lambda: {n.spec.id: found for n, found in _wire_all(networks, fds)})


def _wire_all(
    networks: Iterable[NetworkConfig], fds: Mapping[NetworkId, int]
) -> Iterable[tuple[NetworkConfig, int | Error]]:
    """The thread wanders from namespace to namespace; `host` stays where it was opened."""
    with Netlink() as host:
        for network in networks:
            vni = network.spec.vni
            try:
                devices = _named(host, bridge_name(vni), service_name(vni))
                yield network, _wire(host, devices, network, fds[network.spec.id])
            except Error as error:
                yield network, error


def _named(host: Netlink, *names: str) -> dict[str, LinkInfo]:
    """Asked for one by one: a host may have a thousand others."""
    found = ((name, links.read_link(host, name)) for name in names)
    return {name: link for name, link in found if link is not None}


def _wire(host: Netlink, devices: dict[str, LinkInfo], network: NetworkConfig, fd: int) -> int:
    vni, wanted = network.spec.vni, inside(network.spec)
    if bridge_name(vni) not in devices:
        raise Unavailable(f"bridge {bridge_name(vni)} of network {network.spec.id} is not there yet")
    namespaces.enter(fd)
    with Netlink() as within:
        there = links.read_links(within)
        if service_name(vni) not in devices or INTERFACE not in there:
            devices.update(_pair(host, network, wanted.mtu, fd))
            there = links.read_links(within)
        _settle(within, there, wanted)
    _plug(host, network, devices)
    return there[INTERFACE].index


def _pair(host: Netlink, network: NetworkConfig, mtu: int, fd: int) -> dict[str, LinkInfo]:
    near = service_name(network.spec.vni)
    host.change([links.delete(near)])
    index = INDEX_GAP + max(link.index for link in links.read_links(host).values())
    pair = links.create_veth(near, INTERFACE, mtu, peer_namespace=fd, index=index)
    host.change([pair, links.configure(near, alias=f"{ALIAS}{network.spec.id}")])
    return {near: links.read_links(host)[near]}


def _plug(host: Netlink, network: NetworkConfig, devices: Mapping[str, LinkInfo]) -> None:
    """The near end: a port of the bridge, silent at first, and the entry that leads to it."""
    vni, mtu = network.spec.vni, network.spec.mtu
    near, bridge = devices[service_name(vni)], devices[bridge_name(vni)]
    if near.master != bridge.index:
        host.change([links.configure(near.name, master=bridge.index)])
    if near.master != bridge.index or near.flood != DELIVERING:
        host.change([links.set_flood(near.index, DELIVERING, near.name)])
    if near.mtu != mtu or not near.up:
        host.change([links.configure(near.name, mtu=mtu, up=True)])
    mac = anycast_mac(vni)
    if host.forwarding_of(bridge.index, mac) != near.index:
        host.change([netlink.forward_to_port(near.index, mac)])


def _settle(within: Netlink, devices: Mapping[str, LinkInfo], wanted: Inside) -> None:
    """The far end. Addresses are there at once, and none is the kernel's own idea."""
    own = devices[INTERFACE]
    if not devices["lo"].up:
        within.change([links.configure("lo", up=True)])
    settings = [Setting(f"net/ipv6/conf/{INTERFACE}/{name}", value) for name, value in SETTINGS.items()]
    kernel.write_settings([Change(s) for s in settings if kernel.setting(s.path) not in (None, s)])
    if (own.mac, own.mtu) != (wanted.mac, wanted.mtu):
        within.change([links.configure(INTERFACE, mac=wanted.mac, mtu=wanted.mtu)])
    if not own.up:
        within.change([links.configure(INTERFACE, up=True)])
    there = {cidr for index, cidr, _ in kernel.addresses(within) if index == own.index}
    requests = [netlink.remove_address(own.index, cidr) for cidr in sorted(there - wanted.addresses)]
    requests += [netlink.address(own.index, cidr) for cidr in sorted(wanted.addresses - there)]
    requests += [netlink.link_route(own.index, cidr, wanted.source) for cidr in sorted(wanted.links)]
    if requests:
        within.change(requests)


def unplug_others(wanted: frozenset[str]) -> None:
    """Devices of networks that are served no more."""
    with Netlink() as host:
        for link in links.read_links(host).values():
            if link.alias.startswith(ALIAS) and link.alias.removeprefix(ALIAS) not in wanted:
                host.change([links.delete(link.name)])
