"""The runtime's database for runs in virtual time: without its thread, and without asking it again what
cannot have changed.

Statements run in the loop's own thread at the moment they are given, so a run is the same each time. Looks
(the functions of `runtime.store` that only read) are answered from memory while no table they read from was
written, and nothing was rolled back; most of a run would otherwise be spent in asking.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import aiosqlite.core
import pytest

from nahtlos.runtime.store import blueprints, campaigns, intent, inventories, operations

WRITES = re.compile(r"(?:insert(?: or \w+)? into|replace into|update|delete from)\s+(\w+)", re.IGNORECASE)
READS = re.compile(r"(?:from|join)\s+(\w+)", re.IGNORECASE)
LOOKS = (
    (intent, ("hosts", "servers", "volumes", "networks", "uplinks", "promised", "setting_of", "releases")),
    (inventories, ("all_of", "received")),
    (campaigns, ("current",)),
    (blueprints, ("target", "host_configs")),
    (operations, ("refusals", "begun_at", "ended")),
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

    def saw(self, function: Callable[[], Any]) -> None:
        if not isinstance(function, partial):
            self.torn += 1
            return
        sql = next((a for a in function.args if isinstance(a, str)), None)
        if sql is None:
            self._ended(function.func.__name__)
        elif self.reading is not None and sql.lstrip()[:6].upper() == "SELECT":
            self.reading.update(READS.findall(sql))
        elif written := WRITES.match(sql.lstrip()):
            self.written[written.group(1)] += 1
            self._uncommitted = True

    def _ended(self, how: str) -> None:
        if how == "rollback" and self._uncommitted:
            self.torn += 1
        if how in ("commit", "rollback"):
            self._uncommitted = False

    def state_of(self, tables: frozenset[str]) -> tuple[int, ...]:
        return (self.torn, *(self.written[t] for t in sorted(tables)))


class _AtOnce:
    """Stands for the queue to the database's thread: what is put in is done before `put_nowait` returns."""

    tables = _Tables()

    def put_nowait(self, item: tuple[asyncio.Future[Any] | None, Callable[[], Any]]) -> None:
        future, function = item
        self.tables.saw(function)
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
def database_in_the_loop() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        _AtOnce.tables = _Tables()
        patch.setattr(aiosqlite.core, "SimpleQueue", _AtOnce)
        patch.setattr(aiosqlite.core, "Thread", _NoThread)
        for module, names in LOOKS:
            for name in names:
                patch.setattr(module, name, _remembering(getattr(module, name), _AtOnce.tables))
        yield
