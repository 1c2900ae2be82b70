"""The command `nahtlos`: composition of the operator's command line with labs on this machine."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Group, RenderableType
from rich.text import Text
from typer.exceptions import Abort, TyperException

from nahtlos.lab.cleanup import Removed, cleanup, processes_of
from nahtlos.lab.paths import BuildPaths, LabPaths
from nahtlos.model.errors import Conflict, ErrorRecord, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, checked_name
from nahtlos.model.nouns import Size
from nahtlos.ops.cli import pictures
from nahtlos.ops.cli.app import build_app
from nahtlos.ops.cli.command import INTERRUPTED, Cli, Place, Surroundings, command
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.doctor import require_lab
from nahtlos.runtime.controllers.cloud import HostView, Status
from nahtlos.runtime.releases import broken_releases, list_releases, load_release

ANSWER_SECONDS = 5.0
SERVICE_SECONDS = 300.0


class LabStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    up: bool
    processes: int
    status: Status | None
    """None if its orchestrator does not answer."""
    hosts: tuple[HostView, ...]


def application(build: BuildPaths | None = None) -> typer.Typer:
    """`build`: what labs are opened with; the checkout's if left out."""
    build = build or BuildPaths.default()
    surroundings = _surroundings(build)
    app = build_app(surroundings)
    app.add_typer(_lab_commands(surroundings, build), name="lab")
    return app


def _surroundings(build: BuildPaths) -> Surroundings:
    return Surroundings(socket_of_lab=lambda name: LabPaths(name).operator_socket, build_dir=build.root)


def _lab_commands(surroundings: Surroundings, build: BuildPaths) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="A data centre on this machine: hosts as namespaces.")

    @command(app, "up", surroundings)
    async def up(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        hosts: Annotated[int, typer.Option(help="Hosts that run servers.", min=1, max=16)] = 3,
        vcpus: Annotated[int, typer.Option(help="Of every host, for servers.", min=1)] = 4,
        memory_mib: Annotated[int, typer.Option(help="Of every host, for servers.", min=64)] = 1024,
        parallel_moves: Annotated[int, typer.Option(help="Moves at the same time.", min=1)] = 1,
        ceph_conf: Annotated[Path | None, typer.Option(help="Every host's way to a Ceph cluster.")] = None,
    ) -> None:
        """Open a lab and leave it open: namespaces, an orchestrator, hosts that are in service."""
        # Loaded here: no other command needs all of it.
        from nahtlos.lab import ceph
        from nahtlos.lab.datacentre import Datacentre, LabShape, promisable

        checked_name(cli.lab, "lab")
        _root()
        if await _answers(cli) is not None:
            raise _runs_already(cli.lab)
        await asyncio.to_thread(require_lab)
        releases = await asyncio.to_thread(_sound_releases, build)
        capacity = Size(vcpus=vcpus, memory_mib=memory_mib)
        shape = LabShape(
            hosts=hosts,
            capacity=capacity,
            promised=promisable(hosts, capacity),
            parallel_moves=parallel_moves,
            ceph=ceph.way(ceph_conf) if ceph_conf is not None else None,
        )
        datacentre = Datacentre(cli.lab, shape, build, lasting=True)
        await datacentre.open(cli.say)
        try:
            cli.say("hosts start")
            await _into_service(cli, releases)
        except BaseException:
            await datacentre.close()
            raise
        await _show(cli)

    @command(app, "down", surroundings)
    async def down(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """End a lab and remove everything of it, its servers and volumes included. Repeatable."""
        checked_name(cli.lab, "lab")
        _root()
        removed = await asyncio.to_thread(cleanup, cli.lab)
        cli.show(removed, _removed(cli.lab, removed))
        if removed.left:
            raise Unavailable(
                f"not everything could be removed: {', '.join(removed.left)}", remedy="run it again"
            )

    @command(app, "status", surroundings)
    async def status(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """Whether a lab is open, and what its hosts do."""
        checked_name(cli.lab, "lab")
        await _show(cli)

    return app


def _root() -> None:
    if os.geteuid() != 0:
        raise Refused("a lab makes network namespaces", field="user", remedy="run it as root")


def _sound_releases(build: BuildPaths) -> list[ReleaseId]:
    """Every release that is built, its files as its manifest says; first those that servers can be moved by,
    because hosts run the first. Refused by the first that is broken."""
    for problem in broken_releases(build.releases):
        raise problem
    first = build.movable_releases()
    others = (release for release in list_releases(build.releases) if release not in first)
    return [load_release(build.releases, release.id).id for release in (*first, *others)]


async def _into_service(cli: Cli, releases: list[ReleaseId]) -> None:
    """The cloud knows all releases, and every host has booted a probe and takes servers."""
    async with cli.client() as client:
        for release in releases:
            await client.register_release(release)
        await wait_until(
            cli,
            f"lab {cli.lab} comes into service",
            client.status,
            lambda status: status.converged,
            lambda status: status.waiting[0].reason if status.waiting else "hosts boot a probe",
            deadline=SERVICE_SECONDS,
        )


def _runs_already(lab: str) -> Conflict:
    return Conflict(
        f"lab {lab} runs already",
        field="lab",
        remedy=f"`nahtlos lab down --lab {lab}`, or choose another name",
    )


async def _answers(cli: Cli) -> Status | None:
    try:
        async with asyncio.timeout(ANSWER_SECONDS), cli.client() as client:
            return await client.status()
    except (Unavailable, TimeoutError):
        return None


async def _show(cli: Cli) -> None:
    status = await _answers(cli)
    hosts: tuple[HostView, ...] = ()
    if status is not None:
        async with cli.client() as client:
            hosts = await client.hosts()
    lab = LabStatus(
        name=cli.lab,
        up=status is not None,
        processes=len(await asyncio.to_thread(processes_of, cli.lab)),
        status=status,
        hosts=hosts,
    )
    cli.show(lab, _picture(lab))


def _picture(lab: LabStatus) -> RenderableType:
    if lab.status is None:
        if not lab.processes:
            return Text(f"lab {lab.name} is not up", style=pictures.SOFT)
        left = f"lab {lab.name}: {lab.processes} processes, but no orchestrator answers"
        return Text.assemble((left, pictures.WARN), ("\n  → nahtlos lab down", "cyan"))
    head = Text(f"lab {lab.name} is up, {lab.processes} processes", style=pictures.GOOD)
    return Group(head, Text(), pictures.status(lab.status), Text(), pictures.hosts(lab.hosts))


def _removed(lab: str, removed: Removed) -> Text:
    if not removed:
        return Text(f"nothing was left of lab {lab}", style=pictures.SOFT)
    return Text(
        f"lab {lab} is down: {len(removed.processes)} processes, {len(removed.namespaces)} namespaces, "
        f"{len(removed.directories)} folders removed"
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Mistakes on the command line itself become errors like all others."""
    given = sys.argv[1:] if arguments is None else arguments
    if "--json" not in given or {"--help", "--show-completion", "--install-completion"} & set(given):
        application()(args=given, prog_name="nahtlos")
        return
    try:
        code = application()(args=given, prog_name="nahtlos", standalone_mode=False)
    except Abort:
        code = INTERRUPTED
    except TyperException as error:
        Cli(Place(json=True), _surroundings(BuildPaths.default())).show_error(_usage(error))
        code = error.exit_code
    sys.exit(code or 0)


def _usage(error: TyperException) -> ErrorRecord:
    return ErrorRecord(
        kind=Refused.kind,
        message=error.format_message(),
        field="arguments",
        remedy="`nahtlos --help`",
    )


if __name__ == "__main__":
    main()
