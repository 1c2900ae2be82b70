"""What leaves a host's embedded storage, and what is compared: backups, restores, snapshots as files and as
exports, digests. Puts the parts together for `embedded`; owns no state but who is being copied.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.inventory import VolumeStatus
from nahtlos.model.storage import BackupSpec, SnapshotExport, VolumeFormat, VolumeSpec
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.ports import BackupResult, FileWritten, OnCopied, OnMoment, Supervisor
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.storage import scrub
from nahtlos.physical.storage.backups import Backups, OwnDoor, in_thread
from nahtlos.physical.storage.exports import NodeOf, SnapshotExports
from nahtlos.physical.storage.graph import Places
from nahtlos.physical.storage.record import Mode, VolumeRecord
from nahtlos.physical.storage.scrub import Marks
from nahtlos.physical.storage.serving import Serving
from nahtlos.physical.storage.snapshot_file import file_facts, write_snapshot

GetBundle = Callable[[], Awaitable[Bundle]]


class Copies:
    def __init__(
        self, settings: AgentSettings, supervisor: Supervisor, serving: Serving, bundle: GetBundle
    ) -> None:
        self._serving = serving
        self._places: Places = serving.places
        self._bundle = bundle
        self.door = OwnDoor(
            host=settings.host,
            address=settings.address,
            port=settings.nbd_port,
            pki_dir=settings.pki_dir,
        )
        self.backups = Backups(serving.daemon, serving.records, self._places, self.door)
        self._exports = SnapshotExports(
            supervisor,
            settings.run_dir / "exports",
            self._places,
            settings.address,
            settings.state_dir / "exports.log",
        )
        self._marks = Marks(settings.state_dir / "marks")

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
        return await self.backups.backup(
            await self._bundle(),
            volume,
            backup,
            base,
            bytes_per_second=bytes_per_second,
            on_copied=on_copied,
            on_moment=on_moment,
        )

    async def forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        await self.backups.forget(volume, backup)

    async def restore(self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], on_copied: OnCopied) -> None:
        await self.backups.restore(volume, chain, on_copied)

    async def backup_delete(self, backup: BackupSpec) -> None:
        await self.backups.delete(backup)

    async def snapshot_file(
        self, snapshot: SnapshotId, file: Path, form: VolumeFormat, on_copied: OnCopied, *, again: bool
    ) -> FileWritten:
        if again and file.exists():
            return await in_thread(lambda stop: file_facts(file, stop))
        records = self._serving.records.all()
        await write_snapshot(await self._bundle(), records, snapshot, self._places, file, form, on_copied)
        return await in_thread(lambda stop: file_facts(file, stop))

    # --- exports -----------------------------------------------------------------------------------

    def export_from(self, elsewhere: NodeOf) -> None:
        """Snapshots that are in no files of this host are exported, too, by what this says of them."""
        self._exports.elsewhere = elsewhere

    async def export(self, wanted: Iterable[SnapshotExport]) -> tuple[str, ...]:
        """These and no others. Unavailable with all that could not be served, after the rest was."""
        exports = tuple(wanted)
        self._marks.keep_only(self._serving.records.all().keys())
        if not exports and not await self._exports.any():
            return ()
        records = self._serving.records.all()
        done, problems = await self._exports.reconcile(await self._bundle(), exports, records, time.time())
        if problems:
            raise Unavailable("; ".join(problems), field="snapshot_exports")
        return done

    # --- health ------------------------------------------------------------------------------------

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        record = self._serving.records[volume]
        if record.mode is Mode.PROXY:
            raise Unavailable(f"'{volume}' is elsewhere", field="volume")
        file = scrub.readable_file(record, self._places)
        export = f"{volume}.e{record.epoch}"
        return await in_thread(
            lambda stop: scrub.digest_of_range(stop, self.door, export, offset, length, file)
        )

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        if problem:
            await asyncio.to_thread(self._marks.put, volume, epoch, problem)
        else:
            await asyncio.to_thread(self._marks.clear, volume)

    def made_anew(self, volume: VolumeId) -> None:
        """What was found wrong with its copy here is gone with it."""
        self._marks.clear(volume)

    def is_wrong(self, volume: VolumeId) -> bool:
        record = self._serving.records.get(volume)
        return record is not None and self._marks.problem(record) != ""

    def marked(self, status: VolumeStatus) -> VolumeStatus:
        record: VolumeRecord | None = self._serving.records.get(status.id)
        problem = self._marks.problem(record) if record is not None and not status.problem else ""
        return msgspec.structs.replace(status, problem=problem) if problem else status
