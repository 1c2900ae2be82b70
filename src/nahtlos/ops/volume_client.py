"""Volumes through the operator API: the methods of `runtime.controllers.volumes.Volumes`."""

from nahtlos.model.ids import BackupId, ImageId, SnapshotId, VolumeId
from nahtlos.model.volume_settings import VolumeSettings
from nahtlos.ops.network_client import Ask
from nahtlos.ops.volume_care_client import VolumeCareClient
from nahtlos.runtime.controllers.volumes import (
    Attaching,
    BackupRequest,
    BackupView,
    ExportRequest,
    ExportTicket,
    ImageRequest,
    ImageView,
    RelocationRequest,
    RestoreRequest,
    RevertRequest,
    SnapshotMoveRequest,
    SnapshotRequest,
    SnapshotView,
    TargetRequest,
    TargetView,
    TaskView,
    VolumeChange,
    VolumeRequest,
    VolumeView,
)


class VolumeClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.care = VolumeCareClient(ask)

    async def volumes(self) -> tuple[VolumeView, ...]:
        return await self._ask("GET", ("volumes",), None, tuple[VolumeView, ...])

    async def volume(self, volume: VolumeId) -> VolumeView:
        return await self._ask("GET", ("volumes", volume), None, VolumeView)

    async def create_volume(self, request: VolumeRequest) -> VolumeView:
        return await self._ask("POST", ("volumes",), request, VolumeView)

    async def change_volume(self, volume: VolumeId, change: VolumeChange) -> VolumeView:
        return await self._ask("PATCH", ("volumes", volume), change, VolumeView)

    async def attach_volume(self, volume: VolumeId, attaching: Attaching) -> VolumeView:
        return await self._ask("PUT", ("volumes", volume, "attachment"), attaching, VolumeView)

    async def detach_volume(self, volume: VolumeId) -> VolumeView:
        return await self._ask("DELETE", ("volumes", volume, "attachment"), None, VolumeView)

    async def relocate_volume(self, volume: VolumeId, request: RelocationRequest) -> VolumeView:
        return await self._ask("POST", ("volumes", volume, "relocation"), request, VolumeView)

    async def revert_volume(self, volume: VolumeId, request: RevertRequest) -> VolumeView:
        return await self._ask("POST", ("volumes", volume, "revert"), request, VolumeView)

    async def cancel_volume_tasks(self, volume: VolumeId) -> VolumeView:
        return await self._ask("DELETE", ("volumes", volume, "tasks"), None, VolumeView)

    async def delete_volume(self, volume: VolumeId) -> None:
        await self._ask("DELETE", ("volumes", volume), None, None)

    # --- snapshots

    async def snapshots(self) -> tuple[SnapshotView, ...]:
        return await self._ask("GET", ("snapshots",), None, tuple[SnapshotView, ...])

    async def snapshot(self, snapshot: SnapshotId) -> SnapshotView:
        return await self._ask("GET", ("snapshots", snapshot), None, SnapshotView)

    async def create_snapshots(self, request: SnapshotRequest) -> tuple[SnapshotId, ...]:
        return await self._ask("POST", ("snapshots",), request, tuple[SnapshotId, ...])

    async def move_snapshot(self, snapshot: SnapshotId, request: SnapshotMoveRequest) -> SnapshotView:
        return await self._ask("POST", ("snapshots", snapshot, "move"), request, SnapshotView)

    async def delete_snapshot(self, snapshot: SnapshotId) -> None:
        await self._ask("DELETE", ("snapshots", snapshot), None, None)

    async def export_snapshot(self, snapshot: SnapshotId, request: ExportRequest) -> ExportTicket:
        return await self._ask("POST", ("snapshots", snapshot, "export"), request, ExportTicket)

    async def unexport_snapshot(self, snapshot: SnapshotId) -> SnapshotView:
        return await self._ask("DELETE", ("snapshots", snapshot, "export"), None, SnapshotView)

    # --- images

    async def images(self) -> tuple[ImageView, ...]:
        return await self._ask("GET", ("volume-images",), None, tuple[ImageView, ...])

    async def import_image(self, request: ImageRequest) -> ImageView:
        return await self._ask("POST", ("volume-images",), request, ImageView)

    async def delete_image(self, image: ImageId) -> None:
        await self._ask("DELETE", ("volume-images", image), None, None)

    # --- backups

    async def backups(self) -> tuple[BackupView, ...]:
        return await self._ask("GET", ("backups",), None, tuple[BackupView, ...])

    async def backup(self, backup: BackupId) -> BackupView:
        return await self._ask("GET", ("backups", backup), None, BackupView)

    async def create_backup(self, request: BackupRequest) -> BackupId:
        return await self._ask("POST", ("backups",), request, str)

    async def restore_backup(self, backup: BackupId, request: RestoreRequest) -> VolumeId:
        return await self._ask("POST", ("backups", backup, "restore"), request, str)

    async def delete_backup(self, backup: BackupId, *, keep_files: bool = False) -> None:
        path = ("backups", backup, "record") if keep_files else ("backups", backup)
        await self._ask("DELETE", path, None, None)

    async def targets(self) -> tuple[TargetView, ...]:
        return await self._ask("GET", ("backup-targets",), None, tuple[TargetView, ...])

    async def put_target(self, request: TargetRequest) -> TargetView:
        return await self._ask("PUT", ("backup-targets",), request, TargetView)

    async def delete_target(self, name: str) -> None:
        await self._ask("DELETE", ("backup-targets", name), None, None)

    # --- the rest

    async def tasks(self) -> tuple[TaskView, ...]:
        return await self._ask("GET", ("volume-tasks",), None, tuple[TaskView, ...])

    async def volume_settings(self) -> VolumeSettings:
        return await self._ask("GET", ("volume-settings",), None, VolumeSettings)

    async def set_volume_settings(self, settings: VolumeSettings) -> VolumeSettings:
        return await self._ask("PUT", ("volume-settings",), settings, VolumeSettings)
