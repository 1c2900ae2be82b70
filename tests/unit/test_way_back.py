"""A campaign's point of no return: until it, whatever comes to the new release can go back to the old one."""

import msgspec
import pytest
from planner_world import NEW, OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model import version_pairs
from nahtlos.model.blueprint import Campaign, CampaignState, HostPhase, ObstacleKind, Strategy, WaitKind
from nahtlos.model.errors import Conflict
from nahtlos.model.ids import CampaignId
from nahtlos.model.inventory import Accelerator, OperationState
from nahtlos.model.nouns import Component
from nahtlos.model.version_pairs import PAIRS, Pair, Verdict, Way
from nahtlos.planner.predict import forecast
from nahtlos.runtime.controllers import turning
from nahtlos.runtime.store.campaigns import CampaignRow


def cloud_of(*layout: int) -> Cloud:
    cloud = running_cloud(layout)
    cloud.world.accelerator = Accelerator(name="tcg", reason="the only one here")
    cloud.want(release_versions={OLD: "10.0.2", NEW: "11.1.3"})
    return cloud


def refused(way: Way) -> Pair:
    return Pair(
        way=way,
        old="11.1",
        new="10.0",
        accelerator="tcg",
        verdict=Verdict.REFUSED,
        why="it forgets its clock",
        source="this test",
    )


def begin(cloud: Cloud, **changes: object) -> None:
    cloud.campaign()
    assert cloud.policy.campaign is not None
    cloud.want(campaign=msgspec.structs.replace(cloud.policy.campaign, from_releases=(OLD,), **changes))


# --- pairs whose way back is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "ways", "blocked"),
    [
        (Strategy.MOVE, (), False),
        (Strategy.MOVE, (Way.MOVE,), True),
        (Strategy.MOVE, (Way.IN_PLACE,), False),
        (Strategy.IN_PLACE, (Way.IN_PLACE,), True),
        (Strategy.AUTO, (Way.MOVE,), False),
        (Strategy.AUTO, (Way.MOVE, Way.IN_PLACE), True),
    ],
)
def test_a_pair_whose_way_back_is_refused_blocks_a_campaign(
    monkeypatch: pytest.MonkeyPatch, strategy: Strategy, ways: tuple[Way, ...], blocked: bool
) -> None:
    monkeypatch.setattr(version_pairs, "PAIRS", (*map(refused, ways), *PAIRS))
    cloud = cloud_of(1, 1, 0)
    said = forecast(cloud.policy, cloud.world.look(), cloud.now, NEW, strategy=strategy)
    assert said.returns
    assert bool(said.blockers) is blocked
    for blocker in said.blockers:
        assert blocker.kind is WaitKind.BLOCKED
        assert "vm-1, vm-2 could not return from qemu-11 to qemu-10" in blocker.reason
        assert "it forgets its clock (this test)" in blocker.reason and "--no-way-back" in blocker.remedy
    without = forecast(cloud.policy, cloud.world.look(), cloud.now, NEW, strategy=strategy, no_way_back=True)
    assert not without.blockers and not without.returns


def test_7_2_under_emulation_is_taken_over_in_place_and_can_return() -> None:
    """It is refused as source of a move, and may be left and come to in place: so says the table."""
    cloud = cloud_of(1, 1, 0)
    cloud.want(release_versions={OLD: "7.2.22", NEW: "10.0.2"})
    assert not forecast(cloud.policy, cloud.world.look(), cloud.now, NEW).blockers


# --- what comes to the new release meanwhile -------------------------------------------------------------


def test_a_server_that_could_not_return_comes_to_no_upgraded_host_until_the_campaign_is_final() -> None:
    cloud = cloud_of(1, 1, 0)
    cloud.want(machine_types={OLD: ("m",), NEW: ("m", "m-next")})
    begin(cloud, hosts=(host_id(3),))
    cloud.follow(lambda: cloud.release(3) == NEW and cloud.phase(3) is HostPhase.SERVING)
    cloud.create(9, 64, on=3, machine="m-next")
    cloud.settle()
    assert server_id(9) not in cloud.now.servers
    told = cloud.reasons(server_id(9))
    assert "could not return" in told and "m-next" in told, told
    begin(cloud, hosts=(host_id(3),), committed=True)
    cloud.settle()
    assert cloud.where(9) == host_id(3)


def test_a_cpu_model_that_no_host_of_the_old_release_has_waits_likewise() -> None:
    cloud = cloud_of(0, 0, 0)
    cloud.world.accelerator = Accelerator(name="tcg", reason="r", cpu_models=("qemu64",))
    begin(cloud, hosts=(host_id(3),))
    cloud.follow(lambda: cloud.release(3) == NEW and cloud.phase(3) is HostPhase.SERVING)
    said = cloud.world.look().hosts[host_id(3)]
    assert said.accelerator is not None
    cloud.create(9, 64, on=3)
    spec = msgspec.structs.replace(cloud.policy.servers[server_id(9)], cpu_model="newer")
    cloud.want(servers={**cloud.policy.servers, spec.id: spec})
    cloud.settle()
    assert server_id(9) not in cloud.now.servers


