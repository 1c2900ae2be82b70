"""The runtime's database for runs in virtual time: without its thread, and without asking it again what
cannot have changed.

Statements run in the loop's own thread at the moment they are given, so a run is the same each time. Looks
(the functions of `runtime.store` that only read) are answered from memory while no table they read from was
written, and nothing was rolled back; most of a run would otherwise be spent in asking.
"""

import asyncio
import re
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiosqlite.core
import pytest

from nahtlos.runtime.store import (
    availability,
    blueprints,
    campaigns,
    intent,
    inventories,
    networking,
    operations,
    placement,
    projects,
    volumes,
)

WRITES = re.compile(r"(?:insert(?: or \w+)? into|replace into|update|delete from)\s+(\w+)", re.IGNORECASE)
READS = re.compile(r"(?:from|join)\s+(\w+)", re.IGNORECASE)
LOOKS = (
    (intent, ("hosts", "servers", "volumes", "promised", "setting", "setting_of", "releases")),
    (volumes, ("read",)),
    (availability, ("read",)),
    (placement, ("groups",)),
    (networking, ("networks", "functions")),
    (inventories, ("all_of", "received")),
    (campaigns, ("current",)),
    (blueprints, ("target", "host_configs")),
    (operations, ("refusals", "begun_at", "ended")),
    (projects, ("limits",)),
)
Look = Callable[..., Awaitable[Any]]


class _Tables:
    """Which tables were written how often, and which ones are read just now."""

    def __init__(self) -> None:
        self.written: Counter[str] = Counter()
        self.torn = 0
        """Counts what undoes writes, or may."""
        self._uncommitted = False
        self.reading: set[str] | None = None

    def saw(self, statement: str) -> None:
        """Every statement, as the database begins it."""
        sql = statement.lstrip()
        word = sql[:6].upper()
        if word == "SELECT":
            if self.reading is not None:
                self.reading.update(READS.findall(sql))
        elif word in ("COMMIT", "ROLLBA"):
            self.torn += word == "ROLLBA" and self._uncommitted
            self._uncommitted = False
        elif written := WRITES.match(sql):
            self.written[written.group(1)] += 1
            self._uncommitted = True

    def state_of(self, tables: frozenset[str]) -> tuple[int, ...]:
        return (self.torn, *(self.written[t] for t in sorted(tables)))


class _AtOnce:
    """Stands for the queue to the database's thread: what is put in is done before `put_nowait` returns."""

    def put_nowait(self, item: tuple[asyncio.Future[Any] | None, Callable[[], Any]]) -> None:
        future, function = item
        try:
            result = function()
        except Exception as error:
            if future:
                aiosqlite.core.set_exception(future, error)
        else:
            if future:
                aiosqlite.core.set_result(future, result)


class _NoThread:
    daemon = True

    def __init__(self, **_: object) -> None:
        pass

    def start(self) -> None:
        pass


def _remembering(look: Look, tables: _Tables) -> Look:
    known: dict[Any, tuple[frozenset[str], tuple[int, ...], Any]] = {}

    async def remembered(tx: Any, *args: Any) -> Any:
        key = tuple(frozenset(a) if isinstance(a, set) else a for a in args)
        if key in known:
            used, state, answer = known[key]
            if tables.state_of(used) == state:
                if tables.reading is not None:
                    tables.reading |= used
                return dict(answer) if isinstance(answer, dict) else answer
        outer, tables.reading = tables.reading, set()
        try:
            answer = await look(tx, *args)
            used = frozenset(tables.reading)
        finally:
            tables.reading = None if outer is None else outer | tables.reading
        known[key] = (used, tables.state_of(used), answer)
        return dict(answer) if isinstance(answer, dict) else answer

    return remembered


@contextmanager
def database_in_the_loop(name: str) -> Iterator[None]:
    """For the databases whose file is called `name`."""
    tables, connect = _Tables(), sqlite3.connect

    def connect_watched(database: str, **rest: Any) -> sqlite3.Connection:
        connection = connect(database, **rest)
        if Path(database).name == name:
            connection.set_trace_callback(tables.saw)
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_watched)
        patch.setattr(aiosqlite.core, "SimpleQueue", _AtOnce)
        patch.setattr(aiosqlite.core, "Thread", _NoThread)
        for module, names in LOOKS:
            for look in names:
                patch.setattr(module, look, _remembering(getattr(module, look), tables))
        yield
