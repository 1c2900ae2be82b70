"""The operator API of whole servers' snapshots: paths over `runtime.controllers.cloud.ServerSnapshots`. How
bodies are read and answers written it is given; errors, callers and logging are `ops.api`'s."""

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nahtlos.model.ids import ServerId, SnapshotId
from nahtlos.ops.network_api import Answer, Body
from nahtlos.runtime.controllers.cloud import ServerSnapshots
from nahtlos.runtime.controllers.server_snapshots import ServerRevertRequest, ServerSnapshotRequest


def server_snapshot_routes(
    routes: APIRouter, of: Callable[[], ServerSnapshots], body: Body, answer: Answer
) -> None:
    """Adds them to `routes`. `of` gives the snapshots at the time of a call."""

    @routes.get("/server-snapshots")
    async def snapshots() -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().server_snapshots())

    @routes.get("/server-snapshots/{name}")
    async def snapshot(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().server_snapshot(SnapshotId(name)))

    @routes.post("/server-snapshots")
    async def create(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return answer(await of().create(await body(request, ServerSnapshotRequest)), 202)

    @routes.delete("/server-snapshots/{name}")
    async def delete(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        await of().delete(SnapshotId(name))
        return answer(None, 202)

    @routes.post("/servers/{server}/revert")
    async def revert(server: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        asked = await body(request, ServerRevertRequest)
        return answer(await of().revert(ServerId(server), asked), 202)
