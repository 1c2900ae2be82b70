"""`nahtlos router …` and `nahtlos floating-ip …`"""

from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import FloatingIpId, HostId, PortId, ProjectId, RouterId, SubnetId
from nahtlos.model.networking import Route, RouterGateway
from nahtlos.ops.cli import network_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.settled import DEADLINE, Deadline, Project, Wait, settle
from nahtlos.runtime.controllers.networks import Assignment, FloatingIpRequest, RouterChange, RouterRequest

Router = Annotated[str, typer.Argument(metavar="ROUTER")]
FloatingIp = Annotated[str, typer.Argument(metavar="FLOATING-IP")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Subnets = Annotated[list[str], typer.Argument(metavar="SUBNET...")]
Destination = Annotated[str, typer.Argument(metavar="DESTINATION", help="Prefix.")]
NextHop = Annotated[str, typer.Argument(metavar="NEXT-HOP", help="Address in an attached subnet.")]


def router_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Routers between subnets, and to the outside.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All routers."""
        async with cli.client() as client:
            values = await client.networks.routers()
        cli.show(values, pictures.routers(values))

    @command(app, "show", surroundings)
    async def show(cli: Cli, router: Router) -> None:  # pyright: ignore[reportUnusedFunction]
        """One router: subnets, routes, gateway."""
        async with cli.client() as client:
            value = await client.networks.router(RouterId(router))
        cli.show(value, pictures.router(value))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Name,
        subnet: Annotated[list[str] | None, typer.Option(help="Attach it (repeat).")] = None,
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Create a router. It routes between its subnets on every host."""
        request = RouterRequest(
            name=name, subnets=tuple(SubnetId(s) for s in subnet or ()), project=ProjectId(project)
        )
        async with cli.client() as client:
            value = await client.networks.create_router(request)
            await settle(cli, client, f"router {name} is made", wait=wait, deadline=deadline)
        cli.show(value, pictures.router(value))

    @command(app, "attach", surroundings)
    async def attach(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, router: Router, subnets: Subnets, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Attach subnets: the router answers at their gateway addresses."""
        change = RouterChange(attach=tuple(SubnetId(s) for s in subnets))
        await _change(cli, router, change, wait=wait, deadline=deadline)

    @command(app, "detach", surroundings)
    async def detach(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, router: Router, subnets: Subnets, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Detach subnets."""
        change = RouterChange(detach=tuple(SubnetId(s) for s in subnets))
        await _change(cli, router, change, wait=wait, deadline=deadline)

    @command(app, "set", surroundings)
    async def set_(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        router: Router,
        gateway_host: Annotated[str, typer.Option(help="Edge host to lead out at.", show_default=False)],
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Move the way out to another edge host; its address and all connections stay."""
        async with cli.client() as client:
            gateway = (await client.networks.router(RouterId(router))).gateway
            if gateway is None:
                raise Conflict(
                    f"{router} has no way out",
                    field="gateway_host",
                    remedy=f"nahtlos router gateway set {router} --host {gateway_host} --address ADDRESS",
                )
            moved = RouterGateway(host=HostId(gateway_host), address=gateway.address, snat=gateway.snat)
            value = await client.networks.change_router(RouterId(router), RouterChange(gateway=moved))
            text = f"the way out of {router} moves to {gateway_host}"
            await settle(cli, client, text, wait=wait, deadline=deadline)
        cli.show(value, pictures.router(value))

    @command(app, "delete", surroundings)
    async def delete(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, router: Router, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Delete a router with no subnets and no floating IPs."""
        async with cli.client() as client:
            await client.networks.delete_router(RouterId(router))
            await settle(cli, client, f"router {router} is deleted", wait=wait, deadline=deadline)
        cli.show({"id": router, "deleted": True}, Text(f"router {router} deleted"))

    app.add_typer(_route_commands(surroundings), name="route")
    app.add_typer(_gateway_commands(surroundings), name="gateway")
    return app


def _route_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Static routes of a router.")

    @command(app, "add", surroundings)
    async def add(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        router: Router,
        destination: Destination,
        next_hop: NextHop,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Send what is for DESTINATION to NEXT-HOP."""
        change = RouterChange(add_routes=(Route(destination=destination, next_hop=next_hop),))
        await _change(cli, router, change, wait=wait, deadline=deadline)

    @command(app, "remove", surroundings)
    async def remove(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        router: Router,
        destination: Destination,
        next_hop: NextHop,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Take a static route away."""
        change = RouterChange(remove_routes=(Route(destination=destination, next_hop=next_hop),))
        await _change(cli, router, change, wait=wait, deadline=deadline)

    return app


def _gateway_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="A router's way out, at an edge host.")

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        router: Router,
        host: Annotated[str, typer.Option(help="Edge host.", show_default=False)],
        address: Annotated[str, typer.Option(help="Outside address of the router.", show_default=False)],
        snat: Annotated[bool, typer.Option(help="Connections from inside come from that address.")] = True,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Lead out at HOST by ADDRESS."""
        gateway = RouterGateway(host=HostId(host), address=address, snat=snat)
        await _change(cli, router, RouterChange(gateway=gateway), wait=wait, deadline=deadline)

    @command(app, "unset", surroundings)
    async def unset(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, router: Router, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Take the way out away."""
        await _change(cli, router, RouterChange(gateway=None), wait=wait, deadline=deadline)

    return app


async def _change(cli: Cli, router: str, change: RouterChange, *, wait: bool, deadline: float) -> None:
    async with cli.client() as client:
        value = await client.networks.change_router(RouterId(router), change)
        await settle(cli, client, f"router {router} changes", wait=wait, deadline=deadline)
    cli.show(value, pictures.router(value))


def floating_ip_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Floating IPs: outside addresses that lead to ports.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All floating IPs, and where they lead."""
        async with cli.client() as client:
            values = await client.networks.floating_ips()
        cli.show(values, pictures.floating_ips(values))

    @command(app, "show", surroundings)
    async def show(cli: Cli, floating_ip: FloatingIp) -> None:  # pyright: ignore[reportUnusedFunction]
        """One floating IP."""
        async with cli.client() as client:
            value = await client.networks.floating_ip(FloatingIpId(floating_ip))
        cli.show(value, pictures.floating_ips((value,)))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Name,
        address: Annotated[str, typer.Option(help="Of the outside.", show_default=False)],
        port: Annotated[str | None, typer.Option(help="Assign it at once.")] = None,
        fixed_ip: Annotated[str, typer.Option(help="Which address of the port.")] = "",
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Take up an outside address."""
        request = FloatingIpRequest(
            name=name,
            address=address,
            port=PortId(port) if port else None,
            fixed_ip=fixed_ip,
            project=ProjectId(project),
        )
        async with cli.client() as client:
            value = await client.networks.create_floating_ip(request)
            await settle(cli, client, f"{name} is made", wait=wait, deadline=deadline)
        cli.show(value, pictures.floating_ips((value,)))

    @command(app, "assign", surroundings)
    async def assign(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        floating_ip: FloatingIp,
        port: Annotated[str, typer.Argument(metavar="PORT")],
        fixed_ip: Annotated[str, typer.Option(help="Which address of the port.")] = "",
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Let it lead to PORT; where it led before, it leads no more."""
        asked = Assignment(port=PortId(port), fixed_ip=fixed_ip)
        await _assign(cli, floating_ip, asked, wait=wait, deadline=deadline)

    @command(app, "unassign", surroundings)
    async def unassign(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, floating_ip: FloatingIp, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Let it lead nowhere; it stays yours."""
        await _assign(cli, floating_ip, Assignment(), wait=wait, deadline=deadline)

    @command(app, "delete", surroundings)
    async def delete(cli: Cli, floating_ip: FloatingIp) -> None:  # pyright: ignore[reportUnusedFunction]
        """Give an unassigned floating IP back."""
        async with cli.client() as client:
            await client.networks.delete_floating_ip(FloatingIpId(floating_ip))
        cli.show({"id": floating_ip, "deleted": True}, Text(f"floating IP {floating_ip} deleted"))

    return app


async def _assign(cli: Cli, floating_ip: str, asked: Assignment, *, wait: bool, deadline: float) -> None:
    async with cli.client() as client:
        value = await client.networks.assign_floating_ip(FloatingIpId(floating_ip), asked)
        await settle(cli, client, f"{floating_ip} changes", wait=wait, deadline=deadline)
    cli.show(value, pictures.floating_ips((value,)))
