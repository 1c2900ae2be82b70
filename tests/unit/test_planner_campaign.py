"""Campaigns: which host, which moves, and what happens when people or the world step in."""

import msgspec
import pytest
from planner_world import NEW, OLD, REFUSED, UNAVAILABLE, Cloud, at_most, host_id, running_cloud, server_id

from nahtlos.model.blueprint import CampaignState, HostIntent, HostPhase, WaitKind
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.inventory import OperationKind, OperationState, OperationStatus, RunState, ServerStatus
from nahtlos.model.nouns import Size
from nahtlos.planner.draft import Observed
from nahtlos.planner.outcome import ended
from nahtlos.planner.plan import plan
from nahtlos.planner.upgrade import campaign_over, upgraded_hosts

FAILED = (OperationState.UNDONE, UNAVAILABLE)


def releases(cloud: Cloud) -> list[str | None]:
    return [plan.release for _, plan in sorted(cloud.now.hosts.items())]


@pytest.mark.parametrize(
    ("layout", "moves"),
    [((2, 2, 2), 8), ((3, 3, 0), 6), ((0, 0, 0), 0), ((3, 2, 1), 7), ((1, 1, 1, 1), 5), ((2, 0), 2)],
)
def test_every_host_is_upgraded_with_few_moves(layout: tuple[int, ...], moves: int) -> None:
    cloud = running_cloud(layout)
    cloud.campaign()
    report = cloud.settle()
    assert report.converged
    assert set(releases(cloud)) == {NEW}
    assert cloud.moves_done() == cloud.now.ended_moves == moves
    assert campaign_over(cloud.policy, cloud.now)
    assert upgraded_hosts(cloud.policy, cloud.now) == tuple(sorted(cloud.policy.hosts))


def test_the_balanced_world_stays_within_its_bound_and_its_promise() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.want(promised=Size(vcpus=16, memory_mib=2048))
    cloud.campaign()
    assert {report.capacity.share for report in cloud.follow(cloud.over)} == {1.0}
    assert cloud.moves_done() <= at_most(6)
    assert max(cloud.world.moves_done.values()) <= 2


def test_the_emptiest_host_is_first_and_goes_through_every_phase() -> None:
    cloud = running_cloud((2, 1, 2))
    cloud.campaign()
    cloud.follow(cloud.over)
    order = list(dict.fromkeys(b.hosts[host_id(2)].phase for b in cloud.history if b.campaign))
    assert order == [HostPhase.EMPTYING, HostPhase.SWITCHING, HostPhase.SERVING]
    assert next(b.upgrading for b in cloud.history if b.upgrading) == host_id(2)


def test_one_move_at_a_time_unless_more_are_allowed() -> None:
    cloud = running_cloud((3, 3, 3), capacity_mib=2048)
    cloud.campaign()
    cloud.step()
    assert len(cloud.now.moves) == 1
    cloud.want(parallel_moves=3)
    cloud.step()
    assert len(cloud.now.moves) == 2, "the two that are left of the first host"


def test_a_server_created_in_the_middle_starts_at_once_on_an_upgraded_host() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.campaign()
    cloud.follow(lambda: bool(upgraded_hosts(cloud.policy, cloud.now)))
    cloud.create(7)
    cloud.step()
    assert cloud.release(int(cloud.where(7)[-1])) == NEW
    assert cloud.settle().converged
    assert cloud.world.moves_done.get(server_id(7), 0) <= 1


def test_nothing_is_emptied_that_the_promise_needs() -> None:
    cloud = running_cloud((1, 1, 1))
    cloud.want(promised=Size(vcpus=1, memory_mib=2300))
    cloud.campaign()
    cloud.settle()
    assert releases(cloud) == [OLD] * 3
    assert "252 MiB and 0 vCPUs of the 2300 MiB and 1 vCPU promised could not be placed" in cloud.reasons(
        "host-1"
    )
    assert cloud.now.upgrading is None


