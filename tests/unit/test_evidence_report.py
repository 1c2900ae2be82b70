"""From records to figures and promises: each damage must be told by the promise it breaks, and no other."""

import io
import itertools
import json
import re
from pathlib import Path

import evidence_samples as samples
import msgspec
import pytest
from evidence_samples import Damage
from rich.console import Console

from nahtlos.model.blueprint import CampaignState
from nahtlos.model.errors import Refused
from nahtlos.model.ids import ServerId
from nahtlos.runtime.evidence.__main__ import main
from nahtlos.runtime.evidence.html import render_html
from nahtlos.runtime.evidence.publish import publish
from nahtlos.runtime.evidence.records import Arrivals, ProbeRecords, count
from nahtlos.runtime.evidence.report import build_report, collect, decode, encode, save_evidence
from nahtlos.runtime.evidence.report_contents import Report
from nahtlos.runtime.evidence.text import render_text


def report_of(damage: Damage = samples.NO_DAMAGE) -> Report:
    return build_report(samples.evidence(damage), samples.probe(damage))


def broken(report: Report) -> list[str]:
    return [p.promise for p in report.promises if not p.kept]


@pytest.fixture(scope="module")
def perfect() -> Report:
    return report_of()


def test_a_perfect_campaign_keeps_every_promise(perfect: Report) -> None:
    assert broken(perfect) == []
    assert perfect.kept
    assert len(perfect.promises) == 12
    assert perfect.totals.packets_lost == 0
    assert perfect.totals.moves == 8
    assert perfect.totals.moves_per_server == pytest.approx(8 / 6, abs=1e-3)


def test_every_move_has_its_own_gap(perfect: Report) -> None:
    web = next(s for s in perfect.servers if s.name == "web-1")
    assert web.moves == len(web.gaps_ms) == 2
    gaps = [m.gap_ms for m in perfect.moves]
    assert all(gap is not None and 30 < gap < 120 for gap in gaps)
    assert perfect.totals.gap_ms_max == max(g for g in gaps if g is not None)
    assert perfect.totals.gap_ms_p50 in gaps
    assert all(m.arrivals_ms and min(m.arrivals_ms) < 0 < max(m.arrivals_ms) for m in perfect.moves)


def test_places_follow_moves(perfect: Report) -> None:
    web = [(p.host, p.begin, p.end) for p in perfect.placements if p.server == "web-1"]
    assert [p[0] for p in web] == ["host-1", "host-3", "host-2"]
    assert web[0][1] == perfect.campaign.began_at
    assert web[-1][2] == perfect.campaign.ended_at
    assert all(a[2] == b[1] for a, b in itertools.pairwise(web))
    late = next(p for p in perfect.placements if p.server == samples.LATE)
    assert late.begin == samples.BEGAN + 88


@pytest.mark.parametrize(
    ("damage", "promise"),
    [
        (Damage(lost={"web-1": 1}), "No packet lost"),
        (Damage(duplicated={"web-1": 1}), "No packet duplicated"),
        (Damage(reboots={"db-1": 1}), "No server rebooted"),
        (Damage(tcp_broken={"db-1": 1}), "No TCP session broken"),
        (Damage(http_failures={"db-1": 1}), "No HTTP request failed"),
        (Damage(writes_lost={"db-1": 1}), "No acknowledged write lost"),
        (Damage(memory_errors={"db-1": 1}), "Memory intact in every server"),
        (Damage(api_errors=1), "The operator API always answered"),
        (Damage(floor=0.99), "Promised capacity never withdrawn"),
        (Damage(upgraded=2), "Every host upgraded"),
        (Damage(state=CampaignState.CANCELLED), "Every host upgraded"),
        (Damage(late_seconds=None), "A server created during the upgrade started at once"),
        (Damage(late_seconds=75.0), "A server created during the upgrade started at once"),
    ],
)
def test_one_damage_breaks_one_promise(damage: Damage, promise: str) -> None:
    report = report_of(damage)
    assert broken(report) == [promise]
    assert not report.kept


@pytest.mark.parametrize("before", [None, 48.0])
def test_how_long_servers_took_before_is_said_beside_one_created_meanwhile(before: float | None) -> None:
    damage = Damage(late_seconds=55.0)
    evidence = msgspec.structs.replace(samples.evidence(damage), booted_seconds=before)
    said = build_report(evidence, samples.probe(damage)).promises[-1]
    assert said.kept
    assert ("(before it: up to 48.0 s)" in said.figure) is (before is not None)


def test_a_server_that_falls_silent_is_a_loss_and_a_gap() -> None:
    report = report_of(Damage(silent_from={"web-2": 140.0}))
    web = next(s for s in report.servers if s.name == "web-2")
    assert web.packets_lost > 7_000
    assert web.longest_gap_ms is not None
    assert web.longest_gap_ms > 30_000
    assert web.gaps_ms[-1] > 30_000


def test_without_a_probe_nothing_is_promised_kept_that_it_would_have_seen() -> None:
    report = build_report(samples.evidence(), None)
    assert broken(report) == [p.promise for p in report.promises if p.promise not in KEPT_UNSEEN]
    assert all("no evidence" in p.figure or "not created" in p.figure for p in report.promises if not p.kept)


KEPT_UNSEEN = (
    "No acknowledged write lost",
    "Promised capacity never withdrawn",
    "At most 1.35 moves per server",
    "Every host upgraded",
)


