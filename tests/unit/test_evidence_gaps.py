"""Gaps: which silence belongs to a move, and what is no evidence at all."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nahtlos.runtime.evidence.gaps import Window, longest_silence, move_window, percentile


def every(milliseconds: float, begin: float, end: float) -> list[float]:
    step = milliseconds / 1e3
    return [begin + i * step for i in range(int((end - begin) / step))]


def test_the_gap_of_a_move_is_the_longest_silence_that_touches_its_window() -> None:
    arrivals = [*every(4, 0, 10), *every(4, 10.3, 20), *every(4, 20.05, 30)]
    window = move_window({"begin": 14.0, "switch": 20.0, "stopped": 20.01, "done": 20.4})
    silence = longest_silence(arrivals, window)
    assert silence is not None
    assert silence.milliseconds == pytest.approx(54, abs=4.5)
    overall = longest_silence(arrivals)
    assert overall is not None
    assert overall.milliseconds == pytest.approx(304, abs=4.5)


def test_a_silence_counts_whole_even_if_it_only_touches_the_window() -> None:
    silence = longest_silence([0.0, 1.0, 5.0, 5.1], Window(begin=4.9, end=4.95))
    assert silence is not None
    assert (silence.begin, silence.end) == (1.0, 5.0)


@pytest.mark.parametrize("arrivals", [[], [3.0], [1.0, 2.0], [7.0, 8.0]])
def test_without_arrivals_on_both_sides_there_is_no_evidence(arrivals: list[float]) -> None:
    assert longest_silence(arrivals, Window(begin=4.0, end=5.0)) is None


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"switch": 10.0, "committed": 10.2, "done": 11.0}, (9.5, 12.0)),
        ({"switch": 10.0, "committed": 10.2}, (9.5, 11.2)),
        ({"begin": 4.0, "stopped": 10.0}, (9.5, 11.0)),
        ({"begin": 4.0}, (3.5, 5.0)),
        ({"running": 4.0}, (3.5, 5.0)),
    ],
)
def test_windows_bear_missing_steps(times: dict[str, float], expected: tuple[float, float]) -> None:
    window = move_window(times)
    assert window is not None
    assert (window.begin, window.end) == expected


def test_no_times_no_window() -> None:
    assert move_window({}) is None


@given(st.lists(st.integers(0, 10_000), min_size=2, unique=True), st.integers(0, 9_000), st.integers(1, 500))
def test_the_longest_silence_is_what_a_plain_search_finds(times: list[int], begin: int, length: int) -> None:
    arrivals = [float(t) for t in sorted(times)]
    window = Window(begin=float(begin), end=float(begin + length))
    touching = [b - a for a, b in itertools.pairwise(arrivals) if b > window.begin and a < window.end]
    silence = longest_silence(arrivals, window)
    assert (silence.end - silence.begin if silence else None) == max(touching, default=None)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [50.0, 40.0, 90.0, 60.0]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.99) == 90.0
    assert percentile([], 0.5) is None
