"""Clients that came while a storage daemon drained: found, and disconnected.

QEMU quiets the clients an export has before it drains. One whose negotiation ends after that is not quieted
and always has a request pending, so that the drain never ends: the daemon answers nobody any more and spins
(QEMU 10.0 and 11.1; see docs/decisions/0029). It goes on at once when that client is disconnected, which
comes back by itself.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.physical.hypervisor.qmp import Answer
from nahtlos.physical.storage.sockets import cut_accepted, socket_inodes

PATIENCE_SECONDS = 0.5
"""For an answer, before it is looked at what the daemon does instead."""
AT_LEAST_SECONDS = 0.05
AGAIN_SECONDS = 0.25
NEW_FOR_SECONDS = 5.0
"""A client seen for longer has negotiated long since. Hosts are that slow at times."""
DOUBTFUL_AFTER_SECONDS = 3.0
"""Without an answer for so long, those count too of which it is not known for how long they are there."""
LOOK_AGAIN_SECONDS = 0.2
"""At who is connected."""
LOOKS = 5
LOOK_EVERY = 0.005
"""At what the daemon does, before it is said to spin."""

_log = logging.getLogger(__name__)


class Thread(msgspec.Struct, frozen=True):
    main: bool
    state: str
    """R, S, D, … as in proc(5)."""


Look = tuple[Thread, ...]


def spins(looks: Sequence[Look]) -> bool:
    """Its main thread never rests, and nobody else does anything it could wait for."""
    return bool(looks) and all(
        any(each.main for each in look) and all(each.state == ("R" if each.main else "S") for each in look)
        for look in looks
    )


class Newcomers:
    """Since when the connections of one process have been there, by the inodes of their sockets."""

    def __init__(self) -> None:
        self._since: dict[int, float] | None = None

    def seen(self, inodes: Collection[int], now: float) -> None:
        """All there are. Of those that the first look finds it is not known."""
        known = self._since
        self._since = {each: 0.0 if known is None else known.get(each, now) for each in inodes}

    def among(self, inodes: Collection[int], now: float, silent: float) -> frozenset[int]:
        """Those that may have come while the process drained, which has been silent for so long."""
        known = self._since or {}
        new = frozenset(each for each in inodes if now - known.get(each, now) < NEW_FOR_SECONDS)
        doubtful = silent >= DOUBTFUL_AFTER_SECONDS
        return new | frozenset(each for each in inodes if doubtful and known.get(each) == 0.0)


class Doorkeeper:
    """Of one process of a daemon."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._newcomers = Newcomers()
        self._looked_at = 0.0
        self._silent_since: float | None = None

    async def attended(self, answer: Coroutine[object, object, Answer]) -> Answer:
        """What the daemon answers, although clients came in between."""
        now = time.monotonic()
        self._look(now)
        task, patience = asyncio.ensure_future(answer), PATIENCE_SECONDS - self._silent(now)
        try:
            while not (await asyncio.wait({task}, timeout=max(patience, AT_LEAST_SECONDS)))[0]:
                await self._disconnect_if_stuck(self._silent(time.monotonic()))
                patience = AGAIN_SECONDS
        finally:
            task.cancel()  # of no consequence once it has answered
        if not isinstance(task.exception(), Unavailable):
            self._silent_since = None
        return task.result()

    def _silent(self, now: float) -> float:
        """For how long somebody has waited, who may have asked anew in between."""
        self._silent_since = now if self._silent_since is None else self._silent_since
        return now - self._silent_since

    def _look(self, now: float) -> None:
        if now - self._looked_at >= LOOK_AGAIN_SECONDS:
            self._looked_at = now
            self._newcomers.seen(socket_inodes(self._pid), now)

    async def _disconnect_if_stuck(self, silent: float) -> None:
        looks: list[Look] = []
        for _ in range(LOOKS):
            looks.append(threads(self._pid))
            await asyncio.sleep(LOOK_EVERY)
        if not spins(looks):
            return
        new = self._newcomers.among(socket_inodes(self._pid), time.monotonic(), silent)
        count = cut_accepted(self._pid, new)
        if count:
            _log.warning(
                "storage daemon %d spun for %.1f s: %d new clients disconnected", self._pid, silent, count
            )


def threads(pid: int) -> Look:
    """All of it now; those that have just ended left out."""
    found: list[Thread] = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                found.append(Thread(main=path.name == str(pid), state=state))
    return tuple(found)
