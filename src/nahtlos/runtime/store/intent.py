"""What people want: hosts, servers, volumes, settings. Written by requests, read by the planner. Networks
are beside it, in `networking`.

Uniqueness (names, addresses, one use of a token) is enforced by the tables, in the transaction that needs
it. Removal is in steps that other modules confirm: a server's row stays (`removed_at`) until no host runs
it, its volume's row (`removed`) until its host has deleted it.
"""

from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, ReleaseId, ServerGroupId, ServerId, VolumeId
from nahtlos.model.nouns import Component, HostRole, HostSpec, Release, ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.runtime.store import networking, schema, spent_keys
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered
from nahtlos.runtime.store.settings import set_setting as set_setting
from nahtlos.runtime.store.settings import setting as setting
from nahtlos.runtime.store.settings import setting_of as setting_of

# --- settings ----------------------------------------------------------------------------------------

PROMISED = "promised"
DEFAULT_RELEASE = "default_release"
DEFAULTS = {
    Component.HYPERVISOR: DEFAULT_RELEASE,
    Component.STORAGE: "default_storage_release",
    Component.NETWORK: "default_network_release",
}
"""Settings that name what hosts which join are given."""
PARALLEL_MOVES = "parallel_moves"
PARALLEL_MOVES_PER_HOST = "parallel_moves_per_host"


# --- hosts -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HostRow:
    spec: HostSpec
    intent: HostIntent


@remembered
async def hosts(tx: AsyncConnection) -> dict[HostId, HostRow]:
    rows = await tx.execute(select(schema.hosts).order_by(schema.hosts.c.id))
    return {
        HostId(row.id): HostRow(spec=value_of(row.document, HostSpec), intent=HostIntent(row.intent))
        for row in rows
    }


async def put_host(tx: AsyncConnection, spec: HostSpec, now: float) -> None:
    """Add the host, or take up its new addresses; its intent stays."""
    document = text_of(spec)
    statement = upsert(schema.hosts).values(
        id=spec.id, document=document, intent=HostIntent.ACTIVE, joined_at=now
    )
    await tx.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"document": document}))


async def set_intent(tx: AsyncConnection, host: HostId, intent: HostIntent) -> None:
    await tx.execute(update(schema.hosts).where(schema.hosts.c.id == host).values(intent=intent))


async def add_token(
    tx: AsyncConnection, digest: str, host: HostId, role: HostRole, expires_at: float
) -> None:
    values = {"hash": digest, "host": host, "role": role, "expires_at": expires_at}
    await tx.execute(insert(schema.join_tokens).values(values))


async def use_token(tx: AsyncConnection, digest: str, host: HostId, role: HostRole, now: float) -> None:
    """Spend the token of this digest. Refused if it is unknown, spent, too old, or for someone else; the
    four are not told apart, so that nobody learns which tokens exist."""
    table = schema.join_tokens
    spent = await tx.execute(
        update(table)
        .where(
            table.c.hash == digest,
            table.c.host == host,
            table.c.role == role,
            table.c.used_at.is_(None),
            table.c.expires_at > now,
        )
        .values(used_at=now)
    )
    if spent.rowcount != 1:
        raise Refused(
            f"the token does not let {host} join as {role}",
            field="token",
            remedy="make a new one for this host and role; each serves once and for a limited time",
        )


# --- releases ----------------------------------------------------------------------------------------


@remembered
async def releases(tx: AsyncConnection) -> dict[ReleaseId, Release]:
    rows = await tx.execute(select(schema.releases).order_by(schema.releases.c.id))
    return {ReleaseId(row.id): value_of(row.document, Release) for row in rows}


async def put_release(tx: AsyncConnection, release: Release, now: float) -> None:
    document = text_of(release)
    statement = upsert(schema.releases).values(id=release.id, document=document, registered_at=now)
    await tx.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"document": document}))


# --- servers and volumes -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServerRow:
    spec: ServerSpec
    created_at: float
    removed_at: float | None
    placement: HostId | None
    """The host that was asked for when it was created."""
    move_requested: bool
    move_to: HostId | None
    replace_by: ReleaseId | None = None
    """The release whose VMM is to take it over in place."""
    group: ServerGroupId | None = None
    pin: HostId | None = None


@remembered
async def servers(tx: AsyncConnection) -> dict[ServerId, ServerRow]:
    rows = await tx.execute(select(schema.servers).order_by(schema.servers.c.id))
    return {
        ServerId(row.id): ServerRow(
            spec=value_of(row.document, ServerSpec),
            created_at=row.created_at,
            removed_at=row.removed_at,
            placement=row.placement,
            move_requested=row.move_requested,
            move_to=row.move_to,
            replace_by=row.replace_by,
            group=row.server_group,
            pin=row.pinned_to,
        )
        for row in rows
    }


