"""Where servers can and cannot go, and the reserve, for people. Pure."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.blueprint import Obstacle
from nahtlos.model.nouns import Size
from nahtlos.model.placement import ReserveReport

GOOD, WARN, BAD = "green", "yellow", "bold red"


def obstacles(found: Sequence[Obstacle]) -> RenderableType:
    """One after the other, those in the way first."""
    ordered = sorted(found, key=lambda obstacle: bool(obstacle.instead))
    return Group(Text("Servers that cannot leave their host by a move:", "bold"), *map(_obstacle, ordered))


def _obstacle(obstacle: Obstacle) -> Text:
    style = WARN if obstacle.instead else BAD
    line = Text.assemble(
        (f"{obstacle.server}", style), f" ({obstacle.host}, {obstacle.kind}): ", obstacle.reason
    )
    if obstacle.instead:
        line.append(f"; {obstacle.instead}", style=GOOD)
    line.append(f"\n  → {obstacle.remedy}", style="cyan")
    return line


def reserve_line(report: ReserveReport | None) -> Text:
    """Whether it is kept, with figures, in one line."""
    if report is None or not report.hosts:
        return Text("none")
    asked = f"{report.hosts} of {report.of} hosts may fail"
    if report.kept:
        return Text(f"{asked}: kept ({_size(report.free)} free in all)", style=GOOD)
    lost, left = " and ".join(report.lost), ", ".join(report.left)
    return Text(
        f"{asked}: not kept. If {lost} failed, {left or 'their servers'} could not be started elsewhere "
        f"(needs {_size(report.needs)}, {_size(report.free)} free on all others together)",
        style=BAD,
    )


def _size(value: Size) -> str:
    return f"{value.memory_mib} MiB and {value.vcpus} vCPU"
