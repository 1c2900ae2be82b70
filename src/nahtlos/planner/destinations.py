"""Which hosts may take a server, and which of them shall.

Hosts that are already on the campaign's release come first, so that a server is moved once. Among them
servers are spread as long as all of them fit so; else they are packed tightly, so that as few as possible
have to go to a host that is still to be emptied.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nahtlos.model.blueprint import HostPhase, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.planner.draft import Draft
from nahtlos.planner.rooms import Rooms, amount

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


def pack(draft: Draft, servers: Iterable[ServerId], hosts: Sequence[HostId]) -> Packing:
    """A place for each of `servers` on `hosts`. Tries the kindest way first and takes the first that leaves
    nobody out, else the one that leaves fewest."""
    ordered = heaviest_first(draft, servers)
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


Rank = Callable[[Rooms, HostId], float]


def _roomiest(rooms: Rooms, host: HostId) -> float:
    return -rooms.free_share(host)


def _tightest(rooms: Rooms, host: HostId) -> float:
    return rooms.free(host).memory_mib


def _pack(draft: Draft, servers: list[ServerId], way: Sequence[tuple[Sequence[HostId], Rank]]) -> Packing:
    rooms = draft.rooms.copy()
    places: dict[ServerId, HostId] = {}
    left: list[ServerId] = []
    for server in servers:
        place = next(
            (host for hosts, rank in way if (host := choose(draft, server, hosts, rooms, rank))), None
        )
        if place is None:
            left.append(server)
        else:
            places[server] = place
            rooms.take(place, draft.size(server))
    return Packing(places, left, rooms)


def choose(
    draft: Draft, server: ServerId, hosts: Sequence[HostId], rooms: Rooms, rank: Rank = _roomiest
) -> HostId | None:
    """The best of `hosts` with room for `server`. One with problems, or that failed it, comes last."""
    size = draft.size(server)
    fitting = [
        host
        for host in hosts
        if size.fits(rooms.free(host))
        and draft.can_run(server, draft.hosts[host].release)
        and draft.refused_move(server, draft.hosts[host].release) is None
        and draft.is_told(server, host)
    ]
    return min(
        fitting, key=lambda host: (_doubtful(draft, server, host), rank(rooms, host), host), default=None
    )


def _doubtful(draft: Draft, server: ServerId, host: HostId) -> bool:
    failure, seen = draft.failed_moves.get(server), draft.observed.host(host)
    failed_it = failure is not None and failure.host == host and failure.attempts >= SECOND_THOUGHTS
    return failed_it or (seen is not None and bool(seen.problems))


def no_room(draft: Draft, server: ServerId, hosts: Sequence[HostId]) -> str:
    """Why none of `hosts` takes `server`, in words, with by how much and until when."""
    needs, until = amount(draft.size(server)), _until(draft)
    able = [host for host in hosts if draft.can_run(server, draft.hosts[host].release)]
    if not hosts:
        return f"no host that could take {server} is in service{until}"
    if not able:
        machine = draft.policy.servers[server].machine
        return f"no host in service has a release with the machine type {machine} of {server}{until}"
    refused = [draft.refused_move(server, draft.hosts[host].release) for host in able]
    if all(refused):
        return f"{refused[0]}; replace it in place first: nahtlos server replace-vmm {server}"
    best = max(able, key=lambda host: (draft.rooms.free(host).memory_mib, host))
    free = amount(draft.rooms.free(best))
    if len(able) == 1:
        return f"{best} has no room for {server} (needs {needs}, {free} free){until}"
    return f"no host has room for {server} (needs {needs}; most is free on {best}: {free}){until}"


def _until(draft: Draft) -> str:
    away = draft.upgrading
    return f" until {away} returns" if away else ""
