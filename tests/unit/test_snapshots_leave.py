"""Snapshots that leave a drained host: when, where to, what hosts are told, and what is recorded of it."""

from collections.abc import AsyncIterator

import msgspec
import pytest
from test_executor_volumes import begun, look, tell
from volume_world import MIB, Site, host, volume

from nahtlos.model.blueprint import HostPhase
from nahtlos.model.ids import OperationId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationKind, OperationState, OperationStatus, SnapshotStatus
from nahtlos.model.storage import SnapshotExport, SnapshotSpec, StorageBackend
from nahtlos.model.volume_work import PlannedVolumeTask, Relocation, SnapshotMove
from nahtlos.runtime.controllers.volume_records import EndedTask, moved_export, write_end
from nahtlos.runtime.executor.volume_orders import volume_order
from nahtlos.runtime.executor.volumes import removed_snapshots
from nahtlos.runtime.store import intent, volumes
from nahtlos.runtime.store.store import Store
from nahtlos.wire.volumes import MoveSnapshotsOrder

A = VolumeId("a")


def kept(*specs: tuple[str, str, tuple[int, ...]]) -> dict[SnapshotId, SnapshotSpec]:
    """Name, volume and hosts."""
    return {
        SnapshotId(name): SnapshotSpec(
            id=SnapshotId(name), volume=VolumeId(of), hosts=tuple(host(n) for n in places), size_mib=64
        )
        for name, of, places in specs
    }


def drained(site: Site, *numbers: int) -> list[SnapshotMove]:
    site.plan()
    site.drain(*numbers)
    site.plan()
    return moves(site)


def moves(site: Site) -> list[SnapshotMove]:
    return [task.work for task in site.tasks if isinstance(task.work, SnapshotMove)]


def test_snapshots_follow_their_volume_and_then_the_host_is_empty() -> None:
    site = Site(3)
    site.want(volume("a", 1), volume("b", 1), snapshots=kept(("s", "a", (1,)), ("t", "a", (1,))))
    assert not drained(site, 1), "volumes go first"
    assert any("leave host-1 after its volumes" in reason for reason in site.waits)
    while site.tasks:
        assert all(isinstance(task.work, Relocation) for task in site.tasks)
        site.end(site.tasks[0])
        site.plan()
        if moves(site):
            break
    home = site.policy.volumes[A].host
    (task,) = site.tasks
    assert task.work == SnapshotMove(
        volume=A, snapshots=(SnapshotId("s"), SnapshotId("t")), source=host(1), destination=home
    )
    assert (task.coordinator, task.hosts) == (home, (host(1), home))
    assert site.plan().hosts[host(1)].phase is HostPhase.EMPTYING
    site.end(task)
    assert site.plan().hosts[host(1)].phase is HostPhase.EMPTYING, "its files are still there"
    assert any("drops its files of s" in reason for reason in site.waits)
    site.lingering.clear()
    settled = site.plan()
    assert settled.hosts[host(1)].phase is HostPhase.DRAINED and site.plan() is settled


def test_they_go_to_a_copy_that_lacks_them_and_else_where_there_is_room() -> None:
    site = Site(4)
    site.want(volume("a", 2, 3), snapshots=kept(("s", "a", (1, 2)), ("t", "a", (1, 2, 3))))
    (first,) = drained(site, 1)
    assert (first.snapshots, first.destination) == ((SnapshotId("s"),), host(3))
    (task,) = site.tasks
    site.end(task)
    site.plan()
    (second,) = moves(site)
    assert (second.snapshots, second.destination) == ((SnapshotId("t"),), host(4))


def test_where_no_host_has_room_it_is_said() -> None:
    site = Site(3, free_mib=1)
    site.want(volume("a", 2), snapshots=kept(("s", "a", (1,))))
    assert not drained(site, 1)
    assert any("no host could take the snapshots s" in reason for reason in site.waits)
    assert site.plan().hosts[host(1)].phase is HostPhase.EMPTYING
    site.free[host(3)] = 3
    site.plan()
    assert [work.destination for work in moves(site)] == [host(3)]


def test_what_ceph_keeps_is_on_no_host() -> None:
    site = Site(3)
    site.want(
        volume("a", 1, backend=StorageBackend.CEPH),
        volume("b", 2),
        snapshots=kept(("s", "a", (1,)), ("t", "b", (1,))),
    )
    site.plan()
    site.drain(1)
    seen = site.look()
    here = msgspec.structs.replace(
        seen.hosts[host(1)],
        snapshots=(
            SnapshotStatus(id=SnapshotId("s"), volume=A, backend=StorageBackend.CEPH),
            SnapshotStatus(id=SnapshotId("t"), volume=VolumeId("b"), allocated_bytes=MIB),
        ),
    )
    site.look = lambda: msgspec.structs.replace(seen, hosts={**seen.hosts, host(1): here})  # type: ignore[method-assign]
    site.plan()
    assert [work.snapshots for work in moves(site)] == [(SnapshotId("t"),)]


