"""A connection to SQLite whose statements cannot be torn by cancellation.

A statement runs in the connection's thread and goes on there whether or not anybody still waits for it. So
a task that is cancelled meanwhile must not leave: another would speak on the same connection in between.
Here it waits for the statement, the cancellation is noted, and the store raises it once the transaction
has ended, whole.
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

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._running or not self._connection:
            raise ValueError("Connection closed")
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


async def connect(path: Path | None) -> SteadyConnection:
    """The database at `path`; None: one in memory. Transactions are begun by who uses it, not by itself."""
    database = str(path) if path else ":memory:"
    connection = SteadyConnection(lambda: sqlite3.connect(database, isolation_level=None))
    await connection
    return connection
