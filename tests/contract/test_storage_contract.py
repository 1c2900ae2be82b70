"""What every storage driver must do: the promises of `physical.ports.Storage`. Each play runs on simulated
hosts and, where it can, on real ones: with files of theirs, and with images of a Ceph cluster."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypervisor_worlds import STORAGE_WORLDS, Hosts, OneHost, Stage, ceph_world, stage_of

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, Error, NotFound, Refused
from nahtlos.model.ids import BackupId, OperationId, SnapshotId, VolumeId
from nahtlos.model.storage import (
    BackupSpec,
    CopyPhase,
    SnapshotSpec,
    StorageBackend,
    VolumeFormat,
    VolumeSpec,
)
from nahtlos.physical.ports import (
    BackupResult,
    FileWritten,
    SnapshotFetch,
    Storage,
    StorageDesired,
    VmmId,
)


@pytest.fixture(scope="module")
def ceph() -> Iterator[Stage]:
    with ceph_world() as stage:
        yield stage


@pytest.fixture(params=STORAGE_WORLDS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    if request.param == "ceph":
        return request.getfixturevalue("ceph")
    return stage_of(request.param, tmp_path)


async def held(hosts: Hosts) -> dict[str, tuple[int, bool]]:
    return {v.id: (v.epoch, v.served) for v in await hosts.first.storage.observe()}


def test_volumes_are_made_and_served_and_doing_it_again_changes_nothing(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        one, two = hosts.volume("one"), hosts.volume("two")
        assert await storage.reconcile(StorageDesired(volumes=(one,)))
        assert await storage.reconcile(StorageDesired(volumes=(one, two)))
        assert await storage.reconcile(StorageDesired(volumes=(one, two))) == ()
        assert await held(hosts) == {"one": (1, True), "two": (1, True)}

    stage(play)


def test_a_volume_goes_only_when_it_is_named(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        one, two = hosts.volume("one"), hosts.volume("two")
        await storage.reconcile(StorageDesired(volumes=(one, two)))
        await storage.reconcile(StorageDesired(volumes=(one,)))
        assert set(await held(hosts)) == {"one", "two"}
        assert await storage.reconcile(StorageDesired(volumes=(one,), removed=(two.id,)))
        assert (
            await storage.reconcile(StorageDesired(volumes=(one,), removed=(two.id, VolumeId("never")))) == ()
        )
        assert set(await held(hosts)) == {"one"}

    stage(play)


def test_a_new_epoch_fences_who_has_the_old_name(stage: Stage) -> None:
    """An image of Ceph's has one name: there, who has it open is fenced."""

    async def play(hosts: Hosts) -> None:
        if hosts.backend is StorageBackend.CEPH:
            await who_has_it_open_is_fenced(hosts)
            return
        server = hosts.server()
        old = hosts.volume(server.volume.volume)
        await hosts.first.storage.reconcile(StorageDesired(volumes=(old,)))
        assert await hosts.first.storage.reconcile(StorageDesired(volumes=(hosts.volume(old.id, epoch=2),)))
        assert await held(hosts) == {old.id: (2, True)}
        await hosts.first.plug(server)
        with pytest.raises(Error):
            await hosts.first.hypervisor.start(server, hosts.release)
        await hosts.first.hypervisor.kill(VmmId(server.spec.id, 1))
        renamed = msgspec.structs.replace(server.volume, export=f"{old.id}.e2")
        server = msgspec.structs.replace(server, volume=renamed)
        await hosts.first.hypervisor.start(server, hosts.release)

    stage(play)


