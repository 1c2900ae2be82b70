"""The N+k reserve: the servers of any k failed hosts could be started on the others, at every step."""

from itertools import combinations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planner_world import NEW, Cloud, host_id, running_cloud, server_id, server_spec

from nahtlos.model.blueprint import CampaignState, HostIntent, HostPhase, WaitKind
from nahtlos.model.ids import HostId, ServerGroupId
from nahtlos.model.nouns import Size
from nahtlos.model.placement import GroupPolicy, ReserveReport, ServerGroup
from nahtlos.planner.capacity import count_rooms, reserve_of, why_withdrawal_breaks
from nahtlos.planner.draft import Draft
from nahtlos.planner.place import room_for, why_growth_breaks
from nahtlos.planner.reserve import Standing, uncovered


def reserve(cloud: Cloud, hosts: int) -> ReserveReport:
    return reserve_of(cloud.policy, cloud.world.look(), cloud.now, hosts)


# --- what is covered ---------------------------------------------------------------------------------


def test_what_fits_elsewhere_is_covered_and_what_does_not_is_named() -> None:
    cloud = running_cloud((2, 2, 2))
    assert reserve(cloud, 1).kept
    report = reserve(cloud, 2)
    assert not report.kept
    assert (len(report.lost), report.needs.memory_mib, report.free.memory_mib) == (2, 1024, 512)
    assert report.left
    full = running_cloud((4, 4, 0))
    assert reserve(full, 1).kept
    assert not reserve(full, 2).kept
    assert not reserve(running_cloud((4, 4)), 1).kept


def test_as_many_as_there_are_are_never_covered() -> None:
    assert not reserve(running_cloud((1, 0)), 2).kept
    assert reserve(running_cloud((0, 0)), 1).kept


def test_room_in_pieces_too_small_covers_nothing() -> None:
    cloud = Cloud(4, capacity_mib=1024)
    for server, size in enumerate((768, 768, 768, 768)):
        cloud.create(server, size)
    cloud.settle()
    report = reserve(cloud, 1)
    assert not report.kept
    assert report.free.memory_mib == 768  # three times 256


def test_members_that_are_to_be_apart_need_a_host_more_each() -> None:
    cloud = running_cloud((1, 1, 0))
    group = ServerGroup(id=ServerGroupId("g"), policy=GroupPolicy.ANTI_AFFINITY)
    cloud.want(server_groups={group.id: group}, members={server_id(1): group.id, server_id(2): group.id})
    assert reserve(cloud, 1).kept
    crowded = running_cloud((1, 1))
    crowded.want(server_groups={group.id: group}, members={server_id(1): group.id, server_id(2): group.id})
    assert not reserve(crowded, 1).kept


def test_members_that_are_to_be_together_need_one_host_with_room_for_all() -> None:
    cloud = running_cloud((3, 2, 2))
    assert reserve(cloud, 1).kept
    group = ServerGroup(id=ServerGroupId("g"), policy=GroupPolicy.AFFINITY)
    cloud.want(server_groups={group.id: group}, members={server_id(n): group.id for n in (1, 2, 3)})
    report = reserve(cloud, 1)
    assert (report.kept, report.lost) == (False, (host_id(1),))


def test_nothing_is_kept_for_pinned_servers_and_it_says_so() -> None:
    cloud = running_cloud((4, 4))
    cloud.want(pins={server_id(n): host_id(1 if n <= 4 else 2) for n in range(1, 9)})
    report = reserve(cloud, 1)
    assert report.kept
    assert len(report.pinned) == 8


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from([128, 256, 512]), min_size=1, max_size=10),
    st.integers(2, 5),
    st.integers(1, 2),
)
def test_what_is_said_to_be_kept_can_be_carried_out(sizes: list[int], hosts: int, k: int) -> None:
    """Against a search for places that knows nothing of the planner's."""
    cloud = Cloud(hosts, capacity_mib=1024)
    for server, size in enumerate(sizes):
        cloud.create(server, size)
    cloud.settle()
    if k < hosts and reserve(cloud, k).kept:
        for lost in combinations(sorted(cloud.policy.hosts), k):
            assert _startable(cloud, lost), lost


def _startable(cloud: Cloud, lost: tuple[HostId, ...]) -> bool:
    free = dict.fromkeys((h for h in cloud.policy.hosts if h not in lost), 1024)
    homeless: list[int] = []
    for server, owner in cloud.now.servers.items():
        memory = cloud.policy.servers[server].size.memory_mib
        if owner.host in lost:
            homeless.append(memory)
        else:
            free[owner.host] -= memory
    return _search(sorted(homeless, reverse=True), tuple(free.values()))


def _search(homeless: list[int], free: tuple[int, ...]) -> bool:
    if not homeless:
        return True
    first, rest = homeless[0], homeless[1:]
    tried = {
        tuple(sorted((*free[:n], room - first, *free[n + 1 :])))
        for n, room in enumerate(free)
        if room >= first
    }
    return any(_search(rest, room) for room in tried)


