"""Whether networks, subnets and ports can be as they are asked for, and what exactly they then are. Pure;
every refusal names the field and the remedy."""

import ipaddress
from collections.abc import Iterable, Mapping

import msgspec
from msgspec import UNSET

from nahtlos.model.config import UnderlayShares
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import (
    HostId,
    NetworkId,
    PortId,
    ProjectId,
    SecurityGroupId,
    ServerId,
    SubnetId,
    checked_name,
)
from nahtlos.model.networking import (
    AddressPair,
    Family,
    NetworkSpec,
    PortBandwidth,
    PortSpec,
    Rate,
    SubnetSpec,
)
from nahtlos.model.topology import IpNetwork, Topology, Underlay, family_of, within
from nahtlos.runtime.controllers import addresses
from nahtlos.runtime.controllers.addresses import checked_address, checked_prefix
from nahtlos.runtime.controllers.networks import (
    NetworkChange,
    NetworkRequest,
    PortChange,
    PortRequest,
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
MAX_PORTS = 8
MAX_PAIRS = 32
MAX_QUEUES = 8
MIN_RATE = 100_000
"""bit/s. Below, one full packet takes longer than a sender waits before it sends again."""
MAX_RATE = 400 * 10**9
MIN_BURST = 1600
MAX_BURST = 256 << 20
MIN_UNDERLAY_RATE = 10**6


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
    )
    check_mtu(spec, underlay_mtu)
    return spec


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


# --- ports -------------------------------------------------------------------------------------------


def new_ports(
    topology: Topology, server: ServerId, project: ProjectId, asked: tuple[PortRequest, ...]
) -> tuple[PortSpec, ...]:
    """Of a server that is to be created: as asked, or one in the network that goes without saying."""
    if not asked:
        asked = (PortRequest(network=usual_network(topology, project)),)
    if len(asked) > MAX_PORTS:
        raise Refused(f"{len(asked)} ports", field="networks", remedy=f"ask for at most {MAX_PORTS}")
    made: list[PortSpec] = []
    for number, request in enumerate(asked):
        known = msgspec.structs.replace(topology, ports={**topology.ports, **{p.id: p for p in made}})
        made.append(_new_port(known, PortId(f"{server}-eth{number}"), project, request))
    return tuple(made)


def usual_network(topology: Topology, project: ProjectId) -> NetworkId:
    """The project's only network, or the only one of them with an uplink of its own."""
    own = [n for n in topology.networks.values() if n.project == project]
    chosen = own if len(own) == 1 else [n for n in own if n.gateway_host]
    if len(chosen) == 1:
        return chosen[0].id
    if not own:
        raise Conflict(
            f"project {project} has no network",
            field="network",
            remedy=f"nahtlos network create NAME --cidr 10.0.0.0/24 --project {project}",
        )
    raise Refused(
        "no network is named, and there is not exactly one",
        field="network",
        remedy=f"name one of: {listed(n.id for n in own)}",
    )


def _new_port(topology: Topology, port: PortId, project: ProjectId, request: PortRequest) -> PortSpec:
    network = known_network(topology, request.network)
    same_project(project, network.project, f"network {network.id}", "network")
    if request.ip:
        ip = addresses.port_address(topology, network, request.ip, "ip")
        addresses.check_free(topology, network, ip, "ip")
    else:
        ip = addresses.free_address(topology, network)
    mac = _mac(topology, request.mac, ip)
    further = _further_addresses(topology, network, request, ip)
    own = [
        a
        for s in network.all_subnets
        if addresses.gives_itself(s) and not any(within(f, s.cidr) for f in (ip, *further))
        for a in (addresses.made_of_mac(s, mac),)
    ]
    return PortSpec(
        id=port,
        network=network.id,
        mac=mac,
        ip=ip,
        addresses=(*further, *own),
        allowed_pairs=checked_pairs(request.allowed_pairs),
        security_groups=checked_groups(topology, project, request.security_groups),
        bandwidth=checked_bandwidth(request.bandwidth),
        queues=_queues(request.queues),
    )


def _queues(asked: int) -> int:
    if not 1 <= asked <= MAX_QUEUES:
        raise Refused(f"{asked} queues", field="queues", remedy=f"ask for 1 to {MAX_QUEUES}")
    return asked


def _mac(topology: Topology, asked: str, ip: str) -> str:
    used = {port.mac: port.id for port in topology.ports.values()}
    if not asked:
        return addresses.free_mac(ip, used)
    mac = addresses.checked_mac(asked, "mac")
    if mac in used:
        raise Conflict(f"port {used[mac]} has the MAC {mac}", field="mac", remedy="give another, or none")
    return mac


