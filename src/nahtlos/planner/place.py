"""Where new servers go, and servers that shall be no more.

A new server is placed at once, or waits with a reason. It is never placed on a host that is emptied or
switched, and where one of its name is still seen running it waits for that one's end.
"""

import msgspec

from nahtlos.model.blueprint import Blueprint, Policy, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import Assignment, ServerSpec, Size
from nahtlos.model.values import Value
from nahtlos.planner.capacity import count_rooms
from nahtlos.planner.destinations import choose, heaviest_first, open_hosts, pack, why_closed, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.reserve import (
    KEEP,
    Standing,
    why_broken,
    why_move_breaks,
    why_placing_breaks,
)
from nahtlos.planner.rooms import amount, at_least_zero
from nahtlos.planner.suitability import why_tied, why_unsuited


def forget_removed_servers(draft: Draft) -> None:
    for server in sorted(draft.servers.keys() - draft.policy.servers.keys()):
        if move := draft.moving.get(server):
            draft.wait(server, WaitKind.MOVE, f"{server} is removed once {move.id} has ended")
            continue
        del draft.servers[server]
        draft.change(f"{server} is removed")


def place_new_servers(draft: Draft) -> None:
    hosts = open_hosts(draft)
    for server in heaviest_first(draft, draft.policy.servers.keys() - draft.servers.keys()):
        if old := draft.observed.copies.get(server):
            draft.wait(
                server,
                WaitKind.HOST,
                f"{server} cannot be placed while one of its name is still seen on {old[0][0]}",
                f"if it does not go by itself, end it on {old[0][0]} or create the server by another name",
            )
        else:
            _place(draft, server, hosts)


def _place(draft: Draft, server: ServerId, hosts: list[HostId]) -> None:
    asked = draft.policy.placements.get(server) or draft.policy.pins.get(server)
    host = _spread(draft, server, hosts if asked is None else [asked] if asked in hosts else [])
    if host is None:
        refusal = _refusal(draft, server, asked, hosts)
        kind = WaitKind.HOST if refusal.lacks == Size() else WaitKind.CAPACITY
        draft.wait(server, kind, refusal.reason, refusal.remedy)
        return
    if broken := why_placing_breaks(draft, server, host):
        host = _keeping(draft, server, hosts if asked is None else [])
        if host is None:
            draft.wait(server, WaitKind.CAPACITY, f"{server} is not placed: {broken}", KEEP)
            return
    draft.servers[server] = Assignment(server=server, host=host, epoch=1)
    draft.rooms.take(host, draft.size(server))
    draft.neighbours.take(host, server)
    draft.change(f"{server} is placed on {host}")


def _spread(draft: Draft, server: ServerId, hosts: list[HostId]) -> HostId | None:
    """The roomiest host on the campaign's release, else the roomiest at all."""
    campaign = draft.open_campaign
    upgraded = [host for host in hosts if campaign and draft.hosts[host].release == campaign.to_release]
    return choose(draft, server, upgraded) or choose(draft, server, hosts)


def _keeping(draft: Draft, server: ServerId, hosts: list[HostId]) -> HostId | None:
    """The first of `hosts` that takes it and leaves the reserve whole."""
    fitting = (host for host in hosts if choose(draft, server, [host]))
    return next((host for host in fitting if not why_placing_breaks(draft, server, host)), None)


class NoRoom(Value, frozen=True, kw_only=True):
    """Why a server cannot be placed as asked."""

    host: HostId | None
    reason: str
    lacks: Size
    """By how much the host (asked for, or with most room) lacks; zero if room is not what it lacks."""
    fits_on: tuple[HostId, ...]
    remedy: str
    barred: bool = False
    """What people want (its group, a pin) keeps it from each of them, not a want of room."""


def _refusal(draft: Draft, server: ServerId, asked: HostId | None, hosts: list[HostId]) -> NoRoom:
    """Why `server` is not placed. Asked only once it is known that it is not."""
    fits = tuple(host for host in hosts if choose(draft, server, [host]))
    elsewhere = f"it would fit on {', '.join(fits)}" if fits else "free or add capacity"
    closed = why_closed(draft, asked) if asked is not None else None
    if closed is not None:
        remedy = closed.remedy or elsewhere
        reason = f"{server} cannot be placed on {asked}: {closed.reason}"
        return NoRoom(host=asked, reason=reason, lacks=Size(), fits_on=fits, remedy=remedy)
    candidates = [asked] if asked is not None else hosts
    lacks = _lack(draft, server, candidates)
    by = f"; {amount(lacks)} are missing" if lacks != Size() else ""
    nowhere = why_nowhere(draft, server, candidates)
    return NoRoom(
        host=asked,
        reason=nowhere.reason + by,
        lacks=lacks,
        fits_on=fits,
        remedy=elsewhere if fits or not nowhere.remedy else nowhere.remedy,
        barred=nowhere.barred,
    )