def test_a_host_that_cannot_be_emptied_any_more_goes_back_to_service() -> None:
    cloud = running_cloud((2, 3, 3))
    cloud.campaign()
    cloud.world.faults.slow = 1.0
    cloud.step()
    assert cloud.phase(1) is HostPhase.EMPTYING
    cloud.create(9)
    cloud.step()
    cloud.world.faults.slow = 0.0
    cloud.settle()
    assert cloud.phase(1) is HostPhase.SERVING, cloud.reasons("host-1")
    assert "would fit nowhere else" in cloud.reasons("host-1")
    cloud.remove(9)
    assert cloud.settle().converged
    assert set(releases(cloud)) == {NEW}


def test_cordoned_and_drained_hosts_are_upgraded_and_stay_as_they_were_wanted() -> None:
    cloud = running_cloud((1, 1, 1, 1))
    cloud.intend(3, HostIntent.CORDONED)
    cloud.intend(4, HostIntent.DRAINED)
    cloud.campaign()
    assert cloud.settle().converged
    assert set(releases(cloud)) == {NEW}
    assert cloud.phase(3) is HostPhase.CORDONED
    assert cloud.phase(4) is HostPhase.DRAINED
    assert cloud.spread()[2:] == [0, 0]


def test_a_host_is_not_chosen_while_a_server_is_on_its_way_to_it() -> None:
    cloud = running_cloud((1, 1, 0))
    cloud.request(1, 3)
    cloud.campaign(hosts=(3,))
    cloud.plan()
    assert [move.destination for move in cloud.now.moves] == [host_id(3)]
    assert cloud.now.upgrading is None
    assert "not emptied while vm-1 is moving to it" in cloud.reasons("host-3")
    assert cloud.settle().converged
    assert cloud.release(3) == NEW


def test_upgraded_hosts_count_as_done() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.campaign(hosts=(1,))
    cloud.settle()
    moved = cloud.moves_done()
    cloud.campaign(hosts=(1,))
    assert cloud.settle().converged
    assert cloud.moves_done() == moved


# --- pause, cancel -----------------------------------------------------------------------------------


def test_a_pause_starts_nothing_and_lets_what_runs_end() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.campaign()
    cloud.step()
    cloud.campaign(CampaignState.PAUSED)
    cloud.settle()
    assert cloud.moves_done() == 1
    assert not cloud.now.moves
    assert "is paused" in cloud.reasons("host-1")
    cloud.campaign()
    assert cloud.settle().converged
    assert set(releases(cloud)) == {NEW}


def test_a_pause_starts_no_verify() -> None:
    cloud = running_cloud((1, 1))
    cloud.campaign()
    cloud.step()
    cloud.campaign(CampaignState.PAUSED)
    cloud.settle()
    assert not cloud.now.verifies
    assert cloud.phase(1) is HostPhase.EMPTYING
    assert cloud.spread() == [0, 2]


def test_a_cancel_ends_what_began_and_keeps_what_is_upgraded() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.campaign()
    cloud.follow(lambda: bool(upgraded_hosts(cloud.policy, cloud.now) and cloud.now.moves))
    moved = cloud.moves_done()
    cloud.campaign(CampaignState.CANCELLED)
    assert not campaign_over(cloud.policy, cloud.now)
    assert cloud.settle().converged
    assert campaign_over(cloud.policy, cloud.now)
    assert cloud.moves_done() <= moved + 1
    assert sorted(map(str, releases(cloud))) == [OLD, OLD, NEW]
    assert all(plan.phase is HostPhase.SERVING for plan in cloud.now.hosts.values())


def test_a_verify_that_runs_is_ended_before_a_cancel() -> None:
    cloud = running_cloud((0, 1))
    cloud.campaign()
    cloud.plan()
    assert cloud.now.verifies
    cloud.campaign(CampaignState.CANCELLED)
    assert cloud.settle().converged
    assert releases(cloud) == [NEW, OLD]


