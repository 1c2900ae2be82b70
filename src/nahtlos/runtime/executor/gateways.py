"""Where routers' ways out are, and which hosts have to do with each. Pure.

A way out that moves is still its source's, and its destination has the router's networks already. After a
move the former host leads out what is sent to it (`passes`) until every host has converged to the new place.
"""

from dataclasses import dataclass

from nahtlos.model.blueprint import Blueprint, GatewayPlace
from nahtlos.model.config import HostConfig, RouterConfig
from nahtlos.model.ids import HostId, RouterId
from nahtlos.model.inventory import Inventory, OperationState
from nahtlos.model.networking import RouterSpec


@dataclass(frozen=True)
class Gateways:
    blueprint: Blueprint
    inventory: Inventory
    configs: dict[HostId, HostConfig]
    """What each host was last told."""
    members: frozenset[HostId]
    """Hosts of this cloud."""

    def place(self, router: RouterSpec) -> GatewayPlace | None:
        """None without a way out. One that was never decided about is where it is asked for."""
        if router.gateway is None:
            return None
        asked = GatewayPlace(host=router.gateway.host, epoch=0)
        return self.blueprint.gateways.get(router.id, asked)

    def hosts(self, router: RouterSpec) -> frozenset[HostId]:
        """That need the router's networks because of its way out."""
        place = self.place(router)
        if place is None:
            return frozenset()
        moves = (m for m in self.blueprint.gateway_moves if m.router == router.id)
        ends = {host for move in moves for host in (move.source, move.destination)}
        return frozenset({place.host, *ends, *(h for h in self.members if self.passes(h, router))})

    def passes(self, host: HostId, router: RouterSpec) -> bool:
        """Whether `host` had the way out and some host may still send there (one out of reach counts, too) or
        it has not yet told the new place all it knows."""
        place = self.place(router)
        if place is None or place.host == host or not self._led_out(host, router.id):
            return False
        return not self.settled(host, router) or self._hands_over(host, router.id)

    def settled(self, host: HostId, router: RouterSpec) -> bool:
        """Whether every other host sends to the new place."""
        place = self.place(router)
        others = (other for other in self.members if other != host and other in self.configs)
        return place is not None and all(self._knows(other, router.id, place.epoch) for other in others)

    def _hands_over(self, host: HostId, router: RouterId) -> bool:
        seen = self.inventory.hosts.get(host)
        operations = seen.operations if seen else ()
        return any(o.router == router and o.state is OperationState.RUNNING for o in operations)

    def _led_out(self, host: HostId, router: RouterId) -> bool:
        told = self._told(host, router)
        if told is None or told.spec.gateway is None:
            return False
        return told.passing or told.spec.gateway.host == host

    def _told(self, host: HostId, router: RouterId) -> RouterConfig | None:
        config = self.configs.get(host)
        return next((r for r in config.routers if r.spec.id == router), None) if config else None

    def _knows(self, host: HostId, router: RouterId, epoch: int) -> bool:
        """Has converged to a configuration with the way out at its place. Who has no part in the router sends
        nothing there."""
        told, seen = self._told(host, router), self.inventory.hosts.get(host)
        if told is None:
            return True
        converged = seen is not None and seen.generation >= self.configs[host].generation
        return converged and told.gateway_epoch >= epoch
