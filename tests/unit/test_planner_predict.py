"""The dry run: it says what the campaign then does, and what is in the way."""

import msgspec
import pytest
from planner_world import NEW, OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model.blueprint import Forecast, HostIntent
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Size
from nahtlos.planner import predict
from nahtlos.planner.predict import MoveSample, forecast, predict_move


def ask(cloud: Cloud, hosts: tuple[int, ...] | None = None) -> Forecast:
    chosen = None if hosts is None else tuple(host_id(number) for number in hosts)
    return forecast(cloud.policy, cloud.world.look(), cloud.blueprint, NEW, chosen)


def blockers(found: Forecast) -> str:
    return " | ".join(f"{blocker.reason} -> {blocker.remedy}" for blocker in found.blockers)


@pytest.mark.parametrize("layout", [(2, 2, 2), (3, 3, 0), (4, 1, 2, 3)])
def test_the_campaign_does_what_was_forecast(layout: tuple[int, ...]) -> None:
    cloud = running_cloud(layout)
    before = cloud.now
    said = ask(cloud)
    assert cloud.now is before
    assert not said.blockers
    cloud.campaign()
    cloud.settle()
    done = {move.id: move for blueprint in cloud.history for move in blueprint.moves}
    forecast_moves = [(m.server, m.source, m.destination) for step in said.hosts for m in step.moves]
    assert forecast_moves == [(m.server, m.source, m.destination) for m in done.values()]
    assert said.total_moves == len(done)
    assert said.moves_per_server == pytest.approx(len(done) / sum(layout))
    order = [b.upgrading for b in cloud.history if b.upgrading]
    assert [step.host for step in said.hosts] == list(dict.fromkeys(order))
    assert {(step.from_release, step.to_release) for step in said.hosts} == {(OLD, NEW)}


def test_the_floor_is_the_least_share_on_the_way() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.want(promised=Size(vcpus=4, memory_mib=2048))
    assert ask(cloud).capacity_floor == 1.0


def test_the_promise_blocks_by_how_much() -> None:
    cloud = running_cloud((2, 2, 2))
    cloud.want(promised=Size(vcpus=4, memory_mib=2304))
    said = ask(cloud)
    assert said.total_moves == 0
    assert "256 MiB and 0 vCPUs of the 2304 MiB and 4 vCPUs promised" in blockers(said)
    assert "add a host" in blockers(said)


def test_a_server_too_big_for_every_other_host_blocks() -> None:
    cloud = Cloud(2, 512)
    cloud.world.capacities[host_id(1)] = Size(vcpus=8, memory_mib=1024)
    cloud.create(1, 768)
    cloud.settle()
    said = ask(cloud)
    assert "vm-1 (768 MiB and 1 vCPU) is too big for every host but host-1" in blockers(said)
    assert "add a host with at least 768 MiB and 1 vCPU" in blockers(said)


def test_hosts_out_of_reach_block() -> None:
    cloud = running_cloud((1, 1, 1))
    cloud.world.away = {host_id(1)}
    cloud.world.releases[host_id(2)] = (OLD,)
    cloud.world.verified[host_id(3)] = None
    said = ask(cloud, hosts=(1, 2, 3, 9))
    text = blockers(said)
    assert "host-1 is not upgraded: its agent is not connected" in text
    assert "host-2 is not upgraded: it has no intact copy of qemu-11" in text
    assert "host-3 has found no accelerator" in text
    assert "host-9 is no compute host of this cloud" in text
    assert [step.host for step in said.hosts] == [host_id(3)]


def test_a_machine_type_the_release_lacks_blocks() -> None:
    cloud = running_cloud((1, 1))
    cloud.want(machine_types={NEW: ("m-new",)})
    said = ask(cloud)
    assert "qemu-11 lacks the machine type m of vm-1" in blockers(said)
    assert "one of: m-new" in blockers(said)


def test_a_crashed_server_blocks() -> None:
    cloud = running_cloud((1, 1))
    cloud.world.state[server_id(1)] = RunState.CRASHED
    assert "vm-1 has crashed" in blockers(ask(cloud))


def test_a_cordon_that_takes_the_room_blocks() -> None:
    cloud = running_cloud((1, 1))
    cloud.intend(2, HostIntent.CORDONED)
    cloud.settle()
    assert "no other host is in service" in blockers(ask(cloud, hosts=(1,)))


# --- predictions -------------------------------------------------------------------------------------


def test_without_samples_the_table_is_used_and_named() -> None:
    small = predict_move(256, (OLD, NEW), 1, ())
    assert (small.gap_ms, small.gap_ms_max) == (predict.TABLE_GAP_MS, predict.TABLE_GAP_MS_MAX)
    assert small.seconds == pytest.approx(predict.TABLE_SECONDS + predict.TABLE_VMM_START)
    assert predict_move(1024, (OLD, NEW), 1, ()).seconds > small.seconds
    assert predict_move(256, (OLD, NEW), 4, ()).gap_ms > small.gap_ms
    assert "the table" in ask(running_cloud((1, 1))).basis


def test_samples_of_the_same_releases_and_size_count_more() -> None:
    def sample(gap: float, memory: int = 256, to: str = NEW) -> MoveSample:
        return MoveSample(memory_mib=memory, seconds=gap / 100, gap_ms=gap, from_release=OLD, to_release=to)  # type: ignore[arg-type]

    samples = [sample(50), sample(52), sample(90), *[sample(500, to=OLD)] * 9]
    assert predict_move(256, (OLD, NEW), 1, samples).gap_ms == 52
    assert predict_move(256, (OLD, NEW), 1, samples).gap_ms_max == 90
    assert predict_move(256, (NEW, NEW), 1, samples).gap_ms == 500
    near_and_far = [sample(10)] * predict.NEAREST_SAMPLES + [sample(900, memory=8192)] * 40
    assert predict_move(300, (OLD, NEW), 1, near_and_far).gap_ms == 10


def test_measured_moves_make_the_forecast() -> None:
    cloud = running_cloud((1, 1))
    samples = [MoveSample(memory_mib=256, seconds=2.0, gap_ms=40.0)]
    said = forecast(cloud.policy, cloud.world.look(), cloud.now, NEW, None, samples, verify_seconds=1.0)
    assert said.basis == "1 measured move of this cloud"
    assert said.gap_ms_p50 == 40.0
    assert said.seconds == pytest.approx(3 * 2.0 + 2 * 1.0)


def test_moves_beside_each_other_take_less_time() -> None:
    cloud = running_cloud((4, 4, 0))
    slow = ask(cloud).seconds
    cloud.policy = msgspec.structs.replace(cloud.policy, parallel_moves=4)
    assert ask(cloud).seconds < slow