# --- what fails --------------------------------------------------------------------------------------


def test_a_failed_verify_stops_the_campaign_and_a_cancel_puts_the_host_back() -> None:
    cloud = running_cloud((1, 1, 1))
    cloud.world.script[host_id(1)] = [(OperationState.UNDONE, REFUSED)]
    cloud.campaign()
    report = cloud.settle()
    assert cloud.phase(1) is HostPhase.SWITCHING
    assert cloud.now.upgrading == host_id(1)
    [waiting] = report.waiting
    assert waiting.kind is WaitKind.BLOCKED
    assert REFUSED.message in waiting.reason
    assert "cancel it to put host-1 back to qemu-10" in waiting.remedy
    cloud.campaign(CampaignState.CANCELLED)
    assert cloud.settle().converged
    assert releases(cloud) == [OLD] * 3
    assert cloud.world.verified[host_id(1)] == OLD
    assert campaign_over(cloud.policy, cloud.now)


def test_a_failed_verify_is_tried_again_after_pause_and_resume() -> None:
    cloud = running_cloud((1, 1, 1))
    cloud.world.script[host_id(1)] = [(OperationState.UNDONE, REFUSED)]
    cloud.campaign()
    cloud.settle()
    cloud.campaign(CampaignState.PAUSED)
    cloud.settle()
    assert cloud.phase(1) is HostPhase.SWITCHING
    cloud.campaign()
    assert cloud.settle().converged
    assert set(releases(cloud)) == {NEW}


def test_a_verify_without_an_answer_is_tried_again_but_not_for_ever() -> None:
    cloud = running_cloud((0, 1))
    cloud.world.script[host_id(1)] = [FAILED, FAILED]
    cloud.campaign(hosts=(1,))
    assert cloud.settle().converged
    cloud.campaign(hosts=(2,))
    cloud.world.script[host_id(2)] = [FAILED] * 9
    cloud.settle()
    assert len(cloud.world.script[host_id(2)]) == 6
    assert UNAVAILABLE.message in cloud.reasons("host-2")


def test_a_host_put_back_that_cannot_be_verified_is_tried_again_after_a_drain() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.script[host_id(1)] = [(OperationState.UNDONE, REFUSED)] * 2
    cloud.campaign()
    cloud.settle()
    cloud.campaign(CampaignState.CANCELLED)
    cloud.settle()
    assert cloud.release(1) == OLD
    assert cloud.phase(1) is HostPhase.SWITCHING
    assert not campaign_over(cloud.policy, cloud.now)
    cloud.intend(1, HostIntent.DRAINED)
    cloud.settle()
    assert "held back" in cloud.reasons("host-1")
    cloud.intend(1, HostIntent.ACTIVE)
    assert cloud.settle().converged
    assert campaign_over(cloud.policy, cloud.now)


def test_an_undone_move_is_tried_again_with_growing_patience() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.script[server_id(1)] = [FAILED, FAILED, FAILED]
    cloud.campaign(hosts=(1,))
    assert cloud.settle().converged
    moves = {move.id: move for blueprint in cloud.history for move in blueprint.moves}
    assert [move.patience_seconds for move in moves.values()] == [0.0, 1.0, 2.0, 4.0]
    assert len({move.id for move in moves.values()}) == 4
    assert not cloud.now.attempts
    assert not cloud.now.failed_moves


def test_after_five_failures_an_operator_is_asked_and_pause_and_resume_begin_anew() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.script[server_id(1)] = [FAILED] * 5
    cloud.campaign()
    report = cloud.settle()
    assert cloud.now.attempts == {server_id(1): 5}
    [waiting] = [w for w in report.waiting if w.subject == server_id(1)]
    assert waiting.kind is WaitKind.OPERATOR
    assert UNAVAILABLE.message in waiting.reason
    assert "pause and resume" in waiting.remedy
    cloud.campaign(CampaignState.PAUSED)
    cloud.settle()
    assert not cloud.now.attempts
    cloud.campaign()
    assert cloud.settle().converged


