"""What operators see, put together from the state of the store and a plan. Pure."""

from nahtlos.model.blueprint import (
    Blueprint,
    CapacityReport,
    HostPhase,
    OperationRecord,
    PlanReport,
)
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import ComputeStatus, Inventory, OperationStatus, ServerStatus
from nahtlos.model.nouns import Assignment, Size
from nahtlos.runtime.controllers.cloud import CampaignView, HostView, ServerView
from nahtlos.runtime.controllers.outcomes import DONE
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_views import kept_volumes
from nahtlos.runtime.store.campaigns import CampaignRow

NOTHING = PlanReport(
    changes=(),
    waiting=(),
    capacity=CapacityReport(promised=Size(), in_service=Size(), share=1.0),
    converged=False,
)
"""Before anything was planned."""


def host_view(state: State, inventory: Inventory, host: HostId, *, whole: bool) -> HostView:
    row, seen = state.hosts[host], inventory.hosts.get(host)
    plan = state.blueprint.hosts.get(host) if state.blueprint else None
    assigned = servers_on(state.blueprint, host)
    off = state.blueprint.off if state.blueprint else {}
    return HostView(
        id=host,
        role=row.spec.role,
        address=row.spec.address,
        intent=row.intent,
        phase=plan.phase if plan else HostPhase.SWITCHING,
        connected=host in inventory.connected,
        release=plan.release if plan else None,
        verified_release=seen.verified_release if seen else None,
        accelerator=seen.accelerator if seen else None,
        capacity=seen.capacity if seen else Size(),
        used=sum(
            (state.servers[s].spec.size for s in assigned if s in state.servers and s not in off), Size()
        ),
        servers=assigned,
        generation=seen.generation if seen else 0,
        target_generation=state.configs[host].generation if host in state.configs else 0,
        seen_at=state.received.get(host),
        domain=row.spec.domain,
        kept=kept_volumes(state, inventory, host),
        failure=_failure(state, inventory, host),
        inventory=seen if whole else None,
    )


def _failure(state: State, inventory: Inventory, host: HostId) -> str:
    plan = state.blueprint.hosts.get(host) if state.blueprint else None
    if plan is not None and plan.denial is not None:
        if host in inventory.connected:
            return "back"
        return f"fenced: {plan.fenced}" if plan.fenced else "denied its lease"
    return "lost" if host not in inventory.connected and host in state.policy().lost else ""


def servers_on(blueprint: Blueprint | None, host: HostId) -> tuple[ServerId, ...]:
    owned = blueprint.servers if blueprint else {}
    return tuple(sorted(server for server, assignment in owned.items() if assignment.host == host))


def server_view(state: State, inventory: Inventory, report: PlanReport, server: ServerId) -> ServerView:
    row = state.servers[server]
    blueprint = state.blueprint
    assignment = blueprint.servers.get(server) if blueprint else None
    move = next((m for m in (blueprint.moves if blueprint else ()) if m.server == server), None)
    seen = _observed(inventory, server)
    status = seen[1] if seen else None
    spec, volume = row.spec, state.volumes.get(row.spec.volume)
    port = spec.ports[0] if spec.ports else None
    return ServerView(
        id=server,
        host=seen[0] if seen else assignment.host if assignment else None,
        epoch=status.epoch if status else assignment.epoch if assignment else 0,
        state=status.state if status else None,
        release=status.release if status else None,
        size=spec.size,
        ip=port.ip if port else "",
        mac=port.mac if port else "",
        volume_host=volume.spec.host if volume else HostId(""),
        moving_to=move.destination if move and not move.in_place else None,
        blackout_budget_ms=row.spec.blackout_budget_ms,
        allow_slowdown=row.spec.allow_slowdown,
        allow_post_copy=row.spec.allow_post_copy,
        dirty_rate=status.dirty_rate if status else None,
        display=row.spec.display,
        on_host_failure=row.spec.on_host_failure,
        restart_priority=row.spec.restart_priority,
        replaced_by=move.release if move else row.replace_by,
        waits_for=_waits_for(report, server, removed=row.removed_at is not None),
        created_at=row.created_at,
        project=spec.project,
        ports=tuple(each.id for each in spec.ports),
        cpu=spec.cpu,
        data_places=spec.data_places,
        max_vcpus=spec.max_vcpus,
        boot_memory_mib=spec.boot_memory_mib,
        max_memory_mib=spec.max_memory_mib,
        compute=status.compute if status else ComputeStatus(),
        guest_agent=spec.guest_agent,
        guest=status.guest if status else None,
        bandwidth={each.id: each.bandwidth for each in spec.ports},
        limits={v: state.volumes[v].spec.limits for v in spec.all_volumes if v in state.volumes},
        power=spec.power,
        power_pending=status is None or status.power != spec.power.serial,
        converged=assignment is not None and has_converged(state, inventory, assignment),
        group=row.group,
        pin=row.pin,
    )


