"""What `benchmarks.in_place` has found out, of one run or of several (slices of a long one), and its figures.

A run is kept in `build/bench/in_place/<MiB touched>.json`; one that is told to add goes on from there.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks.client_gaps import Series, merge
from benchmarks.figures import FOLDER, Figures, Goal
from nahtlos.runtime.evidence.gaps import percentile

KEPT = FOLDER / "in_place"
GAP_GOAL = Goal(at_most=80)
SIZE_GOAL = Goal(at_most=1.2, of_ratio=True)
MEMORY_GOAL = Goal(at_most=64)
NONE = Goal(at_most=0)
PREDICTION_GOAL = Goal(at_most=0.3)


@dataclass
class Result:
    """All that was found out about one size."""

    replaced: Series = field(default_factory=Series)
    floor: Series = field(default_factory=Series)
    copied: Series = field(default_factory=Series)
    pages: int = 0
    blocks: int = 0
    overhead_mib: list[float] = field(default_factory=list[float])
    samples: int = 0
    undone: int = 0
    """Replacements that went back and were tried again."""
    errors: list[float] = field(default_factory=list[float])
    """Of predicted blackouts, as shares of the client's gap, once there was something to learn from."""
    phases: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


def add(total: Result, part: Result) -> None:
    """A later slice of the same size."""
    merge(total.replaced, part.replaced)
    merge(total.floor, part.floor)
    merge(total.copied, part.copied)
    total.pages += part.pages
    total.blocks += part.blocks
    total.overhead_mib += part.overhead_mib
    total.samples += part.samples
    total.undone += part.undone
    total.errors += part.errors
    for name, values in part.phases.items():
        total.phases.setdefault(name, []).extend(values)


def keep(touched: int, result: Result, folder: Path = KEPT) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{touched}.tmp"
    unfinished.write_bytes(msgspec.json.encode(result))
    unfinished.replace(folder / f"{touched}.json")


def kept(folder: Path = KEPT) -> dict[int, Result]:
    """By size, as `keep` left them."""
    found = {int(path.stem): path.read_bytes() for path in folder.glob("*.json")}
    return {size: msgspec.json.decode(found[size], type=Result) for size in sorted(found)}


def say(touched: int, result: Result) -> None:
    replaced = result.replaced
    print(
        f"{touched} MB touched: in place {listed(replaced.gaps_ms)} ms, {replaced.lost} of {replaced.sent}"
        f" lost; floor {listed(result.floor.gaps_ms)} ms; local copy {listed(result.copied.gaps_ms)} ms;"
        f" memory {listed(result.overhead_mib)} MiB",
        flush=True,
    )


def listed(values: list[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)


def add_size(figures: Figures, touched: int, result: Result) -> None:
    hops, case = len(result.replaced.gaps_ms), f"in place, {touched} MB"
    figures.add(
        f"gap p50, {case}",
        result.replaced.p50,
        "ms",
        baseline=result.floor.p50 if result.floor.gaps_ms else None,
        goal=GAP_GOAL,
        samples=hops,
    )
    figures.add(f"longest gap, {case}", max(result.replaced.gaps_ms), "ms", samples=hops)
    if result.copied.gaps_ms:
        figures.add(
            f"gap p50, local copy, {touched} MB",
            result.copied.p50,
            "ms",
            baseline=result.replaced.p50,
            samples=len(result.copied.gaps_ms),
        )
    figures.add(
        f"lost, {case}",
        result.replaced.lost,
        "packets",
        baseline=result.copied.lost if result.copied.gaps_ms else None,
        goal=NONE,
        samples=result.replaced.sent,
    )
    if result.overhead_mib:
        figures.add(
            f"memory overhead, {case}",
            max(result.overhead_mib),
            "MiB",
            goal=MEMORY_GOAL,
            samples=result.samples,
        )
    if result.errors:
        figures.add(
            f"error of prediction p90, {case}",
            percentile(result.errors, 0.9) or 0.0,
            "of the gap",
            goal=PREDICTION_GOAL,
            samples=len(result.errors),
        )
    for name, values in result.phases.items():
        if values:
            figures.add(f"{name}, {case}", statistics.median(values), "ms", samples=len(values))


def add_totals(figures: Figures, results: dict[int, Result]) -> None:
    least, most = min(results), max(results)
    figures.add(
        f"gap p50, {most} MB against {least} MB",
        results[most].replaced.p50,
        "ms",
        baseline=results[least].replaced.p50,
        goal=SIZE_GOAL,
        samples=len(results[most].replaced.gaps_ms),
    )
    total = sum(len(result.replaced.gaps_ms) for result in results.values())
    doubled = sum(result.replaced.duplicated for result in results.values())
    pages = sum(result.pages for result in results.values())
    blocks = sum(result.blocks for result in results.values())
    figures.add("duplicated, in place", doubled, "packets", goal=NONE, samples=total)
    figures.add(
        "replacements that had to be tried again", sum(r.undone for r in results.values()), "", samples=total
    )
    figures.add("pages found right, in place", pages, "pages", goal=Goal(at_least=1), samples=total)
    figures.add("blocks found right, in place", blocks, "blocks", goal=Goal(at_least=1), samples=total)
