"""Whether routers and floating IPs can be as they are asked for. Pure; every refusal names
the field and the remedy."""

from collections.abc import Iterable, Mapping

import msgspec
from msgspec import UNSET

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    PortId,
    RouterId,
    SubnetId,
    checked_name,
)
from nahtlos.model.networking import (
    Family,
    FloatingIpSpec,
    NetworkSpec,
    Route,
    RouterGateway,
    RouterInterface,
    RouterSpec,
)
from nahtlos.model.nouns import HostRole, HostSpec
from nahtlos.model.topology import Topology, family_of, within
from nahtlos.runtime.controllers import addresses
from nahtlos.runtime.controllers.addresses import checked_prefix, checked_unicast
from nahtlos.runtime.controllers.network_requests import (
    check_inside,
    checked_project,
    in_use,
    known_port,
    known_subnet,
    overlapping,
    same_project,
)
from nahtlos.runtime.controllers.networks import (
    Assignment,
    FloatingIpRequest,
    RouterChange,
    RouterRequest,
)
from nahtlos.runtime.controllers.requests import listed

LAST_NUMBER = 65535
MAX_INTERFACES = 32
MAX_ROUTES = 100

Hosts = Mapping[HostId, HostSpec]


def free_number(topology: Topology) -> int:
    """Of routers and load balancers together: it names devices and MACs of both."""
    used = {r.number for r in topology.routers.values()} | {b.number for b in topology.balancers.values()}
    for number in range(1, LAST_NUMBER + 1):
        if number not in used:
            return number
    raise Conflict("the cloud has no free number", field="name", remedy="delete routers or load balancers")


def edge_host(hosts: Hosts, host: HostId, field: str) -> HostId:
    edges = [h for h, spec in hosts.items() if spec.role is HostRole.EDGE]
    if host not in hosts:
        raise NotFound(f"no host '{host}'", field=field, remedy=f"hosts with a way out: {listed(edges)}")
    if host not in edges:
        raise Refused(
            f"{host} has the role {hosts[host].role} and no way out",
            field=field,
            remedy=f"hosts that have: {listed(edges)}",
        )
    return host


# --- routers -----------------------------------------------------------------------------------------


def known_router(topology: Topology, router: RouterId, field: str = "router") -> RouterSpec:
    if router not in topology.routers:
        raise NotFound(f"no router '{router}'", field=field, remedy=f"routers: {listed(topology.routers)}")
    return topology.routers[router]


def new_router(topology: Topology, request: RouterRequest) -> RouterSpec:
    name = RouterId(checked_name(request.name, "name"))
    if name in topology.routers:
        raise Conflict(f"a router '{name}' exists", field="name", remedy="choose another name")
    router = RouterSpec(id=name, project=checked_project(request.project), number=free_number(topology))
    return _attached(topology, router, request.subnets)


def changed_router(topology: Topology, hosts: Hosts, router: RouterId, change: RouterChange) -> RouterSpec:
    """Taking away comes first, so that one change can exchange things."""
    spec = known_router(topology, router)
    spec = _without_routes(spec, change.remove_routes)
    spec = _detached(topology, spec, change.detach)
    spec = _attached(topology, spec, change.attach)
    spec = _with_routes(topology, spec, change.add_routes)
    if change.gateway is not UNSET:
        spec = _with_gateway(topology, hosts, spec, change.gateway)
    return spec


def check_router_unused(topology: Topology, router: RouterId) -> None:
    spec = known_router(topology, router)
    users = [f"subnet {i.subnet}" for i in spec.interfaces]
    users += [f"floating IP {f.id}" for f in topology.floating_ips.values() if f.router == router]
    in_use(f"router {router}", users, "router", "detach the subnets and unassign the floating IPs first")


def _attached(topology: Topology, router: RouterSpec, subnets: Iterable[SubnetId]) -> RouterSpec:
    for name in subnets:
        subnet = known_subnet(topology, name)
        network = topology.networks[subnet.network]
        same_project(router.project, network.project, f"subnet {name}", "subnet")
        other = topology.router_of(name)
        if any(i.subnet == name for i in router.interfaces) or (other is not None and other.id != router.id):
            raise Conflict(
                f"{name} is attached to router {other.id if other else router.id}",
                field="subnet",
                remedy="detach it there first",
            )
        _check_attachable(topology, router, network, name)
        if not subnet.gateway_ip:
            raise Refused(
                f"{name} has no gateway address",
                field="subnet",
                remedy=f"nahtlos subnet set {name} --gateway ADDRESS",
            )
        addresses.check_free(topology, network, subnet.gateway_ip, "subnet")
        interface = RouterInterface(subnet=name, network=network.id, ip=subnet.gateway_ip)
        router = msgspec.structs.replace(router, interfaces=(*router.interfaces, interface))
    return router