async def add_server(
    tx: AsyncConnection, spec: ServerSpec, volume: VolumeSpec, now: float, placement: HostId | None = None
) -> None:
    """The server with its volume and its ports, whole or not at all. The caller has chosen addresses in
    this same transaction. Conflict if a name is taken."""
    taken = await tx.execute(select(schema.servers.c.id).where(schema.servers.c.id == spec.id))
    if taken.first():
        raise Conflict(f"a server '{spec.id}' exists", field="name", remedy="choose another name")
    left = await tx.execute(select(schema.volumes.c.id).where(schema.volumes.c.id == volume.id))
    if left.first():
        raise Conflict(
            f"the volume of an earlier server '{spec.id}' is still being deleted",
            field="name",
            remedy="wait until it is gone, or choose another name",
        )
    await tx.execute(insert(schema.volumes).values(id=volume.id, document=text_of(volume), removed=False))
    await tx.execute(
        insert(schema.servers).values(
            id=spec.id,
            document=text_of(spec),
            volume=spec.volume,
            created_at=now,
            placement=placement,
            move_requested=False,
        )
    )
    await networking.add_ports(tx, spec.id, spec.ports)


async def mark_server_removed(tx: AsyncConnection, server: ServerId, now: float) -> None:
    await tx.execute(
        update(schema.servers)
        .where(schema.servers.c.id == server, schema.servers.c.removed_at.is_(None))
        .values(removed_at=now, move_requested=False, move_to=None, replace_by=None)
    )


async def forget_server(tx: AsyncConnection, server: ServerId) -> None:
    """No host runs it any more: its addresses are free, its data volumes are nobody's. Its system disk is
    deleted, unless snapshots of it remain."""
    row = (
        await tx.execute(
            select(schema.servers.c.volume, schema.servers.c.document).where(schema.servers.c.id == server)
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"no server '{server}'", field="server")
    if not await _is_needed(tx, VolumeId(row.volume)):
        await tx.execute(update(schema.volumes).where(schema.volumes.c.id == row.volume).values(removed=True))
    spec = value_of(row.document, ServerSpec)
    memory = spec.memory_volume
    if memory is not None and spec.going_back is None:
        await tx.execute(update(schema.volumes).where(schema.volumes.c.id == memory).values(removed=True))
    await tx.execute(delete(schema.attachments).where(schema.attachments.c.server == server))
    await networking.forget_ports(tx, server)
    await tx.execute(delete(schema.servers).where(schema.servers.c.id == server))


async def _is_needed(tx: AsyncConnection, volume: VolumeId) -> bool:
    table = schema.snapshots
    query = select(table.c.id).where(table.c.volume == volume, table.c.removed.is_(False))
    return (await tx.execute(query)).first() is not None


async def request_move(tx: AsyncConnection, server: ServerId, to: HostId | None) -> None:
    await tx.execute(
        update(schema.servers).where(schema.servers.c.id == server).values(move_requested=True, move_to=to)
    )


async def request_replacement(tx: AsyncConnection, server: ServerId, by: ReleaseId | None) -> None:
    """None: it is done, or not wanted any more."""
    await tx.execute(update(schema.servers).where(schema.servers.c.id == server).values(replace_by=by))


async def clear_move_request(tx: AsyncConnection, server: ServerId) -> None:
    await tx.execute(
        update(schema.servers).where(schema.servers.c.id == server).values(move_requested=False, move_to=None)
    )


@dataclass(frozen=True, kw_only=True)
class VolumeRow:
    spec: VolumeSpec
    removed: bool


@remembered
async def volumes(tx: AsyncConnection) -> dict[VolumeId, VolumeRow]:
    rows = await tx.execute(select(schema.volumes).order_by(schema.volumes.c.id))
    return {
        VolumeId(row.id): VolumeRow(spec=value_of(row.document, VolumeSpec), removed=row.removed)
        for row in rows
    }


async def forget_volume(tx: AsyncConnection, volume: VolumeId) -> None:
    query = select(schema.volumes.c.document).where(schema.volumes.c.id == volume)
    text = (await tx.execute(query)).scalar_one_or_none()
    if text is not None:
        await spent_keys.add(tx, value_of(text, VolumeSpec).encryption_key)
    await tx.execute(delete(schema.volumes).where(schema.volumes.c.id == volume))


@remembered
async def promised(tx: AsyncConnection) -> Size:
    return await setting_of(tx, PROMISED, Size) or Size()
