"""`nahtlos host …`"""

from typing import Annotated

import typer

from nahtlos.model.blueprint import HostIntent, HostPhase
from nahtlos.model.ids import HostId
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.runtime.controllers.cloud import HostView

Host = Annotated[str, typer.Argument(metavar="HOST")]


def host_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Hosts: the machines servers run on.")

    @command(app, "list", surroundings)
    async def list_hosts(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All hosts, their state and what they hold."""
        async with cli.client() as client:
            views = await client.hosts()
        cli.show(views, pictures.hosts(views))

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

    @command(app, "drain", surroundings)
    async def drain(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        host: Host,
        wait: Annotated[bool, typer.Option(help="Wait until it is empty.")] = True,
        deadline: Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)] = 600.0,
    ) -> None:
        """Move all servers of HOST elsewhere, while they run, and give it no others."""
        async with cli.client() as client:
            view = await client.set_host_intent(HostId(host), HostIntent.DRAINED)
            if wait:
                view = await wait_until(
                    cli,
                    f"{host} drains",
                    lambda: client.host(HostId(host)),
                    lambda seen: seen.phase is HostPhase.DRAINED,
                    _left,
                    deadline=deadline,
                )
        cli.show(view, pictures.host(view))

    return app


async def _intend(cli: Cli, host: str, intent: HostIntent) -> None:
    async with cli.client() as client:
        view = await client.set_host_intent(HostId(host), intent)
    cli.show(view, pictures.host(view))


def _left(view: HostView) -> str:
    return f"{len(view.servers)} servers left" if view.servers else "settling"
