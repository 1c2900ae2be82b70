"""What keeps servers on their host is listed beforehand, each with a remedy: in the dry run of a campaign and
in that of a drain."""

import msgspec
import pytest
from planner_world import NEW, OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model.blueprint import (
    DrainForecast,
    Forecast,
    HostIntent,
    Obstacle,
    ObstacleKind,
    Strategy,
)
from nahtlos.model.ids import ServerGroupId
from nahtlos.model.inventory import Accelerator, RunState
from nahtlos.model.placement import GroupPolicy, ServerGroup
from nahtlos.physical.hypervisor.accelerator import whole_models
from nahtlos.planner.obstacles import drain_forecast
from nahtlos.planner.predict import forecast


def drain(cloud: Cloud, host: int = 1) -> DrainForecast:
    return drain_forecast(cloud.policy, cloud.world.look(), cloud.now, host_id(host))


def campaign(cloud: Cloud, strategy: Strategy = Strategy.AUTO) -> Forecast:
    return forecast(cloud.policy, cloud.world.look(), cloud.now, NEW, strategy=strategy)


def set_of(cloud: Cloud, server: int, **changes: object) -> None:
    spec = msgspec.structs.replace(cloud.policy.servers[server_id(server)], **changes)
    cloud.want(servers={**cloud.policy.servers, spec.id: spec})


def pinned(cloud: Cloud) -> None:
    cloud.want(pins={server_id(1): host_id(1)})


def apart(cloud: Cloud) -> None:
    group = ServerGroup(id=ServerGroupId("web"), policy=GroupPolicy.ANTI_AFFINITY)
    members = {server_id(1): group.id, server_id(3): group.id, server_id(4): group.id}
    cloud.want(server_groups={group.id: group}, members=members)


def too_big(cloud: Cloud) -> None:
    set_of(cloud, 1, size=msgspec.structs.replace(cloud.policy.servers[server_id(1)].size, memory_mib=960))


def refused_pair(cloud: Cloud) -> None:
    cloud.world.accelerator = Accelerator(name="tcg", reason="")
    cloud.want(release_versions={OLD: "7.2.1", NEW: "10.0.2"})


def plugged(cloud: Cloud) -> None:
    cloud.world.accelerator = Accelerator(name="tcg", reason="")
    cloud.want(release_versions={OLD: "10.0.2", NEW: "11.1.3"})
    set_of(cloud, 1, boot_memory_mib=256, max_memory_mib=512)


def hasty(cloud: Cloud) -> None:
    set_of(cloud, 1, blackout_budget_ms=1)


def crashed(cloud: Cloud) -> None:
    cloud.world.state[server_id(1)] = RunState.CRASHED


def no_machine(cloud: Cloud) -> None:
    cloud.want(machine_types={OLD: ("other",), NEW: ("m",)})


CASES = [
    (pinned, ObstacleKind.PIN, "is pinned to host-1", "--unpin"),
    (apart, ObstacleKind.GROUP, "host-2 has vm-3 of web (anti-affinity)", "add or activate a host"),
    (too_big, ObstacleKind.ROOM, "needs 960 MiB", "add a host"),
    (refused_pair, ObstacleKind.VERSION_PAIR, "7.2", "server replace-vmm vm-1"),
    (plugged, ObstacleKind.PLUGGED_MEMORY, "memory that can be plugged", "server replace-vmm vm-1"),
    (hasty, ObstacleKind.BUDGET, "its budget is 1 ms", "--blackout-budget MS"),
    (crashed, ObstacleKind.STATE, "has crashed on host-1", "console"),
    (no_machine, ObstacleKind.MACHINE, "machine type m", "another release"),
]


def of_first(found: tuple[Obstacle, ...]) -> Obstacle:
    return next(obstacle for obstacle in found if obstacle.server == server_id(1))


@pytest.mark.parametrize(("arrange", "kind", "reason", "remedy"), CASES)
def test_each_obstacle_is_named_beforehand_with_its_remedy(
    arrange: object, kind: ObstacleKind, reason: str, remedy: str
) -> None:
    cloud = running_cloud((2, 1, 1))
    assert callable(arrange)
    arrange(cloud)
    found = of_first(drain(cloud).obstacles)
    assert (found.host, found.kind) == (host_id(1), kind)
    assert reason in found.reason
    assert remedy in found.remedy
    assert of_first(campaign(cloud, Strategy.MOVE).obstacles) == found


