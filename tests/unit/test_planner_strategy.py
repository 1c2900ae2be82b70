"""How a campaign carries servers: strategy, table of version pairs, prediction, budget."""

import msgspec
import pytest
from planner_world import NEW, OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model.blueprint import CampaignState, Forecast, HostIntent, HostPhase, Strategy, WaitKind
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.inventory import Accelerator, OperationState
from nahtlos.model.nouns import Size
from nahtlos.model.prediction import Experience, Means
from nahtlos.planner.check import violations
from nahtlos.planner.estimate import MIB
from nahtlos.planner.predict import forecast
from nahtlos.planner.ways import NOT_CONVERGED

STUCK_COPY = ErrorRecord(kind="unavailable", message="pre-copy did not converge", field=NOT_CONVERGED)


def cloud_of(
    *layout: int, old: str = "10.0.2", new: str = "11.1.3", capacity: int = 1024, size: int = 256
) -> Cloud:
    cloud = running_cloud(layout, capacity, size)
    cloud.world.accelerator = Accelerator(name="tcg", reason="the only one here")
    cloud.want(release_versions={OLD: old, NEW: new})
    return cloud


def begin(cloud: Cloud, strategy: Strategy, state: CampaignState = CampaignState.RUNNING) -> None:
    cloud.campaign(state)
    campaign = cloud.policy.campaign
    assert campaign is not None
    cloud.want(campaign=msgspec.structs.replace(campaign, strategy=strategy))


def permit(cloud: Cloud, server: int, **changes: object) -> None:
    name = server_id(server)
    spec = msgspec.structs.replace(cloud.policy.servers[name], **changes)
    cloud.want(servers={**cloud.policy.servers, name: spec})


def busy(cloud: Cloud, server: int, dirty_mib: int, link_mib: int = 128) -> None:
    known = Experience(dirty_rates={server_id(server): dirty_mib * MIB}, link=link_mib * MIB)
    cloud.want(experience=known)


def ways_taken(cloud: Cloud) -> set[bool]:
    """In place or not, of all that were begun."""
    return {move.in_place for blueprint in cloud.history for move in blueprint.moves}


def dry_run(cloud: Cloud, strategy: Strategy = Strategy.AUTO) -> Forecast:
    return forecast(cloud.policy, cloud.world.look(), cloud.now, NEW, strategy=strategy)


def upgraded(cloud: Cloud) -> bool:
    hosts = cloud.now.hosts.values()
    switched = all(plan.release == NEW and plan.phase is HostPhase.SERVING for plan in hosts)
    return switched and set(cloud.world.under.values()) == {NEW}


# --- in place ----------------------------------------------------------------------------------------


def test_in_place_no_server_leaves_its_host_and_each_is_replaced_once() -> None:
    cloud = cloud_of(2, 1)
    before = {server: where for server, (where, _) in cloud.world.owner.items()}
    begin(cloud, Strategy.IN_PLACE)
    cloud.settle()
    assert upgraded(cloud)
    assert {server: where for server, (where, _) in cloud.world.owner.items()} == before
    assert set(cloud.world.moves_done.values()) == {1}
    assert set(cloud.world.verified.values()) == {NEW}


def test_in_place_a_cloud_of_one_full_host_is_upgraded() -> None:
    cloud = cloud_of(4, capacity=1024, size=256)
    begin(cloud, Strategy.IN_PLACE)
    cloud.settle()
    assert upgraded(cloud)


def test_servers_of_a_host_take_turns_and_hosts_are_taken_one_after_another() -> None:
    cloud = cloud_of(3, 3)
    cloud.want(parallel_moves=4)
    begin(cloud, Strategy.IN_PLACE)
    cloud.settle()
    assert upgraded(cloud)
    assert max(len(blueprint.moves) for blueprint in cloud.history) == 1


def test_a_host_is_not_switched_before_all_of_its_servers_run_by_the_release() -> None:
    cloud = cloud_of(2)
    begin(cloud, Strategy.IN_PLACE)
    cloud.settle()
    switching = [b for b in cloud.history if b.hosts[host_id(1)].phase is HostPhase.SWITCHING]
    assert switching
    assert all(assignment.epoch == 2 for b in switching for assignment in b.servers.values())


