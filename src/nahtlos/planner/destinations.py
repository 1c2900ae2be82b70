"""Which hosts may take a server, and which of them shall.

Hosts that are already on the campaign's release come first, so that a server is moved once. Among them
servers are spread as long as all of them fit so; else they are packed tightly, so that as few as possible
have to go to a host that is still to be emptied.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nahtlos.model.blueprint import HostPhase, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.placement import GroupPolicy
from nahtlos.planner.draft import Draft
from nahtlos.planner.groups import Neighbours
from nahtlos.planner.rooms import Rooms, amount, total
from nahtlos.planner.suitability import Bar, Unsuited, why_unsuited

SECOND_THOUGHTS = 2
"""Failed moves in a row after which another destination is preferred to the one that failed."""


class Closed(NamedTuple):
    kind: WaitKind
    reason: str
    remedy: str = ""


def why_closed(draft: Draft, host: HostId) -> Closed | None:
    """Why `host` takes no servers now; None if it does."""
    if not draft.is_compute(host):
        return Closed(WaitKind.BLOCKED, f"{host} is no compute host", "choose another host")
    plan = draft.hosts.get(host)
    if plan is None:
        return Closed(WaitKind.HOST, f"{host} has not joined yet")
    match plan.phase:
        case HostPhase.EMPTYING:
            return Closed(WaitKind.HOST, f"{host} is being emptied")
        case HostPhase.SWITCHING:
            return Closed(WaitKind.HOST, f"{host} is being switched to {plan.release} and verified")
        case HostPhase.CORDONED | HostPhase.DRAINED:
            return Closed(WaitKind.OPERATOR, f"{host} is {plan.phase}", f"activate {host}")
        case HostPhase.SERVING:
            pass
    if plan.denial is not None:
        return Closed(WaitKind.HOST, f"{host} is lost, or has just come back")
    if plan.release is None:
        return Closed(WaitKind.OPERATOR, f"{host} has no hypervisor release yet", "register a release")
    if not draft.observed.connected(host):
        return Closed(WaitKind.HOST, f"the agent of {host} is not connected")
    return None


def open_hosts(draft: Draft, *, without: HostId | None = None, as_if_connected: bool = False) -> list[HostId]:
    """Hosts that take servers now. `as_if_connected` counts those whose agent is away for the moment."""
    return [
        host
        for host, plan in sorted(draft.hosts.items())
        if plan.phase is HostPhase.SERVING
        and plan.release is not None
        and plan.denial is None
        and host != without
        and draft.is_compute(host)
        and (as_if_connected or draft.observed.connected(host))
    ]


def heaviest_first(draft: Draft, servers: Iterable[ServerId]) -> list[ServerId]:
    def weight(server: ServerId) -> tuple[int, int, str]:
        size = draft.size(server)
        return -size.memory_mib, -size.vcpus, server

    return sorted(servers, key=weight)


class Packing(NamedTuple):
    places: dict[ServerId, HostId]
    left: list[ServerId]
    rooms: Rooms
    """As they are when all of this has come to pass."""
    neighbours: Neighbours
    """As they are meanwhile, when nobody has left yet."""


def pack(draft: Draft, servers: Iterable[ServerId], hosts: Sequence[HostId]) -> Packing:
    """A place for each of `servers` on `hosts`. Tries the kindest way first and takes the first that leaves
    nobody out, else the one that leaves fewest."""
    ordered = _bundles(draft, servers)
    campaign = draft.open_campaign
    done = [host for host in hosts if campaign and draft.hosts[host].release == campaign.to_release]
    todo = [host for host in hosts if host not in set(done)]
    ways = (
        ((done, _roomiest),),
        ((done, _tightest), (todo, _roomiest)),
        ((done, _tightest), (todo, _tightest)),
    )
    tried: list[Packing] = []
    for way in ways:
        packing = _pack(draft, ordered, way)
        if not packing.left:
            return packing
        tried.append(packing)
    return min(tried, key=lambda packing: len(packing.left))


def _bundles(draft: Draft, servers: Iterable[ServerId]) -> list[tuple[ServerId, ...]]:
    """Heaviest first; those that a rule leaves fewer hosts before all others. Members of an affinity group
    that leave one host are one bundle."""
    ordered = heaviest_first(draft, servers)
    if not draft.neighbours and not draft.policy.pins:
        return [(server,) for server in ordered]
    found: dict[tuple[str, HostId | None], list[ServerId]] = {}
    for server in ordered:
        owner, together = draft.servers.get(server), draft.neighbours.policy(server) is GroupPolicy.AFFINITY
        key = draft.neighbours.group(server) if together else None
        found.setdefault((f"group {key}" if key else server, owner.host if owner else None), []).append(
            server
        )
    bundles = [tuple(bundle) for bundle in found.values()]
    return sorted(bundles, key=lambda bundle: not _is_bound(draft, bundle[0]))


def _is_bound(draft: Draft, server: ServerId) -> bool:
    return server in draft.policy.pins or draft.neighbours.is_hard(server)


Rank = Callable[[Rooms, HostId], float]


def _roomiest(rooms: Rooms, host: HostId) -> float:
    return -rooms.free_share(host)


def _tightest(rooms: Rooms, host: HostId) -> float:
    return rooms.free(host).memory_mib


def _pack(
    draft: Draft, bundles: list[tuple[ServerId, ...]], way: Sequence[tuple[Sequence[HostId], Rank]]
) -> Packing:
    rooms, neighbours = draft.rooms.copy(), draft.neighbours.copy()
    places: dict[ServerId, HostId] = {}
    left: list[ServerId] = []
    for bundle in bundles:
        place = next(
            (host for hosts, rank in way if (host := _choose(draft, bundle, hosts, rooms, neighbours, rank))),
            None,
        )
        if place is None:
            left += bundle
            continue
        for server in bundle:
            places[server] = place
            rooms.admit(place, server, draft.size(server))
            neighbours.take(place, server)
    return Packing(places, left, rooms, neighbours)


def choose(draft: Draft, server: ServerId, hosts: Sequence[HostId]) -> HostId | None:
    """The roomiest of `hosts` that take `server`. One with problems, or that failed it, comes last."""
    return _choose(draft, (server,), hosts, draft.rooms, draft.neighbours, _roomiest)


def _choose(
    draft: Draft,
    bundle: tuple[ServerId, ...],
    hosts: Sequence[HostId],
    rooms: Rooms,
    neighbours: Neighbours,
    rank: Rank,
) -> HostId | None:
    first = bundle[0]
    size = draft.size(first) if len(bundle) == 1 else total([draft.size(server) for server in bundle])
    roomy = [
        host
        for host in hosts
        if size.fits(rooms.free(host)) or all(rooms.is_aside(host, server) for server in bundle)
    ]
    # Sorted before it is asked what suits: mostly the first does, and to ask costs more than to sort.
    roomy.sort(
        key=lambda host: (
            _doubtful(draft, first, host),
            neighbours.dislike(first, host) if neighbours else 0,
            rank(rooms, host),
            host,
        )
    )
    return next((host for host in roomy if _suits(draft, bundle, host, neighbours)), None)


def _suits(draft: Draft, bundle: tuple[ServerId, ...], host: HostId, neighbours: Neighbours) -> bool:
    return all(
        why_unsuited(draft, server, host, neighbours) is None and draft.is_told(server, host)
        for server in bundle
    )


def _doubtful(draft: Draft, server: ServerId, host: HostId) -> bool:
    failure, seen = draft.failed_moves.get(server), draft.observed.host(host)
    failed_it = failure is not None and failure.host == host and failure.attempts >= SECOND_THOUGHTS
    return failed_it or (seen is not None and bool(seen.problems))


class Nowhere(NamedTuple):
    """Why no host takes a server."""

    kind: WaitKind
    reason: str
    remedy: str = ""
    barred: bool = False
    """What people want keeps it from all of them, not a want of room."""
    bar: Bar | None = None
    """What keeps it from all of them; None: room is lacking."""


def why_nowhere(draft: Draft, server: ServerId, hosts: Sequence[HostId]) -> Nowhere:
    """Why none of `hosts` takes `server`, in words, with by how much and until when."""
    until = _until(draft)
    if not hosts:
        return Nowhere(WaitKind.CAPACITY, f"no host that could take {server} is in service{until}")
    unsuited = [why_unsuited(draft, server, host, draft.neighbours) for host in hosts]
    if all(unsuited):
        return _nobody_suits(draft, server, [each for each in unsuited if each is not None])
    able = [host for host, why in zip(hosts, unsuited, strict=True) if why is None]
    companions = _companions(draft, server)
    who = f"{server} with {', '.join(companions)}" if companions else server
    needs = amount(total([draft.size(each) for each in (server, *companions)]))
    best = max(able, key=lambda host: (draft.rooms.free(host).memory_mib, host))
    free = amount(draft.rooms.free(best))
    if len(able) == 1:
        text = f"{best} has no room for {who} (needs {needs}, {free} free){until}"
    else:
        text = f"no host has room for {who} (needs {needs}; most is free on {best}: {free}){until}"
    barred = [why.reason for why in unsuited if why is not None and why.kind is Bar.GROUP]
    return Nowhere(WaitKind.CAPACITY, "; ".join((text, *barred)))


def _nobody_suits(draft: Draft, server: ServerId, found: list[Unsuited]) -> Nowhere:
    """What bars it from the host that comes nearest: bars stand in the order in which they can be lifted."""
    kind = max(each.kind for each in found)
    nearest = [each for each in found if each.kind is kind]
    reason = "; ".join(dict.fromkeys(each.reason for each in nearest))
    if kind is Bar.MACHINE and len(found) > 1:
        machine = draft.policy.servers[server].machine
        reason = (
            f"no host in service has a release with the machine type {machine} of {server}{_until(draft)}"
        )
    elif kind is Bar.GROUP:
        reason = f"no host is left for {server} by its group: {reason}{_until(draft)}"
    return Nowhere(WaitKind.CAPACITY, reason, nearest[0].remedy, barred=kind >= Bar.PIN, bar=kind)


def _companions(draft: Draft, server: ServerId) -> list[ServerId]:
    owner = draft.servers.get(server)
    return draft.neighbours.companions(server, owner.host) if owner is not None else []


def _until(draft: Draft) -> str:
    away = draft.upgrading
    return f" until {away} returns" if away else ""
