"""The dry run: it says what the campaign then does, and what is in the way."""

import msgspec
import pytest
from planner_world import NEW, OLD, Cloud, host_id, running_cloud, server_id

from nahtlos.model.blackout import COPY_PAUSE_MS
from nahtlos.model.blueprint import Forecast, HostIntent
from nahtlos.model.ids import ReleaseId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Size
from nahtlos.model.prediction import Experience, Means, Sample, Workload
from nahtlos.physical.agent import convergence, precopy
from nahtlos.planner import estimate as estimating
from nahtlos.planner import ways
from nahtlos.planner.estimate import MIB, error_p90, estimate, learn, model
from nahtlos.planner.predict import forecast
from nahtlos.wire.messages import MoveOrder


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


def work(memory_mib: int = 256, dirty_mib: int | None = 0, devices: int = 2) -> Workload:
    dirty = None if dirty_mib is None else dirty_mib * MIB
    return Workload(memory_mib=memory_mib, dirty_rate=dirty, devices=devices)


def sample(
    pause: float,
    memory: int = 256,
    to: ReleaseId = NEW,
    means: Means = Means.PRE_COPY,
    server: int = 1,
    dirty_mib: int = 0,
    link_mib: int = 0,
) -> Sample:
    return Sample(
        means=means,
        server=server_id(server),
        memory_mib=memory,
        seconds=1.0,
        pause_ms=pause,
        from_release=OLD,
        to_release=to,
        dirty_rate=dirty_mib * MIB,
        link=link_mib * MIB,
    )


def test_the_model_watches_a_pre_copy_as_the_agent_does() -> None:
    assert estimating.NEAR_BYTES == precopy.NEAR_BYTES
    assert estimating.SETTLE_SECONDS == precopy.SETTLE_SECONDS
    assert estimating.FORCED_PAUSE_SECONDS == precopy.FORCED_PAUSE_SECONDS
    assert estimating.PATIENCE_SECONDS == convergence.PATIENCE_SECONDS
    assert _default_deadline() == estimating.DEADLINE_SECONDS
    assert ways.NOT_CONVERGED == precopy.NOT_CONVERGED


def _default_deadline() -> float:
    field = next(f for f in msgspec.structs.fields(MoveOrder) if f.name == "precopy_deadline")
    return field.default


def test_in_place_no_size_and_no_writing_makes_a_difference() -> None:
    small, big = model(Means.IN_PLACE, work(256)), model(Means.IN_PLACE, work(65536, 900))
    assert small.blackout_ms == big.blackout_ms
    assert big.brownout_seconds == 0.0
    assert model(Means.IN_PLACE, work(256, devices=6)).blackout_ms > small.blackout_ms


def test_a_copy_takes_as_long_as_memory_and_link_say_and_blacks_out_no_longer() -> None:
    small, big = model(Means.PRE_COPY, work(256)), model(Means.PRE_COPY, work(1024))
    assert big.brownout_seconds == pytest.approx(4 * small.brownout_seconds)
    assert big.blackout_ms == small.blackout_ms
    assert model(Means.PRE_COPY, work(1024), link=128 * MIB).brownout_seconds == pytest.approx(8.0)


def test_what_is_written_faster_than_it_is_sent_does_not_converge_unless_it_is_slowed_down() -> None:
    hard = work(512, 400)
    given_up = model(Means.PRE_COPY, hard, link=128 * MIB)
    assert not given_up.converges
    assert estimating.PATIENCE_SECONDS <= given_up.brownout_seconds < 20
    slowed = model(Means.SLOWED, hard, link=128 * MIB)
    assert slowed.converges
    assert given_up.brownout_seconds < slowed.brownout_seconds < estimating.DEADLINE_SECONDS
    assert model(Means.PRE_COPY, work(2048, 40), link=128 * MIB).converges


def test_no_blackout_is_longer_than_agents_would_let_it_be() -> None:
    """Over a slow link all of the memory is left, again and again; but nothing is switched then."""
    hard = work(256, 60)
    told = model(Means.PRE_COPY, hard, link=12 * MIB)
    assert not told.converges
    by_the_way = 60 / 12 * precopy.HANDOVER_SECONDS * 1000
    assert told.pause_ms == pytest.approx(COPY_PAUSE_MS + precopy.FORCED_PAUSE_SECONDS * 1000 + by_the_way)


