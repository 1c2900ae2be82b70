"""`nahtlos host …`"""

from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from nahtlos.model.blueprint import HostIntent, HostPhase
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.availability import availability_commands
from nahtlos.ops.cli.command import REFUSED, Cli, Surroundings, command
from nahtlos.ops.cli.drain import drain_forecast
from nahtlos.ops.cli.placement_pictures import reserve_line
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import HostChange, HostView
from nahtlos.runtime.evidence.figures import count_of

NO_DOMAIN = "none"
Host = Annotated[str, typer.Argument(metavar="HOST")]


def host_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Hosts: the machines servers run on.")

    @command(app, "list", surroundings)
    async def list_hosts(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All hosts, their state and what they hold."""
        async with cli.client() as client:
            views = await client.hosts()
            reserve = (await client.status()).capacity.reserve
        listed = pictures.hosts(views)
        reserved = Text.assemble("reserve: ", reserve_line(reserve))
        cli.show(views, listed if reserve is None else Group(listed, reserved))

    @command(app, "show", surroundings)
    async def show(cli: Cli, host: Host) -> None:  # pyright: ignore[reportUnusedFunction]
        """One host: what it shall do, what was observed of it."""
        async with cli.client() as client:
            view = await client.host(HostId(host))
        cli.show(view, pictures.host(view))

    @command(app, "cordon", surroundings)
    async def cordon(cli: Cli, host: Host) -> None:  # pyright: ignore[reportUnusedFunction]
        """Give HOST no further servers; it keeps those it has."""
        await _intend(cli, host, HostIntent.CORDONED)

    @command(app, "activate", surroundings)
    async def activate(cli: Cli, host: Host) -> None:  # pyright: ignore[reportUnusedFunction]
        """Take HOST back into service."""
        await _intend(cli, host, HostIntent.ACTIVE)

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        host: Host,
        domain: Annotated[
            str | None, typer.Option(help="What it fails together with, as a rack; none: nothing.")
        ] = None,
    ) -> None:
        """Change what is known of HOST: copies of a volume go to different failure domains."""
        if domain is None:
            raise Refused("nothing is to be changed", field="domain", remedy="give --domain RACK, or none")
        async with cli.client() as client:
            asked = HostChange(domain="" if domain == NO_DOMAIN else domain)
            view = await client.change_host(HostId(host), asked)
        cli.show(view, pictures.host(view))

    @command(app, "drain", surroundings)
    async def drain(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        host: Host,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Say what would move where and what would not; do nothing.")
        ] = False,
        wait: Annotated[bool, typer.Option(help="Wait until it is empty.")] = True,
        deadline: Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)] = 600.0,
    ) -> int:
        """Move all servers and volumes of HOST elsewhere, while they run, and give it no others.

        With --dry-run the exit code is 2 if something is in the way."""
        async with cli.client() as client:
            if dry_run:
                forecast = await client.placement.plan_drain(HostId(host))
                cli.show(forecast, drain_forecast(forecast))
                return REFUSED if forecast.obstacles or forecast.reserve else 0
            view = await client.set_host_intent(HostId(host), HostIntent.DRAINED)
            if wait:
                view, _ = await wait_until(
                    cli,
                    f"{host} drains",
                    lambda: _with_waits(client, HostId(host)),
                    lambda seen: seen[0].phase is HostPhase.DRAINED,
                    _left,
                    deadline=deadline,
                )
        cli.show(view, pictures.host(view))
        return 0

    availability_commands(app, surroundings)
    return app


async def _intend(cli: Cli, host: str, intent: HostIntent) -> None:
    async with cli.client() as client:
        view = await client.set_host_intent(HostId(host), intent)
    cli.show(view, pictures.host(view))


async def _with_waits(client: OperatorClient, host: HostId) -> tuple[HostView, str]:
    """A host, and what the first of its servers that cannot leave it waits for."""
    view = await client.host(host)
    waits = (f"{s.id}: {s.waits_for}" for s in await client.servers() if s.host == host and s.waits_for)
    return view, next(waits, "")


def _left(seen: tuple[HostView, str]) -> str:
    view, waits = seen
    parts = [f"{count_of(len(view.servers), 'server')} left"] if view.servers else []
    if view.kept.volumes:
        parts.append(f"{count_of(len(view.kept.volumes), 'volume')} left")
    if view.kept.snapshots:
        parts.append(f"{count_of(len(view.kept.snapshots), 'snapshot')} left")
    if view.kept.volumes or view.kept.snapshots:
        parts.append(pictures.leaving(view))
    left = ", ".join(parts) or "settling"
    return f"{left}; {waits}" if waits else left
