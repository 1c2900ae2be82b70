"""The reserve: capacity is kept so that the servers of any k hosts that fail can be started on the others.

Hosts that take servers could start them, but for those given up as lost. A server that moves has a place at
its destination. Pinned servers could be started nowhere else, so nothing is kept for them.

Whether it is kept is first asked of counts, which are cheap and never say so wrongly: with slots of the size
of the largest server, whichever k hosts are lost. If they do not suffice, all sets of k hosts are
tried; of too many sets the counts decide.
"""

from collections.abc import Iterable, Mapping, Sequence
from heapq import nlargest
from itertools import combinations
from math import comb

from nahtlos.model.blueprint import HostPhase
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.nouns import Size
from nahtlos.model.placement import GroupPolicy, ReserveReport
from nahtlos.planner.draft import Draft
from nahtlos.planner.rooms import Rooms, amount, at_least_zero, total

MOST_TRIED = 400_000
"""Pairs of a server and a host that are looked at when sets of hosts are tried."""

KEEP = "add or activate a host, delete servers, or keep less in reserve: nahtlos reserve N"

Unit = Sequence[ServerId]
"""Servers that are started on one host: one, or those of an affinity group that are on one that fails."""


class Standing:
    """Who is where, and who could take them: as the draft stands, or as it would after something."""

    def __init__(
        self,
        draft: Draft,
        *,
        rooms: Rooms | None = None,
        moved: Mapping[ServerId, HostId] | None = None,
        without: HostId | None = None,
    ) -> None:
        """`moved`: servers that are elsewhere by then, their room taken in `rooms`; `without`: a host that
        takes no servers by then."""
        self.draft = draft
        self.rooms = rooms or draft.rooms
        self.takers = [
            host
            for host, plan in sorted(draft.hosts.items())
            if plan.phase is HostPhase.SERVING
            and plan.release is not None
            and not plan.fenced
            and host != without
            and host not in draft.policy.given_up
            and draft.is_compute(host)
        ]
        moved = moved or {}
        places = {server: owner.host for server, owner in draft.servers.items()} | dict(moved)
        self.places = {s: h for s, h in places.items() if s not in draft.policy.pins and s not in draft.off}
        self.refuge = {
            server: move.destination
            for server, move in draft.moving.items()
            if not move.in_place and server not in moved
        }
        self.held: dict[HostId, list[ServerId]] = {}
        for server, host in self.places.items():
            self.held.setdefault(host, []).append(server)

    def units(self, host: HostId) -> list[Unit]:
        """Of the servers that would have to be started elsewhere if `host` failed."""
        servers = self.held.get(host, [])
        if not self.draft.neighbours:
            return [(server,) for server in servers]
        found: dict[str, list[ServerId]] = {}
        for server in servers:
            together = self.draft.neighbours.policy(server) is GroupPolicy.AFFINITY
            found.setdefault(
                f"group {self.draft.neighbours.group(server)}" if together else server, []
            ).append(server)
        return [tuple(unit) for unit in found.values()]

    def size(self, unit: Unit) -> Size:
        return total([self.draft.size(server) for server in unit])

    def suits(self, unit: Unit, host: HostId, placed: Mapping[ServerId, HostId]) -> bool:
        """Whether `host` could start them, `placed` being started already, room left out."""
        if not all(self.draft.can_run(server, self.draft.hosts[host].release) for server in unit):
            return False
        first, neighbours = unit[0], self.draft.neighbours
        if not neighbours or neighbours.policy(first) is not GroupPolicy.ANTI_AFFINITY:
            return True
        group = neighbours.group(first)
        others = (s for s in self.draft.policy.members if s != first and neighbours.group(s) == group)
        return all((placed.get(other) or self.places.get(other)) != host for other in others)


