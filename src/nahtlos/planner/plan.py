"""The planner's table of contents.

    policy (what people want) + inventory (what was seen) + parent (what was decided) -> next blueprint

Pure: no clock, no chance, no I/O; the same input gives the same blueprint. Planning a converged world
again returns the parent itself. A step not taken is in the report, with a reason.
"""

from nahtlos.model.blueprint import Blueprint, PlanReport, Policy
from nahtlos.model.inventory import Inventory
from nahtlos.planner.capacity import capacity_report, count_rooms
from nahtlos.planner.check import check
from nahtlos.planner.draft import Draft
from nahtlos.planner.evacuate import evacuate_hosts
from nahtlos.planner.failure import restart_failed, review_failures
from nahtlos.planner.gateways import plan_gateways
from nahtlos.planner.hosts import settle_hosts, verify_switching_hosts
from nahtlos.planner.in_place import replace_requested
from nahtlos.planner.moves import forget_old_failures
from nahtlos.planner.outcome import absorb_outcomes
from nahtlos.planner.place import forget_removed_servers, place_new_servers
from nahtlos.planner.power import carry_stopped, settle_power, start_stopped
from nahtlos.planner.requested import serve_requests
from nahtlos.planner.upgrade import advance_campaign, review_campaign
from nahtlos.planner.volumes import plan_volumes


def plan(policy: Policy, inventory: Inventory, parent: Blueprint | None) -> tuple[Blueprint, PlanReport]:
    """The next blueprint, or `parent` itself if nothing changes. No parent: the cloud's first blueprint."""
    draft = Draft(policy, inventory, parent)
    absorb_outcomes(draft)
    forget_removed_servers(draft)
    settle_hosts(draft)
    settle_power(draft)
    review_failures(draft)
    count_rooms(draft)
    review_campaign(draft)
    restart_failed(draft)
    start_stopped(draft)
    place_new_servers(draft)
    serve_requests(draft)
    replace_requested(draft)
    advance_campaign(draft)
    verify_switching_hosts(draft)
    evacuate_hosts(draft)
    carry_stopped(draft)
    plan_volumes(draft)
    plan_gateways(draft)
    forget_old_failures(draft)
    blueprint = draft.finish()
    check(policy, inventory, parent, blueprint)
    return blueprint, _report(draft, blueprint)


def _report(draft: Draft, blueprint: Blueprint) -> PlanReport:
    changed = blueprint is not draft.parent
    moves = (*blueprint.moves, *blueprint.gateway_moves)
    tasks = (*moves, *blueprint.verifies, *blueprint.volume_tasks)
    idle = not tasks and not draft.waiting
    return PlanReport(
        changes=tuple(draft.changes) if changed else (),
        waiting=tuple(dict.fromkeys(draft.waiting)),
        capacity=capacity_report(draft),
        converged=idle and not changed,
    )
