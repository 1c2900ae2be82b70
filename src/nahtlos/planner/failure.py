"""Hosts that fail: when one is known to run nothing any more that shall be restarted, and where that goes.

    lost --members hear it--> cut off from the orchestrator only: nothing is done
      |--nobody does--> denied --ripe, or off--> fenced --> its servers are started elsewhere, epoch + 1
    back: told what it was passed over for --none of it there any more--> the denial is lifted

Nothing here goes by this orchestrator's clock: that a lease has run out is what its members say by theirs.
What a host may keep to is its lease as it was last told and as it last confirmed it; a proof holds for both.
"""

from collections.abc import Iterable

import msgspec

from nahtlos.model.availability import (
    FEWEST_MEMBERS,
    MEMBERS,
    Denial,
    LeaseTerms,
    OnHostFailure,
    cut_off,
    denial_seconds,
    majority,
)
from nahtlos.model.blueprint import HostPlan, Policy, Waiting, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import Inventory, ServerStatus
from nahtlos.model.nouns import Assignment
from nahtlos.model.storage import StorageBackend
from nahtlos.planner.destinations import open_hosts, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.volumes import task_of

LEASE = "its lease has run out"


# --- is it fenced ------------------------------------------------------------------------------------


def may_keep(plan: HostPlan) -> tuple[LeaseTerms, ...]:
    """The terms by which the host may hold a lease now. None: it may run what it has without one."""
    if plan.lease is None or plan.lease_kept is None:
        return ()
    return tuple({plan.lease: None, plan.lease_kept: None})


def denying(inventory: Inventory, denial: Denial, *, ripe: bool = False) -> frozenset[HostId]:
    """Who has promised not to grant. A promise is not taken back before the blueprint lifts the denial, so
    an old report is as good as a new one. The host itself is told, too, but counts as granting."""
    return frozenset(
        member
        for member, seen in inventory.hosts.items()
        if member != denial.host
        for said in (seen.standing.denials if seen.standing else ())
        if (said.host, said.term) == (denial.host, denial.term) and (said.ripe or not ripe)
    )


def is_silenced(inventory: Inventory, plan: HostPlan) -> bool:
    """Whether the host gets no lease from here on: what comes up there again waits."""
    if plan.denial is None:
        return False
    promised = denying(inventory, plan.denial)
    return all(cut_off(terms, promised) for terms in _told(plan))


def _told(plan: HostPlan) -> list[LeaseTerms]:
    return [terms for terms in (plan.lease, plan.lease_kept) if terms is not None]


def proof(policy: Policy, inventory: Inventory, host: HostId, plan: HostPlan) -> str:
    """How it is known that nothing runs at `host` that needs a lease; empty if it is not."""
    if plan.denial is None:
        return ""
    ripe, terms = denying(inventory, plan.denial, ripe=True), may_keep(plan)
    if terms and all(cut_off(each, ripe) for each in terms):
        return LEASE
    off = policy.off.get(host)
    return off.by if off is not None and is_silenced(inventory, plan) else ""


# --- one host after the other ------------------------------------------------------------------------


def review_failures(draft: Draft) -> None:
    able = _able_to_lease(draft)
    for host in sorted(draft.hosts):
        if not _is_watched(draft, host):
            continue
        if draft.passed_over.get(host) and draft.hosts[host].denial is None:
            _deny(draft, host)  # it had left the cloud, and has joined again
        if draft.observed.connected(host):
            _take_back(draft, host)
            _follow_lease(draft, host, able)
        elif host in draft.policy.lost:
            _look_into(draft, host)


def _is_watched(draft: Draft, host: HostId) -> bool:
    """Also an edge host by which routers lead out."""
    ways_out = any(place.host == host for place in draft.gateways.values())
    plan = draft.hosts[host]
    begun = plan.lease is not None or plan.denial is not None
    return draft.is_compute(host) or (host in draft.policy.hosts and (ways_out or begun))


def _follow_lease(draft: Draft, host: HostId, able: list[HostId]) -> None:
    """New terms only after the host has confirmed the last ones: so it keeps to one of two."""
    plan, seen = draft.hosts[host], draft.observed.host(host)
    kept = seen.standing.terms if seen is not None and seen.standing is not None else None
    wanted = _wanted_terms(draft, host, able)
    told = wanted if kept == plan.lease and plan.denial is None else plan.lease
    if (told, kept) == (plan.lease, plan.lease_kept):
        return
    draft.hosts[host] = msgspec.structs.replace(plan, lease=told, lease_kept=kept)
    if told != plan.lease:
        by = f"a lease of {', '.join(told.members)}" if told else "no lease"
        draft.change(f"{host} is to run by {by} what shall be restarted")


def _able_to_lease(draft: Draft) -> list[HostId]:
    """Hosts whose agents know of leases; none where there is nothing that needs one."""
    if not draft.gateways and not _restarts(draft):
        return []
    return [h for h in sorted(draft.hosts) if (s := draft.observed.host(h)) and s.standing is not None]


def _restarts(draft: Draft) -> bool:
    return any(s.on_host_failure is OnHostFailure.RESTART for s in draft.policy.servers.values())


