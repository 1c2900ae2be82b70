"""`nahtlos server console`"""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import Error, Refused
from nahtlos.model.ids import ServerId
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.terminal import attach
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.console_line import ConsoleLine
from nahtlos.ops.vnc import ADDRESS, Gateway, listening, new_password
from nahtlos.runtime.controllers.consoles import ConsolePlace


def console_command(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "console", surroundings)
    async def console(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Annotated[str, typer.Argument(metavar="SERVER")],
        log: Annotated[bool, typer.Option("--log", help="Print what it has said, and end.")] = False,
        follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
        lines: Annotated[
            int | None, typer.Option(help="Of what it has said, only so many lines.", min=0)
        ] = None,
        interactive: Annotated[
            bool, typer.Option("--interactive", "-i", help="Attach this terminal; Ctrl-] leaves.")
        ] = False,
        read_only: Annotated[bool, typer.Option("--read-only", help="Attach without typing.")] = False,
        force: Annotated[
            bool, typer.Option("--force", help="Type, though somebody else does: they only read then.")
        ] = False,
        send: Annotated[str | None, typer.Option(help="Type this line into the console first.")] = None,
        vnc: Annotated[
            bool, typer.Option("--vnc", help="Its display instead: a place for a VNC viewer on this machine.")
        ] = False,
        vnc_port: Annotated[
            int, typer.Option(help="Of 127.0.0.1; 0: any that is free.", min=0, max=65535)
        ] = 0,
        vnc_socket: Annotated[
            Path | None, typer.Option(help="A unix socket instead of a port; it asks for no password.")
        ] = None,
    ) -> None:
        """A server's serial console: this terminal is attached to it (Ctrl-] leaves), or, where there is no
        terminal, what it has said is printed. It goes on over moves and replacements of the server."""
        name = ServerId(server)
        async with cli.client() as client:
            if vnc:
                await _show_display(cli, client, name, vnc_port, vnc_socket)
                return
            if send is not None:
                await client.console_write(name, send.encode() + b"\n")
            if interactive or not (log or follow or send is not None or cli.json or not _terminals()):
                cli.say("Ctrl-] leaves")
                fds = sys.stdin.fileno(), sys.stdout.fileno()
                await attach(client, name, *fds, write=not read_only, force=force)
                return
            place = await _print_log(cli, client, name, lines)
            if follow:
                await _follow(cli, client, name, place)


async def _show_display(
    cli: Cli, client: OperatorClient, server: ServerId, port: int, path: Path | None
) -> None:
    """Until the viewer has left."""
    view = await client.server(server)
    if not view.display:
        raise Refused(
            f"{server} has no display",
            field="server",
            remedy="its hardware cannot be changed: create a server with --display",
        )
    password = None if path else new_password()
    gateway = Gateway(client, server, password, cli.say)
    async with listening(gateway, path=path, port=port, password=password) as place:
        where = place.path or f"{ADDRESS}:{place.port}"
        line = Text.assemble("VNC at ", (where, "bold"))
        if place.password:
            line.append(f", password {place.password}")
        cli.show(place, line)
        await gateway.over


def _terminals() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


async def _print_log(cli: Cli, client: OperatorClient, server: ServerId, lines: int | None) -> ConsolePlace:
    said = await client.console_log(server)
    text = said.data.decode(errors="replace")
    if lines is not None:
        text = "".join(text.splitlines(keepends=True)[len(text.splitlines()) - lines :] if lines else [])
    _print(cli, text, said.end)
    return said.end


async def _follow(cli: Cli, client: OperatorClient, server: ServerId, place: ConsolePlace) -> None:
    def show(data: bytes) -> None:
        _print(cli, data.decode(errors="replace"), line.place)

    line = ConsoleLine(client, server, place=place, show=show, note=cli.warn)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(line.run())
    except* Error as errors:
        raise errors.exceptions[0] from None


def _print(cli: Cli, text: str, end: ConsolePlace) -> None:
    if cli.json:
        cli.print_json({"text": text, "next_offset": end.offset, "history": end.history}, indent=0)
        return
    sys.stdout.write(text)
    sys.stdout.flush()
