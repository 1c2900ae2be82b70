"""The table of version pairs: what decides is one row, and it says why."""

from pathlib import Path

import pytest

from nahtlos.model.version_pairs import PAIRS, Verdict, Way, allowed, pair_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("way", "old", "new", "accelerator", "verdict"),
    [
        (Way.MOVE, "7.2", "10.0.2", "tcg", Verdict.REFUSED),
        (Way.MOVE, "7.2.22", "11.1.3", "kvm", Verdict.REFUSED),
        (Way.MOVE, "10.0.2", "7.2", "tcg", Verdict.REFUSED),
        (Way.IN_PLACE, "7.2", "10.0.2", "tcg", Verdict.PROVEN),
        (Way.IN_PLACE, "11.1.3", "7.2", "tcg", Verdict.PROVEN),
        (Way.MOVE, "10.0.2", "11.1.3", "tcg", Verdict.PROVEN),
        (Way.MOVE, "11.1.3", "10.0.2", "tcg", Verdict.PROVEN),
        (Way.MOVE, "10.0.2", "11.1.3", "kvm", Verdict.UNTESTED),
        (Way.MOVE, "10.1.0", "11.1.3", "tcg", Verdict.REFUSED),
        (Way.IN_PLACE, "11.10.0", "11.1.3", "tcg", Verdict.REFUSED),
    ],
)
def test_one_row_decides(way: Way, old: str, new: str, accelerator: str, verdict: Verdict) -> None:
    pair = pair_for(way, old, new, accelerator)
    assert pair.verdict is verdict
    assert pair.why
    assert allowed(way, old, new, accelerator) is (verdict is not Verdict.REFUSED)


def test_every_row_has_a_source_that_exists() -> None:
    assert {pair.source for pair in PAIRS if not (ROOT / pair.source).exists()} == set()


def test_what_is_proven_is_proven_both_ways() -> None:
    """A server that was started on a new release must be able to return."""
    proven = {(p.way, p.old, p.new, p.accelerator) for p in PAIRS if p.verdict is Verdict.PROVEN}
    assert {(way, new, old, accelerator) for way, old, new, accelerator in proven} == proven
