"""What people want of places: server groups, servers that are pinned to a host, the reserve. Which group a
server is in is in its own row, from its creation to its end."""

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.ids import HostId, ServerGroupId, ServerId
from nahtlos.model.placement import ServerGroup
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered

RESERVE = "reserve"
"""The setting: how many hosts may fail at once."""


@remembered
async def groups(tx: AsyncConnection) -> dict[ServerGroupId, ServerGroup]:
    rows = await tx.execute(select(schema.server_groups).order_by(schema.server_groups.c.id))
    return {ServerGroupId(row.id): value_of(row.document, ServerGroup) for row in rows}


async def add_group(tx: AsyncConnection, group: ServerGroup) -> None:
    await tx.execute(insert(schema.server_groups).values(id=group.id, document=text_of(group)))


async def delete_group(tx: AsyncConnection, group: ServerGroupId) -> None:
    await tx.execute(delete(schema.server_groups).where(schema.server_groups.c.id == group))


async def set_group(tx: AsyncConnection, server: ServerId, group: ServerGroupId) -> None:
    table = schema.servers
    await tx.execute(update(table).where(table.c.id == server).values(server_group=group))


async def pin(tx: AsyncConnection, server: ServerId, host: HostId | None) -> None:
    table = schema.servers
    await tx.execute(update(table).where(table.c.id == server).values(pinned_to=host))
