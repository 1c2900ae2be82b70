"""`nahtlos security-group …`"""

from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import NotFound
from nahtlos.model.ids import ProjectId, SecurityGroupId
from nahtlos.model.networking import Direction, Family, SecurityRule
from nahtlos.ops.cli import amounts
from nahtlos.ops.cli import network_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.settled import DEADLINE, Deadline, Project, Wait, settle
from nahtlos.runtime.controllers.networks import SecurityGroupRequest, SecurityGroupView

Group = Annotated[str, typer.Argument(metavar="GROUP")]


def security_group_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Security groups: what may come and go at ports.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All security groups."""
        async with cli.client() as client:
            views = await client.networks.security_groups()
        cli.show(views, pictures.groups(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, group: Group) -> None:  # pyright: ignore[reportUnusedFunction]
        """One group: its rules, and the ports in it."""
        async with cli.client() as client:
            view = await client.networks.security_group(SecurityGroupId(group))
        cli.show(view, pictures.group(view))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        stateful: Annotated[bool, typer.Option(help="Answers to what was allowed pass.")] = True,
        empty: Annotated[bool, typer.Option("--empty", help="Not even outward traffic is allowed.")] = False,
        project: Project = "default",
    ) -> None:
        """Create a group: everything may go out, nothing may come in but answers."""
        request = SecurityGroupRequest(
            name=name, stateful=stateful, rules=() if empty else None, project=ProjectId(project)
        )
        async with cli.client() as client:
            view = await client.networks.create_security_group(request)
        cli.show(view, pictures.group(view))

    @command(app, "delete", surroundings)
    async def delete(cli: Cli, group: Group) -> None:  # pyright: ignore[reportUnusedFunction]
        """Delete a group that nothing uses."""
        async with cli.client() as client:
            await client.networks.delete_security_group(SecurityGroupId(group))
        cli.show({"id": group, "deleted": True}, Text(f"security group {group} deleted"))

    app.add_typer(_rule_commands(surroundings), name="rule")
    return app


def _rule_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Rules of a group. Each allows; the rest is dropped.")

    @command(app, "add", surroundings)
    async def add(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        group: Group,
        direction: Annotated[Direction, typer.Option(help="ingress: to servers in it.")] = Direction.INGRESS,
        family: Annotated[
            Family | None, typer.Option(help="Of the other side's prefix, or ipv4.", show_default=False)
        ] = None,
        protocol: Annotated[str, typer.Option(help="tcp, udp, icmp, any, or a number.")] = "any",
        ports: Annotated[
            str | None, typer.Option("--port", help="80 or 8000-8099; for icmp 8 or 8/0.")
        ] = None,
        remote: Annotated[str, typer.Option(help="Prefix of the other side; anywhere if left out.")] = "",
        remote_group: Annotated[
            str | None, typer.Option(help="Addresses of all ports in that group, instead.")
        ] = None,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Allow something. Takes effect on all ports of the group, also on what is going on there."""
        low, high = amounts.numbers(ports, "port") if ports else (None, None)
        rule = SecurityRule(
            direction=direction,
            family=family or (Family.IPV6 if ":" in remote else Family.IPV4),
            protocol=protocol,
            port_min=low,
            port_max=high,
            remote_cidr=remote,
            remote_group=SecurityGroupId(remote_group) if remote_group else None,
        )
        async with cli.client() as client:
            view = await client.networks.add_rule(SecurityGroupId(group), rule)
            await settle(cli, client, f"{group} changes", wait=wait, deadline=deadline)
        cli.show(view, pictures.group(view))

    @command(app, "remove", surroundings)
    async def remove(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        group: Group,
        number: Annotated[int, typer.Argument(metavar="NUMBER", help="As `show` numbers them.")],
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Take a rule away. What only it allowed ends, also what is going on."""
        async with cli.client() as client:
            before = await client.networks.security_group(SecurityGroupId(group))
            view = await client.networks.remove_rule(SecurityGroupId(group), _rule(before, number))
            await settle(cli, client, f"{group} changes", wait=wait, deadline=deadline)
        cli.show(view, pictures.group(view))

    return app


def _rule(view: SecurityGroupView, number: int) -> SecurityRule:
    """The rule itself is what is removed: the number may mean another one by then."""
    if not 1 <= number <= len(view.spec.rules):
        raise NotFound(
            f"{view.spec.id} has no rule {number}",
            field="number",
            remedy=f"it has {len(view.spec.rules)}: nahtlos security-group show {view.spec.id}",
        )
    return view.spec.rules[number - 1]
