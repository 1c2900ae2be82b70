"""Whether networks and subnets can be as they are asked for, and what exactly they then are. Pure;
every refusal names the field and the remedy."""

import ipaddress
import re
from collections.abc import Iterable

import msgspec
from msgspec import UNSET

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import (
    HostId,
    NetworkId,
    PortId,
    ProjectId,
    SubnetId,
    checked_name,
)
from nahtlos.model.networking import (
    Family,
    NetworkSpec,
    PortSpec,
    ProviderLink,
    SubnetSpec,
)
from nahtlos.model.topology import IpNetwork, Topology, family_of, within
from nahtlos.runtime.controllers import addresses
from nahtlos.runtime.controllers.addresses import checked_address, checked_prefix
from nahtlos.runtime.controllers.networks import (
    NetworkChange,
    NetworkRequest,
    SubnetChange,
    SubnetRequest,
)
from nahtlos.runtime.controllers.requests import listed

FIRST_VNI = 1001
LAST_VNI = 65535
"""Above, two networks could share a zone of connection tracking on a host."""
USUAL_MTU = 1500
MIN_MTU = {Family.IPV4: 576, Family.IPV6: 1280}
"""RFC 791 and RFC 8200."""
MAX_MTU = 9216
TUNNEL_BYTES = 50
"""What VXLAN over IPv4 adds to a packet: Ethernet, IP, UDP and its own header."""
SMALLEST_PREFIX = {Family.IPV4: 29, Family.IPV6: 120}
"""A subnet needs room for its gateway, its DHCP address and some servers."""
MAX_SUBNETS = 16
INTERFACE_NAME = re.compile(r"^[^\s/:]{1,15}$")
LAST_VLAN = 4094


# --- what exists -------------------------------------------------------------------------------------


def known_network(topology: Topology, network: NetworkId, field: str = "network") -> NetworkSpec:
    if network not in topology.networks:
        raise NotFound(
            f"no network '{network}'", field=field, remedy=f"networks: {listed(topology.networks)}"
        )
    return topology.networks[network]


def known_subnet(topology: Topology, subnet: SubnetId, field: str = "subnet") -> SubnetSpec:
    subnets = topology.subnets()
    if subnet not in subnets:
        raise NotFound(f"no subnet '{subnet}'", field=field, remedy=f"subnets: {listed(subnets)}")
    return subnets[subnet]


def known_port(topology: Topology, port: PortId, field: str = "port") -> PortSpec:
    if port not in topology.ports:
        raise NotFound(f"no port '{port}'", field=field, remedy="nahtlos port list shows all")
    return topology.ports[port]


def checked_project(project: ProjectId) -> ProjectId:
    return ProjectId(checked_name(project, "project"))


def same_project(mine: ProjectId, other: ProjectId, what: str, field: str) -> None:
    if mine != other:
        raise Refused(
            f"{what} belongs to project {other}, not to {mine}", field=field, remedy=f"use one of {mine}"
        )


def in_use(what: str, users: Iterable[str], field: str, remedy: str) -> None:
    """Conflict that names who uses it."""
    names = sorted(users)
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise Conflict(f"{what} is used by {shown}", field=field, remedy=remedy)


# --- networks ----------------------------------------------------------------------------------------


def new_network(topology: Topology, request: NetworkRequest, underlay_mtu: int) -> NetworkSpec:
    name = NetworkId(checked_name(request.name, "name"))
    _check_name_free(topology, name)
    cidr = _subnet_range(request.cidr)
    if cidr.version != 4:
        raise Refused(
            f"{cidr} is IPv6",
            field="cidr",
            remedy="give the network an IPv4 range, then: nahtlos subnet create --network",
        )
    gateway = _gateway(cidr, request.gateway_ip)
    if not gateway:
        raise Refused(
            "a network's first subnet has a gateway address", field="gateway_ip", remedy="leave it out"
        )
    room = (underlay_mtu or USUAL_MTU + TUNNEL_BYTES) - TUNNEL_BYTES
    spec = NetworkSpec(
        id=name,
        project=checked_project(request.project),
        vni=_free_vni(topology),
        cidr=str(cidr),
        mtu=request.mtu or min(USUAL_MTU, room),
        gateway_ip=gateway,
        gateway_mac="",
        gateway_host=HostId(""),
        dhcp_ip=str(next(cidr[n] for n in (2, 3) if str(cidr[n]) != gateway)),
        provider=_provider(topology, request),
    )
    check_mtu(spec, underlay_mtu)
    return spec


def _provider(topology: Topology, request: NetworkRequest) -> ProviderLink | None:
    """The outside network that it is to be one with. What an interface carries, only one network can be."""
    name, vlan = request.provider_interface, request.vlan
    if not name:
        if vlan:
            raise Refused(
                f"a VLAN ({vlan}) of no interface",
                field="provider_interface",
                remedy="name the hosts' interface to the outside network, or leave the VLAN out",
            )
        return None
    if not INTERFACE_NAME.match(name) or name in (".", ".."):
        raise Refused(
            f"'{name}' is no name of an interface",
            field="provider_interface",
            remedy="give a name as `ip link` shows it: 1 to 15 characters, no blanks, '/' or ':'",
        )
    if not 0 <= vlan <= LAST_VLAN:
        raise Refused(
            f"VLAN {vlan}", field="vlan", remedy=f"give 1 to {LAST_VLAN}, or 0 for frames without tag"
        )
    _check_interface_free(topology, name, vlan)
    return ProviderLink(interface=name, vlan=vlan)


