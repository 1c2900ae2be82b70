"""Emptying hosts: those their operators drain, and the one the campaign has come to. Of the latter, by the
campaign's strategy, servers may be taken over where they are instead."""

from nahtlos.model.blueprint import HostPhase, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.planner.destinations import heaviest_first, no_room, open_hosts, pack
from nahtlos.planner.draft import Draft
from nahtlos.planner.in_place import replace_or_wait
from nahtlos.planner.moves import CAMPAIGN, start_or_wait, why_not_ready
from nahtlos.planner.ways import is_left, leaving_with_room, runs


def evacuate_hosts(draft: Draft) -> None:
    owned = draft.by_host()
    for host in _to_empty(draft):
        staying = [server for server in owned.get(host, ()) if server not in draft.moving]
        _evacuate(draft, host, _take_over(draft, host, staying))


def _to_empty(draft: Draft) -> list[HostId]:
    """Operators' drains first. The campaign's host only while the campaign runs and nothing is stuck."""
    emptying = [host for host, plan in sorted(draft.hosts.items()) if plan.phase is HostPhase.EMPTYING]
    drained = [host for host in emptying if host != draft.upgrading]
    going_on = draft.running_campaign is not None and not draft.stuck
    return drained + [host for host in emptying if host == draft.upgrading and going_on]


def _take_over(draft: Draft, host: HostId, servers: list[ServerId]) -> list[ServerId]:
    """In place, one after another, those that are not to leave. The others."""
    campaign = draft.running_campaign
    if campaign is None or host != draft.upgrading:
        return servers
    movers = leaving_with_room(draft, campaign, host, servers)
    release = campaign.to_release
    left = [s for s in servers if s not in set(movers) and not runs(draft, s, release)]
    draft.wanted.update(left)
    for server in sorted(left, key=lambda server: (draft.attempts.get(server, 0), server)):
        replace_or_wait(draft, server, release, f"{CAMPAIGN}{host} is brought to {release}")
    return movers


def _evacuate(draft: Draft, host: HostId, servers: list[ServerId]) -> None:
    for server in (left := [s for s in servers if is_left(draft, s)]):
        draft.wait(
            server,
            WaitKind.OPERATOR,
            f"{server} stays on {host}: it is to be left where it is",
            f"ask for it: nahtlos server move {server}, or change --on-host-failure of it",
        )
    servers = [server for server in servers if server not in left]
    if not servers:
        return
    draft.wanted.update(servers)
    hosts = open_hosts(draft, without=host)
    places = pack(draft, servers, hosts).places
    reason = _reason(draft, host)
    for server in sorted(heaviest_first(draft, servers), key=lambda server: draft.attempts.get(server, 0)):
        if waiting := why_not_ready(draft, server):
            draft.waiting.append(waiting)
        elif server not in places:
            draft.wait(server, WaitKind.CAPACITY, no_room(draft, server, hosts))
        else:
            start_or_wait(draft, server, places[server], reason)


def _reason(draft: Draft, host: HostId) -> str:
    campaign = draft.running_campaign
    if campaign is not None and host == draft.upgrading:
        return f"{CAMPAIGN}{host} is emptied for {campaign.to_release}"
    return f"{host} is drained"
