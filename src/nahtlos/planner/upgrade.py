"""The campaign: one host after the other is emptied, switched to the release, verified and taken back.
What is replaced under its servers is in `replace`. By its strategy (`ways`) a host's servers may stay, each
taken over by a process of the release where it is: then the host counts as empty once all of them run by it.

    serving --choose--> emptying --empty--> switching --verified--> serving (or as its operator wants it)
                           |                    |
                           | no room any more,  | cancelled and not verified:
                           | or cancelled       | back to the release it had, verified again (or rolled back)
                           v                    v
                        serving              serving

`Blueprint.upgrading` names the one host between choose and return. While a move is stuck, or its verify has
failed, the campaign goes no further: what failed is not spread. Moves themselves are evacuate's business.
"""

import msgspec

from nahtlos.model.blueprint import (
    Blueprint,
    Campaign,
    CampaignState,
    HostPhase,
    Policy,
    WaitKind,
)
from nahtlos.model.ids import HostId, ReleaseId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Component, HostRole
from nahtlos.planner.capacity import leftovers, shortage_without
from nahtlos.planner.draft import Draft
from nahtlos.planner.moves import CAMPAIGN
from nahtlos.planner.replace import note_replaced, put_back, replace_next
from nahtlos.planner.ways import leaving, leaving_with_room, runs, stays


def review_campaign(draft: Draft) -> None:
    """Before anything else is decided: what the campaign no longer needs, or may not keep, is given back."""
    campaign = draft.policy.campaign
    if campaign is not None and campaign.id != draft.campaign:
        draft.campaign, draft.ended_moves = campaign.id, 0
    note_replaced(draft)
    if draft.open_campaign is None:
        _wind_up(draft)
    elif draft.running_campaign is None:
        _say_paused(draft, draft.open_campaign)
    elif draft.upgrading is not None:
        _keep_or_give_back(draft, draft.open_campaign, draft.upgrading)


def advance_campaign(draft: Draft) -> None:
    """The next host, with the room that new servers and requests have left."""
    campaign = draft.running_campaign
    if campaign is None:
        return
    if campaign.component is not Component.HYPERVISOR:
        if draft.replaced is None and draft.upgrading is None:
            replace_next(draft, campaign, to_upgrade(draft.policy, campaign))
        return
    if draft.upgrading is None and draft.replaced is None and not draft.stuck:
        draft.upgrading = _choose(draft, campaign, draft.by_host())
    if draft.upgrading is not None and draft.hosts[draft.upgrading].phase is HostPhase.EMPTYING:
        _switch_once_empty(draft, campaign, draft.upgrading)


# --- which host next ---------------------------------------------------------------------------------


def _choose(draft: Draft, campaign: Campaign, owned: dict[HostId, list[ServerId]]) -> HostId | None:
    """The host whose emptying costs least, of those that can be spared. One whose servers find no room
    elsewhere is taken only if no other can be, and if they can be taken over in place."""

    def cost(host: HostId) -> tuple[bool, int, int, str]:
        servers = owned.get(host, [])
        memory = sum(draft.size(server).memory_mib for server in servers)
        return any(not _runs(draft, server) for server in servers), len(servers), memory, host

    shortages: list[tuple[HostId, str]] = []
    arriving = {move.destination: move for move in draft.moves.values()}
    candidates = sorted(_candidates(draft, campaign), key=cost)
    for host in candidates:
        if move := arriving.get(host):
            draft.wait(host, WaitKind.MOVE, f"{host} is not emptied while {move.server} is moving to it")
            continue
        staying = _staying(draft, owned.get(host, []))
        shortage = shortage_without(draft, host, leaving(draft, campaign, host, staying))
        if shortage is None:
            return _begin(draft, campaign, host)
        shortages.append((host, shortage))
    for host, _ in shortages:
        staying = _staying(draft, owned.get(host, []))
        if not shortage_without(draft, host, leaving_with_room(draft, campaign, host, staying)):
            return _begin(draft, campaign, host)
    for host, shortage in shortages:
        draft.wait(
            host,
            WaitKind.CAPACITY,
            f"{host} cannot be emptied: {shortage}",
            "add a host, activate one that is cordoned or drained, or delete servers",
        )
    return None


