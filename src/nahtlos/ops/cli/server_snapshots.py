"""`nahtlos snapshot … --memory` and `nahtlos server revert`: disks and memory of one moment."""

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import ServerId, SnapshotId
from nahtlos.model.inventory import RunState
from nahtlos.model.storage import Consistency
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.copying import copied, standing
from nahtlos.ops.cli.pictures import GOOD, NOTHING, WARN, table
from nahtlos.ops.cli.server_pictures import server as server_picture
from nahtlos.ops.cli.volume_pictures import amount
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.server_snapshots import (
    ServerRevertRequest,
    ServerSnapshotRequest,
    ServerSnapshotView,
)
from nahtlos.runtime.controllers.volumes import TaskView

MIB = 1 << 20


def request(
    name: str,
    server: str | None,
    volumes: Sequence[str],
    consistency: Consistency,
    *,
    memory: bool,
    pause: float,
) -> ServerSnapshotRequest:
    """Refused where what was given does not go together."""
    if server is None:
        raise Refused("the memory of no server", field="server", remedy="name it: --server SERVER --memory")
    if not memory:
        raise Refused(
            "a whole server without its memory",
            field="memory",
            remedy="add --memory; or name its disks: --volume VOLUME, for each",
        )
    if volumes:
        raise Refused(
            "a server and volumes", field="volume", remedy="leave --volume out: all of its disks are taken"
        )
    if consistency is not Consistency.CRASH:
        raise Refused(
            "with its memory a guest goes on as it was, with all it has not written yet",
            field="consistency",
            remedy="leave --consistency out",
        )
    return ServerSnapshotRequest(name=name, server=ServerId(server), pause_seconds=pause)


async def list_all(cli: Cli) -> None:
    async with cli.client() as client:
        views = await client.server_snapshots.server_snapshots()
    cli.show(views, picture(views))


async def show(cli: Cli, snapshot: SnapshotId) -> bool:
    """False if there is no such snapshot of a whole server."""
    async with cli.client() as client:
        view = await _found(client, snapshot)
    if view is not None:
        cli.show(view, picture((view,)))
    return view is not None


async def create(cli: Cli, asked: ServerSnapshotRequest, *, wait: bool, deadline: float) -> None:
    async with cli.client() as client:
        names = await client.server_snapshots.create(asked)
        if not wait:
            cli.show({"id": asked.name, "snapshots": names}, Text(f"snapshot {asked.name} is to be taken"))
            return

        async def mine() -> tuple[TaskView, ...]:
            return tuple(task for task in await client.volumes.tasks() if set(names) & set(task.makes))

        await copied(
            cli,
            f"{asked.server} is snapshot with its memory",
            mine,
            lambda tasks: not tasks,
            lambda tasks: tasks,
            lambda tasks: standing(tasks[0]) if tasks else "",
            deadline=deadline,
        )
        view = await _found(client, SnapshotId(asked.name))
    if view is None:
        raise Conflict(
            f"snapshot {asked.name} was given up", field="name", remedy="nahtlos operation list says why"
        )
    cli.show(view, picture((view,)))


async def delete(cli: Cli, snapshot: SnapshotId, *, wait: bool, deadline: float) -> bool:
    """False if there is no such snapshot of a whole server."""
    async with cli.client() as client:
        view = await _found(client, snapshot)
        if view is None:
            return False
        await client.server_snapshots.delete(snapshot)
        names = {*view.spec.snapshots, view.spec.saved.volume}

        async def left() -> int:
            there = [each.spec.id for each in await client.volumes.snapshots()]
            return len(names & {*there, *(each.spec.id for each in await client.volumes.volumes())})

        if wait:
            await wait_until(
                cli,
                f"{snapshot} is deleted",
                left,
                lambda many: not many,
                lambda many: f"{many} of it are still there",
                deadline=deadline,
            )
    cli.show({"id": snapshot, "deleted": True}, Text(f"snapshot {snapshot} deleted, with its memory"))
    return True


async def _found(client: OperatorClient, snapshot: SnapshotId) -> ServerSnapshotView | None:
    try:
        return await client.server_snapshots.server_snapshot(snapshot)
    except NotFound:
        return None


def picture(views: Sequence[ServerSnapshotView]) -> RenderableType:
    columns = ("Snapshot", "Server", "Disks", ">Memory", ">Taken", "By release", ">Stood still", "Usable")
    rows = (
        (
            v.spec.id,
            v.spec.server,
            ", ".join(v.spec.snapshots) or NOTHING,
            amount(v.spec.saved.memory_mib * MIB),
            amount(v.allocated_bytes),
            v.spec.saved.release,
            f"{v.spec.pause_seconds * 1000:.0f} ms",
            Text(v.why_not, style=WARN) if v.why_not else Text("yes", style=GOOD),
        )
        for v in views
    )
    return table(columns, rows, "none yet; `nahtlos snapshot create NAME --server SERVER --memory`")


def revert_command(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "revert", surroundings)
    async def revert(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        server: Annotated[str, typer.Argument(metavar="SERVER")],
        snapshot: Annotated[str, typer.Option(help="Of this server, with its memory.", show_default=False)],
        wait: Annotated[bool, typer.Option(help="Wait until it is done.")] = True,
        deadline: Annotated[float, typer.Option(help="Seconds to wait at most.", min=0)] = 300.0,
    ) -> None:
        """Let a server go on from a snapshot with its memory. What it is now is lost."""
        name = ServerId(server)
        async with cli.client() as client:
            view = await client.server_snapshots.revert(
                name, ServerRevertRequest(snapshot=SnapshotId(snapshot))
            )
            if wait:
                view = await wait_until(
                    cli,
                    f"{server} goes back to {snapshot}",
                    lambda: client.server(name),
                    _is_back,
                    lambda seen: seen.waits_for or seen.state or "not seen yet",
                    deadline=deadline,
                )
        cli.show(view, server_picture(view))


def _is_back(view: ServerView) -> bool:
    return view.state is RunState.RUNNING and not view.power_pending and view.power.state == "on"