async def who_has_it_open_is_fenced(hosts: Hosts) -> None:
    storage, server = hosts.first.storage, hosts.server()
    volume = hosts.volume(server.volume.volume)
    await storage.reconcile(StorageDesired(volumes=(volume,)))
    await hosts.first.plug(server)
    await hosts.first.hypervisor.start(server, hosts.release)
    assert [v.clients for v in await storage.observe()] == [1]
    done = await storage.reconcile(StorageDesired(volumes=(hosts.volume(volume.id, epoch=2),)))
    assert any("shut out" in line for line in done)
    assert [(v.epoch, v.served, v.clients) for v in await storage.observe()] == [(2, True, 0)]
    await hosts.first.hypervisor.kill(VmmId(server.spec.id, 1))


# --- snapshots ---------------------------------------------------------------------------------------


def taken(name: str, volume: VolumeSpec, group: str = "") -> SnapshotSpec:
    return SnapshotSpec(id=SnapshotId(name), volume=volume.id, group=group)


def test_a_group_of_snapshots_is_taken_whole_or_not_at_all(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        one, two = hosts.volume("one"), hosts.volume("two")
        await storage.reconcile(StorageDesired(volumes=(one, two)))
        both = (taken("s-one", one, "g"), taken("s-two", two, "g"))
        await storage.snapshot_prepare(both)
        assert await storage.snapshots() == ()
        for _ in range(2):
            await storage.snapshot(both)
            found = {s.id: (s.volume, s.group, s.size_mib) for s in await storage.snapshots()}
            assert found == {
                "s-one": ("one", "g", one.size_mib),
                "s-two": ("two", "g", two.size_mib),
            }
        with pytest.raises(Refused):
            await storage.snapshot((taken("t-one", one), taken("t-none", hosts.volume("none"))))
        assert {s.id for s in await storage.snapshots()} == {"s-one", "s-two"}
        await storage.reconcile(StorageDesired(removed_snapshots=(SnapshotId("s-one"),)))
        assert {s.id for s in await storage.snapshots()} == {"s-two"}

    stage(play)


def test_a_clone_is_told_of_and_stays_when_what_it_was_made_from_goes(stage: Stage) -> None:
    """Or that is refused for as long as it is there, and what is in the way is named."""

    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        parent = hosts.volume("parent")
        await storage.reconcile(StorageDesired(volumes=(parent,)))
        await storage.snapshot((taken("then", parent),))
        clone = msgspec.structs.replace(hosts.volume("clone"), image=None, snapshot=SnapshotId("then"))
        await storage.reconcile(StorageDesired(volumes=(parent, clone)))
        assert set(await held(hosts)) == {"parent", "clone"}
        assert [s.clones for s in await storage.snapshots()] == [("clone",)]
        without_parent = StorageDesired(volumes=(clone,), removed=(parent.id,))
        without_snapshot = StorageDesired(volumes=(clone,), removed_snapshots=(SnapshotId("then"),))
        for desired in (without_parent, without_snapshot):
            try:
                await storage.reconcile(desired)
            except Conflict as conflict:
                assert conflict.field in ("volume", "snapshot")
            assert "clone" in await held(hosts)
        await storage.reconcile(StorageDesired(removed=(clone.id,)))
        await storage.reconcile(msgspec.structs.replace(without_snapshot, volumes=()))
        await storage.reconcile(msgspec.structs.replace(without_parent, volumes=()))
        assert await held(hosts) == {}
        assert await storage.snapshots() == ()

    stage(play)


def test_a_copy_that_goes_leaves_the_snapshots_that_are_to_stay(stage: Stage) -> None:
    """And may come back beside them."""

    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        one = msgspec.structs.replace(hosts.volume("one"), image=None)
        await storage.reconcile(StorageDesired(volumes=(one,)))
        then = taken("then", one)
        await storage.snapshot((then,))
        for _ in range(2):
            await storage.reconcile(StorageDesired(removed=(one.id,), snapshots=(then,)))
            assert await held(hosts) == {}
            assert [s.id for s in await storage.snapshots()] == ["then"]
        if hosts.backend is not StorageBackend.CEPH:
            await storage.receive(msgspec.structs.replace(one, epoch=2))
            assert set(await held(hosts)) == {"one"}
            assert [s.id for s in await storage.snapshots()] == ["then"]
            await storage.reconcile(StorageDesired(removed=(one.id,), snapshots=(then,)))
        await storage.reconcile(StorageDesired(removed_snapshots=(then.id,)))
        assert await storage.snapshots() == ()

    stage(play)


def test_a_volume_is_reverted_to_a_snapshot_of_its_own_only(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        one, two = hosts.volume("one"), hosts.volume("two")
        await storage.reconcile(StorageDesired(volumes=(one, two)))
        await storage.snapshot((taken("of-one", one),))
        await storage.revert(one, SnapshotId("of-one"))
        assert [s.id for s in await storage.snapshots()] == ["of-one"]
        for volume, name in ((two, "of-one"), (one, "of-nothing")):
            with pytest.raises(Refused):
                await storage.revert(volume, SnapshotId(name))
        assert set(await held(hosts)) == {"one", "two"}

    stage(play)


def test_snapshots_come_from_another_host_that_keeps_them_until_it_is_told(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        if hosts.backend is StorageBackend.CEPH:
            await they_are_on_no_host(hosts)
            return
        here, there = hosts.first.storage, hosts.second.storage
        volume = msgspec.structs.replace(hosts.volume("one"), image=None, size_mib=16)
        await here.reconcile(StorageDesired(volumes=(volume,)))
        await here.snapshot((taken("then", volume),))
        fetch = SnapshotFetch(
            operation=OperationId("volume-1"),
            volume=volume.id,
            source=VolumeEndpoint(host=hosts.first.name, address=hosts.first.address, port=10809, export=""),
        )
        copied: list[tuple[int, int]] = []

        async def bring() -> None:
            offer = await here.offer_snapshots(volume.id, (SnapshotId("then"),))
            await there.fetch_snapshots(
                fetch, offer, speed=lambda: 0, on_copied=lambda done, total: copied.append((done, total))
            )
            await here.end_offer(volume.id)

        with pytest.raises(NotFound):
            await here.offer_snapshots(volume.id, (SnapshotId("never"),))
        for _ in range(2):
            await bring()
        assert copied[-1][0] == copied[-1][1] > 0
        for storage in (here, there):
            assert [(s.id, s.volume) for s in await storage.snapshots()] == [("then", "one")]
        assert await there.observe() == (), "the volume itself is no concern of it"
        for _ in range(2):
            await there.forget_fetched(fetch)
        assert await there.snapshots() == ()
        await bring()
        await here.reconcile(StorageDesired(volumes=(volume,), removed_snapshots=(SnapshotId("then"),)))
        assert await here.snapshots() == () and len(await there.snapshots()) == 1
        await there.reconcile(StorageDesired(removed_snapshots=(SnapshotId("then"),)))
        assert await there.snapshots() == ()

    stage(play)


async def they_are_on_no_host(hosts: Hosts) -> None:
    storage, volume = hosts.first.storage, hosts.volume("one")
    await storage.reconcile(StorageDesired(volumes=(volume,)))
    await storage.snapshot((taken("then", volume),))
    with pytest.raises(Refused) as refusal:
        await storage.offer_snapshots(volume.id, (SnapshotId("then"),))
    assert refusal.value.field == "backend" and refusal.value.remedy
    await storage.end_offer(volume.id)


# --- backups -----------------------------------------------------------------------------------------


def backup_of(volume: VolumeSpec, name: str, folder: Path, base: BackupSpec | None = None) -> BackupSpec:
    return BackupSpec(
        id=BackupId(name),
        volume=volume.id,
        target=str(folder),
        base=base.id if base else None,
        created_at=1.0 if base is None else base.created_at + 1,
    )


def test_a_backup_holds_what_its_volume_did_and_what_it_rests_on_is_needed(
    stage: Stage, tmp_path: Path
) -> None:
    async def play(hosts: Hosts) -> None:
        storage, volume = hosts.first.storage, hosts.volume("kept")
        await storage.reconcile(StorageDesired(volumes=(volume,)))
        before = await storage.digest(volume.id, 0, 1 << 20)
        first = backup_of(volume, "first", tmp_path)
        second = backup_of(volume, "second", tmp_path, first)
        third = backup_of(volume, "third", tmp_path, second)

        async def made(backup: BackupSpec, base: BackupSpec | None) -> BackupResult:
            moments: list[str] = []

            async def at_once() -> None:
                moments.append(backup.id)

            return await storage.backup(
                volume.id,
                backup,
                base,
                bytes_per_second=0,
                on_copied=lambda done, total: None,
                on_moment=at_once,
            )

        assert (await made(first, None)).base is None
        for _ in range(2):
            changed = await made(second, first)
            assert (changed.base, changed.why_full) == (first.id, "")
        await storage.backup_forget(volume.id, third)
        missing = backup_of(volume, "missing", tmp_path)
        whole = await made(third, missing)
        assert whole.base is None and missing.id in whole.why_full

        back = msgspec.structs.replace(hosts.volume("back"), image=None)
        await storage.receive(back)
        with pytest.raises(Error) as refusal:
            await storage.restore(back, (missing,), on_copied=lambda done, total: None)
        assert refusal.value.field == "chain"
        for _ in range(2):
            await storage.restore(back, (first, second), on_copied=lambda done, total: None)
        await storage.reconcile(StorageDesired(volumes=(volume, back)))
        assert await held(hosts) == {"kept": (1, True), "back": (1, True)}
        if hosts.first.reads_bytes:
            assert await storage.digest(back.id, 0, 1 << 20) == before
        for _ in range(2):
            for backup in (third, second, first):
                await storage.backup_delete(backup)
        await storage.receive(gone := msgspec.structs.replace(hosts.volume("never"), image=None))
        with pytest.raises(Error):
            await storage.restore(gone, (first,), on_copied=lambda done, total: None)

    stage(play)


def test_a_snapshot_becomes_a_file_once(stage: Stage, tmp_path: Path) -> None:
    async def play(hosts: Hosts) -> None:
        storage, volume = hosts.first.storage, hosts.volume("filed")
        await storage.reconcile(StorageDesired(volumes=(volume,)))
        await storage.snapshot((taken("told", volume),))
        file = tmp_path / "told.raw"

        async def written(again: bool) -> FileWritten:
            return await storage.snapshot_file(
                SnapshotId("told"),
                file,
                VolumeFormat.RAW,
                on_copied=lambda done, total: None,
                again=again,
            )

        made = await written(again=False)
        assert made.bytes == volume.size_mib << 20
        assert await written(again=True) == made
        with pytest.raises(NotFound):
            await storage.snapshot_file(
                SnapshotId("never"), file, VolumeFormat.RAW, on_copied=lambda done, total: None
            )

    stage(play)


def test_a_server_is_booted_where_nobody_else_may_have_its_volume(stage: Stage) -> None:

    async def play(hosts: Hosts) -> None:
        server = hosts.server()
        await hosts.first.storage.reconcile(StorageDesired(volumes=(hosts.volume(server.volume.volume),)))
        await hosts.first.plug(server)
        for _ in range(2):
            await hosts.first.storage.reach_alone((server.volume,))
        await hosts.first.hypervisor.start(server, hosts.release)
        (status,) = await hosts.first.storage.observe()
        assert status.clients in (1, -1), "or its driver cannot tell"
        await hosts.first.hypervisor.kill(VmmId(server.spec.id, 1))

    stage(play)


# --- size --------------------------------------------------------------------------------------------


def test_a_volume_is_made_larger_and_never_smaller(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        small = hosts.volume("grows")
        large = msgspec.structs.replace(small, size_mib=small.size_mib + 32)
        await storage.reconcile(StorageDesired(volumes=(small,)))
        await storage.reconcile(StorageDesired(volumes=(large,)))
        assert [v.size_mib for v in await storage.observe()] == [large.size_mib]
        assert await storage.reconcile(StorageDesired(volumes=(large,))) == ()
        with pytest.raises(Refused) as refusal:
            await storage.reconcile(StorageDesired(volumes=(small,)))
        assert refusal.value.field == "size_mib"
        assert [v.size_mib for v in await storage.observe()] == [large.size_mib]

    stage(play)


# --- relocation --------------------------------------------------------------------------------------


def place(host: OneHost, volume: VolumeSpec) -> VolumeEndpoint:
    return VolumeEndpoint(host=host.name, address=host.address, port=10809, export=volume.export)


def elsewhere(hosts: Hosts, volume: VolumeSpec) -> VolumeSpec:
    return msgspec.structs.replace(volume, host=hosts.second.name, epoch=volume.epoch + 1, image=None)


async def until(storage: Storage, volume: VolumeId, phase: CopyPhase) -> None:
    async with asyncio.timeout(60):
        while (progress := await storage.relocate_progress(volume)).phase is not phase:
            assert progress.phase is not CopyPhase.FAILED, progress.error
            await asyncio.sleep(0.02)


def test_a_volume_goes_to_another_host_and_is_there_alone(stage: Stage) -> None:
    """Within a Ceph pool only who administers it changes; the verbs are the same."""

    async def play(hosts: Hosts) -> None:
        source, target = hosts.first.storage, hosts.second.storage
        volume = hosts.volume("goes")
        there = elsewhere(hosts, volume)
        await source.reconcile(StorageDesired(volumes=(volume,)))
        before = await source.digest(volume.id, 0, 1 << 20)
        assert len(before) == 32
        assert (await source.relocate_progress(volume.id)).phase is CopyPhase.NONE
        for _ in range(2):
            await target.receive(there)
        with pytest.raises(Refused):
            await source.relocate_finish(volume.id)
        for _ in range(2):
            await source.relocate_start(volume, place(hosts.second, there), bytes_per_second=0)
        await until(source, volume.id, CopyPhase.READY)
        for _ in range(2):
            await source.relocate_complete(volume.id)
        assert (await source.relocate_progress(volume.id)).phase is CopyPhase.DONE
        for _ in range(2):
            await source.relocate_finish(volume.id)
        if hosts.backend is StorageBackend.EMBEDDED:
            assert [v.served for v in await target.observe()] == [False], "it is received still"
        await target.reconcile(StorageDesired(volumes=(there,)))
        assert {v.id: (v.epoch, v.served) for v in await target.observe()} == {"goes": (2, True)}
        assert await source.observe() == ()
        assert await target.digest(volume.id, 0, 1 << 20) == before
        await source.reconcile(StorageDesired(removed=(volume.id,)))
        assert [v.id for v in await target.observe()] == ["goes"]

    stage(play)


def test_a_relocation_can_be_called_off_until_it_is_completed(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        source, target = hosts.first.storage, hosts.second.storage
        volume = hosts.volume("stays")
        there = elsewhere(hosts, volume)
        await source.reconcile(StorageDesired(volumes=(volume,)))
        await target.receive(there)
        await source.relocate_start(volume, place(hosts.second, there), bytes_per_second=0)
        for _ in range(2):
            await source.relocate_cancel(volume.id)
        assert (await source.relocate_progress(volume.id)).phase is CopyPhase.NONE
        with pytest.raises(Refused):
            await source.relocate_complete(volume.id)
        assert await held(hosts) == {"stays": (1, True)}
        await target.receive(there)
        await source.relocate_start(volume, place(hosts.second, there), bytes_per_second=0)
        await until(source, volume.id, CopyPhase.READY)
        await source.relocate_complete(volume.id)
        with pytest.raises(Conflict):
            await source.relocate_cancel(volume.id)
        await source.relocate_finish(volume.id)

    stage(play)
