"""How much of this machine's processors nobody uses."""

import asyncio
from pathlib import Path

STAT = Path("/proc/stat")
IDLE = (3, 4)
"""Of the counters of the first line, those of processors with nothing to do: idle, and waiting for a disk."""


async def spare(seconds: float) -> float:
    """The share of all processors that is free, over the next `seconds`."""
    before = counters(STAT.read_text())
    await asyncio.sleep(seconds)
    return free_share(before, counters(STAT.read_text()))


def counters(stat: str) -> tuple[int, ...]:
    """Of all processors together, as /proc/stat has them (proc(5)), guests' time not counted twice."""
    return tuple(int(word) for word in stat.splitlines()[0].split()[1:9])


def free_share(before: tuple[int, ...], after: tuple[int, ...]) -> float:
    passed = [late - early for early, late in zip(before, after, strict=True)]
    total = sum(passed)
    return sum(passed[i] for i in IDLE) / total if total > 0 else 0.0
