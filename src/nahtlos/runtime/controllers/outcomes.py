"""What the step from one blueprint to the next means for operations and for people. Pure.

An operation that appears is recorded as running, one that is gone as ended, in the transaction that makes
the step. Events say the same in words.
"""

from collections.abc import Iterable, Mapping

import msgspec

from nahtlos.model.blackout import woke_ms
from nahtlos.model.blueprint import (
    Blueprint,
    HostPlan,
    OperationRecord,
    PlannedGatewayMove,
    PlannedMove,
    PlannedVerify,
    Policy,
)
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, OperationId, ReleaseId, ServerId
from nahtlos.model.inventory import Inventory, OperationKind, OperationState, OperationStatus
from nahtlos.model.nouns import ServerSpec
from nahtlos.model.prediction import Means, Sample
from nahtlos.planner.draft import Draft
from nahtlos.planner.estimate import PRE_COPIES
from nahtlos.planner.foretell import prediction
from nahtlos.runtime.controllers.failures import announced_failures
from nahtlos.runtime.store.events import EventDraft

RUNNING = OperationState.RUNNING.value
DONE = OperationState.DONE.value
UNDONE = OperationState.UNDONE.value
GATEWAY = OperationKind.GATEWAY.value
REPLACE = OperationKind.REPLACE.value

# Steps by the clocks of the two hosts, as the agents name them in the times of a move.
STOPPED_AT_SOURCE = "stopped"
RUNNING_AT_DESTINATION = "running"

# What the source of a move measured, bytes a second.
DIRTY_RATE = "dirty_rate"
LINK = "link"
MEANS = "means"
"""How it was carried in the end, where it is not how it was meant."""


def begun(
    parent: Blueprint | None, blueprint: Blueprint, policy: Policy, seen: Inventory
) -> list[OperationRecord]:
    """Records of the operations that `blueprint` has and `parent` had not."""
    before = _ids(parent)
    draft = Draft(policy, seen, blueprint)
    campaign = policy.campaign.id if policy.campaign else None
    records = [
        OperationRecord(
            id=move.id,
            kind=kind_of(move),
            subject=move.server,
            state=RUNNING,
            source=move.source,
            destination=move.destination,
            reason=move.reason,
            campaign=campaign,
            release_before=_release_of(seen, move.source, move.server, move.epoch - 1)
            or _planned_release(parent, move.source),
            predicted=prediction(draft, move),
        )
        for move in blueprint.moves
        if move.id not in before
    ]
    records += [
        OperationRecord(
            id=verify.id,
            kind="verify",
            subject=verify.host,
            state=RUNNING,
            destination=verify.host,
            reason=f"before {verify.host} is given servers under {verify.release}",
            campaign=campaign,
            release_after=verify.release,
        )
        for verify in blueprint.verifies
        if verify.id not in before
    ]
    records += [
        OperationRecord(
            id=gateway.id,
            kind=GATEWAY,
            subject=gateway.router,
            state=RUNNING,
            source=gateway.source,
            destination=gateway.destination,
            reason=gateway.reason,
        )
        for gateway in blueprint.gateway_moves
        if gateway.id not in before
    ]
    return records


def kind_of(move: PlannedMove) -> str:
    return (OperationKind.REPLACE if move.in_place else OperationKind.MOVE).value


def ended(
    parent: Blueprint | None,
    blueprint: Blueprint,
    seen: Inventory,
    known: Mapping[OperationId, OperationRecord],
) -> list[OperationRecord]:
    """Records, complete, of the operations that `parent` had and `blueprint` has not."""
    if parent is None:
        return []
    after = _ids(blueprint)
    moves = [_ended_move(m, blueprint, seen, known.get(m.id)) for m in parent.moves if m.id not in after]
    verifies = [_ended_verify(v, seen, known.get(v.id)) for v in parent.verifies if v.id not in after]
    gateways = [
        _ended_gateway(g, blueprint, seen, known.get(g.id)) for g in parent.gateway_moves if g.id not in after
    ]
    return moves + verifies + gateways


def left(parent: Blueprint | None, blueprint: Blueprint) -> tuple[OperationId, ...]:
    """Operations that `parent` had and `blueprint` has not."""
    after = _ids(blueprint)
    return tuple(sorted(_ids(parent) - after))


def stray_record(status: OperationStatus, host: HostId) -> OperationRecord:
    """The end of an operation that no blueprint names (any more)."""
    return OperationRecord(
        id=status.id,
        kind=status.kind.value,
        subject=status.server or host,
        state=status.state.value,
        error=status.error,
        times=status.times,
        reason="known from its host alone",
        result=status.result,
    )