def _wanted_terms(draft: Draft, host: HostId, able: list[HostId]) -> LeaseTerms | None:
    if len(able) < FEWEST_MEMBERS or host not in able:
        return None
    if draft.is_compute(host) and not _restarts(draft):
        return None
    before = draft.hosts[host].lease
    members = before.members if before is not None else ()
    if len(members) != min(MEMBERS, len(able)) or not set(members) <= set(able):
        members = _members(draft, host, able)
    return LeaseTerms(members=members, seconds=draft.policy.lease_seconds)


def _members(draft: Draft, host: HostId, able: list[HostId]) -> tuple[HostId, ...]:
    """Itself, and others: those that do not fail with it first, everybody in turn."""
    at = able.index(host)
    others = [*able[at + 1 :], *able[:at]]
    specs = draft.policy.hosts
    domain = specs[host].domain
    others.sort(key=lambda h: bool(domain) and h in specs and specs[h].domain == domain)
    return tuple(sorted([host, *others[: MEMBERS - 1]]))


def _take_back(draft: Draft, host: HostId) -> None:
    """It has to know what it was passed over for before it is granted anything."""
    plan, passed = draft.hosts[host], draft.passed_over.get(host, {})
    if plan.denial is None and not plan.fenced and not passed:
        return
    unaware = [
        server
        for server, epoch in sorted(passed.items())
        if (status := draft.observed.server_on(server, host)) is not None and status.epoch < epoch
    ]
    if unaware:
        named = ", ".join(unaware)
        draft.wait(host, WaitKind.HOST, f"{host} is back and has to learn that it lost {named}")
        return
    draft.passed_over.pop(host, None)
    draft.hosts[host] = msgspec.structs.replace(plan, denial=None, fenced="")
    draft.change(f"{host} is back")


def _look_into(draft: Draft, host: HostId) -> None:
    plan, off = draft.hosts[host], draft.policy.off.get(host)
    concerned = _to_restart(draft, host)
    ways_out = sorted(router for router, place in draft.gateways.items() if place.host == host)
    if plan.fenced or (not concerned and not ways_out and off is None):
        return
    terms = may_keep(plan)
    if off is None and not terms and host not in draft.policy.power:
        remedy = f"see to it that {host} is off, then say so: nahtlos host fence {host}"
        draft.wait(host, WaitKind.OPERATOR, _unprovable(host, [*concerned, *ways_out]), remedy)
        return
    if plan.denial is None:
        if off is None and (heard := _still_heard(draft, host, terms)):
            draft.wait(host, WaitKind.HOST, f"{host} is cut off from the orchestrator only: {heard}")
            return
        plan = _deny(draft, host)
    if why := proof(draft.policy, draft.observed.inventory, host, plan):
        draft.hosts[host] = msgspec.structs.replace(plan, fenced=why)
        draft.change(f"{host} has failed and is fenced: {why}")
        return
    draft.wait(host, WaitKind.HOST, _pending(draft, host, plan))


def _unprovable(host: HostId, concerned: list[str]) -> str:
    named = ", ".join(concerned)
    return f"{host} is lost, and nothing but its power tells whether {named} still runs there"


def _still_heard(draft: Draft, host: HostId, terms: Iterable[LeaseTerms]) -> str:
    """Why the host may well hold its lease; empty if it does not."""
    for each in terms:
        hearing = [m for m in each.members if m != host and _hears(draft, m, host)]
        if len(hearing) + 1 >= majority(len(each.members)):
            return f"{', '.join(hearing)} still hear it, and its servers run on"
    return ""


def _hears(draft: Draft, member: HostId, host: HostId) -> bool:
    seen = draft.observed.host(member)
    standing = seen.standing if seen is not None and draft.observed.connected(member) else None
    return standing is not None and host in standing.heard


def _deny(draft: Draft, host: HostId) -> HostPlan:
    plan, term = draft.hosts[host], draft.hosts[host].denial_terms + 1
    denial = Denial(host=host, term=term, seconds=denial_seconds(_told(plan)))
    plan = draft.hosts[host] = msgspec.structs.replace(plan, denial=denial, denial_terms=term)
    draft.change(f"{host} is lost: it is denied its lease")
    return plan


def _pending(draft: Draft, host: HostId, plan: HostPlan) -> str:
    assert plan.denial is not None, f"{host} is not denied"
    inventory = draft.observed.inventory
    promised, ripe = denying(inventory, plan.denial), denying(inventory, plan.denial, ripe=True)
    if is_silenced(inventory, plan):
        return f"{host} is lost; its lease may still run ({len(ripe)} of {len(promised)} say it is over)"
    missing = sorted({m for t in _told(plan) for m in t.members} - promised - {host})
    return f"{host} is lost; that it gets no lease must be promised by more of {', '.join(missing)}"


# --- its servers -------------------------------------------------------------------------------------


