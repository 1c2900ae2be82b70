"""`nahtlos host fence`, `host power`, `host leases`: hosts that fail."""

from typing import Annotated

import typer
from msgspec import UNSET
from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.ids import HostId
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.pictures import NOTHING, table
from nahtlos.runtime.controllers.availability import (
    AvailabilityChange,
    AvailabilityView,
    HostStanding,
    PowerChange,
)

Host = Annotated[str, typer.Argument(metavar="HOST")]


def availability_commands(app: typer.Typer, surroundings: Surroundings) -> None:
    """Adds them to the commands of hosts."""

    @command(app, "leases", surroundings)
    async def leases(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        lease: Annotated[float | None, typer.Option(help="Seconds for which a lease lasts.")] = None,
        lost: Annotated[
            float | None, typer.Option(help="Seconds of silence after which a host may have failed.")
        ] = None,
    ) -> None:
        """Which hosts hold their lease, which have failed, and why; or change how long things take."""
        change = AvailabilityChange(
            lease_seconds=UNSET if lease is None else lease, lost_seconds=UNSET if lost is None else lost
        )
        async with cli.client() as client:
            asked = client.availability
            view = await (asked.view() if change == AvailabilityChange() else asked.change(change))
        cli.show(view, picture(view))

    @command(app, "fence", surroundings)
    async def fence(cli: Cli, host: Host) -> None:  # pyright: ignore[reportUnusedFunction]
        """Vouch for HOST being off: what shall be restarted is, elsewhere. Make sure first: a server that
        still runs there would run twice."""
        async with cli.client() as client:
            view = await client.availability.fence(HostId(host))
        cli.show(view, picture(view))

    @command(app, "power", surroundings)
    async def power(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        host: Host,
        program: Annotated[
            list[str] | None,
            typer.Argument(metavar="[PROGRAM ARGUMENT...]", help="After --; left out: there is none."),
        ] = None,
    ) -> None:
        """How HOST is switched off when it is lost: a program that returns 0 once it is, as of its BMC."""
        async with cli.client() as client:
            asked = PowerChange(command=tuple(program or ()))
            view = await client.availability.set_power(HostId(host), asked)
        cli.show(view, picture(view))


def picture(view: AvailabilityView) -> RenderableType:
    columns = ("Host", "State", "Lease", "Granted by", "Power fence", "Why")
    note = f"a lease lasts {view.lease_seconds:g} s; a host counts as lost after {view.lost_seconds:g} s"
    return Group(table(columns, (_row(each) for each in view.hosts), "no host has joined yet"), Text(note))


def _row(each: HostStanding) -> tuple[str, ...]:
    others = [m for m in each.lease.members if m != each.host] if each.lease else []
    held = ("held" if each.lease_held else "not held") if each.lease else "none needed"
    power = "yes" if each.power else "no"
    return each.host, each.state, held, ", ".join(others) or NOTHING, power, each.why or NOTHING
