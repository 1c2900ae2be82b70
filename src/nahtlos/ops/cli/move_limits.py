"""`nahtlos moves`"""

from typing import Annotated

import typer
from msgspec import UNSET
from rich.console import RenderableType

from nahtlos.model.placement import MoveLimits
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.pictures import facts
from nahtlos.runtime.controllers.placement import MoveLimitsChange

MIB = 1 << 20


def moves_command(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "moves", surroundings)
    async def moves(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        at_once: Annotated[
            int | None, typer.Option(help="Moves that run at the same time in the whole cloud.")
        ] = None,
        per_host: Annotated[
            int | None, typer.Option(help="Moves from one host; and, counted apart, to one host.")
        ] = None,
    ) -> None:
        """How many moves may run beside each other; or change it. What runs already goes on."""
        change = MoveLimitsChange(
            at_once=UNSET if at_once is None else at_once, per_host=UNSET if per_host is None else per_host
        )
        async with cli.client() as client:
            placement = client.placement
            asked = placement.move_limits() if change == MoveLimitsChange() else placement.limit_moves(change)
            limits = await asked
        cli.show(limits, picture(limits))


def picture(limits: MoveLimits) -> RenderableType:
    share = f"{limits.bytes_per_second // MIB} MiB/s" if limits.bytes_per_second else "not divided"
    return facts(
        [
            ("at once", f"{limits.at_once}, {limits.running} running"),
            ("from, and to, one host", str(limits.per_host)),
            ("of a host's link", f"{share} (nahtlos network underlay)"),
            ("switched at once", "one of a host, whatever runs"),
        ]
    )
