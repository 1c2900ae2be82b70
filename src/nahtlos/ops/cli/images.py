"""`nahtlos image …`"""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import HostId, ImageId, SnapshotId
from nahtlos.model.storage import VolumeFormat
from nahtlos.ops.cli import volume_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.copying import COPY_DEADLINE, Deadline, Wait
from nahtlos.ops.cli.volume_care import snapshot_to_file
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.volumes import (
    FileView,
    ImageFileRequest,
    ImageRequest,
    ImageView,
    SnapshotFileRequest,
)

Image = Annotated[str, typer.Argument(metavar="IMAGE")]


def image_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Images: what volumes are made from.")

    @command(app, "list", surroundings)
    async def list_all(cli: Cli) -> None:  # pyright: ignore[reportUnusedFunction]
        """All images, and what was made from them."""
        async with cli.client() as client:
            views = await client.volumes.images()
        cli.show(views, pictures.images(views))

    @command(app, "import", surroundings)
    async def take_in(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        name: Annotated[str, typer.Argument(metavar="NAME")],
        file: Annotated[Path, typer.Argument(metavar="FILE", help="On the orchestrator's machine.")],
        image_format: Annotated[VolumeFormat, typer.Option("--format", help="What FILE is.")],
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Take in an image. FILE is judged in a confined process before anything of it is believed."""
        if not file.is_absolute():
            raise Refused(f"'{file}' is no whole path", field="file", remedy="begin with /")
        asked = ImageRequest(name=name, file=str(file), format=image_format)
        async with cli.client() as client:
            view = await client.volumes.import_image(asked)
            if wait:
                view = await wait_until(
                    cli,
                    f"{name} is taken in",
                    lambda: _image(client, ImageId(name)),
                    lambda seen: seen is not None and seen.progress >= 1.0,
                    lambda seen: f"{seen.progress:.0%}" if seen is not None else "",
                    deadline=deadline,
                )
        assert view is not None
        cli.show(view, pictures.images((view,)))

    @command(app, "export", surroundings)
    async def write_out(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        names: Annotated[list[str], typer.Argument(metavar="[IMAGE] FILE", help="FILE by its whole path.")],
        snapshot: Annotated[
            str | None, typer.Option(help="Of this snapshot, on a host that keeps it.")
        ] = None,
        image_format: Annotated[VolumeFormat, typer.Option("--format", help="What FILE is to be.")] = (
            VolumeFormat.QCOW2
        ),
        host: Annotated[str | None, typer.Option(help="With --snapshot: on this host.")] = None,
        wait: Wait = True,
        deadline: Deadline = COPY_DEADLINE,
    ) -> None:
        """Write an image to a file of the orchestrator's machine, or a snapshot to one of its host.

        FILE is whole, rests on nothing, and can be imported."""
        image, file = _image_and_file(names, snapshot)
        async with cli.client() as client:
            if snapshot is not None:
                asked = SnapshotFileRequest(
                    file=file, format=image_format, host=HostId(host) if host else None
                )
                await snapshot_to_file(cli, client, SnapshotId(snapshot), asked, wait, deadline)
                return
            if host is not None:
                raise Refused(
                    "images are on the orchestrator's machine", field="host", remedy="leave --host out"
                )
            request = ImageFileRequest(file=file, format=image_format)
            view = await client.volumes.care.write_image(ImageId(image), request)
            if wait:
                view = await wait_until(
                    cli,
                    f"{image} is written to {file}",
                    lambda: _file(client, file),
                    lambda seen: bool(seen.sha256),
                    lambda seen: f"{seen.progress:.0%}",
                    deadline=deadline,
                )
        cli.show(view, pictures.file_written(view))

    @command(app, "delete", surroundings)
    async def delete(cli: Cli, image: Image) -> None:  # pyright: ignore[reportUnusedFunction]
        """Delete an image. Volumes made from it stay as they are."""
        async with cli.client() as client:
            await client.volumes.delete_image(ImageId(image))
        cli.show({"id": image, "deleted": True}, Text(f"image {image} deleted"))

    return app


def _image_and_file(names: list[str], snapshot: str | None) -> tuple[str, str]:
    wanted = 1 if snapshot is not None else 2
    if len(names) != wanted:
        raise Refused(
            f"{len(names)} names are given",
            field="file",
            remedy="image export IMAGE FILE, or image export --snapshot SNAPSHOT FILE",
        )
    return names[0], names[-1]


async def _file(client: OperatorClient, file: str) -> FileView:
    """Refused if it could not be written; NotFound if an orchestrator started since knows nothing of it."""
    view = next((v for v in await client.volumes.care.files() if v.file == file), None)
    if view is None:
        raise NotFound(
            f"nothing is known of {file}: the orchestrator was started anew",
            field="file",
            remedy="ask for it again",
        )
    if view.problem:
        raise Refused(view.problem, field="file", remedy="put that right, then ask for it again")
    return view


async def _image(client: OperatorClient, image: ImageId) -> ImageView | None:
    """Refused if it could not be taken in."""
    view = next((v for v in await client.volumes.images() if v.id == image), None)
    if view is not None and view.problem:
        raise Refused(view.problem, field="file", remedy="correct the file, then import it again")
    return view
