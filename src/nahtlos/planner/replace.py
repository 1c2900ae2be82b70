"""The campaign for what is replaced while servers stay: a host's storage daemon, its network functions.

    as it was --choose--> replacing --the host reports the release and is healthy--> has it
                              |
                              | cancelled: the release it had before
                              v
                          replacing --the host reports that and is healthy--> as it was

No server is moved. `HostPlan.replacing` marks the one host. While it, or one that was replaced before, is not
healthy, no further host is taken: what failed is not spread.
"""

import msgspec

from nahtlos.model.blueprint import Campaign, HostPhase, HostPlan, WaitKind
from nahtlos.model.ids import HostId, ReleaseId, ServerId
from nahtlos.model.inventory import HostInventory
from nahtlos.model.nouns import Component
from nahtlos.planner.draft import Draft

WORDS = {Component.STORAGE: "storage daemon", Component.NETWORK: "network functions"}


def reported(seen: HostInventory, component: Component) -> ReleaseId | None:
    """What `seen` says its host has of `component`."""
    match component:
        case Component.HYPERVISOR:
            return seen.verified_release
        case Component.STORAGE:
            return seen.storage_release
        case Component.NETWORK:
            return seen.network_release


def with_release(plan: HostPlan, component: Component, release: ReleaseId | None) -> HostPlan:
    assert component is not Component.HYPERVISOR, "a hypervisor is not replaced under its servers"
    if component is Component.STORAGE:
        return msgspec.structs.replace(plan, storage_release=release)
    return msgspec.structs.replace(plan, network_release=release)


# --- a host that is replaced ---------------------------------------------------------------------------


def note_replaced(draft: Draft) -> None:
    """A host that reports what it was given, and nothing wrong, is through; whatever its campaign does."""
    for host, plan in sorted(draft.hosts.items()):
        if plan.replacing is not None and not _is_unfinished(draft, host, plan, plan.replacing):
            release = plan.release_of(plan.replacing)
            draft.hosts[host] = msgspec.structs.replace(plan, replacing=None, previous=None)
            draft.change(f"{host} has {release or 'its own programs'} as {WORDS[plan.replacing]}")


def _is_unfinished(draft: Draft, host: HostId, plan: HostPlan, component: Component) -> bool:
    wanted, seen = plan.release_of(component), draft.observed.host(host)
    if wanted is None and component is Component.STORAGE:
        return False  # it was not known what it had: left as it is
    what = f"{WORDS[component]} of {host}"
    if seen is None or not draft.observed.connected(host):
        draft.wait(host, WaitKind.HOST, f"{what}: its agent is not connected", f"start the agent of {host}")
    elif seen.problems:
        draft.wait(
            host,
            WaitKind.BLOCKED,
            f"{what} with {wanted or 'its own programs'}: {seen.problems[0].message}",
            f"{_hint(seen)}cancel the campaign to put {host} back",
        )
    elif reported(seen, component) != wanted or seen.generation != seen.target_generation:
        draft.wait(host, WaitKind.HOST, f"{what}: {wanted or 'its own programs'} is not reported yet")
    else:
        return False
    return True


def _hint(seen: HostInventory) -> str:
    remedy = seen.problems[0].remedy
    return f"{remedy}, or " if remedy else ""


def put_back(draft: Draft, host: HostId) -> None:
    """Without a campaign: the release it had before. Decided once; then it is waited for as before."""
    plan = draft.hosts[host]
    assert plan.replacing is not None, f"{host} is not replaced"
    if plan.release_of(plan.replacing) == plan.previous:
        return
    draft.hosts[host] = with_release(plan, plan.replacing, plan.previous)
    draft.change(f"{host} is put back to {plan.previous or 'what it came with'}")


# --- the next one --------------------------------------------------------------------------------------


def replace_next(draft: Draft, campaign: Campaign, hosts: list[HostId]) -> None:
    """Of `hosts`, the campaign's, the next one that can be taken; healthy ones with few servers first."""
    owned = draft.by_host()
    plans = ((host, draft.hosts.get(host)) for host in hosts)
    left = [h for h, p in plans if p is not None and p.release_of(campaign.component) != campaign.to_release]
    if not left or _is_spoilt(draft, campaign, hosts):
        return
    for host in sorted(left, key=lambda host: (_is_sick(draft, host), len(owned.get(host, ())), host)):
        if not _is_held_up(draft, campaign, host):
            _begin(draft, campaign, host)
            return


def _is_sick(draft: Draft, host: HostId) -> bool:
    seen = draft.observed.host(host)
    return seen is None or bool(seen.problems)


def _is_spoilt(draft: Draft, campaign: Campaign, hosts: list[HostId]) -> bool:
    """Whether a host that was replaced already is not as it should be."""
    for host in hosts:
        plan, seen = draft.hosts.get(host), draft.observed.host(host)
        if plan is None or plan.release_of(campaign.component) != campaign.to_release:
            continue
        if seen is None or not draft.observed.connected(host):
            draft.wait(
                host,
                WaitKind.HOST,
                f"no further host is taken: the agent of {host}, which has {campaign.to_release}, is away",
                f"start the agent of {host}",
            )
            return True
        if seen.problems:
            draft.wait(
                host,
                WaitKind.BLOCKED,
                f"no further host is taken: {host}, which has {campaign.to_release}, reports: "
                f"{seen.problems[0].message}",
                f"{_hint(seen)}cancel the campaign, then bring {host} to the release it had",
            )
            return True
    return False


def _is_held_up(draft: Draft, campaign: Campaign, host: HostId) -> bool:
    seen, to = draft.observed.host(host), campaign.to_release
    if seen is None or not draft.observed.connected(host):
        draft.wait(
            host,
            WaitKind.HOST,
            f"{host} is not upgraded: its agent is not connected",
            f"start the agent of {host}",
        )
        return True
    if to not in seen.releases:
        draft.wait(
            host,
            WaitKind.BLOCKED,
            f"{host} is not upgraded: it has no intact copy of {to}",
            f"put {to} into the releases folder of {host}",
        )
        return True
    if draft.hosts[host].phase is HostPhase.SWITCHING:
        draft.wait(host, WaitKind.HOST, f"{host} is not upgraded: its hypervisor is verified first")
        return True
    if campaign.component is Component.STORAGE and (server := _moving_from_volume(draft, host)):
        draft.wait(
            host, WaitKind.MOVE, f"{host} is not upgraded while {server} moves, whose volume it serves"
        )
        return True
    return False


def _moving_from_volume(draft: Draft, host: HostId) -> ServerId | None:
    return next((s for s in sorted(draft.moving) if host in draft.volume_hosts(s)), None)


def _begin(draft: Draft, campaign: Campaign, host: HostId) -> None:
    plan, seen, component = draft.hosts[host], draft.observed.host(host), campaign.component
    before = plan.release_of(component) or (reported(seen, component) if seen is not None else None)
    begun = msgspec.structs.replace(plan, replacing=component, previous=before)
    draft.hosts[host] = with_release(begun, component, campaign.to_release)
    came = before or "what it came with"
    draft.change(f"{WORDS[component]} of {host}: from {came} to {campaign.to_release}")
