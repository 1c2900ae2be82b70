"""Volumes that people made, what was made of them, and what was asked to be done with them. System disks come
and go with their servers (`intent`).

The one record of which copies of a volume are current is here: what changes it reads it in the same
transaction. A name is one volume's, snapshot's or backup's, also while it is only asked for.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.errors import Conflict, NotFound
from nahtlos.model.ids import BackupId, HostId, ServerId, SnapshotId, VolumeId
from nahtlos.model.nouns import ServerSpec
from nahtlos.model.server_snapshots import ServerSnapshot
from nahtlos.model.storage import (
    BackupSpec,
    Replica,
    ReplicaState,
    SnapshotExport,
    SnapshotSpec,
    StorageBackend,
    VolumeSpec,
)
from nahtlos.model.volume_settings import VolumeSettings
from nahtlos.model.volume_work import VolumeWish, VolumeWork
from nahtlos.runtime.store import schema, server_snapshots, spent_keys
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered
from nahtlos.runtime.store.settings import set_setting, setting_of

SETTINGS = "volumes"
WISH = "wish-"


class Wished(msgspec.Struct, frozen=True):
    work: VolumeWork


@dataclass(frozen=True, kw_only=True)
class SnapshotRow:
    spec: SnapshotSpec
    removed: bool


@dataclass(frozen=True, kw_only=True)
class Volumes:
    """All of it but the volumes themselves."""

    attached: dict[VolumeId, ServerId] = field(default_factory=dict[VolumeId, ServerId])
    losses: dict[VolumeId, dict[HostId, int]] = field(default_factory=dict[VolumeId, dict[HostId, int]])
    snapshots: dict[SnapshotId, SnapshotRow] = field(default_factory=dict[SnapshotId, SnapshotRow])
    exports: tuple[SnapshotExport, ...] = ()
    backups: dict[BackupId, BackupSpec] = field(default_factory=dict[BackupId, BackupSpec])
    server_snapshots: dict[SnapshotId, ServerSnapshot] = field(
        default_factory=dict[SnapshotId, ServerSnapshot]
    )
    targets: dict[str, str] = field(default_factory=dict[str, str])
    """Where backups go, by the name people gave it."""
    wishes: tuple[VolumeWish, ...] = ()
    settings: VolumeSettings = field(default_factory=VolumeSettings)


@remembered
async def read(tx: AsyncConnection) -> Volumes:
    attached = await tx.execute(select(schema.attachments))
    losses: dict[VolumeId, dict[HostId, int]] = {}
    for row in await tx.execute(select(schema.replica_losses)):
        losses.setdefault(VolumeId(row.volume), {})[HostId(row.host)] = row.times
    snapshots = await tx.execute(select(schema.snapshots).order_by(schema.snapshots.c.id))
    exports = await tx.execute(select(schema.snapshot_exports).order_by(schema.snapshot_exports.c.id))
    backups = await tx.execute(select(schema.backups).order_by(schema.backups.c.id))
    targets = await tx.execute(select(schema.backup_targets).order_by(schema.backup_targets.c.name))
    return Volumes(
        attached={VolumeId(row.volume): ServerId(row.server) for row in attached},
        losses=losses,
        snapshots={
            SnapshotId(row.id): SnapshotRow(spec=value_of(row.document, SnapshotSpec), removed=row.removed)
            for row in snapshots
        },
        exports=tuple(value_of(row.document, SnapshotExport) for row in exports),
        backups={BackupId(row.id): value_of(row.document, BackupSpec) for row in backups},
        server_snapshots=await server_snapshots.all_of(tx),
        targets={row.name: row.place for row in targets},
        wishes=await wishes(tx),
        settings=await settings(tx),
    )


@remembered
async def settings(tx: AsyncConnection) -> VolumeSettings:
    return await setting_of(tx, SETTINGS, VolumeSettings) or VolumeSettings()


async def set_settings(tx: AsyncConnection, value: VolumeSettings) -> None:
    await set_setting(tx, SETTINGS, value)


# --- volumes -----------------------------------------------------------------------------------------


async def get(tx: AsyncConnection, volume: VolumeId) -> VolumeSpec | None:
    """None, too, if it is being deleted."""
    table = schema.volumes
    query = select(table.c.document).where(table.c.id == volume, table.c.removed.is_(False))
    text = (await tx.execute(query)).scalar_one_or_none()
    return None if text is None else value_of(text, VolumeSpec)


async def add(tx: AsyncConnection, spec: VolumeSpec) -> None:
    known = await tx.execute(select(schema.volumes.c.id).where(schema.volumes.c.id == spec.id))
    if known.first():
        raise Conflict(f"a volume '{spec.id}' exists", field="name", remedy="choose another name")
    await tx.execute(insert(schema.volumes).values(id=spec.id, document=text_of(spec), removed=False))


async def put(tx: AsyncConnection, spec: VolumeSpec) -> None:
    """In the place of the one of this name."""
    table = schema.volumes
    await tx.execute(update(table).where(table.c.id == spec.id).values(document=text_of(spec)))


async def mark_removed(tx: AsyncConnection, volume: VolumeId) -> None:
    await tx.execute(update(schema.volumes).where(schema.volumes.c.id == volume).values(removed=True))


async def forget_losses(tx: AsyncConnection, volume: VolumeId) -> None:
    await tx.execute(delete(schema.replica_losses).where(schema.replica_losses.c.volume == volume))


async def lose_copy(tx: AsyncConnection, volume: VolumeId, host: HostId) -> VolumeSpec:
    """From here on the copy at `host` is not current, and no operation that was to make it so counts.
    Conflict if no other copy is current: then there is nothing to go on with. NotFound if there is no such
    volume. A host without a (current) copy: it may be about to get one, which is then not current."""
    spec = await get(tx, volume)
    if spec is None:
        raise NotFound(f"no volume '{volume}'", field="volume")
    if spec.current == (host,):
        raise Conflict(
            f"the copy of {volume} on {host} is the only current one",
            field="lost",
            remedy=f"bring {host} and its storage daemon back",
        )
    table = schema.replica_losses
    statement = upsert(table).values(volume=volume, host=host, times=1)
    await tx.execute(
        statement.on_conflict_do_update(index_elements=["volume", "host"], set_={"times": table.c.times + 1})
    )
    after = with_state(spec, host, ReplicaState.STALE)
    if after != spec:
        await put(tx, after)
    return after


async def fence(tx: AsyncConnection, volume: VolumeId, gone: Collection[HostId]) -> None:
    """Before its server is started anew: copies on hosts that are `gone` are not current any more, and the
    others are served by a later epoch, so that nothing that still holds the old exports writes. What is being
    made current does not count: the server that was led to it is not the one that writes. Conflict if no
    other copy is current."""
    spec = await get(tx, volume)
    if spec is None or spec.backend is not StorageBackend.EMBEDDED:
        return
    for host in (copy.host for copy in spec.copies):
        if host in gone or host not in spec.current:
            spec = await lose_copy(tx, volume, host)
    epoch = spec.newest_epoch + 1
    spec = msgspec.structs.replace(spec, replicas=pinned_epochs(spec))
    for host in spec.current:
        spec = with_state(spec, host, ReplicaState.CURRENT, epoch)
    await put(tx, spec)


async def losses_at(tx: AsyncConnection, volume: VolumeId, host: HostId) -> int:
    table = schema.replica_losses
    query = select(table.c.times).where(table.c.volume == volume, table.c.host == host)
    return (await tx.execute(query)).scalar_one_or_none() or 0


def with_state(spec: VolumeSpec, host: HostId, state: ReplicaState, epoch: int = 0) -> VolumeSpec:
    """The copy at `host` in another state; `epoch` 0: served as before."""
    if host == spec.host:
        pinned = pinned_epochs(spec) if epoch else spec.replicas
        return msgspec.structs.replace(spec, state=state, epoch=epoch or spec.epoch, replicas=pinned)
    return msgspec.structs.replace(
        spec,
        replicas=tuple(
            msgspec.structs.replace(r, state=state, epoch=epoch or r.epoch) if r.host == host else r
            for r in spec.replicas
        ),
    )


def pinned_epochs(spec: VolumeSpec) -> tuple[Replica, ...]:
    """The replicas, each with its own epoch, so that the volume's may change."""
    return spec.copies[1:]


