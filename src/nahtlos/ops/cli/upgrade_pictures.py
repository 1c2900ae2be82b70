"""What a dry run foretells of servers, for people. Pure."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.blueprint import Campaign, CampaignState, Forecast, ForecastHost, ForecastMove
from nahtlos.model.nouns import Component
from nahtlos.model.prediction import Estimate, Means

SOFT = "dim"


def ways(plan: Forecast) -> RenderableType | None:
    """For every server the row of the table that decides, why this way, and what the others would cost."""
    lines = [line for step in plan.hosts for line in _of_host(step)]
    return Group(Text("Ways:", "bold"), *lines) if lines else None


def _of_host(step: ForecastHost) -> Iterable[Text]:
    yield from (_of_server(move) for move in step.moves)
    if step.note:
        yield Text(f"{step.host}: {step.note}", style=SOFT)


def _of_server(move: ForecastMove) -> Text:
    line = Text.assemble((f"{move.server}: ", "bold"), move.means)
    if move.why:
        line.append(f", because {move.why}")
    line.append(f"\n  row: {move.row or 'not known yet what runs it'}", style=SOFT)
    if others := "; ".join(_of_other(other) for other in move.alternatives):
        line.append(f"\n  else: {others}", style=SOFT)
    return line


def _of_other(other: Estimate) -> str:
    if other.refused:
        return f"{other.means} refused: {other.refused}"
    if not other.converges:
        return f"{other.means} would not come to its end"
    return f"{other.means} {other.blackout_ms:.0f} ms in {other.seconds:.1f} s"


def place(move: ForecastMove) -> str:
    """`web-1 → host-2`, or where it stays."""
    if move.means is Means.IN_PLACE:
        return f"{move.server} in place"
    hows = {Means.SLOWED: ", slowed down", Means.POST_COPY: ", its memory following it"}
    return f"{move.server} → {move.destination}{hows.get(move.means, '')}"


def exactness(plan: Forecast) -> str:
    if plan.error_p90 is None:
        return ""
    return f"; 9 in 10 measured blackouts within {plan.error_p90:.0%} of the prediction"


# --- the way back --------------------------------------------------------------------------------------


def point_of_no_return(plan: Forecast) -> str:
    if not plan.returns:
        return "no way back: it could not be rolled back"
    return "until its end, or `nahtlos upgrade commit`, it can be rolled back: nahtlos upgrade rollback"


def way_back(campaign: Campaign) -> str:
    if campaign.component is not Component.HYPERVISOR:
        return ""
    if campaign.rolled_back:
        return "it is rolled back"
    if campaign.no_way_back:
        return "none, as was asked for"
    over = campaign.ended_at is not None or campaign.state is CampaignState.CANCELLED
    if campaign.committed or over:
        return "past the point of no return" if campaign.committed else "none: it is over"
    return "until its end, or nahtlos upgrade commit: nahtlos upgrade rollback"