def test_switching_over_a_server_of_another_release_is_a_bug() -> None:
    cloud = cloud_of(1)
    begin(cloud, Strategy.IN_PLACE)
    cloud.settle()
    seen, now = cloud.world.look(), cloud.now
    plan = msgspec.structs.replace(now.hosts[host_id(1)], phase=HostPhase.SWITCHING, release=OLD)
    child = msgspec.structs.replace(now, hosts={host_id(1): plan}, upgrading=host_id(1))
    assert any("which runs by qemu-11" in text for text in violations(cloud.policy, seen, now, child))


def test_a_cancelled_one_puts_the_host_back_and_leaves_servers_running() -> None:
    cloud = cloud_of(2)
    begin(cloud, Strategy.IN_PLACE)
    while cloud.now.hosts[host_id(1)].phase is not HostPhase.SWITCHING:
        cloud.step()
    begin(cloud, Strategy.IN_PLACE, CampaignState.CANCELLED)
    cloud.settle()
    plan = cloud.now.hosts[host_id(1)]
    assert plan.phase is HostPhase.SERVING
    assert len(cloud.world.owner) == 2


def test_a_server_is_not_moved_while_its_host_is_switched() -> None:
    cloud = cloud_of(1, 0)
    begin(cloud, Strategy.IN_PLACE)
    cloud.plan()
    while cloud.now.hosts[host_id(1)].phase is not HostPhase.SWITCHING:
        cloud.world.carry_out(cloud.policy, cloud.now)
        cloud.plan()
    cloud.request(1, 2)
    cloud.plan()
    assert not cloud.now.moves
    assert "switched and verified" in cloud.reasons(server_id(1))
    cloud.settle()
    assert cloud.where(1) == host_id(2)


def test_a_host_its_operator_drains_is_emptied_all_the_same() -> None:
    cloud = cloud_of(1, 0)
    begin(cloud, Strategy.IN_PLACE)
    cloud.intend(1, HostIntent.DRAINED)
    cloud.settle()
    assert cloud.where(1) == host_id(2)


def test_what_the_table_refuses_in_place_blocks_with_the_row() -> None:
    cloud = cloud_of(1, new="9.2.0")
    said = dry_run(cloud, Strategy.IN_PLACE)
    assert any("nobody has tried it" in blocker.reason for blocker in said.blockers)
    assert all(blocker.remedy for blocker in said.blockers if blocker.kind is WaitKind.BLOCKED)


def test_the_plan_says_what_a_host_with_servers_on_it_does_not_get() -> None:
    said = dry_run(cloud_of(2, 1), Strategy.IN_PLACE)
    assert [move.means for step in said.hosts for move in step.moves] == [Means.IN_PLACE] * 3
    assert all("a new kernel needs an empty host" in step.note for step in said.hosts)
    assert not any(step.note for step in dry_run(cloud_of(2, 1), Strategy.MOVE).hosts)


# --- move --------------------------------------------------------------------------------------------


def test_move_never_replaces_in_place_whatever_the_room() -> None:
    cloud = cloud_of(4, 4, capacity=1024)
    begin(cloud, Strategy.MOVE)
    cloud.settle()
    assert not cloud.now.moves
    assert set(cloud.world.under.values()) == {OLD}
    assert "cannot be emptied" in cloud.reasons(host_id(1))


# --- auto --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [(2, 2, 2), (3, 3, 0)])
def test_auto_moves_where_a_move_is_proven_and_there_is_room(layout: tuple[int, ...]) -> None:
    auto, moved = cloud_of(*layout), cloud_of(*layout)
    begin(auto, Strategy.AUTO)
    begin(moved, Strategy.MOVE)
    auto.settle()
    moved.settle()
    assert upgraded(auto)
    assert ways_taken(auto) == {False}
    assert [b.moves for b in auto.history] == [b.moves for b in moved.history]


def test_auto_leaves_what_the_table_refuses_to_move_where_it_is() -> None:
    cloud = cloud_of(2, 1, 0, old="7.2.22", new="10.0.2")
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    assert upgraded(cloud)
    assert ways_taken(cloud) == {True}


