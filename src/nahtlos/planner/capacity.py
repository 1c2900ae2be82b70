"""What hosts could take, against what customers were promised.

What could be placed now = what is placed + the free room of hosts that take servers now. A server that
moves holds room at both ends, so a move never makes a promise look better than it is. A server that grows
holds what it was promised at once; one that shrinks, what its guest has not given back yet.
"""

from nahtlos.model.blueprint import CapacityReport
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import RunState, ServerStatus
from nahtlos.model.nouns import Size
from nahtlos.planner.destinations import open_hosts, pack
from nahtlos.planner.draft import Draft
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
    return None


def _cannot_leave(draft: Draft, left: list[ServerId], others: list[HostId]) -> str:
    most = max(others, key=lambda host: (draft.rooms.free(host).memory_mib, host), default=None)
    where = (
        f"most is free on {most}: {amount(draft.rooms.free(most))}" if most else "no other host is in service"
    )
    needs = amount(total([draft.size(server) for server in left]))
    return f"{', '.join(left)} would fit nowhere else (needs {needs}; {where})"