def _to_restart(draft: Draft, host: HostId) -> list[ServerId]:
    """Those that shall be, most urgent first."""

    def urgency(server: ServerId) -> tuple[int, int, str]:
        spec = draft.policy.servers[server]
        return -spec.restart_priority, -spec.size.memory_mib, server

    found = (
        server
        for server, owner in draft.servers.items()
        if owner.host == host
        and server not in draft.off
        and (spec := draft.policy.servers.get(server)) is not None
        and spec.on_host_failure is OnHostFailure.RESTART
    )
    return sorted(found, key=urgency)


def restart_failed(draft: Draft) -> None:
    fenced = [host for host, plan in sorted(draft.hosts.items()) if plan.fenced]
    waiting = [s for host in fenced if not draft.observed.connected(host) for s in _to_restart(draft, host)]
    waiting.sort(key=lambda server: -draft.policy.servers[server].restart_priority)
    for server in waiting:
        host = draft.servers[server].host
        if _is_just_settled(draft, server):
            continue
        if why := _why_not(draft, server, host):
            draft.waiting.append(why)
            continue
        hosts = _able(draft)
        place = _place(draft, server, hosts)
        if place is None:
            nowhere = why_nowhere(draft, server, hosts)
            reason = f"{server} is not restarted: {nowhere.reason}"
            draft.wait(server, WaitKind.CAPACITY, reason, nowhere.remedy or "free or add capacity")
        else:
            _restart(draft, server, host, place)


def _is_just_settled(draft: Draft, server: ServerId) -> bool:
    """A move of it was seen to end in this very step, well or not: one change of a server after the other, so
    that each is explained by what was seen."""
    parent = draft.parent
    if parent is None or parent.servers.get(server) != draft.servers[server]:
        return True
    ended = (m for m in parent.moves if m.server == server and not m.in_place)
    return any(m.id not in draft.moves for m in ended)


def _why_not(draft: Draft, server: ServerId, host: HostId) -> Waiting | None:
    """Why `server` is not restarted although `host`, which has it, is fenced."""
    move, status = draft.moving.get(server), draft.observed.server_on(server, host)
    if move is not None and not move.in_place:
        other = move.destination if move.source == host else move.source
        text = f"{server} is not restarted before {other} has ended {move.id}"
        return Waiting(subject=server, kind=WaitKind.MOVE, reason=text)
    if status is None or not status.under_lease:
        text = f"{server} is not restarted: {host} has never said that it runs it only under a lease"
        return Waiting(
            subject=server,
            kind=WaitKind.BLOCKED,
            reason=text,
            remedy=f"bring {host} back; nothing else is safe",
        )
    return _why_no_disks(draft, server, host)


def _why_no_disks(draft: Draft, server: ServerId, host: HostId) -> Waiting | None:
    for name in draft.policy.servers[server].all_volumes:
        volume = draft.policy.volumes.get(name)
        if volume is None or volume.backend is not StorageBackend.EMBEDDED:
            continue
        if task := task_of(draft, name):
            text = f"{server} is not restarted during {task.id} of {name}"
            return Waiting(subject=server, kind=WaitKind.MOVE, reason=text)
        current = volume.current
        if not any(draft.observed.connected(at) for at in current):
            which = "the only copy" if current == (host,) else "every current copy"
            where = ", ".join(current) or "no host"
            return Waiting(
                subject=server,
                kind=WaitKind.BLOCKED,
                reason=f"{server} is not restarted: {which} of {name} is on {where}",
                remedy=f"bring {' or '.join(current) or host} back",
            )
    return None


def _able(draft: Draft) -> list[HostId]:
    """Hosts that take servers now, and whose agents know that this is a new life of one."""
    hosts = open_hosts(draft)
    return [h for h in hosts if (seen := draft.observed.host(h)) is not None and seen.standing is not None]


def _place(draft: Draft, server: ServerId, hosts: list[HostId]) -> HostId | None:
    """Where its disks are, if there is room; it boots anew, so any release that has its machine will do."""
    near, size = draft.volume_hosts(server), draft.size(server)
    fitting = [
        host
        for host in hosts
        if size.fits(draft.rooms.free(host))
        and draft.can_run(server, draft.hosts[host].release)
        and draft.policy.pins.get(server, host) == host
        and not draft.neighbours.why_not(server, host, draft.servers[server].host)
    ]
    return min(fitting, key=lambda h: (h not in near, -draft.rooms.free_share(h), h), default=None)


def _restart(draft: Draft, server: ServerId, host: HostId, place: HostId) -> None:
    owner, move = draft.servers[server], draft.moving.get(server)
    status: ServerStatus | None = draft.observed.server_on(server, host)
    known = [owner.epoch, move.epoch if move else 0, status.epoch if status else 0]
    if move is not None:
        draft.drop_move(move)
    epoch = max(known) + 1
    draft.servers[server] = Assignment(server=server, host=place, epoch=epoch)
    draft.rooms.take(place, draft.size(server))
    draft.neighbours.leave(host, server)
    draft.neighbours.take(place, server)
    draft.passed_over[host] = {**draft.passed_over.get(host, {}), server: epoch}
    draft.attempts.pop(server, None)
    draft.failed_moves.pop(server, None)
    draft.change(f"{server} is restarted on {place}, as {host} has failed")