def _check_attachable(topology: Topology, router: RouterSpec, network: NetworkSpec, name: SubnetId) -> None:
    check_inside(network, "its router is", "subnet")
    if network.gateway_host and name == network.id:
        raise Conflict(
            f"the gateway address of {name} belongs to its uplink at {network.gateway_host}",
            field="subnet",
            remedy="attach subnets of networks without an uplink of their own",
        )
    if len(router.interfaces) >= MAX_INTERFACES:
        raise Refused(
            f"{router.id} has {MAX_INTERFACES} subnets", field="subnet", remedy="use a second router"
        )
    subnets = topology.subnets()
    clash = overlapping([*(subnets[i.subnet] for i in router.interfaces), subnets[name]])
    if clash is not None:
        raise Conflict(
            f"{clash[1].cidr} of {clash[1].id} overlaps {clash[0].cidr} of {clash[0].id} in {router.id}",
            field="subnet",
            remedy="use a router of its own, or a subnet with another range",
        )


def _detached(topology: Topology, router: RouterSpec, subnets: Iterable[SubnetId]) -> RouterSpec:
    for name in subnets:
        if all(i.subnet != name for i in router.interfaces):
            raise NotFound(
                f"{name} is not attached to {router.id}",
                field="subnet",
                remedy=f"attached: {listed(i.subnet for i in router.interfaces)}",
            )
        subnet = known_subnet(topology, name)
        users = [f"route {r.destination}" for r in router.routes if within(r.next_hop, subnet.cidr)]
        users += [
            f"floating IP {f.id}"
            for f in topology.floating_ips.values()
            if f.router == router.id and f.fixed_ip and _in_subnet(topology, f, subnet.id)
        ]
        in_use(f"{name} in {router.id}", users, "subnet", "remove these routes, unassign these floating IPs")
        kept = tuple(i for i in router.interfaces if i.subnet != name)
        router = msgspec.structs.replace(router, interfaces=kept)
    return router


def _in_subnet(topology: Topology, floating: FloatingIpSpec, subnet: SubnetId) -> bool:
    port = topology.ports.get(floating.port) if floating.port else None
    at = topology.subnet_of(port.network, floating.fixed_ip) if port else None
    return at is not None and at.id == subnet


def _with_routes(topology: Topology, router: RouterSpec, routes: Iterable[Route]) -> RouterSpec:
    for asked in routes:
        route = _checked_route(topology, router, asked)
        if any(r.destination == route.destination for r in router.routes):
            raise Conflict(
                f"{router.id} has a route to {route.destination}",
                field="destination",
                remedy="remove that one first",
            )
        if len(router.routes) >= MAX_ROUTES:
            raise Refused(f"{router.id} has {MAX_ROUTES} routes", field="routes", remedy="remove some first")
        router = msgspec.structs.replace(router, routes=(*router.routes, route))
    return router


def _checked_route(topology: Topology, router: RouterSpec, asked: Route) -> Route:
    destination = str(checked_prefix(asked.destination, "destination"))
    next_hop = checked_unicast(asked.next_hop, "next_hop")
    if family_of(destination) is not family_of(next_hop):
        raise Refused(
            f"{next_hop} is of another family than {destination}",
            field="next_hop",
            remedy=f"give one of {family_of(destination)}",
        )
    subnets = topology.subnets()
    attached = [subnets[i.subnet] for i in router.interfaces if i.subnet in subnets]
    if all(not within(next_hop, s.cidr) for s in attached):
        raise Refused(
            f"{next_hop} is in no subnet attached to {router.id}",
            field="next_hop",
            remedy=f"give one within {listed(s.cidr for s in attached)}",
        )
    if any(next_hop == i.ip for i in router.interfaces):
        raise Refused(f"{next_hop} is {router.id} itself", field="next_hop", remedy="give another machine's")
    if any(destination == s.cidr for s in attached):
        raise Conflict(
            f"{destination} is attached to {router.id}", field="destination", remedy="no route is needed"
        )
    return Route(destination=destination, next_hop=next_hop)


def _without_routes(router: RouterSpec, routes: Iterable[Route]) -> RouterSpec:
    for asked in routes:
        destination = str(checked_prefix(asked.destination, "destination"))
        next_hop = checked_unicast(asked.next_hop, "next_hop")
        kept = tuple(r for r in router.routes if r != Route(destination=destination, next_hop=next_hop))
        if len(kept) == len(router.routes):
            raise NotFound(
                f"{router.id} has no route to {destination} by {next_hop}",
                field="destination",
                remedy=f"routes: {listed(f'{r.destination} by {r.next_hop}' for r in router.routes)}",
            )
        router = msgspec.structs.replace(router, routes=kept)
    return router


