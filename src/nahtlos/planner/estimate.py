"""What carrying a server over would cost: blackout, brownout and total time for each way. Pure.

A model of what agents do, with constants measured by the project's benchmarks (emulation, two cores), put
right by the median of measured over predicted: per way and pair of releases where there are enough samples,
else per way. It predicts; what follows from it is decided in `ways`.
"""

from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from nahtlos.model.blackout import (
    COPY_PAUSE_MS,
    HANDOVER_SECONDS,
    POST_COPY_PAUSE_MS,
    first_pages_ms,
    seconds_to_send,
    wake_ms,
)
from nahtlos.model.ids import ReleaseId, ServerId
from nahtlos.model.prediction import Calibration, Estimate, Experience, Means, Sample, Workload

MIB = 1 << 20
DEFAULT_LINK = 714 * MIB
"""Bytes a second of one stream between two hosts of one machine: 1.57 s for 1 GiB, 0.49 s for 256 MiB."""
ASSUMED_DIRTY_RATE = 20 * MIB
"""Of a server nobody has measured yet."""
PLACE_PAUSE_MS = 18.0
"""In place: from the stop to the run, whatever the size."""
DEVICE_MS = 0.5
"""For each device beyond the usual port and disk."""
USUAL_DEVICES = 2
SPREAD = 1.6
"""The slowest of a hundred over the median."""
PARALLEL_FACTOR = 1.6
"""Beside other moves, of which one at a time is switched: `make bench-evacuation`, the median gap of eight in
parallel over that of one after another on two cores. Their slowest is no further from it."""
START_SECONDS = 0.5
"""Until memory begins to flow: the destination's process starts, and opens the disks."""
END_SECONDS = 0.5
"""From the run on: its host is told of last, the old process ends. Least of 48 moves: 0.44."""
PLACE_END_SECONDS = 0.35
"""The old process is kept for a moment."""

# As the source's agent watches a pre-copy; a test holds them to what it does.
SHORTEST_PASS_SECONDS = 0.05
NEAR_BYTES = 4 << 20
SETTLE_SECONDS = 8.0
FORCED_PAUSE_SECONDS = 0.3
PATIENCE_SECONDS = 5.0
DEADLINE_SECONDS = 120.0
THROTTLE_STEP, THROTTLE_MOST = 0.2, 0.8
THROTTLE_EVERY_SECONDS = 2.0
"""A hypervisor looks that often whether a slower guest is slow enough."""
STEADY = 0.01
"""Passes that differ by less repeat themselves."""

ENOUGH_SAMPLES = 3
NEWEST_SAMPLES = 50
NEWEST_OWN = 3
"""Of one server: what it does changes."""
NEWEST_WAKES = 10
"""How busy hosts are decides how soon a guest answers, and changes sooner than what they are."""
RATIO_BOUNDS = (0.2, 5.0)
"""A median outside of them says that something else was measured."""

PRE_COPIES = (Means.PRE_COPY, Means.SLOWED)
ORDER = (Means.IN_PLACE, Means.PRE_COPY, Means.SLOWED, Means.POST_COPY)


class _Copy:
    """How a pre-copy goes, pass by pass, until little is left, or what is left becomes no less. `pause`: the
    seconds that sending the rest may take; None: no budget says so."""

    def __init__(
        self, memory: int, dirty_rate: int, link: int, *, slowed: bool, pause: float | None = None
    ) -> None:
        self.seconds, self.left, self.converges = 0.0, float(memory), False
        throttle, least = 0.0, 0.0
        near = NEAR_BYTES if pause is None else min(NEAR_BYTES, pause * link)
        affordable = (FORCED_PAUSE_SECONDS if pause is None else pause) * link
        self.affordable = affordable
        """Bytes; with more than that left nothing is switched, so no blackout is longer for it."""
        while self.seconds <= DEADLINE_SECONDS:
            took = max(self.left / link, SHORTEST_PASS_SECONDS)
            before, self.left = self.left, min(dirty_rate * (1 - throttle) * took, memory)
            self.seconds += took
            if self.left <= near or (self.left <= affordable and self.seconds > SETTLE_SECONDS):
                self.converges = True
                return
            if abs(before - self.left) <= STEADY * before and (not slowed or throttle >= THROTTLE_MOST):
                self.converges = self.left <= affordable
                self.seconds = max(self.seconds, least + PATIENCE_SECONDS)
                return
            if slowed and self.seconds > PATIENCE_SECONDS and self.seconds >= least + THROTTLE_EVERY_SECONDS:
                least = self.seconds
                throttle = min(throttle + THROTTLE_STEP, THROTTLE_MOST)


