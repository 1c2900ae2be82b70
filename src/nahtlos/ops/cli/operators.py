"""`nahtlos operator …`: who may use the operator API from elsewhere.

A token goes from the orchestrator's root-only socket into a file of mode 0600 and nowhere else: it is never
printed, neither for people nor as JSON.
"""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from nahtlos.model.errors import Conflict, Refused
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command

Name = Annotated[str, typer.Argument(metavar="OPERATOR")]


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """Where what an operator needs was written to."""

    name: str
    token_file: str
    ca_file: str | None


def operator_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(
        no_args_is_help=True, help="Operators elsewhere: who may call over TLS. For root on the orchestrator."
    )

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All operators, and how many tokens each has."""
        async with cli.client() as client:
            listed = await client.operators()
        cli.show(listed, pictures.operators(listed))

    @command(app, "add", surroundings)
    async def add(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        operator: Name,
        out: Annotated[Path, typer.Option(help="New file for the token, mode 0600.", show_default=False)],
        ca_out: Annotated[
            Path | None, typer.Option(help="New file for the cloud's certificate, for --ca-file.")
        ] = None,
    ) -> None:
        """Give OPERATOR a token; those it has stay valid."""
        with contextlib.ExitStack() as files:
            token_file = files.enter_context(_new_file(out, "out", 0o600))
            certificate = files.enter_context(_new_file(ca_out, "ca_out", 0o644)) if ca_out else None
            async with cli.client() as client:
                given = await client.add_operator(operator)
            _write(token_file, given.token)
            if certificate is not None:
                _write(certificate, given.ca_pem)
        added = Added(name=operator, token_file=str(out), ca_file=str(ca_out) if ca_out else None)
        told = f"{operator} may call with --token-file {out}"
        cli.show(added, Text(f"{told} --ca-file {ca_out}" if ca_out else told))

    @command(app, "remove", surroundings)
    async def remove(cli: Cli, operator: Name) -> None:  # pyright: ignore[reportUnusedFunction]
        """Withdraw all tokens and certificates of OPERATOR, at once."""
        async with cli.client() as client:
            await client.remove_operator(operator)
        cli.show({"name": operator, "removed": True}, Text(f"{operator} is no operator any more"))

    return app


@contextlib.contextmanager
def _new_file(path: Path, field: str, mode: int) -> Generator[int]:
    """A descriptor of a file that did not exist; gone again if what it is for fails. Made before anything
    is asked of the cloud, so that no token is given that cannot be kept."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except FileExistsError as error:
        raise Conflict(f"{path} exists", field=field, remedy="name a new file") from error
    except OSError as error:
        raise Refused(
            f"cannot write {path}: {error.strerror}", field=field, remedy="name a file in a folder of yours"
        ) from error
    try:
        os.fchmod(descriptor, mode)
        yield descriptor
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _write(descriptor: int, text: str) -> None:
    content = text.rstrip("\n").encode() + b"\n"
    while content:
        content = content[os.write(descriptor, content) :]
    os.fsync(descriptor)
