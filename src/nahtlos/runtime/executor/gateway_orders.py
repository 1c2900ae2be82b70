"""What the two agents of a way out that moves are told. Pure."""

from collections.abc import Iterable

import msgspec

from nahtlos.model.blueprint import PlannedGatewayMove
from nahtlos.model.config import RouterConfig
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import OperationState
from nahtlos.model.nouns import HostSpec
from nahtlos.runtime.executor.networks import floating_ips
from nahtlos.runtime.executor.world import World
from nahtlos.wire.gateways import BeginGateway, GatewayOrder
from nahtlos.wire.volumes import PeerAddress


def begin_gateways(world: World, host: HostId) -> Iterable[BeginGateway]:
    """At its destination first, and at its source once the destination says that it knows it."""
    for move in world.blueprint.gateway_moves:
        if host not in (move.source, move.destination) or move.id in world.refused | world.held_back:
            continue
        if world.status(host, move.id) is not None:
            continue
        if host == move.source and not _waits_at_destination(world, move):
            continue
        order = gateway_order(world, move)
        if order is not None:
            yield BeginGateway(order=order)


def _waits_at_destination(world: World, move: PlannedGatewayMove) -> bool:
    status = world.status(move.destination, move.id)
    return status is not None and status.state is OperationState.RUNNING


def gateway_order(world: World, move: PlannedGatewayMove) -> GatewayOrder | None:
    """None if the way out or one of the hosts is gone: such a move is never begun."""
    spec, hosts = world.topology.routers.get(move.router), world.policy.hosts
    source, destination = hosts.get(move.source), hosts.get(move.destination)
    if spec is None or spec.gateway is None or source is None or destination is None:
        return None
    gateway = msgspec.structs.replace(spec.gateway, host=move.destination)
    router = RouterConfig(
        spec=msgspec.structs.replace(spec, gateway=gateway),
        gateway_vtep=destination.address,
        interface=world.topology.external_interface(move.destination),
        floating_ips=floating_ips(world, spec),
        gateway_epoch=move.epoch,
    )
    return GatewayOrder(id=move.id, router=router, source=_address(source), destination=_address(destination))


def _address(spec: HostSpec) -> PeerAddress:
    return PeerAddress(host=spec.id, address=spec.address, peer_port=spec.peer_port)
