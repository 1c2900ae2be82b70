"""Figures of a benchmark: collected, shown as a table, written to build/bench/<name>.json.

    {"machine": {…}, "figures": [{"figure", "value", "unit", "baseline", "ratio", "goal", "met", "samples"}]}

`ratio` is value / baseline, both measured in the same run. It measures nothing itself.
"""

import os
import platform
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

FOLDER = Path("build/bench")
LOG_WIDTH = 150
"""Columns of the table where it is not shown on a terminal."""


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A bound on a figure's value, or on its ratio to the baseline."""

    at_most: float | None = None
    at_least: float | None = None
    of_ratio: bool = False

    def met_by(self, value: float, ratio: float | None) -> bool:
        measured = ratio if self.of_ratio else value
        if measured is None:
            return False
        above = self.at_least is None or measured >= self.at_least
        return above and (self.at_most is None or measured <= self.at_most)

    def __str__(self) -> str:
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", self.at_least), ("<=", self.at_most))
            if bound is not None
        ]
        return " and ".join(bounds) + (" x baseline" if self.of_ratio else "")


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    figure: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None
    """None if there is no goal."""
    samples: int = 1
    """How many measurements `value` was made from."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    processor: str
    cores: int
    memory_mib: int
    kernel: str
    python: str
    load: float
    """One-minute load average when the benchmark was written: what else ran beside it."""


def this_machine() -> Machine:
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        kernel=platform.release(),
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    figures: tuple[Figure, ...]


class Figures:
    """The figures of one run of one benchmark."""

    def __init__(self) -> None:
        self._figures: list[Figure] = []

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
        """`goal` is judged against the ratio to `baseline` if it says so, else against the value."""
        ratio = value / baseline if baseline else None
        added = Figure(
            figure=figure,
            value=value,
            unit=unit,
            baseline=baseline,
            ratio=ratio,
            goal=str(goal) if goal else None,
            met=goal.met_by(value, ratio) if goal else None,
            samples=samples,
        )
        self._figures.append(added)
        return added

    @property
    def all_met(self) -> bool:
        return all(figure.met is not False for figure in self._figures)

    def table(self, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for column in ("figure", "value", "unit", "baseline", "ratio", "goal", "met", "samples"):
            table.add_column(
                column, justify="left" if column in ("figure", "unit", "goal", "met") else "right"
            )
        for figure in self._figures:
            table.add_row(
                figure.figure,
                _number(figure.value),
                figure.unit,
                _number(figure.baseline),
                _number(figure.ratio),
                figure.goal or "",
                {None: "", True: "yes", False: "[bold red]no[/]"}[figure.met],
                str(figure.samples),
            )
        return table

    def write(self, name: str, folder: Path = FOLDER) -> Path:
        """Whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        document = _Document(machine=this_machine(), figures=tuple(self._figures))
        unfinished = path.with_suffix(".tmp")
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
        unfinished.replace(path)
        return path

    def finish(self, name: str, title: str) -> int:
        """Show, write; the exit code: 1 if a goal was missed."""
        path = self.write(name)
        console = Console()
        if not console.is_terminal:
            console = Console(width=LOG_WIDTH)
        console.print(self.table(title))
        console.print(f"written to {path}", highlight=False)
        return 0 if self.all_met else 1


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
