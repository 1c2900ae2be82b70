"""Backups of images, and restores into them.

The moment of a backup is a snapshot of its own, hidden from everybody else, and what has changed since an
earlier one is told by the cluster: no daemon has to live on for it. The moment of the newest whole backup
stays for the next one and costs what was overwritten since; others go.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import msgspec

from nahtlos.model.errors import Error, NotFound
from nahtlos.model.ids import BackupId, SnapshotId, VolumeId
from nahtlos.model.storage import BackupSpec, VolumeSpec
from nahtlos.physical.ports import BackupResult, OnCopied, OnMoment
from nahtlos.physical.storage.backup_targets import BackupManifest, Range, unpacked
from nahtlos.physical.storage.backups import (
    Making,
    Moment,
    OwnDoor,
    Pace,
    discard_at_target,
    make_backup,
    remove_from_target,
    restore_chain,
)
from nahtlos.physical.storage.ceph import clients, images
from nahtlos.physical.storage.ceph.doors import View
from nahtlos.physical.storage.ceph.gateway import Gateway
from nahtlos.physical.storage.ceph.images import ImageFacts
from nahtlos.physical.storage.ceph.process import RbdProcess
from nahtlos.physical.storage.nbd import ALLOCATION, NbdClient

GetImage = Callable[[VolumeId], Awaitable[ImageFacts | None]]


class ImageBackups:
    """`lock`: the gateway is used by one task at a time."""

    def __init__(
        self, rbd: RbdProcess, gateway: Gateway, door: OwnDoor, image: GetImage, lock: asyncio.Lock
    ) -> None:
        self._rbd = rbd
        self._gateway = gateway
        self._door = door
        self._image = image
        self._lock = lock

    async def backup(
        self,
        volume: VolumeId,
        backup: BackupSpec,
        base: BackupSpec | None,
        *,
        bytes_per_second: int,
        on_copied: OnCopied,
        on_moment: OnMoment | None,
    ) -> BackupResult:
        async def begin(since: BackupId | None) -> Moment:
            return await self._begin(volume, backup, since)

        async def settle(_manifest: BackupManifest) -> None:
            await self._settle(volume, images.moment(backup.id))

        making = Making(self._door, begin, settle, on_copied, on_moment)
        return await make_backup(making, backup, base, Pace(bytes_per_second))

    async def forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        async with self._lock:
            await self._gateway.hide(volume)
            await self._remove(volume, (images.moment(backup.id),))
        await discard_at_target(backup, self._door.pki_dir)

    async def delete(self, backup: BackupSpec) -> None:
        with suppress(Error):  # a moment that nobody asks for goes with the next backup, or with its volume
            await self._remove(backup.volume, (images.moment(backup.id),))
        await remove_from_target(backup, self._door.pki_dir)

    async def restore(self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], on_copied: OnCopied) -> None:
        await restore_chain(self._door, volume, chain, on_copied)

    # --- moments -----------------------------------------------------------------------------------

    async def _begin(self, volume: VolumeId, backup: BackupSpec, since: BackupId | None) -> Moment:
        moment = images.moment(backup.id)
        view = View(volume=volume, snapshot=moment)
        async with self._lock:
            image = await self._known(volume)
            if moment not in image.moments:
                await clients.check_answers(self._rbd, image)
                await self._rbd.ask("snapshot", name=volume, snapshot=moment)
                image = await self._known(volume)
            await self._gateway.show(view)
        size = image.moments[moment]
        known = since if since is not None and images.moment(since) in image.moments else None
        changed = await self._rbd.work(
            "changes", name=volume, snapshot=moment, since=images.moment(known) if known else None
        )
        text = msgspec.convert(changed, type=str)
        why = f"what changed since {since} is not known: the volume was reverted since, or was not in Ceph"

        def held(_source: NbdClient) -> Iterator[Range]:
            return unpacked(text, size)

        return Moment(
            export=view.export,
            size=size,
            context=ALLOCATION,
            held=held,
            since=known,
            why=why if since is not None and known is None else "",
        )

    async def _settle(self, volume: VolumeId, kept: SnapshotId) -> None:
        async with self._lock:
            await self._gateway.hide(volume)
            image = await self._image(volume)
            await self._remove(volume, tuple(m for m in (image.moments if image else ()) if m != kept))

    async def _remove(self, volume: VolumeId, moments: tuple[str, ...]) -> None:
        image = await self._image(volume)
        for moment in moments:
            if image is not None and moment in image.moments:
                await self._rbd.ask("snapshot_remove", name=volume, snapshot=moment)

    async def _known(self, volume: VolumeId) -> ImageFacts:
        image = await self._image(volume)
        if image is None:
            raise NotFound(f"there is no volume '{volume}' in this pool", field="volume")
        return image
