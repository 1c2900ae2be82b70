"""What those who only look at the cloud are shown: one look, shared by all who ask at the same time.

A look reads some twenty tables and asks the planner what it waits for. People, consoles and probes ask many
times a second; the one database is needed for the lease and for decisions. So a look is shared for
FRESH_SECONDS, and taken anew as soon as hosts have news, or this process has changed what people want or
what is decided.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from nahtlos.model.blueprint import PlanReport
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import HostInventory, Inventory
from nahtlos.planner.plan import plan
from nahtlos.runtime.controllers import views
from nahtlos.runtime.controllers.state import State, read
from nahtlos.runtime.store.store import AsyncConnection, Store

FRESH_SECONDS = 0.15


class Reported(Protocol):
    @property
    def latest(self) -> Mapping[HostId, HostInventory]: ...

    @property
    def connected(self) -> frozenset[HostId]: ...

    changes: int

    def lacking(self, capability: str, hosts: Iterable[HostId]) -> tuple[HostId, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Look:
    """The state, and what the planner says of it now."""

    state: State
    inventory: Inventory
    report: PlanReport


class Looks:
    def __init__(self, store: Store, reported: Reported) -> None:
        self._store = store
        self._reported = reported
        self._taking = asyncio.Lock()
        self._changes = 0
        self._last: Look | None = None
        self._last_at = 0.0
        self._last_changes = -1

    async def now(self) -> Look:
        async with self._taking:
            if self._last is None or not self._is_fresh():
                changes = self._version()
                self._last = await self._take()
                self._last_at, self._last_changes = self._time(), changes
            return self._last

    @asynccontextmanager
    async def changing(self) -> AsyncGenerator[AsyncConnection]:
        """A transaction that writes what people want; looks taken before it are not shown any more."""
        try:
            async with self._store.writing() as tx:
                yield tx
        finally:
            self._changes += 1

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[AsyncConnection]:
        async with self._store.reading() as tx:
            yield tx

    async def state(self, tx: AsyncConnection) -> State:
        """As `tx` sees it."""
        return await read(tx, self._reported.latest)

    @property
    def connected(self) -> frozenset[HostId]:
        return self._reported.connected

    def lacking(self, capability: str, hosts: Iterable[HostId]) -> tuple[HostId, ...]:
        """Those of `hosts` whose agent is connected, of an older release, and does not have it."""
        return self._reported.lacking(capability, hosts)

    def wall(self) -> float:
        """The store's clock, seconds."""
        return self._store.clock()

    def _is_fresh(self) -> bool:
        return self._last_changes == self._version() and self._time() - self._last_at < FRESH_SECONDS

    def _version(self) -> int:
        return self._changes + self._store.decisions + self._reported.changes

    def _time(self) -> float:
        return asyncio.get_running_loop().time()

    async def _take(self) -> Look:
        async with self._store.reading() as tx:
            state = await self.state(tx)
        inventory = state.inventory(self._reported.connected)
        report = views.NOTHING
        if state.blueprint is not None:
            _next, report = plan(state.policy(), inventory, state.blueprint)
        return Look(state=state, inventory=inventory, report=report)