def test_auto_replaces_in_place_where_there_is_no_room() -> None:
    cloud = cloud_of(4, 4, capacity=1024)
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    assert upgraded(cloud)
    assert ways_taken(cloud) == {True}
    said = dry_run(cloud_of(4, 4, capacity=1024))
    assert {move.why for step in said.hosts for move in step.moves} == {"no room on another host"}


def test_auto_leaves_only_those_in_place_for_which_there_is_no_room() -> None:
    cloud = cloud_of(3, 2, capacity=1024)
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    assert upgraded(cloud)
    assert ways_taken(cloud) == {True, False}


def test_auto_does_not_take_a_host_out_of_the_promise() -> None:
    cloud = cloud_of(2, 2)
    cloud.want(promised=Size(vcpus=4, memory_mib=2048))
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    assert not cloud.world.moves_done
    assert "promised" in cloud.reasons(host_id(1))


# --- the budget --------------------------------------------------------------------------------------


def test_a_move_over_the_budget_becomes_a_replacement_in_place() -> None:
    cloud = cloud_of(1, 0)
    busy(cloud, 1, 100)
    permit(cloud, 1, blackout_budget_ms=80)
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    assert upgraded(cloud)
    assert ways_taken(cloud) == {True}


def test_a_budget_nothing_keeps_defers_the_server_with_the_figures() -> None:
    cloud = cloud_of(1, 0)
    permit(cloud, 1, blackout_budget_ms=5)
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    assert not cloud.world.moves_done
    reason = cloud.reasons(server_id(1))
    assert "its budget is 5 ms" in reason and "left where it is" in reason
    assert any("its budget is 5 ms" in blocker.reason for blocker in dry_run(cloud).blockers)


@pytest.mark.parametrize("ask", ["drain", "request"])
def test_a_budget_holds_for_what_operators_ask_for_too(ask: str) -> None:
    cloud = cloud_of(1, 0)
    permit(cloud, 1, blackout_budget_ms=5)
    if ask == "drain":
        cloud.intend(1, HostIntent.DRAINED)
    else:
        cloud.request(1, 2)
    cloud.settle()
    assert cloud.where(1) == host_id(1)
    assert "its budget is 5 ms" in cloud.reasons(server_id(1))
    permit(cloud, 1, blackout_budget_ms=500)
    cloud.settle()
    assert cloud.where(1) == host_id(2)


def test_a_move_predicted_not_to_end_is_not_begun_where_there_is_a_budget() -> None:
    cloud = cloud_of(1, 0, size=512)
    busy(cloud, 1, 400)
    permit(cloud, 1, blackout_budget_ms=400)
    cloud.request(1, 2)
    cloud.settle()
    assert cloud.where(1) == host_id(1)
    assert "predicted not to come to its end" in cloud.reasons(server_id(1))


# --- moves that do not converge ----------------------------------------------------------------------


def test_after_a_move_that_did_not_converge_auto_goes_on_in_place() -> None:
    cloud = cloud_of(1, 0)
    cloud.world.script[server_id(1)] = [(OperationState.UNDONE, STUCK_COPY)]
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    assert upgraded(cloud)
    begun = list(dict.fromkeys((m.id, m.in_place) for b in cloud.history for m in b.moves))
    assert [in_place for _, in_place in begun] == [False, True]


def test_with_its_owners_consent_it_is_slowed_down_first() -> None:
    cloud = cloud_of(1, 0)
    permit(cloud, 1, allow_slowdown=True)
    cloud.world.script[server_id(1)] = [(OperationState.UNDONE, STUCK_COPY)]
    begin(cloud, Strategy.AUTO)
    cloud.settle()
    begun = list(dict.fromkeys((m.id, m.in_place, m.slow_down) for b in cloud.history for m in b.moves))
    assert [(place, slow) for _, place, slow in begun][:2] == [(False, False), (False, True)]


def sent_by(cloud: Cloud) -> list[tuple[bool, bool]]:
    """Slowed down, by post-copy: of all that were begun."""
    return [(m.slow_down, m.post_copy) for b in cloud.history for m in b.moves]