def _begin(draft: Draft, campaign: Campaign, host: HostId) -> HostId:
    draft.set_phase(host, HostPhase.EMPTYING)
    draft.change(f"{host} is emptied for {campaign.to_release}")
    return host


def _runs(draft: Draft, server: ServerId) -> bool:
    status = draft.observed.server_on(server, draft.servers[server].host)
    return status is not None and status.state is RunState.RUNNING


def _staying(draft: Draft, servers: list[ServerId]) -> list[ServerId]:
    return [server for server in servers if server not in draft.moving]


def _candidates(draft: Draft, campaign: Campaign) -> list[HostId]:
    return [
        host
        for host in to_upgrade(draft.policy, campaign)
        if host in draft.hosts
        and draft.hosts[host].phase is not HostPhase.SWITCHING
        and draft.hosts[host].release != campaign.to_release
        and not _is_out_of_reach(draft, campaign.to_release, host)
    ]


def _is_out_of_reach(draft: Draft, release: ReleaseId, host: HostId) -> bool:
    seen = draft.observed.host(host)
    if seen is None or not draft.observed.connected(host):
        draft.wait(
            host,
            WaitKind.HOST,
            f"{host} is not upgraded: its agent is not connected",
            f"start the agent of {host}",
        )
        return True
    if release not in seen.releases:
        draft.wait(
            host,
            WaitKind.BLOCKED,
            f"{host} is not upgraded: it has no intact copy of {release}",
            f"put {release} into the releases folder of {host}",
        )
        return True
    return False


# --- the host it has come to -------------------------------------------------------------------------


def _keep_or_give_back(draft: Draft, campaign: Campaign, host: HostId) -> None:
    """A host that can no longer be emptied goes back to service: it must not be withdrawn for nothing."""
    if campaign.rolled_back and draft.hosts[host].previous == campaign.to_release:
        _undo_switch(draft, host)
    if draft.hosts[host].phase is not HostPhase.EMPTYING:
        return
    if host not in campaign.hosts or _has_all_of(draft, campaign, host):
        _give_back(draft, host, "the campaign does not need it")
        return
    if why := draft.hosts[host].fenced:
        _give_back(draft, host, f"it has failed ({why})")
        return
    if any(move.source == host for move in draft.moves.values()):
        return
    servers = leaving_with_room(draft, campaign, host, draft.by_host().get(host, []))
    shortage = shortage_without(draft, host, servers, as_if_connected=True)
    if shortage is not None:
        _give_back(draft, host, shortage)


def _has_all_of(draft: Draft, campaign: Campaign, host: HostId) -> bool:
    """It has the release; of a campaign that is rolled back servers may have been taken over already."""
    if draft.hosts[host].release != campaign.to_release:
        return False
    here = draft.by_host().get(host, []) if campaign.rolled_back else []
    return all(runs(draft, server, campaign.to_release) for server in here)


def _give_back(draft: Draft, host: HostId, why: str) -> None:
    draft.upgrading = None
    draft.set_phase(host, draft.rest_phase(host))
    draft.change(f"{host} is no longer emptied: {why}")


def _switch_once_empty(draft: Draft, campaign: Campaign, host: HostId) -> None:
    here = draft.by_host().get(host, [])
    if here and not stays(draft, campaign, host):
        return
    if not all(runs(draft, server, campaign.to_release) for server in here):
        return
    if draft.stuck or _is_out_of_reach(draft, campaign.to_release, host) or _is_still_busy(draft, host):
        return
    plan = draft.hosts[host]
    before = plan.release
    draft.hosts[host] = msgspec.structs.replace(
        plan, phase=HostPhase.SWITCHING, release=campaign.to_release, previous=before
    )
    draft.change(f"{host} is switched from {before} to {campaign.to_release}")


