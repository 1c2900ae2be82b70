"""Addresses of a network: how they are written, which are the network's own, which is free. Pure.

Everything that is kept is written the one canonical way, so that equal addresses are equal strings.
"""

import ipaddress
import re
from collections.abc import Collection, Iterator

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.networking import Family, NetworkSpec, SubnetSpec
from nahtlos.model.topology import IpAddress, IpNetwork, Topology, family_of, within

FIRST_ADDRESS = 10
"""Addresses below are the network's own."""
MAC_PREFIX = "52:54:00:4d"
_MAC = re.compile(r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")
_PER_PREFIX = 1 << 16


# --- how they are written ----------------------------------------------------------------------------


def checked_address(text: str, field: str) -> IpAddress:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise Refused(
            f"'{text}' is no IP address", field=field, remedy="write it as 10.0.0.5 or 2001:db8::5"
        ) from error
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise Refused(f"{text} has a zone", field=field, remedy="leave out what follows '%'")
    return address


def checked_prefix(text: str, field: str) -> IpNetwork:
    """An address counts as the prefix of itself alone."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        try:
            meant = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise Refused(
                f"'{text}' is no prefix", field=field, remedy="write it as 10.0.0.0/24 or 2001:db8::/64"
            ) from error
        raise Refused(f"{text} has host bits set", field=field, remedy=f"write {meant}") from error


def checked_unicast(text: str, field: str) -> str:
    """An address that a machine can have, canonical."""
    address = checked_address(text, field)
    if address.is_multicast or address.is_unspecified or address.is_loopback or address.is_link_local:
        raise Refused(f"{address} is no address of a machine", field=field, remedy="give a unicast address")
    return str(address)


def checked_mac(text: str, field: str) -> str:
    mac = text.lower()
    if not _MAC.match(mac):
        raise Refused(f"'{text}' is no MAC", field=field, remedy="write it as 52:54:00:12:34:56")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise Refused(
            f"{mac} is no MAC of one machine", field=field, remedy="make the first byte even, as 52 or 02"
        )
    return mac


# --- which are free ----------------------------------------------------------------------------------


def reserved(subnet: SubnetSpec, network: NetworkSpec) -> dict[str, str]:
    """Addresses of `subnet` that no port may have, and what each is."""
    cidr = ipaddress.ip_network(subnet.cidr)
    found = {str(cidr.network_address): "the subnet's own address"}
    if cidr.version == 4:
        found[str(cidr.broadcast_address)] = "the subnet's broadcast address"
    if subnet.gateway_ip:
        found[subnet.gateway_ip] = "the subnet's gateway"
    if network.dhcp_ip and within(network.dhcp_ip, subnet.cidr):
        found[network.dhcp_ip] = "where the network answers DHCP and names"
    return found


def port_address(topology: Topology, network: NetworkSpec, text: str, field: str) -> str:
    """`text` as an address that a port of `network` may have, whether it is free or not."""
    address = checked_unicast(text, field)
    subnet = topology.subnet_of(network.id, address)
    if subnet is None:
        ranges = ", ".join(s.cidr for s in network.all_subnets)
        raise Refused(
            f"{address} is in no subnet of {network.id}", field=field, remedy=f"give one within {ranges}"
        )
    if address in (own := reserved(subnet, network)):
        raise Refused(f"{address} is {own[address]}", field=field, remedy="give another, or none")
    return address


def check_free(topology: Topology, network: NetworkSpec, address: str, field: str) -> None:
    """Conflict if a port or a load balancer has it."""
    if (port := topology.holder(network.id, address)) is not None:
        raise Conflict(f"port {port.id} has {address}", field=field, remedy="give another, or none")
    if (balancer := topology.balancer_at(network.id, address)) is not None:
        raise Conflict(
            f"load balancer {balancer.id} has {address}", field=field, remedy="give another, or none"
        )


def free_address(topology: Topology, network: NetworkSpec, taken: Collection[str] = ()) -> str:
    """The lowest free address of the network's first subnet."""
    subnet = network.all_subnets[0]
    cidr = ipaddress.ip_network(subnet.cidr)
    used = {*reserved(subnet, network), *taken}
    used.update(a for p in topology.ports_of(network.id) for a in p.all_addresses)
    used.update(b.vip for b in topology.balancers.values() if b.network == network.id)
    first = FIRST_ADDRESS if cidr.num_addresses > 2 * FIRST_ADDRESS else 1
    for number in range(first, cidr.num_addresses):
        if (address := str(cidr[number])) not in used:
            return address
    raise Conflict(
        f"network {network.id} has no free address",
        field="network",
        remedy="delete servers, or name an address of another subnet of it",
    )


def free_mac(address: str, used: Collection[str]) -> str:
    """One that says which address it belongs to, if that one is free."""
    for number in _numbers(int(ipaddress.ip_address(address)) % _PER_PREFIX):
        if (mac := f"{MAC_PREFIX}:{number >> 8:02x}:{number & 255:02x}") not in used:
            return mac
    raise Conflict("the cloud has no free MAC", field="network", remedy="name one, or delete servers")


def _numbers(first: int) -> Iterator[int]:
    return ((first + n) % _PER_PREFIX for n in range(_PER_PREFIX))


def made_of_mac(subnet: SubnetSpec, mac: str) -> str:
    """The address that a machine with `mac` gives itself in an IPv6 subnet of 64 bits (RFC 4291, modified
    EUI-64)."""
    bytes_of = [int(part, 16) for part in mac.split(":")]
    identifier = [bytes_of[0] ^ 2, *bytes_of[1:3], 0xFF, 0xFE, *bytes_of[3:]]
    prefix = ipaddress.ip_network(subnet.cidr).network_address
    return str(ipaddress.IPv6Address(int(prefix) | int.from_bytes(bytes(identifier))))


def gives_itself(subnet: SubnetSpec) -> bool:
    """Whether machines in it make their own address of their MAC."""
    prefix = ipaddress.ip_network(subnet.cidr).prefixlen
    return subnet.dhcp and family_of(subnet.cidr) is Family.IPV6 and prefix == 64
