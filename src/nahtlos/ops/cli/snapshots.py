"""`nahtlos snapshot …`"""

from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import Conflict, NotFound
from nahtlos.model.ids import HostId, ProjectId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationKind
from nahtlos.model.server_snapshots import PAUSE_SECONDS
from nahtlos.model.storage import Consistency
from nahtlos.ops.cli import server_snapshots as whole
from nahtlos.ops.cli import volume_amounts as amounts
from nahtlos.ops.cli import volume_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.copying import COPY_DEADLINE, DEADLINE, Consistent, Deadline, Wait, copied, standing
from nahtlos.ops.cli.settled import Project
from nahtlos.ops.cli.volume_care import snapshot_elsewhere
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.volumes import (
    ExportRequest,
    SnapshotMoveRequest,
    SnapshotRequest,
    SnapshotView,
    TaskView,
    VolumeRequest,
)

Snapshot = Annotated[str, typer.Argument(metavar="SNAPSHOT")]


def snapshot_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Snapshots: volumes as they were at one moment.")

    @command(app, "list", surroundings)
    async def list_all(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Annotated[str | None, typer.Option(help="Only those of this volume.")] = None,
        memory: Annotated[bool, typer.Option("--memory", help="Whole servers' with their memory.")] = False,
    ) -> None:
        """All snapshots, where they are kept and what rests on them."""
        if memory:
            await whole.list_all(cli)
            return
        async with cli.client() as client:
            views = await client.volumes.snapshots()
        shown = tuple(view for view in views if volume is None or view.spec.volume == volume)
        cli.show(shown, pictures.snapshots(shown))

    @command(app, "show", surroundings)
    async def show(cli: Cli, snapshot: Snapshot) -> None:  # pyright: ignore[reportUnusedFunction]
        """One snapshot, and where it can be read from outside; or a whole server's."""
        if await whole.show(cli, SnapshotId(snapshot)):
            return
        async with cli.client() as client:
            view = await client.volumes.snapshot(SnapshotId(snapshot))
        cli.show(view, pictures.snapshot(view))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        volume: Annotated[
            list[str] | None, typer.Option(help="Repeat for several: all at one moment.", show_default=False)
        ] = None,
        server: Annotated[str | None, typer.Option(help="A whole server, with --memory.")] = None,
        memory: Annotated[
            bool, typer.Option("--memory", help="Its memory and all of its disks, of one moment.")
        ] = False,
        pause: Annotated[
            float, typer.Option(metavar="SECONDS", help="The longest it may stand still for that.")
        ] = PAUSE_SECONDS,
        consistency: Consistent = Consistency.CRASH,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Take a snapshot of one volume, or of several at one moment, while they are written; or of a server.

        Of several, each is named NAME-VOLUME."""
        if server is not None or memory:
            asked_whole = whole.request(name, server, volume or (), consistency, memory=memory, pause=pause)
            await whole.create(cli, asked_whole, wait=wait, deadline=deadline)
            return
        asked = SnapshotRequest(
            name=name, volumes=tuple(VolumeId(each) for each in volume or ()), consistency=consistency
        )
        async with cli.client() as client:
            names = await client.volumes.create_snapshots(asked)
            if wait:
                await wait_for_tasks(cli, client, f"snapshot {name} is taken", deadline, names)
            views = tuple(v for v in await client.volumes.snapshots() if v.spec.id in names)
        if wait and len(views) < len(names):
            raise await given_up(client, f"snapshot {name}", asked.volumes[0], OperationKind.SNAPSHOT)
        cli.show(views if wait else {"snapshots": names}, pictures.snapshots(views))

    @command(app, "clone", surroundings)
    async def clone(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        snapshot: Snapshot,
        name: Annotated[str, typer.Argument(metavar="VOLUME")],
        size: Annotated[str | None, typer.Option(help="Larger than the snapshot, as 20G.")] = None,
        replicas: Annotated[int, typer.Option(help="Copies, each on another host.", min=1)] = 1,
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Make a volume of a snapshot, as `volume create --snapshot` does."""
        request = VolumeRequest(
            name=name,
            size_mib=amounts.mebibytes(size) if size is not None else 0,
            snapshot=SnapshotId(snapshot),
            copies=replicas,
            project=ProjectId(project),
        )
        async with cli.client() as client:
            view = await client.volumes.create_volume(request)
            if wait:
                view = await copied(
                    cli,
                    f"{name} is made",
                    lambda: client.volumes.volume(VolumeId(name)),
                    lambda seen: seen.settled,
                    lambda seen: seen.tasks,
                    lambda seen: seen.waits_for,
                    deadline=deadline,
                )
        cli.show(view, pictures.volume(view))

    @command(app, "move", surroundings)
    async def move(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        snapshot: Snapshot,
        to: Annotated[str | None, typer.Option(help="A host; chosen if left out.")] = None,
        copy: Annotated[str | None, typer.Option(help="Of several hosts, the one it leaves.")] = None,
        bandwidth: Annotated[str, typer.Option(help="Bytes per second at most, as 50M.")] = "none",
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Bring a snapshot to another host, while its volume is used. Its exports go with it."""
        asked = SnapshotMoveRequest(
            to=HostId(to) if to else None,
            copy=HostId(copy) if copy else None,
            bytes_per_second=amounts.octets(bandwidth, "bandwidth"),
        )
        async with cli.client() as client:
            await snapshot_elsewhere(cli, client, SnapshotId(snapshot), asked, wait, deadline)

    @command(app, "delete", surroundings)
    async def delete(cli: Cli, snapshot: Snapshot, wait: Wait = True, deadline: Deadline = DEADLINE) -> None:  # pyright: ignore[reportUnusedFunction]
        """Delete a snapshot that no clone rests on; a whole server's with its memory."""
        if await whole.delete(cli, SnapshotId(snapshot), wait=wait, deadline=deadline):
            return
        async with cli.client() as client:
            await client.volumes.delete_snapshot(SnapshotId(snapshot))
            if wait:
                await wait_until(
                    cli,
                    f"{snapshot} is deleted",
                    lambda: _absent(client, SnapshotId(snapshot)),
                    lambda gone: gone,
                    lambda _: "still there",
                    deadline=deadline,
                )
        cli.show({"id": snapshot, "deleted": True}, Text(f"snapshot {snapshot} deleted"))

    @command(app, "export", surroundings)
    async def export(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        snapshot: Snapshot,
        lasting: Annotated[str, typer.Option("--for", help="As 15m, 1h or 2d.")] = "1h",
    ) -> None:
        """Make a snapshot readable by any NBD client that has the credential, which is shown once."""
        async with cli.client() as client:
            asked = ExportRequest(seconds=amounts.duration(lasting, "for"))
            ticket = await client.volumes.export_snapshot(SnapshotId(snapshot), asked)
        cli.show(ticket, pictures.ticket(ticket))

    @command(app, "unexport", surroundings)
    async def unexport(cli: Cli, snapshot: Snapshot) -> None:  # pyright: ignore[reportUnusedFunction]
        """Withdraw every export of a snapshot."""
        async with cli.client() as client:
            view: SnapshotView = await client.volumes.unexport_snapshot(SnapshotId(snapshot))
        cli.show(view, pictures.snapshot(view))

    return app


async def given_up(client: OperatorClient, what: str, subject: str, kind: OperationKind) -> Conflict:
    """Nothing makes it any more, and it is not there. Why, its newest operation says."""
    ended = await client.volumes.care.operations(subject=subject, kind=kind.value, limit=1)
    error = ended[0].record.error if ended else None
    if error is None:
        return Conflict(f"{what} was given up", field="name", remedy="nahtlos operation list says why")
    return Conflict(
        f"{what} was given up: {error.message}",
        field=error.field or "name",
        remedy=error.remedy or "put that right, then ask for it again",
    )


async def wait_for_tasks(
    cli: Cli, client: OperatorClient, what: str, deadline: float, names: tuple[str, ...]
) -> None:
    """Until no operation that makes these is under way or wished. An operation that cannot succeed goes on
    being tried until it is cancelled; the deadline tells why."""

    async def mine() -> tuple[TaskView, ...]:
        return tuple(task for task in await client.volumes.tasks() if set(names) & set(task.makes))

    await copied(
        cli,
        what,
        mine,
        lambda tasks: not tasks,
        lambda tasks: tasks,
        lambda tasks: standing(tasks[0]) if tasks else "",
        deadline=deadline,
    )


async def _absent(client: OperatorClient, snapshot: SnapshotId) -> bool:
    try:
        await client.volumes.snapshot(snapshot)
    except NotFound:
        return True
    return False
