"""`nahtlos server-group …`"""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from nahtlos.model.ids import ProjectId, ServerGroupId
from nahtlos.model.placement import GroupPolicy
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.pictures import GOOD, NOTHING, WARN, facts, table
from nahtlos.ops.cli.settled import Project
from nahtlos.runtime.controllers.placement import ServerGroupRequest, ServerGroupView

Group = Annotated[str, typer.Argument(metavar="GROUP")]


def server_group_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Server groups: which servers are together and which apart.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All server groups, and where their members are."""
        async with cli.client() as client:
            views = await client.placement.server_groups()
        cli.show(views, _groups(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, group: Group) -> None:  # pyright: ignore[reportUnusedFunction]
        """One server group."""
        async with cli.client() as client:
            view = await client.placement.server_group(ServerGroupId(group))
        cli.show(view, _group(view))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        policy: Annotated[
            GroupPolicy, typer.Option(help="What holds among its members.", show_default=False)
        ],
        project: Project = "default",
    ) -> None:
        """Make a server group. Servers are put into it as they are created: server create --group NAME."""
        request = ServerGroupRequest(name=name, policy=policy, project=ProjectId(project))
        async with cli.client() as client:
            view = await client.placement.create_server_group(request)
        cli.show(view, _group(view))

    @command(app, "delete", surroundings)
    async def delete(cli: Cli, group: Group) -> None:  # pyright: ignore[reportUnusedFunction]
        """Delete a server group that no server is in."""
        async with cli.client() as client:
            view = await client.placement.delete_server_group(ServerGroupId(group))
        cli.show(view, Text(f"{group} deleted"))

    return app


def _groups(views: Sequence[ServerGroupView]) -> RenderableType:
    columns = ("Server group", "Policy", "Project", "Members", "As it should be")
    rows = ((view.id, view.policy, view.project, _members(view), _verdict(view)) for view in views)
    return table(columns, rows, "no server groups yet")


def _group(view: ServerGroupView) -> RenderableType:
    return facts(
        [
            ("server group", view.id),
            ("policy", view.policy),
            ("project", view.project),
            ("members", _members(view)),
            ("as it should be", _verdict(view)),
        ]
    )


def _members(view: ServerGroupView) -> str:
    return ", ".join(f"{s} on {host or 'no host yet'}" for s, host in view.members.items()) or NOTHING


def _verdict(view: ServerGroupView) -> Text:
    if not view.violation:
        return Text("yes", style=GOOD)
    return Text(f"no: {view.violation}", style=WARN)
