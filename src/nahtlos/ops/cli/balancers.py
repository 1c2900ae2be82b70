"""`nahtlos load-balancer …`"""

from typing import Annotated

import msgspec
import typer
from rich.text import Text

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import HostId, LoadBalancerId, NetworkId, ProjectId
from nahtlos.model.networking import HealthCheck, LoadBalancerSpec, Member
from nahtlos.ops.cli import amounts
from nahtlos.ops.cli import network_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.settled import DEADLINE, Deadline, Project, Wait, settle
from nahtlos.runtime.controllers.networks import LoadBalancerChange, LoadBalancerRequest, MemberName

Balancer = Annotated[str, typer.Argument(metavar="LOAD-BALANCER")]
MemberArgument = Annotated[str, typer.Argument(metavar="ADDRESS:PORT")]
Milliseconds = Annotated[int | None, typer.Option(min=1, show_default=False)]
Count = Annotated[int | None, typer.Option(min=1, show_default=False)]


def load_balancer_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Load balancers of TCP connections inside a network.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All load balancers."""
        async with cli.client() as client:
            values = await client.networks.load_balancers()
        cli.show(values, pictures.balancers(values))

    @command(app, "show", surroundings)
    async def show(cli: Cli, balancer: Balancer) -> None:  # pyright: ignore[reportUnusedFunction]
        """One load balancer and its members."""
        async with cli.client() as client:
            value = await client.networks.load_balancer(LoadBalancerId(balancer))
        cli.show(value, pictures.balancer(value))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        network: Annotated[str, typer.Option(show_default=False)],
        listen: Annotated[int, typer.Option("--port", help="TCP port it listens at.", show_default=False)],
        vip: Annotated[str, typer.Option(help="Its address; a free one if left out.")] = "",
        host: Annotated[str | None, typer.Option(help="Carry it on this host.")] = None,
        member: Annotated[list[str] | None, typer.Option(help="ADDRESS:PORT (repeat).")] = None,
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Balance connections to an address of a network among its members."""
        request = LoadBalancerRequest(
            name=name,
            network=NetworkId(network),
            port=listen,
            vip=vip,
            host=HostId(host) if host else None,
            members=tuple(_member(text) for text in member or ()),
            project=ProjectId(project),
        )
        async with cli.client() as client:
            value = await client.networks.create_load_balancer(request)
            await settle(cli, client, f"load balancer {name} is made", wait=wait, deadline=deadline)
        cli.show(value, pictures.balancer(value))

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        balancer: Balancer,
        host: Annotated[str | None, typer.Option(help="Carry it on this host.")] = None,
        interval_ms: Milliseconds = None,
        timeout_ms: Milliseconds = None,
        fall: Count = None,
        rise: Count = None,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Change the host that carries it, or how members are checked."""
        health = {"interval_ms": interval_ms, "timeout_ms": timeout_ms, "fall": fall, "rise": rise}
        async with cli.client() as client:
            before = await client.networks.load_balancer(LoadBalancerId(balancer))
            asked = LoadBalancerChange(
                host=HostId(host) if host else msgspec.UNSET, health=_health(before.health, health)
            )
            value = await client.networks.change_load_balancer(LoadBalancerId(balancer), asked)
            await settle(cli, client, f"{balancer} changes", wait=wait, deadline=deadline)
        cli.show(value, pictures.balancer(value))

    @command(app, "delete", surroundings)
    async def delete(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, balancer: Balancer, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Delete a load balancer. Its connections end."""
        async with cli.client() as client:
            await client.networks.delete_load_balancer(LoadBalancerId(balancer))
            await settle(cli, client, f"{balancer} is deleted", wait=wait, deadline=deadline)
        cli.show({"id": balancer, "deleted": True}, Text(f"load balancer {balancer} deleted"))

    app.add_typer(_member_commands(surroundings), name="member")
    return app


def _health(before: HealthCheck, said: dict[str, int | None]) -> HealthCheck | msgspec.UnsetType:
    given = {name: value for name, value in said.items() if value is not None}
    return msgspec.structs.replace(before, **given) if given else msgspec.UNSET


def _member_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Members: who gets the connections.")

    @command(app, "add", surroundings)
    async def add(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        balancer: Balancer,
        member: MemberArgument,
        weight: Annotated[int, typer.Option(help="Its share beside the others' weights; 0: none.")] = 1,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Add a member."""
        change = LoadBalancerChange(put_members=(_member(member, weight),))
        await _change(cli, balancer, change, wait=wait, deadline=deadline)

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        balancer: Balancer,
        member: MemberArgument,
        weight: Annotated[int | None, typer.Option(help="Its share beside the others' weights.")] = None,
        drain: Annotated[
            bool | None,
            typer.Option("--drain/--no-drain", help="It keeps its connections and gets no new ones."),
        ] = None,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Change a member's weight, or drain it."""
        if weight is None and drain is None:
            raise Refused("nothing to change", field="member", remedy="give --weight or --drain")
        async with cli.client() as client:
            before = _known(await client.networks.load_balancer(LoadBalancerId(balancer)), member)
        after = msgspec.structs.replace(
            before,
            weight=before.weight if weight is None else weight,
            draining=before.draining if drain is None else drain,
        )
        await _change(cli, balancer, LoadBalancerChange(put_members=(after,)), wait=wait, deadline=deadline)

    @command(app, "remove", surroundings)
    async def remove(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, balancer: Balancer, member: MemberArgument, wait: Wait = True, deadline: Deadline = DEADLINE
    ) -> None:
        """Remove a member; its connections end. Drain it first to keep them."""
        address, port = amounts.host_and_port(member, "member")
        change = LoadBalancerChange(remove_members=(MemberName(address=address, port=port),))
        await _change(cli, balancer, change, wait=wait, deadline=deadline)

    return app


def _member(text: str, weight: int = 1) -> Member:
    address, port = amounts.host_and_port(text, "member")
    return Member(address=address, port=port, weight=weight)


def _known(value: LoadBalancerSpec, text: str) -> Member:
    address, port = amounts.host_and_port(text, "member")
    for member in value.members:
        if (member.address, member.port) == (address, port):
            return member
    raise NotFound(
        f"{value.id} has no member {text}",
        field="member",
        remedy=f"nahtlos load-balancer show {value.id} lists them",
    )


async def _change(
    cli: Cli, balancer: str, change: LoadBalancerChange, *, wait: bool, deadline: float
) -> None:
    async with cli.client() as client:
        value = await client.networks.change_load_balancer(LoadBalancerId(balancer), change)
        await settle(cli, client, f"{balancer} changes", wait=wait, deadline=deadline)
    cli.show(value, pictures.balancer(value))
