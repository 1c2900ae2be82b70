"""Which way a server is carried over: to another host, or in place, by the table of version pairs, the
prediction, and what its owner permits. Decides about one server or one host at a time and starts nothing.

    auto:  a move, if some host takes the server by the table, has room for it, and the move is predicted to
           keep its blackout budget and to converge
           else in place, if the table knows that and the budget allows it
           else a move that waits, with the reason
"""

from collections.abc import Sequence

import msgspec

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.blueprint import Campaign, HostIntent, Strategy, Waiting, WaitKind
from nahtlos.model.ids import HostId, ReleaseId, ServerId
from nahtlos.model.prediction import Estimate, Means, Workload
from nahtlos.model.version_pairs import Pair, Verdict, Way, pair_for
from nahtlos.planner.destinations import open_hosts, pack
from nahtlos.planner.draft import Draft
from nahtlos.planner.estimate import estimate

NOT_CONVERGED = "convergence"
"""The field of an agent's error: the server wrote faster than could be sent."""


# --- one server ----------------------------------------------------------------------------------------


def runs(draft: Draft, server: ServerId, release: ReleaseId) -> bool:
    owner = draft.servers[server]
    status = draft.observed.server_on(server, owner.host)
    return status is not None and status.epoch == owner.epoch and status.release == release


def row_for(draft: Draft, server: ServerId, way: Way, release: ReleaseId | None) -> Pair | None:
    """The row of the table that decides; None while it is not known what the server runs under."""
    host = draft.servers[server].host
    seen, status = draft.observed.host(host), draft.observed.server_on(server, host)
    versions = draft.policy.release_versions
    if seen is None or seen.accelerator is None or status is None or status.release is None:
        return None
    old, new = versions.get(status.release), versions.get(release) if release is not None else None
    if old is None or new is None:
        return None
    return pair_for(way, old, new, seen.accelerator.name)


def workload(draft: Draft, server: ServerId) -> Workload:
    spec = draft.policy.servers.get(server)
    seen = draft.observed.server_on(server, draft.servers[server].host)
    measured = seen.dirty_rate if seen is not None else None
    if measured is None:
        measured = draft.policy.experience.dirty_rates.get(server)
    devices = len(spec.ports) + len(spec.all_volumes) if spec is not None else 0
    return Workload(
        memory_mib=draft.size(server).memory_mib,
        dirty_rate=measured,
        devices=devices,
        blackout_budget_ms=spec.blackout_budget_ms if spec is not None else 0,
        server=server,
    )


def predicted(
    draft: Draft,
    server: ServerId,
    means: Means,
    release: ReleaseId | None,
    *,
    without_budget: bool = False,
) -> Estimate:
    """As its agent would do it, which keeps its budget, or as it would be `without_budget`."""
    work = workload(draft, server)
    if without_budget:
        work = msgspec.structs.replace(work, blackout_budget_ms=0)
    host = draft.servers[server].host
    seen, status = draft.observed.host(host), draft.observed.server_on(server, host)
    return estimate(
        means,
        work,
        draft.policy.experience,
        accelerator=seen.accelerator.name if seen is not None and seen.accelerator is not None else "tcg",
        parallel=draft.policy.experience.parallel or draft.policy.parallel_moves,
        releases=(status.release if status is not None else None, release),
    )


def means_of_move(draft: Draft, server: ServerId) -> Means:
    """Slowed down, or by post-copy, only with its owner's consent, and only if it did not converge otherwise,
    or is predicted not to. Of the two what keeps its budget; of those the one that risks nothing."""
    spec = draft.policy.servers.get(server)
    if spec is None or not (spec.allow_slowdown or spec.allow_post_copy):
        return Means.PRE_COPY
    if not did_not_converge(draft, server) and predicted(draft, server, Means.PRE_COPY, None).converges:
        return Means.PRE_COPY
    permitted = [Means.SLOWED] if spec.allow_slowdown else []
    if spec.allow_post_copy and not why_no_post_copy(draft, server):
        permitted.append(Means.POST_COPY)
    kept = (means for means in permitted if not why_over_budget(draft, server, means, None))
    return next(kept, permitted[0] if permitted else Means.PRE_COPY)


def why_no_post_copy(draft: Draft, server: ServerId, destination: HostId | None = None) -> str:
    """Why memory cannot follow it: its host, or `destination`, cannot. Empty if they can."""
    for host in (draft.servers[server].host, destination):
        seen = draft.observed.host(host) if host is not None else None
        if host is None or seen is None:
            continue
        if "post-copy" not in seen.knows:
            return f"the agent of {host} knows of no post-copy"
        if seen.why_no_post_copy:
            return f"{host}: {seen.why_no_post_copy}"
    return ""


