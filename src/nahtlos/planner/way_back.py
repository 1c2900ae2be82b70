"""The way back of a campaign. Until its point of no return (`Campaign.returns`) whatever comes to the new
release, or is started under it, must be able to return to the one its host came from. Says; decides nothing.
"""

from collections import defaultdict

from nahtlos.model.blueprint import Campaign, Strategy, Waiting, WaitKind
from nahtlos.model.ids import HostId, ReleaseId, ServerId
from nahtlos.model.nouns import Component
from nahtlos.model.version_pairs import PLUGGED_MEMORY, Pair, Verdict, Way, pair_for
from nahtlos.planner.draft import Draft

WAYS = {
    Strategy.MOVE: (Way.MOVE,),
    Strategy.IN_PLACE: (Way.IN_PLACE,),
    Strategy.AUTO: (Way.IN_PLACE, Way.MOVE),
}
"""By which the campaign's servers would be carried back, too."""
NAMED = 5
"""Servers that one sentence names; the rest is counted."""


def refused_ways_back(draft: Draft, campaign: Campaign) -> list[Waiting]:
    """What keeps a campaign from being begun: servers for which every way back is refused, by the row."""
    if not campaign.returns or campaign.component is not Component.HYPERVISOR:
        return []
    refused: dict[tuple[ReleaseId, str], list[ServerId]] = defaultdict(list)
    for server, owner in sorted(draft.servers.items()):
        if owner.host in campaign.hosts and (found := _refused(draft, campaign, server)):
            old, row = found
            refused[old, str(row)].append(server)
    return [_told(campaign, old, row, servers) for (old, row), servers in sorted(refused.items())]


def _told(campaign: Campaign, old: ReleaseId, row: str, servers: list[ServerId]) -> Waiting:
    more = len(servers) - NAMED
    named = ", ".join(servers[:NAMED]) + (f" and {more} more" if more > 0 else "")
    return Waiting(
        subject=servers[0],
        kind=WaitKind.BLOCKED,
        reason=f"{named} could not return from {campaign.to_release} to {old}: {row}",
        remedy="choose another strategy or release, or go without: --no-way-back",
    )


def _refused(draft: Draft, campaign: Campaign, server: ServerId) -> tuple[ReleaseId, Pair] | None:
    """The release it could not return to, and the row that refuses the last of the ways."""
    host = draft.servers[server].host
    seen, status = draft.observed.host(host), draft.observed.server_on(server, host)
    versions = draft.policy.release_versions
    new = versions.get(campaign.to_release)
    if seen is None or seen.accelerator is None or status is None or status.release is None or new is None:
        return None
    old = versions.get(status.release)
    if old is None or status.release == campaign.to_release:
        return None
    spec, accelerator = draft.policy.servers.get(server), seen.accelerator.name
    plugged = spec is not None and spec.max_memory_mib > 0 and accelerator == PLUGGED_MEMORY.accelerator
    rows = [
        PLUGGED_MEMORY if plugged and way is Way.MOVE else pair_for(way, new, old, accelerator)
        for way in WAYS[campaign.strategy]
    ]
    return (status.release, rows[-1]) if all(row.verdict is Verdict.REFUSED for row in rows) else None


# --- what comes to the new release meanwhile -------------------------------------------------------------


def why_no_return(draft: Draft, server: ServerId, host: HostId) -> str:
    """Why `server` must not run on `host`, which has the campaign's release, before that is final: no host it
    could be carried back to knows its machine. Empty if it may."""
    campaign = draft.open_campaign
    if campaign is None or not campaign.returns or campaign.component is not Component.HYPERVISOR:
        return ""
    to, spec = campaign.to_release, draft.policy.servers.get(server)
    olds = [release for release in campaign.from_releases if release != to]
    if spec is None or not olds or draft.hosts[host].release != to or _is_there(draft, server, to):
        return ""
    if not any(draft.can_run(server, old) for old in olds):
        return f"{server} could not return: {', '.join(olds)} lacks its machine type {spec.machine}"
    told = [
        seen.accelerator.cpu_models
        for other, plan in draft.hosts.items()
        if plan.release in olds
        and (seen := draft.observed.host(other)) is not None
        and seen.accelerator is not None
        and seen.accelerator.cpu_models
    ]
    if told and not any(spec.cpu_model in models for models in told):
        return f"{server} could not return: no host of {', '.join(olds)} has its CPU model {spec.cpu_model}"
    return ""


def _is_there(draft: Draft, server: ServerId, release: ReleaseId) -> bool:
    """It runs by the release already."""
    owner = draft.servers.get(server)
    status = draft.observed.server_on(server, owner.host) if owner is not None else None
    return status is not None and status.release == release
