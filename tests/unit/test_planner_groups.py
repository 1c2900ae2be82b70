"""Server groups and pins: no plan, and no step on the way, breaks a hard rule; what cannot be done waits with
a remedy; soft rules are preferred and never waited for."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planner_world import Cloud, Faults, host_id, running_cloud, server_id

from nahtlos.model.blueprint import CampaignState, HostIntent, HostPhase, WaitKind
from nahtlos.model.ids import HostId, ServerGroupId, ServerId
from nahtlos.model.placement import GroupPolicy, ServerGroup
from nahtlos.planner.groups import Neighbours
from nahtlos.planner.place import room_for

GROUP = ServerGroupId("web")
ALL = tuple(GroupPolicy)


def grouped(cloud: Cloud, policy: GroupPolicy, *servers: int, name: str = "web") -> None:
    group = ServerGroup(id=ServerGroupId(name), policy=policy)
    cloud.want(
        server_groups={**cloud.policy.server_groups, group.id: group},
        members={**cloud.policy.members, **{server_id(s): group.id for s in servers}},
    )


def pinned(cloud: Cloud, server: int, host: int) -> None:
    cloud.want(pins={**cloud.policy.pins, server_id(server): host_id(host)})


def hosts_of(cloud: Cloud, *servers: int) -> list[HostId]:
    return [cloud.where(server) for server in servers]


# --- new servers -------------------------------------------------------------------------------------


def test_members_of_an_anti_affinity_group_are_placed_apart() -> None:
    cloud = Cloud(3)
    grouped(cloud, GroupPolicy.ANTI_AFFINITY, 1, 2, 3)
    for server in (1, 2, 3):
        cloud.create(server)
    assert cloud.settle().converged
    assert len(set(hosts_of(cloud, 1, 2, 3))) == 3


def test_one_member_more_than_hosts_waits_and_says_for_what() -> None:
    cloud = Cloud(2)
    grouped(cloud, GroupPolicy.ANTI_AFFINITY, 1, 2, 3)
    for server in (1, 2, 3):
        cloud.create(server)
    report = cloud.settle()
    (waiting,) = report.waiting
    assert waiting.subject == "vm-3"
    assert "host-1 has vm-" in waiting.reason and "web (anti-affinity)" in waiting.reason
    assert "add or activate a host" in waiting.remedy


def test_members_of_an_affinity_group_are_placed_together() -> None:
    cloud = Cloud(3)
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2, 3)
    for server in (1, 2, 3, 4):
        cloud.create(server)
    assert cloud.settle().converged
    assert len(set(hosts_of(cloud, 1, 2, 3))) == 1
    assert cloud.where(4) != cloud.where(1)


def test_an_affinity_group_that_outgrows_its_host_waits() -> None:
    cloud = Cloud(2, capacity_mib=512)
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2, 3)
    for server in (1, 2, 3):
        cloud.create(server)
    report = cloud.settle()
    (waiting,) = report.waiting
    assert waiting.subject == "vm-3"
    assert "has no room for vm-3" in waiting.reason and "web (affinity) is on" in waiting.reason


@pytest.mark.parametrize("policy", [GroupPolicy.SOFT_ANTI_AFFINITY, GroupPolicy.SOFT_AFFINITY])
def test_soft_rules_are_followed_where_they_can_be_and_never_waited_for(policy: GroupPolicy) -> None:
    cloud = Cloud(2, capacity_mib=768)
    grouped(cloud, policy, 1, 2)
    for server in (1, 2):
        cloud.create(server)
    assert cloud.settle().converged
    assert (cloud.where(1) == cloud.where(2)) == policy.is_together
    grouped(cloud, policy, 3, 4, 5)
    for server in (3, 4, 5):
        cloud.create(server)
    assert cloud.settle().converged


def test_a_pinned_server_is_placed_there_or_nowhere() -> None:
    cloud = Cloud(2, capacity_mib=256)
    pinned(cloud, 1, 2)
    pinned(cloud, 2, 2)
    cloud.create(1)
    cloud.settle()
    cloud.create(2)
    cloud.settle()
    assert cloud.where(1) == host_id(2)
    assert server_id(2) not in cloud.now.servers
    assert "host-2 has no room" in cloud.reasons("vm-2")


# --- drains ------------------------------------------------------------------------------------------


def test_a_drain_keeps_anti_affinity_or_waits_with_the_remedy() -> None:
    cloud = running_cloud((1, 1, 0))
    grouped(cloud, GroupPolicy.ANTI_AFFINITY, 1, 2)
    cloud.intend(1, HostIntent.DRAINED)
    assert cloud.settle().converged
    assert cloud.where(1) == host_id(3)
    cloud.intend(2, HostIntent.DRAINED)
    report = cloud.settle()
    (waiting,) = [w for w in report.waiting if w.subject == "vm-2"]
    assert waiting.kind is WaitKind.CAPACITY
    assert "host-3 has vm-1 of web (anti-affinity)" in waiting.reason
    assert waiting.remedy
    assert cloud.where(2) == host_id(2)
    cloud.intend(1, HostIntent.ACTIVE)
    assert cloud.settle().converged
    assert cloud.where(2) == host_id(1)


@pytest.mark.parametrize("parallel", [1, 3])
def test_an_affinity_group_leaves_whole_for_one_host(parallel: int) -> None:
    cloud = running_cloud((3, 2, 0))
    cloud.want(parallel_moves=parallel)
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2, 3)
    cloud.intend(1, HostIntent.DRAINED)
    assert cloud.settle().converged
    assert set(hosts_of(cloud, 1, 2, 3)) == {host_id(3)}
    assert cloud.moves_done() == 3


def test_it_does_not_begin_to_leave_where_not_all_of_it_fits() -> None:
    cloud = running_cloud((3, 2, 2))
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2, 3)
    cloud.intend(1, HostIntent.DRAINED)
    cloud.settle()
    assert set(hosts_of(cloud, 1, 2, 3)) == {host_id(1)}
    assert "vm-1 with vm-2, vm-3" in cloud.reasons("vm-1")
    assert "needs 768 MiB" in cloud.reasons("vm-1")


def test_room_for_the_rest_of_a_group_is_kept_while_it_goes() -> None:
    cloud = running_cloud((3, 1, 4))
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2, 3)
    cloud.intend(1, HostIntent.DRAINED)
    cloud.plan()
    assert [move.destination for move in cloud.now.moves] == [host_id(2)]
    cloud.create(9)
    assert "no host has room" in (cloud.settle() and cloud.reasons("vm-9"))
    assert set(hosts_of(cloud, 1, 2, 3)) == {host_id(2)}


def test_a_drain_called_off_half_way_brings_the_group_together_again() -> None:
    cloud = running_cloud((3, 0))
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2, 3)
    cloud.intend(1, HostIntent.DRAINED)
    cloud.follow(lambda: bool(cloud.now.servers) and cloud.where(1) == host_id(2))
    cloud.intend(1, HostIntent.ACTIVE)
    assert cloud.settle().converged
    assert set(hosts_of(cloud, 1, 2, 3)) in ({host_id(1)}, {host_id(2)})


def test_a_pinned_server_keeps_its_host_from_being_drained_and_says_so() -> None:
    cloud = running_cloud((2, 0))
    pinned(cloud, 1, 1)
    cloud.intend(1, HostIntent.DRAINED)
    report = cloud.settle()
    (waiting,) = [w for w in report.waiting if w.subject == "vm-1"]
    assert waiting.reason == "vm-1 is pinned to host-1"
    assert "--unpin" in waiting.remedy
    assert cloud.where(2) == host_id(2)


# --- requests ----------------------------------------------------------------------------------------


def refusal(cloud: Cloud, server: int, to: int | None) -> tuple[str, str]:
    spec = cloud.policy.servers[server_id(server)]
    host = None if to is None else host_id(to)
    found = room_for(cloud.policy, cloud.world.look(), cloud.now, spec, host)
    assert found is not None and found.barred
    return found.reason, found.remedy


def test_a_move_to_the_host_of_another_member_is_refused() -> None:
    cloud = running_cloud((1, 1, 0))
    grouped(cloud, GroupPolicy.ANTI_AFFINITY, 1, 2)
    reason, remedy = refusal(cloud, 1, 2)
    assert "host-2 has vm-2 of web (anti-affinity)" in reason
    assert "it would fit on host-3" in remedy


def test_one_member_of_an_affinity_group_is_not_moved_by_itself() -> None:
    cloud = running_cloud((2, 0))
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2)
    for to in (2, None):
        reason, remedy = refusal(cloud, 1, to)
        assert "vm-1 leaves host-1 only together with vm-2 (affinity group web)" in reason
        assert "drain host-1" in remedy
    cloud.request(1, 2)
    cloud.settle()
    assert cloud.where(1) == host_id(1)


def test_a_pinned_server_is_not_moved() -> None:
    cloud = running_cloud((1, 0))
    pinned(cloud, 1, 1)
    reason, remedy = refusal(cloud, 1, 2)
    assert "vm-1 is pinned to host-1" in reason
    assert "--unpin" in remedy


# --- campaigns ---------------------------------------------------------------------------------------


def test_a_campaign_keeps_the_rules_of_all_groups() -> None:
    cloud = running_cloud((2, 2, 1, 0))
    grouped(cloud, GroupPolicy.AFFINITY, 1, 2, name="pair")
    grouped(cloud, GroupPolicy.ANTI_AFFINITY, 3, 5, name="apart")
    cloud.campaign()
    assert cloud.settle().converged
    assert cloud.over()
    assert cloud.where(1) == cloud.where(2)
    assert cloud.where(3) != cloud.where(5)


def test_a_campaign_that_a_rule_holds_up_names_it() -> None:
    cloud = running_cloud((1, 1))
    grouped(cloud, GroupPolicy.ANTI_AFFINITY, 1, 2)
    cloud.campaign()
    cloud.settle()
    assert "vm-1 cannot leave it: no host is left for vm-1 by its group" in cloud.reasons("host-1")
    assert cloud.phase(1) is HostPhase.SERVING


# --- in every world ----------------------------------------------------------------------------------


def assert_rules(cloud: Cloud) -> None:
    """By what owns and receives servers in the world, not by what the planner thinks of it."""
    places: dict[ServerId, set[HostId]] = {s: {host} for s, (host, _) in cloud.world.owner.items()}
    for operation in cloud.world.operations.values():
        planned = operation.planned
        if getattr(planned, "server", None) in places and operation.state.value == "running":
            places[planned.server].add(planned.destination)  # type: ignore[union-attr]
    for group in cloud.policy.server_groups.values():
        here = {s: places[s] for s, name in cloud.policy.members.items() if name == group.id and s in places}
        everywhere = [host for hosts in here.values() for host in hosts]
        if group.policy is GroupPolicy.ANTI_AFFINITY:
            assert len(everywhere) == len(set(everywhere)), here
        elif group.policy is GroupPolicy.AFFINITY:
            assert len(set(everywhere)) <= 2, here
    for server, pin in cloud.policy.pins.items():
        assert places.get(server, {pin}) == {pin}


def test_who_is_on_the_way_decides_where_a_group_goes_whatever_becomes_of_that_host() -> None:
    """A drain that is called off makes the host they leave a good one again, and another drain the one that
    they go to a bad one: they would have left each other in both directions."""
    old, new = host_id(1), host_id(3)
    one, two, three = server_id(1), server_id(2), server_id(3)
    name = ServerGroupId("one")
    group = ServerGroup(id=name, policy=GroupPolicy.AFFINITY)
    neighbours = Neighbours({name: group}, dict.fromkeys((one, two, three), name), lambda host: host == old)
    for server, host in ((one, old), (two, old), (three, new)):
        neighbours.take(host, server)
    assert neighbours.home(two, old) == old
    neighbours.take(new, one, moving=True)
    for each in (neighbours, neighbours.copy()):
        assert each.home(two, old) == new
        assert each.why_not(three, old, new)
        assert list(each.scattered()) == [(new, [two])]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.data(),
    st.sampled_from(ALL),
    st.sampled_from(ALL),
    st.integers(1, 3),
    st.sampled_from([Faults(), Faults(undone=0.3, slow=0.4, stale=0.2, away=0.05)]),
    st.integers(0, 2**32),
)
def test_no_step_of_any_plan_breaks_a_hard_rule(
    data: st.DataObject, one: GroupPolicy, two: GroupPolicy, parallel: int, wrong: Faults, seed: int
) -> None:
    cloud = Cloud(4, seed=seed)
    cloud.want(parallel_moves=parallel)
    grouped(cloud, one, 1, 2, 3, name="one")
    grouped(cloud, two, 4, 5, name="two")
    pinned(cloud, 6, 1)
    for server in range(1, 8):
        cloud.create(server)
    cloud.settle()
    cloud.world.faults = wrong
    for _ in range(data.draw(st.integers(5, 40))):
        _meddle(cloud, data)
        cloud.step()
        assert_rules(cloud)
    cloud.world.faults = Faults()
    cloud.world.away.clear()
    cloud.want(intents={}, requested_moves={})
    cloud.campaign(CampaignState.CANCELLED)
    report = cloud.settle()
    assert_rules(cloud)
    if any(waiting.kind is WaitKind.OPERATOR for waiting in report.waiting):
        return  # a move failed so often that nobody tries it again unasked
    for group, members in (("one", (1, 2, 3)), ("two", (4, 5))):
        if cloud.policy.server_groups[ServerGroupId(group)].policy is GroupPolicy.AFFINITY:
            assert len({cloud.where(s) for s in members if server_id(s) in cloud.now.servers}) <= 1


def _meddle(cloud: Cloud, data: st.DataObject) -> None:
    host, server = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    match data.draw(st.integers(0, 6)):
        case 0:
            cloud.intend(host, data.draw(st.sampled_from(HostIntent)))
        case 1:
            cloud.request(server, data.draw(st.sampled_from([host, None])))
        case 2:
            states = (CampaignState.RUNNING, CampaignState.PAUSED, CampaignState.CANCELLED)
            cloud.campaign(data.draw(st.sampled_from(states)))
        case 3:
            cloud.want(requested_moves={})
        case _:
            pass
