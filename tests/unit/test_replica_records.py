"""Who may have it recorded that a copy is lost, and what is recorded then: in a real store."""

from collections.abc import AsyncIterator

import msgspec
import pytest

from nahtlos.model.blueprint import Blueprint, PlannedMove
from nahtlos.model.errors import Conflict, NotFound, Stale
from nahtlos.model.ids import BlueprintId, HostId, OperationId, ServerId, VolumeId
from nahtlos.model.inventory import OperationKind, OperationState, OperationStatus
from nahtlos.model.nouns import Assignment, HostRole, HostSpec, ServerSpec, Size
from nahtlos.model.storage import Replica, ReplicaState, VolumeSpec
from nahtlos.model.volume_work import PlannedVolumeTask, Rebuilding
from nahtlos.runtime.controllers.replica_records import lose
from nahtlos.runtime.controllers.volume_records import EndedTask, write_end
from nahtlos.runtime.store import blueprints, intent, leases, volumes
from nahtlos.runtime.store.store import Store
from nahtlos.wire.volumes import ReplicaLost

ONE, TWO, THREE = HostId("host-1"), HostId("host-2"), HostId("host-3")
SERVER, VOLUME = ServerId("web-1"), VolumeId("web-1-disk")
LEADER = 1


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    opened = await Store.open(None, clock=lambda: 1000.0)
    spec = VolumeSpec(
        id=VOLUME,
        size_mib=8,
        image=None,
        host=ONE,
        epoch=1,
        replicas=(Replica(host=TWO, epoch=2), Replica(host=THREE, epoch=3)),
    )
    move = PlannedMove(
        id=OperationId("op-1"), server=SERVER, source=ONE, destination=TWO, epoch=5, reason="asked"
    )
    target = Blueprint(
        id=BlueprintId("bp-1"),
        parent=None,
        hosts={},
        servers={SERVER: Assignment(server=SERVER, host=ONE, epoch=4)},
        moves=(move,),
    )
    async with opened.writing() as tx:
        assert await leases.acquire(tx, "me", 60.0) == LEADER
        for number, host in enumerate((ONE, TWO, THREE), 1):
            at = HostSpec(id=host, role=HostRole.COMPUTE, address=f"10.0.0.{number}", peer_port=7444)
            await intent.put_host(tx, at, 0.0)
        await volumes.add(tx, spec)
        await blueprints.set_target(tx, target, epoch=LEADER, now=0.0)
    yield opened
    await opened.close()


def told(lost: HostId, export: str, *, epoch: int = 4) -> ReplicaLost:
    return ReplicaLost(server=SERVER, epoch=epoch, volume=VOLUME, lost=lost, export=export)


async def held(store: Store) -> tuple[tuple[HostId, ...], int]:
    async with store.reading() as tx:
        spec = await volumes.get(tx, VOLUME)
        assert spec is not None
        return spec.current, await volumes.losses_at(tx, VOLUME, TWO)


async def test_a_lost_copy_is_not_current_and_the_answer_says_who_is_left(store: Store) -> None:
    answer = await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e2"))
    assert [copy.host for copy in answer.attachment.copies] == [ONE, THREE]
    assert await held(store) == ((ONE, THREE), 1)
    again = await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e2"))
    assert again == answer
    assert await held(store) == ((ONE, THREE), 1)


async def test_the_last_current_copy_is_not_given_up(store: Store) -> None:
    await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e2"))
    last = await lose(store, LEADER, ONE, told(ONE, "web-1-disk.e1"))
    assert (last.attachment.address, last.attachment.export) == ("10.0.0.3", "web-1-disk.e3")
    with pytest.raises(Conflict):
        await lose(store, LEADER, ONE, told(THREE, "web-1-disk.e3"))
    assert (await held(store))[0] == (THREE,)


@pytest.mark.parametrize(("asker", "epoch"), [(THREE, 4), (ONE, 3), (THREE, 5), (TWO, 4)])
async def test_who_does_not_own_the_server_is_refused(store: Store, asker: HostId, epoch: int) -> None:
    with pytest.raises(Stale):
        await lose(store, LEADER, asker, told(TWO, "web-1-disk.e2", epoch=epoch))
    assert (await held(store))[0] == (ONE, TWO, THREE)


async def test_the_destination_of_a_move_that_runs_may_own_it_already(store: Store) -> None:
    await lose(store, LEADER, TWO, told(THREE, "web-1-disk.e3", epoch=5))
    assert (await held(store))[0] == (ONE, TWO)


async def test_a_server_that_is_being_removed_may_leave_copies_that_do_not_count(store: Store) -> None:
    leaving = ServerSpec(
        id=ServerId("web-2"),
        size=Size(vcpus=1, memory_mib=64),
        volume=VolumeId("web-2-disk"),
        data_volumes=(VOLUME,),
        ports=(),
        machine="pc-q35-10.0",
    )
    blank = VolumeSpec(id=leaving.volume, size_mib=8, image=None, host=ONE)
    async with store.writing() as tx:
        await intent.add_server(tx, leaving, blank, 0.0)
    body = msgspec.structs.replace(told(TWO, "web-1-disk.e2", epoch=1), server=leaving.id)
    with pytest.raises(NotFound):
        await lose(store, LEADER, ONE, body)
    async with store.writing() as tx:
        await intent.mark_server_removed(tx, leaving.id, 1.0)
    await lose(store, LEADER, ONE, body)
    assert (await held(store))[0] == (ONE, THREE)


async def test_a_copy_that_is_being_rebuilt_and_is_lost_makes_its_rebuild_void(store: Store) -> None:
    await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e2"))
    await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e4"))
    assert await held(store) == ((ONE, THREE), 2)


async def test_a_late_word_of_an_earlier_copy_says_nothing_of_the_one_that_came_since(store: Store) -> None:
    await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e2"))
    async with store.writing() as tx:
        spec = await volumes.get(tx, VOLUME)
        assert spec is not None
        await volumes.put(tx, volumes.with_state(spec, TWO, ReplicaState.CURRENT, 4))
    answer = await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e2"))
    assert [copy.host for copy in answer.attachment.copies] == [ONE, TWO, THREE]
    assert await held(store) == ((ONE, TWO, THREE), 1)


async def test_what_is_not_there_is_named(store: Store) -> None:
    body = msgspec.structs.replace(told(TWO, ""), volume=VolumeId("other"))
    with pytest.raises(NotFound):
        await lose(store, LEADER, ONE, body)


@pytest.mark.parametrize("state", [OperationState.DONE, OperationState.UNDONE])
@pytest.mark.parametrize("lost", [True, False])
async def test_what_is_lost_as_it_joins_comes_back_by_another_epoch(
    store: Store, state: OperationState, *, lost: bool
) -> None:
    """By the same one it would be left out for good by those it was lost to."""
    await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e2"))
    work = Rebuilding(volume=VOLUME, source=ONE, target=TWO)
    task = PlannedVolumeTask(
        id=OperationId("volume-1"), work=work, coordinator=ONE, hosts=(ONE, TWO), epoch=4, losses=1
    )
    if lost:
        await lose(store, LEADER, ONE, told(TWO, "web-1-disk.e4"))
    status = OperationStatus(id=task.id, kind=OperationKind.REBUILD, state=state, step="done")
    async with store.writing() as tx:
        await write_end(tx, EndedTask(task=task, status=status, cancelled=False), 1.0)
        spec = await volumes.get(tx, VOLUME)
    assert spec is not None
    assert (TWO in spec.current) is (state is OperationState.DONE and not lost)
    assert (spec.newest_epoch == task.epoch) is (lost or state is OperationState.DONE)
