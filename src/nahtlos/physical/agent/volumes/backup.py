"""Backups, restores and snapshots as files, each carried out by the host that has what it is made from."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from nahtlos.model.errors import Conflict
from nahtlos.model.storage import Consistency
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.guests.group import FrozenGuests
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes.hosts import Hosts
from nahtlos.physical.agent.volumes.peers import carry_out
from nahtlos.physical.agent.volumes.single import SingleAct
from nahtlos.physical.ports import BackupResult, OnMoment
from nahtlos.wire.volumes import (
    BackupOrder,
    DeleteBackupOrder,
    RestoreOrder,
    SnapshotFileOrder,
    VolumeForget,
    VolumeReceive,
)

_WRITING = "writing"
"""Noted once there was no file of that name: one that is there afterwards is this operation's."""


class Backup(SingleAct):
    """Killed at any moment, it is repeated from the same changes; undone, they are followed as before."""

    what = "backup"

    def __init__(self, context: Context, journal: Journal) -> None:
        super().__init__(context, journal)
        assert isinstance(journal.task, BackupOrder), f"operation {journal.id} is no backup"
        self._order = journal.task
        self.subject = self._order.volume.id

    async def work(self) -> None:
        order = self._order
        if order.consistency is Consistency.CRASH:
            result = await self._backup(None)
        else:
            result = await self._backup_of_frozen_guests()
        self.tell("base", result.base or "")
        self.tell("stored_bytes", str(result.stored_bytes))
        self.tell("why_full", result.why_full)
        if result.why_full:
            text = f"{order.backup.id} is a full backup: {result.why_full}"
            self._context.say("volume.backup", self.subject, text, id=order.id)

    async def _backup_of_frozen_guests(self) -> BackupResult:
        """The guests are thawed as soon as there is a moment. Of a moment that an earlier attempt took nobody
        knows whether it was of frozen guests: it is given up for a new one."""
        order = self._order
        await self.undo()
        hosts = Hosts(self._context, order.hosts)
        guests = FrozenGuests(self._context, hosts, order)
        try:
            async with AsyncExitStack() as frozen:
                await frozen.enter_async_context(guests.frozen())

                async def taken() -> None:
                    await frozen.aclose()
                    self.tell("filesystem", order.backup.id if order.volume.id in guests.consistent else "")

                return await self._backup(taken)
        finally:
            await hosts.close()

    async def _backup(self, on_moment: OnMoment | None) -> BackupResult:
        order = self._order
        return await self._context.drivers.storage.backup(
            order.volume.id,
            order.backup,
            order.base,
            bytes_per_second=order.bytes_per_second,
            on_copied=self.on_copied,
            on_moment=on_moment,
        )

    async def undo(self) -> None:
        await self._context.drivers.storage.backup_forget(self._order.volume.id, self._order.backup)


class Restore(SingleAct):
    """The new volume is nobody's until this is done; undone, it is gone."""

    what = "restore"

    def __init__(self, context: Context, journal: Journal) -> None:
        super().__init__(context, journal)
        assert isinstance(journal.task, RestoreOrder), f"operation {journal.id} is no restore"
        self._order = journal.task
        self.subject = self._order.volume.id

    async def work(self) -> None:
        order = self._order
        await carry_out(self._context, VolumeReceive(id=order.id, volume=order.volume))
        await self._context.drivers.storage.restore(order.volume, order.chain, on_copied=self.on_copied)

    async def undo(self) -> None:
        await carry_out(self._context, VolumeForget(id=self._order.id, volume=self._order.volume.id))


class DeleteBackup(SingleAct):
    """Taken away as far as it was reached; done again, the rest goes."""

    what = "backup-deletion"

    def __init__(self, context: Context, journal: Journal) -> None:
        super().__init__(context, journal)
        assert isinstance(journal.task, DeleteBackupOrder), f"operation {journal.id} deletes no backup"
        self._order = journal.task
        self.subject = self._order.backup.volume

    async def work(self) -> None:
        await self._context.drivers.storage.backup_delete(self._order.backup)

    async def undo(self) -> None:
        """What is gone is gone."""


class SnapshotFile(SingleAct):
    what = "snapshot-file"

    def __init__(self, context: Context, journal: Journal) -> None:
        super().__init__(context, journal)
        assert isinstance(journal.task, SnapshotFileOrder), f"operation {journal.id} makes no file"
        self._order = journal.task
        self.subject = self._order.snapshot

    async def work(self) -> None:
        order, file = self._order, Path(self._order.file)
        again = _WRITING in self._journal.notes
        if not again:
            if await asyncio.to_thread(file.exists):
                raise Conflict(f"{file} is there already", field="file", remedy="choose another name")
            notes = {**self._journal.notes, _WRITING: "yes"}
            self._journal = self._context.ledger.note(
                msgspec.structs.replace(self._journal, notes=notes), _WRITING
            )
        written = await self._context.drivers.storage.snapshot_file(
            order.snapshot, file, order.format, on_copied=self.on_copied, again=again
        )
        self.tell("host", self._context.settings.host)
        self.tell("file", order.file)
        self.tell("bytes", str(written.bytes))
        self.tell("sha256", written.sha256)

    async def undo(self) -> None:
        """Nothing appears before it is complete."""
