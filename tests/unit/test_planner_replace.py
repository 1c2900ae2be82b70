"""Campaigns that replace something under servers which stay: storage daemons, network functions."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_world import NEW, OLD, REFUSED, Cloud, Faults, host_id, running_cloud, server_id
from test_planner_properties import SEEDS, faults, layouts, quick, roomy

from nahtlos.model.blueprint import Blueprint, CampaignState, HostIntent, HostPhase
from nahtlos.model.ids import ReleaseId, VolumeId
from nahtlos.model.nouns import Component, HostRole
from nahtlos.model.storage import VolumeSpec
from nahtlos.planner.predict import forecast

COMPONENTS = (Component.STORAGE, Component.NETWORK)
components = pytest.mark.parametrize("component", COMPONENTS)


def has(cloud: Cloud, host: int, component: Component) -> ReleaseId | None:
    """What the host really runs."""
    world = cloud.world
    return (world.storage if component is Component.STORAGE else world.network)[host_id(host)]


def replaced(cloud: Cloud, component: Component) -> list[ReleaseId | None]:
    return [has(cloud, n + 1, component) for n in range(len(cloud.world.capacities))]


def being_replaced(blueprint: Blueprint) -> list[str]:
    return [host for host, plan in blueprint.hosts.items() if plan.replacing is not None]


@components
def test_one_host_after_the_other_and_no_server_moves(component: Component) -> None:
    cloud = running_cloud((2, 1, 0))
    before = len(cloud.history)
    cloud.campaign(component=component)
    assert cloud.settle().converged
    assert replaced(cloud, component) == [NEW, NEW, NEW]
    assert cloud.moves_done() == 0 and cloud.spread() == [2, 1, 0]
    taken = [host for b in cloud.history[before:] for host in being_replaced(b)]
    assert list(dict.fromkeys(taken)) == ["host-3", "host-2", "host-1"], "those with few servers first"
    assert all(len(being_replaced(b)) <= 1 for b in cloud.history)
    assert all(plan.phase is HostPhase.SERVING for b in cloud.history[before:] for plan in b.hosts.values())
    assert cloud.over() and cloud.release(1) == OLD, "the hypervisor is as it was"


@components
def test_the_next_host_waits_until_the_one_before_reports_the_release(component: Component) -> None:
    cloud = running_cloud((0, 0))
    cloud.campaign(component=component)
    cloud.world.faults = Faults(slow=1.0)
    for _ in range(5):
        cloud.step()
    assert being_replaced(cloud.now) == ["host-1"]
    assert "is not reported yet" in cloud.reasons("host-1")
    cloud.world.faults = Faults()
    assert cloud.settle().converged


@components
def test_a_host_with_a_problem_stops_the_campaign(component: Component) -> None:
    cloud = running_cloud((0, 0, 0))
    cloud.campaign(component=component)
    cloud.step()
    cloud.world.problems[host_id(1)] = REFUSED
    for _ in range(5):
        cloud.step()
    assert being_replaced(cloud.now) == ["host-1"]
    assert has(cloud, 2, component) != NEW
    assert "the probe did not boot" in cloud.reasons("host-1")
    assert cloud.report and any("cancel the campaign" in w.remedy for w in cloud.report.waiting)
    del cloud.world.problems[host_id(1)]
    assert cloud.settle().converged


@components
def test_one_that_falls_ill_afterwards_stops_it_too(component: Component) -> None:
    cloud = running_cloud((0, 0, 0))
    cloud.campaign(component=component)
    cloud.follow(lambda: being_replaced(cloud.now) == ["host-2"])
    cloud.world.problems[host_id(1)] = REFUSED
    report = cloud.settle()
    assert not report.converged and has(cloud, 3, component) != NEW
    assert "no further host is taken" in cloud.reasons("host-1")


@components
def test_cancelled_the_host_that_is_being_replaced_goes_back(component: Component) -> None:
    cloud = running_cloud((1, 1))
    came = has(cloud, 1, component)
    cloud.campaign(component=component)
    cloud.step()
    cloud.world.problems[host_id(1)] = REFUSED
    cloud.step()
    assert has(cloud, 1, component) == NEW
    cloud.campaign(CampaignState.CANCELLED, component=component)
    cloud.step()
    assert not cloud.over(), "it is not healthy yet"
    del cloud.world.problems[host_id(1)]
    cloud.settle()
    assert cloud.over() and replaced(cloud, component) == [came, came]
    assert being_replaced(cloud.now) == []


@components
def test_paused_it_ends_what_has_begun_and_begins_nothing(component: Component) -> None:
    cloud = running_cloud((0, 0))
    cloud.campaign(component=component)
    cloud.plan()
    cloud.campaign(CampaignState.PAUSED, component=component)
    cloud.settle()
    assert replaced(cloud, component).count(NEW) == 1 and being_replaced(cloud.now) == []
    assert "paused" in cloud.reasons("host-2")
    cloud.campaign(component=component)
    assert cloud.settle().converged and replaced(cloud, component) == [NEW, NEW]


@components
def test_back_to_the_release_before_is_another_campaign(component: Component) -> None:
    cloud = running_cloud((1, 1))
    for number, release in enumerate((NEW, OLD, NEW)):
        cloud.campaign(component=component, to=release, name=f"c-{number}")
        assert cloud.settle().converged
        assert replaced(cloud, component) == [release, release]
    assert cloud.moves_done() == 0


@components
def test_hosts_away_or_without_the_release_are_left_and_said(component: Component) -> None:
    cloud = running_cloud((0, 0, 0))
    cloud.world.away.add(host_id(1))
    cloud.world.releases[host_id(2)] = (OLD,)
    cloud.campaign(component=component)
    cloud.settle()
    assert "not connected" in cloud.reasons("host-1") and "no intact copy" in cloud.reasons("host-2")
    assert has(cloud, 3, component) == NEW
    cloud.world.away.clear()
    cloud.world.releases[host_id(2)] = (OLD, NEW)
    assert cloud.settle().converged and replaced(cloud, component) == [NEW] * 3


def test_edge_hosts_have_network_functions_and_no_storage() -> None:
    for component, whole in ((Component.STORAGE, False), (Component.NETWORK, True)):
        cloud = running_cloud((0, 0))
        spec = msgspec.structs.replace(cloud.policy.hosts[host_id(2)], role=HostRole.EDGE)
        cloud.want(hosts={**cloud.policy.hosts, spec.id: spec})
        cloud.campaign(component=component)
        cloud.follow(cloud.over)
        assert (has(cloud, 2, component) == NEW) is whole


def with_volumes(cloud: Cloud, *homes: int) -> None:
    volumes = {
        VolumeId(server_id(n)): VolumeSpec(
            id=VolumeId(server_id(n)), size_mib=1, image=None, host=host_id(home)
        )
        for n, home in enumerate(homes, start=1)
    }
    cloud.want(volumes=volumes)


def test_moves_and_the_replacement_of_what_serves_their_volume_wait_for_each_other() -> None:
    cloud = running_cloud((1, 0, 0))
    with_volumes(cloud, 3)
    cloud.world.faults = Faults(slow=1.0)
    cloud.request(1, 2)
    cloud.step()
    cloud.campaign(component=Component.STORAGE, hosts=(3,))
    cloud.step()
    assert being_replaced(cloud.now) == [] and "whose volume it serves" in cloud.reasons("host-3")
    cloud.world.faults = Faults()
    cloud.follow(lambda: being_replaced(cloud.now) == ["host-3"])
    cloud.request(1, 1)
    cloud.plan()
    assert cloud.now.moves == () or has(cloud, 3, Component.STORAGE) == NEW
    assert cloud.settle().converged and cloud.where(1) == host_id(1)


def test_a_drained_host_is_replaced_all_the_same() -> None:
    cloud = running_cloud((1, 1, 0))
    cloud.intend(1, HostIntent.DRAINED)
    cloud.campaign(component=Component.STORAGE)
    assert cloud.settle().converged
    assert replaced(cloud, Component.STORAGE) == [NEW] * 3 and cloud.phase(1) is HostPhase.DRAINED


def test_who_joins_is_given_what_the_others_have() -> None:
    cloud = Cloud(1)
    cloud.want(storage_release=NEW, network_release=NEW)
    cloud.settle()
    plan = cloud.now.hosts[host_id(1)]
    assert (plan.storage_release, plan.network_release, plan.replacing) == (NEW, NEW, None)


@components
def test_the_forecast_names_every_host_and_no_move(component: Component) -> None:
    cloud = running_cloud((2, 1))
    found = forecast(cloud.policy, cloud.world.look(), cloud.blueprint, NEW, component=component)
    assert [step.host for step in found.hosts] == ["host-2", "host-1"]
    assert found.total_moves == 0 and found.blockers == () and found.seconds > 0
    assert {step.from_release for step in found.hosts} == {has(cloud, 1, component)}


@quick
@given(layouts, faults, SEEDS, st.sampled_from(COMPONENTS), st.integers(1, 40))
def test_it_ends_once_failures_stop_and_never_takes_two(
    layout: tuple[int, ...], wrong: Faults, seed: int, component: Component, steps: int
) -> None:
    cloud = running_cloud(layout, roomy(layout), seed=seed)
    cloud.world.faults = wrong
    cloud.campaign(component=component)
    for _ in range(steps):
        cloud.step()
    cloud.world.faults = Faults()
    cloud.world.away.clear()
    assert cloud.settle().converged
    assert set(replaced(cloud, component)) == {NEW}
    assert all(len(being_replaced(b)) <= 1 for b in cloud.history)
    assert cloud.moves_done() == 0


@quick
@given(layouts, st.sampled_from(COMPONENTS), SEEDS, st.lists(st.booleans(), min_size=1, max_size=12))
def test_killed_between_deciding_and_storing_the_end_is_the_same(
    layout: tuple[int, ...], component: Component, seed: int, lost: list[bool]
) -> None:
    straight, broken = running_cloud(layout, roomy(layout)), running_cloud(layout, roomy(layout))
    for cloud in (straight, broken):
        cloud.campaign(component=component)
    straight.settle()
    for step in range(300):
        stored = msgspec.json.encode(broken.now)
        broken.plan()
        if lost[step % len(lost)] and step < 60:
            broken.blueprint = msgspec.json.decode(stored, type=Blueprint)
        broken.world.carry_out(broken.policy, broken.now)
    assert broken.settle().converged
    assert broken.now.hosts == straight.now.hosts


@quick
@given(layouts, faults, SEEDS, st.sampled_from(COMPONENTS), st.integers(0, 30))
def test_cancelled_at_any_moment_each_host_has_the_one_or_the_other(
    layout: tuple[int, ...], wrong: Faults, seed: int, component: Component, steps: int
) -> None:
    cloud = running_cloud(layout, roomy(layout), seed=seed)
    came = has(cloud, 1, component)
    cloud.world.faults = wrong
    cloud.campaign(component=component)
    for _ in range(steps):
        cloud.step()
    cloud.campaign(CampaignState.CANCELLED, component=component)
    cloud.world.faults = Faults()
    cloud.world.away.clear()
    cloud.settle()
    assert cloud.over() and being_replaced(cloud.now) == []
    for number in range(len(layout)):
        plan = cloud.now.hosts[host_id(number + 1)]
        wanted = plan.release_of(component) or (came if component is Component.STORAGE else None)
        assert has(cloud, number + 1, component) == wanted
        assert wanted in (came, NEW)
