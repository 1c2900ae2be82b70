"""What hosts are told of volumes, which orders are given and when; what the end of an operation is recorded
as."""

import msgspec
from volume_world import Site, host, server, volume

from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import DiskLimits, ReplicaState, SnapshotSpec, StorageBackend
from nahtlos.model.volume_settings import CephPlace
from nahtlos.model.volume_work import Relocation, VolumeWish
from nahtlos.runtime.controllers.volume_records import fenced, rehomed, relocated, reverted, without_copy
from nahtlos.runtime.executor.attachments import attachment
from nahtlos.runtime.executor.decide import HostOrders, Orders, decide
from nahtlos.runtime.executor.world import World
from nahtlos.runtime.store.volumes import with_state
from nahtlos.wire.volumes import BeginVolumeTask, RelocateOrder

A = VolumeId("a")


def look(site: Site, **changes: object) -> World:
    assert site.blueprint is not None
    world = World(
        policy=site.policy,
        inventory=site.look(),
        blueprint=site.blueprint,
        configs=dict(site.configs),
    )
    for name, value in changes.items():
        object.__setattr__(world, name, value)
    return world


def tell(site: Site, **changes: object) -> Orders:
    """Decide, and have every host accept what it is told."""
    orders = decide(look(site, **changes))
    site.configs.update({name: each.config for name, each in orders.hosts.items()})
    return orders


def begun(orders: Orders) -> list[tuple[str, BeginVolumeTask]]:
    def of(each: HostOrders) -> list[BeginVolumeTask]:
        return [begin for begin in each.begin if isinstance(begin, BeginVolumeTask)]

    return [(name, begin) for name, each in orders.hosts.items() for begin in of(each)]


def relocating(site: Site, **work: object) -> None:
    site.want(volume_wishes=(VolumeWish(id="wish-1", work=Relocation(volume=A, **work)),))


def test_every_host_with_a_current_copy_is_told_of_it_by_its_own_epoch() -> None:
    site = Site()
    spec = volume("a", 1, 2, 3, stale=(3,))
    site.want(with_state(spec, host(2), ReplicaState.CURRENT, 5))
    site.plan()
    orders = tell(site)
    epochs = {name: [v.epoch for v in each.config.volumes] for name, each in orders.hosts.items()}
    assert epochs == {host(1): [1], host(2): [5], host(3): [], host(4): []}


def test_a_server_is_told_all_current_copies_limits_and_where_ceph_is() -> None:
    site = Site()
    site.serve(server("web", "a", "", "b"), on=1)
    site.want(
        volume("a", 1, 2, 3, stale=(2,), limits=DiskLimits(iops=5), limits_group="g"),
        volume("b", 2, backend=StorageBackend.CEPH),
    )
    site.plan()
    orders = tell(site, ceph=CephPlace(pool="rbd"))
    (config,) = orders.hosts[host(1)].config.servers
    assert [copy.host for copy in config.volume.copies] == [host(1), host(3)]
    assert (config.volume.size_mib, config.volume.limits.iops, config.volume.limits_group) == (64, 5, "g")
    (data,) = config.data_volumes
    assert data.rbd is not None and (data.rbd.pool, data.rbd.image) == ("rbd", "b")


def test_no_operation_begins_before_everybody_leaves_its_volume_alone() -> None:
    site = Site()
    site.serve(server("web", "a"), on=3)
    site.want(volume("a", 1))
    site.plan()
    tell(site)
    relocating(site, destination=host(2))
    site.plan()
    first = tell(site)
    assert not begun(first), "they are only told of it"
    pinned = {name for name, each in first.hosts.items() if each.config.pinned_volumes == (A,)}
    assert pinned == {host(1), host(2), host(3)}, "both ends and the server's host"
    ((coordinator, begin),) = begun(tell(site))
    order = begin.order
    assert coordinator == host(1) and isinstance(order, RelocateOrder)
    assert (order.source.export, order.target.export) == ("a.e1", "a.e2")
    assert (order.destination.host, order.destination.epoch) == (host(2), 2)
    assert order.client is not None and order.client.at.host == host(3)


def test_until_its_end_is_recorded_everything_stays_as_it_was_told() -> None:
    site = Site()
    site.want(volume("a", 1))
    site.plan()
    relocating(site, destination=host(2))
    site.plan()
    tell(site)
    tell(site)
    (task,) = site.tasks
    site.running(task, OperationState.DONE)
    orders = tell(site)
    assert orders.hosts[host(1)].config.volumes and orders.hosts[host(1)].config.pinned_volumes
    assert not orders.hosts[host(1)].acknowledge, "not before it is recorded"
    site.end(task)
    site.plan()
    orders = tell(site, ended=frozenset({task.id}))
    assert orders.hosts[host(1)].acknowledge == (task.id,)
    assert not orders.hosts[host(1)].config.volumes
    assert [v.epoch for v in orders.hosts[host(2)].config.volumes] == [2]