def test_a_destination_that_failed_twice_is_avoided() -> None:
    cloud = running_cloud((1, 0, 0))
    cloud.world.script[server_id(1)] = [FAILED, FAILED]
    cloud.intend(1, HostIntent.DRAINED)
    cloud.settle()
    moves = {move.id: move for blueprint in cloud.history for move in blueprint.moves}
    assert [move.destination for move in moves.values()] == [host_id(2), host_id(2), host_id(3)]


def test_a_stuck_move_halts_the_campaign_but_not_an_operators_drain() -> None:
    cloud = running_cloud((2, 2, 2))
    error = ErrorRecord(kind="bug", message="undo failed", remedy="call somebody")
    cloud.world.script[server_id(1)] = [(OperationState.STUCK, error)]
    cloud.campaign()
    cloud.settle()
    assert [move.server for move in cloud.now.moves] == [server_id(1)]
    assert cloud.moves_done() == 0
    assert "undo failed" in cloud.reasons("vm-1")
    assert cloud.report and cloud.report.waiting[0].remedy == "call somebody"
    cloud.intend(2, HostIntent.DRAINED)
    cloud.settle()
    assert cloud.spread()[1] == 0
    [stuck] = cloud.world.operations.values()
    stuck.state = stuck.source_state = OperationState.UNDONE
    cloud.intend(2, HostIntent.ACTIVE)
    cloud.settle()
    assert set(releases(cloud)) == {NEW}


def test_no_host_is_begun_while_a_move_is_stuck() -> None:
    cloud = running_cloud((1, 1, 1))
    cloud.world.script[server_id(1)] = [(OperationState.STUCK, None)]
    cloud.request(1, 2)
    cloud.settle()
    cloud.campaign()
    cloud.settle()
    assert cloud.now.upgrading is None
    assert "is stuck" in cloud.reasons("vm-1")


def test_a_server_is_not_moved_again_while_one_end_still_ends_the_last_move() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.script[server_id(1)] = [FAILED]
    cloud.campaign(hosts=(1,))
    cloud.step()
    [operation] = cloud.world.operations.values()
    operation.source_state = OperationState.RUNNING
    cloud.world.faults.slow = 1.0
    cloud.step()
    assert "is still being ended" in cloud.reasons("vm-1")
    assert not cloud.now.moves
    cloud.world.faults.slow = 0.0
    assert cloud.settle().converged


def test_a_server_is_not_moved_before_it_is_seen_under_its_epoch() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.owner[server_id(1)] = (host_id(1), 7)
    cloud.campaign(hosts=(1,))
    cloud.settle()
    assert "vm-1 has not been seen on host-1 yet" in cloud.reasons("vm-1")


def test_a_host_is_emptied_on_when_the_only_way_out_is_away_for_a_moment() -> None:
    cloud = running_cloud((2, 1))
    cloud.intend(2, HostIntent.ACTIVE)
    cloud.campaign(hosts=(1,))
    cloud.step()
    cloud.world.away = {host_id(2)}
    cloud.settle()
    assert cloud.phase(1) is HostPhase.EMPTYING
    cloud.world.away.clear()
    assert cloud.settle().converged
    assert cloud.release(1) == NEW


def test_two_hosts_are_not_drained_into_the_same_room() -> None:
    cloud = running_cloud((1, 1, 3))
    cloud.want(parallel_moves=4)
    for host in (1, 2):
        cloud.intend(host, HostIntent.DRAINED)
    cloud.plan()
    assert [move.server for move in cloud.now.moves] == [server_id(1)]
    assert "host-3 has no room for vm-2" in cloud.reasons("vm-2")


