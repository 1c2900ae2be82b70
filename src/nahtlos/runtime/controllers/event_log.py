"""Events: taken at once, written in batches, and passed on to whoever follows.

What is lost when the process is killed is at most the last batch; nothing is decided by events.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

from sqlalchemy.exc import SQLAlchemyError

from nahtlos.model.errors import Error
from nahtlos.runtime.controllers.cloud import CloudEvent
from nahtlos.runtime.store import events
from nahtlos.runtime.store.events import EventDraft, EventRow
from nahtlos.runtime.store.store import Store

PENDING = 10_000
"""Events that may wait to be written; more are dropped, and counted."""
BATCH = 200
PAGE = 500
LOOK_AGAIN = 1.0
"""Seconds after which a follower looks at the store even if nobody told it to."""

_log = logging.getLogger("nahtlos.runtime.events")


class EventLog:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: asyncio.Queue[EventDraft] = asyncio.Queue(PENDING)
        self._written = asyncio.Condition()
        self._dropped = 0

    def say(self, draft: EventDraft) -> None:
        try:
            self._pending.put_nowait(draft)
        except asyncio.QueueFull:
            self._dropped += 1

    async def run(self) -> None:
        while True:
            batch = [await self._pending.get()]
            while len(batch) < BATCH and not self._pending.empty():
                batch.append(self._pending.get_nowait())
            await self._write(batch)

    async def flush(self) -> None:
        """Write what is pending; for a graceful end."""
        batch: list[EventDraft] = []
        while not self._pending.empty():
            batch.append(self._pending.get_nowait())
        if batch:
            await self._write(batch)

    async def _write(self, batch: list[EventDraft]) -> None:
        if self._dropped:
            text = f"{self._dropped} events were dropped: too many at once"
            batch.append(EventDraft(kind="events.dropped", subject="orchestrator", text=text))
            self._dropped = 0
        try:
            async with self._store.writing() as tx:
                await events.add(tx, batch, self._store.clock())
        except (Error, TimeoutError, OSError, SQLAlchemyError):
            _log.exception("%d events could not be written", len(batch))
        async with self._written:
            self._written.notify_all()

    async def after(self, number: int, limit: int) -> tuple[CloudEvent, ...]:
        async with self._store.reading() as tx:
            return tuple(_cloud_event(row) for row in await events.after(tx, number, limit))

    async def follow(self, number: int) -> AsyncIterator[CloudEvent]:
        while True:
            page = await self.after(number, PAGE)
            for event in page:
                number = event.number
                yield event
            if not page:
                await self._news()

    async def _news(self) -> None:
        try:
            async with asyncio.timeout(LOOK_AGAIN), self._written:
                await self._written.wait()
        except TimeoutError:
            pass


def _cloud_event(row: EventRow) -> CloudEvent:
    return CloudEvent(
        number=row.number, at=row.at, kind=row.kind, subject=row.subject, text=row.text, data=row.data
    )