def sample_of(record: OperationRecord, spec: ServerSpec) -> Sample | None:
    """What can be learned from a move or a replacement; None if it did not end well, or was not seen from
    both sides."""
    times = record.times.values()
    if record.state != DONE:
        return None
    stopped = record.times.get(STOPPED_AT_SOURCE)
    running = record.times.get(RUNNING_AT_DESTINATION)
    if stopped is None or running is None or running <= stopped:
        return None
    return Sample(
        means=_means(record),
        server=spec.id,
        memory_mib=spec.size.memory_mib,
        devices=len(spec.ports) + len(spec.all_volumes),
        seconds=max(times) - min(times),
        pause_ms=(running - stopped) * 1000,
        from_release=record.release_before,
        to_release=record.release_after,
        dirty_rate=_measured(record, DIRTY_RATE),
        link=_measured(record, LINK) or 0,
        wake_ms=woke_ms(record.times),
        brownout_seconds=_brownout(record),
        blackout_budget_ms=spec.blackout_budget_ms,
    )


def _brownout(record: OperationRecord) -> float | None:
    """In place nothing is copied beforehand; after a switch to post-copy it is not over."""
    means = _means(record)
    if means is Means.IN_PLACE:
        return 0.0
    begun, switched = record.times.get("precopy"), record.times.get("switch")
    return switched - begun if means in PRE_COPIES and begun is not None and switched is not None else None


def _means(record: OperationRecord) -> Means:
    """As it was carried in the end, which may be another way than was meant."""
    taken = record.result.get(MEANS, "")
    if taken in [*Means]:
        return Means(taken)
    if record.predicted is not None:
        return record.predicted.means
    return Means.IN_PLACE if record.kind == REPLACE else Means.PRE_COPY


def _measured(record: OperationRecord, name: str) -> int | None:
    text = record.result.get(name, "")
    return int(text) if text.isdecimal() else None


# --- records -----------------------------------------------------------------------------------------


def _ids(blueprint: Blueprint | None) -> set[OperationId]:
    if blueprint is None:
        return set()
    return {o.id for o in (*blueprint.moves, *blueprint.verifies, *blueprint.gateway_moves)}


def _ended_move(
    move: PlannedMove, blueprint: Blueprint, seen: Inventory, known: OperationRecord | None
) -> OperationRecord:
    now = blueprint.servers.get(move.server)
    done = now is not None and now.epoch >= move.epoch and now.host == move.destination
    statuses = _statuses(seen, move.id, (move.source, move.destination))
    done = done or any(s.state is OperationState.DONE for s in statuses)
    record = known or OperationRecord(
        id=move.id,
        kind=kind_of(move),
        subject=move.server,
        state=RUNNING,
        source=move.source,
        destination=move.destination,
        reason=move.reason,
    )
    after = _release_of(seen, move.destination, move.server, move.epoch)
    return msgspec.structs.replace(
        record,
        state=DONE if done else UNDONE,
        error=None if done else _error(statuses),
        times=_times(statuses),
        result={name: text for status in statuses for name, text in status.result.items()},
        release_after=(move.release or after or _planned_release(blueprint, move.destination))
        if done
        else record.release_before,
    )


def _ended_gateway(
    move: PlannedGatewayMove, blueprint: Blueprint, seen: Inventory, known: OperationRecord | None
) -> OperationRecord:
    statuses = _statuses(seen, move.id, (move.source, move.destination))
    place = blueprint.gateways.get(move.router)
    done = place is not None and (place.host, place.epoch) == (move.destination, move.epoch)
    record = known or OperationRecord(
        id=move.id,
        kind=GATEWAY,
        subject=move.router,
        state=RUNNING,
        source=move.source,
        destination=move.destination,
        reason=move.reason,
    )
    return msgspec.structs.replace(
        record,
        state=DONE if done else UNDONE,
        error=None if done else _error(statuses),
        times=_times(statuses),
    )


def _ended_verify(verify: PlannedVerify, seen: Inventory, known: OperationRecord | None) -> OperationRecord:
    statuses = _statuses(seen, verify.id, (verify.host,))
    done = any(s.state is OperationState.DONE for s in statuses)
    record = known or OperationRecord(id=verify.id, kind="verify", subject=verify.host, state=RUNNING)
    return msgspec.structs.replace(
        record,
        state=DONE if done else UNDONE,
        error=None if done else _error(statuses),
        times=_times(statuses),
    )


def _statuses(seen: Inventory, operation: OperationId, hosts: Iterable[HostId]) -> list[OperationStatus]:
    inventories = [seen.hosts[host] for host in hosts if host in seen.hosts]
    return [o for inventory in inventories for o in inventory.operations if o.id == operation]


def _times(statuses: Iterable[OperationStatus]) -> dict[str, float]:
    """Of both sides; where they name a step alike, the first side's stays."""
    times: dict[str, float] = {}
    for status in statuses:
        times = {**status.times, **times}
    return times


def _error(statuses: Iterable[OperationStatus]) -> ErrorRecord | None:
    return next((s.error for s in statuses if s.error is not None), None)


