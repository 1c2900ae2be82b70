"""Operations from their decision to their end, and those an agent would not begin.

A row appears in the transaction that makes the blueprint naming the operation the target, and ends in the
one that makes a blueprint without it the target. Agents forget an operation only after that.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import delete, literal, select, update
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import OperationRecord
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import CampaignId, HostId, OperationId
from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of
from nahtlos.runtime.store.remembered import remembered


async def begin(tx: AsyncConnection, record: OperationRecord, now: float) -> None:
    statement = upsert(schema.operations).values(
        id=record.id,
        kind=record.kind,
        subject=record.subject,
        state=record.state,
        campaign=record.campaign,
        document=text_of(record),
        begun_at=now,
    )
    await tx.execute(statement.on_conflict_do_nothing(index_elements=["id"]))


async def end(tx: AsyncConnection, record: OperationRecord, now: float) -> None:
    """Record the outcome, also of an operation no row says anything about. Ending twice changes nothing."""
    await begin(tx, record, now)
    table = schema.operations
    await tx.execute(
        update(table)
        .where(table.c.id == record.id, table.c.ended_at.is_(None))
        .values(state=record.state, document=text_of(record), ended_at=now)
    )
    await tx.execute(delete(schema.refusals).where(schema.refusals.c.operation == record.id))


async def add_times(tx: AsyncConnection, operation: OperationId, times: Mapping[str, float]) -> None:
    """Times another agent knew of an operation that is recorded; what is there already stays."""
    known = (await get(tx, (operation,))).get(operation)
    if known is None or known.times.keys() >= times.keys():
        return
    merged = msgspec.structs.replace(known, times={**times, **known.times})
    await tx.execute(
        update(schema.operations).where(schema.operations.c.id == operation).values(document=text_of(merged))
    )


async def get(tx: AsyncConnection, ids: Iterable[OperationId]) -> dict[OperationId, OperationRecord]:
    return _records(await _select(tx, schema.operations.c.id.in_(tuple(ids))))


@remembered
async def begun_at(tx: AsyncConnection) -> dict[OperationId, float]:
    """When each operation that has not ended was decided."""
    table = schema.operations
    rows = await tx.execute(select(table.c.id, table.c.begun_at).where(table.c.ended_at.is_(None)))
    return {OperationId(row.id): row.begun_at for row in rows}


@remembered
async def ended(tx: AsyncConnection, ids: frozenset[OperationId]) -> frozenset[OperationId]:
    """Which of these are recorded as ended."""
    table = schema.operations
    rows = await tx.execute(
        select(table.c.id).where(table.c.id.in_(tuple(ids)), table.c.ended_at.is_not(None))
    )
    return frozenset(OperationId(row.id) for row in rows)


@remembered
async def of_campaign(tx: AsyncConnection, campaign: CampaignId) -> tuple[OperationRecord, ...]:
    """Those that ended in it, oldest first."""
    table = schema.operations
    where = (table.c.campaign == campaign) & table.c.ended_at.is_not(None)
    return tuple(_records(await _select(tx, where)).values())


@remembered
async def newest(tx: AsyncConnection, kind: str, limit: int) -> tuple[OperationRecord, ...]:
    table = schema.operations
    query = select(table).where(table.c.kind == kind, table.c.ended_at.is_not(None))
    query = query.order_by(table.c.ended_at.desc()).limit(limit)
    return tuple(_records((await tx.execute(query)).all()).values())


@dataclass(frozen=True, kw_only=True)
class OperationRow:
    record: OperationRecord
    begun_at: float
    ended_at: float | None


async def listing(
    tx: AsyncConnection, *, subject: str = "", kind: str = "", operation: str = "", limit: int
) -> tuple[OperationRow, ...]:
    """Newest first. An operation of several volumes has all their names as its subject."""
    table = schema.operations
    query = select(table).order_by(table.c.begun_at.desc(), table.c.id.desc()).limit(limit)
    if subject:
        every = literal(", ") + table.c.subject + ", "
        query = query.where(every.contains(f", {subject}, ", autoescape=True))
    if kind:
        query = query.where(table.c.kind == kind)
    if operation:
        query = query.where(table.c.id == operation)
    return tuple(
        OperationRow(
            record=value_of(row.document, OperationRecord), begun_at=row.begun_at, ended_at=row.ended_at
        )
        for row in (await tx.execute(query)).all()
    )


async def _select(tx: AsyncConnection, where: Any) -> Any:
    table = schema.operations
    return (await tx.execute(select(table).where(where).order_by(table.c.ended_at, table.c.id))).all()


def _records(rows: Any) -> dict[OperationId, OperationRecord]:
    return {OperationId(row.id): value_of(row.document, OperationRecord) for row in rows}


# --- refusals ----------------------------------------------------------------------------------------


async def refuse(tx: AsyncConnection, operation: OperationId, host: HostId, error: ErrorRecord) -> None:
    """An agent would not begin it. The planner sees this as an operation undone on that host."""
    statement = upsert(schema.refusals).values(operation=operation, host=host, document=text_of(error))
    await tx.execute(statement.on_conflict_do_nothing(index_elements=["operation"]))


@remembered
async def refusals(tx: AsyncConnection) -> dict[OperationId, tuple[HostId, ErrorRecord]]:
    rows = await tx.execute(select(schema.refusals))
    return {
        OperationId(row.operation): (HostId(row.host), value_of(row.document, ErrorRecord)) for row in rows
    }
