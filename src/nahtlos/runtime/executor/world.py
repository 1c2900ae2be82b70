"""What the executor decides from: one consistent look at the store, plus who is connected."""

from dataclasses import dataclass, field
from functools import cached_property

from nahtlos.model.blueprint import Blueprint, Policy
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import HostId, NetworkId, OperationId, PortId, ServerId
from nahtlos.model.inventory import Inventory, OperationState, OperationStatus
from nahtlos.model.networking import NetworkSpec, RouterSpec
from nahtlos.model.nouns import HostRole, HostSpec
from nahtlos.model.storage import DiskBudget, SnapshotExport, SnapshotSpec, VolumeSpec
from nahtlos.model.topology import Topology
from nahtlos.model.volume_settings import CephPlace
from nahtlos.runtime.executor.gateways import Gateways


@dataclass(frozen=True, kw_only=True)
class World:
    policy: Policy
    inventory: Inventory
    blueprint: Blueprint
    configs: dict[HostId, HostConfig]
    """What each host was last told."""
    topology: Topology = field(default_factory=Topology)
    """The virtual network as it is wanted. Networks and servers are in the policy, too, and that is where
    they are taken from: ports here may be of servers that are being deleted."""
    removed_volumes: tuple[VolumeSpec, ...] = ()
    removed_snapshots: tuple[SnapshotSpec, ...] = ()
    exports: tuple[SnapshotExport, ...] = ()
    """Snapshots to be readable from outside."""
    ceph: CephPlace | None = None
    disk_budget: DiskBudget = field(default_factory=DiskBudget)
    ended: frozenset[OperationId] = frozenset()
    """Operations whose end is recorded."""
    refused: frozenset[OperationId] = frozenset()
    """Operations an agent would not begin; they are not offered again."""
    held_back: frozenset[OperationId] = frozenset()
    """Operations that are not to be begun yet."""

    def place_of(self, server: ServerId) -> HostId | None:
        """Who owns the server once no move of it runs; None if it is nowhere yet, or shall not exist."""
        assignment = self.blueprint.servers.get(server)
        if assignment is None or server not in self.policy.servers:
            return None
        return assignment.host if assignment.host in self.policy.hosts else None

    def port_places(self) -> dict[PortId, HostId]:
        places: dict[PortId, HostId] = {}
        for server, spec in self.policy.servers.items():
            host = self.place_of(server)
            if host is not None:
                places.update({port.id: host for port in spec.ports})
        return places

    @cached_property
    def gateways(self) -> Gateways:
        return Gateways(self.blueprint, self.inventory, self.configs, frozenset(self.policy.hosts))

    # --- the virtual network, as all hosts see it: worked out once for all of them ---

    @cached_property
    def networks(self) -> tuple[NetworkConfig, ...]:
        hosts = [spec for _, spec in sorted(self.policy.hosts.items())]
        ports = self._ports()
        return tuple(
            NetworkConfig(
                spec=network,
                ports=tuple(ports.get(network.id, ())),
                gateway_vtep=next((h.address for h in hosts if h.id == network.gateway_host), ""),
                vteps=tuple(h.address for h in hosts if self.takes_part(h, network)),
            )
            for network in sorted(self.policy.networks, key=lambda network: network.id)
        )

    def takes_part(self, host: HostSpec, network: NetworkSpec) -> bool:
        """Every compute host does, because a server may arrive at any time; an edge host does where it is the
        way out."""
        if host.role is HostRole.COMPUTE or network.gateway_host == host.id:
            return True
        routed = any(
            touches(router, network.id) and host.id in self.gateways.hosts(router)
            for router in self.topology.routers.values()
        )
        carried = self.topology.balancers.values()
        return routed or any(b.host == host.id and b.network == network.id for b in carried)

    def _ports(self) -> dict[NetworkId, list[PortConfig]]:
        found: dict[NetworkId, list[PortConfig]] = {}
        for server, spec in sorted(self.policy.servers.items()):
            host = self.place_of(server)
            if host is not None:
                for port, config in zip(spec.ports, self.port_configs(server, host), strict=True):
                    found.setdefault(port.network, []).append(config)
        return found

    def port_configs(self, server: ServerId, host: HostId) -> tuple[PortConfig, ...]:
        """The ports of `server`, placed at `host`."""
        vtep = self.policy.hosts[host].address
        return tuple(
            PortConfig(
                id=port.id,
                server=server,
                mac=port.mac,
                ip=port.ip,
                host=host,
                vtep=vtep,
                addresses=port.addresses,
                allowed_pairs=port.allowed_pairs,
                security_groups=port.security_groups,
                bandwidth=port.bandwidth,
                queues=port.queues,
            )
            for port in self.policy.servers[server].ports
        )

    def status(self, host: HostId, operation: OperationId) -> OperationStatus | None:
        """What `host` last said of `operation`."""
        inventory = self.inventory.hosts.get(host)
        operations = inventory.operations if inventory else ()
        return next((o for o in operations if o.id == operation), None)

    def is_running(self, host: HostId, operation: OperationId) -> bool:
        status = self.status(host, operation)
        return status is not None and status.state is OperationState.RUNNING


def touches(router: RouterSpec, network: NetworkId) -> bool:
    return any(interface.network == network for interface in router.interfaces)