def estimate(
    means: Means,
    work: Workload,
    experience: Experience,
    *,
    accelerator: str = "tcg",
    parallel: int = 1,
    releases: tuple[ReleaseId | None, ReleaseId | None] = (None, None),
) -> Estimate:
    """Put right by what was measured so far."""
    raw = model(
        means,
        work,
        link=experience.link,
        wake=experience.wake_ms,
        accelerator=accelerator,
        parallel=parallel,
    )
    right = calibration_for(experience, means, releases)
    if right is None:
        return raw
    wake = raw.blackout_ms - raw.pause_ms
    spread = raw.blackout_ms_max / raw.blackout_ms
    pause = raw.pause_ms * right.pause
    return msgspec.structs.replace(
        raw,
        pause_ms=pause,
        blackout_ms=pause + wake,
        blackout_ms_max=(pause + wake) * spread,
        **_times(raw, right, experience.brownouts.get(work.server)),
    )


def _times(raw: Estimate, right: Calibration, own: float | None) -> dict[str, float]:
    """What a move takes beside the copying does not grow with it. `own`: how the model was off with this
    server's pre-copies before."""
    if right.fixed_seconds is None:
        return {
            "brownout_seconds": raw.brownout_seconds * right.seconds,
            "seconds": raw.seconds * right.seconds,
        }
    ratio = own if own is not None and raw.means in PRE_COPIES else right.brownout
    brownout = raw.brownout_seconds * ratio
    return {
        "brownout_seconds": brownout,
        "seconds": right.fixed_seconds + brownout + raw.pause_ms * right.pause / 1000,
    }


def model(
    means: Means,
    work: Workload,
    *,
    link: int = 0,
    wake: float | None = None,
    accelerator: str = "tcg",
    parallel: int = 1,
) -> Estimate:
    """As the benchmarks say, without what this cloud has measured but for `link`, and `wake`: what a process
    that was never used takes to answer, in milliseconds."""
    memory, link = work.memory_mib * MIB, link or DEFAULT_LINK
    dirty = work.dirty_rate if work.dirty_rate is not None else ASSUMED_DIRTY_RATE
    devices = max(work.devices - USUAL_DEVICES, 0) * DEVICE_MS
    wake = wake_ms(accelerator) if wake is None else wake
    converges, brownout, end = True, 0.0, END_SECONDS
    match means:
        case Means.IN_PLACE:
            pause, end = PLACE_PAUSE_MS, PLACE_END_SECONDS
        case Means.POST_COPY:
            # All of it once, and then, while the server runs already, what was touched meanwhile.
            pause, brownout = POST_COPY_PAUSE_MS, memory / link
            wake += first_pages_ms(link)
            brownout += min(dirty * brownout, memory) / link
        case Means.PRE_COPY | Means.SLOWED:
            left = seconds_to_send(work.blackout_budget_ms, accelerator)
            copy = _Copy(memory, dirty, link, slowed=means is Means.SLOWED, pause=left)
            converges, brownout = copy.converges, copy.seconds
            touched = min(min(copy.left, copy.affordable) + dirty * HANDOVER_SECONDS, memory)
            pause = COPY_PAUSE_MS + touched / link * 1000
    pause += devices
    crowded = parallel > 1 and means is not Means.IN_PLACE
    factor = PARALLEL_FACTOR if crowded else 1.0
    pause, wake = pause * factor, wake * factor
    return Estimate(
        means=means,
        blackout_ms=pause + wake,
        blackout_ms_max=(pause + wake) * SPREAD,
        pause_ms=pause,
        brownout_seconds=brownout,
        seconds=START_SECONDS + brownout + pause / 1000 + end,
        converges=converges,
    )


def slowest(accelerators: Iterable[str]) -> str:
    """What to reckon with for all of them: emulation if any has it, or nothing is known."""
    names = set(accelerators)
    return "tcg" if not names or "tcg" in names else min(names)


Said = tuple[Sample, Estimate]
"""One that was measured, and what would be said of it without what was learned, but for the link."""

# --- what was measured ---------------------------------------------------------------------------------