def test_a_cancelled_wish_gives_its_operation_up() -> None:
    site = Site()
    site.want(volume("a", 1))
    site.plan()
    relocating(site, destination=host(2))
    site.plan()
    tell(site)
    (task,) = site.tasks
    (wish,) = site.policy.volume_wishes
    site.want(volume_wishes=(msgspec.structs.replace(wish, cancelled=True),))
    assert not begun(tell(site)), "what has not begun does not"
    site.running(task)
    assert tell(site).hosts[host(1)].cancel == (task.id,)


def test_a_copy_is_deleted_once_nobody_is_told_to_reach_it() -> None:
    site = Site()
    site.serve(server("web", "a"), on=3)
    site.want(volume("a", 1, 2))
    site.plan()
    tell(site)
    seen = site.look()
    site.want(without_copy(site.policy.volumes[A], host(2)))
    orders = tell(site, inventory=seen)
    assert not orders.hosts[host(2)].config.removed_volumes, "the server is still told of it"
    orders = tell(site, inventory=seen)
    assert not orders.hosts[host(2)].config.removed_volumes, "told otherwise, but not converged yet"
    after = {name: msgspec.structs.replace(each, generation=99) for name, each in seen.hosts.items()}
    orders = tell(site, inventory=msgspec.structs.replace(seen, hosts=after))
    assert orders.hosts[host(2)].config.removed_volumes == (A,)
    assert not orders.hosts[host(1)].config.removed_volumes


def test_snapshots_are_told_where_they_are_kept() -> None:
    site = Site()
    kept = SnapshotSpec(id=SnapshotId("s"), volume=A, hosts=(host(1), host(2)))
    gone = SnapshotSpec(id=SnapshotId("t"), volume=A, hosts=(host(2),))
    site.want(volume("a", 1, 2), snapshots={kept.id: kept})
    site.plan()
    orders = tell(site, removed_snapshots=(gone,))
    assert orders.hosts[host(1)].config.snapshots == (kept,)
    assert orders.hosts[host(2)].config.removed_snapshots == ("t",)
    assert not orders.hosts[host(3)].config.snapshots


# --- what is recorded --------------------------------------------------------------------------------


def went(spec: object, source: int, destination: int, **changes: object) -> Relocation:
    return Relocation(volume=A, source=host(source), destination=host(destination), **changes)


def test_a_copy_that_was_relocated_leaves_the_others_as_they_are_served() -> None:
    spec = volume("a", 1, 2, snapshot=SnapshotId("s"))
    after = relocated(spec, went(spec, 1, 3), 2)
    assert (after.host, after.epoch, after.at(host(2)).epoch) == (host(3), 2, 1)
    assert after.snapshot == "s", "the other copy may rest on it"
    assert relocated(volume("a", 1, snapshot=SnapshotId("s")), went(spec, 1, 3), 2).snapshot is None
    other = relocated(spec, went(spec, 2, 3), 2)
    assert (other.host, other.epoch) == (host(1), 1)
    assert [(c.host, c.epoch) for c in other.copies] == [(host(1), 1), (host(3), 2)]


def test_a_copy_that_was_lost_on_its_way_is_not_current() -> None:
    spec = volume("a", 1, 2)
    assert relocated(spec, went(spec, 1, 3), 2, lost=True).current == (host(2),)
    only = volume("a", 1)
    assert relocated(only, went(only, 1, 3), 2, lost=True).current == (host(3),), "nothing else was written"
    stale = volume("a", 1, 2, stale=(1,))
    assert relocated(stale, went(stale, 1, 3), 2).current == (host(2),), "it came from a stale one"


def test_what_is_reverted_counts_and_the_others_are_made_like_it() -> None:
    after = reverted(volume("a", 1, 2, 3), host(2), 7)
    assert after.current == (host(2),) and after.at(host(2)).epoch == 7


def test_a_copy_is_made_elsewhere_and_a_current_one_is_home() -> None:
    after = rehomed(volume("a", 1, 2, stale=(1,)), host(1), host(4))
    assert (after.host, after.current) == (host(2), (host(2),))
    assert [copy.host for copy in after.copies] == [host(2), host(4)]
    assert after.newest_epoch == 2


def test_a_fence_is_an_epoch_that_nothing_had() -> None:
    spec = with_state(volume("a", 1, 2), host(2), ReplicaState.CURRENT, 9)
    after = fenced(spec)
    assert {copy.epoch for copy in after.copies} == {10}
    hosts = Site().policy.hosts
    reached = attachment(after, hosts)
    assert reached is not None and {copy.export for copy in reached.copies} == {"a.e10"}
