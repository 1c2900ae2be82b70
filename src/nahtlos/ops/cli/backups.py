"""`nahtlos backup …`"""

from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import Conflict, NotFound
from nahtlos.model.ids import BackupId, HostId, ProjectId, VolumeId
from nahtlos.model.inventory import OperationKind
from nahtlos.model.storage import Consistency, StorageBackend
from nahtlos.ops.cli import volume_amounts as amounts
from nahtlos.ops.cli import volume_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.copying import COPY_DEADLINE, DEADLINE, Consistent, Deadline, Wait, copied, standing
from nahtlos.ops.cli.settled import Project
from nahtlos.ops.cli.snapshots import given_up, wait_for_tasks
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.volumes import BackupRequest, RestoreRequest, TargetRequest, TaskView

Backup = Annotated[str, typer.Argument(metavar="BACKUP")]
Plain = Annotated[bool, typer.Option("--plain", help="Allow nbd://, without TLS: it can be read on its way.")]


def backup_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Backups: what volumes held, kept elsewhere.")

    @command(app, "list", surroundings)
    async def list_all(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, volume: Annotated[str | None, typer.Option(help="Only those of this volume.")] = None
    ) -> None:
        """All backups and what they rest on."""
        async with cli.client() as client:
            views = await client.volumes.backups()
        shown = tuple(view for view in views if volume is None or view.spec.volume == volume)
        cli.show(shown, pictures.backups(shown))

    @command(app, "show", surroundings)
    async def show(cli: Cli, backup: Backup) -> None:  # pyright: ignore[reportUnusedFunction]
        """One backup."""
        async with cli.client() as client:
            view = await client.volumes.backup(BackupId(backup))
        cli.show(view, pictures.backups((view,)))

    @command(app, "create", surroundings)
    async def create(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        volume: Annotated[str, typer.Option(show_default=False)],
        to: Annotated[
            str,
            typer.Option(help="A target's name, a folder, or nbds://…", metavar="PLACE", show_default=False),
        ],
        incremental: Annotated[
            bool, typer.Option("--incremental", help="Only what changed since the newest backup.")
        ] = False,
        bandwidth: Annotated[str, typer.Option(help="Bytes per second at most, as 50M.")] = "none",
        plain: Plain = False,
        consistency: Consistent = Consistency.CRASH,
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Back up a volume while it is written, as it is at one moment."""
        asked = BackupRequest(
            name=name,
            volume=VolumeId(volume),
            target=to,
            plain=plain,
            incremental=incremental,
            bytes_per_second=amounts.octets(bandwidth, "bandwidth"),
            consistency=consistency,
        )
        async with cli.client() as client:
            made = await client.volumes.create_backup(asked)
            if wait:
                await wait_for_tasks(cli, client, f"{volume} is backed up", deadline, (name,))
                view = next((v for v in await client.volumes.backups() if v.spec.id == made), None)
                if view is None:
                    raise await given_up(client, f"backup {name}", volume, OperationKind.BACKUP)
                cli.show(view, pictures.backups((view,)))
                return
        cli.show({"id": made}, Text(f"backup {name} is wished"))

    @command(app, "restore", surroundings)
    async def restore(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        backup: Backup,
        name: Annotated[str, typer.Argument(metavar="VOLUME", help="The new volume.")],
        host: Annotated[str | None, typer.Option(help="Where; chosen if left out.")] = None,
        backend: Annotated[
            StorageBackend | None, typer.Option(help="As the volume's that was backed up, if left out.")
        ] = None,
        project: Project = "default",
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Make a new volume of a backup and all it rests on."""
        asked = RestoreRequest(
            name=name,
            host=HostId(host) if host else None,
            project=ProjectId(project),
            backend=backend,
        )
        async with cli.client() as client:
            made = await client.volumes.restore_backup(BackupId(backup), asked)
            if wait:
                await wait_for_tasks(cli, client, f"{name} is restored", deadline, (name,))
                if made not in {v.spec.id for v in await client.volumes.volumes()}:
                    raise await given_up(client, f"volume {name}", name, OperationKind.BACKUP)
                view = await client.volumes.volume(made)
                cli.show(view, pictures.volume(view))
                return
        cli.show({"id": made}, Text(f"volume {name} is wished"))

    @command(app, "delete", surroundings)
    async def delete(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        backup: Backup,
        keep_files: Annotated[
            bool, typer.Option("--keep-files", help="Only forget it; what is at its target stays.")
        ] = False,
        wait: Wait = True,
        deadline: Deadline = DEADLINE,
    ) -> None:
        """Delete a backup that no other rests on, and what it holds at its target."""
        async with cli.client() as client:
            await client.volumes.delete_backup(BackupId(backup), keep_files=keep_files)
            if wait and not keep_files:
                await copied(
                    cli,
                    f"{backup} is deleted",
                    lambda: _left(client, BackupId(backup)),
                    lambda left: left is None,
                    lambda left: left or (),
                    lambda left: standing(left[0]) if left else "",
                    deadline=deadline,
                )
        text = "forgotten; its files are left" if keep_files else "deleted"
        cli.show({"id": backup, "deleted": True, "files_kept": keep_files}, Text(f"backup {backup} {text}"))

    app.add_typer(_target_commands(surroundings), name="target")
    return app


async def _left(client: OperatorClient, backup: BackupId) -> tuple[TaskView, ...] | None:
    """What is still to be done to delete it; None: it is gone."""
    try:
        view = await client.volumes.backup(backup)
    except NotFound:
        return None
    if not view.deleting:
        ended = await client.volumes.care.operations(subject=view.spec.volume, kind="backup", limit=1)
        error = ended[0].record.error if ended else None
        raise Conflict(
            error.message if error else f"{backup} is not deleted",
            field="backup",
            remedy=error.remedy if error else "ask for it again",
        )
    tasks = await client.volumes.tasks()
    return tuple(task for task in tasks if task.volume == view.spec.volume and task.kind == "backup")


def _target_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Places for backups, by name.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All targets."""
        async with cli.client() as client:
            views = await client.volumes.targets()
        cli.show(views, pictures.targets(views))

    @command(app, "set", surroundings)
    async def put(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        place: Annotated[str, typer.Argument(metavar="PLACE", help="A folder on every host, or nbds://…")],
        plain: Plain = False,
    ) -> None:
        """Name a place for backups, or change what a name stands for."""
        async with cli.client() as client:
            view = await client.volumes.put_target(TargetRequest(name=name, place=place, plain=plain))
        cli.show(view, pictures.targets((view,)))

    @command(app, "delete", surroundings)
    async def delete(cli: Cli, name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:  # pyright: ignore[reportUnusedFunction]
        """Forget a name. Backups that were made there stay."""
        async with cli.client() as client:
            await client.volumes.delete_target(name)
        cli.show({"name": name, "deleted": True}, Text(f"target {name} forgotten"))

    return app