def _release_of(seen: Inventory, host: HostId, server: ServerId, epoch: int) -> ReleaseId | None:
    inventory = seen.hosts.get(host)
    servers = inventory.servers if inventory else ()
    return next((s.release for s in servers if s.id == server and s.epoch == epoch), None)


def _planned_release(blueprint: Blueprint | None, host: HostId) -> ReleaseId | None:
    plan = blueprint.hosts.get(host) if blueprint else None
    return plan.release if plan else None


# --- words -------------------------------------------------------------------------------------------


def announcements(
    parent: Blueprint | None,
    blueprint: Blueprint,
    begun: Iterable[OperationRecord],
    ended: Iterable[OperationRecord],
) -> list[EventDraft]:
    drafts = [_announce_begin(record) for record in begun]
    drafts += [_announce_end(record) for record in ended]
    for host, plan in sorted(blueprint.hosts.items()):
        before = parent.hosts.get(host) if parent else None
        if before is None or before.phase is not plan.phase or before.release != plan.release:
            text = f"{host} is {plan.phase}" + (f", release {plan.release}" if plan.release else "")
            drafts.append(
                EventDraft(kind="host.phase", subject=host, text=text, data={"phase": plan.phase.value})
            )
        drafts += _announce_replacing(host, before, plan)
    drafts += announced_failures(parent, blueprint)
    for server, assignment in sorted(blueprint.servers.items()):
        if parent is None or server not in parent.servers:
            text = f"{server} is placed on {assignment.host}"
            drafts.append(
                EventDraft(kind="server.placed", subject=server, text=text, data={"host": assignment.host})
            )
    return drafts


def _announce_replacing(host: HostId, before: HostPlan | None, plan: HostPlan) -> list[EventDraft]:
    """What is replaced under servers is no operation: it begins and ends with the blueprint."""
    of = plan.replacing or (before.replacing if before else None)
    if before is None or of is None:
        return []
    if (before.replacing, before.release_of(of)) == (plan.replacing, plan.release_of(of)):
        return []
    release = plan.release_of(of) or "what it came with"
    begun = plan.replacing is not None
    kind, text = ("begun", f"is brought to {release}") if begun else ("ended", f"runs {release}")
    data: dict[str, str | int | float] = {"component": of.value, "release": release}
    return [EventDraft(kind=f"replace.{kind}", subject=host, text=f"{of} of {host} {text}", data=data)]


def _announce_begin(record: OperationRecord) -> EventDraft:
    if record.kind == REPLACE:
        text = f"{record.subject} is replaced on {record.source}: {record.reason}"
        return EventDraft(kind="replace.begun", subject=record.subject, text=text, data=_places(record))
    if record.kind == GATEWAY:
        text = f"the way out of {record.subject} moves from {record.source} to {record.destination}: "
        return EventDraft(
            kind="gateway.begun", subject=record.subject, text=text + record.reason, data=_places(record)
        )
    if record.kind != "move":
        text = f"{record.subject} verifies {record.release_after}"
        return EventDraft(
            kind="verify.begun", subject=record.subject, text=text, data={"operation": record.id}
        )
    text = f"{record.subject} moves from {record.source} to {record.destination}: {record.reason}"
    return EventDraft(kind="move.begun", subject=record.subject, text=text, data=_places(record))


def _announce_end(record: OperationRecord) -> EventDraft:
    why = f": {record.error.message}" if record.error else ""
    seconds = max(record.times.values()) - min(record.times.values()) if record.times else 0.0
    data: dict[str, str | int | float] = {**_places(record), "state": record.state, "seconds": seconds}
    if record.kind == REPLACE:
        how = f"runs {record.release_after}" if record.state == DONE else f"runs on as it was{why}"
        text = f"{record.subject} {how}, in place on {record.source}, after {seconds:.1f} s"
        return EventDraft(kind="replace.ended", subject=record.subject, text=text, data=data)
    if record.kind == GATEWAY:
        how = f"is at {record.destination}" if record.state == DONE else f"stays at {record.source}{why}"
        text = f"the way out of {record.subject} {how}"
        return EventDraft(kind="gateway.ended", subject=record.subject, text=text, data=data)
    if record.kind != "move":
        text = f"{record.subject} has verified {record.release_after}: {record.state}{why}"
        return EventDraft(kind="verify.ended", subject=record.subject, text=text, data=data)
    if record.state == DONE:
        text = f"{record.subject} has moved from {record.source} to {record.destination} in {seconds:.1f} s"
    else:
        text = f"{record.subject} stays on {record.source}, the move to {record.destination} was undone{why}"
    return EventDraft(kind="move.ended", subject=record.subject, text=text, data=data)


def _places(record: OperationRecord) -> dict[str, str | int | float]:
    data: dict[str, str | int | float] = {"operation": record.id}
    if record.source:
        data["from"] = record.source
    if record.destination:
        data["to"] = record.destination
    return data