def _is_still_busy(draft: Draft, host: HostId) -> bool:
    """Owning nothing is not enough: nothing may run or arrive there either."""
    moves = [move.id for move in draft.moves.values() if host in (move.source, move.destination)]
    if busy := moves or draft.observed.running_on.get(host):
        draft.wait(host, WaitKind.MOVE, f"{host} is not switched yet: {', '.join(busy)} is still being ended")
        return True
    for where, status in leftovers(draft):
        if where == host:
            known = status.id in draft.servers or status.id in draft.policy.removed_servers
            draft.wait(
                host,
                WaitKind.HOST if known else WaitKind.BLOCKED,
                f"{host} is not switched yet: it still runs {status.id}, which it does not own",
                "" if known else f"end {status.id} on {host}: this cloud does not know it",
            )
            return True
    return False


# --- paused, cancelled, over -------------------------------------------------------------------------


def _say_paused(draft: Draft, campaign: Campaign) -> None:
    left = [
        host
        for host in to_upgrade(draft.policy, campaign)
        if host in draft.hosts and draft.hosts[host].release_of(campaign.component) != campaign.to_release
    ]
    subject = draft.upgrading or draft.replaced or (left[0] if left else None)
    if subject is not None:
        draft.wait(subject, WaitKind.OPERATOR, f"campaign {campaign.id} is paused", "resume the campaign")


def _wind_up(draft: Draft) -> None:
    """Without a campaign no host is held: one being emptied serves again, one that was switched and is not
    verified is put back. A verify that runs is ended first."""
    if draft.replaced is not None:
        put_back(draft, draft.replaced)
    host = draft.upgrading
    if host is None:
        return
    if draft.hosts[host].phase is HostPhase.EMPTYING:
        _give_back(draft, host, "the campaign was cancelled")
    else:
        _undo_switch(draft, host)


def _undo_switch(draft: Draft, host: HostId) -> None:
    """To the release it had, by which it is verified again; not before a verify that runs has ended."""
    plan = draft.hosts[host]
    if plan.previous is not None and not draft.verify_of(host):
        draft.hosts[host] = msgspec.structs.replace(plan, release=plan.previous, previous=None)
        draft.failed_verifies.pop(host, None)
        draft.change(f"{host} is put back to {plan.previous}")


def to_upgrade(policy: Policy, campaign: Campaign) -> list[HostId]:
    """The campaign's hosts that are (still) hosts of this cloud which have its component."""
    specs = ((host, policy.hosts.get(host)) for host in campaign.hosts)
    return sorted({host for host, spec in specs if spec is not None and has(spec.role, campaign.component)})


def has(role: HostRole, component: Component) -> bool:
    """Only compute hosts run servers and serve volumes."""
    return component is Component.NETWORK or role is HostRole.COMPUTE


def upgraded_hosts(policy: Policy, blueprint: Blueprint) -> tuple[HostId, ...]:
    """Hosts of the policy's campaign that have its release and are through: verified, or replaced."""
    campaign = policy.campaign
    if campaign is None:
        return ()
    plans = ((host, blueprint.hosts.get(host)) for host in to_upgrade(policy, campaign))
    return tuple(
        host
        for host, plan in plans
        if plan is not None
        and plan.release_of(campaign.component) == campaign.to_release
        and plan.replacing is None
        and (plan.phase is not HostPhase.SWITCHING or campaign.component is not Component.HYPERVISOR)
    )


def campaign_over(policy: Policy, blueprint: Blueprint) -> bool:
    """Whether the policy's campaign has come to its end: all hosts upgraded, or its cancellation carried
    out. Only right for a blueprint planned under this policy."""
    campaign = policy.campaign
    if campaign is None or campaign.id != blueprint.campaign or blueprint.upgrading is not None:
        return False
    if any(plan.replacing is not None for plan in blueprint.hosts.values()):
        return False
    if campaign.state is CampaignState.CANCELLED:
        return not any(move.reason.startswith(CAMPAIGN) for move in blueprint.moves)
    return len(upgraded_hosts(policy, blueprint)) == len(to_upgrade(policy, campaign))
