"""What happened, numbered in order. Bounded: old events go."""

from collections.abc import Sequence

import msgspec
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.runtime.store import schema
from nahtlos.runtime.store.documents import text_of, value_of

KEPT = 100_000

Data = dict[str, str | int | float]


class EventDraft(msgspec.Struct, frozen=True, kw_only=True):
    """An event before it has a number."""

    kind: str
    subject: str
    text: str
    data: Data = {}
    at: float | None = None
    """Wall clock, seconds, if it is known better than when it was written down."""


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    at: float
    kind: str
    subject: str
    text: str
    data: Data


async def add(tx: AsyncConnection, drafts: Sequence[EventDraft], now: float) -> None:
    for draft in drafts:
        result = await tx.execute(
            insert(schema.events)
            .values(
                at=now if draft.at is None else draft.at,
                kind=draft.kind,
                subject=draft.subject,
                text=draft.text,
                data=text_of(draft.data),
            )
            .returning(schema.events.c.number)
        )
        number = result.scalar_one()
        if number % 1000 == 0:
            await tx.execute(delete(schema.events).where(schema.events.c.number <= number - KEPT))


async def after(tx: AsyncConnection, number: int, limit: int) -> tuple[EventRow, ...]:
    query = select(schema.events).where(schema.events.c.number > number)
    rows = await tx.execute(query.order_by(schema.events.c.number).limit(limit))
    return tuple(
        EventRow(
            number=row.number,
            at=row.at,
            kind=row.kind,
            subject=row.subject,
            text=row.text,
            data=value_of(row.data, Data),
        )
        for row in rows
    )
