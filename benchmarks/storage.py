"""`make bench-storage`: what volumes cost a server, and what it notices while they are changed under it.

Every comparison is made by turns in one run. Each subject stands in a module of its own, which says what its
figures are made of; what all of them share is in `storage_site`.
"""

import argparse
import asyncio
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine

from benchmarks import (
    storage_groups,
    storage_io,
    storage_limits,
    storage_relocation,
    storage_stalls,
    storage_torture,
)
from benchmarks.figures import Figure, Figures, Goal

SUBJECTS: dict[str, Callable[..., Coroutine[object, object, None]]] = {
    "io": storage_io.measure,
    "limits": storage_limits.measure,
    "relocation": storage_relocation.measure,
    "stalls": storage_stalls.measure,
    "groups": storage_groups.measure,
    "torture": storage_torture.measure,
}


class Told(Figures):
    """Each said as it is found."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()

    def add(
        self,
        figure: str,
        value: float,
        unit: str,
        *,
        baseline: float | None = None,
        goal: Goal | None = None,
        samples: int = 1,
    ) -> Figure:
        added = super().add(figure, value, unit, baseline=baseline, goal=goal, samples=samples)
        beside = f", baseline {baseline:.4g}" if baseline is not None else ""
        missed = ", MISSED" if added.met is False else ""
        print(
            f"  {time.monotonic() - self._began:4.0f} s  {figure}: {value:.4g} {unit}{beside}{missed}",
            file=sys.stderr,
        )
        return added


def _ended(_signal: int, _frame: object) -> None:
    """What was started is ended on the way out."""
    sys.exit(143)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="more turns, many rounds of faults")
    parser.add_argument(
        "--only", choices=sorted(SUBJECTS), action="append", help="may be given several times"
    )
    parser.add_argument("--rounds", metavar="FIRST-LAST", help="of the torture: those of these seeds")
    arguments = parser.parse_args()
    subjects = dict(SUBJECTS)
    if arguments.rounds is not None:
        first, _, last = arguments.rounds.partition("-")
        rounds = range(int(first), int(last or first) + 1)
        subjects["torture"] = functools.partial(storage_torture.measure, rounds=rounds)
    if os.geteuid() != 0:
        print("needs root", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _ended)
    figures = Told()
    for name, measure in subjects.items():
        if arguments.only is None or name in arguments.only:
            print(f"measuring {name}", file=sys.stderr)
            asyncio.run(measure(figures, long=arguments.long))
    return figures.finish("storage", "volumes")


if __name__ == "__main__":
    sys.exit(main())
