"""What operators see of the virtual network. Pure."""

from collections.abc import Mapping

import msgspec

from nahtlos.model.ids import HostId, NetworkId, PortId, SecurityGroupId, SubnetId
from nahtlos.model.inventory import Inventory
from nahtlos.model.networking import LoadBalancerSpec, SubnetSpec
from nahtlos.model.topology import Topology
from nahtlos.runtime.controllers.networks import (
    LoadBalancerView,
    NetworkView,
    PortView,
    SecurityGroupView,
    Settling,
    SubnetView,
)
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.executor.decide import decide


def network_view(topology: Topology, network: NetworkId) -> NetworkView:
    spec = topology.networks[network]
    return NetworkView(
        id=spec.id,
        project=spec.project,
        vni=spec.vni,
        mtu=spec.mtu,
        dhcp_ip=spec.dhcp_ip,
        gateway_host=spec.gateway_host or None,
        provider=spec.provider,
        subnets=tuple(_subnet_view(topology, subnet) for subnet in spec.all_subnets),
        ports=tuple(sorted(port.id for port in topology.ports_of(network))),
        load_balancers=tuple(sorted(b.id for b in topology.balancers.values() if b.network == network)),
    )


def subnet_view(topology: Topology, subnet: SubnetId) -> SubnetView:
    return _subnet_view(topology, topology.subnets()[subnet])


def _subnet_view(topology: Topology, spec: SubnetSpec) -> SubnetView:
    router = topology.router_of(spec.id)
    project = topology.networks[spec.network].project
    return SubnetView(spec=spec, project=project, router=router.id if router else None)


def balancer_view(spec: LoadBalancerSpec, inventory: Inventory) -> LoadBalancerView:
    host = inventory.hosts.get(spec.host) if spec.host in inventory.connected else None
    found = (each for each in (host.load_balancers if host else ()) if each.id == spec.id)
    return LoadBalancerView(**msgspec.structs.asdict(spec), status=next(found, None))


def port_view(topology: Topology, places: Mapping[PortId, HostId], port: PortId) -> PortView:
    spec = topology.ports[port]
    return PortView(
        id=port,
        server=topology.servers[port],
        project=topology.networks[spec.network].project,
        network=spec.network,
        mac=spec.mac,
        addresses=spec.all_addresses,
        allowed_pairs=spec.allowed_pairs,
        security_groups=spec.security_groups,
        bandwidth=spec.bandwidth,
        floating_ips=tuple(f.address for f in topology.floating_ips.values() if f.port == port),
        host=places.get(port),
    )


def group_view(topology: Topology, group: SecurityGroupId) -> SecurityGroupView:
    ports = tuple(sorted(port.id for port in topology.members(group)))
    return SecurityGroupView(spec=topology.groups[group], ports=ports)


def places(state: State) -> dict[PortId, HostId]:
    """Where each port's server is by the plan."""
    assigned = state.blueprint.servers if state.blueprint else {}
    return {
        port.id: assigned[name].host
        for name, row in state.servers.items()
        if name in assigned
        for port in row.spec.ports
    }


def settling(state: State, connected: frozenset[HostId], now: float) -> Settling:
    """Hosts that have not reported back the configuration they are to have by what is wanted now."""
    if state.blueprint is None:
        return Settling(hosts=tuple(sorted(state.hosts)), away=())
    orders = decide(state.world(state.blueprint, connected, now))
    behind = [
        host
        for host, order in orders.hosts.items()
        if host not in state.inventories
        or order.config is not state.configs.get(host)
        or state.inventories[host].generation < order.config.generation
    ]
    return Settling(hosts=tuple(behind), away=tuple(host for host in behind if host not in connected))
