"""The operator API of volumes: paths over `runtime.controllers.volumes.Volumes`.

Owns paths and status codes of its subject. How bodies are read and answers written it is given; errors,
callers and logging are `ops.api`'s. 202: it is written down, and an operation will come of it.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nahtlos.model.ids import BackupId, ImageId, SnapshotId, VolumeId
from nahtlos.model.volume_settings import VolumeSettings
from nahtlos.ops.network_api import Answer, Body
from nahtlos.runtime.controllers.volumes import (
    Attaching,
    BackupRequest,
    ExportRequest,
    ImageRequest,
    RelocationRequest,
    RestoreRequest,
    RevertRequest,
    SnapshotMoveRequest,
    SnapshotRequest,
    TargetRequest,
    VolumeChange,
    VolumeRequest,
    Volumes,
)


class VolumeRoutes:
    """Adds them to `routes`. `of` gives the volumes at the time of a call."""

    def __init__(self, routes: APIRouter, of: Callable[[], Volumes], body: Body, answer: Answer) -> None:
        self._routes, self._of, self._body, self._answer = routes, of, body, answer

    def add(self) -> None:
        of = self._of
        self._read("/volumes", lambda: of().volumes())
        self._read_one("/volumes/{name}", lambda name: of().volume(VolumeId(name)))
        self._make("/volumes", VolumeRequest, lambda asked: of().create_volume(asked), 201)
        self._change("PATCH", "/volumes/{name}", VolumeChange, self._on_volume("change_volume"), 200)
        self._remove("/volumes/{name}", lambda name: of().delete_volume(VolumeId(name)))
        self._change("PUT", "/volumes/{name}/attachment", Attaching, self._on_volume("attach_volume"), 202)
        self._act("DELETE", "/volumes/{name}/attachment", lambda name: of().detach_volume(VolumeId(name)))
        self._change(
            "POST", "/volumes/{name}/relocation", RelocationRequest, self._on_volume("relocate_volume"), 202
        )
        self._change("POST", "/volumes/{name}/revert", RevertRequest, self._on_volume("revert_volume"), 202)
        self._act("DELETE", "/volumes/{name}/tasks", lambda name: of().cancel_volume_tasks(VolumeId(name)))
        self._read("/volume-tasks", lambda: of().tasks())
        self._read("/volume-settings", lambda: of().volume_settings())
        self._make(
            "/volume-settings", VolumeSettings, lambda asked: of().set_volume_settings(asked), 200, "PUT"
        )
        self._add_snapshots()
        self._add_images_and_backups()

    def _on_volume(self, method: str) -> Callable[[str, Any], Awaitable[Any]]:
        return lambda name, asked: getattr(self._of(), method)(VolumeId(name), asked)

    def _add_snapshots(self) -> None:
        of = self._of
        self._read("/snapshots", lambda: of().snapshots())
        self._read_one("/snapshots/{name}", lambda name: of().snapshot(SnapshotId(name)))
        self._make("/snapshots", SnapshotRequest, lambda asked: of().create_snapshots(asked), 202)
        self._change(
            "POST",
            "/snapshots/{name}/move",
            SnapshotMoveRequest,
            lambda name, asked: of().move_snapshot(SnapshotId(name), asked),
            202,
        )
        self._remove("/snapshots/{name}", lambda name: of().delete_snapshot(SnapshotId(name)))
        self._change(
            "POST",
            "/snapshots/{name}/export",
            ExportRequest,
            lambda name, asked: of().export_snapshot(SnapshotId(name), asked),
            201,
        )
        self._act("DELETE", "/snapshots/{name}/export", lambda name: of().unexport_snapshot(SnapshotId(name)))

    def _add_images_and_backups(self) -> None:
        of = self._of
        self._read("/volume-images", lambda: of().images())
        self._make("/volume-images", ImageRequest, lambda asked: of().import_image(asked), 202)
        self._remove("/volume-images/{name}", lambda name: of().delete_image(ImageId(name)))
        self._read("/backups", lambda: of().backups())
        self._read_one("/backups/{name}", lambda name: of().backup(BackupId(name)))
        self._make("/backups", BackupRequest, lambda asked: of().create_backup(asked), 202)
        self._remove("/backups/{name}", lambda name: of().delete_backup(BackupId(name)))
        self._remove(
            "/backups/{name}/record", lambda name: of().delete_backup(BackupId(name), keep_files=True)
        )
        self._change(
            "POST",
            "/backups/{name}/restore",
            RestoreRequest,
            lambda name, asked: of().restore_backup(BackupId(name), asked),
            202,
        )
        self._read("/backup-targets", lambda: of().targets())
        self._make("/backup-targets", TargetRequest, lambda asked: of().put_target(asked), 201, "PUT")
        self._remove("/backup-targets/{name}", lambda name: of().delete_target(name))

    # --- how a path is added -------------------------------------------------------------------------

    def _read(self, path: str, ask: Callable[[], Awaitable[Any]]) -> None:
        @self._routes.get(path)
        async def read() -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await ask())

    def _read_one(self, path: str, ask: Callable[[str], Awaitable[Any]]) -> None:
        @self._routes.get(path)
        async def read_one(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await ask(name))

    def _make(
        self,
        path: str,
        kind: type[Any],
        make: Callable[[Any], Awaitable[Any]],
        status: int,
        method: str = "POST",
    ) -> None:
        @self._routes.api_route(path, methods=[method])
        async def made(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await make(await self._body(request, kind)), status=status)

    def _change(
        self,
        method: str,
        path: str,
        kind: type[Any],
        change: Callable[[str, Any], Awaitable[Any]],
        status: int,
    ) -> None:
        @self._routes.api_route(path, methods=[method])
        async def changed(name: str, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await change(name, await self._body(request, kind)), status=status)

    def _act(self, method: str, path: str, act: Callable[[str], Awaitable[Any]]) -> None:
        @self._routes.api_route(path, methods=[method])
        async def acted(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
            return self._answer(await act(name), status=202)

    def _remove(self, path: str, remove: Callable[[str], Awaitable[None]]) -> None:
        @self._routes.delete(path)
        async def removed(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
            await remove(name)
            return Response(status_code=204)
