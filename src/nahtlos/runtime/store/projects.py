"""What projects may have in all. A project is a name; it has a row here only where something is limited."""

from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.ids import ProjectId
from nahtlos.model.project_limits import ProjectLimits
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered


@remembered
async def limits(tx: AsyncConnection) -> dict[ProjectId, ProjectLimits]:
    rows = await tx.execute(select(schema.project_limits).order_by(schema.project_limits.c.project))
    return {ProjectId(row.project): value_of(row.document, ProjectLimits) for row in rows}


async def set_limits(tx: AsyncConnection, project: ProjectId, value: ProjectLimits) -> None:
    table = schema.project_limits
    if value == ProjectLimits():
        await tx.execute(delete(table).where(table.c.project == project))
        return
    document = text_of(value)
    statement = upsert(table).values(project=project, document=document)
    await tx.execute(statement.on_conflict_do_update(index_elements=["project"], set_={"document": document}))
