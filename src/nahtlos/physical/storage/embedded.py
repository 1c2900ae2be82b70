"""`physical.ports.Storage` with files of this host and one qemu-storage-daemon: the verbs, and nothing else.

`record` says what is there, `graph` and `definition` what a daemon is told of it, `serving` keeps the daemon
at that. The daemon is a unit of the supervisor, its listening socket is held there too, so its end costs its
clients a reconnect and no acknowledged write. Never deletes a volume that is not named in `removed`.
"""

import asyncio
import os
from collections.abc import Awaitable, Iterable
from pathlib import Path

from nahtlos.model.config import VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Error, Refused
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.inventory import PoolStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.storage import (
    BackupSpec,
    Changes,
    CopyProgress,
    SnapshotOffer,
    SnapshotSpec,
    VolumeFormat,
    VolumeSpec,
)
from nahtlos.physical.hypervisor.bundle import Bundles
from nahtlos.physical.hypervisor.commandline import TLS_FILES
from nahtlos.physical.ports import (
    BackupResult,
    FileWritten,
    Keyring,
    OnCopied,
    OnMoment,
    RawVolume,
    SnapshotFetch,
    Speed,
    StorageDesired,
    Supervisor,
    Unit,
)
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.storage.arrivals import Arrivals, goes_alone, has_gone
from nahtlos.physical.storage.copies import Copies
from nahtlos.physical.storage.daemon import Daemon
from nahtlos.physical.storage.definition import SOCKET_FD, UNIT, Definition, arguments
from nahtlos.physical.storage.departures import Departures
from nahtlos.physical.storage.encryption import HostKeys
from nahtlos.physical.storage.graph import Places
from nahtlos.physical.storage.layers import LayerFiles
from nahtlos.physical.storage.lifecycle import Lifecycle
from nahtlos.physical.storage.merging import Merging
from nahtlos.physical.storage.overwriting import Overwriting
from nahtlos.physical.storage.raw_volume import RawNbdVolume
from nahtlos.physical.storage.record import Records
from nahtlos.physical.storage.release import DaemonRelease
from nahtlos.physical.storage.relocation import Relocations
from nahtlos.physical.storage.replication import Replication
from nahtlos.physical.storage.report import volume_statuses
from nahtlos.physical.storage.serving import Serving
from nahtlos.physical.storage.snapshot_arrivals import SnapshotArrivals
from nahtlos.physical.storage.snapshot_offers import Offers
from nahtlos.physical.storage.snapshots import Snapshots
from nahtlos.physical.storage.sockets import Patience, bound_descriptor
from nahtlos.wire.credentials import DH_PARAMETERS, QEMU_DH_FILE, write_file


