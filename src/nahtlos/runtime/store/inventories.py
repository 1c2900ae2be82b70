"""The last report of every host. Who is connected is not stored: a restarted orchestrator knows of none."""

from sqlalchemy import select
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.ids import HostId
from nahtlos.model.inventory import HostInventory
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered


async def put(tx: AsyncConnection, inventory: HostInventory, received_at: float) -> None:
    values = {"document": text_of(inventory), "received_at": received_at}
    statement = upsert(schema.inventories).values(host=inventory.host, **values)
    await tx.execute(statement.on_conflict_do_update(index_elements=["host"], set_=values))


@remembered
async def all_of(tx: AsyncConnection) -> dict[HostId, HostInventory]:
    rows = await tx.execute(select(schema.inventories).order_by(schema.inventories.c.host))
    return {HostId(row.host): value_of(row.document, HostInventory) for row in rows}


@remembered
async def received(tx: AsyncConnection) -> dict[HostId, float]:
    """When each host's report came, by this side's clock."""
    rows = await tx.execute(select(schema.inventories.c.host, schema.inventories.c.received_at))
    return {HostId(row.host): row.received_at for row in rows}
