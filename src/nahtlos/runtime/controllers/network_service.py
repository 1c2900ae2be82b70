"""`Networks` over the store: reads the state, checks the request, writes intent.

Every request that writes reads what it decides from in the same transaction. Hosts are told by the planning
loop, which is woken; nothing here waits for them.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    PortId,
    RouterId,
    SecurityGroupId,
    ServerId,
    SubnetId,
)
from nahtlos.model.networking import FloatingIpSpec, LoadBalancerSpec, RouterSpec, SecurityRule
from nahtlos.model.nouns import HostSpec
from nahtlos.model.topology import Topology, Underlay
from nahtlos.runtime.controllers import (
    balancer_requests,
    network_requests,
    network_views,
    port_requests,
    requests,
    routing_requests,
    security_requests,
    underlay_requests,
)
from nahtlos.runtime.controllers import trace as tracing
from nahtlos.runtime.controllers.look import Looks
from nahtlos.runtime.controllers.networks import (
    Assignment,
    FloatingIpRequest,
    LoadBalancerChange,
    LoadBalancerRequest,
    LoadBalancerView,
    NetworkChange,
    NetworkRequest,
    NetworkView,
    PortChange,
    PortView,
    RouterChange,
    RouterRequest,
    SecurityGroupRequest,
    SecurityGroupView,
    Settling,
    SubnetChange,
    SubnetRequest,
    SubnetView,
    Trace,
    TraceRequest,
)
from nahtlos.runtime.controllers.security_requests import rule_text
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.store import networking
from nahtlos.runtime.store.store import AsyncConnection

UNDERLAY_MTU = "underlay mtu"
"""Under which hosts report it, if they do."""

Said = Callable[[str, str, str], None]


@dataclass(frozen=True)
class _Change:
    """A transaction that writes, and what it has read."""

    tx: AsyncConnection
    state: State
    topology: Topology

    @property
    def hosts(self) -> dict[HostId, HostSpec]:
        return {host: row.spec for host, row in self.state.hosts.items()}

    @property
    def underlay_mtu(self) -> int:
        """The smallest that is known of; 0: none is."""
        reported = (i.network.get(UNDERLAY_MTU, "") for i in self.state.inventories.values())
        known = [int(text) for text in reported if text.isdecimal()]
        return min((mtu for mtu in (self.topology.underlay.mtu, *known) if mtu), default=0)


class NetworkService:
    """`said`: what has been asked for, as an event; it wakes the planning loop."""

    def __init__(self, looks: Looks, *, said: Said) -> None:
        self._looks = looks
        self._said = said

    @asynccontextmanager
    async def _changing(self) -> AsyncGenerator[_Change]:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            yield _Change(tx, state, state.topology())

    async def _state(self) -> State:
        return (await self._looks.now()).state

    async def _topology(self) -> Topology:
        return (await self._state()).topology()

    # --- networks ------------------------------------------------------------------------------------

    async def networks(self) -> tuple[NetworkView, ...]:
        topology = await self._topology()
        return tuple(network_views.network_view(topology, network) for network in topology.networks)

    async def network(self, network: NetworkId) -> NetworkView:
        topology = await self._topology()
        return network_views.network_view(topology, network_requests.known_network(topology, network).id)

    async def create_network(self, request: NetworkRequest) -> NetworkView:
        async with self._changing() as change:
            spec = network_requests.new_network(change.topology, request, change.underlay_mtu)
            await networking.put_network(change.tx, spec)
        self._said("network.created", spec.id, f"network {spec.id} is to be: {spec.cidr}, MTU {spec.mtu}")
        return await self.network(spec.id)

    async def change_network(self, network: NetworkId, change: NetworkChange) -> NetworkView:
        async with self._changing() as current:
            before = network_requests.known_network(current.topology, network)
            spec = network_requests.changed_network(before, change, current.underlay_mtu)
            await networking.put_network(current.tx, spec)
        self._said("network.changed", network, f"network {network} is to have an MTU of {spec.mtu}")
        return await self.network(network)

    async def delete_network(self, network: NetworkId) -> None:
        async with self._changing() as change:
            network_requests.check_network_unused(change.topology, network)
            await networking.forget_network(change.tx, change.topology.networks[network])
        self._said("network.deleted", network, f"network {network} is to be deleted")

    # --- subnets -------------------------------------------------------------------------------------

    async def subnets(self) -> tuple[SubnetView, ...]:
        topology = await self._topology()
        return tuple(network_views.subnet_view(topology, subnet) for subnet in topology.subnets())

    async def subnet(self, subnet: SubnetId) -> SubnetView:
        topology = await self._topology()
        return network_views.subnet_view(topology, network_requests.known_subnet(topology, subnet).id)

    async def create_subnet(self, request: SubnetRequest) -> SubnetView:
        async with self._changing() as change:
            spec = network_requests.new_subnet(change.topology, request)
            await networking.put_subnet(change.tx, spec)
        self._said("subnet.created", spec.id, f"subnet {spec.id} of {spec.network} is to be: {spec.cidr}")
        return await self.subnet(spec.id)

    async def change_subnet(self, subnet: SubnetId, change: SubnetChange) -> SubnetView:
        async with self._changing() as current:
            spec = network_requests.changed_subnet(current.topology, subnet, change)
            await networking.put_subnet(current.tx, spec)
        self._said("subnet.changed", subnet, f"subnet {subnet} is to change")
        return await self.subnet(subnet)

    async def delete_subnet(self, subnet: SubnetId) -> None:
        async with self._changing() as change:
            network_requests.check_subnet_unused(change.topology, subnet)
            await networking.forget_subnet(change.tx, subnet)
        self._said("subnet.deleted", subnet, f"subnet {subnet} is to be deleted")

    # --- ports ---------------------------------------------------------------------------------------

    async def ports(self) -> tuple[PortView, ...]:
        state = await self._state()
        topology, places = state.topology(), network_views.places(state)
        return tuple(network_views.port_view(topology, places, port) for port in topology.ports)

    async def port(self, port: PortId) -> PortView:
        state = await self._state()
        topology = state.topology()
        network_requests.known_port(topology, port)
        return network_views.port_view(topology, network_views.places(state), port)

    async def change_port(self, port: PortId, change: PortChange) -> PortView:
        async with self._changing() as current:
            spec = port_requests.changed_port(current.topology, port, change)
            server = requests.present_server(current.state, current.topology.servers[port])
            await networking.put_ports(current.tx, current.state.servers[server].spec, [spec])
        self._said("port.changed", port, f"port {port} is to change")
        return await self.port(port)

    async def trace(self, request: TraceRequest) -> Trace:
        state = await self._state()
        return tracing.trace(state.topology(), network_views.places(state), request)

    # --- security groups -----------------------------------------------------------------------------

    async def security_groups(self) -> tuple[SecurityGroupView, ...]:
        topology = await self._topology()
        return tuple(network_views.group_view(topology, group) for group in topology.groups)

    async def security_group(self, group: SecurityGroupId) -> SecurityGroupView:
        topology = await self._topology()
        return network_views.group_view(topology, security_requests.known_group(topology, group).id)

    async def create_security_group(self, request: SecurityGroupRequest) -> SecurityGroupView:
        async with self._changing() as change:
            spec = security_requests.new_group(change.topology, request)
            await networking.put_group(change.tx, spec)
        self._said("security-group.created", spec.id, f"security group {spec.id} is made")
        return await self.security_group(spec.id)

    async def delete_security_group(self, group: SecurityGroupId) -> None:
        async with self._changing() as change:
            security_requests.check_group_unused(change.topology, group)
            await networking.forget_group(change.tx, group)
        self._said("security-group.deleted", group, f"security group {group} is deleted")

    async def add_rule(self, group: SecurityGroupId, rule: SecurityRule) -> SecurityGroupView:
        async with self._changing() as change:
            known = security_requests.known_group(change.topology, group)
            spec = security_requests.with_rule(change.topology, known, rule)
            await networking.put_group(change.tx, spec)
        self._said("security-group.rule", group, f"{group} allows {rule_text(spec.rules[-1])}")
        return await self.security_group(group)

    async def remove_rule(self, group: SecurityGroupId, rule: SecurityRule) -> SecurityGroupView:
        async with self._changing() as change:
            known = security_requests.known_group(change.topology, group)
            spec = security_requests.without_rule(change.topology, known, rule)
            await networking.put_group(change.tx, spec)
        self._said("security-group.rule", group, f"{group} no longer allows {rule_text(rule)}")
        return await self.security_group(group)

    # --- routers -------------------------------------------------------------------------------------

    async def routers(self) -> tuple[RouterSpec, ...]:
        return tuple((await self._topology()).routers.values())

    async def router(self, router: RouterId) -> RouterSpec:
        return routing_requests.known_router(await self._topology(), router)

    async def create_router(self, request: RouterRequest) -> RouterSpec:
        async with self._changing() as change:
            spec = routing_requests.new_router(change.topology, request)
            await networking.put_router(change.tx, spec)
        self._said("router.created", spec.id, f"router {spec.id} is to be")
        return spec

    async def change_router(self, router: RouterId, change: RouterChange) -> RouterSpec:
        async with self._changing() as current:
            spec = routing_requests.changed_router(current.topology, current.hosts, router, change)
            await networking.put_router(current.tx, spec)
        self._said("router.changed", router, f"router {router} is to change")
        return spec

    async def delete_router(self, router: RouterId) -> None:
        async with self._changing() as change:
            routing_requests.check_router_unused(change.topology, router)
            await networking.forget_router(change.tx, router)
        self._said("router.deleted", router, f"router {router} is to be deleted")

    # --- floating IPs --------------------------------------------------------------------------------

    async def floating_ips(self) -> tuple[FloatingIpSpec, ...]:
        return tuple((await self._topology()).floating_ips.values())

    async def floating_ip(self, floating_ip: FloatingIpId) -> FloatingIpSpec:
        return routing_requests.known_floating_ip(await self._topology(), floating_ip)

    async def create_floating_ip(self, request: FloatingIpRequest) -> FloatingIpSpec:
        async with self._changing() as change:
            spec = routing_requests.new_floating_ip(change.topology, request)
            await networking.put_floating_ip(change.tx, spec)
        self._said("floating-ip.created", spec.id, f"{spec.address} {_leads_to(spec)}")
        return spec

    async def assign_floating_ip(self, floating_ip: FloatingIpId, assignment: Assignment) -> FloatingIpSpec:
        async with self._changing() as change:
            known = routing_requests.known_floating_ip(change.topology, floating_ip)
            spec = routing_requests.assigned(change.topology, known, assignment)
            await networking.put_floating_ip(change.tx, spec)
        self._said("floating-ip.assigned", spec.id, f"{spec.address} {_leads_to(spec)}")
        return spec

    async def delete_floating_ip(self, floating_ip: FloatingIpId) -> None:
        async with self._changing() as change:
            spec = routing_requests.known_floating_ip(change.topology, floating_ip)
            network_requests.in_use(
                f"floating IP {spec.id}",
                [f"port {spec.port}"] if spec.port else [],
                "floating_ip",
                f"nahtlos floating-ip unassign {spec.id}",
            )
            await networking.forget_floating_ip(change.tx, floating_ip)
        self._said("floating-ip.deleted", floating_ip, f"{spec.address} is given back")

    # --- load balancers ------------------------------------------------------------------------------

    async def load_balancers(self) -> tuple[LoadBalancerView, ...]:
        look = await self._looks.now()
        known = look.state.topology().balancers.values()
        return tuple(network_views.balancer_view(spec, look.inventory) for spec in known)

    async def load_balancer(self, balancer: LoadBalancerId) -> LoadBalancerView:
        look = await self._looks.now()
        spec = balancer_requests.known_balancer(look.state.topology(), balancer)
        return network_views.balancer_view(spec, look.inventory)

    async def create_load_balancer(self, request: LoadBalancerRequest) -> LoadBalancerSpec:
        async with self._changing() as change:
            spec = balancer_requests.new_balancer(change.topology, change.hosts, request)
            await networking.put_load_balancer(change.tx, spec)
        self._said("load-balancer.created", spec.id, f"{spec.id} is to balance {spec.vip}:{spec.port}")
        return spec

    async def change_load_balancer(
        self, balancer: LoadBalancerId, change: LoadBalancerChange
    ) -> LoadBalancerSpec:
        async with self._changing() as current:
            spec = balancer_requests.changed_balancer(current.topology, current.hosts, balancer, change)
            await networking.put_load_balancer(current.tx, spec)
        self._said("load-balancer.changed", balancer, f"load balancer {balancer} is to change")
        return spec

    async def delete_load_balancer(self, balancer: LoadBalancerId) -> None:
        async with self._changing() as change:
            balancer_requests.known_balancer(change.topology, balancer)
            await networking.forget_load_balancer(change.tx, balancer)
        self._said("load-balancer.deleted", balancer, f"load balancer {balancer} is to be deleted")

    # --- the underlay, and how far hosts are ---------------------------------------------------------

    async def underlay(self) -> Underlay:
        return (await self._topology()).underlay

    async def set_underlay(self, underlay: Underlay) -> Underlay:
        async with self._changing() as change:
            underlay_requests.checked_underlay(underlay, change.topology.networks)
            await networking.set_underlay(change.tx, underlay)
        self._said("underlay", "cloud", "the underlay is to be divided anew")
        return underlay

    async def settling(self) -> Settling:
        look = await self._looks.now()
        return network_views.settling(look.state, look.inventory.connected, self._looks.wall())


def _leads_to(spec: FloatingIpSpec) -> str:
    return f"is to lead to {spec.fixed_ip} of {spec.port}" if spec.port else "leads nowhere"


async def let_go(tx: AsyncConnection, topology: Topology, server: ServerId) -> None:
    """Floating IPs of a server that is to be deleted lead nowhere from here on; they are kept."""
    for spec in topology.floating_ips.values():
        if spec.port is not None and topology.servers.get(spec.port) == server:
            await networking.put_floating_ip(tx, routing_requests.unassigned(spec))
