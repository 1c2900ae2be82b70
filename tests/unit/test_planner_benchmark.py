"""The benchmark's writer, and that the planner's benchmark runs."""

from pathlib import Path

import msgspec
import pytest
from benchmarks.figures import Figures, Goal
from benchmarks.planner import measure


def test_figures_are_judged_and_written(tmp_path: Path) -> None:
    figures = Figures()
    figures.add("gap", 60.0, "ms", baseline=50.0, goal=Goal(at_most=1.1, of_ratio=True), samples=20)
    figures.add("floor", 1.0, "share", goal=Goal(at_least=1.0))
    figures.add("count", 3, "moves")
    assert not figures.all_met
    written = msgspec.json.decode(figures.write("x", tmp_path).read_bytes())
    assert [f["met"] for f in written["figures"]] == [False, True, None]
    assert written["figures"][0]["ratio"] == pytest.approx(1.2)
    assert written["figures"][0]["goal"] == "<= 1.1 x baseline"
    assert written["machine"]["cores"] >= 1
    assert figures.table("t").row_count == 3


def test_a_ratio_goal_without_a_baseline_is_missed() -> None:
    figures = Figures()
    figures.add("gap", 60.0, "ms", goal=Goal(at_most=1.1, of_ratio=True))
    assert not figures.all_met


def test_the_planner_is_measured() -> None:
    figures = Figures()
    measure(figures, 4, 20)
    assert figures.all_met
