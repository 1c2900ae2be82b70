"""The operator API of volumes' health, pace and files, and of what came of operations: paths over
`runtime.controllers.volumes.VolumeCare`. As `ops.volume_api`, whose neighbour it is.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from nahtlos.model.ids import ImageId, OperationId, SnapshotId, VolumeId
from nahtlos.ops.network_api import Answer, Body
from nahtlos.runtime.controllers.volumes import (
    ImageFileRequest,
    RebuildRequest,
    ScrubRequest,
    SnapshotFileRequest,
    SpeedRequest,
    VolumeCare,
)


class VolumeCareRoutes:
    """Adds them to `routes`. `of` gives what they ask at the time of a call."""

    def __init__(self, routes: APIRouter, of: Callable[[], VolumeCare], body: Body, answer: Answer) -> None:
        self._routes, self._of, self._body, self._answer = routes, of, body, answer

    def add(self) -> None:
        self._add_volumes()
        self._add_files()
        self._add_operations()

    def _add_volumes(self) -> None:
        @self._routes.post("/volumes/{name}/scrub")
        async def scrub(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            asked = await self._body(request, ScrubRequest)
            return self._answer(await self._of().scrub(VolumeId(name), asked), status=202)

        @self._routes.post("/volumes/{name}/rebuild")
        async def rebuild(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            asked = await self._body(request, RebuildRequest)
            return self._answer(await self._of().rebuild(VolumeId(name), asked), status=202)

        @self._routes.put("/volumes/{name}/speed")
        async def set_speed(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            asked = await self._body(request, SpeedRequest)
            return self._answer(await self._of().set_speed(VolumeId(name), asked), status=202)

    def _add_files(self) -> None:
        @self._routes.post("/snapshots/{name}/file")
        async def write_snapshot(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            asked = await self._body(request, SnapshotFileRequest)
            return self._answer(await self._of().write_snapshot(SnapshotId(name), asked), status=202)

        @self._routes.post("/volume-images/{name}/file")
        async def write_image(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            asked = await self._body(request, ImageFileRequest)
            return self._answer(await self._of().write_image(ImageId(name), asked), status=202)

        @self._routes.get("/image-files")
        async def files() -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await self._of().files())

    def _add_operations(self) -> None:
        @self._routes.get("/operations")
        async def operations(  # pyright: ignore[reportUnusedFunction]
            subject: str = "", kind: str = "", limit: Annotated[int, Query()] = 50
        ) -> Response:
            return self._answer(await self._of().operations(subject=subject, kind=kind, limit=limit))

        @self._routes.get("/operations/{name}")
        async def operation(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await self._of().operation(OperationId(name)))
