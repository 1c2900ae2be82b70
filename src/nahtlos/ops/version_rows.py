"""The rows of the table of version pairs that matter for the releases that are there, for people. Pure."""

from collections.abc import Iterable
from itertools import permutations

from nahtlos.model.nouns import Component, Release
from nahtlos.model.values import Value
from nahtlos.model.version_pairs import Verdict, Way, pair_for


class PairFinding(Value, frozen=True, kw_only=True):
    title: str
    ok: bool
    """Some way is known."""
    detail: str


def rows_that_matter(releases: Iterable[Release], accelerator: str) -> list[PairFinding]:
    """For every two hypervisor releases, both ways: how a running server gets from one to the other."""
    versions = sorted({r.version for r in releases if r.component is Component.HYPERVISOR}, key=_number)
    return [_finding(old, new, accelerator) for old, new in permutations(versions, 2)]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def _finding(old: str, new: str, accelerator: str) -> PairFinding:
    pairs = [pair_for(way, old, new, accelerator) for way in (Way.MOVE, Way.IN_PLACE)]
    detail = "; ".join(
        f"{pair.way}: {pair.verdict}"
        + (f", {pair.why}" if pair.verdict is not Verdict.PROVEN else "")
        + f" ({pair.source})"
        for pair in pairs
    )
    return PairFinding(
        title=f"{old} to {new}",
        ok=any(pair.verdict is not Verdict.REFUSED for pair in pairs),
        detail=f"{accelerator}: {detail}",
    )
