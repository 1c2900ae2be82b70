"""Which operations of volumes are decided, when, and where copies go; and what holds in every world."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_world import Site, host, server, volume

from nahtlos.model.blueprint import HostPhase
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import SnapshotSpec
from nahtlos.model.volume_work import (
    Rebuilding,
    Relocation,
    Reverting,
    SnapshotGroup,
    VolumeWish,
    volumes_of,
)
from nahtlos.planner.plan import plan
from nahtlos.planner.volume_places import domain_of, places, spread
from nahtlos.planner.volumes import MAX_ATTEMPTS
from nahtlos.runtime.controllers.volume_records import fenced


def wish(number: int, work: Relocation | SnapshotGroup) -> VolumeWish:
    return VolumeWish(id=f"wish-{number}", work=work)


def test_a_converged_world_stays_as_it_is() -> None:
    site = Site()
    site.serve(server("web", "a", "b"), on=1)
    site.want(volume("a", 1), volume("b", 2, 3))
    settled = site.plan()
    assert site.plan() is settled and not settled.volume_tasks


def test_a_wish_becomes_one_operation_of_its_volume() -> None:
    site = Site()
    site.want(
        volume("a", 1),
        volume_wishes=(
            wish(1, Relocation(volume=VolumeId("a"))),
            wish(2, Relocation(volume=VolumeId("a"), destination=host(3))),
        ),
    )
    site.plan()
    (task,) = site.tasks
    assert isinstance(task.work, Relocation)
    assert (task.coordinator, task.wish, task.epoch) == (host(1), "wish-1", 2)
    assert task.work.destination == host(2)
    assert any("waits for" in reason for reason in site.waits)
    site.end(task)
    site.plan()
    (second,) = site.tasks
    assert (second.wish, second.coordinator, second.epoch) == ("wish-2", host(2), 3)


def test_copies_go_to_other_domains_with_room_near_their_server() -> None:
    site = Site(5, {1: "rack-a", 2: "rack-a", 3: "rack-b", 4: "rack-b"})
    seen = site.look()
    assert places(site.policy, seen, size_mib=10, beside=[host(1)])[0] == host(3)
    assert places(site.policy, seen, size_mib=10, beside=[host(1)], near=host(4))[0] == host(4)
    assert places(site.policy, seen, size_mib=10, beside=[host(1)], near=host(2))[0] != host(2)
    site.free[host(3)] = 5
    assert host(3) not in places(site.policy, site.look(), size_mib=10)
    three = spread(site.policy, seen, size_mib=10, copies=3)
    assert len({domain_of(site.policy.hosts[h]) for h in three}) == 3
    site.drain(5)
    assert host(5) not in places(site.policy, seen, size_mib=10)


def test_a_stale_copy_is_rebuilt_from_a_current_one() -> None:
    site = Site()
    site.want(volume("a", 1, 2, stale=(1,)), copy_losses={VolumeId("a"): {host(1): 3}})
    site.plan()
    (task,) = site.tasks
    assert task.work == Rebuilding(volume=VolumeId("a"), source=host(2), target=host(1))
    assert (task.losses, task.epoch) == (3, 2)
    site.end(task)
    assert not site.plan().volume_tasks
    assert site.policy.volumes[VolumeId("a")].current == (host(1), host(2))


def test_a_stale_copy_whose_host_is_away_waits() -> None:
    site = Site()
    site.away.add(host(1))
    site.want(volume("a", 1, 2, stale=(1,)))
    assert not site.plan().volume_tasks
    assert any("the agent of host-1 is not connected" in reason for reason in site.waits)


def test_a_copy_is_read_once_it_is_served_as_recorded() -> None:
    """Its host leaves it alone from then on: what it had not acted on yet it would never act on."""
    site = Site()
    site.want(volume("a", 1, 2, stale=(2,)))
    seen = site.look()
    site.want(fenced(site.policy.volumes[VolumeId("a")]))
    following, report = plan(site.policy, seen, None)
    assert not following.volume_tasks
    assert any("until host-1 serves a by epoch 2" in waiting.reason for waiting in report.waiting)
    assert site.plan().volume_tasks


def test_a_copy_that_was_just_rebuilt_is_reverted_once_its_host_serves_it() -> None:
    """An operation that began at once would be refused by it, and so would all others right after it."""
    site, back = Site(), SnapshotSpec(id=SnapshotId("then"), volume=VolumeId("a"), hosts=(host(2),))
    site.want(
        volume("a", 1, 2),
        snapshots={back.id: back},
        volume_wishes=(VolumeWish(id="wish-1", work=Reverting(volume=VolumeId("a"), snapshot=back.id)),),
    )
    seen = site.look()
    received = [msgspec.structs.replace(told, served=False) for told in seen.hosts[host(2)].volumes]
    not_yet = msgspec.structs.replace(seen.hosts[host(2)], volumes=tuple(received))
    hosts = {**seen.hosts, host(2): not_yet}
    following, report = plan(site.policy, msgspec.structs.replace(seen, hosts=hosts), None)
    assert not following.volume_tasks
    assert any("until host-2 serves a by epoch 1" in waiting.reason for waiting in report.waiting)
    site.plan()
    (task,) = site.tasks
    assert task.coordinator == host(2)


def test_so_many_at_once_and_so_many_on_a_host() -> None:
    site = Site(6)
    site.want(
        *(volume(f"v{n}", 1) for n in range(5)),
        volume_wishes=tuple(wish(n, Relocation(volume=VolumeId(f"v{n}"))) for n in range(5)),
        parallel_volume_tasks=3,
        parallel_volume_tasks_per_host=2,
    )
    site.plan()
    assert len(site.tasks) == 2, "host-1 takes two at once"
    assert any("on host-1" in reason for reason in site.waits)


def test_a_volume_and_its_server_do_not_move_at_the_same_time() -> None:
    site = Site()
    site.serve(server("web", "a"), on=1)
    site.want(volume("a", 1))
    site.plan()
    site.want(volume_wishes=(wish(1, Relocation(volume=VolumeId("a"))),))
    site.plan()
    (task,) = site.tasks
    site.want(requested_moves={server("web", "a").id: host(2)})
    blueprint = site.plan()
    assert not blueprint.moves and any("is not moved during" in reason for reason in site.waits)
    site.end(task)
    assert site.plan().moves
    site.want(volume_wishes=(wish(2, Relocation(volume=VolumeId("a"))),))
    assert not site.plan().volume_tasks
    assert any("waits while web moves" in reason for reason in site.waits)


def test_a_drained_host_gives_its_copies_away() -> None:
    site = Site(3)
    site.want(volume("a", 1), volume("b", 2, 1))
    site.plan()
    site.drain(1)
    assert site.plan().hosts[host(1)].phase is HostPhase.EMPTYING
    assert {volumes_of(task.work) for task in site.tasks} == {("a",), ("b",)}
    for task in site.tasks:
        site.end(task)
        site.plan()
    for task in site.tasks:
        site.end(task)
    assert site.plan().hosts[host(1)].phase is HostPhase.DRAINED
    assert {copy.host for copy in site.policy.volumes[VolumeId("b")].copies} == {host(2), host(3)}


def test_what_cannot_leave_says_why() -> None:
    site = Site(2)
    site.want(volume("a", 1, 2))
    site.plan()
    site.drain(1)
    assert not site.plan().volume_tasks
    assert any("no host could take the copy of a" in reason for reason in site.waits)


def test_a_server_leaves_before_its_volume() -> None:
    site = Site(3)
    site.serve(server("web", "a"), on=1)
    site.want(volume("a", 1))
    site.plan()
    site.drain(1)
    blueprint = site.plan()
    assert blueprint.moves and not blueprint.volume_tasks
    site.blueprint = msgspec.structs.replace(blueprint, moves=())
    site.moved_server("web", 3)
    site.plan()
    (task,) = site.tasks
    assert isinstance(task.work, Relocation)
    assert task.work.destination == host(3), "where its server is"


def test_failures_are_counted_with_patience_until_people_are_asked() -> None:
    site = Site()
    site.want(volume("a", 1), volume_wishes=(wish(1, Relocation(volume=VolumeId("a"))),))
    patience: list[float] = []
    for _ in range(MAX_ATTEMPTS):
        site.plan()
        (task,) = site.tasks
        patience.append(task.patience_seconds)
        site.end(task, done=False)
    assert not site.plan().volume_tasks
    assert patience == [0.0, 1.0, 2.0, 4.0, 8.0]
    assert any("in 5 attempts" in reason for reason in site.waits)
    (before,) = site.policy.volume_wishes
    site.want(volume_wishes=(msgspec.structs.replace(before, cancelled=True),))
    assert not site.plan().failed_volume_tasks, "asked anew it begins from zero"


def test_nothing_is_dropped_before_its_end_is_recorded() -> None:
    site = Site()
    site.want(volume("a", 1), volume_wishes=(wish(1, Relocation(volume=VolumeId("a"))),))
    site.plan()
    (task,) = site.tasks
    site.running(task, OperationState.DONE)
    assert site.plan().volume_tasks == (task,)
    site.want(volume_wishes=())
    assert site.plan().volume_tasks == (task,), "nor because its wish is gone"


def test_a_snapshot_is_of_all_current_copies_and_takes_no_slot() -> None:
    site = Site()
    work = SnapshotGroup(
        group="g",
        snapshots=tuple(SnapshotSpec(id=SnapshotId(f"g-{v}"), volume=VolumeId(v)) for v in ("a", "b")),
    )
    site.want(
        volume("a", 1, 2, stale=(2,)),
        volume("b", 3),
        volume_wishes=(wish(1, work),),
        parallel_volume_tasks=1,
    )
    site.plan()
    (rebuild,) = site.tasks
    assert isinstance(rebuild.work, Rebuilding), "a volume is in one operation at a time"
    site.end(rebuild)
    site.plan()
    (task,) = site.tasks
    assert isinstance(task.work, SnapshotGroup)
    assert [s.hosts for s in task.work.snapshots] == [(host(1), host(2)), (host(3),)]


@given(st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_in_every_world_copies_stay_apart_and_drains_come_to_their_end(random) -> None:  # type: ignore[no-untyped-def]
    """The planner's own check looks at every blueprint, too."""
    hosts = random.randint(3, 6)
    site = Site(hosts)
    site.want(*(_random_volume(random, f"v{n}", hosts) for n in range(random.randint(1, 6))))
    site.plan()
    site.drain(*random.sample(range(1, hosts + 1), random.randint(0, hosts - 3)))
    for _ in range(120):
        site.plan()
        busy = [name for task in site.tasks for name in volumes_of(task.work)]
        assert len(busy) == len(set(busy)), "one operation of a volume at a time"
        if not site.tasks:
            break
        task = random.choice(site.tasks)
        site.end(task, done=random.random() > 0.2)
        for spec in site.policy.volumes.values():
            copies = [copy.host for copy in spec.copies]
            assert len(copies) == len(set(copies)), f"two copies of {spec.id} on one host"
            assert spec.current, "a current copy remains"
            epochs = {copy.host: copy.epoch for copy in spec.copies}
            assert all(epoch > 0 for epoch in epochs.values())


def _random_volume(random, name: str, hosts: int):  # type: ignore[no-untyped-def]
    count = random.randint(1, min(3, hosts - 1))
    chosen = random.sample(range(1, hosts + 1), count)
    stale = tuple(place for place in chosen[1:] if random.random() < 0.3)
    return volume(name, *chosen, stale=stale)
