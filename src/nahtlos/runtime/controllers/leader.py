"""Being the one orchestrator that acts.

    standby --lease acquired--> leading (epoch) --renewal fails, or comes too late--> standby

Leading ends by this process's own clock before it ends by the database's, so that a process which froze
notices when it wakes, before it does anything. What it sent meanwhile is refused by agents that have obeyed
a newer epoch, and what it writes by the store.
"""

import asyncio

from sqlalchemy.exc import SQLAlchemyError

from nahtlos.model.errors import Error, Stale
from nahtlos.runtime.store import leases
from nahtlos.runtime.store.store import Store

LEASE_SECONDS = 5.0
RENEW_SECONDS = 1.0
SAFETY_SECONDS = 0.5


class LeadershipLost(Exception):
    """Another leads, or may."""


class Leader:
    """`alone`: this process knows that no other one uses the database (it holds the lock on its folder), so
    a lease left behind by a killed one need not be waited for when it begins."""

    def __init__(self, store: Store, holder: str, *, alone: bool) -> None:
        self._store = store
        self._holder = holder
        self._take_over = alone
        self._epoch: int | None = None
        self._until = 0.0

    @property
    def epoch(self) -> int | None:
        """The epoch this process may act under right now."""
        if self._epoch is None or asyncio.get_running_loop().time() >= self._until:
            return None
        return self._epoch

    async def acquire(self) -> int:
        """Returns once this process leads."""
        while True:
            asked_at = asyncio.get_running_loop().time()
            async with self._store.writing() as tx:
                epoch = await leases.acquire(tx, self._holder, LEASE_SECONDS, take_over=self._take_over)
            if epoch is not None:
                self._take_over = False
                self._lead(epoch, asked_at)
                return epoch
            await asyncio.sleep(RENEW_SECONDS)

    async def hold(self) -> None:
        """Renews; raises LeadershipLost when that is over. Never returns."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            epoch = self.epoch
            if epoch is None:
                self._epoch = None
                raise LeadershipLost("the lease could not be renewed in time")
            asked_at = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(LEASE_SECONDS), self._store.writing() as tx:
                    await leases.renew(tx, epoch, LEASE_SECONDS)
            except Stale as error:
                self._epoch = None
                raise LeadershipLost(str(error)) from error
            except (Error, TimeoutError, OSError, SQLAlchemyError):
                continue
            self._lead(epoch, asked_at)

    async def resign(self) -> None:
        """Let the next one lead at once."""
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            async with self._store.writing() as tx:
                await leases.release(tx, epoch)

    def _lead(self, epoch: int, asked_at: float) -> None:
        self._epoch = epoch
        self._until = asked_at + LEASE_SECONDS - SAFETY_SECONDS