def test_the_obstacle_names_the_command_that_makes_the_campaign_final() -> None:
    cloud = cloud_of(1, 0)
    name = server_id(1)
    cloud.want(
        machine_types={OLD: ("m",), NEW: ("m", "m-next")},
        servers={name: msgspec.structs.replace(cloud.policy.servers[name], machine="m-next")},
    )
    begin(cloud, hosts=(host_id(2),))
    cloud.follow(lambda: cloud.release(2) == NEW and cloud.phase(2) is HostPhase.SERVING)
    said = forecast(cloud.policy, cloud.world.look(), cloud.now, NEW, strategy=Strategy.MOVE)
    kinds = {obstacle.kind for obstacle in said.obstacles}
    assert kinds <= {ObstacleKind.WAY_BACK, ObstacleKind.MACHINE} and kinds


# --- turned round -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [HostPhase.EMPTYING, HostPhase.SWITCHING, HostPhase.SERVING])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_campaign_that_is_rolled_back_ends_with_every_server_and_host_at_the_old_release(
    at: HostPhase, strategy: Strategy
) -> None:
    cloud = cloud_of(1, 1, 1)
    begin(cloud, strategy=strategy)
    if at is HostPhase.SERVING:
        cloud.follow(lambda: any(cloud.release(n) == NEW and cloud.phase(n) is at for n in (1, 2, 3)))
    else:
        cloud.follow(lambda: any(cloud.phase(n) is at for n in (1, 2, 3)))
    turn(cloud)
    cloud.follow(cloud.over)
    assert {plan.release for plan in cloud.now.hosts.values()} == {OLD}
    assert {plan.phase for plan in cloud.now.hosts.values()} == {HostPhase.SERVING}
    assert set(cloud.world.under.values()) == {OLD}


def test_a_host_whose_verify_failed_is_put_back() -> None:
    cloud = cloud_of(1, 1, 0)
    cloud.world.script = {host_id(3): [(OperationState.UNDONE, None)] * 9}
    begin(cloud)
    cloud.follow(lambda: host_id(3) in cloud.now.failed_verifies)
    cloud.world.script = {}
    turn(cloud)
    cloud.follow(cloud.over)
    assert cloud.release(3) == OLD and cloud.phase(3) is HostPhase.SERVING


def turn(cloud: Cloud) -> None:
    assert cloud.policy.campaign is not None
    cloud.want(campaign=turning.rolled_back(row(cloud.policy.campaign)))


def row(campaign: Campaign) -> CampaignRow:
    return CampaignRow(campaign=campaign, capacity_floor=1.0, moves_forecast=0, hosts_upgraded=0)


BEGUN = Campaign(
    id=CampaignId("campaign-1"),
    to_release=NEW,
    from_releases=(OLD,),
    hosts=(),
    state=CampaignState.RUNNING,
)


@pytest.mark.parametrize(
    ("changes", "words", "remedy"),
    [
        ({"committed": True}, "past its point of no return: it was committed", "upgrade plan qemu-10"),
        (
            {"state": CampaignState.DONE, "ended_at": 1.0},
            "past its point of no return: it has ended",
            "upgrade plan qemu-10",
        ),
        ({"no_way_back": True}, "without a way back", "upgrade cancel"),
        ({"rolled_back": True}, "rolled back already", "wait"),
        ({"component": Component.STORAGE}, "under servers", "--component storage"),
        ({"state": CampaignState.CANCELLED}, "is cancelled", "upgrade start qemu-10"),
        ({"from_releases": ()}, "do not come from one release", "--host"),
        ({"from_releases": (OLD, NEW)}, "do not come from one release", "--host"),
    ],
)
def test_what_is_not_rolled_back_says_why_and_what_to_do(
    changes: dict[str, object], words: str, remedy: str
) -> None:
    with pytest.raises(Conflict, match=words) as refusal:
        turning.rolled_back(row(msgspec.structs.replace(BEGUN, **changes)))
    assert refusal.value.field == "campaign" and remedy in refusal.value.remedy


def test_a_paused_campaign_goes_back_and_nothing_has_to_be_able_to_return_then() -> None:
    back = turning.rolled_back(row(msgspec.structs.replace(BEGUN, state=CampaignState.PAUSED)))
    assert (back.to_release, back.from_releases, back.state) == (OLD, (NEW,), CampaignState.RUNNING)
    assert BEGUN.returns and not back.returns
    with pytest.raises(Conflict, match="is rolled back"):
        turning.committed(back)
    assert not turning.committed(BEGUN).returns


def test_without_a_campaign_there_is_nothing_to_turn() -> None:
    with pytest.raises(Conflict, match="no campaign"):
        turning.rolled_back(None)
