"""The report for the terminal: one screen, the same figures as in report.json. Pure."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nahtlos.runtime.evidence.figures import count_of, duration, milliseconds, number, release, within
from nahtlos.runtime.evidence.foretold import Predictions
from nahtlos.runtime.evidence.report_contents import Report, ServerFigures

GOOD, BAD, SOFT = "green", "bold red", "dim"


def render_text(report: Report) -> RenderableType:
    return Group(
        _head(report),
        Text(),
        _promises(report),
        Text(),
        _servers(report),
        Text(),
        _gaps(report),
        *exactness(report.predictions),
    )


def _head(report: Report) -> Text:
    campaign = report.campaign
    broken = sum(not p.kept for p in report.promises)
    verdict = (
        (f"✘ {broken} of {len(report.promises)} promises not kept", BAD)
        if broken or not report.promises
        else (f"✔ all {len(report.promises)} promises kept", f"bold {GOOD}")
    )
    return Text.assemble(
        ("Seamlessness report", "bold"),
        "  ",
        verdict,
        "\n",
        f"{release(campaign.from_release)} → {release(campaign.to_release)} on "
        f"{count_of(campaign.hosts, 'host')}, {count_of(report.totals.servers, 'server')}, "
        f"{duration(campaign.seconds)}, {report.machine.accelerator}",
    )


def _promises(report: Report) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for promise in report.promises:
        style = "" if promise.kept else BAD
        sign = Text("✔", GOOD) if promise.kept else Text("✘", BAD)
        table.add_row(sign, Text(promise.promise, style), Text(promise.figure, style or SOFT))
    return table


def _servers(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=SOFT, pad_edge=False)
    table.add_column("Server", no_wrap=True)
    for title in ("Moves", "Packets", "Lost", "Longest", "TCP", "HTTP", "Writes lost", "VMM"):
        table.add_column(title, justify="left" if title == "VMM" else "right", no_wrap=True)
    for server in report.servers:
        table.add_row(*_server_row(server))
    return table


def _server_row(server: ServerFigures) -> tuple[Text, ...]:
    return (
        Text(server.name),
        Text(number(server.moves)),
        Text(number(server.packets_sent)),
        _fault(server.packets_lost),
        Text(milliseconds(server.longest_gap_ms)),
        _fault(server.tcp_sessions_broken),
        _fault(server.http_failures),
        _fault(server.disk_writes_lost) if server.disk_checked else Text("unchecked", BAD),
        Text(release(server.vmm_after)),
    )


def _fault(value: int) -> Text:
    return Text(number(value), BAD if value else "")


def exactness(told: Predictions) -> list[Text]:
    """How far predictions were off; nothing if there were none."""
    lines = [
        Text.assemble(
            (f"Predicted, {way.way}: ", SOFT),
            f"{milliseconds(way.predicted_ms_p50)}, measured {milliseconds(way.measured_ms_p50)}; "
            f"9 in 10 {within(way.error_p90)}, of the time {within(way.seconds_error_p90)}",
            (f" ({count_of(way.operations, 'operation')})", SOFT),
        )
        for way in told.ways
    ]
    if told.error_p90_now is not None:
        lines.append(
            Text.assemble(
                ("Recalibrated: ", SOFT), f"9 in 10 blackouts would now be {within(told.error_p90_now)}"
            )
        )
    return lines


def _gaps(report: Report) -> Text:
    totals = report.totals
    if totals.gap_ms_max is None:
        return Text("No move was watched from outside.", BAD)
    return Text.assemble(
        ("Gap of a move: ", SOFT),
        f"p50 {milliseconds(totals.gap_ms_p50)}, p99 {milliseconds(totals.gap_ms_p99)}, "
        f"longest {milliseconds(totals.gap_ms_max)}",
        (f" ({count_of(totals.moves, 'move')})", SOFT),
    )
