"""How fast a guest touches its memory, as QEMU samples it. Decides nothing."""

import asyncio
import time

from nahtlos.model.errors import Unavailable
from nahtlos.physical.hypervisor.migration import Monitor
from nahtlos.physical.hypervisor.qmp import Arguments, Denied

MOMENT_MS = 200
"""A guest writes the same pages again and again: over a longer time fewer are told than a pass of a move has
to send."""
SAMPLED: Arguments = {"sample-pages": 2048}
"""Per GiB: 8 MiB of it are read twice."""
FINE: Arguments = {"calc-time": MOMENT_MS, "calc-time-unit": "millisecond", **SAMPLED}
COARSE: Arguments = {"calc-time": 1, **SAMPLED}
"""Before 8.2."""
MEASURED_WITHIN = 10.0
LOOK_AGAIN = 0.05


async def dirty_rate(monitor: Monitor) -> int | None:
    """Bytes a second."""
    try:
        await monitor.execute("calc-dirty-rate", FINE)
    except Denied:
        try:
            await monitor.execute("calc-dirty-rate", COARSE)
        except Denied:
            return None
    until = time.monotonic() + MEASURED_WITHIN
    while True:
        await asyncio.sleep(LOOK_AGAIN)
        answer = await monitor.execute("query-dirty-rate")
        if answer.get("status") == "measured":
            rate = answer.get("dirty-rate")
            return rate << 20 if isinstance(rate, int) and rate >= 0 else None
        if time.monotonic() > until:
            raise Unavailable(f"the dirty rate was not measured within {MEASURED_WITHIN:g} s")
