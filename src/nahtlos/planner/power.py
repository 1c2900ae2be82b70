"""Servers that are not to run: when their room is free, where they are kept, when they run again.

    runs --asked to stop, and seen stopped by that request--> off --asked to run, and there is room--> runs

`Blueprint.off` names those that are off. Such a server holds no room, and whoever owns it is told to leave
it off, whatever is asked for meanwhile; so it can be given to another host by a decision alone, without an
operation: nothing of it runs anywhere, and nothing can begin to until a blueprint lets it. What makes that
sound is the number of the request: a host that was told to run the server by a newer request than the one it
was seen to have carried out is not believed to have stopped it.
"""

from collections import Counter

from nahtlos.model.blueprint import HostPhase, Waiting, WaitKind
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import OperationKind, RunState, ServerStatus
from nahtlos.model.nouns import Assignment, ServerSpec
from nahtlos.model.power import PowerState, SavedState
from nahtlos.model.version_pairs import Pair, Verdict, Way, pair_for
from nahtlos.model.volume_work import PlannedVolumeTask, Reverting, volumes_of
from nahtlos.planner.destinations import choose, open_hosts, why_nowhere
from nahtlos.planner.draft import Draft
from nahtlos.planner.reserve import KEEP, why_placing_breaks

OPERATIONS = (OperationKind.STOP, OperationKind.REBOOT, OperationKind.SUSPEND, OperationKind.RESUME)
PENDING = {
    PowerState.ON: "is to run, or to boot anew",
    PowerState.OFF: "is to stop",
    PowerState.SUSPENDED: "is to be suspended",
}
STARTS_ON = (HostPhase.SERVING, HostPhase.CORDONED)


def settle_power(draft: Draft) -> None:
    """What was seen of servers that were asked to stop, to be suspended, or to go on."""
    for server in (*draft.off, *draft.saved):
        if server not in draft.servers:
            draft.off.pop(server, None)
            draft.saved.pop(server, None)
    for server in sorted(draft.servers):
        spec = draft.policy.servers.get(server)
        if spec is None or server in draft.moving:
            continue
        if server in draft.off:
            _give_up_saved(draft, spec)
        elif status := _carried_out(draft, spec):
            _note(draft, spec, status)
        elif pending := _why_pending(draft, spec):
            draft.waiting.append(pending)


def _carried_out(draft: Draft, spec: ServerSpec) -> ServerStatus | None:
    """What its owner says of it, if it has carried out the newest request."""
    owner = draft.servers[spec.id]
    status = draft.observed.server_on(spec.id, owner.host)
    if status is None or status.epoch != owner.epoch or status.power != spec.power.serial:
        return None
    return status


def _why_pending(draft: Draft, spec: ServerSpec) -> Waiting | None:
    """Why the newest request is not carried out yet, as its owner tells."""
    seen = draft.observed.host(draft.servers[spec.id].host)
    if seen is None or not spec.power.serial or "power" not in seen.knows:
        return None
    told = [o for o in seen.operations if o.server == spec.id and o.kind in OPERATIONS]
    text = f"{spec.id} {PENDING[spec.power.state]}"
    if not told:
        return Waiting(subject=spec.id, kind=WaitKind.HOST, reason=text)
    last = max(told, key=lambda operation: operation.times.get("begin", 0.0))
    if last.error is not None:
        reason = f"{text}; the last attempt was undone: {last.error.message}"
        return Waiting(subject=spec.id, kind=WaitKind.BLOCKED, reason=reason, remedy=last.error.remedy)
    waits = f": waits for {last.waits_for}" if last.waits_for else ""
    return Waiting(subject=spec.id, kind=WaitKind.HOST, reason=f"{text}{waits}")


def _note(draft: Draft, spec: ServerSpec, status: ServerStatus) -> None:
    server, asked = spec.id, spec.power.state
    if asked is PowerState.OFF and status.state is RunState.STOPPED:
        draft.off[server] = spec.power.serial
        draft.saved.pop(server, None)
        draft.change(f"{server} is stopped")
    elif asked is PowerState.SUSPENDED and status.state is RunState.SUSPENDED and status.saved is not None:
        draft.off[server] = spec.power.serial
        draft.saved[server] = status.saved
        draft.change(f"{server} is suspended")
    elif asked is PowerState.ON and status.state is RunState.RUNNING and server in draft.saved:
        del draft.saved[server]


def _give_up_saved(draft: Draft, spec: ServerSpec) -> None:
    if spec.power.state is PowerState.OFF and spec.id in draft.saved:
        del draft.saved[spec.id]
        draft.off[spec.id] = spec.power.serial
        draft.change(f"{spec.id} is stopped; what was saved of it is given up")


# --- they run again ------------------------------------------------------------------------------------


def start_stopped(draft: Draft) -> None:
    """Where they are if there is room, else wherever there is."""
    for server in sorted(draft.off):
        spec = draft.policy.servers.get(server)
        if spec is None or spec.power.state is not PowerState.ON:
            continue
        if task := _reverted(draft, spec):
            draft.wait(server, WaitKind.MOVE, f"{server} runs again once {task.id} has ended")
            continue
        if back := memory_of_snapshot(spec):
            draft.saved[server] = back
        serial = draft.off.pop(server)
        host = _place(draft, server)
        if host is None:
            draft.waiting.append(_why_not(draft, spec))
            draft.off[server] = serial
            continue
        if broken := why_placing_breaks(draft, server, host):
            draft.wait(server, WaitKind.CAPACITY, f"{server} is not to run again yet: {broken}", KEEP)
            draft.off[server] = serial
            continue
        if host != draft.servers[server].host:
            _give(draft, server, host)
        draft.rooms.take(host, draft.size(server))
        draft.neighbours.take(host, server)
        draft.change(f"{server} runs again on {host}")


