"""What was read is known until a table it came from changes.

The planning loop and those who look read some twenty tables many times a second, of which one or two have
changed: without this half of the orchestrator's time went into reading again what it knew. Which tables
a query reads and a statement changes is taken from the statements themselves, so nothing can be forgotten to
be declared. What another process has written is noticed by SQLite's counter of foreign commits, at the
beginning of each transaction; a transaction that is undone makes everything unknown.

    @remembered
    async def servers(tx): ...

Not for a function that looks at anything but its arguments and tables (such as a clock), nor for one whose
callers change what it returns.
"""

from collections.abc import Awaitable, Callable, Hashable
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from sqlalchemy import Column, SelectBase, Table, event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import visitors

P = ParamSpec("P")
T = TypeVar("T")
Key = tuple[Hashable, ...]

_NAME: Final = "nahtlos.remembered"
MOST_ANSWERS = 256
"""Beyond that all are forgotten: a bound, not a working set; there are some forty."""


class Memory:
    """Answers of one connection, and how often each table was changed through it."""

    def __init__(self) -> None:
        self._changes: dict[str, int] = {}
        self._answers: dict[Key, tuple[Any, dict[str, int]]] = {}
        self._tables: dict[str, frozenset[str]] = {}
        """By the text of a query."""
        self._noting: list[set[str]] = []
        """Of the functions that are reading now, each inside the one before: the tables they have read."""
        self._foreign: int | None = None

    async def answer(self, key: Key, read: Callable[[], Awaitable[T]]) -> T:
        """What is known, or what `read` reads."""
        known = self._answers.get(key)
        if known is not None and all(self._changes.get(t, 0) == n for t, n in known[1].items()):
            self._note(known[1].keys())
            return known[0]
        noted: set[str] = set()
        self._noting.append(noted)
        try:
            value = await read()
        finally:
            self._noting.pop()
        if len(self._answers) >= MOST_ANSWERS:
            self._answers.clear()
        self._answers[key] = (value, {table: self._changes.get(table, 0) for table in noted})
        self._note(noted)
        return value

    def forget(self) -> None:
        self._answers.clear()

    def begun(self, foreign: int) -> None:
        """A transaction begins; `foreign` counts what other connections have committed."""
        if foreign != self._foreign:
            self._foreign = foreign
            self.forget()

    def executed(self, text: str, context: Any) -> None:
        statement: Any = context.compiled and context.compiled.statement
        if context.isinsert or context.isupdate or context.isdelete:
            name = statement.table.name
            self._changes[name] = self._changes.get(name, 0) + 1
        elif isinstance(statement, SelectBase):
            if text not in self._tables:
                self._tables[text] = tables_of(statement)
            self._note(self._tables[text])
        elif not text.startswith(("BEGIN", "PRAGMA")):
            self.forget()  # written by hand: it may change anything

    def _note(self, tables: Any) -> None:
        if self._noting:
            self._noting[-1].update(tables)


def tables_of(statement: Any) -> frozenset[str]:
    """The names of all tables a query reads, also within it."""
    found: set[str] = set()
    for part in visitors.iterate(statement):
        if isinstance(part, Table):
            found.add(part.name)
        elif isinstance(part, Column):
            found.add(part.table.name)
    return frozenset(found)


def remembered(
    read: Callable[Concatenate[AsyncConnection, P], Awaitable[T]],
) -> Callable[Concatenate[AsyncConnection, P], Awaitable[T]]:
    """Decorates a function that reads; its arguments must be hashable."""

    @wraps(read)
    async def known(tx: AsyncConnection, *args: P.args, **kwargs: P.kwargs) -> T:
        memory: Memory = tx.info[_NAME]
        key = (read, *args, *kwargs.items())
        return await memory.answer(key, lambda: read(tx, *args, **kwargs))

    return known


def attend(engine: Engine, foreign_commits: Callable[[], int]) -> None:
    """Give `engine`, which has one connection, a memory. `foreign_commits` is asked when a transaction has
    begun."""
    memory = Memory()

    def on_connect(_connection: Any, record: Any) -> None:
        memory.forget()
        record.info[_NAME] = memory

    def on_begin(_connection: Connection) -> None:
        memory.begun(foreign_commits())

    def on_rollback(_connection: Connection) -> None:
        memory.forget()

    def on_execute(_c: Connection, _cursor: Any, text: str, _p: Any, context: Any, _many: bool) -> None:
        memory.executed(text, context)

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    event.listen(engine, "rollback", on_rollback)
    event.listen(engine, "before_cursor_execute", on_execute)
