"""What hosts could take, against what customers were promised.

What could be placed now = what is placed + the free room of hosts that take servers now. A server that
moves holds room at both ends, so a move never makes a promise look better than it is. A server that grows
holds what it was promised at once; one that shrinks, what its guest has not given back yet.
"""

from nahtlos.model.blueprint import Blueprint, CapacityReport, Policy
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import Inventory, RunState, ServerStatus
from nahtlos.model.nouns import Size
from nahtlos.model.placement import GroupPolicy, ReserveReport
from nahtlos.planner.destinations import Packing, open_hosts, pack, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.groups import Neighbours
from nahtlos.planner.reserve import Standing, reserve_report, why_broken
from nahtlos.planner.rooms import Rooms, amount, at_least_zero, total

NO_PROCESS = (RunState.CRASHED, RunState.STOPPED, RunState.SUSPENDED)


def count_rooms(draft: Draft) -> None:
    """Room of every host as the draft stands: owned servers, reservations, and VMMs that should be gone."""
    rooms = Rooms({host: seen.capacity for host, seen in draft.observed.inventory.hosts.items()})
    for server, assignment in draft.servers.items():
        rooms.take(assignment.host, draft.size(server))
    for move in draft.moves.values():
        if not move.in_place:
            rooms.take(move.destination, draft.size(move.server))
    for host, status in leftovers(draft):
        rooms.take(host, status.size)
    draft.rooms = rooms
    draft.neighbours = _neighbours(draft)
    draft.set_aside_for_groups()


def _neighbours(draft: Draft) -> Neighbours:
    policy = draft.policy
    neighbours = Neighbours(policy.server_groups, policy.members, draft.serves)
    for server in policy.members.keys() - draft.off.keys():
        if owner := draft.servers.get(server):
            neighbours.take(owner.host, server)
        if (move := draft.moving.get(server)) and not move.in_place:
            neighbours.take(move.destination, server, moving=True)
    for host, status in leftovers(draft) if neighbours else ():
        if neighbours.policy(status.id) is GroupPolicy.ANTI_AFFINITY:
            neighbours.take(host, status.id)
    return neighbours


def leftovers(draft: Draft) -> list[tuple[HostId, ServerStatus]]:
    """VMMs seen on a host that neither owns their server nor is to receive it."""
    return [
        (host, status)
        for server, copies in draft.observed.copies.items()
        for host, status in copies
        if status.state not in NO_PROCESS and not _belongs(draft, server, host)
    ]


def _belongs(draft: Draft, server: ServerId, host: HostId) -> bool:
    owner, move = draft.servers.get(server), draft.moving.get(server)
    return (owner is not None and owner.host == host) or (move is not None and move.destination == host)


def capacity_report(draft: Draft) -> CapacityReport:
    hosts = open_hosts(draft)
    return CapacityReport(
        promised=draft.policy.promised,
        in_service=total([draft.rooms.capacity(host) for host in hosts]),
        share=share(draft.policy.promised, _placeable(draft, hosts, draft.rooms)),
        reserve=reserve_report(Standing(draft), draft.policy.reserve) if draft.policy.reserve else None,
    )


def share(promised: Size, placeable: Size) -> float:
    """By the scarcer of vCPU and memory, at most 1.0."""
    pairs = ((promised.vcpus, placeable.vcpus), (promised.memory_mib, placeable.memory_mib))
    return min((have / want for want, have in pairs if want > have), default=1.0)


def _placeable(draft: Draft, hosts: list[HostId], rooms: Rooms) -> Size:
    placed = total([draft.size(server) for server in draft.servers])
    return placed + total([at_least_zero(rooms.free(host)) for host in hosts])


def shortage_without(
    draft: Draft, host: HostId, servers: list[ServerId], *, as_if_connected: bool = False
) -> str | None:
    """What would be missing, and by how much, if `host` gave away `servers` and took none; None if nothing:
    every one of them fits elsewhere, and what was promised stays placeable."""
    others = open_hosts(draft, without=host, as_if_connected=as_if_connected)
    packing = pack(draft, servers, others)
    if packing.left:
        return _cannot_leave(draft, packing.left, others)
    lacking = at_least_zero(draft.policy.promised - _placeable(draft, others, packing.rooms))
    if lacking != Size():
        return f"{amount(lacking)} of the {amount(draft.policy.promised)} promised could not be placed"
    return _reserve_broken_without(draft, host, packing)


def _reserve_broken_without(draft: Draft, host: HostId, packing: Packing) -> str | None:
    """With `host` out of service and its servers where they go. Every step on the way there asks for less."""
    if not draft.policy.reserve:
        return None
    after = Standing(draft, rooms=packing.rooms, moved=packing.places, without=host)
    return why_broken(after) or None


def _cannot_leave(draft: Draft, left: list[ServerId], others: list[HostId]) -> str:
    nowhere = [(server, why_nowhere(draft, server, others)) for server in left]
    if barred := [f"{server} cannot leave it: {why.reason}" for server, why in nowhere if why.barred]:
        return "; ".join(barred)
    most = max(others, key=lambda host: (draft.rooms.free(host).memory_mib, host), default=None)
    where = (
        f"most is free on {most}: {amount(draft.rooms.free(most))}" if most else "no other host is in service"
    )
    needs = amount(total([draft.size(server) for server in left]))
    return f"{', '.join(left)} would fit nowhere else (needs {needs}; {where})"


def why_withdrawal_breaks(
    policy: Policy, inventory: Inventory, blueprint: Blueprint | None, host: HostId, *, emptied: bool
) -> str:
    """Why the reserve, if it is kept now, would not be with `host` out of service, its servers staying or
    moved away; empty if it would be."""
    if not policy.reserve:
        return ""
    draft = Draft(policy, inventory, blueprint)
    count_rooms(draft)
    if why_broken(Standing(draft)):
        return ""
    if not emptied:
        return why_broken(Standing(draft, without=host))
    staying = [s for s in draft.by_host().get(host, ()) if s not in draft.moving]
    packing = pack(draft, staying, open_hosts(draft, without=host))
    return _reserve_broken_without(draft, host, packing) or ""


def reserve_of(
    policy: Policy, inventory: Inventory, blueprint: Blueprint | None, hosts: int
) -> ReserveReport:
    """Whether a reserve of `hosts` is kept now."""
    draft = Draft(policy, inventory, blueprint)
    count_rooms(draft)
    return reserve_report(Standing(draft), hosts)