# --- what hosts are told -----------------------------------------------------------------------------


def moving() -> tuple[Site, PlannedVolumeTask]:
    site = Site(3)
    site.want(volume("a", 2), snapshots=kept(("s", "a", (1,))))
    drained(site, 1)
    (task,) = site.tasks
    return site, task


def test_the_destination_is_ordered_once_both_leave_the_volume_alone() -> None:
    site, task = moving()
    assert not begun(tell(site))
    ((name, begin),) = begun(tell(site))
    assert name == host(2) and isinstance(begin.order, MoveSnapshotsOrder)
    assert (begin.order.source.host, begin.order.source.address) == (host(1), "10.0.0.1")
    assert begin.order.snapshots == (SnapshotId("s"),)
    site.want(snapshots={})
    assert volume_order(look(site), task) is None, "it was deleted before it began"


def test_the_source_lets_go_once_the_end_is_recorded_and_nothing_rests_on_it() -> None:
    site, task = moving()
    deleted = tuple(site.policy.snapshots.values())
    assert removed_snapshots(look(site), host(1)) == ()
    assert removed_snapshots(look(site, removed_snapshots=deleted), host(1)) == (), "not in the middle of it"
    site.end(task)
    assert removed_snapshots(look(site), host(1)) == (), "nor before the plan knows of its end"
    site.plan()
    assert removed_snapshots(look(site), host(1)) == ("s",)
    assert removed_snapshots(look(site), host(2)) == ()
    (status,) = site.lingering[host(1)]
    site.lingering[host(1)] = (msgspec.structs.replace(status, clones=(VolumeId("b"),)),)
    assert removed_snapshots(look(site), host(1)) == ()
    spec = site.policy.snapshots[SnapshotId("s")]
    site.want(snapshots={})
    world = look(site, removed_snapshots=(spec,))
    assert removed_snapshots(world, host(1)) == removed_snapshots(world, host(2)) == ("s",)


# --- what is recorded --------------------------------------------------------------------------------


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    opened = await Store.open(None)
    yield opened
    await opened.close()


def export(name: str, of: str, at: int, port: int = 10900) -> SnapshotExport:
    return SnapshotExport(
        id=name, snapshot=SnapshotId(of), host=host(at), port=port, expires_at=99.0, key_hex="00"
    )


async def test_snapshots_and_their_exports_are_where_they_went(store: Store) -> None:
    work = SnapshotMove(
        volume=A, snapshots=(SnapshotId("s"), SnapshotId("t")), source=host(1), destination=host(3)
    )
    task = PlannedVolumeTask(
        id=OperationId("volume-1"), work=work, coordinator=host(3), hosts=(host(1), host(3))
    )
    status = OperationStatus(
        id=task.id, kind=OperationKind.SNAPSHOT_MOVE, state=OperationState.DONE, step="done"
    )
    async with store.writing() as tx:
        await volumes.add(tx, volume("a", 3))
        await volumes.add(tx, volume("c", 2, snapshot=SnapshotId("s")))
        await volumes.add(tx, volume("d", 2, snapshot=SnapshotId("t")))
        await volumes.add_snapshots(tx, kept(("s", "a", (1,)), ("t", "a", (1, 2)), ("u", "a", (1,))).values())
        await volumes.mark_snapshot_removed(tx, SnapshotId("t"))
        for each in (export("x", "s", 1), export("y", "u", 3), export("z", "u", 1, 10901)):
            await volumes.put_export(tx, each)
        await write_end(tx, EndedTask(task=task, status=status, cancelled=False), 1.0)
    async with store.reading() as tx:
        after = await volumes.read(tx)
        specs = await intent.volumes(tx)
    places = {name: (row.spec.hosts, row.removed) for name, row in after.snapshots.items()}
    assert places == {"s": ((host(3),), False), "t": ((host(3), host(2)), True), "u": ((host(1),), False)}
    assert {each.id: (each.host, each.port) for each in after.exports} == {
        "x": (host(3), 10901),
        "y": (host(3), 10900),
        "z": (host(1), 10901),
    }
    assert specs[VolumeId("c")].spec.snapshot is None, "no copy of it can rest on that"
    assert specs[VolumeId("d")].spec.snapshot == "t", "its copy may"


def test_an_export_for_which_there_is_no_port_ends() -> None:
    others = [export(f"e{port}", "o", 2, port) for port in range(10900, 11000)]
    assert moved_export(export("x", "s", 1), host(2), others) is None
    assert moved_export(export("x", "s", 1), host(2), others[1:]) == export("x", "s", 2)
