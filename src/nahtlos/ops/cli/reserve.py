"""`nahtlos reserve`"""

from typing import Annotated

import typer
from rich.console import RenderableType

from nahtlos.model.placement import ReserveReport
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.pictures import NOTHING, facts
from nahtlos.ops.cli.placement_pictures import reserve_line


def reserve_command(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "reserve", surroundings)
    async def reserve(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        hosts: Annotated[
            int | None,
            typer.Argument(metavar="[N]", help="Hosts that may fail at once; 0: none.", show_default=False),
        ] = None,
    ) -> None:
        """Keep capacity so that the servers of any N hosts that fail can be started on the others, also in
        campaigns. Without N: whether it is kept."""
        async with cli.client() as client:
            placement = client.placement
            report = await placement.reserve() if hosts is None else await placement.set_reserve(hosts)
        cli.show(report, picture(report))


def picture(report: ReserveReport) -> RenderableType:
    pinned = f"{', '.join(report.pinned)} (pinned: they could be started nowhere else)"
    return facts(
        [("reserve", reserve_line(report)), ("nothing is kept for", pinned if report.pinned else NOTHING)]
    )
