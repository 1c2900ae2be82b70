"""Waiting until hosts have converged to what was asked of the virtual network, and how options for it are
said."""

from typing import Annotated

import typer

from nahtlos.ops.cli.command import Cli
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.networks import Settling

Project = Annotated[str, typer.Option(help="Whose it is.")]
Wait = Annotated[bool, typer.Option(help="Wait until every connected host has converged to it.")]
Deadline = Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)]
DEADLINE = 30.0


async def settle(cli: Cli, client: OperatorClient, what: str, *, wait: bool, deadline: float) -> None:
    if not wait:
        return
    settled = await wait_until(cli, what, client.networks.settling, _done, _standing, deadline=deadline)
    if settled.away:
        cli.say(f"not connected, and told when they are back: {', '.join(settled.away)}")


def _done(seen: Settling) -> bool:
    return set(seen.hosts) <= set(seen.away)


def _standing(seen: Settling) -> str:
    return f"{', '.join(h for h in seen.hosts if h not in seen.away)} not yet converged"
