"""Predicted against measured: which operations count, what they are compared with, what was learned."""

import io

import msgspec
import pytest
from evidence_samples import evidence, probe
from rich.console import Console

from nahtlos.model.blackout import HEARD_MS
from nahtlos.model.blueprint import OperationRecord
from nahtlos.model.ids import HostId, OperationId, ReleaseId
from nahtlos.model.prediction import Estimate, Means
from nahtlos.ops.cli.pictures import campaign_report
from nahtlos.runtime.evidence.foretold import Predictions, predictions
from nahtlos.runtime.evidence.html import render_html
from nahtlos.runtime.evidence.report import build_report
from nahtlos.runtime.evidence.text import render_text

WAKE_MS = 43.0


def said(pause_ms: float = 20.0, means: Means = Means.PRE_COPY, seconds: float = 1.0) -> Estimate:
    return Estimate(
        means=means,
        blackout_ms=pause_ms + WAKE_MS,
        blackout_ms_max=2 * (pause_ms + WAKE_MS),
        pause_ms=pause_ms,
        brownout_seconds=0.5,
        seconds=seconds,
    )


def operation(
    number: int, pause_ms: float = 10.0, predicted: Estimate | None = None, kind: str = "move"
) -> OperationRecord:
    begin = 100.0 + number
    times = {"begin": begin, "precopy": begin + 0.2, "switch": begin + 0.7, "stopped": begin + 0.701}
    times |= {"running": times["stopped"] + pause_ms / 1000, "done": begin + 2.0}
    return OperationRecord(
        id=OperationId(f"op-{number}"),
        kind=kind,
        subject=f"vm-{number}",
        state="done",
        source=HostId("host-1"),
        destination=HostId("host-2"),
        times=times,
        release_before=ReleaseId("old"),
        release_after=ReleaseId("new"),
        predicted=predicted or said(),
    )


def test_a_blackout_is_compared_with_what_the_client_noticed() -> None:
    (one,) = predictions([operation(1)], {"op-1": 50.0}).operations
    assert (one.way, one.gap_ms, one.pause_ms) == ("pre-copy", 50.0, pytest.approx(10.0, abs=0.01))
    assert one.error == pytest.approx((63.0 - 50.0) / 50.0)
    assert (one.brownout_seconds, one.seconds) == (pytest.approx(0.5), pytest.approx(2.0))
    assert one.seconds_error == pytest.approx(-0.5)


def test_where_nobody_watched_the_pause_stands_for_it() -> None:
    (one,) = predictions([operation(1)], {}).operations
    assert one.gap_ms is None
    assert one.error == pytest.approx((63.0 - 53.0) / 53.0, abs=1e-3)


@pytest.mark.parametrize(
    "without",
    [
        {"predicted": None},
        {"state": "undone"},
        {"times": {}},
        {"kind": "verify"},
    ],
)
def test_what_does_not_count(without: dict[str, object]) -> None:
    record = msgspec.structs.replace(operation(1), **without)
    assert predictions([record], {"op-1": 50.0}) == Predictions()


def test_recalibration_puts_a_steady_error_right() -> None:
    """All pauses are half of what was said: with that learned, nothing is left of the error."""
    found = predictions([operation(n) for n in range(5)], {f"op-{n}": 53.0 for n in range(5)})
    assert found.error_p90 == pytest.approx(10 / 53, abs=1e-3)
    assert found.error_p90_now == pytest.approx(0.0, abs=1e-3)
    few = predictions([operation(n) for n in range(2)], {})
    assert few.error_p90_now is None, "two of them teach nothing"


def answering(number: int, wake_ms: float) -> OperationRecord:
    one = operation(number, 20.0)
    answered = one.times["running"] + (wake_ms - HEARD_MS) / 1000
    return msgspec.structs.replace(one, times={**one.times, "answered": answered})


def test_a_guest_that_was_heard_again_says_how_long_its_process_was_cold() -> None:
    found = predictions([answering(n, 100.0) for n in range(3)], {})
    assert found.operations[0].wake_ms == pytest.approx(100.0, abs=0.01)
    assert found.operations[0].error == pytest.approx((63.0 - 120.0) / 120.0, abs=1e-3)
    assert found.error_p90_now == pytest.approx(0.0, abs=1e-3)


def test_a_spread_is_not_put_right() -> None:
    gaps = {f"op-{n}": 40.0 + 40.0 * n for n in range(5)}
    found = predictions([operation(n) for n in range(5)], gaps)
    assert found.error_p90_now is not None and found.error_p90_now > 0.3


def test_every_way_has_a_line_of_its_own() -> None:
    in_place = said(18.0, Means.IN_PLACE)
    records = [operation(1), operation(2), operation(3, 18.0, in_place, kind="replace")]
    found = predictions(records, {"op-3": 61.0})
    assert [(w.way, w.operations) for w in found.ways] == [("in-place", 1), ("pre-copy", 2)]
    assert found.ways[0].error_p90 == pytest.approx(0.0)
    assert found.ways[0].measured_ms_p50 == 61.0


def test_the_report_tells_it_in_json_on_the_page_and_in_text() -> None:
    report = build_report(evidence(), probe())
    assert len(report.predictions.operations) == report.totals.moves
    gaps = {m.id: m.gap_ms for m in report.moves}
    assert {f.id: f.gap_ms for f in report.predictions.operations} == gaps
    page = render_html(report)
    assert "Predicted and measured" in page
    assert page.count('class="measured dot"') == len(gaps)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_text(report))
    text = console.export_text()
    assert "Predicted, pre-copy:" in text and "Recalibrated:" in text


def test_a_report_of_an_older_release_says_nothing_of_it() -> None:
    bare = evidence()
    records = tuple(msgspec.structs.replace(o, predicted=None) for o in bare.campaign.operations)
    campaign = msgspec.structs.replace(bare.campaign, operations=records)
    report = build_report(msgspec.structs.replace(bare, campaign=campaign), probe())
    assert report.predictions == Predictions()
    assert "Predicted and measured" not in render_html(report)


def test_what_an_operator_is_shown_of_a_campaign() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(campaign_report(evidence().campaign))
    assert "Predicted, pre-copy:" in console.export_text()