def test_a_server_nobody_probed_is_named() -> None:
    evidence, probe = samples.evidence(), samples.probe()
    del probe.arrivals["db-1"]
    kept = tuple(s for s in probe.summary.servers if s.name != "db-1")
    probe = type(probe)(msgspec.structs.replace(probe.summary, servers=kept), probe.arrivals)
    report = build_report(evidence, probe)
    lost = next(p for p in report.promises if p.promise == "No packet lost")
    assert not lost.kept
    assert "no evidence for db-1" in lost.figure


def test_faults_are_told_even_where_nothing_went_well() -> None:
    evidence, probe = samples.evidence(), samples.probe()
    servers = tuple(
        msgspec.structs.replace(s, tcp_lines=0, tcp_sessions_broken=3) for s in probe.summary.servers
    )
    probe = type(probe)(msgspec.structs.replace(probe.summary, servers=servers), probe.arrivals)
    tcp = next(p for p in build_report(evidence, probe).promises if p.promise == "No TCP session broken")
    assert not tcp.kept
    assert tcp.figure.startswith("21 broken, 0 lines exchanged (api-1: 3")


def test_nothing_measured_is_no_zero() -> None:
    page = render_html(build_report(samples.evidence(), None))
    assert page.count("not measured") == 4
    assert "0 packets" not in page


def test_report_json_has_the_fields_it_must_have(perfect: Report) -> None:
    data = json.loads(encode(perfect))
    assert {"from", "to", "hosts", "hosts_upgraded", "state", "seconds"} <= data["campaign"].keys()
    assert {
        "name", "moves", "reboots", "packets_sent", "packets_lost", "packets_duplicated", "longest_gap_ms",
        "gaps_ms", "tcp_sessions_broken", "http_failures", "memory_verified", "disk_writes_acknowledged",
        "disk_writes_lost", "vmm_before", "vmm_after",
    } <= data["servers"][0].keys()  # fmt: skip
    assert {"moves_per_server", "api_errors", "capacity_floor"} <= data["totals"].keys()
    assert {"promise", "kept", "figure"} == data["promises"][0].keys()
    assert {"server", "from", "to", "begin", "switch", "end", "gap_ms"} <= data["moves"][0].keys()
    assert data["machine"]["accelerator"] == "tcg"
    assert decode(encode(perfect)) == perfect


def test_the_page_needs_nothing_from_elsewhere_and_shows_the_figures(perfect: Report) -> None:
    page = render_html(perfect)
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", page)
    assert f"of {perfect.totals.packets_sent:,} sent" in page
    for move in perfect.moves:
        assert f"{move.gap_ms:,.1f} ms" in page
    for promise in perfect.promises:
        assert promise.figure in page
    assert "All 12 promises kept" in page


def test_a_broken_promise_is_shown_plainly() -> None:
    report = report_of(samples.WOUNDED)
    page = render_html(report)
    assert "6 of 12 promises not kept" in page
    assert "db-2: 4, web-1: 37" in page
    assert "37 lost" in page
    assert [m.packets_lost for m in report.moves if m.packets_lost] == [4, 37]
    shown = as_text(report)
    assert "✘ 6 of 12 promises not kept" in shown


def test_text_from_outside_is_escaped() -> None:
    evidence = samples.evidence()
    evil = "<script>alert('x')</script>\"&"
    machine = msgspec.structs.replace(evidence.machine, cpu=evil, accelerator_reason=evil)
    view = msgspec.structs.replace(evidence.servers_before[0], id=ServerId(evil))
    evidence = msgspec.structs.replace(evidence, machine=machine, servers_before=(view,))
    page = render_html(build_report(evidence, samples.probe()))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_one_screen_in_the_terminal(perfect: Report) -> None:
    shown = as_text(perfect)
    assert len(shown.splitlines()) <= 32
    assert "✔ all 12 promises kept" in shown


def test_a_folder_is_rendered_again_from_its_records(tmp_path: Path) -> None:
    save_evidence(tmp_path, samples.evidence())
    write_probe(tmp_path / "probe", samples.probe())
    assert main([str(tmp_path)]) == 0
    first = (tmp_path / "report.json").read_bytes()
    assert decode(first) == report_of()
    (tmp_path / "evidence.json").unlink()
    (tmp_path / "report.html").unlink()
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.json").read_bytes() == first
    assert (tmp_path / "report.html").exists()


def test_a_broken_promise_is_exit_code_1(tmp_path: Path) -> None:
    publish(tmp_path, report_of(Damage(lost={"web-1": 1})))
    assert main([str(tmp_path)]) == 1


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="neither"):
        collect(tmp_path)
    (tmp_path / "report.json").write_text("{")
    assert main([str(tmp_path)]) == 2


def test_a_probe_cut_off_does_not_count_what_was_still_out() -> None:
    arrivals = samples.probe(seconds=20).arrivals["web-1"]
    cut = Arrivals(arrivals.sent_at, arrivals.received_at[:-40], arrivals.numbers[:-40])
    assert count(cut, complete=True).lost == 40
    assert count(cut, complete=False).lost == 0


def write_probe(folder: Path, records: ProbeRecords) -> None:
    folder.mkdir()
    (folder / "probe.json").write_bytes(msgspec.json.encode(records.summary))
    for name, arrivals in records.arrivals.items():
        (folder / f"{name}.sent").write_bytes(arrivals.sent_at.tobytes())
        (folder / f"{name}.received").write_bytes(arrivals.received_at.tobytes() + b"cut")
        (folder / f"{name}.received-number").write_bytes(arrivals.numbers.tobytes())


def as_text(report: Report, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render_text(report))
    return console.export_text()
