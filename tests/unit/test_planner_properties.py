"""What holds in every world: random clouds, seeded failures, interruptions.

The planner checks every blueprint it makes (check.py); the world of these tests asserts apart from it that no
server is moved twice at once, from where it is not, into a full host, or switched under.
"""

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planner_world import NEW, Cloud, Faults, at_most, host_id, running_cloud, server_id

from nahtlos.model.blueprint import Blueprint, CampaignState, HostIntent, WaitKind
from nahtlos.model.nouns import Size

SEEDS = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

layouts = st.lists(st.integers(0, 4), min_size=2, max_size=6).map(tuple)
faults = st.builds(
    Faults,
    undone=st.sampled_from([0.0, 0.2, 0.6]),
    slow=st.sampled_from([0.0, 0.5]),
    stale=st.sampled_from([0.0, 0.3]),
    away=st.sampled_from([0.0, 0.05]),
    verify=st.sampled_from([0.0, 0.3]),
)


def roomy(layout: tuple[int, ...]) -> int:
    """Capacity of each host, MiB, so that any one can be emptied."""
    return 256 * max(4, *layout, -(-sum(layout) // (len(layout) - 1)))


def upgraded(cloud: Cloud) -> bool:
    return all(plan.release == NEW for plan in cloud.now.hosts.values())


@quick
@given(layouts, st.integers(1, 4))
def test_a_campaign_with_room_upgrades_every_host_and_then_nothing_changes(
    layout: tuple[int, ...], parallel: int
) -> None:
    cloud = running_cloud(layout, roomy(layout))
    cloud.want(parallel_moves=parallel, promised=Size(vcpus=0, memory_mib=256 * sum(layout)))
    cloud.campaign()
    assert {report.capacity.share for report in cloud.follow(cloud.over)} <= {1.0}
    before = cloud.now
    assert cloud.settle().converged
    assert cloud.now is before
    assert upgraded(cloud)
    assert all(moves <= 2 for moves in cloud.world.moves_done.values())
    assert cloud.moves_done() <= sum(layout) + min(layout)


@quick
@given(st.integers(1, 12), st.integers(1, 3))
def test_balanced_worlds_of_three_need_few_moves(servers: int, parallel: int) -> None:
    layout = tuple(servers // 3 + (host < servers % 3) for host in range(3))
    cloud = running_cloud(layout, roomy(layout))
    cloud.want(parallel_moves=parallel)
    cloud.campaign()
    assert cloud.settle().converged
    assert upgraded(cloud)
    assert cloud.moves_done() <= at_most(servers)


@quick
@given(st.lists(st.sampled_from([128, 256, 384, 512]), min_size=1, max_size=12), SEEDS)
def test_servers_of_all_sizes_are_moved_at_most_twice(sizes: list[int], seed: int) -> None:
    cloud = Cloud(4, 4096, seed=seed)
    for number, size in enumerate(sizes):
        cloud.create(number, size)
    assert cloud.settle().converged
    cloud.campaign()
    assert cloud.settle().converged
    assert upgraded(cloud)
    assert all(moves <= 2 for moves in cloud.world.moves_done.values())


@quick
@given(layouts, faults, SEEDS, st.integers(1, 3), st.integers(1, 60))
def test_failures_are_survived_and_the_campaign_ends_once_they_stop(
    layout: tuple[int, ...], wrong: Faults, seed: int, parallel: int, steps: int
) -> None:
    cloud = running_cloud(layout, roomy(layout), seed=seed)
    cloud.want(parallel_moves=parallel)
    cloud.world.faults = wrong
    cloud.campaign()
    for _ in range(steps):
        cloud.step()
    heal(cloud)
    assert upgraded(cloud)
    assert cloud.now.servers.keys() == cloud.policy.servers.keys()
    assert {server: (a.host, a.epoch) for server, a in cloud.now.servers.items()} == cloud.world.owner


@quick
@given(st.data(), faults, SEEDS)
def test_whatever_people_do_meanwhile_no_blueprint_is_unsafe(
    data: st.DataObject, wrong: Faults, seed: int
) -> None:
    cloud = running_cloud((2, 2, 1, 0), seed=seed)
    cloud.world.faults = wrong
    cloud.campaign()
    for _ in range(data.draw(st.integers(5, 40))):
        meddle(cloud, data)
        cloud.step()
    cloud.want(requested_moves={}, intents={}, promised=Size(), parallel_moves=2)
    cloud.campaign()
    heal(cloud)
    assert upgraded(cloud)


def meddle(cloud: Cloud, data: st.DataObject) -> None:
    host, server = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    match data.draw(st.integers(0, 9)):
        case 0 if len(cloud.policy.servers) < 8 and server_id(server) not in cloud.policy.removed_servers:
            cloud.create(server)
        case 1 if server_id(server) in cloud.policy.servers:
            cloud.remove(server)
        case 2:
            cloud.intend(host, data.draw(st.sampled_from(HostIntent)))
        case 3:
            cloud.request(server, data.draw(st.sampled_from([host, None])))
        case 4:
            states = (CampaignState.RUNNING, CampaignState.PAUSED, CampaignState.CANCELLED)
            cloud.campaign(data.draw(st.sampled_from(states)))
        case 5:
            cloud.want(promised=Size(memory_mib=data.draw(st.integers(0, 4096))))
        case 6:
            cloud.want(requested_moves={})
        case _:
            pass


def heal(cloud: Cloud) -> None:
    """Everything answers and works again; an operator who is asked for lets it be tried again."""
    cloud.world.faults = Faults()
    cloud.world.away.clear()
    for _ in range(4):
        report = cloud.settle()
        if report.converged:
            return
        kinds = {waiting.kind for waiting in report.waiting}
        assert kinds & {WaitKind.OPERATOR, WaitKind.BLOCKED}, report
        cloud.campaign(CampaignState.PAUSED)
        cloud.step()
        cloud.campaign()
    raise AssertionError(f"not healed: {cloud.report}")


@quick
@given(layouts, st.lists(st.booleans(), min_size=1, max_size=20))
def test_interrupted_and_planned_again_from_what_is_stored_the_end_is_the_same(
    layout: tuple[int, ...], lost: list[bool]
) -> None:
    straight, broken = running_cloud(layout, roomy(layout)), running_cloud(layout, roomy(layout))
    for cloud in (straight, broken):
        cloud.campaign()
    straight.settle()
    for step in range(1000):
        stored = msgspec.json.encode(broken.now)
        broken.plan()
        if lost[step % len(lost)] and step < 200:  # killed between deciding and storing
            broken.blueprint = msgspec.json.decode(stored, type=Blueprint)
        broken.world.carry_out(broken.policy, broken.now)
        if broken.over():
            break
    assert broken.settle().converged
    assert broken.now.servers == straight.now.servers
    assert broken.now.hosts == straight.now.hosts
    assert broken.moves_done() == straight.moves_done()


@quick
@given(layouts, SEEDS)
def test_the_same_question_has_the_same_answer(layout: tuple[int, ...], seed: int) -> None:
    one, two = (running_cloud(layout, roomy(layout), seed=seed) for _ in range(2))
    for cloud in (one, two):
        cloud.campaign()
        cloud.settle()
    assert one.history == two.history
    assert [host_id(n + 1) for n in range(len(layout))] == sorted(one.now.hosts)
