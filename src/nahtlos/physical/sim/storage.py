"""`physical.ports.Storage` over the simulated world. Volumes and snapshots are on the host's disk: they
survive all but their removal. What volumes are and what must never happen to them: `sim.volumes`."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from nahtlos.model.config import VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, NotFound, Refused, Stale, Unavailable
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.inventory import PoolStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.storage import (
    BackupSpec,
    Changes,
    CopyPhase,
    CopyProgress,
    OfferedSnapshot,
    ReplicaState,
    SnapshotOffer,
    SnapshotSpec,
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
    StorageDesired,
)
from nahtlos.physical.sim.driver import SimDriver
from nahtlos.physical.sim.volumes import COPY_BYTES_PER_SECOND, Snapshot, Volume


class SimStorage(SimDriver):
    name = "storage"

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        volumes = [v for v in desired.volumes if v.id not in desired.pinned]
        removed = [v for v in desired.removed if v not in desired.pinned]
        async with self.verb("reconcile"):
            found = [text for spec in volumes for text in self._made(spec)]
            kept = {snapshot.id for snapshot in desired.snapshots}
            found += [text for volume in removed for text in self._removed(volume, kept)]
            self._sweep_offers(desired.pinned)
            for snapshot in desired.removed_snapshots:
                found += self._snapshot_removed(snapshot)
            if desired.release is not None and desired.release != self.host.storage_release:
                self.host.check_release(desired.release)
                self.world.replace_storage(self.host.id, desired.release)
            return tuple(found)

    def _made(self, spec: VolumeSpec) -> list[str]:
        held = self.host.volumes.get(spec.id)
        if held is None:
            writes = self._found(spec.snapshot).writes if spec.snapshot else 0
            self.host.volumes[spec.id] = Volume(spec, writes=writes)
            self.world.disks.acknowledged.setdefault(spec.id, writes)
            return [f"volume {spec.id}"]
        if held.proxy is not None:
            return []  # what is said here is of a volume that has left
        if spec.size_mib < held.spec.size_mib:
            raise Refused(f"{spec.id} has {held.spec.size_mib} MiB already", field="size_mib")
        self.world.disks.touch(spec.id)
        changed = held.spec != spec
        held.spec, held.received = spec, False
        self.world.disks.touch(spec.id)
        return [f"export of {spec.id}"] if changed else []

    def _removed(self, volume: VolumeId, kept: set[SnapshotId]) -> list[str]:
        """Beside snapshots that are kept; not by itself while it has others."""
        named = (s.spec for s in self.host.snapshots.values() if s.spec.volume == volume)
        clones = [snapshot.id for snapshot in named if snapshot.id not in kept]
        held = self.host.volumes.get(volume)
        if clones and held is not None and not held.received:
            raise Conflict(f"{volume} has snapshots: {', '.join(sorted(clones))}", field="volume")
        return [f"removed {volume}"] if self.host.volumes.pop(volume, None) else []

    def _snapshot_removed(self, snapshot: SnapshotId) -> list[str]:
        if clones := self._clones(snapshot):
            raise Conflict(f"{', '.join(clones)} rest on {snapshot}", field="snapshot")
        return [f"removed {snapshot}"] if self.host.snapshots.pop(snapshot, None) else []

    def _clones(self, snapshot: SnapshotId) -> tuple[VolumeId, ...]:
        return tuple(sorted(v.spec.id for v in self.host.volumes.values() if v.spec.snapshot == snapshot))

    async def release(self) -> ReleaseId | None:
        async with self.verb("release"):
            return self.host.storage_release

    async def observe(self) -> tuple[VolumeStatus, ...]:
        async with self.verb("observe"):
            return tuple(
                VolumeStatus(
                    id=v.spec.id,
                    epoch=v.spec.epoch,
                    served=self.host.storage_up and not v.received,
                    size_mib=v.spec.size_mib,
                    clients=len(self.world.disks.clients(self.host, v)),
                    problem=v.problem,
                )
                for v in self.host.volumes.values()
            )

    async def pool(self) -> PoolStatus | None:
        return None

    # --- snapshots ---

    async def open_raw(self, attachment: VolumeAttachment, *, writing: bool) -> RawVolume:
        async with self.verb("open_raw", attachment.volume):
            self.world.disks.check_served((attachment,))
            return _RawVolume(self, attachment)

    async def reach_alone(self, attachments: tuple[VolumeAttachment, ...]) -> None:
        """In this world every volume is reached by a name with its epoch."""

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        async with self.verb("snapshot"):
            self._check_up()
            new = [each for each in snapshots if each.id not in self.host.snapshots]
            volumes = [self._own(each.volume) for each in new]
            self.world.disks.touch(*(each.volume for each in new))
            for each, volume in zip(new, volumes, strict=True):
                sized = msgspec.structs.replace(each, size_mib=volume.spec.size_mib)
                self.host.snapshots[each.id] = Snapshot(
                    sized, volume.writes, clean=self.world.disks.clean(self.host, volume)
                )
            self.world.disks.touch(*(each.volume for each in new))

    async def snapshot_prepare(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        async with self.verb("snapshot_prepare"):
            self._check_up()
            for each in snapshots:
                if each.id not in self.host.snapshots:
                    self._own(each.volume)

    async def snapshots(self) -> tuple[SnapshotStatus, ...]:
        return tuple(
            SnapshotStatus(
                id=each.spec.id,
                volume=each.spec.volume,
                group=each.spec.group,
                size_mib=each.spec.size_mib,
                clones=self._clones(each.spec.id),
            )
            for each in self.host.snapshots.values()
        )

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        async with self.verb("revert", volume.id):
            held, taken = self._own(volume.id), self._found(snapshot)
            self._check_unused(held)
            if taken.spec.volume != volume.id:
                raise Refused(f"{snapshot} is of {taken.spec.volume}", field="snapshot")
            held.writes = taken.writes
            self.world.disks.reverted(volume.id, taken.writes)

    async def offer_snapshots(self, volume: VolumeId, snapshots: tuple[SnapshotId, ...]) -> SnapshotOffer:
        async with self.verb("offer_snapshots", volume):
            self._check_up()
            found = [self._found(each) for each in snapshots]
            self.host.offered.update(snapshots)
            return SnapshotOffer(
                snapshots=tuple(
                    OfferedSnapshot(id=each.spec.id, layer=0, group=each.spec.group) for each in found
                ),
                layers=(),
            )

    async def end_offer(self, volume: VolumeId) -> None:
        async with self.verb("end_offer", volume):
            here = self.host.snapshots
            self.host.offered = {s for s in self.host.offered if s in here and here[s].spec.volume != volume}

    def _sweep_offers(self, pinned: frozenset[VolumeId]) -> None:
        here = self.host.snapshots
        self.host.offered = {s for s in self.host.offered if s in here and here[s].spec.volume in pinned}

    async def fetch_snapshots(
        self, fetch: SnapshotFetch, offer: SnapshotOffer, *, speed: Speed, on_copied: OnCopied
    ) -> None:
        """One after the other; all are here at once, or none."""
        async with self.verb("fetch_snapshots", fetch.volume):
            missing = [each.id for each in offer.snapshots if each.id not in self.host.snapshots]
            coming: dict[SnapshotId, Snapshot] = {}
            for number, snapshot in enumerate(missing, 1):
                size = self._offered(fetch, snapshot).spec.size_mib << 20
                await asyncio.sleep(size / (speed() or COPY_BYTES_PER_SECOND))
                self.life.check()
                taken = self._offered(fetch, snapshot)
                coming[snapshot] = Snapshot(taken.spec, taken.writes, came_by=fetch.operation)
                on_copied(number, len(missing))
            self.host.snapshots |= coming

    def _offered(self, fetch: SnapshotFetch, snapshot: SnapshotId) -> Snapshot:
        source = self.world.hosts[fetch.source.host]
        reached = source.powered and source.storage_up and snapshot in source.offered
        if not reached or frozenset((source.id, self.host.id)) in self.world.stalled_links:
            raise Unavailable(f"{source.id} does not offer {snapshot}")
        return self.world.disks.found(source, snapshot)

    async def forget_fetched(self, fetch: SnapshotFetch) -> None:
        async with self.verb("forget_fetched", fetch.volume):
            came = [s for s, each in self.host.snapshots.items() if each.came_by == fetch.operation]
            for snapshot in came:
                del self.host.snapshots[snapshot]

    # --- relocation: source ---

    async def serve(self, volume: VolumeSpec) -> None:
        """What is here is served from here."""

    async def relocate_start(
        self,
        volume: VolumeSpec,
        target: VolumeEndpoint,
        *,
        bytes_per_second: int,
        changes: Changes | None = None,
    ) -> None:
        async with self.verb("relocate_start", volume.id):
            self._check_up()
            held = self._held(volume.id)
            if held.proxy is not None:
                return
            if held.spec.epoch != volume.epoch:
                raise Stale(f"{volume.id} is served by epoch {held.spec.epoch}", field="volume")
            self.world.disks.touch(volume.id)
            job = held.job
            if job is None or job.phase is CopyPhase.FAILED or job.target != target:
                self.world.disks.begin_copy(self.host, held, target, bytes_per_second)
            else:
                job.set_rate(bytes_per_second or COPY_BYTES_PER_SECOND, self.world.now())

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress:
        async with self.verb("relocate_progress", volume):
            held = self.host.volumes.get(volume)
            if held is None or held.proxy is not None:
                return CopyProgress(phase=CopyPhase.DONE if held else CopyPhase.NONE)
            self.world.disks.touch(volume)
            return held.job.progress() if held.job else CopyProgress(phase=CopyPhase.NONE)

    async def relocate_complete(self, volume: VolumeId) -> None:
        async with self.verb("relocate_complete", volume):
            self._check_up()
            held = self._held(volume)
            if held.proxy is not None:
                return
            self.world.disks.touch(volume)
            if held.job is None or held.job.phase is not CopyPhase.READY:
                raise Refused(f"{volume} is not all at its target", field="volume")
            held.proxy, held.job = held.job.target, None
            self.world.disks.touch(volume)

    async def relocate_cancel(self, volume: VolumeId) -> None:
        async with self.verb("relocate_cancel", volume):
            held = self.host.volumes.get(volume)
            if held is None:
                return
            if held.proxy is not None:
                raise Conflict(f"{volume} is at {held.proxy.host} already", field="volume")
            self.world.disks.touch(volume)
            held.job = None

    async def relocate_finish(self, volume: VolumeId) -> None:
        async with self.verb("relocate_finish", volume):
            held = self.host.volumes.get(volume)
            if held is None:
                return
            if held.proxy is None:
                raise Refused(f"{volume} has not left {self.host.id}", field="volume")
            self._check_unused(held)
            del self.host.volumes[volume]

    # --- destination ---

    async def receive(self, volume: VolumeSpec) -> None:
        async with self.verb("receive", volume.id):
            held = self.host.volumes.get(volume.id)
            if held is not None and held.spec.epoch == volume.epoch:
                return  # said twice, or late: what is there may be all there is
            stale = any(
                copy.host == self.host.id and copy.state is ReplicaState.STALE for copy in volume.copies
            )
            if held is not None and not held.received and not stale:
                raise Conflict(f"{self.host.id} has {volume.id} already", field="volume")
            self.host.volumes[volume.id] = Volume(volume, whole=False, received=True)

    async def rejoin(self, volume: VolumeSpec) -> Changes | None:
        """A simulated copy is always made anew."""
        return None

    async def step_begin(self, volume: VolumeId, step: str) -> None:
        async with self.verb("step_begin", volume):
            self._check_up()
            self._own(volume).steps.add(step)

    async def step_reached(self, volume: VolumeId, step: str) -> None:
        async with self.verb("step_reached", volume):
            self._check_up()
            held = self._own(volume)
            if step not in held.steps:
                raise Refused(f"what was written to {volume} since {step} is not known", field="step")
            held.in_step = step

    # --- backups and files ---

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
        async with self.verb("backup", volume):
            self._check_up()
            size = self._own(volume).spec.size_mib << 20
            if on_moment is not None:
                self.world.note(self.host.id, "moment", backup.id, str(self._is_clean(volume)))
                await on_moment()
            on_copied(size, size)
            kept = self.world.disks.backups
            place = (backup.target, backup.id)
            if place not in kept:
                rests = base.id if base is not None and (base.target, base.id) in kept else None
                why = f"{base.id} is not at {base.target}" if base is not None and rests is None else ""
                kept[place] = (backup, BackupResult(base=rests, stored_bytes=size, why_full=why))
            return kept[place][1]

    def _is_clean(self, volume: VolumeId) -> bool:
        return self.world.disks.clean(self.host, self._own(volume))

    async def backup_forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        async with self.verb("backup_forget", volume):
            return

    async def restore(
        self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], *, on_copied: OnCopied
    ) -> None:
        async with self.verb("restore", volume.id):
            self._check_up()
            for each in chain:
                if (each.target, each.id) not in self.world.disks.backups:
                    raise Refused(f"there is no whole backup '{each.id}' at {each.target}", field="chain")
            self._own(volume.id).whole = True

    async def backup_delete(self, backup: BackupSpec) -> None:
        async with self.verb("backup_delete"):
            self.world.disks.backups.pop((backup.target, backup.id), None)

    async def snapshot_file(
        self,
        snapshot: SnapshotId,
        file: Path,
        form: VolumeFormat,
        *,
        on_copied: OnCopied,
        again: bool = False,
    ) -> FileWritten:
        async with self.verb("snapshot_file"):
            taken = self._found(snapshot)
            held = f"{taken.spec.volume} {taken.writes} {form}".encode()
            return FileWritten(bytes=taken.spec.size_mib << 20, sha256=hashlib.sha256(held).hexdigest())

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        async with self.verb("mark", volume):
            self._held(volume).problem = problem

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        async with self.verb("digest", volume):
            held = self._held(volume)
            return hashlib.sha256(f"{volume} {held.writes} {held.whole} {offset} {length}".encode()).digest()

    # --- here ---

    def _check_up(self) -> None:
        if not self.host.storage_up:
            raise Unavailable(f"the storage daemon of {self.host.id} does not answer")

    def _held(self, volume: VolumeId) -> Volume:
        if volume not in self.host.volumes:
            raise NotFound(f"volume '{volume}' is not on {self.host.id}", field="volume")
        return self.host.volumes[volume]

    def _own(self, volume: VolumeId) -> Volume:
        held = self._held(volume)
        if held.proxy is not None:
            raise Refused(f"{volume} has left {self.host.id}", field="volume")
        return held

    def _found(self, snapshot: SnapshotId) -> Snapshot:
        return self.world.disks.found(self.host, snapshot)

    def _check_unused(self, volume: Volume) -> None:
        if clients := self.world.disks.clients(self.host, volume):
            raise Conflict(
                f"{volume.spec.id} is open: {', '.join(sorted(c.id.unit for c in clients))}", field="volume"
            )


class _RawVolume:
    """All its copies are one here."""

    def __init__(self, driver: SimStorage, attachment: VolumeAttachment) -> None:
        self._driver = driver
        self._attachment = attachment
        self.size = attachment.size_mib << 20

    async def write(self, offset: int, data: bytes) -> None:
        async with self._verb("raw_write") as kept:
            kept[offset] = data

    async def flush(self) -> None:
        async with self._verb("raw_flush"):
            pass

    async def read(self, offset: int, length: int) -> bytes:
        async with self._verb("raw_read") as kept:
            return kept.get(offset, b"").ljust(length, b"\0")[:length]

    async def close(self) -> None:
        return

    @asynccontextmanager
    async def _verb(self, name: str) -> AsyncGenerator[dict[int, bytes]]:
        async with self._driver.verb(name, self._attachment.volume):
            self._driver.world.disks.check_served((self._attachment,))
            yield self._driver.world.raw.setdefault(self._attachment.volume, {})
