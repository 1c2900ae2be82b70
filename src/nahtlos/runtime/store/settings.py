"""Settings of the cloud: one value under each name."""

from sqlalchemy import select
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import T, text_of, value_of
from nahtlos.runtime.store.remembered import remembered


async def setting(tx: AsyncConnection, name: str, default: T) -> T:
    """The setting, of the type of `default`."""
    return await setting_of(tx, name, type(default)) or default


@remembered
async def setting_of(tx: AsyncConnection, name: str, kind: type[T]) -> T | None:
    query = select(schema.settings.c.document).where(schema.settings.c.name == name)
    text = (await tx.execute(query)).scalar_one_or_none()
    return None if text is None else value_of(text, kind)


async def set_setting(tx: AsyncConnection, name: str, value: object) -> None:
    document = text_of(value)
    statement = upsert(schema.settings).values(name=name, document=document)
    await tx.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"document": document}))
