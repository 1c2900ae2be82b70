"""What a host is to hold of routers' ways out while they move, and what it has been told of one. Pure."""

from collections.abc import Iterable
from enum import StrEnum

import msgspec

from nahtlos.model.config import HostConfig, RouterConfig
from nahtlos.model.errors import NotFound
from nahtlos.physical.agent.ledger import Journal, Role
from nahtlos.wire.gateways import GatewayAbandon, GatewayOrder, GatewayPrepare, GatewayState, GatewayTake
from nahtlos.wire.messages import Decision

ForGateway = GatewayPrepare | GatewayState | GatewayTake | GatewayAbandon


def as_decided(config: HostConfig, journals: Iterable[Journal]) -> HostConfig:
    """`config` with ways out where this host's journals, oldest first, know them to be: later than the
    configuration does. Its epoch says which of the two is later."""
    routers = {r.spec.id: r for r in config.routers}
    for journal in journals:
        order = journal.gateway
        if order is None or journal.decision is not Decision.COMMITTED:
            continue
        held = routers.get(order.id_of_router)
        if held is not None and held.spec.gateway is not None and held.gateway_epoch < order.epoch:
            routers[held.spec.id] = _moved(held, order, passing=journal.role is Role.SOURCE)
    return msgspec.structs.replace(config, routers=tuple(routers.values()))


def silent(config: HostConfig) -> HostConfig:
    """`config` with its ways out answering to nobody outside: another host may do so by now."""
    routers = (
        msgspec.structs.replace(r, passing=True)
        if r.spec.gateway is not None and r.spec.gateway.host == config.host
        else r
        for r in config.routers
    )
    return msgspec.structs.replace(config, routers=tuple(routers))


def _moved(held: RouterConfig, order: GatewayOrder, *, passing: bool) -> RouterConfig:
    """As told by the configuration, but with the way out at the destination of `order`."""
    new = order.router
    assert held.spec.gateway is not None and new.spec.gateway is not None
    gateway = msgspec.structs.replace(held.spec.gateway, host=new.spec.gateway.host)
    return msgspec.structs.replace(
        held,
        spec=msgspec.structs.replace(held.spec, gateway=gateway),
        gateway_vtep=new.gateway_vtep,
        interface=held.interface if passing else new.interface,
        floating_ips=held.floating_ips if passing else new.floating_ips,
        gateway_epoch=new.gateway_epoch,
        passing=passing,
    )


def prepared(config: HostConfig, order: GatewayOrder) -> HostConfig:
    """The destination's configuration as it will be. NotFound while it does not have the router."""
    if all(r.spec.id != order.id_of_router for r in config.routers):
        raise NotFound(f"{config.host} has not been told of {order.id_of_router} yet", field="router")
    routers = (
        _moved(r, order, passing=False) if r.spec.id == order.id_of_router and r.spec.gateway else r
        for r in config.routers
    )
    return msgspec.structs.replace(config, routers=tuple(routers))


class Told(StrEnum):
    """What the source's configuration says of a way out that it has handed over."""

    NOTHING = "nothing"
    """Some host may still send here."""
    SETTLED = "settled"
    """Every host sends to the new place."""
    GONE = "gone"
    """There is no such way out any more, or it has gone further: nobody asks for what is known here."""


def told(config: HostConfig | None, order: GatewayOrder) -> Told:
    if config is None:
        return Told.NOTHING
    router = next((r for r in config.routers if r.spec.id == order.id_of_router), None)
    if router is None or router.spec.gateway is None or router.gateway_epoch > order.epoch:
        return Told.GONE
    if router.gateway_epoch < order.epoch:
        return Told.NOTHING
    return Told.SETTLED if router.settled or not router.passing else Told.NOTHING
