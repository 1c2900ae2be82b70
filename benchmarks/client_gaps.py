"""What a client hears of one server: numbered datagrams at 1,000 a second, counted and timed.

The gap of a change is the longest silence the client heard around it. Owns the prober's process while it
measures; what is done to the server meanwhile is its caller's business.
"""

import asyncio
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nahtlos.lab.outside import Outside
from nahtlos.runtime.evidence.gaps import Window, longest_silence
from nahtlos.runtime.evidence.records import Arrivals, count, read_probe

PACKETS_PER_SECOND = 1000


@dataclass
class Series:
    """Moves of one guest under one load, or replacements of its VMM, as a client saw them."""

    gaps_ms: list[float] = field(default_factory=list[float])
    sent: int = 0
    lost: int = 0
    duplicated: int = 0

    @property
    def p50(self) -> float:
        return statistics.median(self.gaps_ms)


@dataclass(frozen=True)
class Side:
    """One way to move one guest."""

    name: str
    ip: str
    outside: Outside
    namespace: str
    move: Callable[[], Awaitable[None]]


def read_series(folder: Path, windows: list[Window]) -> Series:
    (arrivals,) = read_probe(folder).arrivals.values()
    return _series(folder.name, arrivals, windows)


def read_gaps(folder: Path, windows: Mapping[str, Window]) -> dict[str, Series]:
    """Of several servers, each of which was moved once."""
    every = read_probe(folder).arrivals
    return {name: _series(f"{folder.name}, {name}", every[name], [windows[name]]) for name in windows}


def _series(name: str, arrivals: Arrivals, windows: list[Window]) -> Series:
    counted = count(arrivals, complete=True)
    times = arrivals.sorted_times()
    series = Series(sent=counted.sent, lost=counted.lost, duplicated=counted.duplicated)
    for window in windows:
        silence = longest_silence(times, window)
        if silence is None:
            raise RuntimeError(f"{name}: nothing was received around a move")
        series.gaps_ms.append(silence.milliseconds)
    return series


@contextlib.asynccontextmanager
async def probing(side: Side, folder: Path) -> AsyncGenerator[None]:
    async with prober({side.name: side.ip}, side.namespace, folder, PACKETS_PER_SECOND):
        yield


@contextlib.asynccontextmanager
async def prober(
    addresses: Mapping[str, str], namespace: str, folder: Path, packets_per_second: int
) -> AsyncGenerator[None]:
    """`packets_per_second` of each of the servers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = {
        "servers": [{"name": name, "ip": ip} for name, ip in addresses.items()],
        "udp_pps": packets_per_second,
        "tcp_interval": 3600.0,
        "http_interval": 3600.0,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    process = subprocess.Popen(
        [
            *("nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-m", "nahtlos.lab.probe"),
            *("--plan", str(folder / "plan.json"), "--out", str(folder)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        await asyncio.sleep(2.0)
        yield
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)


def merge(total: Series, part: Series) -> None:
    total.gaps_ms.extend(part.gaps_ms)
    total.sent += part.sent
    total.lost += part.lost
    total.duplicated += part.duplicated