def _lack(draft: Draft, server: ServerId, hosts: list[HostId]) -> Size:
    able = [host for host in hosts if why_unsuited(draft, server, host, draft.neighbours) is None]
    if not able:
        return Size()
    best = max(able, key=lambda host: (draft.rooms.free(host).memory_mib, host))
    return at_least_zero(draft.size(server) - draft.rooms.free(best))


def room_for(
    policy: Policy, inventory: Inventory, blueprint: Blueprint | None, spec: ServerSpec, host: HostId | None
) -> NoRoom | None:
    """None if `spec` can be placed now on `host` (None: on any), else why not. Servers that were asked for
    but are not placed yet are counted as placed. For a server that exists: whether it can move there."""
    servers = {**policy.servers, spec.id: spec}
    draft = Draft(msgspec.structs.replace(policy, servers=servers), inventory, blueprint)
    count_rooms(draft)
    owner = draft.servers.get(spec.id)
    if owner is not None and owner.host == host:
        return None
    if tied := why_tied(draft, spec.id):
        return NoRoom(
            host=host, reason=tied.reason, lacks=Size(), fits_on=(), remedy=tied.remedy, barred=True
        )
    hosts = open_hosts(draft, without=owner.host if owner else None)
    _take_unplaced(draft, hosts, except_for=spec.id)
    allowed = hosts if host is None else [host] if host in hosts else []
    if place := choose(draft, spec.id, allowed):
        return _reserve_broken(draft, spec.id, place, allowed)
    return _refusal(draft, spec.id, host, hosts)


def _reserve_broken(draft: Draft, server: ServerId, host: HostId, allowed: list[HostId]) -> NoRoom | None:
    """Whether the reserve keeps it from `host` and, if it is new, from all others that are allowed."""
    if server in draft.servers:
        broken = why_move_breaks(draft, server, host)
    else:
        broken = why_placing_breaks(draft, server, host)
        broken = "" if broken and _keeping(draft, server, allowed) else broken
    if not broken:
        return None
    text = f"no room for {server} on {host}: {broken}"
    return NoRoom(host=host, reason=text, lacks=draft.size(server), fits_on=(), remedy=KEEP)


def _take_unplaced(draft: Draft, hosts: list[HostId], *, except_for: ServerId) -> None:
    """Servers that were asked for and are not placed yet take the room they will be given."""
    for server in heaviest_first(draft, draft.policy.servers.keys() - draft.servers.keys() - {except_for}):
        asked = draft.policy.placements.get(server) or draft.policy.pins.get(server)
        place = asked or pack(draft, [server], hosts).places.get(server)
        if place is not None:
            draft.rooms.take(place, draft.size(server))
            draft.neighbours.take(place, server)
            draft.servers[server] = Assignment(server=server, host=place, epoch=1)


class NoGrowth(Value, frozen=True, kw_only=True):
    """Why a server cannot be given what was asked for where it is."""

    host: HostId
    has: Size
    needs: Size
    """Beyond what it has."""
    free: Size
    """What its host could give it beyond what it has."""
    fits_on: tuple[HostId, ...]
    """Hosts that would take it at the size asked for."""


def room_to_grow(
    policy: Policy, inventory: Inventory, blueprint: Blueprint | None, spec: ServerSpec
) -> NoGrowth | None:
    """None if the host of the server, which is placed, can give it what `spec` asks for. What it gives back
    is no one else's before the guest has given it back."""
    draft = Draft(policy, inventory, blueprint)
    count_rooms(draft)
    owner = draft.servers[spec.id]
    others = open_hosts(draft, without=owner.host)
    _take_unplaced(draft, [owner.host, *others], except_for=spec.id)
    has = draft.size(spec.id)
    needs = at_least_zero(spec.size - has)
    free = at_least_zero(draft.rooms.free(owner.host))
    if needs.fits(free):
        return None
    grown = Draft(
        msgspec.structs.replace(policy, servers={**policy.servers, spec.id: spec}), inventory, blueprint
    )
    grown.rooms, grown.neighbours = draft.rooms, draft.neighbours
    fits = () if why_tied(draft, spec.id) else tuple(h for h in others if choose(grown, spec.id, [h]))
    return NoGrowth(host=owner.host, has=has, needs=needs, free=free, fits_on=fits)


def why_growth_breaks(
    policy: Policy, inventory: Inventory, blueprint: Blueprint | None, spec: ServerSpec
) -> str:
    """Why the reserve would not be kept once the server, which is placed, has the size asked for; empty if it
    would be."""
    if not policy.reserve:
        return ""
    grown = msgspec.structs.replace(policy, servers={**policy.servers, spec.id: spec})
    draft = Draft(grown, inventory, blueprint)
    count_rooms(draft)
    return why_broken(Standing(draft))