def _check_interface_free(topology: Topology, name: str, vlan: int) -> None:
    what = f"VLAN {vlan} of interface {name}" if vlan else f"interface {name} without tags"
    wanted = ProviderLink(interface=name, vlan=vlan)
    other = next((n.id for n in topology.networks.values() if n.provider == wanted), None)
    if other is not None:
        raise Conflict(
            f"{what} belongs to network {other}",
            field="vlan" if vlan else "provider_interface",
            remedy="name another VLAN or interface, or use that network",
        )
    if not vlan and name in {*topology.uplinks.values(), *topology.external.values()}:
        raise Conflict(
            f"{what} is an edge host's way out, in the orchestrator's settings",
            field="provider_interface",
            remedy="name another interface, or a VLAN of it",
        )


def check_inside(network: NetworkSpec, what: str, field: str) -> None:
    """Refused if `network` is one with an outside one, where `what` belongs to machines out there."""
    if network.provider is not None:
        raise Refused(
            f"network {network.id} is one with an outside network: {what} there",
            field=field,
            remedy="use a network without a provider interface",
        )


def changed_network(spec: NetworkSpec, change: NetworkChange, underlay_mtu: int) -> NetworkSpec:
    if change.mtu is UNSET:
        return spec
    _check_not_from_settings(spec)
    changed = msgspec.structs.replace(spec, mtu=change.mtu)
    check_mtu(changed, underlay_mtu)
    return changed


def check_mtu(spec: NetworkSpec, underlay_mtu: int) -> None:
    """`underlay_mtu` 0: not known."""
    families = {subnet.family for subnet in spec.all_subnets}
    for family in families:
        if spec.mtu < MIN_MTU[family]:
            raise Refused(
                f"an MTU of {spec.mtu} is too small for {family}",
                field="mtu",
                remedy=f"give at least {max(MIN_MTU[f] for f in families)}",
            )
    largest = underlay_mtu - TUNNEL_BYTES if underlay_mtu else MAX_MTU
    if spec.mtu > largest:
        why = f"the underlay's {underlay_mtu} leave {largest}" if underlay_mtu else f"at most {largest}"
        raise Refused(
            f"an MTU of {spec.mtu} is too large: {why}", field="mtu", remedy=f"give at most {largest}"
        )


def check_network_unused(topology: Topology, network: NetworkId) -> None:
    spec = known_network(topology, network)
    _check_not_from_settings(spec)
    users = [f"port {p.id}" for p in topology.ports_of(network)]
    users += [f"load balancer {b.id}" for b in topology.balancers.values() if b.network == network]
    users += [f"router {r.id}" for s in spec.all_subnets if (r := topology.router_of(s.id))]
    in_use(f"network {network}", set(users), "network", "delete these servers or detach these routers first")


def _check_not_from_settings(spec: NetworkSpec) -> None:
    if spec.gateway_host:
        raise Conflict(
            f"network {spec.id} and its uplink at {spec.gateway_host} are in the orchestrator's settings",
            field="network",
            remedy="change the settings, then restart the orchestrator",
        )


def _check_name_free(topology: Topology, name: str) -> None:
    if name in topology.networks or name in topology.subnets():
        kind = "network" if name in topology.networks else "subnet"
        raise Conflict(f"a {kind} '{name}' exists", field="name", remedy="choose another name")


def _free_vni(topology: Topology) -> int:
    used = {spec.vni for spec in topology.networks.values()}
    for vni in range(FIRST_VNI, LAST_VNI + 1):
        if vni not in used:
            return vni
    raise Conflict("the cloud has no free network number", field="name", remedy="delete networks")


# --- subnets -----------------------------------------------------------------------------------------


def new_subnet(topology: Topology, request: SubnetRequest) -> SubnetSpec:
    name = SubnetId(checked_name(request.name, "name"))
    _check_name_free(topology, name)
    network = known_network(topology, request.network)
    if len(network.all_subnets) >= MAX_SUBNETS:
        raise Refused(
            f"{network.id} has {MAX_SUBNETS} subnets", field="network", remedy="make another network"
        )
    cidr = _subnet_range(request.cidr)
    for other in network.all_subnets:
        if _overlap(cidr, other.cidr):
            raise Conflict(
                f"{cidr} overlaps {other.cidr} of subnet {other.id}",
                field="cidr",
                remedy="give another range",
            )
    subnet = SubnetSpec(
        id=name,
        network=network.id,
        cidr=str(cidr),
        gateway_ip=_gateway(cidr, request.gateway_ip),
        dhcp=request.dhcp,
        dns=_name_servers(request.dns),
    )
    if subnet.family is Family.IPV6 and network.mtu < MIN_MTU[Family.IPV6]:
        raise Refused(
            f"network {network.id} has an MTU of {network.mtu}, IPv6 needs {MIN_MTU[Family.IPV6]}",
            field="network",
            remedy=f"nahtlos network set {network.id} --mtu {MIN_MTU[Family.IPV6]}",
        )
    if subnet.family is Family.IPV6 and subnet.dhcp and cidr.prefixlen != 64:
        raise Refused(
            f"machines give themselves addresses in prefixes of 64 bits, not {cidr.prefixlen}",
            field="cidr",
            remedy="give a /64, or --no-dhcp",
        )
    return subnet


