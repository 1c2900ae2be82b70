"""A connection to SQLite that is quick, and that cancellation cannot tear.

Statements run at once, in the event loop's thread: one takes some ten microseconds, but handing it to
another thread and back a millisecond on a busy machine, and a look at the store is twenty of them (64 ms
that way, 5 ms this way). What may wait for a disk or a lock - beginning to write, and committing - runs in
the connection's own thread.

A task that is cancelled during that must not leave: what was handed over goes on, and another task would
speak on the same connection in between. So it waits, the cancellation is noted, and the store raises it
once the transaction has ended, whole.
"""

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import aiosqlite

ROWS_AT_ONCE = 64


class SteadyConnection(aiosqlite.Connection):
    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, ROWS_AT_ONCE)
        self._thread.daemon = True  # a process that was told to end does not wait for it
        self.cancelled = False
        """A task was cancelled while it waited; whoever ends the transaction raises it."""
        self._changes = 0
        """Rows changed on this connection, before the transaction that runs."""

    def foreign_commits(self) -> int:
        """A number that changes whenever another connection has committed; asked inside a transaction."""
        return int(self._conn.execute("PRAGMA data_version").fetchone()[0])

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._running or not self._connection:
            raise ValueError("Connection closed")
        if not self._may_wait(fn, args):
            return fn(*args, **kwargs)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        queue = cast("SimpleQueue[object]", self._tx)
        queue.put_nowait((done, partial(fn, *args, **kwargs)))
        while not done.done():
            try:
                await asyncio.shield(done)
            except asyncio.CancelledError:
                self.cancelled = True
            except Exception:
                break  # the statement failed: raised below
        return done.result()

    def _may_wait(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Reading never waits: in WAL mode it needs no lock."""
        if fn == self._conn.commit:
            before, self._changes = self._changes, self._conn.total_changes
            return self._changes != before
        if args and args[0] == BEGIN_WRITING:
            self._changes = self._conn.total_changes
            return True
        return False


BEGIN_READING = "BEGIN DEFERRED"
BEGIN_WRITING = "BEGIN IMMEDIATE"


async def connect(path: Path | None) -> SteadyConnection:
    """The database at `path`; None: one in memory. Transactions are begun by who uses it, not by itself."""
    database = str(path) if path else ":memory:"
    connection = SteadyConnection(
        lambda: sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    )
    await connection
    return connection