def memory_of_snapshot(spec: ServerSpec) -> SavedState | None:
    """What it is to go on from because it goes back to a snapshot: once all of its disks are what they were,
    and unless a boot was asked for since."""
    back = spec.going_back
    if back is None or back.left or spec.power.boot > back.saved.serial:
        return None
    return back.saved


def _reverted(draft: Draft, spec: ServerSpec) -> PlannedVolumeTask | None:
    """What changes one of its disks under it."""
    tasks = (t for t in draft.volume_tasks.values() if isinstance(t.work, Reverting))
    return next((t for t in tasks if set(volumes_of(t.work)) & set(spec.all_volumes)), None)


def _place(draft: Draft, server: ServerId) -> HostId | None:
    host = draft.servers[server].host
    plan = draft.hosts.get(host)
    here = plan is not None and plan.phase in STARTS_ON and draft.observed.connected(host)
    fits = here and draft.size(server).fits(draft.rooms.free(host))
    if fits and _refused(draft, server, host) is None and _may_run(draft, server, host):
        return host
    if server not in draft.off_before:
        return None
    others = [each for each in open_hosts(draft, without=host) if _refused(draft, server, each) is None]
    return choose(draft, server, others)


def _may_run(draft: Draft, server: ServerId, host: HostId) -> bool:
    """Whether its group and its pin let it run where it is kept."""
    return draft.policy.pins.get(server, host) == host and not draft.neighbours.why_not(server, host, None)


def _refused(draft: Draft, server: ServerId, host: HostId) -> Pair | None:
    """The row that forbids to let it go on there from what was saved."""
    saved = draft.saved.get(server)
    return None if saved is None or not goes_on(draft, server) else refused_resume(draft, saved, host)


def goes_on(draft: Draft, server: ServerId) -> bool:
    """From what was saved, and not by a boot."""
    spec, saved = draft.policy.servers.get(server), draft.saved.get(server)
    return spec is not None and saved is not None and spec.power.boot <= saved.serial


def refused_resume(draft: Draft, saved: SavedState, host: HostId) -> Pair | None:
    plan, versions = draft.hosts.get(host), draft.policy.release_versions
    release = plan.release if plan else None
    old, new = versions.get(saved.release), versions.get(release) if release is not None else None
    return refused_pair(saved, old, new)


def refused_pair(saved: SavedState, old: str | None, new: str | None) -> Pair | None:
    """By versions, as far as they are known: what was saved by `old` cannot be loaded by `new`."""
    if old is None or new is None:
        return None
    # Loaded as in place: whole, of a guest that stands still.
    pair = pair_for(Way.IN_PLACE, old, new, saved.accelerator)
    return pair if pair.verdict is Verdict.REFUSED else None


def _why_not(draft: Draft, spec: ServerSpec) -> Waiting:
    host = draft.servers[spec.id].host
    if pair := _refused(draft, spec.id, host):
        return Waiting(
            subject=spec.id,
            kind=WaitKind.BLOCKED,
            reason=f"{spec.id} cannot go on from what was saved: {pair}",
            remedy="give a host a release it can go on by, or stop it for good: "
            f"nahtlos server stop {spec.id} --hard",
        )
    others = open_hosts(draft, without=host)
    nowhere = why_nowhere(draft, spec.id, [*others, host] if host in draft.hosts else others)
    reason, remedy = f"{spec.id} is to run again: {nowhere.reason}", nowhere.remedy or "free or add room"
    return Waiting(subject=spec.id, kind=WaitKind.CAPACITY, reason=reason, remedy=remedy)


# --- they are kept elsewhere -----------------------------------------------------------------------------


def carry_stopped(draft: Draft) -> None:
    """Off hosts that are drained. A campaign leaves them where they are: there is nothing to replace."""
    for server in sorted(draft.off.keys() & draft.off_before):
        host = draft.servers[server].host
        plan = draft.hosts.get(host)
        if plan is not None and plan.phase is HostPhase.EMPTYING and host != draft.upgrading:
            carry(draft, server, open_hosts(draft, without=host))


def carry(draft: Draft, server: ServerId, hosts: list[HostId]) -> HostId | None:
    """To the one of `hosts` that keeps fewest; None, and why, if it cannot be now."""
    host = draft.servers[server].host
    pin = draft.policy.pins.get(server)
    able = [h for h in hosts if draft.can_run(server, draft.hosts[h].release) and draft.is_told(server, h)]
    able = [h for h in able if pin in (None, h)]
    if not able or server not in draft.off_before:
        draft.wait(server, WaitKind.HOST, f"no host that could keep {server}, which is off, is in service")
        return None
    kept = Counter(draft.servers[each].host for each in draft.off)
    place = min(able, key=lambda each: (kept[each], -draft.rooms.free_share(each), each))
    _give(draft, server, place)
    draft.change(f"{server}, which is off, is kept by {place} instead of {host}")
    return place


def _give(draft: Draft, server: ServerId, host: HostId) -> None:
    owner = draft.servers[server]
    draft.servers[server] = Assignment(server=server, host=host, epoch=owner.epoch + 1)
