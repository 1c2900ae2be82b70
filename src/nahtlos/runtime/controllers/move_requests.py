"""Whether a server can be moved, or its VMM replaced, as it is asked for. Pure; every refusal names the field
and the remedy."""

from collections.abc import Mapping

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, ReleaseId, ServerId
from nahtlos.model.inventory import Accelerator, Inventory
from nahtlos.model.nouns import Release
from nahtlos.model.version_pairs import Verdict, Way, pair_for
from nahtlos.planner.place import room_for
from nahtlos.runtime.controllers.requests import compute_host, listed, present_server
from nahtlos.runtime.controllers.state import State


def check_move(state: State, inventory: Inventory, server: ServerId, to: HostId | None) -> None:
    blueprint = state.blueprint
    row = state.servers[present_server(state, server)]
    move = next((m for m in (blueprint.moves if blueprint else ()) if m.server == server), None)
    if move is not None:
        raise Conflict(
            f"{server} is moving from {move.source} to {move.destination} ({move.id})",
            field="server",
            remedy="wait until it has ended",
        )
    if row.move_requested and row.move_to == to:
        raise Conflict(
            f"{server} is to move to {to or 'another host'} already",
            field="server",
            remedy=f"nahtlos server show {server} says what it waits for",
        )
    assignment = blueprint.servers.get(server) if blueprint else None
    if assignment is None:
        raise Conflict(f"{server} is on no host yet", field="server", remedy="wait until it runs")
    if to is not None:
        compute_host(state, to, "to")
        if assignment.host == to:
            raise Refused(f"{server} is on {to}", field="to", remedy="name another host")
    answer = room_for(state.policy(), inventory, blueprint, row.spec, to)
    if answer is not None and (to is not None or answer.barred):
        raise Conflict(answer.reason, field="to", remedy=answer.remedy)


def check_replacement(
    state: State,
    inventory: Inventory,
    server: ServerId,
    by: ReleaseId | None,
    releases: Mapping[ReleaseId, Release],
) -> ReleaseId:
    """The release whose VMM shall take the server over where it is. The one that runs it withdraws an earlier
    request."""
    blueprint = state.blueprint
    row = state.servers[present_server(state, server)]
    assignment = blueprint.servers.get(server) if blueprint else None
    seen = inventory.hosts.get(assignment.host) if assignment else None
    status = next((s for s in (seen.servers if seen else ()) if s.id == server), None)
    if blueprint is None or assignment is None or seen is None or status is None or status.release is None:
        raise Conflict(f"{server} does not run yet", field="server", remedy="wait until it runs")
    release = by or blueprint.hosts[assignment.host].release
    if release is None or release not in releases:
        raise NotFound(
            f"no release '{release}' is registered", field="release", remedy=f"registered: {listed(releases)}"
        )
    if status.release == release and row.replace_by is not None:
        return release
    if status.release == release:
        raise Refused(f"{server} runs {release}", field="release", remedy="name another release")
    if release not in seen.releases:
        raise Conflict(
            f"{assignment.host} has no intact copy of {release}",
            field="release",
            remedy=f"put it into the releases folder of {assignment.host}",
        )
    if row.spec.machine not in releases[release].machine_types:
        raise Refused(
            f"{release} cannot run {server}: it lacks the machine type {row.spec.machine}",
            field="release",
            remedy="choose a release that has it",
        )
    _check_pair(releases, status.release, release, seen.accelerator)
    return release


def _check_pair(
    releases: Mapping[ReleaseId, Release], old: ReleaseId, new: ReleaseId, accelerator: Accelerator | None
) -> None:
    before = releases.get(old)
    if before is None:
        raise Conflict(
            f"it is not known what {old} is",
            field="release",
            remedy="nahtlos release list names those that are known",
        )
    if accelerator is None:
        raise Conflict(
            "the host's accelerator is not known yet", field="server", remedy="try again in a moment"
        )
    pair = pair_for(Way.IN_PLACE, before.version, releases[new].version, accelerator.name)
    if pair.verdict is Verdict.REFUSED:
        raise Refused(str(pair), field="release", remedy="choose a release that docs/version-pairs.md knows")
