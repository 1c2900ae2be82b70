"""From times of arrival to gaps: how long a client heard nothing, and during which move.

Pure. All times are wall-clock seconds. What QEMU says of its own downtime has no place here: a gap is a
silence between two datagrams that a client received one after the other.
"""

import bisect
import math
from collections.abc import Sequence

from nahtlos.model.values import Value

BEFORE_SWITCH_SECONDS = 0.5
AFTER_END_SECONDS = 1.0


class Window(Value, frozen=True, kw_only=True):
    """When a move could be felt."""

    begin: float
    end: float


class Silence(Value, frozen=True, kw_only=True):
    begin: float
    end: float

    @property
    def milliseconds(self) -> float:
        return (self.end - self.begin) * 1e3


def move_window(times: dict[str, float]) -> Window | None:
    """From half a second before the switch until a second after the end. Steps may be missing: the switch
    is then anything from the beginning of the move, the end the last thing known. None without times."""
    if not times:
        return None
    last = max(times.values())
    switch = _first_of(times, ("switch", "stopped", "precopy", "prepare", "begin"), min(times.values()))
    end = _first_of(times, ("done", "committed"), last)
    return Window(begin=switch - BEFORE_SWITCH_SECONDS, end=max(end, switch) + AFTER_END_SECONDS)


def _first_of(times: dict[str, float], steps: tuple[str, ...], otherwise: float) -> float:
    return next((times[step] for step in steps if step in times), otherwise)


def longest_silence(arrivals: Sequence[float], window: Window | None = None) -> Silence | None:
    """The longest silence between two consecutive arrivals (rising), of those that overlap `window`.
    None if no two arrivals enclose any part of it: there is no evidence then, which is not a gap of 0."""
    first, last = 1, len(arrivals) - 1
    if window is not None:
        first = max(1, bisect.bisect_right(arrivals, window.begin))
        last = min(last, bisect.bisect_left(arrivals, window.end))
    if first > last:
        return None
    at = max(range(first, last + 1), key=lambda i: arrivals[i] - arrivals[i - 1])
    return Silence(begin=arrivals[at - 1], end=arrivals[at])


def arrivals_around(arrivals: Sequence[float], at: float, *, before: float, after: float) -> list[float]:
    """Arrivals from `before` seconds before `at` to `after` seconds after it, as milliseconds from `at`."""
    first = bisect.bisect_left(arrivals, at - before)
    last = bisect.bisect_right(arrivals, at + after)
    return [(t - at) * 1e3 for t in arrivals[first:last]]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that is not exceeded by `share` of them (nearest rank): a value that was
    measured, never one in between. None of nothing."""
    if not values:
        return None
    rank = max(1, math.ceil(share * len(values)))
    return sorted(values)[rank - 1]
