"""What was promised, and whether the figures say it was kept.

Pure. A promise is kept only if it was put to the test: with nothing sent, sampled or checked it is not
kept, and the figure says what evidence is missing.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from nahtlos.model.values import Value

if TYPE_CHECKING:
    from nahtlos.runtime.evidence.report_contents import Report, ServerFigures

MOVES_PER_SERVER = 1.35
STARTS_WITHIN_SECONDS = 60.0
"""From asking for a server to its first answer, the guest's own boot under emulation included. Were it
held up by the campaign it would take minutes: until a host has been emptied and switched."""


class Promise(Value, frozen=True, kw_only=True):
    promise: str
    kept: bool
    figure: str


def judge(report: "Report") -> tuple[Promise, ...]:
    """Every promise, in the order people ask for them."""
    created = (_created(report),) if report.created is not None else ()
    return (
        _reboots(report),
        _lost(report),
        _duplicated(report),
        _tcp(report),
        _http(report),
        _disk(report),
        _memory(report),
        _api(report),
        _capacity(report),
        _moves(report),
        _hosts(report),
        *created,
    )


def _for_every_server(
    text: str,
    servers: Sequence["ServerFigures"],
    *,
    evidence: Callable[["ServerFigures"], bool],
    bad: Callable[["ServerFigures"], int],
    figure: str,
) -> Promise:
    """Kept if every server was looked at and none shows anything bad; the bad ones are named."""
    unseen = [s.name for s in servers if not evidence(s)]
    hit = [f"{s.name}: {bad(s):,}" for s in servers if bad(s)]
    if len(unseen) == len(servers) and not hit:
        return Promise(promise=text, kept=False, figure="no evidence: no server was measured")
    named = f" ({_listed(hit)})" if hit else ""
    missing = f"; no evidence for {_listed(unseen)}" if unseen else ""
    return Promise(promise=text, kept=not hit and not unseen, figure=f"{figure}{named}{missing}")


def _listed(names: Iterable[str], most: int = 4) -> str:
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def _reboots(report: "Report") -> Promise:
    return _for_every_server(
        "No server rebooted",
        report.servers,
        evidence=lambda s: s.boot_seen,
        bad=lambda s: s.reboots,
        figure=f"{report.totals.reboots:,} reboots of {len(report.servers)} servers",
    )


def _lost(report: "Report") -> Promise:
    unmeasured = {m.server for m in report.moves if m.gap_ms is None}
    return _for_every_server(
        "No packet lost",
        report.servers,
        evidence=lambda s: s.packets_sent > 0 and s.name not in unmeasured,
        bad=lambda s: s.packets_lost,
        figure=f"{report.totals.packets_lost:,} of {report.totals.packets_sent:,} packets",
    )


def _duplicated(report: "Report") -> Promise:
    return _for_every_server(
        "No packet duplicated",
        report.servers,
        evidence=lambda s: s.packets_sent > 0,
        bad=lambda s: s.packets_duplicated,
        figure=f"{report.totals.packets_duplicated:,} of {report.totals.packets_sent:,} packets",
    )


def _tcp(report: "Report") -> Promise:
    lines = report.totals.tcp_lines
    return _for_every_server(
        "No TCP session broken",
        report.servers,
        evidence=lambda s: s.tcp_lines > 0,
        bad=lambda s: s.tcp_sessions_broken,
        figure=f"{report.totals.tcp_sessions_broken:,} broken, {lines:,} lines exchanged",
    )


def _http(report: "Report") -> Promise:
    return _for_every_server(
        "No HTTP request failed",
        report.servers,
        evidence=lambda s: s.http_requests > 0,
        bad=lambda s: s.http_failures,
        figure=f"{report.totals.http_failures:,} of {report.totals.http_requests:,} requests",
    )


def _disk(report: "Report") -> Promise:
    totals = report.totals
    return _for_every_server(
        "No acknowledged write lost",
        report.servers,
        evidence=lambda s: s.disk_checked and s.disk_writes_acknowledged > 0,
        bad=lambda s: s.disk_writes_lost,
        figure=f"{totals.disk_writes_lost:,} of {totals.disk_writes_acknowledged:,} writes",
    )


def _memory(report: "Report") -> Promise:
    return _for_every_server(
        "Memory intact in every server",
        report.servers,
        evidence=lambda s: s.memory_pages_verified > 0,
        bad=lambda s: s.memory_errors,
        figure=f"{report.totals.memory_pages_verified:,} pages verified, "
        f"{report.totals.memory_errors:,} wrong",
    )


def _api(report: "Report") -> Promise:
    totals = report.totals
    return Promise(
        promise="The operator API always answered",
        kept=totals.api_requests > 0 and totals.api_errors == 0,
        figure=f"{totals.api_errors:,} errors in {totals.api_requests:,} requests"
        if totals.api_requests
        else "no evidence: it was never asked",
    )


def _capacity(report: "Report") -> Promise:
    floor = report.totals.capacity_floor
    return Promise(
        promise="Promised capacity never withdrawn",
        kept=floor is not None and floor >= 1.0,
        figure=f"{'never below' if floor >= 1.0 else 'fell to'} {floor:.2f} of what was promised"
        if floor is not None
        else "no evidence: no capacity was promised",
    )


def _moves(report: "Report") -> Promise:
    each = report.totals.moves_per_server
    return Promise(
        promise=f"At most {MOVES_PER_SERVER} moves per server",
        kept=each is not None and report.totals.moves > 0 and each <= MOVES_PER_SERVER,
        figure=f"{each:.2f} ({report.totals.moves} moves of {report.totals.servers_at_begin} servers)"
        if each is not None
        else "no evidence: no server was there",
    )


def _hosts(report: "Report") -> Promise:
    campaign = report.campaign
    ended = "" if campaign.state == "done" else f", campaign {campaign.state}"
    return Promise(
        promise="Every host upgraded",
        kept=campaign.state == "done" and 0 < campaign.hosts == campaign.hosts_upgraded,
        figure=f"{campaign.hosts_upgraded} of {campaign.hosts} hosts{ended}",
    )


def _created(report: "Report") -> Promise:
    text = "A server created during the upgrade started at once"
    created = report.created or ()
    if not created:
        return Promise(promise=text, kept=False, figure="no evidence: none was created")
    said = [
        f"{c.server} answered after {c.seconds:.1f} s{_beside(c.booted_before_seconds)}"
        if c.seconds is not None
        else f"{c.server} never answered"
        for c in created
    ]
    outside = [c.server for c in created if not c.during]
    if outside:
        said.append(f"not created during it: {_listed(outside)}")
    kept = not outside and all(c.seconds is not None and c.seconds <= STARTS_WITHIN_SECONDS for c in created)
    return Promise(promise=text, kept=kept, figure=", ".join(said))


def _beside(booted_before: float | None) -> str:
    return f" (before it: up to {booted_before:.1f} s)" if booted_before is not None else ""