def has_converged(state: State, inventory: Inventory, assignment: Assignment) -> bool:
    """Whether the server's host has come to a configuration in which the server is as it is asked for now."""
    config, seen = state.configs.get(assignment.host), inventory.hosts.get(assignment.host)
    if config is None or seen is None or seen.generation < config.generation:
        return False
    told = next((each for each in config.servers if each.spec.id == assignment.server), None)
    return (
        told is not None
        and told.epoch == assignment.epoch
        and told.spec == state.servers[assignment.server].spec
        and all(
            each.limits == state.volumes[each.volume].spec.limits
            for each in told.all_volumes
            if each.volume in state.volumes
        )
    )


def _observed(inventory: Inventory, server: ServerId) -> tuple[HostId, ServerStatus] | None:
    """Where it runs: of all that report it, the one that owns it by the highest epoch. A VMM that merely
    waits for it owns nothing yet."""
    copies = [
        (host, status)
        for host, seen in inventory.hosts.items()
        for status in seen.servers
        if status.id == server and status.state.value != "incoming"
    ]
    return max(copies, key=lambda copy: copy[1].epoch, default=None)


def _waits_for(report: PlanReport, server: ServerId, *, removed: bool) -> str:
    if removed:
        return "is being deleted"
    return "; ".join(w.reason for w in report.waiting if w.subject == server)


def campaign_view(
    state: State,
    inventory: Inventory,
    report: PlanReport,
    row: CampaignRow,
    records: tuple[OperationRecord, ...],
) -> CampaignView:
    moves = [r for r in records if r.kind == "move"]
    done = sum(r.state == DONE for r in moves)
    current = state.campaign is not None and state.campaign.campaign.id == row.campaign.id
    return CampaignView(
        campaign=row.campaign,
        hosts_total=len(row.campaign.hosts),
        hosts_upgraded=row.hosts_upgraded,
        moves_done=done,
        moves_failed=len(moves) - done,
        moves_total_forecast=row.moves_forecast,
        running=_running(state.blueprint, inventory) if current else (),
        waiting=report.waiting if current else (),
        capacity=report.capacity,
        capacity_floor=row.capacity_floor,
        operations=records,
    )


def _running(blueprint: Blueprint | None, inventory: Inventory) -> tuple[OperationStatus, ...]:
    """One status of each operation of the blueprint: of a move its source's, which knows how far it is."""
    if blueprint is None:
        return ()
    asked = [(m.id, (m.source, m.destination)) for m in blueprint.moves]
    asked += [(v.id, (v.host,)) for v in blueprint.verifies]
    asked += [(g.id, (g.source, g.destination)) for g in blueprint.gateway_moves]
    found: list[OperationStatus] = []
    for operation, hosts in asked:
        seen = [inventory.hosts[h] for h in hosts if h in inventory.hosts]
        statuses = [o for i in seen for o in i.operations if o.id == operation]
        found += statuses[:1]
    return tuple(found)
