"""`Volumes` over the store: reads the state, checks the request, writes intent.

Every request that writes reads what it decides from in the same transaction. What takes time is written down
as a wish; the planning loop, which is woken, makes an operation of it. Nothing here waits for hosts.
"""

import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import BackupId, HostId, ImageId, KeyId, SnapshotId, VolumeId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import ServerSpec
from nahtlos.model.storage import VolumeSpec
from nahtlos.model.volume_settings import VolumeSettings
from nahtlos.model.volume_work import VolumeWork, words
from nahtlos.runtime.controllers import (
    attachment_requests,
    known_volumes,
    power_requests,
    snapshot_moves,
    snapshot_requests,
    volume_requests,
    volume_settings,
    volume_views,
)
from nahtlos.runtime.controllers.catalogues import ImageCatalog
from nahtlos.runtime.controllers.look import Look, Looks
from nahtlos.runtime.controllers.network_views import settling
from nahtlos.runtime.controllers.project_requests import check_project
from nahtlos.runtime.controllers.requests import listed
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_care_service import VolumeCareService, operations_of
from nahtlos.runtime.controllers.volume_records import fenced
from nahtlos.runtime.controllers.volumes import (
    Attaching,
    BackupRequest,
    BackupView,
    ExportRequest,
    ExportTicket,
    ExportView,
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
from nahtlos.runtime.store import volumes as rows
from nahtlos.runtime.store.store import AsyncConnection

OPERATIONS_SHOWN = 20
Said = Callable[[str, str, str], None]


class KeyMaker(Protocol):
    """As `identity.Keyring`; blocks shortly."""

    def create(self, key: KeyId) -> None: ...


@dataclass(frozen=True)
class _Change:
    """A transaction that writes, and what it has read."""

    tx: AsyncConnection
    state: State
    inventory: Inventory


class VolumeService:
    """`said`: what has been asked for, as an event; it wakes the planning loop. `keys` None: no volume can be
    encrypted."""

    def __init__(
        self, looks: Looks, *, said: Said, images: ImageCatalog, keys: KeyMaker | None = None
    ) -> None:
        self._looks = looks
        self._said = said
        self._images = images
        self._keys = keys
        self.care = VolumeCareService(looks, said=said, images=images, view=self.volume)

    @asynccontextmanager
    async def _changing(self) -> AsyncGenerator[_Change]:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            yield _Change(tx, state, state.inventory(self._looks.connected))

    async def _wish(self, change: _Change, work: VolumeWork) -> str:
        wish = await rows.add_wish(change.tx, work, self._looks.wall())
        return wish.id

    # --- volumes -------------------------------------------------------------------------------------

    async def volumes(self) -> tuple[VolumeView, ...]:
        look = await self._looks.now()
        behind = self._behind(look)
        return tuple(
            volume_views.volume_view(look.state, look.inventory, look.report, behind, volume)
            for volume in look.state.volumes
        )

    def _behind(self, look: Look) -> tuple[HostId, ...]:
        return settling(look.state, look.inventory.connected, self._looks.wall()).hosts

    async def volume(self, volume: VolumeId) -> VolumeView:
        look = await self._looks.now()
        if volume not in look.state.volumes:
            known_volumes.known_volume(look.state, volume)
        behind = self._behind(look)
        view = volume_views.volume_view(look.state, look.inventory, look.report, behind, volume)
        async with self._looks.reading() as tx:
            newest = await operations_of(tx, subject=volume, limit=OPERATIONS_SHOWN)
        ended = tuple(each for each in newest if each.ended_at is not None)
        return msgspec.structs.replace(view, ended=ended)

    async def create_volume(self, request: VolumeRequest) -> VolumeView:
        images = await self._images.images()
        key = self._new_key(request)
        async with self._changing() as change:
            spec = volume_requests.new_volume(change.state, change.inventory, request, images, key)
            if key is not None and spec.encryption_key == key and self._keys is not None:
                self._keys.create(key)
            await rows.add(change.tx, spec)
        where = listed(copy.host for copy in spec.copies)
        self._said("volume.created", spec.id, f"volume {spec.id} is to be: {spec.size_mib} MiB on {where}")
        return await self.volume(spec.id)

    def _new_key(self, request: VolumeRequest) -> KeyId | None:
        """Its name is by chance: one of a volume that was there before would be another's."""
        if not request.encrypted:
            return None
        if self._keys is None:
            raise Refused(
                "this orchestrator has no keyring",
                field="encrypted",
                remedy="start it with one, or leave the volume unencrypted",
            )
        return KeyId(f"volume-{secrets.token_hex(8)}")

    async def change_volume(self, volume: VolumeId, change: VolumeChange) -> VolumeView:
        async with self._changing() as current:
            spec = volume_requests.changed_volume(current.state, current.inventory, volume, change)
            check_project(current.state, spec.project, volumes={volume: spec})
            await rows.put(current.tx, spec)
        self._said("volume.changed", volume, f"{volume} is to change")
        return await self.volume(volume)

    async def attach_volume(self, volume: VolumeId, attaching: Attaching) -> VolumeView:
        async with self._changing() as change:
            server = attachment_requests.attached_server(change.state, volume, attaching.server)
            check_project(change.state, server.project, servers={server.id: server})
            await self.attach(change.tx, change.state.volumes[volume].spec, server)
        self._said("volume.attached", volume, f"{volume} is to be attached to {attaching.server}")
        return await self.volume(volume)

    async def attach(self, tx: AsyncConnection, volume: VolumeSpec, server: ServerSpec) -> None:
        """Who had it before is shut out, whether or not it knows that it has it no more."""
        await rows.attach(tx, volume.id, server.id)
        await rows.put(tx, fenced(volume))
        await rows.put_server(tx, server)

    async def detach_volume(self, volume: VolumeId) -> VolumeView:
        async with self._changing() as change:
            server = attachment_requests.detached_server(change.state, volume)
            await rows.detach(change.tx, volume)
            await rows.put_server(change.tx, server)
        self._said("volume.detached", volume, f"{volume} is to be detached from {server.id}")
        return await self.volume(volume)

    async def relocate_volume(self, volume: VolumeId, request: RelocationRequest) -> VolumeView:
        async with self._changing() as change:
            work = volume_requests.relocation(change.state, change.inventory, volume, request)
            await self._wish(change, work)
        self._said("volume.relocate", volume, f"{volume} is wanted elsewhere: {words(work)}")
        return await self.volume(volume)

    async def revert_volume(self, volume: VolumeId, request: RevertRequest) -> VolumeView:
        async with self._changing() as change:
            work = snapshot_requests.reverting(
                change.state, change.inventory, volume, request.snapshot, stop=request.stop
            )
            await self._wish(change, work)
            if request.stop and (holder := known_volumes.holder_of(change.state, volume)):
                stopped = power_requests.stopped_for_a_while(change.state, change.inventory, holder)
                if stopped is not None:
                    await rows.put_server(change.tx, stopped)
        self._said("volume.revert", volume, f"{volume} is to be again as in {request.snapshot}")
        return await self.volume(volume)

    async def cancel_volume_tasks(self, volume: VolumeId) -> VolumeView:
        async with self._changing() as change:
            known_volumes.known_volume(change.state, volume)
            for wish in known_volumes.wishes_of(change.state, volume):
                await rows.cancel_wish(change.tx, wish.id)
        self._said("volume.cancel", volume, f"what was asked for of {volume} is given up")
        return await self.volume(volume)

    async def delete_volume(self, volume: VolumeId) -> None:
        async with self._changing() as change:
            volume_requests.check_deletable(change.state, volume)
            await rows.mark_removed(change.tx, volume)
        self._said("volume.deleted", volume, f"{volume} is to be deleted")

    # --- snapshots -----------------------------------------------------------------------------------

    async def snapshots(self) -> tuple[SnapshotView, ...]:
        look = await self._looks.now()
        return tuple(
            volume_views.snapshot_view(look.state, look.inventory, name) for name in look.state.kept.snapshots
        )

    async def snapshot(self, snapshot: SnapshotId) -> SnapshotView:
        look = await self._looks.now()
        if snapshot not in look.state.kept.snapshots:
            snapshot_requests.known_snapshot(look.state, snapshot)
        return volume_views.snapshot_view(look.state, look.inventory, snapshot)

    async def create_snapshots(self, request: SnapshotRequest) -> tuple[SnapshotId, ...]:
        async with self._changing() as change:
            work = snapshot_requests.snapshot_group(change.state, change.inventory, request)
            await self._wish(change, work)
        self._said("snapshot.wished", request.name, f"{words(work)} of {listed(request.volumes)}")
        return tuple(snapshot.id for snapshot in work.snapshots)

    async def move_snapshot(self, snapshot: SnapshotId, request: SnapshotMoveRequest) -> SnapshotView:
        async with self._changing() as change:
            work = snapshot_moves.moving(change.state, change.inventory, snapshot, request)
            concerned = (work.source, work.destination)
            snapshot_moves.check_understood(self._looks.lacking("snapshot-move", concerned))
            await self._wish(change, work)
        self._said("snapshot.move", snapshot, f"{snapshot} is wanted elsewhere: {words(work)}")
        return await self.snapshot(snapshot)

    async def delete_snapshot(self, snapshot: SnapshotId) -> None:
        async with self._changing() as change:
            snapshot_requests.check_snapshot_deletable(change.state, snapshot)
            await rows.mark_snapshot_removed(change.tx, snapshot)
        self._said("snapshot.deleted", snapshot, f"{snapshot} is to be deleted")

    async def export_snapshot(self, snapshot: SnapshotId, request: ExportRequest) -> ExportTicket:
        """The key is in the database and on the one host, and shown here once."""
        identity, key = f"x{secrets.token_hex(6)}", secrets.token_hex(32)
        async with self._changing() as change:
            export = snapshot_requests.new_export(
                change.state, change.inventory, snapshot, request, identity=identity, key_hex=key
            )
            await rows.put_export(change.tx, export)
            uri = snapshot_requests.export_uri(change.state, export)
        self._said("snapshot.exported", snapshot, f"{snapshot} is to be readable on {export.host}")
        view = ExportView(id=export.id, uri=uri, expires_at=export.expires_at)
        return ExportTicket(export=view, credential=f"{export.id}:{key}")

    async def unexport_snapshot(self, snapshot: SnapshotId) -> SnapshotView:
        async with self._changing() as change:
            snapshot_requests.known_snapshot(change.state, snapshot)
            await rows.forget_exports(change.tx, snapshot=snapshot)
        self._said("snapshot.unexported", snapshot, f"{snapshot} is not to be readable from outside any more")
        return await self.snapshot(snapshot)

    # --- images --------------------------------------------------------------------------------------

    async def images(self) -> tuple[ImageView, ...]:
        state = (await self._looks.now()).state
        known = await self._images.images()
        coming = self._images.coming()
        ready = tuple(
            ImageView(id=name, size_mib=size, volumes=_made_from(state, name))
            for name, size in sorted(known.items())
        )
        return (*ready, *(view for view in coming if view.id not in known))

    async def import_image(self, request: ImageRequest) -> ImageView:
        name = ImageId(checked_name(request.name, "name"))
        if name in await self._images.images():
            raise Conflict(f"an image '{name}' exists", field="name", remedy="choose another name")
        view = await self._images.take_in(request)
        self._said("image.import", name, f"image {name} is taken in from {request.file}")
        return view

    async def delete_image(self, image: ImageId) -> None:
        known = await self._images.images()
        if image not in known:
            raise NotFound(f"no image '{image}'", field="image", remedy=f"images: {listed(known)}")
        async with self._changing() as change:
            waiting = [
                name
                for name in _made_from(change.state, image)
                if not _is_made(change.inventory, change.state.volumes[name].spec)
            ]
            if waiting:
                raise Conflict(
                    f"{listed(waiting)} is still to be made from {image}",
                    field="image",
                    remedy="wait until it is served",
                )
        await self._images.delete(image)
        self._said("image.deleted", image, f"image {image} is deleted")

    # --- backups -------------------------------------------------------------------------------------

    async def backups(self) -> tuple[BackupView, ...]:
        return volume_views.backup_views((await self._looks.now()).state)

    async def backup(self, backup: BackupId) -> BackupView:
        state = (await self._looks.now()).state
        snapshot_requests.known_backup(state, backup)
        return next(view for view in volume_views.backup_views(state) if view.spec.id == backup)

    async def create_backup(self, request: BackupRequest) -> BackupId:
        async with self._changing() as change:
            work = snapshot_requests.backing_up(change.state, change.inventory, request)
            await self._wish(change, work)
        self._said("backup.wished", request.name, f"{words(work)} to {work.backup.target}")
        return work.backup.id

    async def restore_backup(self, backup: BackupId, request: RestoreRequest) -> VolumeId:
        async with self._changing() as change:
            work = snapshot_requests.restoring(change.state, change.inventory, backup, request)
            await self._wish(change, work)
        self._said("backup.restore", backup, f"{words(work)} on {work.volume.host}")
        return work.volume.id

    async def delete_backup(self, backup: BackupId, *, keep_files: bool = False) -> None:
        async with self._changing() as change:
            work = snapshot_requests.deleting(change.state, backup, keep_files=keep_files)
            if keep_files:
                for wish in snapshot_requests.deletions_of(change.state, backup):
                    await rows.cancel_wish(change.tx, wish.id)
                await rows.forget_backup(change.tx, backup)
            else:
                await self._wish(change, work)
        text = "is not known any more" if keep_files else "is to be deleted"
        self._said("backup.deleted", backup, f"backup {backup} {text}")

    async def targets(self) -> tuple[TargetView, ...]:
        state = (await self._looks.now()).state
        return tuple(TargetView(name=name, place=place) for name, place in state.kept.targets.items())

    async def put_target(self, request: TargetRequest) -> TargetView:
        name, place = snapshot_requests.new_target(request)
        async with self._changing() as change:
            await rows.put_target(change.tx, name, place)
        self._said("backup.target", name, f"backups to {name} go to {place}")
        return TargetView(name=name, place=place)

    async def delete_target(self, name: str) -> None:
        async with self._changing() as change:
            snapshot_requests.check_target(change.state, name)
            await rows.forget_target(change.tx, name)
        self._said("backup.target", name, f"backup target {name} is gone")

    # --- the rest ------------------------------------------------------------------------------------

    async def volume_settings(self) -> VolumeSettings:
        return (await self._looks.now()).state.kept.settings

    async def set_volume_settings(self, settings: VolumeSettings) -> VolumeSettings:
        checked = volume_settings.checked_settings(settings)
        async with self._changing() as change:
            await rows.set_settings(change.tx, checked)
        self._said("volume.settings", "cloud", "settings of volumes have changed")
        return checked

    async def tasks(self) -> tuple[TaskView, ...]:
        look = await self._looks.now()
        return volume_views.tasks(look.state, look.inventory, look.report)


def _made_from(state: State, image: ImageId) -> tuple[VolumeId, ...]:
    return tuple(name for name, row in state.volumes.items() if row.spec.image == image and not row.removed)


def _is_made(inventory: Inventory, volume: VolumeSpec) -> bool:
    seen = (inventory.hosts.get(copy.host) for copy in volume.copies)
    return all(each is not None and any(v.id == volume.id for v in each.volumes) for each in seen)
