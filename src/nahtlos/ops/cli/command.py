"""What all commands share: where the cloud is, how results and errors are shown, exit codes.

Every command takes the same options (`--json`, `--lab`, `--url`, …), before or after its name. Results go
to standard output and nothing else does; progress and errors go to standard error, except that with
`--json` an error is printed as `{"error": …}` on standard output. Credentials come from files only. Where
standard output is no terminal nothing is broken into lines or cut: what reads it may be a program.
"""

import asyncio
import copy
import inspect
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer
from rich.console import Console, RenderableType
from rich.text import Text

from nahtlos.model.errors import Error, ErrorRecord, Refused, Stale, Unavailable
from nahtlos.ops.client import OperatorClient

BROKEN, REFUSED, UNAVAILABLE, STALE = 1, 2, 3, 4
INTERRUPTED = 130
UNBROKEN = 1000
"""Columns of what is no terminal."""


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What the composition root knows and commands need."""

    socket_of_lab: Callable[[str], Path]
    build_dir: Path
    """Where releases and images are built."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the cloud, and how to show what it says. None: not said."""

    json: bool | None = None
    lab: str | None = None
    socket: Path | None = None
    url: str | None = None
    ca: Path | None = None
    token_file: Path | None = None
    pki_dir: Path | None = None

    def over(self, other: "Place") -> "Place":
        """This one, completed with what only `other` says. A cloud named here stands against every cloud
        named there, however it was named."""
        said = {name: getattr(self, name) for name in self.__struct_fields__}
        if any(said[name] is not None for name in ("lab", "socket", "url")):
            other = msgspec.structs.replace(other, lab=None, socket=None, url=None)
        return msgspec.structs.replace(other, **{k: v for k, v in said.items() if v is not None})


_PANEL = "Which cloud"
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "json": (bool, {"flag": "--json", "help": "Print JSON."}),
    "lab": (str, {"flag": "--lab", "help": "The lab of this name on this machine (default: demo)."}),
    "socket": (Path, {"flag": "--socket", "help": "An orchestrator's unix socket."}),
    "url": (str, {"flag": "--url", "help": "An orchestrator elsewhere: https://address:port."}),
    "ca": (Path, {"flag": "--ca-file", "also": "--ca", "help": "The cloud's ca.pem, for --url."}),
    "token_file": (Path, {"flag": "--token-file", "help": "File with an operator's token, for --url."}),
    "pki_dir": (Path, {"flag": "--pki-dir", "help": "Folder with an operator's certificate, for --url."}),
}


def place_parameters(*, from_environment: bool) -> list[inspect.Parameter]:
    """The shared options as parameters of a function. Only the program's own read the environment: what
    is said at a command would otherwise lose against it."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None,
                typer.Option(
                    *(known[name] for name in ("flag", "also") if name in known),
                    help=known["help"],
                    show_default=False,
                    envvar=f"NAHTLOS_{name.upper()}" if from_environment and name != "json" else None,
                    rich_help_panel=None if name == "json" else _PANEL,
                ),
            ],
        )
        for name, (kind, known) in _OPTIONS.items()
    ]


def take_place(arguments: dict[str, Any]) -> Place:
    """Removes the shared options from a command's arguments."""
    return Place(**{name: arguments.pop(name) for name in _OPTIONS})