def test_many_hosts_are_judged_by_counts() -> None:
    cloud = running_cloud((3,) * 40)
    draft = Draft(cloud.policy, cloud.world.look(), cloud.now)
    count_rooms(draft)
    assert uncovered(Standing(draft), 10) is None
    assert uncovered(Standing(draft), 11) is not None


# --- what is not done --------------------------------------------------------------------------------


def test_a_new_server_that_would_break_it_waits_and_is_refused_with_figures() -> None:
    cloud = running_cloud((2, 2))
    cloud.want(reserve=1)
    spec = server_spec(server_id(9), 256)
    refusal = room_for(cloud.policy, cloud.world.look(), cloud.now, spec, None)
    assert refusal is not None
    assert "the reserve of 1 would be broken: if host-" in refusal.reason
    assert "needs 768 MiB" in refusal.reason and "512 MiB" in refusal.reason
    assert "nahtlos reserve N" in refusal.remedy
    cloud.create(9)
    report = cloud.settle()
    assert server_id(9) not in cloud.now.servers
    (waiting,) = report.waiting
    assert (waiting.kind, waiting.subject) == (WaitKind.CAPACITY, "vm-9")
    cloud.want(reserve=0)
    assert cloud.settle().converged


def test_growth_that_would_break_it_is_refused() -> None:
    cloud = running_cloud((2, 1))
    cloud.want(reserve=1)
    seen = cloud.world.look()
    spec = msgspec.structs.replace(cloud.policy.servers[server_id(1)], size=Size(vcpus=1, memory_mib=512))
    assert why_growth_breaks(cloud.policy, seen, cloud.now, spec) == ""
    spec = msgspec.structs.replace(spec, size=Size(vcpus=1, memory_mib=768))
    assert "would be broken" in why_growth_breaks(cloud.policy, seen, cloud.now, spec)


@pytest.mark.parametrize("emptied", [False, True])
def test_a_host_is_not_withdrawn_where_that_breaks_it(emptied: bool) -> None:
    cloud = running_cloud((2, 2, 0))
    cloud.want(reserve=1)
    seen = cloud.world.look()
    assert why_withdrawal_breaks(cloud.policy, seen, cloud.now, host_id(3), emptied=emptied) == ""
    cloud = running_cloud((3, 2, 0))
    cloud.want(reserve=1)
    seen = cloud.world.look()
    broken = why_withdrawal_breaks(cloud.policy, seen, cloud.now, host_id(3), emptied=emptied)
    assert "the reserve of 1 would be broken" in broken


def test_a_requested_move_that_would_break_it_waits() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.want(reserve=1)
    cloud.request(1, 2)
    cloud.settle()
    assert cloud.where(1) == host_id(2)  # three there still fit on the others
    full = running_cloud((3, 2, 3))
    full.want(reserve=1)
    full.request(4, 1)  # while it moves it takes room at both ends
    full.settle()
    assert "vm-4 is not moved to host-1: the reserve of 1 would be broken" in full.reasons("vm-4")
    assert full.where(4) == host_id(2)


# --- campaigns ---------------------------------------------------------------------------------------


def test_a_campaign_goes_on_only_while_the_reserve_is_kept_without_its_host() -> None:
    cloud = running_cloud((1, 1, 1, 1))
    cloud.want(reserve=1)
    cloud.campaign()
    for report in cloud.follow(cloud.over):
        assert report.capacity.reserve is not None and report.capacity.reserve.kept
    tight = running_cloud((2, 2, 2))
    tight.want(reserve=1)
    tight.campaign()
    tight.settle()
    assert "cannot be emptied: the reserve of 1 would be broken" in tight.reasons("host-1")
    assert tight.phase(1) is HostPhase.SERVING
    assert tight.release(1) != NEW
    tight.want(reserve=0)
    assert tight.settle().converged


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(3, 6), st.integers(1, 2), st.integers(1, 3))
def test_no_step_of_any_plan_breaks_a_reserve_that_is_kept(
    data: st.DataObject, hosts: int, k: int, parallel: int
) -> None:
    cloud = Cloud(hosts)
    cloud.want(reserve=k, parallel_moves=parallel)
    for server in range(1, 3 * hosts):
        cloud.create(server, data.draw(st.sampled_from([128, 256, 512])))
    cloud.settle()
    kept = reserve(cloud, k).kept
    assert kept or not cloud.now.servers
    for _ in range(data.draw(st.integers(5, 25))):
        host, server = data.draw(st.integers(1, hosts)), data.draw(st.integers(1, 3 * hosts))
        match data.draw(st.integers(0, 4)):
            case 0:
                cloud.request(server, data.draw(st.sampled_from([host, None])))
            case 1:
                states = (CampaignState.RUNNING, CampaignState.PAUSED, CampaignState.CANCELLED)
                cloud.campaign(data.draw(st.sampled_from(states)))
            case 2:
                intent = data.draw(st.sampled_from(HostIntent))
                seen, emptied = cloud.world.look(), intent is HostIntent.DRAINED
                if intent is HostIntent.ACTIVE or not why_withdrawal_breaks(
                    cloud.policy, seen, cloud.now, host_id(host), emptied=emptied
                ):
                    cloud.intend(host, intent)
            case _:
                pass
        cloud.step()
        assert reserve(cloud, k).kept
