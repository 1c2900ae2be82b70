"""What keeps servers from leaving a host by a move, listed beforehand, each with a remedy. Says; decides
nothing.

The order is that in which they are asked of one server: its pin, its group, the table of version pairs, the
host's processors and releases, room, its blackout budget, the reserve, its state. The first is named.
"""

from collections.abc import Sequence

import msgspec

from nahtlos.model.blueprint import (
    Blueprint,
    Campaign,
    DrainForecast,
    DrainMove,
    HostIntent,
    Obstacle,
    ObstacleKind,
    Policy,
    Strategy,
)
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import Inventory
from nahtlos.model.version_pairs import PLUGGED_MEMORY, Verdict, Way
from nahtlos.planner.capacity import count_rooms, why_withdrawal_breaks
from nahtlos.planner.destinations import Packing, open_hosts, pack, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.moves import why_not_ready
from nahtlos.planner.reserve import KEEP
from nahtlos.planner.suitability import Bar
from nahtlos.planner.ways import can_stay, deferred, means_of_move, predicted, row_for, why_over_budget

KINDS = {
    Bar.MACHINE: ObstacleKind.MACHINE,
    Bar.CPU: ObstacleKind.MACHINE,
    Bar.PAIR: ObstacleKind.VERSION_PAIR,
    Bar.WAY_BACK: ObstacleKind.WAY_BACK,
    Bar.PIN: ObstacleKind.PIN,
    Bar.GROUP: ObstacleKind.GROUP,
}


def of_campaign(draft: Draft, campaign: Campaign, hosts: Sequence[HostId]) -> tuple[Obstacle, ...]:
    """As the cloud stands now, for each of `hosts`."""
    owned = draft.by_host()
    if campaign.strategy is Strategy.IN_PLACE:
        staying = [(host, server) for host in hosts for server in sorted(owned.get(host, ()))]
        found = [_in_place(draft, campaign, host, server) for host, server in staying]
    else:
        found = [
            obstacle
            for host in hosts
            for obstacle in _of_host(
                draft, host, owned.get(host, []), pack(draft, owned.get(host, []), _others(draft, host))
            )
        ]
    named = [_with_way_out(draft, campaign, obstacle) for obstacle in found if obstacle is not None]
    return tuple(named)


def _others(draft: Draft, host: HostId) -> list[HostId]:
    return open_hosts(draft, without=host, as_if_connected=True)


def _with_way_out(draft: Draft, campaign: Campaign, obstacle: Obstacle) -> Obstacle:
    """Under `auto` it is taken over where it is, if that can be."""
    if campaign.strategy is Strategy.AUTO and can_stay(draft, obstacle.server, campaign.to_release):
        return msgspec.structs.replace(obstacle, instead="it is taken over in place")
    return obstacle


def _in_place(draft: Draft, campaign: Campaign, host: HostId, server: ServerId) -> Obstacle | None:
    """By the strategy `in-place`, what keeps it from being taken over."""
    release = campaign.to_release
    if can_stay(draft, server, release):
        return None
    row = row_for(draft, server, Way.IN_PLACE, release)
    other_way = f"move it: nahtlos server move {server}, or choose --strategy auto"
    if row is None:
        text = f"it is not known yet what {server} runs under"
        return _obstacle(server, host, ObstacleKind.STATE, text, "try again in a moment")
    if row.verdict is Verdict.REFUSED:
        return _obstacle(server, host, ObstacleKind.VERSION_PAIR, str(row), other_way)
    waiting = deferred(server, f"{release} does not suit it")
    return _obstacle(server, host, ObstacleKind.BUDGET, waiting.reason, waiting.remedy)


def _of_host(draft: Draft, host: HostId, servers: Sequence[ServerId], packing: Packing) -> list[Obstacle]:
    found = (
        _of_server(draft, host, server, packing) for server in sorted(servers) if server not in draft.moving
    )
    return [obstacle for obstacle in found if obstacle is not None]


def _of_server(draft: Draft, host: HostId, server: ServerId, packing: Packing) -> Obstacle | None:
    destination = packing.places.get(server)
    if destination is None:
        nowhere = why_nowhere(draft, server, _others(draft, host))
        kind = KINDS[nowhere.bar] if nowhere.bar is not None else ObstacleKind.ROOM
        if kind is ObstacleKind.VERSION_PAIR and PLUGGED_MEMORY.why in nowhere.reason:
            kind = ObstacleKind.PLUGGED_MEMORY
        remedy = nowhere.remedy or "add a host, activate one that is cordoned or drained, or delete servers"
        return _obstacle(server, host, kind, nowhere.reason, remedy)
    means = means_of_move(draft, server)
    if over := why_over_budget(draft, server, means, draft.hosts[destination].release):
        waiting = deferred(server, over)
        return _obstacle(server, host, ObstacleKind.BUDGET, over, waiting.remedy)
    if waiting := why_not_ready(draft, server):
        return _obstacle(
            server, host, ObstacleKind.STATE, waiting.reason, waiting.remedy or "wait until it runs"
        )
    return None


def _obstacle(server: ServerId, host: HostId, kind: ObstacleKind, reason: str, remedy: str) -> Obstacle:
    return Obstacle(server=server, host=host, kind=kind, reason=reason, remedy=remedy)


# --- a drain ---------------------------------------------------------------------------------------------


def drain_forecast(
    policy: Policy, inventory: Inventory, blueprint: Blueprint | None, host: HostId
) -> DrainForecast:
    """Where the servers of `host` would go if it were drained now, and what keeps others there."""
    broken = why_withdrawal_breaks(policy, inventory, blueprint, host, emptied=True)
    intents = {**policy.intents, host: HostIntent.DRAINED}
    draft = Draft(msgspec.structs.replace(policy, intents=intents), inventory, blueprint)
    count_rooms(draft)
    servers = [server for server in draft.by_host().get(host, ()) if server not in draft.moving]
    packing = pack(draft, servers, _others(draft, host))
    obstacles = _of_host(draft, host, servers, packing)
    held = {obstacle.server for obstacle in obstacles}
    return DrainForecast(
        host=host,
        moves=tuple(
            _move(draft, server, packing.places[server])
            for server in sorted(servers)
            if server in packing.places and server not in held
        ),
        obstacles=tuple(obstacles),
        reserve=broken,
        remedy=KEEP if broken else "",
    )


def _move(draft: Draft, server: ServerId, destination: HostId) -> DrainMove:
    said = predicted(draft, server, means_of_move(draft, server), draft.hosts[destination].release)
    return DrainMove(server=server, destination=destination, seconds=said.seconds, gap_ms=said.blackout_ms)