# --- attachments -------------------------------------------------------------------------------------


async def attach(tx: AsyncConnection, volume: VolumeId, server: ServerId) -> None:
    await tx.execute(insert(schema.attachments).values(volume=volume, server=server))


async def detach(tx: AsyncConnection, volume: VolumeId) -> None:
    await tx.execute(delete(schema.attachments).where(schema.attachments.c.volume == volume))


async def put_server(tx: AsyncConnection, spec: ServerSpec) -> None:
    """With other data volumes, of another size, limited otherwise; addresses of its ports are as before."""
    await tx.execute(
        update(schema.servers).where(schema.servers.c.id == spec.id).values(document=text_of(spec))
    )


# --- snapshots ---------------------------------------------------------------------------------------


async def add_snapshots(tx: AsyncConnection, specs: Iterable[SnapshotSpec]) -> None:
    """Those that are known stay as they are."""
    for spec in specs:
        statement = upsert(schema.snapshots).values(
            id=spec.id, volume=spec.volume, document=text_of(spec), removed=False
        )
        await tx.execute(statement.on_conflict_do_nothing(index_elements=["id"]))


async def put_snapshot(tx: AsyncConnection, spec: SnapshotSpec) -> None:
    """In the place of the one of this name, whether or not it is being deleted."""
    table = schema.snapshots
    await tx.execute(update(table).where(table.c.id == spec.id).values(document=text_of(spec)))


