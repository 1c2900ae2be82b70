"""What dnsmasq is told: DHCP, DHCPv6, router advertisements and names for the servers of one network.

Composes arguments and files; `services` runs them. Every host's dnsmasq knows all ports of the network and
has the same identity, so nothing changes for it when a server moves, and a lease that one host gave is
renewed by another; the filter keeps each question on the host of the server that asks (see nft). Gives
addresses only to MACs it has been told, takes no names from servers, and asks no other name server: what it
does not know it refuses, so nothing of one project reaches another by it.
"""

import hashlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from nahtlos.model.networking import NetworkSpec, SubnetSpec
from nahtlos.physical.network.services import addressing
from nahtlos.physical.network.services.addressing import METADATA, advertised, domain, leased, name_servers

LEASE = "30d"
"""Long: a server keeps its address for life, and need not ask while a host is upgraded."""
INTERFACE = "eth0"
"""Inside the namespace of the network's services."""
ADVERTISEMENT_SECONDS = 600
ENTERPRISE = 32473
"""For documentation (RFC 5612): the number before the server's DHCPv6 identity must be somebody's."""


def arguments(spec: NetworkSpec, *, hosts: Path, names: Path, leases: Path, user: str) -> tuple[str, ...]:
    """dnsmasq's arguments: only on the network's own interface, nothing from files of the host."""
    return (
        "--conf-file=/dev/null",
        "--keep-in-foreground",
        "--log-facility=-",
        "--bind-interfaces",
        f"--interface={INTERFACE}",
        "--except-interface=lo",
        f"--user={user}",
        "--pid-file=",
        *_names(spec, names),
        f"--dhcp-hostsfile={hosts}",
        f"--dhcp-leasefile={leases}",
        "--dhcp-authoritative",
        "--dhcp-ignore-names",
        "--no-ping",
        f"--dhcp-option=option:mtu,{spec.mtu}",
        *(text for number, subnet in enumerate(leased(spec)) for text in _leased(number, subnet, spec)),
        *_advertised(spec),
    )


def _names(spec: NetworkSpec, names: Path) -> Iterable[str]:
    """Its own zone and its own addresses, and nothing else."""
    zone = domain(spec.id)
    return (
        "--no-hosts",
        "--no-resolv",
        f"--addn-hosts={names}",
        f"--domain={zone}",
        f"--local=/{zone}/",
        *(f"--local=/{_reverse_zone(s.cidr)}/" for s in spec.all_subnets),
    )


def _reverse_zone(cidr: str) -> str:
    """The smallest zone of whole labels that holds the subnet."""
    network = ipaddress.ip_network(cidr)
    step = 8 if network.version == 4 else 4
    labels = network.network_address.reverse_pointer.split(".")
    return ".".join(labels[len(labels) - 2 - network.prefixlen // step :])


def _leased(number: int, subnet: SubnetSpec, spec: NetworkSpec) -> Iterable[str]:
    tag, cidr = f"v4-{number}", ipaddress.IPv4Network(subnet.cidr)
    if number:
        yield f"--shared-network={INTERFACE},{cidr.network_address}"
    yield f"--dhcp-range=set:{tag},{cidr.network_address},static,{cidr.netmask},{LEASE}"
    yield f"--dhcp-option=tag:{tag},option:router{',' + subnet.gateway_ip if subnet.gateway_ip else ''}"
    yield f"--dhcp-option=tag:{tag},option:dns-server,{','.join(name_servers(subnet, spec))}"
    yield f"--dhcp-option=tag:{tag},option:classless-static-route,{_routes(subnet, spec)}"


def _routes(subnet: SubnetSpec, spec: NetworkSpec) -> str:
    """A client that takes these ignores the plain router option, so the way out is named again. From another
    subnet than the service's own, its addresses are reached over the link."""
    own = ipaddress.ip_address(spec.dhcp_ip) in ipaddress.ip_network(subnet.cidr)
    routes = [(f"{METADATA}/32", spec.dhcp_ip if own else "0.0.0.0")]
    if not own:
        routes.append((f"{spec.dhcp_ip}/32", "0.0.0.0"))
    if subnet.gateway_ip:
        routes.append(("0.0.0.0/0", subnet.gateway_ip))
    return ",".join(f"{destination},{by}" for destination, by in routes)


def _advertised(spec: NetworkSpec) -> Iterable[str]:
    """No way out is advertised from here: that is the routers' to say."""
    subnets = advertised(spec)
    if not subnets:
        return
    yield "--enable-ra"
    yield f"--ra-param={INTERFACE},mtu:{spec.mtu},{ADVERTISEMENT_SECONDS},0"
    yield "--quiet-ra"
    yield f"--dhcp-duid={ENTERPRISE},{hashlib.sha256(spec.id.encode()).hexdigest()[:16]}"
    yield f"--dhcp-option=option6:domain-search,{domain(spec.id)}"
    for number, subnet in enumerate(subnets):
        tag, prefix = f"v6-{number}", ipaddress.IPv6Network(subnet.cidr).network_address
        yield f"--dhcp-range=set:{tag},{prefix},static,slaac,{addressing.SELF_ADDRESSED},{LEASE}"
        servers = ",".join(f"[{address}]" for address in name_servers(subnet, spec))
        yield f"--dhcp-option=tag:{tag},option6:dns-server,{servers}"
