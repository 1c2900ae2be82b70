"""`nahtlos server stop|start|reboot|suspend|resume`"""

from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.power import STOP_SECONDS
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.server_pictures import server as server_picture
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.powers import StopRequest

Server = Annotated[str, typer.Argument(metavar="SERVER")]
Wait = Annotated[bool, typer.Option(help="Wait until it is done.")]
Deadline = Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)]
Hard = Annotated[bool, typer.Option("--hard", help="Do not ask the guest: cut its power.")]
Within = Annotated[
    float,
    typer.Option(
        "--within", metavar="SECONDS", help="The guest's time to switch itself off; then it is cut."
    ),
]

Asking = Callable[[OperatorClient], Awaitable[ServerView]]


def power_commands(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "stop", surroundings)
    async def stop(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Server,
        hard: Hard = False,
        within: Within = STOP_SECONDS,
        wait: Wait = True,
        deadline: Deadline = 120.0,
    ) -> None:
        """Stop a server: its guest is asked to switch itself off. It keeps its disks and addresses, and takes
        no memory until it is started."""
        asked = StopRequest(hard=hard, seconds=within)
        name = ServerId(server)
        await _carry_out(
            cli, name, lambda c: c.power.stop(name, asked), (RunState.STOPPED,), "stops", wait, deadline
        )

    @command(app, "start", surroundings)
    async def start(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, server: Server, wait: Wait = True, deadline: Deadline = 120.0
    ) -> None:
        """Start a server that is stopped, where there is room for it."""
        name = ServerId(server)
        await _carry_out(
            cli, name, lambda c: c.power.start(name), (RunState.RUNNING,), "starts", wait, deadline
        )

    @command(app, "suspend", surroundings)
    async def suspend(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, server: Server, wait: Wait = True, deadline: Deadline = 300.0
    ) -> None:
        """Save a server's memory on a volume and free its host of it. It goes on from there, on any host."""
        name = ServerId(server)
        await _carry_out(
            cli, name, lambda c: c.power.suspend(name), (RunState.SUSPENDED,), "is suspended", wait, deadline
        )

    @command(app, "resume", surroundings)
    async def resume(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, server: Server, wait: Wait = True, deadline: Deadline = 300.0
    ) -> None:
        """Let a suspended server go on from what was saved, where there is room for it."""
        name = ServerId(server)
        await _carry_out(
            cli, name, lambda c: c.power.resume(name), (RunState.RUNNING,), "goes on", wait, deadline
        )

    @command(app, "reboot", surroundings)
    async def reboot(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Server,
        hard: Hard = False,
        within: Within = STOP_SECONDS,
        wait: Wait = True,
        deadline: Deadline = 180.0,
    ) -> None:
        """Stop a server and start it where it is."""
        asked = StopRequest(hard=hard, seconds=within)
        name = ServerId(server)
        await _carry_out(
            cli, name, lambda c: c.power.reboot(name, asked), (RunState.RUNNING,), "reboots", wait, deadline
        )


async def _carry_out(
    cli: Cli,
    server: ServerId,
    ask: Asking,
    states: tuple[RunState, ...],
    verb: str,
    wait: bool,
    deadline: float,
) -> None:
    async with cli.client() as client:
        view = await ask(client)
        if wait:
            view = await wait_until(
                cli,
                f"{server} {verb}",
                lambda: client.server(server),
                lambda seen: seen.state in states and not seen.power_pending,
                _standing,
                deadline=deadline,
            )
    cli.show(view, server_picture(view))


def _standing(view: ServerView) -> str:
    return view.waits_for or view.state or "not seen yet"
