"""Emptying hosts: those their operators drain, and the one the campaign has come to. Of the latter, by the
campaign's strategy, servers may be taken over where they are instead."""

from nahtlos.model.blueprint import HostPhase, Waiting, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.planner.destinations import choose, heaviest_first, open_hosts, pack, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.in_place import replace_or_wait
from nahtlos.planner.moves import CAMPAIGN, start_or_wait, why_not_ready
from nahtlos.planner.ways import deferred, is_left, leaving_with_room, means_of_move, runs, why_over_budget


def evacuate_hosts(draft: Draft) -> None:
    owned = draft.by_host()
    for host in _to_empty(draft):
        staying = [server for server in owned.get(host, ()) if server not in draft.moving]
        _evacuate(draft, host, _take_over(draft, host, staying))
    _bring_together(draft)


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
        if waiting := why_not_ready(draft, server) or _why_not_together(draft, server, places):
            draft.waiting.append(waiting)
        elif server not in places:
            nowhere = why_nowhere(draft, server, hosts)
            draft.wait(server, nowhere.kind, nowhere.reason, nowhere.remedy)
        else:
            start_or_wait(draft, server, places[server], reason)


def _why_not_together(draft: Draft, server: ServerId, places: dict[ServerId, HostId]) -> Waiting | None:
    """An affinity group leaves a host whole: the first of it goes once every other one could."""
    host = draft.servers[server].host
    if server not in places or draft.neighbours.home(server, host) is not None:  # the first has gone
        return None
    release = draft.hosts[places[server]].release
    for other in draft.neighbours.companions(server, host):
        waiting = why_not_ready(draft, other)
        if waiting is None and other not in places:
            waiting = Waiting(subject=other, kind=WaitKind.MOVE, reason=f"{other} stays on {host}")
        elif waiting is None and (
            over := why_over_budget(draft, other, means_of_move(draft, other), release)
        ):
            waiting = deferred(other, over)
        if waiting is not None:
            group = draft.neighbours.group(server)
            text = f"{server} leaves {host} only together with {other} (affinity group {group})"
            return Waiting(
                subject=server, kind=waiting.kind, reason=f"{text}: {waiting.reason}", remedy=waiting.remedy
            )
    return None


def _bring_together(draft: Draft) -> None:
    """Affinity groups that something has left on two hosts, as a drain that was called off."""
    for home, servers in draft.neighbours.scattered():
        for server in servers:
            owner = draft.servers.get(server)
            if owner is None or server in draft.moving or not _may_stay(draft, owner.host):
                continue
            draft.wanted.add(server)
            if waiting := why_not_ready(draft, server):
                draft.waiting.append(waiting)
            elif home in open_hosts(draft) and choose(draft, server, [home]):
                group = draft.neighbours.group(server)
                start_or_wait(draft, server, home, f"affinity group {group} comes together")
            else:
                nowhere = why_nowhere(draft, server, [home])
                draft.wait(server, nowhere.kind, nowhere.reason, nowhere.remedy)


def _may_stay(draft: Draft, host: HostId) -> bool:
    """Whether nothing empties `host`, which would see to its servers."""
    return draft.hosts[host].phase is not HostPhase.EMPTYING


def _reason(draft: Draft, host: HostId) -> str:
    campaign = draft.running_campaign
    if campaign is not None and host == draft.upgrading:
        return f"{CAMPAIGN}{host} is emptied for {campaign.to_release}"
    return f"{host} is drained"
