"""How the dry run of a drain looks. Pure."""

from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.blueprint import DrainForecast
from nahtlos.ops.cli.pictures import BAD, table
from nahtlos.ops.cli.placement_pictures import obstacles


def drain_forecast(plan: DrainForecast) -> RenderableType:
    columns = ("Server", "To", ">Seconds", ">Gap ms")
    rows = (
        (move.server, move.destination, f"{move.seconds:.1f}", f"{move.gap_ms:.0f}") for move in plan.moves
    )
    parts: list[RenderableType] = [table(columns, rows, f"no server would leave {plan.host}")]
    if plan.obstacles:
        parts += [Text(), obstacles(plan.obstacles)]
    if plan.reserve:
        refused = Text.assemble(("Refused: ", BAD), plan.reserve, (f"\n  → {plan.remedy}", "cyan"))
        parts += [Text(), refused]
    return Group(*parts)
