"""One `physical.ports.Storage` over the backends of a host: each verb goes to the one whose volume it is.

Where a verb names only a volume or a snapshot, it is the one that holds it. A volume that changes its backend
is held by both until its relocation is finished: verbs of the source's side then mean the one that gives it
away, and what is observed of it is the copy of the higher epoch. Owns no state.
"""

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from nahtlos.model.config import VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Error, NotFound, Refused
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.inventory import PoolStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.storage import (
    BackupSpec,
    Changes,
    CopyPhase,
    CopyProgress,
    SnapshotOffer,
    SnapshotSpec,
    StorageBackend,
    VolumeFormat,
    VolumeSpec,
)
from nahtlos.physical.ports import (
    BackupResult,
    FileWritten,
    OnCopied,
    OnMoment,
    RawVolume,
    SnapshotFetch,
    Speed,
    Storage,
    StorageDesired,
)
from nahtlos.physical.storage.ceph.clients import Reach


class CephBackend(Storage, Protocol):
    def holds(self, volume: VolumeId) -> bool: ...


class Backends:
    def __init__(self, embedded: Storage, ceph: CephBackend | None) -> None:
        self._embedded = embedded
        self._ceph = ceph
        self._reach = Reach()

    async def close(self) -> None:
        """Its backends are closed by who made them."""
        await self._reach.close()

    # --- volumes -----------------------------------------------------------------------------------

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        """What is wrong with one backend does not keep the other from being put right."""
        parts: dict[StorageBackend, list[VolumeSpec]] = {backend: [] for backend in StorageBackend}
        for volume in desired.volumes:
            parts[volume.backend].append(volume)
        if parts[StorageBackend.CEPH] and self._ceph is None:
            raise _no_ceph(parts[StorageBackend.CEPH][0].id)
        acts: list[Callable[[], Awaitable[tuple[str, ...]]]] = [
            partial(self._embedded.reconcile, _part(desired, parts[StorageBackend.EMBEDDED]))
        ]
        if self._ceph is not None:
            acts.append(partial(self._ceph.reconcile, _part(desired, parts[StorageBackend.CEPH])))
        done: list[str] = []
        failed: list[Error] = []
        for act in acts:
            try:
                done += await act()
            except Error as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return tuple(done)

    async def observe(self) -> tuple[VolumeStatus, ...]:
        found: dict[VolumeId, VolumeStatus] = {}
        for storage in self._all:
            for status in await storage.observe():
                known = found.get(status.id)
                if known is None or status.epoch > known.epoch:
                    found[status.id] = status
        return tuple(found.values())

    async def pool(self) -> PoolStatus | None:
        return await self._embedded.pool()

    async def release(self) -> ReleaseId | None:
        return await self._embedded.release()

    async def receive(self, volume: VolumeSpec) -> None:
        await self._of(volume).receive(volume)

    async def rejoin(self, volume: VolumeSpec) -> Changes | None:
        return await self._of(volume).rejoin(volume)

    async def step_begin(self, volume: VolumeId, step: str) -> None:
        await (await self._holder(volume)).step_begin(volume, step)

    async def step_reached(self, volume: VolumeId, step: str) -> None:
        await (await self._holder(volume)).step_reached(volume, step)

    async def open_raw(self, attachment: VolumeAttachment, *, writing: bool) -> RawVolume:
        return await self._embedded.open_raw(attachment, writing=writing)

    async def reach_alone(self, attachments: tuple[VolumeAttachment, ...]) -> None:
        await self._reach.alone(attachments)

    async def serve(self, volume: VolumeSpec) -> None:
        await self._of(volume).serve(volume)

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        return await (await self._holder(volume)).digest(volume, offset, length)

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        await (await self._holder(volume)).mark(volume, epoch, problem)

    # --- backups and files ---------------------------------------------------------------------------

    async def backup(
        self,
        volume: VolumeId,
        backup: BackupSpec,
        base: BackupSpec | None,
        *,
        bytes_per_second: int,
        on_copied: OnCopied,
        on_moment: OnMoment | None = None,
    ) -> BackupResult:
        storage = await self._holder(volume)
        return await storage.backup(
            volume,
            backup,
            base,
            bytes_per_second=bytes_per_second,
            on_copied=on_copied,
            on_moment=on_moment,
        )

    async def backup_forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        await (await self._holder(volume)).backup_forget(volume, backup)

    async def restore(
        self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], *, on_copied: OnCopied
    ) -> None:
        await self._of(volume).restore(volume, chain, on_copied=on_copied)

    async def backup_delete(self, backup: BackupSpec) -> None:
        """Whosever the volume was: where backups are kept, they are all alike."""
        await (await self._holder(backup.volume)).backup_delete(backup)

    async def snapshot_file(
        self,
        snapshot: SnapshotId,
        file: Path,
        form: VolumeFormat,
        *,
        on_copied: OnCopied,
        again: bool = False,
    ) -> FileWritten:
        for storage in self._all:
            if any(status.id == snapshot for status in await storage.snapshots()):
                return await storage.snapshot_file(snapshot, file, form, on_copied=on_copied, again=again)
        raise NotFound(f"snapshot '{snapshot}' is not on this host", field="snapshot")

    # --- snapshots ---------------------------------------------------------------------------------

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        """All or none, also over both backends."""
        there = {status.id for status in await self.snapshots()}
        made: list[tuple[Storage, tuple[SnapshotSpec, ...]]] = []
        try:
            for storage, part in await self._by_backend(snapshots):
                await storage.snapshot(part)
                made.append((storage, part))
        except Error:
            for storage, part in made:
                new = tuple(snapshot.id for snapshot in part if snapshot.id not in there)
                await storage.reconcile(StorageDesired(removed_snapshots=new))
            raise

    async def snapshot_prepare(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        for storage, part in await self._by_backend(snapshots):
            await storage.snapshot_prepare(part)

    async def _by_backend(
        self, snapshots: tuple[SnapshotSpec, ...]
    ) -> list[tuple[Storage, tuple[SnapshotSpec, ...]]]:
        """Those that have any."""
        holders = [(await self._holder(each.volume), each) for each in snapshots]
        groups = [(storage, tuple(s for h, s in holders if h is storage)) for storage in self._all]
        return [(storage, part) for storage, part in groups if part]

    async def snapshots(self) -> tuple[SnapshotStatus, ...]:
        return tuple([status for storage in self._all for status in await storage.snapshots()])

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        await self._of(volume).revert(volume, snapshot)

    async def offer_snapshots(self, volume: VolumeId, snapshots: tuple[SnapshotId, ...]) -> SnapshotOffer:
        """Those in Ceph are on no host."""
        return await self._embedded.offer_snapshots(volume, snapshots)

    async def end_offer(self, volume: VolumeId) -> None:
        await self._embedded.end_offer(volume)

    async def fetch_snapshots(
        self, fetch: SnapshotFetch, offer: SnapshotOffer, *, speed: Speed, on_copied: OnCopied
    ) -> None:
        await self._embedded.fetch_snapshots(fetch, offer, speed=speed, on_copied=on_copied)

    async def forget_fetched(self, fetch: SnapshotFetch) -> None:
        await self._embedded.forget_fetched(fetch)

    # --- relocation --------------------------------------------------------------------------------

    async def relocate_start(
        self,
        volume: VolumeSpec,
        target: VolumeEndpoint,
        *,
        bytes_per_second: int,
        changes: Changes | None = None,
    ) -> None:
        await self._of(volume).relocate_start(
            volume, target, bytes_per_second=bytes_per_second, changes=changes
        )

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress:
        return await (await self._giving(volume)).relocate_progress(volume)

    async def relocate_complete(self, volume: VolumeId) -> None:
        await (await self._giving(volume)).relocate_complete(volume)

    async def relocate_cancel(self, volume: VolumeId) -> None:
        await (await self._giving(volume)).relocate_cancel(volume)

    async def relocate_finish(self, volume: VolumeId) -> None:
        await (await self._giving(volume)).relocate_finish(volume)

    # --- whose it is -------------------------------------------------------------------------------

    @property
    def _all(self) -> tuple[Storage, ...]:
        return (self._embedded,) if self._ceph is None else (self._embedded, self._ceph)

    def _of(self, volume: VolumeSpec) -> Storage:
        return self._required(volume) if volume.backend is StorageBackend.CEPH else self._embedded

    def _required(self, volume: VolumeSpec) -> CephBackend:
        if self._ceph is None:
            raise _no_ceph(volume.id)
        return self._ceph

    async def _holder(self, volume: VolumeId) -> Storage:
        """By the higher epoch where both do."""
        if self._ceph is None or not self._ceph.holds(volume):
            return self._embedded
        held = [(await _epoch(storage, volume), storage is self._ceph) for storage in self._all]
        return self._ceph if max(held)[1] else self._embedded

    async def _giving(self, volume: VolumeId) -> Storage:
        """The one that copies it or has copied it away."""
        if self._ceph is not None and self._ceph.holds(volume):
            progress = await self._ceph.relocate_progress(volume)
            if progress.phase is not CopyPhase.NONE:
                return self._ceph
        return self._embedded


async def _epoch(storage: Storage, volume: VolumeId) -> int:
    return max((status.epoch for status in await storage.observe() if status.id == volume), default=-1)


def _part(desired: StorageDesired, volumes: Iterable[VolumeSpec]) -> StorageDesired:
    return msgspec.structs.replace(desired, volumes=tuple(volumes))


def _no_ceph(volume: VolumeId) -> Refused:
    return Refused(
        f"'{volume}' is in Ceph, and this host reaches no Ceph cluster",
        field="backend",
        remedy="give its agent the setting 'ceph'",
    )
