"""Volumes in the store: from a database of the release before, attachments, losses, wishes, what stays of a
deleted server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Connection, create_engine, insert
from sqlalchemy.exc import IntegrityError
from volume_world import host, server, volume

from nahtlos.model.errors import Conflict, NotFound
from nahtlos.model.ids import BackupId, SnapshotId, VolumeId
from nahtlos.model.storage import BackupSpec, SnapshotExport, SnapshotSpec
from nahtlos.model.volume_settings import VolumeSettings
from nahtlos.model.volume_work import Relocation
from nahtlos.runtime.store import intent, schema, volumes
from nahtlos.runtime.store.documents import text_of
from nahtlos.runtime.store.migrate import configuration
from nahtlos.runtime.store.store import Store

A = VolumeId("a")


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    opened = await Store.open(None)
    yield opened
    await opened.close()


async def test_volumes_of_the_release_before_are_as_they_were(tmp_path: Path) -> None:
    def fill(connection: Connection) -> None:
        command.upgrade(configuration(connection), "0002")
        values = {"id": A, "document": text_of(volume("a", 1)), "removed": False}
        connection.execute(insert(schema.volumes).values(values))

    engine = create_engine(f"sqlite:///{tmp_path / 'old.sqlite'}")
    with engine.begin() as connection:
        fill(connection)
    engine.dispose()
    store = await Store.open(tmp_path / "old.sqlite")
    async with store.reading() as tx:
        assert (await intent.volumes(tx))[A].spec == volume("a", 1)
        assert await volumes.read(tx) == volumes.Volumes()
    await store.close()


async def test_one_server_has_a_volume_at_a_time(store: Store) -> None:
    async with store.writing() as tx:
        await volumes.add(tx, volume("a", 1))
        await volumes.attach(tx, A, server("web", "disk").id)
    with pytest.raises(IntegrityError):
        async with store.writing() as tx:
            await volumes.attach(tx, A, server("other", "disk").id)
    async with store.writing() as tx:
        await volumes.detach(tx, A)
        await volumes.attach(tx, A, server("other", "disk").id)
    with pytest.raises(Conflict):
        async with store.writing() as tx:
            await volumes.add(tx, volume("a", 2))


async def test_a_lost_copy_is_counted_and_the_last_one_is_never_lost(store: Store) -> None:
    async with store.writing() as tx:
        await volumes.add(tx, volume("a", 1, 2))
        assert (await volumes.lose_copy(tx, A, host(1))).current == (host(2),)
        assert await volumes.losses_at(tx, A, host(1)) == 1
        await volumes.lose_copy(tx, A, host(1))
        assert (await volumes.read(tx)).losses == {A: {host(1): 2}}
        assert (await volumes.lose_copy(tx, A, host(3))).current == (host(2),), "one that is to come"
        with pytest.raises(Conflict) as refused:
            await volumes.lose_copy(tx, A, host(2))
        assert refused.value.remedy
        with pytest.raises(NotFound):
            await volumes.lose_copy(tx, VolumeId("no"), host(1))


async def test_a_copy_being_made_does_not_count_once_its_server_is_started_anew(store: Store) -> None:
    async with store.writing() as tx:
        await volumes.add(tx, volume("a", 1, 2, 3))
        await volumes.lose_copy(tx, A, host(2))
        at_order = await volumes.losses_at(tx, A, host(2))
        await volumes.fence(tx, A, (host(3),))
        assert await volumes.losses_at(tx, A, host(2)) > at_order
        assert await volumes.losses_at(tx, A, host(1)) == 0
        fenced = await volumes.get(tx, A)
        assert fenced is not None
        assert fenced.current == (host(1),)
        assert fenced.at(host(1)).epoch == fenced.newest_epoch


async def test_wishes_are_numbered_and_never_twice(store: Store) -> None:
    async with store.writing() as tx:
        first = await volumes.add_wish(tx, Relocation(volume=A), 1.0)
        await volumes.forget_wish(tx, first.id)
        second = await volumes.add_wish(tx, Relocation(volume=A, destination=host(2)), 2.0)
        assert first.id != second.id
        await volumes.cancel_wish(tx, second.id)
        (kept,) = await volumes.wishes(tx)
        assert kept.cancelled and kept.work == second.work


async def test_a_deleted_server_leaves_its_data_and_what_snapshots_rest_on(store: Store) -> None:
    web, other = server("web", "web-disk"), server("other", "other-disk")
    async with store.writing() as tx:
        await intent.add_server(tx, web, volume("web-disk", 1), 0.0)
        await intent.add_server(tx, other, volume("other-disk", 1), 0.0)
        await volumes.add(tx, volume("data", 1))
        await volumes.attach(tx, VolumeId("data"), web.id)
        taken = SnapshotSpec(id=SnapshotId("s"), volume=VolumeId("web-disk"), hosts=(host(1),))
        await volumes.add_snapshots(tx, (taken, taken))
        for spec in (web, other):
            await intent.forget_server(tx, spec.id)
        rows = await intent.volumes(tx)
        assert {name: row.removed for name, row in rows.items()} == {
            "data": False,
            "web-disk": False,
            "other-disk": True,
        }
        assert not (await volumes.read(tx)).attached


async def test_exports_go_with_their_time_or_their_snapshot(store: Store) -> None:
    def export(name: str, until: float) -> SnapshotExport:
        return SnapshotExport(
            id=name,
            snapshot=SnapshotId("s"),
            host=host(1),
            port=1,
            expires_at=until,
            key_hex="00",
        )

    async with store.writing() as tx:
        await volumes.add_snapshots(tx, (SnapshotSpec(id=SnapshotId("s"), volume=A, hosts=(host(1),)),))
        await volumes.put_export(tx, export("x", 10.0))
        await volumes.put_export(tx, export("y", 20.0))
        await volumes.forget_exports(tx, until=15.0)
        assert [each.id for each in (await volumes.read(tx)).exports] == ["y"]
        await volumes.mark_snapshot_removed(tx, SnapshotId("s"))
        read = await volumes.read(tx)
        assert not read.exports and read.snapshots[SnapshotId("s")].removed


async def test_backups_targets_and_settings_are_kept(store: Store) -> None:
    spec = BackupSpec(id=BackupId("b"), volume=A, target="/srv", host=host(1))
    async with store.writing() as tx:
        await volumes.add_backup(tx, spec)
        await volumes.put_target(tx, "vault", "/srv")
        await volumes.put_target(tx, "vault", "/srv/2")
        await volumes.set_settings(tx, VolumeSettings(parallel=9))
        read = await volumes.read(tx)
    assert (read.backups, read.targets, read.settings.parallel) == ({spec.id: spec}, {"vault": "/srv/2"}, 9)
