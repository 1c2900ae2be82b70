"""What was predicted of moves and replacements as each began, beside what came of it. Pure.

A prediction's error is its share of what was measured: +0.20 said a fifth too much. Blackouts are compared
with the client's gap, which nothing of the system measured. Where no client watched, what agents measured is
taken: the pause, and the time until the guest was heard again. Of a guest that says too little to be heard
the predicted time a cold process takes stands on both sides, as recalibration has it.

`now` in a summary: what the same predictions would have said with what these operations have taught, that is
with the pause put right by the median of measured over predicted of their way and releases, and with the
median of the times cold processes took.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from nahtlos.model.blackout import woke_ms
from nahtlos.model.blueprint import OperationRecord
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.model.prediction import Means
from nahtlos.model.values import Value
from nahtlos.planner.estimate import ENOUGH_SAMPLES, RATIO_BOUNDS
from nahtlos.runtime.evidence.gaps import percentile

KINDS = (OperationKind.MOVE, OperationKind.REPLACE)


class Foretold(Value, frozen=True, kw_only=True):
    """One operation that ended well."""

    id: str
    server: str
    way: str
    begin: float
    """Wall-clock seconds: when the prediction was made."""
    predicted_blackout_ms: float
    predicted_pause_ms: float
    predicted_brownout_seconds: float
    predicted_seconds: float
    pause_ms: float | None
    """From the stop to the run, by the hosts' clocks."""
    wake_ms: float | None = None
    """From the run until its guest was heard by its host, and what hosts do not see of it."""
    brownout_seconds: float | None
    seconds: float
    gap_ms: float | None
    """The client's; None if nobody watched."""
    error: float | None
    """Of the blackout."""
    seconds_error: float
    releases: tuple[str, str]


class WayFigures(Value, frozen=True, kw_only=True):
    """All operations of one way."""

    way: str
    operations: int
    predicted_ms_p50: float
    measured_ms_p50: float | None
    """The blackout: the client's gaps, or what stands for them."""
    error_p90: float | None
    """Nine in ten predictions were off by no more than this share."""
    error_p90_now: float | None
    """The same with what was learned here; None if there was too little to learn from."""
    seconds_error_p90: float | None


class Predictions(Value, frozen=True, kw_only=True):
    operations: tuple[Foretold, ...] = ()
    """By the time they began."""
    ways: tuple[WayFigures, ...] = ()
    error_p90: float | None = None
    error_p90_now: float | None = None
    seconds_error_p90: float | None = None


def predictions(operations: Iterable[OperationRecord], gaps: Mapping[str, float]) -> Predictions:
    """`gaps`: the client's, in milliseconds, by operation."""
    found: list[Foretold] = []
    for operation in operations:
        one = _foretold(operation, gaps.get(operation.id))
        if one is not None:
            found.append(one)
    found.sort(key=lambda one: (one.begin, one.id))
    now = _put_right(found)
    ways = sorted({f.way for f in found})
    return Predictions(
        operations=tuple(found),
        ways=tuple(_way(way, [f for f in found if f.way == way], now) for way in ways),
        error_p90=_p90(f.error for f in found),
        error_p90_now=_p90(now.values()),
        seconds_error_p90=_p90(f.seconds_error for f in found),
    )


def _foretold(record: OperationRecord, gap_ms: float | None) -> Foretold | None:
    said, times = record.predicted, record.times
    if said is None or not times or record.kind not in KINDS or record.state != OperationState.DONE:
        return None
    stopped, running = times.get("stopped"), times.get("running")
    pause = (running - stopped) * 1000 if stopped is not None and running is not None else None
    seconds = max(times.values()) - min(times.values())
    sending, switch = times.get("precopy"), times.get("switch")
    wake = woke_ms(times)
    usual = said.blackout_ms - said.pause_ms
    measured = gap_ms if gap_ms is not None else _felt(pause, usual if wake is None else wake)
    return Foretold(
        id=record.id,
        server=record.subject,
        way=said.means.value,
        begin=min(times.values()),
        predicted_blackout_ms=round(said.blackout_ms, 3),
        predicted_pause_ms=round(said.pause_ms, 3),
        predicted_brownout_seconds=round(said.brownout_seconds, 3),
        predicted_seconds=round(said.seconds, 3),
        pause_ms=round(pause, 3) if pause is not None else None,
        wake_ms=round(wake, 3) if wake is not None else None,
        brownout_seconds=round(switch - sending, 3) if sending is not None and switch is not None else None,
        seconds=round(seconds, 3),
        gap_ms=round(gap_ms, 3) if gap_ms is not None else None,
        error=_error(said.blackout_ms, measured),
        seconds_error=_error(said.seconds, seconds) or 0.0,
        releases=(record.release_before or "", record.release_after or ""),
    )


def _felt(pause: float | None, wake: float) -> float | None:
    return pause + wake if pause is not None else None


def _error(said: float, measured: float | None) -> float | None:
    return round((said - measured) / measured, 4) if measured else None


def blackout_of(one: Foretold) -> float | None:
    """In milliseconds, as the prediction is judged by."""
    wake = one.predicted_blackout_ms - one.predicted_pause_ms if one.wake_ms is None else one.wake_ms
    return one.gap_ms if one.gap_ms is not None else _felt(one.pause_ms, wake)


# --- what was learned ----------------------------------------------------------------------------------


def _put_right(found: Sequence[Foretold]) -> dict[str, float]:
    """The error of each with the pause put right; nothing of a way with too few to learn from."""
    groups: dict[tuple[str, tuple[str, str]], list[Foretold]] = {}
    for one in found:
        groups.setdefault((one.way, one.releases), []).append(one)
    errors: dict[str, float] = {}
    wakes = [f.wake_ms for f in found if f.wake_ms is not None and f.way != Means.POST_COPY]
    for group in groups.values():
        ratios = [f.pause_ms / f.predicted_pause_ms for f in group if f.pause_ms and f.predicted_pause_ms]
        if len(ratios) >= ENOUGH_SAMPLES:
            ratio = min(max(median(ratios), RATIO_BOUNDS[0]), RATIO_BOUNDS[1])
            for one in group:
                wake = one.predicted_blackout_ms - one.predicted_pause_ms
                if len(wakes) >= ENOUGH_SAMPLES and one.way != Means.POST_COPY:
                    wake = median(wakes)
                error = _error(one.predicted_pause_ms * ratio + wake, blackout_of(one))
                if error is not None:
                    errors[one.id] = error
    return errors


def _way(way: str, found: Sequence[Foretold], now: Mapping[str, float]) -> WayFigures:
    felt = [b for f in found if (b := blackout_of(f)) is not None]
    return WayFigures(
        way=way,
        operations=len(found),
        predicted_ms_p50=round(median(f.predicted_blackout_ms for f in found), 3),
        measured_ms_p50=round(median(felt), 3) if felt else None,
        error_p90=_p90(f.error for f in found),
        error_p90_now=_p90(now.get(f.id) for f in found),
        seconds_error_p90=_p90(f.seconds_error for f in found),
    )


def _p90(errors: Iterable[float | None]) -> float | None:
    return percentile([abs(e) for e in errors if e is not None], 0.9)
