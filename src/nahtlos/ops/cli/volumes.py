"""`nahtlos volume …`"""

import asyncio
import sys
from collections.abc import Callable
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from nahtlos.model.errors import Conflict, NotFound
from nahtlos.model.ids import HostId, ImageId, ProjectId, ServerId, SnapshotId, VolumeId
from nahtlos.model.storage import Deletion, StorageBackend, VolumeFormat
from nahtlos.model.volume_settings import CephPlace, VolumeSettings
from nahtlos.ops.cli import volume_amounts as amounts
from nahtlos.ops.cli import volume_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.copying import COPY_DEADLINE, DEADLINE, Deadline, Wait, copied
from nahtlos.ops.cli.settled import Project
from nahtlos.ops.cli.volume_care import care_commands
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.volumes import (
    Attaching,
    RelocationRequest,
    RevertRequest,
    VolumeChange,
    VolumeRequest,
    VolumeView,
)

Volume = Annotated[str, typer.Argument(metavar="VOLUME")]
Limit = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE, repeatable: iops, bytes, each also _read, _write, _burst; or none."),
]
WATCH_SECONDS = 1.0


def volume_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Volumes: disks that outlive servers and hosts.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All volumes: where their copies are, who has them, what is under way."""
        async with cli.client() as client:
            views = await client.volumes.volumes()
        cli.show(views, pictures.volumes(views))

    @command(app, "show", surroundings)
    async def show(cli: Cli, volume: Volume) -> None:  # pyright: ignore[reportUnusedFunction]
        """One volume with its copies."""
        async with cli.client() as client:
            view = await client.volumes.volume(VolumeId(volume))
        cli.show(view, pictures.volume(view))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        size: Annotated[str | None, typer.Option(help="As 10G; left out: of what it is made from.")] = None,
        image: Annotated[str | None, typer.Option(help="Made from this image.")] = None,
        snapshot: Annotated[str | None, typer.Option(help="A clone of this snapshot.")] = None,
        replicas: Annotated[int, typer.Option(help="Copies, each on another host.", min=1)] = 1,
        volume_format: Annotated[VolumeFormat, typer.Option("--format")] = VolumeFormat.RAW,
        backend: Annotated[StorageBackend, typer.Option()] = StorageBackend.EMBEDDED,
        encrypted: Annotated[bool, typer.Option("--encrypted", help="At rest, by a key of its own.")] = False,
        limit: Limit = None,
        limits_group: Annotated[str, typer.Option(help="Shares the limits of a server's volumes.")] = "",
        deletion: Annotated[Deletion, typer.Option(help="What becomes of its blocks.")] = Deletion.DISCARD,
        host: Annotated[str | None, typer.Option(help="Of its first copy.")] = None,
        server: Annotated[str | None, typer.Option(help="Near this server.")] = None,
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Create a volume: blank, from an image, or a clone of a snapshot."""
        request = VolumeRequest(
            name=name,
            size_mib=amounts.mebibytes(size) if size is not None else 0,
            image=ImageId(image) if image else None,
            snapshot=SnapshotId(snapshot) if snapshot else None,
            copies=replicas,
            format=volume_format,
            backend=backend,
            encrypted=encrypted,
            limits=amounts.limits(limit or []),
            limits_group=limits_group,
            deletion=deletion,
            host=HostId(host) if host else None,
            near=ServerId(server) if server else None,
            project=ProjectId(project),
        )
        async with cli.client() as client:
            view = await client.volumes.create_volume(request)
            view = await _settle(cli, client, view, f"{name} is made", wait, deadline)
        cli.show(view, pictures.volume(view))

    @command(app, "set", surroundings)
    async def change(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        size: Annotated[str | None, typer.Option(help="Larger than it is; its server sees it.")] = None,
        replicas: Annotated[int | None, typer.Option(help="Copies, each on another host.", min=1)] = None,
        limit: Limit = None,
        limits_group: Annotated[str | None, typer.Option()] = None,
        deletion: Annotated[Deletion | None, typer.Option()] = None,
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Change a volume while it is used: its size, copies, limits."""
        async with cli.client() as client:
            before = await client.volumes.volume(VolumeId(volume))
            unset = msgspec.UNSET
            asked = VolumeChange(
                size_mib=unset if size is None else amounts.mebibytes(size),
                copies=unset if replicas is None else replicas,
                limits=unset if not limit else amounts.limits(limit, before.spec.limits),
                limits_group=unset if limits_group is None else limits_group,
                deletion=unset if deletion is None else deletion,
            )
            view = await client.volumes.change_volume(VolumeId(volume), asked)
            view = await _settle(cli, client, view, f"{volume} changes", wait, deadline)
        cli.show(view, pictures.volume(view))

    @command(app, "attach", surroundings)
    async def attach(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        server: Annotated[str, typer.Argument(metavar="SERVER")],
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Give a volume to a server, running or not."""
        async with cli.client() as client:
            asked = Attaching(server=ServerId(server))
            view = await client.volumes.attach_volume(VolumeId(volume), asked)
            view = await _settle(cli, client, view, f"{volume} is attached to {server}", wait, deadline)
        cli.show(view, pictures.volume(view))

    @command(app, "detach", surroundings)
    async def detach(cli: Cli, volume: Volume, wait: Wait = True, deadline: Deadline = DEADLINE) -> None:  # pyright: ignore[reportUnusedFunction]
        """Take a volume from its server. Unmount it there first."""
        async with cli.client() as client:
            view = await client.volumes.detach_volume(VolumeId(volume))
            view = await _settle(cli, client, view, f"{volume} is detached", wait, deadline)
        cli.show(view, pictures.volume(view))

    @command(app, "relocate", surroundings)
    async def relocate(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        to: Annotated[str | None, typer.Option(help="A host, or ceph; chosen if left out.")] = None,
        copy: Annotated[str | None, typer.Option(help="Of several, the copy on this host.")] = None,
        volume_format: Annotated[VolumeFormat | None, typer.Option("--format")] = None,
        bandwidth: Annotated[str, typer.Option(help="Bytes per second at most, as 50M.")] = "none",
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Bring a copy of a volume to another host, or to Ceph and back, while it is written."""
        host, backend = amounts.destination(to)
        asked = RelocationRequest(
            to=host,
            backend=backend,
            copy=HostId(copy) if copy else None,
            format=volume_format,
            bytes_per_second=amounts.octets(bandwidth, "bandwidth"),
        )
        async with cli.client() as client:
            view = await client.volumes.relocate_volume(VolumeId(volume), asked)
            view = await _settle(cli, client, view, f"{volume} is relocated", wait, deadline)
        cli.show(view, pictures.volume(view))

    @command(app, "revert", surroundings)
    async def revert(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT")],
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
        stop: Annotated[
            bool, typer.Option("--stop", help="Stop the server that has it for that, and start it again.")
        ] = False,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Make a volume that no running server has again what a snapshot holds. What was written since is
        lost."""
        _sure(cli, f"Lose everything written to {volume} since {snapshot}?", yes)
        async with cli.client() as client:
            asked = RevertRequest(snapshot=SnapshotId(snapshot), stop=stop)
            view = await client.volumes.revert_volume(VolumeId(volume), asked)
            view = await _settle(cli, client, view, f"{volume} is reverted", wait, deadline)
        cli.show(view, pictures.volume(view))

    @command(app, "cancel", surroundings)
    async def cancel(cli: Cli, volume: Volume, wait: Wait = True, deadline: Deadline = DEADLINE) -> None:  # pyright: ignore[reportUnusedFunction]
        """Give up what was asked for of a volume, as far as it has not passed its point of no return."""
        async with cli.client() as client:
            view = await client.volumes.cancel_volume_tasks(VolumeId(volume))
            view = await _settle(cli, client, view, f"{volume}: given up", wait, deadline)
        cli.show(view, pictures.volume(view))

    @command(app, "delete", surroundings)
    async def delete(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Delete a volume that no server has and no snapshot is of."""
        _sure(cli, f"Delete {volume} and everything on it?", yes)
        async with cli.client() as client:
            await client.volumes.delete_volume(VolumeId(volume))
            if wait:
                await wait_until(
                    cli,
                    f"{volume} is deleted",
                    lambda: _absent(client, VolumeId(volume)),
                    lambda gone: gone,
                    lambda _: "still there",
                    deadline=deadline,
                )
        cli.show({"id": volume, "deleted": True}, Text(f"volume {volume} deleted"))

    @command(app, "tasks", surroundings)
    async def tasks(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, watch: Annotated[bool, typer.Option("--watch", help="Go on until none is left.")] = False
    ) -> None:
        """Operations of volumes that run or are to run."""
        async with cli.client() as client:
            while True:
                views = await client.volumes.tasks()
                cli.show(views, pictures.tasks(views))
                if not watch or not views:
                    return
                await asyncio.sleep(WATCH_SECONDS)

    care_commands(app, surroundings)
    _settings_command(app, surroundings)
    return app


def _settings_command(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "settings", surroundings)
    async def settings(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        parallel: Annotated[int | None, typer.Option(help="Operations at once, in all.")] = None,
        per_host: Annotated[int | None, typer.Option(help="Operations at once on a host.")] = None,
        rebuild: Annotated[str | None, typer.Option(help="Bytes per second of a rebuild or drain.")] = None,
        elsewhere: Annotated[str | None, typer.Option(help="A host away so long is made up for.")] = None,
        tenants: Annotated[list[str] | None, typer.Option(help="Of a host's disks: NAME=VALUE.")] = None,
        copies: Annotated[list[str] | None, typer.Option(help="Of a host's disks, for copying.")] = None,
        ceph_pool: Annotated[str | None, typer.Option(help="Pool of a Ceph cluster, or none.")] = None,
        ceph_user: Annotated[str | None, typer.Option()] = None,
        ceph_conf: Annotated[str | None, typer.Option(help="Its configuration on every host.")] = None,
    ) -> None:
        """Show or change how operations of volumes are paced, and where Ceph is."""
        async with cli.client() as client:
            before = await client.volumes.volume_settings()
            changes: dict[str, object] = {}
            if parallel is not None:
                changes["parallel"] = parallel
            if per_host is not None:
                changes["parallel_per_host"] = per_host
            if rebuild is not None:
                changes["rebuild_bytes_per_second"] = amounts.octets(rebuild, "rebuild")
            if elsewhere is not None:
                changes["elsewhere_seconds"] = float(amounts.duration(elsewhere, "elsewhere"))
            budget = before.budget
            if tenants:
                budget = msgspec.structs.replace(budget, tenants=amounts.limits(tenants, budget.tenants))
            if copies:
                budget = msgspec.structs.replace(budget, copies=amounts.limits(copies, budget.copies))
            changes["budget"] = budget
            changes["ceph"] = _ceph(before, ceph_pool, ceph_user, ceph_conf)
            after: VolumeSettings = msgspec.structs.replace(before, **changes)
            if after != before:
                after = await client.volumes.set_volume_settings(after)
        cli.show(after, pictures.settings(after))


def _ceph(
    before: VolumeSettings, pool: str | None, user: str | None, configuration: str | None
) -> CephPlace | None:
    if pool == amounts.NONE:
        return None
    known = before.ceph
    if pool is None and known is None:
        return None
    place = known or CephPlace(pool=pool or "")
    return msgspec.structs.replace(
        place,
        pool=pool or place.pool,
        user=user or place.user,
        configuration=configuration or place.configuration,
    )


def _sure(cli: Cli, question: str, yes: bool) -> None:
    if not yes and not cli.json and sys.stdin.isatty():
        typer.confirm(question, abort=True, err=True)


async def _settle(
    cli: Cli,
    client: OperatorClient,
    view: VolumeView,
    what: str,
    wait: bool,
    deadline: float,
    done: Callable[[VolumeView], bool] = lambda seen: seen.settled,
) -> VolumeView:
    """Until everything asked for of the volume has come about."""
    if not wait:
        return view
    return await copied(
        cli,
        what,
        lambda: client.volumes.volume(view.spec.id),
        done,
        lambda seen: seen.tasks,
        lambda seen: seen.waits_for,
        deadline=deadline,
    )


async def _absent(client: OperatorClient, volume: VolumeId) -> bool:
    try:
        await client.volumes.volume(volume)
    except NotFound:
        return True
    except Conflict:
        return False
    return False
