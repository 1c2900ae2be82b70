"""`nahtlos network …` and `nahtlos subnet …`"""

from typing import Annotated

import msgspec
import typer
from rich.text import Text

from nahtlos.model.config import UnderlayShares
from nahtlos.model.errors import Refused
from nahtlos.model.ids import NetworkId, ProjectId, SubnetId
from nahtlos.model.topology import MoveCompression, Underlay
from nahtlos.ops.cli import amounts
from nahtlos.ops.cli import network_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.settled import DEADLINE, Deadline, Project, Wait, settle
from nahtlos.runtime.controllers.networks import NetworkChange, NetworkRequest, SubnetChange, SubnetRequest

Network = Annotated[str, typer.Argument(metavar="NETWORK")]
Subnet = Annotated[str, typer.Argument(metavar="SUBNET")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
NO_GATEWAY = "none"


def network_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Networks: where servers have their ports.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All networks."""
        async with cli.client() as client:
            views = await client.networks.networks()
        cli.show(views, pictures.networks(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, network: Network) -> None:  # pyright: ignore[reportUnusedFunction]
        """One network with its subnets, ports and load balancers."""
        async with cli.client() as client:
            view = await client.networks.network(NetworkId(network))
        cli.show(view, pictures.network(view))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Name,
        cidr: Annotated[str, typer.Option(help="IPv4 range of its first subnet.", show_default=False)],
        mtu: Annotated[int, typer.Option(help="0: 1500, or what the underlay leaves.", min=0)] = 0,
        gateway: Annotated[
            str | None, typer.Option(help="Gateway address; the first one if left out.")
        ] = None,
        provider_interface: Annotated[
            str, typer.Option(help="Interface of every host: the network is one with the outside one there.")
        ] = "",
        vlan: Annotated[int, typer.Option(help="Its tag at that interface; 0: none.", min=0)] = 0,
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Create a network with its first subnet. It has no way out until a router is attached, unless an
        interface of every host leads to an outside network that it is one with."""
        request = NetworkRequest(
            name=name,
            cidr=cidr,
            mtu=mtu,
            gateway_ip=gateway,
            provider_interface=provider_interface,
            vlan=vlan,
            project=ProjectId(project),
        )
        async with cli.client() as client:
            view = await client.networks.create_network(request)
            await settle(cli, client, f"network {name} is made", wait=wait, deadline=deadline)
        cli.show(view, pictures.network(view))

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        network: Network,
        mtu: Annotated[
            int, typer.Option(help="Told to servers by DHCP when they ask next.", show_default=False)
        ],
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Change a network's MTU."""
        async with cli.client() as client:
            view = await client.networks.change_network(NetworkId(network), NetworkChange(mtu=mtu))
            await settle(cli, client, f"network {network} changes", wait=wait, deadline=deadline)
        cli.show(view, pictures.network(view))

    @command(app, "delete", surroundings)
    async def delete(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, network: Network, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Delete a network that nothing uses, with its subnets."""
        async with cli.client() as client:
            await client.networks.delete_network(NetworkId(network))
            await settle(cli, client, f"network {network} is deleted", wait=wait, deadline=deadline)
        cli.show({"id": network, "deleted": True}, Text(f"network {network} deleted"))

    app.add_typer(_underlay_commands(surroundings), name="underlay")
    return app


def _underlay_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="What hosts are connected by: its MTU and how it is shared.")

    @command(app, "show", surroundings)
    async def show(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """What is known of the underlay, and its shares."""
        async with cli.client() as client:
            value = await client.networks.underlay()
        cli.show(value, pictures.underlay(value))

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        rate: Annotated[str | None, typer.Option(help="Of a host's interface, as 10G.")] = None,
        control: Annotated[int | None, typer.Option(help="Percent for agents and volumes.")] = None,
        moves: Annotated[int | None, typer.Option(help="Percent for servers that move.")] = None,
        tenants: Annotated[int | None, typer.Option(help="Percent for servers' traffic.")] = None,
        mtu: Annotated[int | None, typer.Option(help="Of the underlay; 0: not known.")] = None,
        move_channels: Annotated[
            int | None,
            typer.Option(
                help="Connections a server's memory is sent by; more where one does not fill a link."
            ),
        ] = None,
        compress_moves: Annotated[
            MoveCompression | None,
            typer.Option(help="A server's memory as it is sent; auto: where moves get little of a link."),
        ] = None,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Share the underlay: when it is full, each gets its percentage, and what one leaves the others."""
        async with cli.client() as client:
            before = await client.networks.underlay()
            after = Underlay(
                mtu=before.mtu if mtu is None else mtu,
                move_channels=before.move_channels if move_channels is None else move_channels,
                move_compression=before.move_compression if compress_moves is None else compress_moves,
                shares=_shares(before.shares, rate, control=control, moves=moves, tenants=tenants),
            )
            value = await client.networks.set_underlay(after)
            await settle(cli, client, "the underlay is shared", wait=wait, deadline=deadline)
        cli.show(value, pictures.underlay(value))

    @command(app, "unset", surroundings)
    async def unset(cli: Cli, wait: Wait = True, deadline: Deadline = DEADLINE) -> None:  # pyright: ignore[reportUnusedFunction]
        """Leave the underlay's interface alone again; what is known of its MTU stays."""
        async with cli.client() as client:
            before = await client.networks.underlay()
            value = await client.networks.set_underlay(msgspec.structs.replace(before, shares=None))
            await settle(cli, client, "the underlay is left alone", wait=wait, deadline=deadline)
        cli.show(value, pictures.underlay(value))

    return app


def _shares(before: UnderlayShares | None, rate: str | None, **percent: int | None) -> UnderlayShares | None:
    """`before` with what was said; a rate is what begins it."""
    said = {name: value for name, value in percent.items() if value is not None}
    if rate is None:
        if said and before is None:
            raise Refused("shares of an unknown rate", field="rate", remedy="give --rate, too, as 10G")
        return msgspec.structs.replace(before, **said) if before is not None else None
    parsed = amounts.rate(rate, "rate")
    if parsed is None:
        raise Refused("no rate to share", field="rate", remedy="nahtlos network underlay unset")
    bits = parsed.bits_per_second
    if before is None:
        return UnderlayShares(bits_per_second=bits, **said)
    return msgspec.structs.replace(before, bits_per_second=bits, **said)


def subnet_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Subnets: further address ranges of networks.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All subnets; a network's first one has its name."""
        async with cli.client() as client:
            views = await client.networks.subnets()
        cli.show(views, pictures.subnets(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, subnet: Subnet) -> None:  # pyright: ignore[reportUnusedFunction]
        """One subnet."""
        async with cli.client() as client:
            view = await client.networks.subnet(SubnetId(subnet))
        cli.show(view, pictures.subnets((view,)))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Name,
        network: Annotated[str, typer.Option(show_default=False)],
        cidr: Annotated[str, typer.Option(help="IPv4 or IPv6 range.", show_default=False)],
        gateway: Annotated[
            str | None, typer.Option(help="Gateway address, or none; the first one if left out.")
        ] = None,
        dhcp: Annotated[bool, typer.Option(help="IPv6: router advertisements, too.")] = True,
        dns: Annotated[list[str] | None, typer.Option(help="Name server told to servers.")] = None,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Add a range of addresses to a network."""
        request = SubnetRequest(
            name=name,
            network=NetworkId(network),
            cidr=cidr,
            gateway_ip="" if gateway == NO_GATEWAY else gateway,
            dhcp=dhcp,
            dns=tuple(dns or ()),
        )
        async with cli.client() as client:
            view = await client.networks.create_subnet(request)
            await settle(cli, client, f"subnet {name} is made", wait=wait, deadline=deadline)
        cli.show(view, pictures.subnets((view,)))

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        subnet: Subnet,
        gateway: Annotated[str | None, typer.Option(help="Gateway address, or none.")] = None,
        dhcp: Annotated[bool | None, typer.Option("--dhcp/--no-dhcp", show_default=False)] = None,
        dns: Annotated[list[str] | None, typer.Option(help="All of them; none: the network's.")] = None,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Change a subnet's gateway, DHCP or name servers."""
        asked = SubnetChange(
            gateway_ip=msgspec.UNSET if gateway is None else "" if gateway == NO_GATEWAY else gateway,
            dhcp=msgspec.UNSET if dhcp is None else dhcp,
            dns=msgspec.UNSET if not dns else () if dns == ["none"] else tuple(dns),
        )
        async with cli.client() as client:
            view = await client.networks.change_subnet(SubnetId(subnet), asked)
            await settle(cli, client, f"subnet {subnet} changes", wait=wait, deadline=deadline)
        cli.show(view, pictures.subnets((view,)))

    @command(app, "delete", surroundings)
    async def delete(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, subnet: Subnet, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Delete a subnet that nothing uses."""
        async with cli.client() as client:
            await client.networks.delete_subnet(SubnetId(subnet))
            await settle(cli, client, f"subnet {subnet} is deleted", wait=wait, deadline=deadline)
        cli.show({"id": subnet, "deleted": True}, Text(f"subnet {subnet} deleted"))

    return app
