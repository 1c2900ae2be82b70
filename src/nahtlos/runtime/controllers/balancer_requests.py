"""Whether load balancers can be as they are asked for. Pure; every refusal names the field and the remedy."""

from collections.abc import Iterable

import msgspec
from msgspec import UNSET

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import (
    HostId,
    LoadBalancerId,
    checked_name,
)
from nahtlos.model.networking import (
    HealthCheck,
    LoadBalancerSpec,
    Member,
)
from nahtlos.model.nouns import HostRole
from nahtlos.model.topology import Topology, family_of
from nahtlos.runtime.controllers import addresses
from nahtlos.runtime.controllers.addresses import checked_unicast
from nahtlos.runtime.controllers.network_requests import (
    check_inside,
    checked_project,
    known_network,
    same_project,
)
from nahtlos.runtime.controllers.networks import (
    LoadBalancerChange,
    LoadBalancerRequest,
)
from nahtlos.runtime.controllers.requests import listed
from nahtlos.runtime.controllers.routing_requests import Hosts, free_number

MAX_MEMBERS = 100
MAX_WEIGHT = 256
MIN_INTERVAL_MS, MAX_INTERVAL_MS = 100, 600_000
MAX_COUNT = 100


def known_balancer(topology: Topology, name: LoadBalancerId) -> LoadBalancerSpec:
    if name not in topology.balancers:
        raise NotFound(
            f"no load balancer '{name}'",
            field="load_balancer",
            remedy=f"load balancers: {listed(topology.balancers)}",
        )
    return topology.balancers[name]


def new_balancer(topology: Topology, hosts: Hosts, request: LoadBalancerRequest) -> LoadBalancerSpec:
    name = LoadBalancerId(checked_name(request.name, "name"))
    if name in topology.balancers:
        raise Conflict(f"a load balancer '{name}' exists", field="name", remedy="choose another name")
    project = checked_project(request.project)
    network = known_network(topology, request.network)
    same_project(project, network.project, f"network {network.id}", "network")
    check_inside(network, "what balances load is", "network")
    if request.vip:
        vip = addresses.port_address(topology, network, request.vip, "vip")
        addresses.check_free(topology, network, vip, "vip")
    else:
        vip = addresses.free_address(topology, network)
    spec = LoadBalancerSpec(
        id=name,
        project=project,
        number=free_number(topology),
        network=network.id,
        vip=vip,
        port=_port(request.port, "port"),
        host=_carrier(topology, hosts, request.host),
        health=checked_health(request.health),
    )
    return _with_members(topology, spec, request.members)


def changed_balancer(
    topology: Topology, hosts: Hosts, name: LoadBalancerId, change: LoadBalancerChange
) -> LoadBalancerSpec:
    spec = known_balancer(topology, name)
    for gone in change.remove_members:
        kept = tuple(m for m in spec.members if (m.address, m.port) != (gone.address, gone.port))
        if len(kept) == len(spec.members):
            raise NotFound(
                f"{name} has no member {gone.address}:{gone.port}",
                field="members",
                remedy=f"members: {listed(f'{m.address}:{m.port}' for m in spec.members)}",
            )
        spec = msgspec.structs.replace(spec, members=kept)
    spec = _with_members(topology, spec, change.put_members)
    if change.health is not UNSET:
        spec = msgspec.structs.replace(spec, health=checked_health(change.health))
    if change.host is not UNSET:
        spec = msgspec.structs.replace(spec, host=_carrier(topology, hosts, change.host))
    return spec


def _carrier(topology: Topology, hosts: Hosts, asked: HostId | None) -> HostId:
    """The host asked for, or the compute host that carries fewest load balancers."""
    compute = sorted(h for h, spec in hosts.items() if spec.role is HostRole.COMPUTE)
    if asked is not None:
        if asked not in hosts:
            raise NotFound(f"no host '{asked}'", field="host", remedy=f"hosts: {listed(hosts)}")
        if asked not in compute:
            raise Refused(
                f"{asked} has the role {hosts[asked].role}",
                field="host",
                remedy=f"hosts that carry load balancers: {listed(compute)}",
            )
        return asked
    if not compute:
        raise Conflict("no compute host has joined", field="host", remedy="join a host first")
    carried = [b.host for b in topology.balancers.values()]
    return min(compute, key=lambda host: (carried.count(host), host))


def _with_members(topology: Topology, spec: LoadBalancerSpec, members: Iterable[Member]) -> LoadBalancerSpec:
    found = {(m.address, m.port): m for m in spec.members}
    for asked in members:
        member = _checked_member(topology, spec, asked)
        found[member.address, member.port] = member
    if len(found) > MAX_MEMBERS:
        raise Refused(f"{len(found)} members", field="members", remedy=f"have at most {MAX_MEMBERS}")
    return msgspec.structs.replace(spec, members=tuple(found.values()))


def _checked_member(topology: Topology, spec: LoadBalancerSpec, asked: Member) -> Member:
    address = checked_unicast(asked.address, "members.address")
    if family_of(address) is not family_of(spec.vip):
        raise Refused(
            f"{address} is of another family than {spec.vip}",
            field="members.address",
            remedy=f"give one of {family_of(spec.vip)}",
        )
    if topology.subnet_of(spec.network, address) is None:
        ranges = listed(s.cidr for s in topology.networks[spec.network].all_subnets)
        raise Refused(
            f"{address} is not in network {spec.network}",
            field="members.address",
            remedy=f"give one within {ranges}",
        )
    if address == spec.vip:
        raise Refused(f"{address} is {spec.id} itself", field="members.address", remedy="name a server's")
    if not 0 <= asked.weight <= MAX_WEIGHT:
        raise Refused(f"a weight of {asked.weight}", field="members.weight", remedy=f"give 0 to {MAX_WEIGHT}")
    port = _port(asked.port, "members.port")
    return Member(address=address, port=port, weight=asked.weight, draining=asked.draining)


def checked_health(asked: HealthCheck) -> HealthCheck:
    for field, low, high in (
        ("interval_ms", MIN_INTERVAL_MS, MAX_INTERVAL_MS),
        ("timeout_ms", MIN_INTERVAL_MS, MAX_INTERVAL_MS),
        ("fall", 1, MAX_COUNT),
        ("rise", 1, MAX_COUNT),
    ):
        value = getattr(asked, field)
        if not low <= value <= high:
            raise Refused(f"{value}", field=f"health.{field}", remedy=f"give {low} to {high}")
    return asked


def _port(port: int, field: str) -> int:
    if not 1 <= port <= 65535:
        raise Refused(f"{port} is no port", field=field, remedy="give 1 to 65535")
    return port
