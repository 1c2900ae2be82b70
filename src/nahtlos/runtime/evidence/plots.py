"""The report's plots as inline SVG, drawn here so that a page needs neither script nor network. Pure.

Colours are classes (`h0` … `h7` for hosts, `ink`, `muted`, `bad` …) that the page's style sheet defines for
light and dark. All text is escaped here.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

from nahtlos.runtime.evidence.figures import clock, milliseconds, release, signed
from nahtlos.runtime.evidence.foretold import Foretold, blackout_of
from nahtlos.runtime.evidence.report import STRIP_AFTER_SECONDS, STRIP_BEFORE_SECONDS
from nahtlos.runtime.evidence.report_contents import HostFigures, MoveFigures, Placement, Report

WIDTH = 1080
LABEL = 132
RIGHT = 14
ROW = 30
BAR = 18
HOST_COLOURS = 8
STRIPS_SHOWN = 40
FORETOLD_SHOWN = 40


def host_class(report: Report, host: str) -> str:
    """The colour of a host: by its place among all, so that neighbours differ."""
    names = sorted({h.host for h in report.hosts} | {p.host for p in report.placements}, key=_natural)
    return f"h{names.index(host) % HOST_COLOURS}" if host in names else "h0"


def _natural(name: str) -> tuple[str, int, str]:
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0), name


class Scale:
    """From a value to a place on the page."""

    def __init__(self, low: float, high: float, left: float, right: float) -> None:
        self._low, self._span = low, max(high - low, 1e-9)
        self._left, self._width = left, right - left

    def __call__(self, value: float) -> float:
        return self._left + (value - self._low) / self._span * self._width


def ticks(high: float, wanted: int) -> list[float]:
    """Round steps from 0 to `high`, about `wanted` of them."""
    if high <= 0:
        return [0.0]
    rough = high / wanted
    scale = 10 ** math.floor(math.log10(rough))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= rough)
    return [step * i for i in range(int(high / step + 1e-9) + 1)]


def time_ticks(seconds: float) -> list[float]:
    step = next((s for s in (5, 10, 15, 30, 60, 120, 300, 600, 1800) if seconds / s <= 10), 3600)
    return [float(t) for t in range(0, int(seconds) + 1, step)]


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _rect(
    x: float, y: float, width: float, height: float, css: str, title: str = "", radius: float = 3
) -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.8):.1f}" height="{height:.1f}" '
        f'rx="{radius:g}" class="{css}">{inside}</rect>'
    )


def _circle(x: float, y: float, radius: float, css: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}">{inside}</circle>'


def _svg(height: float, parts: Iterable[str], label: str) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{body}</svg>"
    )


# --- where every server was, and what happened to the hosts ------------------------------------------


def timeline(report: Report) -> str:
    campaign = report.campaign
    scale = Scale(campaign.began_at, campaign.ended_at, LABEL, WIDTH - RIGHT)
    servers = [s.name for s in report.servers if any(p.server == s.name for p in report.placements)]
    hosts_top = 26
    servers_top = hosts_top + len(report.hosts) * ROW + 40
    height = servers_top + len(servers) * ROW + 30
    bottom = height - 24
    parts = [
        *_time_grid(report, scale, hosts_top - 8, bottom),
        _text(0, hosts_top - 12, "Hosts", "head"),
        *_rows(_host_row(report, h, scale, hosts_top + i * ROW) for i, h in enumerate(report.hosts)),
        _text(0, servers_top - 12, "Servers", "head"),
        *_rows(_server_row(report, s, scale, servers_top + i * ROW) for i, s in enumerate(servers)),
    ]
    return _svg(height, parts, "Where every server was while the hosts were upgraded")


def _rows(rows: Iterable[list[str]]) -> list[str]:
    return [part for row in rows for part in row]


def _time_grid(report: Report, scale: Scale, top: float, bottom: float) -> list[str]:
    began = report.campaign.began_at
    parts: list[str] = []
    for at in time_ticks(report.campaign.seconds):
        x = scale(began + at)
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 16, clock(at), "axis", "middle")]
    return parts


def _host_row(report: Report, host: HostFigures, scale: Scale, y: float) -> list[str]:
    campaign, middle = report.campaign, y + ROW / 2
    colour = host_class(report, host.host)
    top = middle - BAR / 2
    end = host.upgraded_at if host.upgraded_at is not None else campaign.ended_at
    parts = [
        _circle(5, middle, 5, colour),
        _text(18, middle + 4, host.host, "name"),
        _rect(
            scale(campaign.began_at),
            top,
            scale(end) - scale(campaign.began_at),
            BAR,
            f"{colour} before",
            f"{host.host} on {release(host.release_before)}",
        ),
        *_fitting(
            scale(campaign.began_at),
            scale(_first_phase(host, end)),
            middle,
            release(host.release_before),
            "note",
        ),
    ]
    for phase in host.phases:
        left, right = scale(phase.begin), scale(phase.end)
        title = f"{host.host}: {phase.phase} for {phase.end - phase.begin:.1f} s"
        parts.append(_rect(left, top, right - left, BAR, f"{colour} {phase.phase}", title))
        parts += _fitting(left, right, middle, phase.phase, "note strong")
    if host.upgraded_at is not None:
        left, right = scale(host.upgraded_at), scale(campaign.ended_at)
        title = f"{host.host} on {release(host.release_after)}"
        parts.append(_rect(left, top, right - left, BAR, colour, title))
        parts += _fitting(left, right, middle, release(host.release_after), "onbar")
    return parts


def _first_phase(host: HostFigures, otherwise: float) -> float:
    return min((p.begin for p in host.phases), default=otherwise)


def _fitting(left: float, right: float, middle: float, text: str, css: str) -> list[str]:
    """A label inside a bar, if it has room."""
    if right - left < len(text) * 6.6 + 10:
        return []
    return [_text(left + 7, middle + 3.8, text, css)]


def _server_row(report: Report, server: str, scale: Scale, y: float) -> list[str]:
    middle = y + ROW / 2
    parts = [_text(18, middle + 4, server, "name")]
    for place in (p for p in report.placements if p.server == server):
        parts += _placed(report, place, scale, middle)
    for move in (m for m in report.moves if m.server == server):
        parts += _moved(report, move, scale, middle)
    return parts


def _placed(report: Report, place: Placement, scale: Scale, middle: float) -> list[str]:
    left, right = scale(place.begin), scale(place.end)
    seconds = place.end - place.begin
    return [
        _rect(
            left,
            middle - BAR / 2,
            right - left,
            BAR,
            host_class(report, place.host),
            f"{place.server} on {place.host} for {seconds:.0f} s",
        ),
        *_fitting(left + 4, right, middle, place.host, "onbar"),
    ]


def _moved(report: Report, move: MoveFigures, scale: Scale, middle: float) -> list[str]:
    if move.begin is None or move.switch is None or move.end is None:
        return []
    x = scale(move.switch)
    failed = move.state != "done"
    css = "mark failed" if failed else "mark"
    gap = f", gap {milliseconds(move.gap_ms)}" if move.gap_ms is not None else ", not watched"
    title = f"{move.server}: {move.source} to {move.destination}, {move.end - move.begin:.1f} s{gap}"
    title += f" ({move.state})" if failed else ""
    return [
        _line(x, middle - BAR / 2 - 4, x, middle + BAR / 2 + 4, css),
        _circle(x, middle, 4.2, css, title),
    ]


# --- how long clients heard nothing ------------------------------------------------------------------


def gap_dots(report: Report) -> str:
    """One dot per move, by server, with the median and the 99th percentile of all."""
    totals = report.totals
    longest = totals.gap_ms_max
    if longest is None:
        return ""
    high = max(100.0, longest * 1.12)
    scale = Scale(0, high, LABEL, WIDTH - RIGHT - 6)
    servers = [s for s in report.servers if s.gaps_ms]
    top, row = 30, 26
    bottom = top + len(servers) * row + 4
    parts: list[str] = []
    for at in ticks(high, 8):
        x = scale(at)
        parts += [_line(x, top - 4, x, bottom, "grid"), _text(x, bottom + 16, f"{at:g} ms", "axis", "middle")]
    for index, server in enumerate(servers):
        middle = top + index * row + row / 2
        parts += [
            _text(18, middle + 4, server.name, "name"),
            _line(LABEL, middle, WIDTH - RIGHT, middle, "rule"),
        ]
        parts += [
            _dot(report, m, scale, middle)
            for m in report.moves
            if m.server == server.name and m.gap_ms is not None
        ]
    parts += _percentiles(totals.gap_ms_p50, totals.gap_ms_p99, scale, top, bottom)
    return _svg(bottom + 26, parts, "Gap of every move as the client saw it")


def _dot(report: Report, move: MoveFigures, scale: Scale, y: float) -> str:
    gap = move.gap_ms or 0.0
    title = f"{move.server}: {move.source} to {move.destination}, {milliseconds(gap)}"
    css = host_class(report, move.destination) + (" failed" if move.state != "done" else "")
    return _circle(scale(gap), y, 5.5, f"{css} dot", title)


def _percentiles(p50: float | None, p99: float | None, scale: Scale, top: float, bottom: float) -> list[str]:
    """Two lines; their labels step aside from each other and from the margins."""
    if p50 is None or p99 is None:
        return []
    at50, at99 = scale(p50), scale(p99)
    near = at99 - at50 < 120
    return [
        _line(at50, top - 6, at50, bottom, "percentile"),
        _text(
            at50 - (5 if near else 0),
            top - 11,
            f"p50 {milliseconds(p50)}",
            "note strong",
            "end" if near else "middle",
        ),
        _line(at99, top - 6, at99, bottom, "percentile"),
        _text(
            min(at99 + (5 if near else 0), WIDTH - 110 if near else WIDTH - 60),
            top - 11,
            f"p99 {milliseconds(p99)}",
            "note strong",
            "start" if near else "middle",
        ),
    ]


def foretold_shown(report: Report) -> list[Foretold]:
    """Operations that were watched, in their order: all, or those with the largest errors."""
    watched = [f for f in report.predictions.operations if f.error is not None]
    worst = sorted(watched, key=lambda f: abs(f.error or 0.0), reverse=True)[:FORETOLD_SHOWN]
    kept = {f.id for f in worst}
    return [f for f in watched if f.id in kept]


def foretold_and_measured(report: Report) -> str:
    """A ring where a blackout was predicted, a full dot where it was measured, and what lies between."""
    shown = foretold_shown(report)
    if not shown:
        return ""
    label, right = 300, WIDTH - 84
    most = max(max(f.predicted_blackout_ms, blackout_of(f) or 0.0) for f in shown)
    scale = Scale(0, max(100.0, most * 1.1), label, right)
    top, row = 8, 24
    bottom = top + len(shown) * row + 4
    parts: list[str] = []
    for at in ticks(max(100.0, most * 1.1), 8):
        x = scale(at)
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 16, f"{at:g} ms", "axis", "middle")]
    for index, one in enumerate(shown):
        parts += _foretold(report, one, scale, top + index * row + row / 2)
    return _svg(bottom + 26, parts, "Predicted and measured blackout of every operation")


def _foretold(report: Report, one: Foretold, scale: Scale, middle: float) -> list[str]:
    said, felt = scale(one.predicted_blackout_ms), scale(blackout_of(one) or 0.0)
    title = (
        f"{one.server}, {one.way}: predicted {milliseconds(one.predicted_blackout_ms)}, "
        f"measured {milliseconds(blackout_of(one))}"
    )
    return [
        _text(0, middle + 4, clock(one.begin - report.campaign.began_at), "axis"),
        _text(40, middle + 4, one.server, "name"),
        _text(132, middle + 4, one.way, "note"),
        _line(said, middle, felt, middle, "between"),
        _circle(said, middle, 4.6, "mark", title),
        _circle(felt, middle, 5.2, "measured dot", title),
        _text(WIDTH - 4, middle + 4, signed(one.error), "figure", "end"),
    ]


def moves_in_strips(report: Report) -> list[MoveFigures]:
    """Moves that were watched, in their order: all, or if they are many those with the longest gaps."""
    watched = [m for m in report.moves if m.gap_ms is not None]
    longest = sorted(watched, key=lambda m: m.gap_ms or 0.0, reverse=True)[:STRIPS_SHOWN]
    kept = {m.id for m in longest}
    return [m for m in watched if m.id in kept]


def strips(report: Report) -> str:
    """What the client heard around each move: a stroke for every datagram that came back."""
    shown = moves_in_strips(report)
    if not shown:
        return ""
    label = 300
    scale = Scale(-STRIP_BEFORE_SECONDS * 1e3, STRIP_AFTER_SECONDS * 1e3, label, WIDTH - 140)
    top, row = 8, 26
    bottom = top + len(shown) * row + 4
    parts: list[str] = []
    for at in range(int(-STRIP_BEFORE_SECONDS * 1e3), int(STRIP_AFTER_SECONDS * 1e3) + 1, 50):
        x = scale(at)
        text = "0" if at == 0 else f"{at:+d} ms".replace("-", "−")
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 16, text, "axis", "middle")]
    for index, move in enumerate(shown):
        parts += _strip(report, move, scale, top + index * row + row / 2)
    return _svg(bottom + 26, parts, "Datagrams that came back around each move")


def _strip(report: Report, move: MoveFigures, scale: Scale, middle: float) -> list[str]:
    gap = move.gap_ms or 0.0
    end = min(gap, STRIP_AFTER_SECONDS * 1e3)
    failed = "" if move.state == "done" else f" ({move.state})"
    colour = host_class(report, move.destination)
    return [
        _text(0, middle + 4, clock((move.switch or 0.0) - report.campaign.began_at), "axis"),
        _text(40, middle + 4, move.server, "name"),
        _text(132, middle + 4, f"{move.source} → {move.destination}{failed}", "note"),
        _rect(scale(0), middle - 9, scale(end) - scale(0), 18, "gap", radius=2),
        f'<path d="{_strokes(move.arrivals_ms, scale, middle)}" class="stroke {colour}"/>',
        *_strip_figure(move, middle),
    ]


def _strip_figure(move: MoveFigures, middle: float) -> list[str]:
    gap = _text(WIDTH - 4, middle + 4, milliseconds(move.gap_ms), "figure", "end")
    if not move.packets_lost:
        return [gap]
    return [gap, _text(WIDTH - 80, middle + 4, f"{move.packets_lost:,} lost", "figure lost", "end")]


def _strokes(arrivals_ms: Sequence[float], scale: Scale, middle: float) -> str:
    return "".join(f"M{scale(at):.1f} {middle - 7:.1f}v14" for at in arrivals_ms)