def _further_addresses(
    topology: Topology, network: NetworkSpec, request: PortRequest, ip: str
) -> tuple[str, ...]:
    found: list[str] = []
    for text in request.addresses:
        address = addresses.port_address(topology, network, text, "addresses")
        addresses.check_free(topology, network, address, "addresses")
        if address == ip or address in found:
            raise Refused(f"{address} is given twice", field="addresses", remedy="give it once")
        found.append(address)
    return tuple(found)


def changed_port(topology: Topology, port: PortId, change: PortChange) -> PortSpec:
    spec = known_port(topology, port)
    project = topology.networks[spec.network].project
    if change.allowed_pairs is not UNSET:
        spec = msgspec.structs.replace(spec, allowed_pairs=checked_pairs(change.allowed_pairs))
    if change.security_groups is not UNSET:
        groups = checked_groups(topology, project, change.security_groups)
        spec = msgspec.structs.replace(spec, security_groups=groups)
    bandwidth = spec.bandwidth
    if change.ingress is not UNSET:
        bandwidth = msgspec.structs.replace(bandwidth, ingress=change.ingress)
    if change.egress is not UNSET:
        bandwidth = msgspec.structs.replace(bandwidth, egress=change.egress)
    return msgspec.structs.replace(spec, bandwidth=checked_bandwidth(bandwidth))


def checked_pairs(asked: tuple[AddressPair, ...]) -> tuple[AddressPair, ...]:
    if len(asked) > MAX_PAIRS:
        raise Refused(
            f"{len(asked)} allowed pairs", field="allowed_pairs", remedy=f"give at most {MAX_PAIRS}"
        )
    pairs = (
        AddressPair(
            cidr=str(checked_prefix(pair.cidr, "allowed_pairs")),
            mac=addresses.checked_mac(pair.mac, "allowed_pairs") if pair.mac else "",
        )
        for pair in asked
    )
    return tuple(dict.fromkeys(pairs))


def checked_groups(
    topology: Topology, project: ProjectId, asked: tuple[SecurityGroupId, ...]
) -> tuple[SecurityGroupId, ...]:
    for group in asked:
        if group not in topology.groups:
            raise NotFound(
                f"no security group '{group}'",
                field="security_groups",
                remedy=f"security groups: {listed(topology.groups)}",
            )
        same_project(project, topology.groups[group].project, f"security group {group}", "security_groups")
    return tuple(dict.fromkeys(asked))


def checked_bandwidth(asked: PortBandwidth) -> PortBandwidth:
    for field, rate in (("ingress", asked.ingress), ("egress", asked.egress)):
        if rate is not None:
            _check_rate(rate, field)
    return asked


def _check_rate(rate: Rate, field: str) -> None:
    if not MIN_RATE <= rate.bits_per_second <= MAX_RATE:
        raise Refused(
            f"{rate.bits_per_second} bit/s cannot be shaped",
            field=field,
            remedy=f"give {MIN_RATE // 1000} kbit/s to {MAX_RATE // 10**9} Gbit/s, or no limit",
        )
    if rate.burst_bytes and not MIN_BURST <= rate.burst_bytes <= MAX_BURST:
        raise Refused(
            f"a burst of {rate.burst_bytes} bytes",
            field=field,
            remedy=f"give {MIN_BURST} to {MAX_BURST} bytes, or leave it out",
        )


# --- the underlay ------------------------------------------------------------------------------------


def checked_underlay(asked: Underlay, networks: Mapping[NetworkId, NetworkSpec]) -> Underlay:
    if asked.mtu and not MIN_MTU[Family.IPV6] + TUNNEL_BYTES <= asked.mtu <= 65535:
        raise Refused(
            f"an underlay with an MTU of {asked.mtu}",
            field="mtu",
            remedy=f"give {MIN_MTU[Family.IPV6] + TUNNEL_BYTES} to 65535, or 0 if it is not known",
        )
    larger = [n.id for n in networks.values() if asked.mtu and n.mtu > asked.mtu - TUNNEL_BYTES]
    in_use(f"more than the {asked.mtu - TUNNEL_BYTES} that are left", larger, "mtu", "make their MTU smaller")
    if asked.shares is not None:
        _check_shares(asked.shares)
    return asked


def _check_shares(shares: UnderlayShares) -> None:
    if not MIN_UNDERLAY_RATE <= shares.bits_per_second <= MAX_RATE:
        raise Refused(
            f"{shares.bits_per_second} bit/s is no underlay",
            field="bits_per_second",
            remedy=f"give {MIN_UNDERLAY_RATE // 10**6} Mbit/s to {MAX_RATE // 10**9} Gbit/s",
        )
    for field in ("control", "moves", "tenants"):
        if not 1 <= getattr(shares, field) <= 98:
            raise Refused(f"{getattr(shares, field)} percent", field=field, remedy="give 1 to 98")
    total = shares.control + shares.moves + shares.tenants
    if total != 100:
        raise Refused(
            f"control, moves and tenants are {total} percent together", field="control", remedy="make it 100"
        )