def learn(samples: Sequence[Sample], accelerator: str = "tcg", parallel: int = 1) -> Experience:
    """From what was carried over before, newest first, as many at once as now."""
    recent = samples[:NEWEST_SAMPLES]
    links = [s.link for s in recent if s.link > 0]
    link = int(median(links)) if len(links) >= ENOUGH_SAMPLES else 0
    said = [
        (s, model(s.means, work_of(s), link=link, accelerator=accelerator, parallel=parallel)) for s in recent
    ]
    alike = (s.wake_ms for s in recent if s.means is not Means.POST_COPY)  # which waits for pages, too
    wakes = [wake for wake in alike if wake is not None][:NEWEST_WAKES]
    rates = {s.server: s.dirty_rate for s in reversed(samples) if s.server and s.dirty_rate is not None}
    return Experience(
        dirty_rates=rates,
        link=link,
        wake_ms=_wake(wakes, accelerator) if len(wakes) >= ENOUGH_SAMPLES else None,
        calibrations=tuple(_calibrations(said)),
        brownouts=_brownouts(said),
    )


def _brownouts(said: Sequence[Said]) -> dict[ServerId, float]:
    """By how much the model was off with each server's pre-copies."""
    ratios: dict[ServerId, list[float]] = {}
    for sample, raw in said:
        if sample.means in PRE_COPIES and sample.brownout_seconds is not None and sample.server:
            ratios.setdefault(sample.server, []).append(sample.brownout_seconds / raw.brownout_seconds)
    return {server: _ratio(of_one[:NEWEST_OWN]) for server, of_one in ratios.items()}


def _calibrations(said: Sequence[Said]) -> Iterable[Calibration]:
    groups: dict[tuple[Means, ReleaseId | None, ReleaseId | None], list[Said]] = {}
    for one in said:
        sample = one[0]
        groups.setdefault((sample.means, None, None), []).append(one)
        if sample.from_release is not None and sample.to_release is not None:
            groups.setdefault((sample.means, sample.from_release, sample.to_release), []).append(one)
    for (means, old, new), found in groups.items():
        if len(found) >= ENOUGH_SAMPLES:
            brownout, fixed = _parts(found)
            yield Calibration(
                means=means,
                from_release=old,
                to_release=new,
                pause=_ratio([s.pause_ms / raw.pause_ms for s, raw in found]),
                seconds=_ratio([s.seconds / raw.seconds for s, raw in found]),
                samples=len(found),
                brownout=brownout,
                fixed_seconds=fixed,
            )


def _parts(said: Sequence[Said]) -> tuple[float, float | None]:
    """How far the copying was off, and the rest of the time in seconds, if enough of them tell."""
    known = [(s, r, s.brownout_seconds) for s, r in said if s.brownout_seconds is not None]
    if len(known) < ENOUGH_SAMPLES:
        return 1.0, None
    copied = [brownout / r.brownout_seconds for _, r, brownout in known if r.brownout_seconds > 0]
    rest = [s.seconds - brownout - s.pause_ms / 1000 for s, _, brownout in known]
    return _ratio(copied) if copied else 1.0, max(median(rest), 0.0)


def _wake(wakes: Sequence[float], accelerator: str) -> float:
    usual = wake_ms(accelerator)
    return usual * _ratio([wake / usual for wake in wakes])


def _ratio(ratios: Sequence[float]) -> float:
    least, most = RATIO_BOUNDS
    return min(max(median(ratios), least), most)


def work_of(sample: Sample) -> Workload:
    return Workload(
        memory_mib=sample.memory_mib,
        dirty_rate=sample.dirty_rate,
        devices=sample.devices,
        blackout_budget_ms=sample.blackout_budget_ms,
        server=sample.server,
    )


def calibration_for(
    experience: Experience, means: Means, releases: tuple[ReleaseId | None, ReleaseId | None]
) -> Calibration | None:
    """Of this pair of releases; else of the way."""
    of_way = [c for c in experience.calibrations if c.means is means]
    same = (c for c in of_way if c.from_release is not None and (c.from_release, c.to_release) == releases)
    return next(same, next((c for c in of_way if c.from_release is None), None))


def error_p90(samples: Sequence[Sample], experience: Experience, accelerator: str = "tcg") -> float | None:
    """The share of the measured blackout by which nine in ten predictions were off at most. What is compared
    is the pause plus what a cold process took; where nobody listened that is the same on both sides. None of
    nothing."""
    errors: list[float] = []
    for sample in samples[:NEWEST_SAMPLES]:
        releases = (sample.from_release, sample.to_release)
        said = estimate(
            sample.means,
            work_of(sample),
            experience,
            accelerator=accelerator,
            parallel=experience.parallel or 1,
            releases=releases,
        )
        wake = said.blackout_ms - said.pause_ms if sample.wake_ms is None else sample.wake_ms
        actual = sample.pause_ms + wake
        errors.append(abs(said.blackout_ms - actual) / actual)
    if not errors:
        return None
    return sorted(errors)[max(0, -(-9 * len(errors) // 10) - 1)]
