"""`nahtlos volume scrub|rebuild|set-speed`, and what is waited for by when a snapshot becomes a file, or goes
elsewhere."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import HostId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.ops.cli import volume_amounts as amounts
from nahtlos.ops.cli import volume_pictures as pictures
from nahtlos.ops.cli.command import BROKEN, Cli, Surroundings, command
from nahtlos.ops.cli.copying import COPY_DEADLINE, Deadline, Wait, copied
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.volumes import (
    OperationView,
    RebuildRequest,
    ScrubRequest,
    SnapshotFileRequest,
    SnapshotMoveRequest,
    SpeedRequest,
    VolumeView,
)

Volume = Annotated[str, typer.Argument(metavar="VOLUME")]


def care_commands(app: typer.Typer, surroundings: Surroundings) -> None:
    @command(app, "scrub", surroundings)
    async def scrub(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        repair: Annotated[bool, typer.Option("--repair", help="Make copies that differ anew.")] = False,
        bandwidth: Annotated[str, typer.Option(help="Bytes per second at most, as 50M.")] = "none",
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> int:
        """Compare the copies of a volume while it is written; of a single one, read all of it.

        Exit code 1 if something differs or cannot be read and is not repaired."""
        asked = ScrubRequest(bytes_per_second=amounts.octets(bandwidth, "bandwidth"), repair=repair)
        async with cli.client() as client:
            before = _ids(await client.volumes.volume(VolumeId(volume)))
            view = await client.volumes.care.scrub(VolumeId(volume), asked)
            if not wait:
                cli.show(view, pictures.volume(view))
                return 0
            view = await _without(cli, client, view, OperationKind.SCRUB, f"{volume} is scrubbed", deadline)
            ended = _newest(view, OperationKind.SCRUB, before)
            if repair and _differs(ended):
                view = await _until(
                    cli, client, view, f"{volume} is repaired", deadline, lambda seen: seen.settled
                )
        cli.show(ended, pictures.operation(ended))
        return BROKEN if _differs(ended) and not repair else 0

    @command(app, "rebuild", surroundings)
    async def rebuild(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        copy: Annotated[
            str | None, typer.Option(help="On this host; left out: the one that is in trouble.")
        ] = None,
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Make a copy that is not to be trusted anew from the others, while the volume is written."""
        async with cli.client() as client:
            asked = RebuildRequest(copy=HostId(copy) if copy else None)
            view = await client.volumes.care.rebuild(VolumeId(volume), asked)
            if wait:
                what = f"{volume} is rebuilt"
                view = await _until(cli, client, view, what, deadline, lambda seen: seen.settled)
        cli.show(view, pictures.volume(view))

    @command(app, "set-speed", surroundings)
    async def set_speed(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        volume: Volume,
        bandwidth: Annotated[str, typer.Argument(metavar="RATE", help="Bytes per second, as 50M, or none.")],
    ) -> None:
        """Make a relocation, or the move of a snapshot, faster or slower while it runs."""
        asked = SpeedRequest(bytes_per_second=amounts.octets(bandwidth, "bandwidth"))
        async with cli.client() as client:
            view = await client.volumes.care.set_speed(VolumeId(volume), asked)
        cli.show(view, pictures.tasks(view.tasks) if view.tasks else Text("nothing is under way"))


async def snapshot_to_file(
    cli: Cli,
    client: OperatorClient,
    snapshot: SnapshotId,
    asked: SnapshotFileRequest,
    wait: bool,
    deadline: float,
) -> None:
    """Shows the operation that has written it, with the checksum."""
    before = await _of_snapshot(client, snapshot)
    shown = await client.volumes.care.write_snapshot(snapshot, asked)
    if not wait:
        cli.show(shown, pictures.snapshot(shown))
        return
    kind, what = OperationKind.SNAPSHOT_FILE, f"{snapshot} is written to {asked.file}"
    view = await _without(cli, client, before, kind, what, deadline)
    ended = _newest(view, kind, _ids(before))
    cli.show(ended, pictures.operation(ended))


async def snapshot_elsewhere(
    cli: Cli,
    client: OperatorClient,
    snapshot: SnapshotId,
    asked: SnapshotMoveRequest,
    wait: bool,
    deadline: float,
) -> None:
    """Shows the snapshot where it is then."""
    before = await _of_snapshot(client, snapshot)
    shown = await client.volumes.move_snapshot(snapshot, asked)
    if wait:
        kind, what = OperationKind.SNAPSHOT_MOVE, f"{snapshot} is brought to another host"
        view = await _without(cli, client, before, kind, what, deadline)
        _newest(view, kind, _ids(before))
        shown = await client.volumes.snapshot(snapshot)
    cli.show(shown, pictures.snapshot(shown))


async def _of_snapshot(client: OperatorClient, snapshot: SnapshotId) -> VolumeView:
    """The volume it is of, with what has ended of that so far."""
    return await client.volumes.volume((await client.volumes.snapshot(snapshot)).spec.volume)


def _ids(view: VolumeView) -> set[str]:
    return {each.record.id for each in view.ended}


def _differs(ended: OperationView) -> bool:
    return ended.record.result.get("differences", "0") != "0"


def _newest(view: VolumeView, kind: OperationKind, before: set[str]) -> OperationView:
    """The one that has ended since; Conflict if it was given up."""
    new = [each for each in view.ended if each.record.kind == kind and each.record.id not in before]
    done = next((each for each in new if each.record.state == OperationState.DONE), None)
    if done is None:
        error = new[0].record.error if new else None
        why = f": {error.message}" if error else ""
        remedy = (error.remedy if error else "") or "ask for it again"
        raise Conflict(f"it was given up{why}", field=(error.field if error else "operation"), remedy=remedy)
    return done


async def _without(
    cli: Cli, client: OperatorClient, view: VolumeView, kind: OperationKind, what: str, deadline: float
) -> VolumeView:
    """Until no operation of this kind is wished or under way."""
    return await _until(
        cli, client, view, what, deadline, lambda seen: all(task.kind != kind for task in seen.tasks)
    )


async def _until(
    cli: Cli,
    client: OperatorClient,
    view: VolumeView,
    what: str,
    deadline: float,
    done: Callable[[VolumeView], bool],
) -> VolumeView:
    return await copied(
        cli,
        what,
        lambda: client.volumes.volume(view.spec.id),
        done,
        lambda seen: seen.tasks,
        lambda seen: seen.waits_for,
        deadline=deadline,
    )