class Cli:
    """One run of one command."""

    def __init__(self, place: Place, surroundings: Surroundings) -> None:
        self.place = place
        self.json = bool(place.json)
        self.surroundings = surroundings
        self.out = _console(sys.stdout.isatty(), stderr=False)
        self.err = _console(sys.stderr.isatty(), stderr=True)

    @property
    def lab(self) -> str:
        return self.place.lab or "demo"

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[OperatorClient]:
        client = self._client()
        try:
            yield client
        finally:
            await client.close()

    def _client(self) -> OperatorClient:
        place = self.place
        if place.url is not None:
            if place.ca is None:
                raise Refused(
                    "--url needs --ca-file", field="ca", remedy="name the file with the cloud's ca.pem"
                )
            return OperatorClient.tls(
                place.url, ca_file=place.ca, token_file=place.token_file, pki_dir=place.pki_dir
            )
        if place.socket is not None:
            return OperatorClient.unix(place.socket)
        socket = self.surroundings.socket_of_lab(self.lab)
        if not _exists(socket):
            raise Unavailable(
                f"lab {self.lab} is not up",
                field="lab",
                remedy=f"`nahtlos lab up --lab {self.lab}`, or name another cloud with --lab or --url",
            )
        return OperatorClient.unix(socket)

    def warn(self, text: str) -> None:
        """What must not be overlooked, also by who reads JSON."""
        self.err.print(Text(text, style="yellow"))

    def show(self, value: Any, picture: RenderableType) -> None:
        """The command's result: as JSON, or as a picture for people."""
        if self.json:
            self.print_json(value)
        else:
            self.out.print(picture)

    def print_json(self, value: Any, *, indent: int = 2) -> None:
        """`indent` 0 prints one line, for streams of values."""
        encoded = msgspec.json.encode(value)
        text = msgspec.json.format(encoded, indent=indent) if indent else encoded
        sys.stdout.write(text.decode() + "\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        """A remark for people, beside the result."""
        if not self.json:
            self.err.print(Text(text, style="dim"))

    def show_error(self, record: ErrorRecord) -> None:
        if self.json:
            self.print_json({"error": record})
        else:
            self.err.print(error_text(record))


def _console(terminal: bool, *, stderr: bool) -> Console:
    width = None if terminal or "COLUMNS" in os.environ else UNBROKEN
    return Console(stderr=stderr, highlight=False, width=width)


def error_text(record: ErrorRecord) -> Text:
    """Field, message, remedy: what is wrong, and what to do about it."""
    text = Text.assemble(("Error: ", "bold red"))
    if record.field:
        text.append(f"{record.field}: ", style="bold")
    text.append(record.message)
    if record.remedy:
        text.append(f"\n  → {record.remedy}", style="cyan")
    return text


def _exists(socket: Path) -> bool:
    try:
        return socket.exists()
    except PermissionError as error:
        raise Refused(
            f"{socket} is for root alone",
            field="user",
            remedy="run it as root, or reach the cloud over TLS with an operator's credential",
        ) from error


def exit_code_of(error: Error) -> int:
    for kind, code in ((Refused, REFUSED), (Unavailable, UNAVAILABLE), (Stale, STALE)):
        if isinstance(error, kind):
            return code
    return BROKEN


def run(cli: Cli, body: Callable[[], Awaitable[int | None]]) -> int:
    """The exit code of `body`, errors shown."""

    async def main() -> int | None:
        return await body()

    try:
        return asyncio.run(main()) or 0
    except Error as error:
        cli.show_error(ErrorRecord.of(error))
        return exit_code_of(error)
    except KeyboardInterrupt:
        cli.err.print("interrupted")
        return INTERRUPTED


Body = Callable[..., Awaitable[int | None]]


def command(app: typer.Typer, name: str, surroundings: Surroundings) -> Callable[[Body], Body]:
    """Make an async function a command. Its first parameter is the Cli; the others become arguments and
    options as typer reads them, the shared options are added. It may return an exit code."""

    def register(body: Body) -> Body:
        def entry(ctx: typer.Context, **arguments: Any) -> None:
            place = take_place(arguments).over(ctx.find_root().obj or Place())
            cli = Cli(place, surroundings)
            code = run(cli, lambda: body(cli, **arguments))
            if code:
                raise typer.Exit(code)

        own = [
            _completing(parameter, surroundings)
            for parameter in list(inspect.signature(body).parameters.values())[1:]
        ]
        _dress(
            entry,
            [
                inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
                *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
                *place_parameters(from_environment=False),
            ],
        )
        app.command(name, help=inspect.getdoc(body))(entry)
        return body

    return register


def shared_options(app: typer.Typer) -> None:
    """The shared options before a command's name: defaults for every command."""

    def remember(ctx: typer.Context, **arguments: Any) -> None:
        ctx.obj = take_place(arguments)

    _dress(
        remember,
        [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *place_parameters(from_environment=True),
        ],
    )
    app.callback()(remember)


def _dress(function: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """typer reads a function's signature to find its options."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in parameters}


COMPLETION_SECONDS = 1.0


def completer(
    surroundings: Surroundings, ask: Callable[[OperatorClient], Awaitable[list[str]]]
) -> Callable[[typer.Context, str], list[str]]:
    """Completion of names by asking the cloud; silent if it does not answer quickly."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        said = {name: ctx.params.get(name) for name in _OPTIONS}
        before = {name: ctx.find_root().params.get(name) for name in _OPTIONS}
        cli = Cli(Place(**said).over(Place(**before)), surroundings)

        async def names() -> list[str]:
            async with asyncio.timeout(COMPLETION_SECONDS), cli.client() as client:
                return await ask(client)

        try:
            return [name for name in asyncio.run(names()) if name.startswith(incomplete)]
        except (Error, TimeoutError):
            return []

    return complete


async def _host_names(client: OperatorClient) -> list[str]:
    return [h.id for h in await client.hosts()]


async def _server_names(client: OperatorClient) -> list[str]:
    return [s.id for s in await client.servers()]


async def _release_names(client: OperatorClient) -> list[str]:
    return [r.id for r in await client.releases()]


async def _operator_names(client: OperatorClient) -> list[str]:
    return [o.name for o in await client.operators()]


async def _network_names(client: OperatorClient) -> list[str]:
    return [n.id for n in await client.networks.networks()]


async def _subnet_names(client: OperatorClient) -> list[str]:
    return [s.spec.id for s in await client.networks.subnets()]


async def _port_names(client: OperatorClient) -> list[str]:
    return [p.id for p in await client.networks.ports()]


async def _group_names(client: OperatorClient) -> list[str]:
    return [g.spec.id for g in await client.networks.security_groups()]


async def _router_names(client: OperatorClient) -> list[str]:
    return [r.id for r in await client.networks.routers()]


async def _floating_ip_names(client: OperatorClient) -> list[str]:
    return [f.id for f in await client.networks.floating_ips()]


async def _balancer_names(client: OperatorClient) -> list[str]:
    return [b.id for b in await client.networks.load_balancers()]


async def _volume_names(client: OperatorClient) -> list[str]:
    return [v.spec.id for v in await client.volumes.volumes()]


async def _snapshot_names(client: OperatorClient) -> list[str]:
    return [s.spec.id for s in await client.volumes.snapshots()]


async def _backup_names(client: OperatorClient) -> list[str]:
    return [b.spec.id for b in await client.volumes.backups()]


async def _image_names(client: OperatorClient) -> list[str]:
    return [i.id for i in await client.volumes.images()]


async def _project_names(client: OperatorClient) -> list[str]:
    return [p.id for p in await client.projects.projects()]


NAMES = {
    "volume": _volume_names,
    "volumes": _volume_names,
    "snapshot": _snapshot_names,
    "backup": _backup_names,
    "image": _image_names,
    "network": _network_names,
    "subnet": _subnet_names,
    "subnets": _subnet_names,
    "port": _port_names,
    "group": _group_names,
    "remote_group": _group_names,
    "security_group": _group_names,
    "router": _router_names,
    "floating_ip": _floating_ip_names,
    "balancer": _balancer_names,
    "host": _host_names,
    "to": _host_names,
    "server": _server_names,
    "release": _release_names,
    "operator": _operator_names,
    "project": _project_names,
}
"""What a command's argument or option of this name is completed with."""


def _completing(parameter: inspect.Parameter, surroundings: Surroundings) -> inspect.Parameter:
    ask = NAMES.get(parameter.name)
    if ask is None:
        return parameter
    kind, known = get_args(parameter.annotation)
    known = copy.copy(known)
    known.autocompletion = completer(surroundings, ask)
    return parameter.replace(annotation=Annotated[kind, known])