def hopeless(budget: int = 0, **permitted: bool) -> Cloud:
    """A server that no pre-copy carries is asked to move to the second host."""
    cloud = cloud_of(1, 0, size=512)
    busy(cloud, 1, 400)
    permit(cloud, 1, blackout_budget_ms=budget, **permitted)
    cloud.world.knows = ("post-copy",)
    cloud.request(1, 2)
    return cloud


def test_what_is_predicted_not_to_end_goes_by_post_copy_with_its_owners_consent() -> None:
    cloud = hopeless(budget=1500, allow_post_copy=True)
    cloud.settle()
    assert cloud.where(1) == host_id(2)
    assert set(sent_by(cloud)) == {(False, True)}


def test_post_copy_too_keeps_the_budget_or_is_not_begun() -> None:
    cloud = hopeless(budget=100, allow_post_copy=True)
    cloud.settle()
    assert cloud.where(1) == host_id(1)
    assert "post-copy of" in cloud.reasons(server_id(1))


def test_of_two_ways_that_were_permitted_the_one_that_risks_nothing_is_taken() -> None:
    cloud = hopeless(allow_post_copy=True, allow_slowdown=True)
    cloud.settle()
    assert cloud.where(1) == host_id(2)
    assert set(sent_by(cloud)) == {(True, False)}


def test_a_host_that_cannot_is_named_and_nothing_is_begun() -> None:
    cloud = hopeless(budget=1500, allow_post_copy=True)
    cloud.world.no_post_copy[host_id(2)] = "no userfaultfd"
    cloud.settle()
    assert cloud.where(1) == host_id(1)
    assert "host-2: no userfaultfd" in cloud.reasons(server_id(1))


def test_agents_of_an_older_release_are_not_asked_for_it() -> None:
    cloud = hopeless(budget=1500, allow_post_copy=True)
    cloud.world.knows = ()
    cloud.settle()
    assert cloud.where(1) == host_id(1)
    assert "predicted not to come to its end" in cloud.reasons(server_id(1))


def test_without_consent_and_without_another_way_it_is_tried_again_as_before() -> None:
    cloud = cloud_of(1, 0)
    cloud.world.script[server_id(1)] = [(OperationState.UNDONE, STUCK_COPY)] * 2
    cloud.intend(1, HostIntent.DRAINED)
    cloud.settle()
    assert cloud.where(1) == host_id(2)
    assert not any(move.slow_down for blueprint in cloud.history for move in blueprint.moves)


# --- what the plan says ------------------------------------------------------------------------------


def test_every_server_has_its_way_the_row_and_the_alternatives() -> None:
    said = dry_run(cloud_of(1, 1, 0))
    moves = [move for step in said.hosts for move in step.moves]
    assert {move.means for move in moves} == {Means.PRE_COPY}
    first = moves[0]
    assert "qemu 10.0 to" in first.row and "proven" in first.row
    assert first.row_source == "benchmarks/moves.py"
    assert first.brownout_seconds > 0
    others = {other.means: other.refused for other in first.alternatives}
    assert others.keys() == {Means.IN_PLACE, Means.SLOWED, Means.POST_COPY}
    assert others[Means.IN_PLACE] == ""
    assert "not permitted" in others[Means.SLOWED]
    assert "not permitted" in others[Means.POST_COPY]


def test_the_row_that_refuses_a_move_is_the_reason_it_stays() -> None:
    said = dry_run(cloud_of(1, 0, old="7.2.22", new="10.0.2"))
    move = said.hosts[-1].moves[0] if said.hosts[-1].moves else said.hosts[0].moves[0]
    assert move.means is Means.IN_PLACE
    assert "misses pages" in move.why
    assert move.row_source == "tests/live/test_replacement.py"


@pytest.mark.parametrize("strategy", list(Strategy))
def test_the_campaign_does_what_was_foretold(strategy: Strategy) -> None:
    cloud = cloud_of(2, 1, 0)
    said = dry_run(cloud, strategy)
    assert said.strategy is strategy
    begin(cloud, strategy)
    cloud.settle()
    done = {move.id: move for blueprint in cloud.history for move in blueprint.moves}
    foretold = [(m.server, m.source, m.destination) for step in said.hosts for m in step.moves]
    assert foretold == [(m.server, m.source, m.destination) for m in done.values()]