async def mark_snapshot_removed(tx: AsyncConnection, snapshot: SnapshotId) -> None:
    await forget_exports(tx, snapshot=snapshot)
    await tx.execute(update(schema.snapshots).where(schema.snapshots.c.id == snapshot).values(removed=True))


async def forget_snapshot(tx: AsyncConnection, snapshot: SnapshotId) -> None:
    await forget_exports(tx, snapshot=snapshot)
    await tx.execute(delete(schema.snapshots).where(schema.snapshots.c.id == snapshot))


async def put_export(tx: AsyncConnection, export: SnapshotExport) -> None:
    await tx.execute(
        insert(schema.snapshot_exports).values(
            id=export.id,
            snapshot=export.snapshot,
            document=text_of(export),
            expires_at=export.expires_at,
        )
    )


async def forget_export(tx: AsyncConnection, export: str) -> None:
    await tx.execute(delete(schema.snapshot_exports).where(schema.snapshot_exports.c.id == export))


async def forget_exports(
    tx: AsyncConnection, *, snapshot: SnapshotId | None = None, until: float | None = None
) -> None:
    """Those of a snapshot, or those that have expired."""
    table = schema.snapshot_exports
    if snapshot is not None:
        await tx.execute(delete(table).where(table.c.snapshot == snapshot))
    if until is not None:
        await tx.execute(delete(table).where(table.c.expires_at <= until))


# --- backups -----------------------------------------------------------------------------------------


async def add_backup(tx: AsyncConnection, spec: BackupSpec) -> None:
    statement = upsert(schema.backups).values(id=spec.id, volume=spec.volume, document=text_of(spec))
    await tx.execute(statement.on_conflict_do_nothing(index_elements=["id"]))


async def forget_backup(tx: AsyncConnection, backup: BackupId) -> None:
    query = select(schema.backups.c.document).where(schema.backups.c.id == backup)
    text = (await tx.execute(query)).scalar_one_or_none()
    if text is not None:
        await spent_keys.add(tx, value_of(text, BackupSpec).encryption_key)
    await tx.execute(delete(schema.backups).where(schema.backups.c.id == backup))


async def put_target(tx: AsyncConnection, name: str, place: str) -> None:
    statement = upsert(schema.backup_targets).values(name=name, place=place)
    await tx.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"place": place}))


async def forget_target(tx: AsyncConnection, name: str) -> None:
    await tx.execute(delete(schema.backup_targets).where(schema.backup_targets.c.name == name))


# --- wishes ------------------------------------------------------------------------------------------


@remembered
async def wishes(tx: AsyncConnection) -> tuple[VolumeWish, ...]:
    rows = await tx.execute(select(schema.volume_wishes).order_by(schema.volume_wishes.c.number))
    return tuple(
        VolumeWish(
            id=f"{WISH}{row.number}",
            work=value_of(row.document, Wished).work,
            asked_at=row.asked_at,
            cancelled=row.cancelled,
        )
        for row in rows
    )


async def add_wish(tx: AsyncConnection, work: VolumeWork, now: float) -> VolumeWish:
    values = {"document": text_of(Wished(work)), "asked_at": now, "cancelled": False}
    added = await tx.execute(
        insert(schema.volume_wishes).values(values).returning(schema.volume_wishes.c.number)
    )
    return VolumeWish(id=f"{WISH}{added.scalar_one()}", work=work, asked_at=now)


async def cancel_wish(tx: AsyncConnection, wish: str) -> None:
    await tx.execute(update(schema.volume_wishes).where(_is(wish)).values(cancelled=True))


async def put_wish(tx: AsyncConnection, wish: str, work: VolumeWork) -> None:
    """In other words; who has begun it goes on as it was."""
    document = text_of(Wished(work))
    await tx.execute(update(schema.volume_wishes).where(_is(wish)).values(document=document))


async def forget_wish(tx: AsyncConnection, wish: str) -> None:
    await tx.execute(delete(schema.volume_wishes).where(_is(wish)))


def _is(wish: str) -> ColumnElement[bool]:
    return schema.volume_wishes.c.number == int(wish.removeprefix(WISH))
