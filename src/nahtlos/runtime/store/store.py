"""The database of the runtime: opening, migrating, transactions, and the fence of the leader.

Owns the one connection and the order of transactions. Never knows what is in the rows: that is in the
modules beside this one, whose functions take a transaction (`AsyncConnection`) and so can be combined
into one. Between entering and leaving a transaction nothing but the database may be awaited.

    async with store.reading() as tx: ...         a consistent look
    async with store.writing() as tx: ...         intent, observations
    async with store.deciding(epoch) as tx: ...   what a leader decided; Stale once its lease is gone
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from nahtlos.model.errors import Unavailable
from nahtlos.runtime.store import leases, remembered
from nahtlos.runtime.store.migrate import upgrade_to_head
from nahtlos.runtime.store.steady import BEGIN_READING, BEGIN_WRITING, SteadyConnection, connect

BUSY_TIMEOUT_MS = 10_000
TURN_TIMEOUT = 30.0
"""Seconds a transaction may wait for its turn."""

Clock = Callable[[], float]
OnIo = Callable[[], AbstractContextManager[None]]


class Store:
    """One open database. Use `Store.open`."""

    def __init__(self, path: Path | None, *, clock: Clock, on_io: OnIo | None) -> None:
        self.clock = clock
        self._path = path
        self._driver: SteadyConnection | None = None
        self._begin = BEGIN_WRITING
        self._engine = _engine(self._connect, clock, lambda: self._begin)
        remembered.attend(self._engine.sync_engine, self._foreign_commits)
        self._on_io: OnIo = on_io or nullcontext
        self._turn = asyncio.Lock()
        self.decisions = 0
        """Counts `deciding` transactions of this process: what was read before the last one is old."""

    @classmethod
    async def open(cls, path: Path | None, *, clock: Clock = time.time, on_io: OnIo | None = None) -> "Store":
        """The database at `path` (None: in memory), brought to this release's schema. `clock` serves as
        the database's clock (seconds); `on_io` is entered around every use of the database's thread, so
        that a simulation can hold its time meanwhile."""
        store = cls(path, clock=clock, on_io=on_io)
        async with store._run() as connection:
            await connection.run_sync(upgrade_to_head)
        return store

    @asynccontextmanager
    async def _run(self, begin: str = BEGIN_WRITING) -> AsyncGenerator[AsyncConnection]:
        """The only way to the database: one transaction at a time, in the order they were asked for. One
        that has begun ends whole, even if its task is cancelled meanwhile; the task is then cancelled."""
        await self._wait_for_turn()
        try:
            self._begin = begin
            with self._on_io():
                async with self._engine.begin() as connection:
                    yield connection
        finally:
            self._turn.release()
            self._raise_cancellation()

    async def _wait_for_turn(self) -> None:
        try:
            async with asyncio.timeout(TURN_TIMEOUT):
                await self._turn.acquire()
        except TimeoutError as error:
            raise Unavailable("the database is busy", remedy="try again later") from error

    def _raise_cancellation(self) -> None:
        if self._driver is not None and self._driver.cancelled:
            self._driver.cancelled = False
            raise asyncio.CancelledError

    async def _connect(self) -> SteadyConnection:
        self._driver = await connect(self._path)
        return self._driver

    def _foreign_commits(self) -> int:
        return self._driver.foreign_commits() if self._driver is not None else 0

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[AsyncConnection]:
        async with self._run(BEGIN_READING) as connection:
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncGenerator[AsyncConnection]:
        async with self._run() as connection:
            yield connection

    @asynccontextmanager
    async def deciding(self, epoch: int) -> AsyncGenerator[AsyncConnection]:
        """A transaction of the leader of `epoch`. Raises Stale if another leads or the lease has passed."""
        try:
            async with self._run() as connection:
                await leases.check(connection, epoch)
                yield connection
        finally:
            self.decisions += 1

    async def close(self) -> None:
        async with self._turn:
            with self._on_io():
                await self._engine.dispose()


def _engine(creator: Callable[[], Awaitable[Any]], clock: Clock, begin: Callable[[], str]) -> AsyncEngine:
    """SQLite behind one connection: transactions are ordered by this process, not by locks."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool, async_creator=creator)

    def on_connect(connection: Any, _record: object) -> None:
        connection.create_function(leases.CLOCK_FUNCTION, 0, clock)
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "foreign_keys=ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin())

    event.listen(engine.sync_engine, "connect", on_connect)
    event.listen(engine.sync_engine, "begin", on_begin)
    return engine
