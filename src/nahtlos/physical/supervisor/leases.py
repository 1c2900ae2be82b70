"""Until when leased units may run: a deadline by the host's clock, kept where the next supervisor finds it.

Whoever arms it may freeze or die: it runs out all the same. The clock counts on while the host sleeps, so
that a host that was put to sleep does not wake up with a lease. Kills nothing itself.
"""

import asyncio
import time
from collections.abc import Callable

from nahtlos.physical.supervisor.journal import Lease

LOOK_SECONDS = 0.5
"""The event loop's own clock stands still while the host sleeps: the deadline is looked at that often."""


def boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseWatch:
    """`on_end` is called once for every deadline that passes, and at once for one that has passed."""

    def __init__(self, lease: Lease, on_end: Callable[[], None], clock: Callable[[], float]) -> None:
        self.lease = lease
        self._on_end = on_end
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None

    @property
    def held(self) -> bool:
        return self.lease.deadline is None or self._clock() < self.lease.deadline

    def arm(self, deadline: float | None) -> None:
        self.lease = Lease(deadline=deadline)
        self.look()

    def look(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.lease.deadline
        if deadline is None:
            return
        left = deadline - self._clock()
        if left <= 0:
            self._on_end()
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(min(left, LOOK_SECONDS), self.look)
