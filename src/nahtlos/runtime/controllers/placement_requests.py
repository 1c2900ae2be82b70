"""Whether what is asked for of groups and pins can be granted, and how groups look. Pure; every refusal names
the field and the remedy."""

import msgspec
from msgspec import UNSET

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, ProjectId, ServerGroupId, ServerId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import HostRole
from nahtlos.model.placement import MoveLimits, ReserveReport, ServerGroup
from nahtlos.planner.capacity import reserve_of, why_withdrawal_breaks
from nahtlos.planner.groups import broken
from nahtlos.planner.reserve import KEEP, in_words
from nahtlos.runtime.controllers.network_requests import checked_project
from nahtlos.runtime.controllers.placement import (
    MoveLimitsChange,
    ServerGroupRequest,
    ServerGroupView,
)
from nahtlos.runtime.controllers.requests import compute_host, listed
from nahtlos.runtime.controllers.state import State

MOST_MOVES = 64


def known_group(state: State, group: ServerGroupId, field: str = "group") -> ServerGroup:
    if group not in state.server_groups:
        raise NotFound(
            f"no server group '{group}'", field=field, remedy=f"server groups: {listed(state.server_groups)}"
        )
    return state.server_groups[group]


def new_group(state: State, request: ServerGroupRequest) -> ServerGroup:
    name = ServerGroupId(checked_name(request.name, "name"))
    if name in state.server_groups:
        raise Conflict(f"a server group '{name}' exists", field="name", remedy="choose another name")
    return ServerGroup(id=name, project=checked_project(request.project), policy=request.policy)


def check_deletable(state: State, group: ServerGroupId) -> None:
    known_group(state, group)
    if members := [server for server, row in state.servers.items() if row.group == group]:
        raise Conflict(
            f"{listed(members)} {'is' if len(members) == 1 else 'are'} in {group}",
            field="group",
            remedy="delete these servers first: a server is in its group for as long as it exists",
        )


def check_group(state: State, group: ServerGroupId | None, project: ProjectId) -> None:
    """Whether a server of `project` can be created in it."""
    if group is None:
        return
    owner = known_group(state, group).project
    if owner != project:
        raise Refused(
            f"{group} is a group of project {owner}",
            field="group",
            remedy=f"name a group of {project}: nahtlos server-group create NAME --project {project}",
        )


def place_asked(state: State, host: HostId | None, pin: HostId | None) -> HostId | None:
    """The host a new server is to be started on."""
    if pin is not None:
        compute_host(state, pin, "pin")
        if host not in (None, pin):
            raise Refused(
                f"it is to start on {host} and to be pinned to {pin}",
                field="pin",
                remedy="name one host",
            )
    return pin or host


def check_pin(state: State, server: ServerId, pin: HostId | None) -> None:
    """A server is pinned to where it is."""
    if pin is None:
        return
    compute_host(state, pin, "pin")
    blueprint, row = state.blueprint, state.servers[server]
    owner = blueprint.servers.get(server) if blueprint else None
    move = next((m for m in (blueprint.moves if blueprint else ()) if m.server == server), None)
    leaving = move is not None and move.destination != pin
    where = owner.host if owner is not None else row.placement
    if where not in (None, pin) or leaving or (row.move_requested and row.move_to != pin):
        going = (
            f"{server} is on its way from {where}"
            if leaving or row.move_requested
            else f"{server} is on {where}"
        )
        raise Conflict(
            going,
            field="pin",
            remedy=f"move it first: nahtlos server move {server} --to {pin}",
        )


def check_reserve(state: State, inventory: Inventory, hosts: int) -> None:
    compute = [host for host, row in state.hosts.items() if row.spec.role is HostRole.COMPUTE]
    if not 0 <= hosts < max(len(compute), 1):
        raise Refused(
            f"a reserve of {hosts} of {len(compute)} compute hosts",
            field="hosts",
            remedy=f"give 0 to {max(len(compute) - 1, 0)}",
        )
    report = reserve_of(state.policy(), inventory, state.blueprint, hosts)
    if not report.kept:
        raise Conflict(
            in_words(report),
            field="hosts",
            remedy="add or activate a host, delete servers, or keep less in reserve",
        )


def reserve_view(state: State, inventory: Inventory) -> ReserveReport:
    return reserve_of(state.policy(), inventory, state.blueprint, state.reserve)


def check_withdrawal(state: State, inventory: Inventory, host: HostId, intent: HostIntent) -> None:
    """A host is not taken out of service where that would break the reserve."""
    if intent is HostIntent.ACTIVE or state.hosts[host].intent is not HostIntent.ACTIVE:
        return
    emptied = intent is HostIntent.DRAINED
    broken = why_withdrawal_breaks(state.policy(), inventory, state.blueprint, host, emptied=emptied)
    if broken:
        raise Conflict(f"without {host} {broken}", field="host", remedy=KEEP)


def group_view(state: State, group: ServerGroupId) -> ServerGroupView:
    spec = known_group(state, group)
    owned = state.blueprint.servers if state.blueprint else {}
    here = [server for server, row in state.servers.items() if row.group == group]
    members = {server: owned[server].host if server in owned else None for server in sorted(here)}
    return ServerGroupView(
        id=group,
        project=spec.project,
        policy=spec.policy,
        members=members,
        violation=broken(spec.policy, [host for host in members.values() if host is not None]),
    )


# --- moves beside each other -----------------------------------------------------------------------------


def move_limits(state: State) -> MoveLimits:
    return MoveLimits(
        at_once=state.parallel_moves,
        per_host=state.parallel_moves_per_host,
        bytes_per_second=state.policy().move_bytes_per_second,
        running=len(state.blueprint.moves) if state.blueprint else 0,
    )


def changed_limits(before: MoveLimits, change: MoveLimitsChange) -> MoveLimits:
    if change == MoveLimitsChange():
        raise Refused("nothing to change", field="at_once", remedy="give --at-once or --per-host")
    at_once = before.at_once if change.at_once is UNSET else change.at_once
    per_host = before.per_host if change.per_host is UNSET else change.per_host
    for field, value in (("at_once", at_once), ("per_host", per_host)):
        if not 1 <= value <= MOST_MOVES:
            raise Refused(f"{value} moves at once", field=field, remedy=f"give 1 to {MOST_MOVES}")
    return msgspec.structs.replace(before, at_once=at_once, per_host=per_host)