def changed_subnet(topology: Topology, subnet: SubnetId, change: SubnetChange) -> SubnetSpec:
    before = known_subnet(topology, subnet)
    if subnet in topology.networks:
        raise Conflict(
            f"{subnet} is its network's first subnet, which is as the network was made",
            field="subnet",
            remedy="add another subnet: nahtlos subnet create",
        )
    after = before
    if change.gateway_ip is not UNSET and change.gateway_ip != before.gateway_ip:
        if (router := topology.router_of(subnet)) is not None:
            in_use(
                f"the gateway address of {subnet}",
                [f"router {router.id}"],
                "gateway_ip",
                f"nahtlos router detach {router.id} {subnet}",
            )
        gateway = _gateway(ipaddress.ip_network(before.cidr), change.gateway_ip)
        if gateway:
            addresses.check_free(topology, topology.networks[before.network], gateway, "gateway_ip")
        after = msgspec.structs.replace(after, gateway_ip=gateway)
    if change.dhcp is not UNSET:
        if change.dhcp and before.family is Family.IPV6 and not before.cidr.endswith("/64"):
            raise Refused(f"{before.cidr} is no /64", field="dhcp", remedy="leave it off")
        after = msgspec.structs.replace(after, dhcp=change.dhcp)
    if change.dns is not UNSET:
        after = msgspec.structs.replace(after, dns=_name_servers(change.dns))
    return after


def check_subnet_unused(topology: Topology, subnet: SubnetId) -> None:
    spec = known_subnet(topology, subnet)
    if subnet in topology.networks:
        raise Conflict(
            f"{subnet} is its network's first subnet",
            field="subnet",
            remedy=f"nahtlos network delete {subnet} deletes both",
        )
    users = [f"port {p.id}" for p in topology.ports_of(spec.network) if _uses(p, spec.cidr)]
    users += [
        f"load balancer {b.id}"
        for b in topology.balancers.values()
        if b.network == spec.network and within(b.vip, spec.cidr)
    ]
    if (router := topology.router_of(subnet)) is not None:
        users.append(f"router {router.id}")
    in_use(f"subnet {subnet}", users, "subnet", "delete these servers or detach this router first")


def _uses(port: PortSpec, cidr: str) -> bool:
    return any(within(address, cidr) for address in port.all_addresses)


def _subnet_range(text: str) -> IpNetwork:
    cidr = checked_prefix(text, "cidr")
    family = family_of(str(cidr))
    if cidr.is_multicast or cidr.is_loopback or cidr.is_link_local or cidr.is_unspecified:
        raise Refused(f"{cidr} is no range for machines", field="cidr", remedy="give a unicast range")
    if not 8 <= cidr.prefixlen <= SMALLEST_PREFIX[family]:
        raise Refused(
            f"{cidr} is too {'large' if cidr.prefixlen < 8 else 'small'}",
            field="cidr",
            remedy=f"give a prefix of 8 to {SMALLEST_PREFIX[family]} bits",
        )
    return cidr


def _gateway(cidr: IpNetwork, asked: str | None) -> str:
    if asked == "":
        return ""
    if asked is None:
        return str(cidr[1])
    address = checked_address(asked, "gateway_ip")
    if address not in cidr:
        raise Refused(
            f"{address} is outside {cidr}", field="gateway_ip", remedy=f"give one within it, as {cidr[1]}"
        )
    if address == cidr.network_address or (cidr.version == 4 and address == cidr.broadcast_address):
        raise Refused(
            f"{address} is no machine's address in {cidr}",
            field="gateway_ip",
            remedy=f"give one as {cidr[1]}",
        )
    return str(address)


def _name_servers(asked: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(addresses.checked_unicast(a, "dns") for a in asked))


def _overlap(cidr: IpNetwork, other: str) -> bool:
    return cidr.overlaps(ipaddress.ip_network(other))


def overlapping(subnets: Iterable[SubnetSpec]) -> tuple[SubnetSpec, SubnetSpec] | None:
    """The first two of them that share addresses."""
    seen: list[SubnetSpec] = []
    for subnet in subnets:
        for other in seen:
            if _overlap(ipaddress.ip_network(subnet.cidr), other.cidr):
                return other, subnet
        seen.append(subnet)
    return None
