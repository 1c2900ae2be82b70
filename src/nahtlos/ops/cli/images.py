"""`nahtlos image …`"""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from nahtlos.model.errors import Refused
from nahtlos.model.ids import ImageId
from nahtlos.model.storage import VolumeFormat
from nahtlos.ops.cli import volume_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command
from nahtlos.ops.cli.copying import COPY_DEADLINE, Deadline, Wait
from nahtlos.ops.cli.waiting import wait_until
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.volumes import ImageRequest, ImageView

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

    @command(app, "delete", surroundings)
    async def delete(cli: Cli, image: Image) -> None:  # pyright: ignore[reportUnusedFunction]
        """Delete an image. Volumes made from it stay as they are."""
        async with cli.client() as client:
            await client.volumes.delete_image(ImageId(image))
        cli.show({"id": image, "deleted": True}, Text(f"image {image} deleted"))

    return app


async def _image(client: OperatorClient, image: ImageId) -> ImageView | None:
    """Refused if it could not be taken in."""
    view = next((v for v in await client.volumes.images() if v.id == image), None)
    if view is not None and view.problem:
        raise Refused(view.problem, field="file", remedy="correct the file, then import it again")
    return view
