"""Volumes' health, pace and files, and operations, through the operator API: the methods of
`runtime.controllers.volumes.VolumeCare`."""

from urllib.parse import urlencode

from nahtlos.model.ids import ImageId, OperationId, SnapshotId, VolumeId
from nahtlos.ops.network_client import Ask
from nahtlos.runtime.controllers.volumes import (
    FileView,
    ImageFileRequest,
    OperationView,
    RebuildRequest,
    ScrubRequest,
    SnapshotFileRequest,
    SnapshotView,
    SpeedRequest,
    VolumeView,
)


class VolumeCareClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def scrub(self, volume: VolumeId, request: ScrubRequest) -> VolumeView:
        return await self._ask("POST", ("volumes", volume, "scrub"), request, VolumeView)

    async def rebuild(self, volume: VolumeId, request: RebuildRequest) -> VolumeView:
        return await self._ask("POST", ("volumes", volume, "rebuild"), request, VolumeView)

    async def set_speed(self, volume: VolumeId, request: SpeedRequest) -> VolumeView:
        return await self._ask("PUT", ("volumes", volume, "speed"), request, VolumeView)

    async def write_snapshot(self, snapshot: SnapshotId, request: SnapshotFileRequest) -> SnapshotView:
        return await self._ask("POST", ("snapshots", snapshot, "file"), request, SnapshotView)

    async def write_image(self, image: ImageId, request: ImageFileRequest) -> FileView:
        return await self._ask("POST", ("volume-images", image, "file"), request, FileView)

    async def files(self) -> tuple[FileView, ...]:
        return await self._ask("GET", ("image-files",), None, tuple[FileView, ...])

    async def operations(
        self, *, subject: str = "", kind: str = "", limit: int = 50
    ) -> tuple[OperationView, ...]:
        query = urlencode({"subject": subject, "kind": kind, "limit": limit})
        return await self._ask("GET", ("operations",), None, tuple[OperationView, ...], query)

    async def operation(self, operation: OperationId) -> OperationView:
        return await self._ask("GET", ("operations", operation), None, OperationView)