def test_a_drain_that_nothing_keeps_says_where_servers_go_and_does_nothing() -> None:
    cloud = running_cloud((2, 1, 0))
    before = cloud.now
    found = drain(cloud)
    assert {move.server for move in found.moves} == {"vm-1", "vm-2"}
    assert all(move.destination != host_id(1) and move.gap_ms > 0 for move in found.moves)
    assert (found.obstacles, found.reserve) == ((), "")
    cloud.intend(1, HostIntent.DRAINED)
    assert cloud.settle().converged
    assert before is not cloud.now
    assert {cloud.where(1), cloud.where(2)} == {move.destination for move in found.moves}


def test_a_drain_that_would_break_the_reserve_says_so() -> None:
    cloud = running_cloud((3, 2, 0))
    cloud.want(reserve=1)
    found = drain(cloud, 3)
    assert "the reserve of 1 would be broken" in found.reserve
    assert "nahtlos reserve N" in found.remedy


def test_what_is_taken_over_in_place_is_no_hindrance_and_said_so() -> None:
    cloud = running_cloud((2, 1, 1))
    plugged(cloud)
    pinned(cloud)
    plan = campaign(cloud)
    assert of_first(plan.obstacles).instead == "it is taken over in place"
    assert not plan.blockers
    assert of_first(campaign(cloud, Strategy.MOVE).obstacles).instead == ""
    assert campaign(cloud, Strategy.MOVE).blockers
    assert campaign(cloud, Strategy.IN_PLACE).obstacles == ()


def test_the_reserve_is_shown_at_its_worst_step() -> None:
    cloud = running_cloud((1, 1, 1, 1))
    assert campaign(cloud).reserve is None
    cloud.want(reserve=1)
    kept = campaign(cloud).reserve
    assert kept is not None and kept.kept
    tight = running_cloud((2, 2, 2))
    tight.want(reserve=1)
    assert any("the reserve of 1 would be broken" in b.reason for b in campaign(tight).blockers)


# --- processors, and the way back ----------------------------------------------------------------------


def test_a_host_that_lacks_features_of_the_cpu_model_is_no_destination() -> None:
    cloud = running_cloud((1, 0, 0))
    seen = cloud.world.look()
    accelerators = {
        host_id(1): ("qemu64", "Nehalem"),
        host_id(2): ("Nehalem",),
        host_id(3): (),  # has not told
    }
    hosts = {
        host: msgspec.structs.replace(
            seen.hosts[host], accelerator=Accelerator(name="kvm", reason="", cpu_models=models)
        )
        for host, models in accelerators.items()
    }
    seen = msgspec.structs.replace(seen, hosts=hosts)
    assert [m.destination for m in drain_forecast(cloud.policy, seen, cloud.now, host_id(1)).moves] == [
        "host-3"
    ]
    hosts[host_id(3)] = msgspec.structs.replace(hosts[host_id(2)], host=host_id(3))
    seen = msgspec.structs.replace(seen, hosts=hosts)
    found = of_first(drain_forecast(cloud.policy, seen, cloud.now, host_id(1)).obstacles)
    assert found.kind is ObstacleKind.MACHINE
    assert "host-2 cannot give vm-1 all features of the CPU model qemu64" in found.reason
    assert found.remedy


def test_of_what_a_hypervisor_says_whole_named_models_count() -> None:
    answer = [
        {"name": "qemu64", "unavailable-features": []},
        {"name": "EPYC", "unavailable-features": ["npt"]},
        {"name": "max", "unavailable-features": []},
        {"name": "old", "static": False},
    ]
    assert whole_models(answer) == ("qemu64",)


def test_the_way_back_is_named_by_its_row() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.accelerator = Accelerator(name="tcg", reason="")
    cloud.want(release_versions={OLD: "10.0.2", NEW: "11.1.3"})
    (row,) = campaign(cloud).ways_back
    assert row.startswith("qemu 11.1 to 10.0, move, tcg: proven")
    cloud.want(release_versions={OLD: "7.2.1", NEW: "10.0.2"})
    (row,) = campaign(cloud).ways_back
    assert row.startswith("qemu 10.0 to 7.2, in-place, tcg: proven")
    cloud.want(release_versions={OLD: "10.0.2", NEW: "12.0.0"})
    (row,) = campaign(cloud).ways_back
    assert "refused, nobody has tried it" in row
