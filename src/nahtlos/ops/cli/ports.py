"""`nahtlos port …`"""

from typing import Annotated

import msgspec
import typer

from nahtlos.model.errors import Refused
from nahtlos.model.ids import PortId, SecurityGroupId
from nahtlos.model.networking import AddressPair, Direction, Rate
from nahtlos.ops.cli import amounts
from nahtlos.ops.cli import network_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.settled import DEADLINE, Deadline, Wait, settle
from nahtlos.runtime.controllers.networks import PortChange, TraceRequest

Port = Annotated[str, typer.Argument(metavar="PORT")]
NONE = ["none"]


def port_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Ports: servers' connections to networks.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All ports, where they are and what holds for them."""
        async with cli.client() as client:
            views = await client.networks.ports()
        cli.show(views, pictures.ports(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, port: Port) -> None:  # pyright: ignore[reportUnusedFunction]
        """One port."""
        async with cli.client() as client:
            view = await client.networks.port(PortId(port))
        cli.show(view, pictures.port(view))

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        port: Port,
        ingress: Annotated[str | None, typer.Option(help="What it may receive: 50M, 1G, or none.")] = None,
        egress: Annotated[str | None, typer.Option(help="What it may send: 50M, 1G, or none.")] = None,
        burst: Annotated[str | None, typer.Option(help="Bytes at once, of the rates given: 64k, 1M.")] = None,
        security_group: Annotated[
            list[str] | None, typer.Option(help="All it is in (repeat); none: no group, open.")
        ] = None,
        allowed_pair: Annotated[
            list[str] | None,
            typer.Option(help="All it may also send from (repeat): CIDR or CIDR,MAC; or none."),
        ] = None,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Change a port's bandwidth, security groups or allowed pairs while its server runs."""
        asked = _change(ingress, egress, burst, security_group, allowed_pair)
        async with cli.client() as client:
            view = await client.networks.change_port(PortId(port), asked)
            await settle(cli, client, f"port {port} changes", wait=wait, deadline=deadline)
        cli.show(view, pictures.port(view))

    @command(app, "trace", surroundings)
    async def trace(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        port: Port,
        address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The other side.")],
        protocol: Annotated[str, typer.Option(help="tcp, udp, icmp, any, or a number.")] = "icmp",
        number: Annotated[
            int | None, typer.Option("--port", help="Destination port; for icmp the type.")
        ] = None,
        direction: Annotated[
            Direction, typer.Option(help="egress: from PORT to ADDRESS; ingress: the other way.")
        ] = Direction.EGRESS,
        source: Annotated[str, typer.Option(help="Address of PORT; the one that fits if left out.")] = "",
    ) -> None:
        """Explain what would happen to a packet that begins a connection, rule by rule."""
        request = TraceRequest(
            port=PortId(port),
            address=address,
            direction=direction,
            protocol=protocol,
            number=number,
            source=source,
        )
        async with cli.client() as client:
            value = await client.networks.trace(request)
        cli.show(value, pictures.trace(value))

    return app


def _change(
    ingress: str | None,
    egress: str | None,
    burst: str | None,
    groups: list[str] | None,
    pairs: list[str] | None,
) -> PortChange:
    if all(said is None for said in (ingress, egress, groups, pairs)):
        if burst is not None:
            raise Refused("a burst without a rate", field="burst", remedy="give --ingress or --egress, too")
        raise Refused("nothing to change", field="port", remedy="see nahtlos port set --help")
    return PortChange(
        ingress=_rate(ingress, "ingress", burst),
        egress=_rate(egress, "egress", burst),
        security_groups=msgspec.UNSET if groups is None else _groups(groups),
        allowed_pairs=msgspec.UNSET if pairs is None else _pairs(pairs),
    )


def _rate(text: str | None, field: str, burst: str | None) -> Rate | msgspec.UnsetType | None:
    if text is None:
        return msgspec.UNSET
    return amounts.rate(text, field, amounts.octets(burst, "burst") if burst else 0)


def _groups(said: list[str]) -> tuple[SecurityGroupId, ...]:
    return () if said == NONE else tuple(SecurityGroupId(group) for group in said)


def _pairs(said: list[str]) -> tuple[AddressPair, ...]:
    return () if said == NONE else tuple(amounts.pair(text) for text in said)