@pytest.mark.parametrize(
    ("source", "destination", "decided"),
    [
        (OperationState.RUNNING, OperationState.DONE, OperationState.DONE),
        (OperationState.STUCK, OperationState.DONE, OperationState.DONE),
        (OperationState.UNDONE, OperationState.STUCK, OperationState.STUCK),
        (OperationState.UNDONE, OperationState.RUNNING, OperationState.UNDONE),
        (OperationState.RUNNING, OperationState.RUNNING, None),
    ],
)
def test_where_the_ends_differ_the_durable_word_counts(
    source: OperationState, destination: OperationState, decided: OperationState | None
) -> None:
    cloud = running_cloud((1, 0))
    cloud.request(1, 2)
    cloud.step()
    [operation] = cloud.world.operations.values()
    operation.source_state, operation.state = source, destination
    status = ended(Observed(cloud.world.look()), operation.planned.id, (host_id(1), host_id(2)))
    assert (status.state if status else None) == decided


def test_hosts_out_of_reach_wait_and_the_others_are_upgraded() -> None:
    cloud = running_cloud((1, 1, 1, 1))
    cloud.world.away = {host_id(1)}
    cloud.world.releases[host_id(2)] = (OLD,)
    cloud.campaign()
    cloud.settle()
    assert releases(cloud) == [OLD, OLD, NEW, NEW]
    assert "not connected" in cloud.reasons("host-1")
    assert "no intact copy" in cloud.reasons("host-2")
    cloud.world.away.clear()
    cloud.world.releases[host_id(2)] = (OLD, NEW)
    assert cloud.settle().converged
    assert set(releases(cloud)) == {NEW}


def test_an_agent_that_leaves_in_the_middle_is_waited_for() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.campaign()
    cloud.step()
    cloud.world.away = {host_id(1)}
    cloud.settle()
    assert "the agent of host-1 is not connected" in cloud.reasons("vm-2")
    cloud.world.away.clear()
    assert cloud.settle().converged


def test_a_host_is_not_switched_while_anything_still_runs_there() -> None:
    cloud = running_cloud((0, 1))
    stranger = ServerStatus(
        id=server_id(99), epoch=1, state=RunState.RUNNING, release=OLD, size=Size(vcpus=1, memory_mib=64)
    )
    cloud.world.extra[host_id(1)] = (stranger,)
    cloud.campaign()
    report = cloud.settle()
    assert "still runs vm-99, which it does not own" in cloud.reasons("host-1")
    assert [w.kind for w in report.waiting if w.subject == host_id(1)] == [WaitKind.BLOCKED]
    cloud.world.extra.clear()
    assert cloud.settle().converged


def test_a_crashed_server_is_named() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.state[server_id(1)] = RunState.CRASHED
    cloud.campaign()
    cloud.settle()
    assert "vm-1 has crashed on host-1" in cloud.reasons("vm-1")
    assert cloud.release(2) == NEW or cloud.phase(1) is HostPhase.EMPTYING


def test_what_a_move_waits_for_is_said() -> None:
    """Both agents are connected to the orchestrator, but not to each other: the move must not wait in
    silence."""
    cloud = running_cloud((1, 0))
    cloud.request(1, 2)
    cloud.plan()
    [move] = cloud.now.moves
    look = cloud.world.look()
    _, report = plan(cloud.policy, look, cloud.now)
    assert [w.reason for w in report.waiting] == [f"{move.id} of vm-1 to host-2 has not begun yet"]

    waits = OperationStatus(
        id=move.id,
        kind=OperationKind.MOVE,
        state=OperationState.RUNNING,
        step="stopped",
        waits_for="host-2 to say whether it owns vm-1",
    )
    source = msgspec.structs.replace(look.hosts[host_id(1)], operations=(waits,))
    look = msgspec.structs.replace(look, hosts={**look.hosts, host_id(1): source})
    _, report = plan(cloud.policy, look, cloud.now)
    assert [w.reason for w in report.waiting] == [
        f"{move.id} of vm-1 to host-2: host-1 waits for host-2 to say whether it owns vm-1"
    ]