def _with_gateway(
    topology: Topology, hosts: Hosts, router: RouterSpec, asked: RouterGateway | None
) -> RouterSpec:
    users = [f"floating IP {f.id}" for f in topology.floating_ips.values() if f.router == router.id]
    if asked is None:
        in_use(f"the gateway of {router.id}", users, "gateway", "unassign these first")
        return msgspec.structs.replace(router, gateway=None)
    host = edge_host(hosts, asked.host, "gateway.host")
    if not topology.external_interface(host):
        raise Conflict(
            f"{host} has no interface to the outside",
            field="gateway.host",
            remedy="name it under `external` in the orchestrator's settings",
        )
    address = _outside_address(topology, asked.address, "gateway.address", f"router {router.id}")
    subnets = topology.subnets()
    clash = next((i.subnet for i in router.interfaces if within(address, subnets[i.subnet].cidr)), None)
    if clash is not None:
        raise Conflict(
            f"{address} lies in {clash}, which is attached to {router.id}",
            field="gateway.address",
            remedy="give an address of the outside",
        )
    gateway = RouterGateway(host=host, address=address, snat=asked.snat)
    return msgspec.structs.replace(router, gateway=gateway)


def _outside_address(topology: Topology, text: str, field: str, mine: str) -> str:
    """One that nothing but `mine` has."""
    address = checked_unicast(text, field)
    if family_of(address) is Family.IPV6:
        raise Refused(
            f"{address} is IPv6, which routers do not translate", field=field, remedy="give an IPv4 address"
        )
    holder = topology.outside_addresses().get(address, mine)
    if holder != mine:
        raise Conflict(f"{holder} has {address}", field=field, remedy="give another address")
    for network in topology.networks.values():
        if network.gateway_host and within(address, network.cidr):
            raise Conflict(
                f"{address} belongs to network {network.id}, which is routed to the outside as it is",
                field=field,
                remedy="give an address of the outside",
            )
    return address


# --- floating IPs ------------------------------------------------------------------------------------


def known_floating_ip(topology: Topology, name: FloatingIpId) -> FloatingIpSpec:
    if name not in topology.floating_ips:
        raise NotFound(
            f"no floating IP '{name}'",
            field="floating_ip",
            remedy=f"floating IPs: {listed(topology.floating_ips)}",
        )
    return topology.floating_ips[name]


def new_floating_ip(topology: Topology, request: FloatingIpRequest) -> FloatingIpSpec:
    name = FloatingIpId(checked_name(request.name, "name"))
    if name in topology.floating_ips:
        raise Conflict(f"a floating IP '{name}' exists", field="name", remedy="choose another name")
    address = _outside_address(topology, request.address, "address", f"floating IP {name}")
    spec = FloatingIpSpec(id=name, project=checked_project(request.project), address=address)
    if request.port is None:
        return spec
    return assigned(topology, spec, Assignment(port=request.port, fixed_ip=request.fixed_ip))


def assigned(topology: Topology, spec: FloatingIpSpec, asked: Assignment) -> FloatingIpSpec:
    if asked.port is None:
        return unassigned(spec)
    port = known_port(topology, asked.port)
    same_project(spec.project, topology.networks[port.network].project, f"port {port.id}", "port")
    fixed_ip = _fixed_ip(spec, port.id, port.all_addresses, asked.fixed_ip)
    other = topology.floating_of(port.id, fixed_ip)
    if other is not None and other.id != spec.id:
        raise Conflict(
            f"{fixed_ip} of {port.id} has floating IP {other.id}", field="port", remedy="unassign that first"
        )
    router = _way_out(topology, port.id, fixed_ip)
    return msgspec.structs.replace(spec, port=port.id, fixed_ip=fixed_ip, router=router.id)


def unassigned(spec: FloatingIpSpec) -> FloatingIpSpec:
    return msgspec.structs.replace(spec, port=None, fixed_ip="", router=None)


def _fixed_ip(spec: FloatingIpSpec, port: PortId, own: tuple[str, ...], asked: str) -> str:
    family = family_of(spec.address)
    fitting = [a for a in own if family_of(a) is family]
    if not asked:
        if not fitting:
            raise Refused(f"{port} has no address of {family}", field="port", remedy="name another port")
        return fitting[0]
    fixed_ip = checked_unicast(asked, "fixed_ip")
    if fixed_ip not in own:
        raise Refused(
            f"{fixed_ip} is no address of {port}", field="fixed_ip", remedy=f"it has {', '.join(own)}"
        )
    if fixed_ip not in fitting:
        raise Refused(
            f"{fixed_ip} is of another family than {spec.address}",
            field="fixed_ip",
            remedy=f"give one of {family}",
        )
    return fixed_ip


def _way_out(topology: Topology, port: PortId, fixed_ip: str) -> RouterSpec:
    subnet = topology.subnet_of(topology.ports[port].network, fixed_ip)
    assert subnet is not None, "a port's addresses lie in its network's subnets"
    router = topology.router_of(subnet.id)
    if router is None:
        raise Conflict(
            f"subnet {subnet.id} of {port} is attached to no router",
            field="port",
            remedy=f"nahtlos router attach ROUTER {subnet.id}",
        )
    if router.gateway is None:
        raise Conflict(
            f"router {router.id} of {port} has no gateway",
            field="port",
            remedy=f"nahtlos router gateway set {router.id} --host HOST --address ADDRESS",
        )
    return router