def test_a_budget_lets_the_rest_be_as_large_as_can_be_sent_within_it_and_no_larger() -> None:
    hard = work(64, 400)
    assert not model(Means.PRE_COPY, hard, link=128 * MIB).converges
    wide = msgspec.structs.replace(hard, blackout_budget_ms=600)
    said = model(Means.PRE_COPY, wide, link=128 * MIB)
    assert said.converges
    assert said.blackout_ms <= 600
    tight = msgspec.structs.replace(work(32, 400), blackout_budget_ms=200)
    assert not model(Means.PRE_COPY, tight, link=128 * MIB).converges


def test_a_small_server_that_writes_all_of_its_memory_is_forced_and_pays_for_it_in_blackout() -> None:
    forced = model(Means.PRE_COPY, work(32, 4000), link=128 * MIB)
    assert forced.converges
    assert forced.pause_ms == pytest.approx(COPY_PAUSE_MS + 250.0)


def test_post_copy_ends_however_fast_is_written_and_costs_more_over_a_slow_link() -> None:
    said = model(Means.POST_COPY, work(256, 400), link=128 * MIB)
    assert said.converges and not said.refused
    assert said.blackout_ms_max > model(Means.POST_COPY, work(256, 400)).blackout_ms_max
    assert said.seconds > 2 * 256 / 128


def test_another_accelerator_wakes_sooner_and_many_at_once_later() -> None:
    alone = model(Means.PRE_COPY, work())
    assert model(Means.PRE_COPY, work(), accelerator="kvm").blackout_ms < alone.blackout_ms
    assert model(Means.PRE_COPY, work(), parallel=4).blackout_ms > alone.blackout_ms
    assert model(Means.IN_PLACE, work(), parallel=4) == model(Means.IN_PLACE, work())


def test_measured_ones_put_the_model_right_for_their_releases_and_their_way() -> None:
    raw = model(Means.PRE_COPY, work())
    known = learn([sample(raw.pause_ms * 2)] * 3 + [sample(raw.pause_ms * 4, to=OLD)] * 3)

    def said(to: ReleaseId, means: Means = Means.PRE_COPY) -> float:
        return estimate(means, work(), known, releases=(OLD, to)).pause_ms

    assert said(NEW) == pytest.approx(raw.pause_ms * 2)
    assert said(OLD) == pytest.approx(raw.pause_ms * 4)
    assert said(ReleaseId("qemu-12")) == pytest.approx(raw.pause_ms * 3)
    assert said(NEW, Means.IN_PLACE) == model(Means.IN_PLACE, work()).pause_ms


def test_what_cold_processes_took_lately_is_predicted_whatever_the_way() -> None:
    def woke(*wakes: float | None) -> list[Sample]:
        return [msgspec.structs.replace(sample(11.0, means=Means.IN_PLACE), wake_ms=w) for w in wakes]

    def cold(known: Experience) -> list[float]:
        said = [estimate(means, work(), known) for means in (Means.IN_PLACE, Means.PRE_COPY)]
        return [one.blackout_ms - one.pause_ms for one in said]

    usual = cold(learn([]))
    assert cold(learn(woke(90.0, 90.0, None))) == usual
    assert cold(learn(woke(90.0, 80.0, 70.0))) == pytest.approx([80.0, 80.0])
    busy_before = woke(*[60.0] * estimating.NEWEST_WAKES, *[200.0] * 30)
    assert cold(learn(busy_before)) == pytest.approx([60.0, 60.0])
    assert cold(learn(woke(*[9000.0] * 3))) == pytest.approx([estimating.RATIO_BOUNDS[1] * w for w in usual])
    steady = woke(*[90.0] * 5)
    assert error_p90(steady, learn(steady)) == pytest.approx(0.0)
    assert (error_p90(steady, learn([])) or 0.0) > 0.2


def timed(*, brownout: float, rest: float, server: int = 1, dirty_mib: int = 0) -> Sample:
    """Of a link that carries 128 MiB/s."""
    one = sample(50.0, server=server, dirty_mib=dirty_mib, link_mib=128)
    return msgspec.structs.replace(one, brownout_seconds=brownout, seconds=brownout + rest + 0.05)


def test_what_a_move_takes_beside_the_copying_does_not_grow_with_it() -> None:
    """Another server is four times as large: only the copying takes longer."""
    known = learn([timed(brownout=4.0, rest=1.5, server=n) for n in (1, 2, 3)])
    small, large = (estimate(Means.PRE_COPY, work(memory), known) for memory in (256, 1024))
    assert small.brownout_seconds == pytest.approx(4.0)
    assert large.brownout_seconds == pytest.approx(16.0)
    assert [one.seconds - one.brownout_seconds for one in (small, large)] == pytest.approx([1.55, 1.55])
    in_place = learn([msgspec.structs.replace(timed(brownout=0.0, rest=1.5), means=Means.IN_PLACE)] * 3)
    said = estimate(Means.IN_PLACE, work(8192), in_place)
    assert (said.brownout_seconds, said.seconds) == (0.0, pytest.approx(1.55))


