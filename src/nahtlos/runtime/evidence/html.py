"""The seamlessness report as one page: no script, no font, no picture from anywhere else. Pure.

Every figure on it is one of `report.json`; everything that came from outside is escaped.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from nahtlos.runtime.evidence.figures import (
    NONE,
    count_of,
    duration,
    milliseconds,
    moment,
    number,
    release,
    share,
    within,
)
from nahtlos.runtime.evidence.foretold import WayFigures
from nahtlos.runtime.evidence.plots import (
    foretold_and_measured,
    foretold_shown,
    gap_dots,
    moves_in_strips,
    strips,
    timeline,
)
from nahtlos.runtime.evidence.report_contents import Report, ServerFigures


def render_html(report: Report) -> str:
    title = f"Seamlessness report, {moment(report.campaign.began_at)}"
    sections = (
        _head(report),
        _figures(report),
        _section("Promises", "", _promises(report)),
        _section("Where every server was", _legend(report), _scrolled(timeline(report))),
        _gaps(report),
        _section("Servers", "", _scrolled(_servers(report))),
        _predictions(report),
        _section("Measured on", "", _machine(report)),
        _how(report),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _legend(report: Report) -> str:
    text = (
        "Each colour is a host: pale while it runs the old release, dashed while it is switched and checked, "
        "full once it runs the new one. A ring marks a move: the server changed hosts while it ran."
    )
    undone = report.totals.moves_undone
    if not undone:
        return text
    return f"{text} A red ring is a move that was given up ({undone}); the server stayed where it was."


def _style() -> str:
    return (files("nahtlos.runtime.evidence") / "report.css").read_text()


def _section(title: str, lead: str, body: str) -> str:
    said = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>"


def _scrolled(body: str) -> str:
    return f'<div class="scrolled">{body}</div>'


# --- head --------------------------------------------------------------------------------------------


def _head(report: Report) -> str:
    campaign = report.campaign
    what = (
        f"{count_of(campaign.hosts, 'host')} from {release(campaign.from_release)} to "
        f"{release(campaign.to_release)}, with {count_of(report.totals.servers, 'server')} running on them."
    )
    return (
        '<header><p class="mark">nahtlos</p><div class="title"><h1>Seamlessness report</h1>'
        f"{_verdict(report)}</div>"
        f'<p class="what">{escape(what)}</p>'
        f'<p class="when">{escape(moment(campaign.began_at))} · {escape(duration(campaign.seconds))} · '
        f"campaign {escape(campaign.id)}, {escape(campaign.state)}</p></header>"
    )


def _verdict(report: Report) -> str:
    broken = sum(not p.kept for p in report.promises)
    every = len(report.promises)
    if broken or not every:
        return f'<p class="verdict bad">{_cross()} {broken} of {every} promises not kept</p>'
    return f'<p class="verdict good">{_tick()} All {every} promises kept</p>'


def _tick() -> str:
    return (
        '<svg class="sign" viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="8" class="disc"/>'
        '<path d="M4.6 8.3l2.3 2.3 4.6-4.9" class="cut"/></svg>'
    )


def _cross() -> str:
    return (
        '<svg class="sign" viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="8" class="disc"/>'
        '<path d="M5.3 5.3l5.4 5.4M10.7 5.3l-5.4 5.4" class="cut"/></svg>'
    )


def _figures(report: Report) -> str:
    totals = report.totals
    seen = any(s.boot_seen for s in report.servers)
    tiles = (
        _tile(
            totals.packets_lost,
            totals.packets_sent > 0,
            "packets lost",
            f"of {number(totals.packets_sent)} sent",
        ),
        _tile(totals.reboots, seen, "reboots", f"of {count_of(totals.servers, 'server')}"),
        (
            milliseconds(totals.gap_ms_p50),
            "median gap of a move",
            f"p99 {milliseconds(totals.gap_ms_p99)}, longest {milliseconds(totals.gap_ms_max)}",
            False,
        ),
        _tile(
            totals.tcp_sessions_broken,
            totals.tcp_lines > 0,
            "TCP sessions broken",
            f"{number(totals.tcp_lines)} lines exchanged",
        ),
        _tile(
            totals.http_failures,
            totals.http_requests > 0,
            "HTTP requests failed",
            f"of {number(totals.http_requests)}",
        ),
        _tile(
            totals.disk_writes_lost,
            any(s.disk_checked for s in report.servers),
            "acknowledged writes lost",
            f"of {number(totals.disk_writes_acknowledged)}",
        ),
    )
    cells = "".join(
        f'<div class="tile{" bad" if bad else ""}"><b>{escape(value)}</b><span>{escape(label)}</span>'
        f"<small>{escape(note)}</small></div>"
        for value, label, note, bad in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _tile(faults: int, measured: bool, label: str, note: str) -> tuple[str, str, str, bool]:
    """Nothing measured is not a zero."""
    return (number(faults) if measured else NONE), label, (note if measured else "not measured"), faults > 0


def _promises(report: Report) -> str:
    """What was broken comes first."""
    ordered = sorted(report.promises, key=lambda p: p.kept)
    items = "".join(
        f'<li class="{"good" if p.kept else "bad"}">{_tick() if p.kept else _cross()}'
        f'<div><b>{escape(p.promise)}</b><span class="said">{"Kept" if p.kept else "Not kept"}: </span>'
        f"<span>{escape(p.figure)}</span></div></li>"
        for p in ordered
    )
    return f'<ul class="promises">{items}</ul>'


# --- gaps --------------------------------------------------------------------------------------------


def _gaps(report: Report) -> str:
    totals = report.totals
    if totals.gap_ms_max is None:
        return _section("What clients noticed", "No move was watched from outside.", "")
    lead = (
        "A gap is the longest silence between two datagrams that a client received one after the other "
        f"around a move. Longest silence at any time: {milliseconds(totals.longest_gap_ms)}."
    )
    rate = f" at {report.probe.packets_per_second} datagrams a second" if report.probe else ""
    return _section(
        "What clients noticed",
        lead,
        f"<h3>Gap of every move</h3>{_scrolled(gap_dots(report))}"
        f"<h3>Around every move{escape(rate)}</h3>"
        '<p class="lead">One stroke for every datagram that came back; the gap is shaded.'
        f"{_left_out(report)}</p>"
        f"{_scrolled(strips(report))}",
    )


def _left_out(report: Report) -> str:
    more = sum(m.gap_ms is not None for m in report.moves) - len(moves_in_strips(report))
    return f" Shown are the longest; {number(more)} shorter ones are in report.json." if more else ""


# --- servers -----------------------------------------------------------------------------------------

COLUMNS = (
    "Server",
    "VMM",
    "Moves",
    "Reboots",
    "Packets sent",
    "Lost",
    "Doubled",
    "Longest gap",
    "TCP broken",
    "HTTP failed",
    "Writes",
    "Lost",
    "Memory",
)


def _servers(report: Report) -> str:
    head = "".join(f"<th{'' if i < 2 else ' class=n'}>{escape(c)}</th>" for i, c in enumerate(COLUMNS))
    rows = "".join(_server_row(s) for s in report.servers)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}{_total_row(report)}</tbody></table>"


def _server_row(server: ServerFigures) -> str:
    vmm = release(server.vmm_after)
    if server.vmm_before and server.vmm_before != server.vmm_after:
        vmm = f"{release(server.vmm_before)} → {vmm}"
    note = ' <small class="tag">created meanwhile</small>' if server.created_during else ""
    cells = (
        _number(server.moves),
        _fault(server.reboots),
        _number(server.packets_sent),
        _fault(server.packets_lost),
        _fault(server.packets_duplicated),
        _cell(milliseconds(server.longest_gap_ms)),
        _fault(server.tcp_sessions_broken),
        _fault(server.http_failures),
        _number(server.disk_writes_acknowledged),
        _fault(server.disk_writes_lost) if server.disk_checked else _cell("not checked", bad=True),
        _memory(server),
    )
    return (
        f'<tr><th scope="row">{escape(server.name)}{note}</th><td class="vmm">{escape(vmm)}</td>'
        f"{''.join(cells)}</tr>"
    )


def _total_row(report: Report) -> str:
    t = report.totals
    cells: Sequence[str] = (
        _number(t.moves),
        _fault(t.reboots),
        _number(t.packets_sent),
        _fault(t.packets_lost),
        _fault(t.packets_duplicated),
        _cell(milliseconds(t.longest_gap_ms)),
        _fault(t.tcp_sessions_broken),
        _fault(t.http_failures),
        _number(t.disk_writes_acknowledged),
        _fault(t.disk_writes_lost),
        _cell("intact" if t.memory_verified else NONE, bad=not t.memory_verified),
    )
    return f'<tr class="total"><th scope="row">All</th><td></td>{"".join(cells)}</tr>'


def _memory(server: ServerFigures) -> str:
    if server.memory_verified:
        return _cell("intact")
    return _cell(
        f"{number(server.memory_errors)} wrong" if server.memory_errors else "not verified", bad=True
    )


def _number(value: int) -> str:
    return _cell(number(value))


def _fault(value: int) -> str:
    return _cell(number(value), bad=value > 0)


def _cell(text: str, *, bad: bool = False) -> str:
    return f'<td class="n{" bad" if bad else ""}">{escape(text)}</td>'


# --- predicted and measured ----------------------------------------------------------------------------

WAY_COLUMNS = (
    "Way",
    "Operations",
    "Predicted",
    "Measured",
    "9 in 10 blackouts",
    "after recalibration",
    "9 in 10 durations",
)


def _predictions(report: Report) -> str:
    told = report.predictions
    if not told.operations:
        return ""
    lead = (
        "What was predicted of every move and replacement as it began, beside what the client noticed. A "
        "ring is the predicted blackout, a dot the measured one, and the figure the prediction's error. "
        f"Nine in ten predictions were {within(told.error_p90)} of it"
    )
    if told.error_p90_now is not None:
        lead += f"; with what these operations have taught, they would be {within(told.error_p90_now)}"
    more = sum(f.error is not None for f in told.operations) - len(foretold_shown(report))
    left_out = (
        f" Shown are the largest errors; {number(more)} smaller ones are in report.json." if more else ""
    )
    return _section(
        "Predicted and measured",
        f"{lead}.{left_out}",
        f"{_scrolled(foretold_and_measured(report))}{_scrolled(_ways(report))}",
    )


def _ways(report: Report) -> str:
    head = "".join(f"<th{' class=n' if i else ''}>{escape(c)}</th>" for i, c in enumerate(WAY_COLUMNS))
    rows = "".join(_way_row(way) for way in report.predictions.ways)
    return f'<table class="narrow"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _way_row(way: WayFigures) -> str:
    cells = (
        _number(way.operations),
        _cell(milliseconds(way.predicted_ms_p50)),
        _cell(milliseconds(way.measured_ms_p50)),
        _cell(within(way.error_p90)),
        _cell(within(way.error_p90_now)),
        _cell(within(way.seconds_error_p90)),
    )
    return f'<tr><th scope="row">{escape(way.way)}</th>{"".join(cells)}</tr>'


# --- machine, method ---------------------------------------------------------------------------------


def _machine(report: Report) -> str:
    machine, totals = report.machine, report.totals
    entries = (
        ("Processor", f"{machine.cpu or 'unknown'}, {count_of(machine.cores, 'core')}"),
        ("Memory", f"{number(machine.memory_mib)} MiB"),
        ("System", f"{machine.system}, Linux {machine.kernel}"),
        ("Accelerator", " – ".join(p for p in (machine.accelerator, machine.accelerator_reason) if p)),
        ("Before", report.campaign.from_release),
        ("After", report.campaign.to_release),
        ("nahtlos", machine.nahtlos),
        (
            "Operator API",
            f"{number(totals.api_requests)} requests, {number(totals.api_errors)} errors, "
            f"slowest {milliseconds(totals.api_slowest_ms)}",
        ),
        ("Moves", f"{share(totals.moves_per_server)} per server, {totals.moves_undone} undone"),
        ("Capacity floor", share(totals.capacity_floor)),
    )
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in entries if v)
    return f'<dl class="machine">{items}</dl>'


def _how(report: Report) -> str:
    probe = report.probe
    if probe is None:
        return '<footer><p class="bad">No probe ran: nothing here was seen from outside.</p></footer>'
    send = max((s.longest_send_gap_ms for s in report.servers), default=0.0)
    cut = (
        ""
        if probe.complete
        else " The probe was cut off before it had drained: what was still out is left out."
    )
    text = (
        f"Measured outside the system: per server {probe.packets_per_second} numbered datagrams a second, a "
        "TCP session that exchanges numbered lines, and HTTP requests on new connections. A datagram is lost "
        "if it has not come back 3 seconds after the last one was sent. The probe itself never paused for "
        f"longer than {milliseconds(send)} ({probe.scheduling} scheduling), which is how exact the gaps are. "
        "Written blocks were looked for in the volumes after guests had stopped writing. Guests ran "
        f"under {report.machine.accelerator}.{cut}"
    )
    return f"<footer><p>{escape(text)}</p></footer>"
