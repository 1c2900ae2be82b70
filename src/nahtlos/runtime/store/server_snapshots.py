"""Snapshots of whole servers. Their disks' snapshots, and the volume of the memory, are with all others."""

from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.ids import SnapshotId
from nahtlos.model.server_snapshots import ServerSnapshot
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered


@remembered
async def all_of(tx: AsyncConnection) -> dict[SnapshotId, ServerSnapshot]:
    rows = await tx.execute(select(schema.server_snapshots).order_by(schema.server_snapshots.c.id))
    return {SnapshotId(row.id): value_of(row.document, ServerSnapshot) for row in rows}


async def add(tx: AsyncConnection, snapshot: ServerSnapshot) -> None:
    """One that is known stays as it is."""
    statement = upsert(schema.server_snapshots).values(
        id=snapshot.id, server=snapshot.server, document=text_of(snapshot)
    )
    await tx.execute(statement.on_conflict_do_nothing(index_elements=["id"]))


async def forget(tx: AsyncConnection, snapshot: SnapshotId) -> None:
    await tx.execute(delete(schema.server_snapshots).where(schema.server_snapshots.c.id == snapshot))
