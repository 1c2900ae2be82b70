"""What servers are told about their addresses, and from where: subnets, service addresses, names, MTU.

Pure. Every compute host answers for a network from a namespace of its own (see `services`), with the same
MAC and addresses everywhere, so that a server that moved goes on asking and is answered. The host's own
stack has no address in any tenant's network: tenants may use the same addresses as each other and as the
hosts.
"""

import functools
import ipaddress
from collections.abc import Iterable

import msgspec

from nahtlos.model.config import NetworkConfig, PortConfig
from nahtlos.model.errors import Refused
from nahtlos.model.networking import Family, NetworkSpec, SubnetSpec
from nahtlos.physical.network.device_names import anycast_mac, bridge_name
from nahtlos.physical.network.items import Neighbour
from nahtlos.physical.network.plan import REMEMBERED_PORTS

METADATA = "169.254.169.254"
METADATA_IPV6 = "fe80::a9fe:a9fe"
ZONE = "internal"
"""Names of a network's servers end in `<network>.internal`."""
TUNNEL_BYTES = 50
"""What VXLAN over IPv4 adds to a frame."""
SMALLEST_IPV6_MTU = 1280
SELF_ADDRESSED = 64
"""Length of the only IPv6 prefix in which machines make their own addresses."""


class Inside(msgspec.Struct, frozen=True):
    """The namespace from which a network is served on one host."""

    mac: str
    mtu: int
    addresses: frozenset[str]
    """With their prefix length."""
    links: frozenset[str]
    """IPv4 subnets without an address here, reached over the link all the same."""
    source: str
    """Address that is used towards those."""


def service_name(vni: int) -> str:
    """The device by which a network's bridge leads to its services."""
    return f"sv{vni}"


def domain(network: str) -> str:
    return f"{network.lower()}.{ZONE}"


# --- addresses ---------------------------------------------------------------------------------------


def interface_id(mac: str) -> int:
    """Modified EUI-64 (RFC 4291): the second half of addresses that a machine makes of its MAC."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return int.from_bytes(bytes((octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:])))


def made_of_mac(cidr: str, mac: str) -> str:
    prefix = ipaddress.IPv6Network(cidr)
    return str(ipaddress.IPv6Address(int(prefix.network_address) | interface_id(mac)))


def link_local(mac: str) -> str:
    return made_of_mac("fe80::/64", mac)


def advertised(spec: NetworkSpec) -> tuple[SubnetSpec, ...]:
    """IPv6 subnets that servers are told of by router advertisements and DHCPv6."""
    return tuple(
        s
        for s in spec.all_subnets
        if s.dhcp and s.family is Family.IPV6 and ipaddress.ip_network(s.cidr).prefixlen == SELF_ADDRESSED
    )


def leased(spec: NetworkSpec) -> tuple[SubnetSpec, ...]:
    """IPv4 subnets whose addresses are given by DHCP; the one with the service's address comes first."""
    return tuple(s for s in spec.all_subnets if s.dhcp and s.family is Family.IPV4)


def has_ipv6(spec: NetworkSpec) -> bool:
    return any(s.family is Family.IPV6 for s in spec.all_subnets)


def service_address(subnet: SubnetSpec, spec: NetworkSpec) -> str:
    """Where a server of `subnet` finds the network's names."""
    return made_of_mac(subnet.cidr, anycast_mac(spec.vni)) if subnet.family is Family.IPV6 else spec.dhcp_ip


def inside(spec: NetworkSpec) -> Inside:
    mac = anycast_mac(spec.vni)
    first, *others = leased(spec)
    addresses = {f"{spec.dhcp_ip}/{_length(first.cidr)}", f"{METADATA}/32"}
    if has_ipv6(spec):
        addresses |= {f"{link_local(mac)}/64", f"{METADATA_IPV6}/64"}
        addresses |= {f"{made_of_mac(s.cidr, mac)}/64" for s in advertised(spec)}
    return Inside(mac, spec.mtu, frozenset(addresses), frozenset(s.cidr for s in others), spec.dhcp_ip)


def _length(cidr: str) -> int:
    return ipaddress.ip_network(cidr).prefixlen


def service_neighbours(spec: NetworkSpec) -> Iterable[Neighbour]:
    """So that the bridge knows who has the service's addresses, and asks no other host."""
    found = inside(spec)
    for address in found.addresses:
        yield Neighbour(bridge_name(spec.vni), address.split("/")[0], found.mac)


# --- what a port is told -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=REMEMBERED_PORTS)
def subnet_of(address: str, spec: NetworkSpec) -> SubnetSpec | None:
    ip = ipaddress.ip_address(address)
    return next((s for s in spec.all_subnets if ip in ipaddress.ip_network(s.cidr)), None)


def name_servers(subnet: SubnetSpec, spec: NetworkSpec) -> tuple[str, ...]:
    return subnet.dns or (service_address(subnet, spec),)


def dhcp_hosts(network: NetworkConfig, lease: str) -> str:
    """One line per port as dnsmasq's `--dhcp-hostsfile` wants it: MAC, one IPv4 address, IPv6 ones, name."""
    lines = sorted(_dhcp_host(port, network.spec, lease) for port in network.ports)
    return "".join(f"{line}\n" for line in lines)


@functools.lru_cache(maxsize=REMEMBERED_PORTS)
def _dhcp_host(port: PortConfig, spec: NetworkSpec, lease: str) -> str:
    told = {s.cidr for s in advertised(spec)}
    fixed = [a for a in port.all_addresses if ":" in a and (s := subnet_of(a, spec)) and s.cidr in told]
    return ",".join((port.mac, port.ip, *(f"[{a}]" for a in fixed), port.server, lease))


def dns_names(network: NetworkConfig) -> str:
    """Names of the network's servers as a hosts file: full name first, which is what an address leads to."""
    ports = sorted(network.ports, key=lambda port: (port.server, port.id))
    return "".join(_dns_lines(port, network.spec) for port in ports)


@functools.lru_cache(maxsize=REMEMBERED_PORTS)
def _dns_lines(port: PortConfig, spec: NetworkSpec) -> str:
    zone, server = domain(spec.id), port.server
    known = sorted(a for a in port.all_addresses if subnet_of(a, spec) is not None)
    return "".join(f"{address} {server}.{zone} {server}\n" for address in known)


# --- what cannot be ----------------------------------------------------------------------------------


def check(spec: NetworkSpec, underlay_mtu: int) -> None:
    """Refused if servers of the network would be told something that cannot work. `underlay_mtu` 0: not
    known."""
    largest = underlay_mtu - TUNNEL_BYTES
    if underlay_mtu and spec.mtu > largest:
        raise Refused(
            f"network {spec.id} has an MTU of {spec.mtu}, which with the tunnel's {TUNNEL_BYTES} bytes does "
            f"not fit the underlay's {underlay_mtu}",
            field="mtu",
            remedy=f"set it to at most {largest}, or raise the MTU of every host's underlay interface",
        )
    if has_ipv6(spec) and spec.mtu < SMALLEST_IPV6_MTU:
        raise Refused(
            f"network {spec.id} has an IPv6 subnet and an MTU of {spec.mtu}",
            field="mtu",
            remedy=f"IPv6 needs at least {SMALLEST_IPV6_MTU}",
        )
