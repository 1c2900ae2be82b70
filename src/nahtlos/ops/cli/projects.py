"""`nahtlos project …`"""

from collections.abc import Sequence
from typing import Annotated

import typer
from msgspec import UNSET
from rich.console import RenderableType

from nahtlos.model.ids import ProjectId
from nahtlos.ops.cli import volume_amounts as amounts
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.pictures import facts, table
from nahtlos.runtime.controllers.projects import ProjectChange, ProjectView

MIB = 1 << 20
Project = Annotated[str, typer.Argument(metavar="PROJECT")]


def project_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Projects: what their servers may have in all.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All projects that have something or are limited."""
        async with cli.client() as client:
            views = await client.projects.projects()
        cli.show(views, _projects(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, project: Project) -> None:  # pyright: ignore[reportUnusedFunction]
        """What a project has, and may have."""
        async with cli.client() as client:
            view = await client.projects.project(ProjectId(project))
        cli.show(view, _project(view))

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        project: Project,
        vcpus: Annotated[str | None, typer.Option(help="Of all its servers; or none.")] = None,
        memory: Annotated[str | None, typer.Option(help="As 16G; a plain number is MiB; or none.")] = None,
        iops: Annotated[
            str | None,
            typer.Option(help="Of all disks of its servers, each of which must be limited; or none."),
        ] = None,
        bandwidth: Annotated[
            str | None, typer.Option(help="Bytes per second of these disks, as 200M; or none.")
        ] = None,
    ) -> None:
        """Limit what the servers of a project have in all. Checked when one is created or given more."""
        asked = ProjectChange(
            vcpus=UNSET if vcpus is None else amounts.count(vcpus, "vcpus"),
            memory_mib=UNSET if memory is None else _memory(memory),
            iops=UNSET if iops is None else amounts.count(iops, "iops"),
            bytes_per_second=UNSET if bandwidth is None else amounts.octets(bandwidth, "bytes_per_second"),
        )
        async with cli.client() as client:
            view = await client.projects.change_project(ProjectId(project), asked)
        cli.show(view, _project(view))

    return app


def _memory(text: str) -> int:
    return 0 if text.lower() == amounts.NONE else amounts.mebibytes(text, "memory_mib")


def _projects(views: Sequence[ProjectView]) -> RenderableType:
    columns = ("Project", ">Servers", ">vCPUs", ">Memory MiB", ">Disks IOPS", ">Disks MiB/s")
    return table(columns, ((view.id, str(view.servers), *_sums(view)) for view in views), "no projects yet")


def _project(view: ProjectView) -> RenderableType:
    names = ("vCPUs", "memory, MiB", "disks, IOPS", "disks, MiB/s")
    return facts(
        [
            ("project", view.id),
            ("servers", str(view.servers)),
            *zip(names, _sums(view), strict=True),
        ]
    )


def _sums(view: ProjectView) -> tuple[str, ...]:
    """What it has, of what it may have."""
    used, limits = view.used, view.limits
    return (
        _of(used.vcpus, limits.vcpus),
        _of(used.memory_mib, limits.memory_mib),
        _of(used.iops, limits.iops),
        _of(used.bytes_per_second / MIB, limits.bytes_per_second / MIB),
    )


def _of(used: float, limit: float) -> str:
    return f"{used:g} of {limit:g}" if limit else f"{used:g}"
