"""What the executor decides from: one consistent look at the store, plus who is connected."""

from dataclasses import dataclass, field

from nahtlos.model.blueprint import Blueprint, Policy
from nahtlos.model.config import HostConfig
from nahtlos.model.ids import HostId, OperationId, PortId, ServerId
from nahtlos.model.inventory import Inventory, OperationStatus
from nahtlos.model.nouns import VolumeSpec


@dataclass(frozen=True, kw_only=True)
class World:
    policy: Policy
    inventory: Inventory
    blueprint: Blueprint
    configs: dict[HostId, HostConfig]
    """What each host was last told."""
    uplinks: dict[str, str] = field(default_factory=dict[str, str])
    """Interface of the way out of each network, at its gateway host."""
    removed_volumes: tuple[VolumeSpec, ...] = ()
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

    def status(self, host: HostId, operation: OperationId) -> OperationStatus | None:
        """What `host` last said of `operation`."""
        inventory = self.inventory.hosts.get(host)
        operations = inventory.operations if inventory else ()
        return next((o for o in operations if o.id == operation), None)
