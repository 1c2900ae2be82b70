"""What each connected agent is to be told now. Pure: the world in, orders out.

Nothing here remembers what was said before; saying it again is harmless, and who sends (`act`) leaves out
what an agent has accepted on this connection. A move is begun at its destination first, and at its source
once the destination says that it knows it.
"""

from collections.abc import Iterable

from nahtlos.model.blueprint import Blueprint, PlannedMove
from nahtlos.model.config import HostConfig, UnderlayShares
from nahtlos.model.ids import HostId, OperationId
from nahtlos.model.inventory import OperationState
from nahtlos.model.topology import MoveCompression, Underlay
from nahtlos.model.values import Value
from nahtlos.runtime.executor.configs import next_config, server_config
from nahtlos.runtime.executor.gateway_orders import begin_gateways
from nahtlos.runtime.executor.volume_orders import begin_volume_tasks, cancellations, speeds
from nahtlos.runtime.executor.world import World
from nahtlos.wire.gateways import BeginGateway
from nahtlos.wire.messages import BeginMove, BeginReplace, BeginVerify, MoveOrder, ReplaceOrder
from nahtlos.wire.volumes import BeginVolumeTask, SetCopySpeed

UNLIMITED = 4 << 30
"""Bytes per second."""
COMPRESSED_BELOW = 200 << 20
"""Bytes a second of the underlay: docs/decisions/0027."""
OVER = (OperationState.DONE, OperationState.UNDONE)


Begin = BeginMove | BeginReplace | BeginVerify | BeginGateway | BeginVolumeTask


class HostOrders(Value, frozen=True, kw_only=True):
    """In this order: the configuration, what to begin, what to give up, how fast to copy, what may be
    forgotten."""

    config: HostConfig
    begin: tuple[Begin, ...] = ()
    cancel: tuple[OperationId, ...] = ()
    speeds: tuple[SetCopySpeed, ...] = ()
    acknowledge: tuple[OperationId, ...] = ()


class Orders(Value, frozen=True, kw_only=True):
    hosts: dict[HostId, HostOrders]
    """For every host, connected or not: a configuration is numbered and stored before anyone is told."""
    new_configs: tuple[HostConfig, ...]
    """Those that differ from what is stored."""


def decide(world: World) -> Orders:
    configs = {host: next_config(world, host) for host in sorted(world.policy.hosts)}
    orders = {
        host: HostOrders(
            config=config,
            begin=_begins(world, host),
            cancel=(*cancellations(world, host), *_sourceless(world, host)),
            speeds=speeds(world, host),
            acknowledge=_acknowledgements(world, host),
        )
        for host, config in configs.items()
    }
    changed = tuple(config for host, config in configs.items() if config is not world.configs.get(host))
    return Orders(hosts=orders, new_configs=changed)


def _begins(world: World, host: HostId) -> tuple[Begin, ...]:
    moves = (order for move in world.blueprint.moves if (order := _begin_move(world, move, host)))
    verifies = _begin_verifies(world, host)
    return (*moves, *verifies, *begin_gateways(world, host), *begin_volume_tasks(world, host))


def _sourceless(world: World, host: HostId) -> tuple[OperationId, ...]:
    """Moves to `host` whose source is fenced: nobody has to wait until it has been silent for long."""
    return tuple(
        move.id
        for move in world.blueprint.moves
        if move.destination == host
        and not move.in_place
        and (source := world.blueprint.hosts.get(move.source)) is not None
        and source.fenced
        and world.is_running(host, move.id)
    )


def _begin_move(world: World, move: PlannedMove, host: HostId) -> BeginMove | BeginReplace | None:
    if host not in (move.source, move.destination) or move.id in world.refused | world.held_back:
        return None
    if world.status(host, move.id) is not None:
        return None
    if move.in_place:
        replacement = replace_order(world, move)
        return None if replacement is None else BeginReplace(order=replacement)
    if host == move.source and not _waits_at_destination(world, move):
        return None
    order = move_order(world, move)
    return None if order is None else BeginMove(order=order)


def _waits_at_destination(world: World, move: PlannedMove) -> bool:
    status = world.status(move.destination, move.id)
    return status is not None and status.state is OperationState.RUNNING


def move_order(world: World, move: PlannedMove) -> MoveOrder | None:
    """None if the server or one of the hosts is gone: such a move is never begun."""
    hosts = world.policy.hosts
    source, destination = hosts.get(move.source), hosts.get(move.destination)
    if move.server not in world.policy.servers or source is None or destination is None:
        return None
    server = server_config(world, move.server, move.epoch - 1)
    if server is None:
        return None
    share, whole = move_bandwidth(world.topology.underlay.shares)
    return MoveOrder(
        id=move.id,
        server=server,
        ports=world.port_configs(move.server, move.source),
        source=move.source,
        destination=move.destination,
        source_address=source.address,
        destination_address=destination.address,
        destination_peer_port=destination.peer_port,
        bandwidth=share,
        boost=whole,
        channels=world.topology.underlay.move_channels,
        compressed=is_compressed(world.topology.underlay, share),
        slow_down=move.slow_down,
        post_copy=move.post_copy,
    )


def move_bandwidth(shares: UnderlayShares | None) -> tuple[int, int]:
    """Bytes a second a move takes, and may take if it would not end otherwise: the share of moves, which is
    theirs whatever others send; then what others leave, too."""
    if shares is None:
        return UNLIMITED, 0
    whole = max(1, shares.bits_per_second // 8)
    total = max(100, shares.control + shares.moves + shares.tenants)
    return max(1, whole * shares.moves // total), whole


def is_compressed(underlay: Underlay, share: int) -> bool:
    """`share`: bytes a second a move takes."""
    by_itself = underlay.shares is not None and share < COMPRESSED_BELOW
    asked = underlay.move_compression
    return asked is MoveCompression.ALWAYS or (asked is MoveCompression.AUTO and by_itself)


def replace_order(world: World, move: PlannedMove) -> ReplaceOrder | None:
    """None if the server is gone: it is never begun."""
    if move.server not in world.policy.servers or move.release is None:
        return None
    server = server_config(world, move.server, move.epoch - 1)
    if server is None:
        return None
    return ReplaceOrder(
        id=move.id,
        host=move.source,
        server=server,
        ports=world.port_configs(move.server, move.source),
        release=move.release,
    )


def can_begin(world: World, move: PlannedMove) -> bool:
    """What it is about exists."""
    return (replace_order(world, move) if move.in_place else move_order(world, move)) is not None


def _begin_verifies(world: World, host: HostId) -> Iterable[BeginVerify]:
    for verify in world.blueprint.verifies:
        unknown = world.status(host, verify.id) is None and verify.id not in world.refused
        if verify.host == host and unknown:
            yield BeginVerify(id=verify.id, release=verify.release)


def operations_of(blueprint: Blueprint) -> set[OperationId]:
    moves = (*blueprint.moves, *blueprint.gateway_moves)
    return {o.id for o in (*moves, *blueprint.verifies, *blueprint.volume_tasks)}


def _acknowledgements(world: World, host: HostId) -> tuple[OperationId, ...]:
    """Ended operations that no blueprint waits for and whose end is recorded."""
    inventory = world.inventory.hosts.get(host)
    current = operations_of(world.blueprint)
    return tuple(
        o.id
        for o in (inventory.operations if inventory else ())
        if o.state in OVER and o.id not in current and o.id in world.ended
    )