def test_how_a_servers_memory_was_copied_before_says_how_it_will_be() -> None:
    """One whose memory is mostly never touched is copied faster than its size says."""
    usual = [timed(brownout=4.0, rest=1.0, server=n) for n in (2, 3, 4)]
    known = learn([timed(brownout=0.5, rest=1.0), *usual])

    def said(server: int) -> float:
        asked = msgspec.structs.replace(work(), server=server_id(server))
        return estimate(Means.PRE_COPY, asked, known).brownout_seconds

    assert (said(1), said(2), said(9)) == pytest.approx((0.5, 4.0, 4.0))
    assert estimate(Means.IN_PLACE, msgspec.structs.replace(work(), server=server_id(1)), known).seconds < 2


def test_where_the_copying_was_not_told_apart_the_whole_time_is_put_right() -> None:
    raw = model(Means.PRE_COPY, work())
    known = learn([msgspec.structs.replace(sample(raw.pause_ms), seconds=raw.seconds * 3)] * 3)
    assert estimate(Means.PRE_COPY, work(), known).seconds == pytest.approx(raw.seconds * 3)
    few = learn([timed(brownout=4.0, rest=1.0)] * 2 + [sample(50.0, link_mib=128)] * 2)
    assert few.calibrations[0].fixed_seconds is None


def test_too_few_and_absurd_ones_are_not_believed() -> None:
    raw = model(Means.PRE_COPY, work())
    assert learn([sample(raw.pause_ms * 2)] * 2).calibrations == ()
    absurd = learn([sample(raw.pause_ms * 1000)] * 3)
    assert estimate(Means.PRE_COPY, work(), absurd).pause_ms == pytest.approx(
        raw.pause_ms * estimating.RATIO_BOUNDS[1]
    )
    one_of_many = learn([sample(raw.pause_ms)] * 9 + [sample(raw.pause_ms * 1000)])
    assert estimate(Means.PRE_COPY, work(), one_of_many).pause_ms == pytest.approx(raw.pause_ms)


def test_the_rate_that_was_measured_last_is_a_servers_and_the_link_is_the_median() -> None:
    known = learn(
        [
            sample(15, dirty_mib=300, link_mib=100),
            sample(15, dirty_mib=10, link_mib=900),
            sample(15, server=2, dirty_mib=50, link_mib=120),
        ]
    )
    assert known.dirty_rates == {server_id(1): 300 * MIB, server_id(2): 50 * MIB}
    assert known.link == 120 * MIB


def test_nine_in_ten_errors_are_no_larger() -> None:
    raw = model(Means.PRE_COPY, work())
    samples = [sample(raw.pause_ms)] * 9 + [sample(raw.pause_ms * 50)]
    assert error_p90(samples, learn(samples)) == pytest.approx(0.0)
    worse = [*samples[:8], *samples[9:], *samples[9:]]
    assert (error_p90(worse, learn(worse)) or 0.0) > 0.5
    assert error_p90([], learn([])) is None


def test_without_samples_the_table_is_used_and_named() -> None:
    said = ask(running_cloud((1, 1)))
    assert "the table" in said.basis
    assert said.error_p90 is None


def test_measured_moves_make_the_forecast() -> None:
    cloud = running_cloud((1, 1))
    raw = model(Means.PRE_COPY, work())
    samples = [sample(raw.pause_ms * 3, server=n) for n in (1, 2, 1)]
    said = forecast(cloud.policy, cloud.world.look(), cloud.now, NEW, None, samples, verify_seconds=1.0)
    assert said.basis == "3 measured moves of this cloud"
    assert said.gap_ms_p50 == pytest.approx(raw.blackout_ms + 2 * raw.pause_ms)
    assert said.seconds == pytest.approx(3 * 1.0 + 2 * 1.0)
    assert said.error_p90 == pytest.approx(0.0)


def test_moves_beside_each_other_take_less_time() -> None:
    cloud = running_cloud((4, 4, 0))
    slow = ask(cloud).seconds
    cloud.policy = msgspec.structs.replace(cloud.policy, parallel_moves=4)
    assert ask(cloud).seconds < slow