def did_not_converge(draft: Draft, server: ServerId) -> bool:
    failure = draft.failed_moves.get(server)
    return failure is not None and failure.error is not None and failure.error.field == NOT_CONVERGED


def why_over_budget(draft: Draft, server: ServerId, means: Means, release: ReleaseId | None) -> str:
    """Empty if it keeps the server's budget, or none was set."""
    spec = draft.policy.servers.get(server)
    if spec is None or not spec.blackout_budget_ms:
        return ""
    said = predicted(draft, server, means, release)
    free = predicted(draft, server, means, release, without_budget=True)
    if not free.converges:
        return f"{means} of {server} is predicted not to come to its end"
    if said.converges and said.blackout_ms <= spec.blackout_budget_ms:
        return ""
    blackout = max(said.blackout_ms, free.blackout_ms)
    return (
        f"{means} of {server} is predicted to black it out for {blackout:.0f} ms, "
        f"its budget is {spec.blackout_budget_ms} ms"
    )


def deferred(server: ServerId, why: str) -> Waiting:
    return Waiting(
        subject=server,
        kind=WaitKind.BLOCKED,
        reason=f"{server} is left where it is: {why}",
        remedy=f"raise its budget: nahtlos server set {server} --blackout-budget MS",
    )


def is_left(draft: Draft, server: ServerId) -> bool:
    """Its owner wants it left where it is, also when its host is emptied."""
    spec = draft.policy.servers.get(server)
    return spec is not None and spec.on_host_failure is OnHostFailure.LEAVE


def can_stay(draft: Draft, server: ServerId, release: ReleaseId) -> bool:
    """Whether a process of `release` can take it over in place within its budget."""
    pair = row_for(draft, server, Way.IN_PLACE, release)
    if pair is None or pair.verdict is Verdict.REFUSED or not draft.can_run(server, release):
        return False
    return not why_over_budget(draft, server, Means.IN_PLACE, release)


# --- the servers of a host -----------------------------------------------------------------------------


def stays(draft: Draft, campaign: Campaign, host: HostId) -> bool:
    """Whether servers may be on `host` as it is switched. One that its operator drains is emptied."""
    return campaign.strategy is not Strategy.MOVE and draft.intent(host) is not HostIntent.DRAINED


def leaving(draft: Draft, campaign: Campaign, host: HostId, servers: Sequence[ServerId]) -> list[ServerId]:
    """Those that shall leave the host if there is room for them; the others are replaced in place."""
    if not stays(draft, campaign, host):
        return list(servers)
    servers = [server for server in servers if not is_left(draft, server)]
    if campaign.strategy is Strategy.IN_PLACE:
        return []
    release = campaign.to_release
    movers = [s for s in servers if not runs(draft, s, release) and not why_not_moved(draft, campaign, s)]
    if not draft.neighbours:
        return movers
    return [s for s in movers if not _is_held(draft, s, movers) or not can_stay(draft, s, release)]


def _is_held(draft: Draft, server: ServerId, movers: list[ServerId]) -> bool:
    """Whether others of its affinity group stay, and it with them."""
    host = draft.servers[server].host
    together = draft.neighbours.companions(server, host)
    return draft.neighbours.home(server, host) is None and not set(together) <= set(movers)


def leaving_with_room(
    draft: Draft, campaign: Campaign, host: HostId, servers: Sequence[ServerId]
) -> list[ServerId]:
    """Of those, the ones that some host has room for, or that can be carried over no other way. Hosts whose
    agent is away for the moment count: a moment's lack is waited for."""
    movers = leaving(draft, campaign, host, servers)
    if not stays(draft, campaign, host) or not movers:
        return movers
    crowded = set(pack(draft, movers, open_hosts(draft, without=host, as_if_connected=True)).left)
    return [s for s in movers if s not in crowded or not can_stay(draft, s, campaign.to_release)]


def why_not_moved(draft: Draft, campaign: Campaign, server: ServerId) -> str:
    """Why `auto` leaves the server in place although there may be room elsewhere; empty if it is moved."""
    if not can_stay(draft, server, campaign.to_release):
        return ""
    releases = {draft.hosts[host].release for host in open_hosts(draft, without=draft.servers[server].host)}
    refused = [draft.refused_move(server, release) for release in sorted(r for r in releases if r)]
    if refused and all(refused):
        return str(refused[0])
    means = means_of_move(draft, server)
    if over := why_over_budget(draft, server, means, campaign.to_release):
        return over
    if did_not_converge(draft, server) and means is Means.PRE_COPY:
        return f"a move of {server} did not converge"
    return ""
