"""`nahtlos operation …`"""

from typing import Annotated

import typer

from nahtlos.model.ids import OperationId
from nahtlos.model.inventory import OperationKind
from nahtlos.ops.cli import volume_pictures as pictures
from nahtlos.ops.cli.command import Cli, Surroundings, command


def operation_commands(surroundings: Surroundings) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, help="Operations of all kinds, and what came of them.")

    @command(app, "list", surroundings)
    async def list_all(  # pyright: ignore[reportUnusedFunction]
        cli: Cli,
        of: Annotated[str, typer.Option(help="Only of this volume, server or host.")] = "",
        kind: Annotated[OperationKind | None, typer.Option(help="Only of this kind.")] = None,
        limit: Annotated[int, typer.Option(help="At most so many.", min=1)] = 50,
    ) -> None:
        """Newest operations first, those under way among them."""
        async with cli.client() as client:
            views = await client.volumes.care.operations(
                subject=of, kind=kind.value if kind is not None else "", limit=limit
            )
        cli.show(views, pictures.operations(views, "no operations yet"))

    @command(app, "show", surroundings)
    async def show(  # pyright: ignore[reportUnusedFunction]
        cli: Cli, operation: Annotated[str, typer.Argument(metavar="OPERATION")]
    ) -> None:
        """One operation."""
        async with cli.client() as client:
            view = await client.volumes.care.operation(OperationId(operation))
        cli.show(view, pictures.operation(view))

    return app