def uncovered(standing: Standing, k: int) -> tuple[tuple[HostId, ...], Unit] | None:
    """Hosts that may not fail together, and servers of theirs that could not start; None if any k may."""
    hosts = sorted({*standing.takers, *standing.held})
    if k <= 0 or not standing.held:
        return None
    if k >= len(hosts):
        return tuple(hosts), ()
    if _counts_suffice(standing, hosts, k):
        return None
    work = comb(len(hosts), k) * max(1, k * len(standing.places) * len(standing.takers) // len(hosts))
    if work > MOST_TRIED:
        worst = tuple(sorted(nlargest(k, hosts, key=lambda h: (len(standing.held.get(h, ())), h))))
        return worst, sorted(s for host in worst for s in standing.held.get(host, ()))
    for lost in combinations(hosts, k):
        if left := _left(standing, lost):
            return lost, left
    return None


def _counts_suffice(standing: Standing, hosts: Sequence[HostId], k: int) -> bool:
    """Never wrongly: every server takes a slot of the largest one's size. Those that not every host would
    start come first; each of them spoils one host for the others of them."""
    units = {host: standing.units(host) for host in hosts}
    sizes = [standing.draft.size(server) for here in standing.held.values() for server in here]
    memory, vcpus = max(s.memory_mib for s in sizes), max(s.vcpus for s in sizes)
    slots = dict.fromkeys(hosts, 0)
    for host in standing.takers:
        free = at_least_zero(standing.rooms.free(host))
        slots[host] = min(free.memory_mib // max(memory, 1), free.vcpus // max(vcpus, 1))
    burden = nlargest(k, (slots[host] + len(standing.held.get(host, ())) for host in hosts))
    if sum(slots.values()) < sum(burden):
        return False
    bound = {host: [unit for unit in here if _is_bound(standing, unit)] for host, here in units.items()}
    most = sum(nlargest(k, (len(here) for here in bound.values())))
    return all(
        sum(slots[h] >= len(unit) and standing.suits(unit, h, {}) for h in standing.takers) >= k + most
        for here in bound.values()
        for unit in here
    )


def _is_bound(standing: Standing, unit: Unit) -> bool:
    draft = standing.draft
    if len(unit) > 1 or draft.neighbours.is_hard(unit[0]):
        return True
    releases = {draft.hosts[host].release for host in standing.takers}
    return not all(draft.can_run(unit[0], release) for release in releases)


def _left(standing: Standing, lost: Sequence[HostId]) -> Unit:
    """Servers of hosts that fail together for which no place is found: the bound first, then the largest,
    each where it fits most tightly."""
    free = {host: standing.rooms.free(host) for host in standing.takers if host not in lost}
    placed: dict[ServerId, HostId] = {s: h for s, h in standing.refuge.items() if h not in lost}
    units = [u for host in lost for u in standing.units(host) if any(s not in placed for s in u)]
    for unit in sorted(units, key=lambda unit: _difficulty(standing, unit)):
        needs = standing.size(tuple(server for server in unit if server not in placed))
        fitting = [
            host for host, room in free.items() if needs.fits(room) and standing.suits(unit, host, placed)
        ]
        if not fitting:
            return unit
        place = min(fitting, key=lambda host: (free[host].memory_mib, host))
        free[place] -= needs
        placed |= dict.fromkeys(unit, place)
    return ()


def _difficulty(standing: Standing, unit: Unit) -> tuple[bool, int, int, ServerId]:
    size = standing.size(unit)
    return not _is_bound(standing, unit), -size.memory_mib, -size.vcpus, unit[0]


# --- what is asked of it -------------------------------------------------------------------------------


def why_broken(standing: Standing) -> str:
    """Why the reserve that is asked for would not be kept, with figures; empty if it would."""
    k = standing.draft.policy.reserve
    found = uncovered(standing, k)
    return "" if found is None else in_words(_report(standing, k, *found))


def in_words(report: ReserveReport) -> str:
    if report.kept:
        return ""
    lost = " and ".join(report.lost)
    if report.hosts >= report.of:
        return f"a reserve of {report.hosts} needs more than {report.of} hosts in service"
    return (
        f"the reserve of {report.hosts} would be broken: if {lost} failed, {', '.join(report.left)} "
        f"could not be started elsewhere (needs {amount(report.needs)}; "
        f"{amount(report.free)} free on all others together)"
    )


def why_move_breaks(draft: Draft, server: ServerId, destination: HostId) -> str:
    """Why the move would break the reserve, if it is kept now; empty if it would not. Not asked of the rest
    of an affinity group: room for it was set aside when the first of it left."""
    if not draft.policy.reserve or draft.rooms.is_aside(destination, server):
        return ""
    rooms = draft.rooms.copy()
    for each in _gathering(draft, server):
        rooms.admit(destination, each, draft.size(each))
    after = Standing(draft, rooms=rooms)
    after.refuge[server] = destination
    broken = why_broken(after)
    return broken if broken and not why_broken(Standing(draft)) else ""


def _gathering(draft: Draft, server: ServerId) -> list[ServerId]:
    """It, and those of its affinity group that will have to follow."""
    owner = draft.servers[server]
    return [server, *draft.neighbours.companions(server, owner.host)]


def why_placing_breaks(draft: Draft, server: ServerId, host: HostId) -> str:
    """Why the reserve would not be kept with the new `server` on `host`; empty if it would."""
    if not draft.policy.reserve:
        return ""
    rooms = draft.rooms.copy()
    rooms.take(host, draft.size(server))
    return why_broken(Standing(draft, rooms=rooms, moved={server: host}))


def reserve_report(standing: Standing, k: int) -> ReserveReport:
    found = uncovered(standing, k)
    if found is None:
        hosts = len({*standing.takers, *standing.held})
        free = total([at_least_zero(standing.rooms.free(host)) for host in standing.takers])
        return ReserveReport(hosts=k, of=hosts, kept=True, free=free, pinned=_pinned(standing))
    return _report(standing, k, *found)


def _report(standing: Standing, k: int, lost: tuple[HostId, ...], left: Unit) -> ReserveReport:
    others = [host for host in standing.takers if host not in lost]
    needs: Iterable[ServerId] = (s for host in lost for s in standing.held.get(host, ()))
    return ReserveReport(
        hosts=k,
        of=len({*standing.takers, *standing.held}),
        kept=False,
        lost=lost,
        left=tuple(left),
        needs=total([standing.draft.size(server) for server in needs]),
        free=total([at_least_zero(standing.rooms.free(host)) for host in others]),
        pinned=_pinned(standing),
    )


def _pinned(standing: Standing) -> tuple[ServerId, ...]:
    return tuple(sorted(standing.draft.policy.pins.keys() & standing.draft.servers.keys()))
