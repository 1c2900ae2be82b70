"""`nahtlos release …`"""

import asyncio
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import ReleaseId
from nahtlos.model.nouns import Release
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.runtime.releases import (
    NETWORK_TRACKS,
    TRACKS,
    Progress,
    broken_releases,
    build_release,
    list_releases,
)

REGISTER_SECONDS = 60.0


def release_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Releases: built, then upgraded to.")

    @command(app, "list", surroundings)
    async def list_all(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        built: Annotated[bool, typer.Option("--built", help="What is built here; asks no cloud.")] = False,
    ) -> None:
        """The releases the cloud knows, oldest first."""
        if built:
            folder = surroundings.build_dir / "releases"
            values = list_releases(folder, component=None)
            for problem in broken_releases(folder):
                cli.warn(str(problem))
        else:
            async with cli.client() as client:
                values = await client.releases()
        cli.show(values, pictures.releases(values))

    @command(app, "show", surroundings)
    async def show(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, release: Annotated[str, typer.Argument(metavar="RELEASE")]
    ) -> None:
        """One release: where it comes from and what it consists of."""
        async with cli.client() as client:
            value = await client.release(ReleaseId(release))
        cli.show(value, pictures.release(value))

    @command(app, "build", surroundings)
    async def build(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        track: Annotated[
            list[str] | None,
            typer.Argument(
                metavar=f"[{'|'.join([*TRACKS, *NETWORK_TRACKS])}]…",
                help="Lines of releases; all of the hypervisor if none is named.",
                autocompletion=lambda: [*TRACKS, *NETWORK_TRACKS],
            ),
        ] = None,
        refresh: Annotated[
            bool, typer.Option("--refresh", help="Look for a newer version even if one is built.")
        ] = False,
        register: Annotated[bool, typer.Option(help="Make it known to the cloud, if it is up.")] = True,
    ) -> None:
        """Build releases from Debian's packages, side by side with those that are there."""
        values = [await _build(cli, surroundings, name, refresh) for name in track or TRACKS]
        if register:
            await _register(cli, values)
        cli.show(values, pictures.releases(values))

    return app


async def _build(cli: Cli, surroundings: Surroundings, track: str, refresh: bool) -> Release:
    folder = surroundings.build_dir
    with Bars(
        TextColumn("{task.fields[step]:<9}"),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        console=cli.err,
        disable=cli.json or not cli.err.is_terminal,
        transient=True,
    ) as bars:
        line = bars.add_task(track, step="", total=None)
        return await asyncio.to_thread(
            build_release,
            track,
            folder / "releases",
            folder / "downloads",
            lambda progress: _show(bars, line, progress),
            refresh=refresh,
        )


def _show(bars: Bars, line: TaskID, progress: Progress) -> None:
    bars.update(
        line,
        description=progress.text,
        step=progress.step,
        completed=progress.done,
        total=progress.total or None,
    )


async def _register(cli: Cli, values: list[Release]) -> None:
    try:
        async with cli.client() as client, asyncio.timeout(REGISTER_SECONDS):
            for value in values:
                await client.register_release(value.id)
    except (Unavailable, TimeoutError) as error:
        cli.say(f"built, but not registered with a cloud: {error}")
