"""Whether ports can be as they are asked for, and what exactly they then are. Pure; every refusal names the
field and the remedy."""

import msgspec
from msgspec import UNSET

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import (
    NetworkId,
    PortId,
    ProjectId,
    SecurityGroupId,
    ServerId,
)
from nahtlos.model.networking import (
    AddressPair,
    NetworkSpec,
    PortBandwidth,
    PortSpec,
    Rate,
)
from nahtlos.model.topology import Topology, same_address
from nahtlos.runtime.controllers import addresses
from nahtlos.runtime.controllers.addresses import checked_prefix
from nahtlos.runtime.controllers.network_requests import known_network, known_port, same_project
from nahtlos.runtime.controllers.networks import (
    PortChange,
    PortRequest,
)
from nahtlos.runtime.controllers.requests import listed

MAX_PORTS = 8
MAX_PAIRS = 32
MAX_QUEUES = 8
MIN_RATE = 100_000
"""bit/s. Below, one full packet takes longer than a sender waits before it sends again."""
MAX_RATE = 400 * 10**9
MIN_BURST = 1600
MAX_BURST = 256 << 20


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
    own = _own_addresses(topology, network, mac, further)
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


def _own_addresses(
    topology: Topology, network: NetworkSpec, mac: str, further: tuple[str, ...]
) -> tuple[str, ...]:
    """Those that it gives itself, whatever others it is given beside them: its guard must know them."""
    made = (addresses.made_of_mac(s, mac) for s in network.all_subnets if addresses.gives_itself(s))
    found = tuple(address for address in made if not same_address(address, further))
    for address in found:
        addresses.check_free(topology, network, address, "mac")
    return found


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