class EmbeddedStorage:
    def __init__(
        self, settings: AgentSettings, supervisor: Supervisor, keyring: Keyring | None = None
    ) -> None:
        self._settings = settings
        self._supervisor = supervisor
        places = Places(volumes=settings.state_dir / "volumes", keys=settings.run_dir / "keys")
        self._keys = HostKeys(places.keys, keyring)
        self.daemon = Daemon(supervisor, settings.run_dir / "qsd.qmp", settings.state_dir / "qsd.log")
        self.serving = Serving(Records(places.volumes), self.daemon, places, self._run)
        self.files = LayerFiles(places, settings.images_dir, self.daemon)
        self.merging = Merging(self.serving, self.files)
        self._lifecycle = Lifecycle(self.serving, self.files, self.merging)
        self._offers = Offers(self.serving, self.files, self.merging)
        self._snapshot_arrivals = SnapshotArrivals(self.serving, settings.pki_dir)
        self.relocations = Relocations(self.serving, self.merging)
        self._departures = Departures(self.serving, self.files, self._offers, self.relocations)
        self._arrivals = Arrivals(settings.host, self.serving, self.files)
        self._snapshots = Snapshots(self.serving, self.files, self.merging)
        self.releases = DaemonRelease(settings, supervisor, Bundles(settings.releases_dir), self.daemon)
        self.copies = Copies(settings, supervisor, self.serving, self.releases.bundle)
        self.replication = Replication(settings.host, self.serving, self.relocations, self.copies.door)
        self._overwriting = Overwriting(self.files.going)
        self._defined: Unit | None = None
        self._swept = False

    async def close(self) -> None:
        """Let go of the monitor. The daemon runs on."""
        await self.daemon.close()
        await asyncio.to_thread(self._overwriting.end)

    # --- as configured -----------------------------------------------------------------------------

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        async with self.serving.changing:
            attempt = _Attempt()
            await self._reconcile(desired, attempt)
            if attempt.errors:
                raise attempt.errors[0]
            return tuple(attempt.done)

    async def _reconcile(self, desired: StorageDesired, attempt: "_Attempt") -> None:
        records = await asyncio.to_thread(self.serving.records.all)
        await self._sweep()
        volumes = [volume for volume in desired.volumes if volume.id not in desired.pinned]
        going = [volume for volume in desired.removed if volume in records and volume not in desired.pinned]
        await self._have_keys(volumes)
        await self._lifecycle.after_boot()
        if desired.release is not None:
            replaced = self.releases.ensure(desired.release, self.serving.define, self.serving.on_step)
            await attempt.several(replaced)
        await attempt.several(self.copies.export(desired.exports))
        left = self._departures.left_for_nothing()
        if not (volumes or going or left or _any_snapshot(self.serving.records, desired.removed_snapshots)):
            return
        known = [volume for volume in volumes if volume.id in records]
        for volume in known:
            await attempt.to(self._lifecycle.adopt(volume))
        await self._up(desired, attempt)
        await self._lifecycle.flush_again()
        await self._snapshots.drop_prepared(going)
        bundle = await self.releases.bundle()
        for volume in volumes:
            if volume.id not in records:
                await attempt.one(self._lifecycle.create(volume, bundle))
        await self.serving.define()
        await attempt.to(self._offers.sweep(desired.pinned))
        bare = [volume for volume in going if not records[volume].snapshots]  # such as clones of the others
        for volume in bare:
            await attempt.one(self._lifecycle.delete(volume))
        for snapshot in desired.removed_snapshots:
            await attempt.to(self._snapshots.remove(snapshot))
        kept = {snapshot.id for snapshot in desired.snapshots}
        for volume in going:
            if volume in bare or has_gone(self.serving.records[volume], kept):
                continue
            stay = goes_alone(self.serving.records[volume], kept)
            go = self._arrivals.give_back if stay else self._lifecycle.delete
            await attempt.one(go(volume))
        await self._departures.sweep()
        await self._settle(desired.pinned, attempt)
        for volume in known:
            if self.serving.usable(volume.id):
                await attempt.one(self._lifecycle.enlarge(volume))
        self._overwriting.begin()

    async def _up(self, desired: StorageDesired, attempt: "_Attempt") -> None:
        if await self.serving.define():
            attempt.done.append("storage daemon started")
        await self.serving.awake()
        await self.serving.share(desired.budget)

    async def _settle(self, pinned: frozenset[VolumeId], attempt: "_Attempt") -> None:
        volumes = [volume for volume in sorted(self.serving.records.all()) if volume not in pinned]
        for volume in volumes:
            if self.serving.records[volume].pivoting:
                await attempt.to(self.merging.tidy(volume))
        attempt.done += await self.serving.settle(volumes)
        merging = [volume for volume in volumes if self.merging.is_due(volume)]
        for volume in merging:
            await attempt.to(self.merging.tidy(volume))
        if merging:
            attempt.done += await self.serving.settle(merging)
        attempt.done += await self.serving.clear(spare=pinned)

    async def _sweep(self) -> None:
        if not self._swept:
            await asyncio.to_thread(self.files.sweep, self.serving.records.all())
            self._overwriting.begin()
            self._swept = True

    async def _have_keys(self, volumes: Iterable[VolumeSpec]) -> None:
        """Where one cannot be had, its volumes stay closed, and say so."""
        records = self.serving.records.all()
        wanted = {v.id: {v.encryption_key} for v in volumes if v.encryption_key is not None}
        for record in records.values():
            keys = {each.encryption_key for each in record.layers if each.encryption_key is not None}
            if keys:
                wanted[record.volume] = keys | wanted.get(record.volume, set())
        problems = await self._keys.ensure(key for keys in wanted.values() for key in keys)
        await asyncio.to_thread(self._keys.keep_only, [key for keys in wanted.values() for key in keys])
        for volume, keys in wanted.items():
            for key in keys & problems.keys():
                self.serving.left_out[volume] = problems[key]

    async def observe(self) -> tuple[VolumeStatus, ...]:
        found = await volume_statuses(self.serving, self.files, self._lifecycle.is_spent)
        return tuple(self.copies.marked(status) for status in found)

    async def pool(self) -> PoolStatus | None:
        places = (self.serving.places.volumes, self._settings.state_dir)
        folder = next((each for each in places if each.is_dir()), None)
        if folder is None:
            return None
        found = await asyncio.to_thread(os.statvfs, folder)
        return PoolStatus(total=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)

    async def release(self) -> ReleaseId | None:
        chosen = self.releases.chosen()
        return chosen.release if chosen else None

    # --- snapshots ---------------------------------------------------------------------------------

    async def open_raw(self, attachment: VolumeAttachment, *, writing: bool) -> RawVolume:
        volume = RawNbdVolume(attachment, self._settings.pki_dir)
        await volume.open(writing=writing)
        return volume

    async def reach_alone(self, attachments: tuple[VolumeAttachment, ...]) -> None:
        """Over NBD, by name."""

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        async with self.serving.changing:
            await self.serving.awake()
            await self._snapshots.take(snapshots, await self.releases.bundle())

    async def snapshot_prepare(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        async with self.serving.changing:
            await self.serving.awake()
            await self._snapshots.prepare(snapshots, await self.releases.bundle())

    async def snapshots(self) -> tuple[SnapshotStatus, ...]:
        return await self._snapshots.list()

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        async with self.serving.changing:
            await self.serving.awake()
            await self.replication.forget_steps(volume.id)
            await self._snapshots.revert(volume.id, snapshot, await self.releases.bundle())
            await self.merging.tidy(volume.id)
            await self.serving.settle((volume.id,))

    async def offer_snapshots(self, volume: VolumeId, snapshots: tuple[SnapshotId, ...]) -> SnapshotOffer:
        async with self.serving.changing:
            return await self._offers.make(volume, snapshots)

    async def end_offer(self, volume: VolumeId) -> None:
        async with self.serving.changing:
            if await self.daemon.pid() is not None:
                await self._offers.end(volume)

    async def fetch_snapshots(
        self, fetch: SnapshotFetch, offer: SnapshotOffer, *, speed: Speed, on_copied: OnCopied
    ) -> None:
        await self._snapshot_arrivals.copy(fetch, offer, speed=speed, on_copied=on_copied)
        async with self.serving.changing:
            await self._snapshot_arrivals.record(fetch, offer)

    async def forget_fetched(self, fetch: SnapshotFetch) -> None:
        async with self.serving.changing:
            await self._snapshot_arrivals.forget(fetch)

    # --- relocation, replication -------------------------------------------------------------------

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
        async with self.serving.changing:
            await self.serving.awake()
            await self.replication.start(volume, target, bytes_per_second=bytes_per_second, changes=changes)

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress:
        async with self.serving.changing:
            return await self.replication.progress(volume)

    async def relocate_complete(self, volume: VolumeId) -> None:
        async with self.serving.changing:
            await self.relocations.complete(volume)

    async def relocate_cancel(self, volume: VolumeId) -> None:
        async with self.serving.changing:
            await self.replication.stop(volume)
            await self.relocations.cancel(volume)

    async def relocate_finish(self, volume: VolumeId) -> None:
        async with self.serving.changing:
            await self._departures.finish(volume)

    async def receive(self, volume: VolumeSpec) -> None:
        async with self.serving.changing:
            await self._have_keys((volume,))
            await self.serving.define()
            await self.serving.awake()
            await self.replication.forget_steps(volume.id)
            await self._arrivals.receive(volume, await self.releases.bundle())
            self.copies.made_anew(volume.id)

    async def rejoin(self, volume: VolumeSpec) -> Changes | None:
        async with self.serving.changing:
            await self._have_keys((volume,))
            await self.serving.define()
            await self.serving.awake()
            if self.copies.is_wrong(volume.id):
                return None  # what was written meanwhile would not put it right
            return await self.replication.rejoin(volume)

    async def step_begin(self, volume: VolumeId, step: str) -> None:
        async with self.serving.changing:
            await self.replication.begin_step(volume, step)

    async def step_reached(self, volume: VolumeId, step: str) -> None:
        async with self.serving.changing:
            await self.replication.reach_step(volume, step)

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        return await self.copies.digest(volume, offset, length)

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        await self.copies.mark(volume, epoch, problem)

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
        await self.serving.awake()
        return await self.copies.backup(
            volume,
            backup,
            base,
            bytes_per_second=bytes_per_second,
            on_copied=on_copied,
            on_moment=on_moment,
        )

    async def backup_forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        await self.copies.forget(volume, backup)

    async def restore(
        self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], *, on_copied: OnCopied
    ) -> None:
        await self.copies.restore(volume, chain, on_copied)

    async def backup_delete(self, backup: BackupSpec) -> None:
        await self.copies.backup_delete(backup)

    async def snapshot_file(
        self,
        snapshot: SnapshotId,
        file: Path,
        form: VolumeFormat,
        *,
        on_copied: OnCopied,
        again: bool = False,
    ) -> FileWritten:
        return await self.copies.snapshot_file(snapshot, file, form, on_copied, again=again)

    # --- the unit ----------------------------------------------------------------------------------

    async def _run(self, wanted: Definition) -> bool:
        """A daemon that runs is not touched: the definition is for when it starts again."""
        known = (await self._supervisor.units()).get(UNIT)
        unit = await self._unit(wanted)
        if unit == self._defined and known is not None and known.pid is not None:
            return False
        settings = self._settings
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        await self._supervisor.listen_tcp(SOCKET_FD, settings.address, settings.nbd_port)
        if self._defined is None:
            await self._bound_clients()
        await self._supervisor.start(unit)
        self._defined = unit
        return known is None

    async def _bound_clients(self) -> None:
        """What is accepted inherits it: a client that is cut off is given up."""
        listener = await self._supervisor.fetch_fd(SOCKET_FD)
        if listener is not None:
            try:
                bound_descriptor(listener, Patience())
            finally:
                os.close(listener)

    async def _unit(self, wanted: Definition) -> Unit:
        bundle = await self.releases.bundle()
        pki_dir = self._settings.pki_dir
        missing = [name for name in TLS_FILES if not (pki_dir / name).is_file()]
        if missing:
            raise Refused(
                f"{pki_dir} lacks {', '.join(missing)}",
                field="pki_dir",
                remedy="let this host join the cloud first",
            )
        if not (pki_dir / QEMU_DH_FILE).exists():  # a host that joined before there was one
            write_file(pki_dir / QEMU_DH_FILE, DH_PARAMETERS, mode=0o644)
        return Unit(
            name=UNIT,
            argv=(*bundle.storage_daemon(), *arguments(self.daemon.qmp_path, pki_dir, wanted)),
            environment=bundle.environment,
            fds=(SOCKET_FD,),
            log=self.daemon.log,
            restart=True,
        )


class _Attempt:
    """What one attempt has done, and what went wrong: no volume's trouble keeps the others waiting."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.errors: list[Error] = []

    async def to(self, act: Awaitable[object]) -> None:
        try:
            await act
        except Error as error:
            self.errors.append(error)

    async def one(self, act: Awaitable[str | None]) -> None:
        try:
            said = await act
            self.done += [said] if said else []
        except Error as error:
            self.errors.append(error)

    async def several(self, act: Awaitable[tuple[str, ...]]) -> None:
        try:
            self.done += await act
        except Error as error:
            self.errors.append(error)


def _any_snapshot(records: Records, snapshots: Iterable[SnapshotId]) -> bool:
    return any(record.snapshot(snapshot) for snapshot in snapshots for record in records.all().values())
