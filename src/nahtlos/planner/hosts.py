"""Hosts that join, leave, and do what their operators want of them.

A host joins as SWITCHING: it takes servers once a probe has booted on it under the cloud's release. The
campaign's own host is left alone here.
"""

import msgspec

from nahtlos.model.blueprint import CampaignState, HostIntent, HostPhase, HostPlan, PlannedVerify, WaitKind
from nahtlos.model.ids import HostId
from nahtlos.planner.draft import Draft
from nahtlos.planner.outcome import excused

TRANSIENT_VERIFIES = 3
"""Attempts of a verify that failed for want of an answer, not for what it found."""


def settle_hosts(draft: Draft) -> None:
    for host in sorted(draft.policy.hosts):
        if host not in draft.hosts:
            _join(draft, host)
    for host in sorted(draft.hosts):
        if host not in draft.policy.hosts:
            _leave(draft, host)
        else:
            _follow_intent(draft, host)


def _join(draft: Draft, host: HostId) -> None:
    if not draft.is_compute(host):
        draft.hosts[host] = HostPlan(
            phase=HostPhase.SERVING, release=None, network_release=draft.policy.network_release
        )
        draft.change(f"{host} joins as an edge host")
        return
    release, seen = draft.policy.release, draft.observed.host(host)
    verified = release is not None and seen is not None and seen.verified_release == release
    draft.hosts[host] = HostPlan(
        phase=draft.rest_phase(host) if verified else HostPhase.SWITCHING,
        release=release,
        storage_release=draft.policy.storage_release,
        network_release=draft.policy.network_release,
    )
    draft.change(f"{host} joins")


def _leave(draft: Draft, host: HostId) -> None:
    """A host no longer named goes once nothing of it is needed; until then it is drained."""
    if draft.upgrading == host:
        draft.upgrading = None
    held = any(assignment.host == host for assignment in draft.servers.values())
    touched = any(host in (move.source, move.destination) for move in draft.moves.values())
    if held or touched or draft.verify_of(host):
        if draft.hosts[host].phase is not HostPhase.SWITCHING:
            draft.set_phase(host, HostPhase.EMPTYING)
        draft.wait(host, WaitKind.MOVE, f"{host} is to leave the cloud, but is still in use")
        return
    del draft.hosts[host]
    draft.failed_verifies.pop(host, None)
    draft.change(f"{host} leaves")


def _follow_intent(draft: Draft, host: HostId) -> None:
    if draft.hosts[host].phase is HostPhase.SWITCHING or draft.upgrading == host:
        return
    before, after = draft.hosts[host].phase, draft.rest_phase(host)
    if before is not after:
        draft.set_phase(host, after)
        draft.change(f"{host} is {after}")


def verify_switching_hosts(draft: Draft) -> None:
    """Every SWITCHING host has a verify, or a reason why not."""
    for host in sorted(draft.hosts):
        if draft.hosts[host].phase is HostPhase.SWITCHING and not draft.verify_of(host):
            _verify(draft, host)


def _verify(draft: Draft, host: HostId) -> None:
    if host not in draft.policy.hosts or _has_no_release(draft, host) or _is_held(draft, host):
        return
    if _cannot_be_asked(draft, host) or _has_failed(draft, host):
        return
    release = draft.hosts[host].release
    assert release is not None, f"{host} is verified without a release"
    verify = PlannedVerify(id=draft.next_operation("verify"), host=host, release=release)
    draft.verifies[verify.id] = verify
    draft.change(f"{host} verifies {release}")


def _has_no_release(draft: Draft, host: HostId) -> bool:
    plan = draft.hosts[host]
    if plan.release is not None:
        return False
    if draft.policy.release is not None:
        draft.hosts[host] = msgspec.structs.replace(plan, release=draft.policy.release)
        return False
    draft.wait(
        host, WaitKind.OPERATOR, f"{host} has no hypervisor release yet", "build and register a release"
    )
    return True


def _is_held(draft: Draft, host: HostId) -> bool:
    """An operator's pause holds the campaign's host, a drain one that failed; both excuse the failure."""
    campaign, failure = draft.policy.campaign, draft.failed_verifies.get(host)
    paused = campaign is not None and campaign.state is CampaignState.PAUSED and draft.upgrading == host
    rested = failure is not None and draft.intent(host) is HostIntent.DRAINED
    if not paused and not rested:
        if failure is not None and failure.attempts == 0:
            del draft.failed_verifies[host]
        return False
    if failure is not None:
        draft.failed_verifies[host] = excused(failure)
    why = f" (last time: {failure.error.message})" if failure and failure.error else ""
    remedy = "resume the campaign" if paused else f"activate {host} to try again"
    draft.wait(host, WaitKind.OPERATOR, f"{host} is not verified while it is held back{why}", remedy)
    return True


def _cannot_be_asked(draft: Draft, host: HostId) -> bool:
    seen, release = draft.observed.host(host), draft.hosts[host].release
    if seen is None or not draft.observed.connected(host):
        draft.wait(host, WaitKind.HOST, f"the agent of {host} is not connected")
        return True
    if release not in seen.releases:
        draft.wait(
            host,
            WaitKind.BLOCKED,
            f"{host} has no intact copy of {release}",
            f"put {release} into the releases folder of {host}",
        )
        return True
    return False


def _has_failed(draft: Draft, host: HostId) -> bool:
    failure = draft.failed_verifies.get(host)
    if failure is None:
        return False
    transient = failure.error is not None and failure.error.kind == "unavailable"
    if transient and failure.attempts < TRANSIENT_VERIFIES:
        return False
    message = failure.error.message if failure.error else "no reason was given"
    draft.wait(
        host,
        WaitKind.BLOCKED,
        f"{host} could not be verified under {draft.hosts[host].release}: {message}",
        _remedy(draft, host),
    )
    return True


def _remedy(draft: Draft, host: HostId) -> str:
    plan, failure = draft.hosts[host], draft.failed_verifies[host]
    hint = f"{failure.error.remedy}; then " if failure.error and failure.error.remedy else ""
    if draft.running_campaign and draft.upgrading == host:
        back = f" to put {host} back to {plan.previous}" if plan.previous else ""
        return f"{hint}pause and resume the campaign to try again, or cancel it{back}"
    return f"{hint}drain and activate {host} to try again"
