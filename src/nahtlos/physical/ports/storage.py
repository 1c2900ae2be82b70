"""What an agent asks of the volumes of its host, and of who keeps their keys."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec

from nahtlos.model.config import VolumeAttachment, VolumeEndpoint
from nahtlos.model.ids import BackupId, KeyId, OperationId, ReleaseId, SnapshotId, VolumeId
from nahtlos.model.inventory import PoolStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.storage import (
    BackupSpec,
    Changes,
    CopyProgress,
    DiskBudget,
    SnapshotExport,
    SnapshotOffer,
    SnapshotSpec,
    VolumeFormat,
    VolumeSpec,
)


class StorageDesired(msgspec.Struct, frozen=True, kw_only=True):
    """What `Storage.reconcile` makes true. What is not named is left alone."""

    volumes: tuple[VolumeSpec, ...] = ()
    removed: tuple[VolumeId, ...] = ()
    """A copy goes and leaves behind what `snapshots` name; Conflict while it has others."""
    snapshots: tuple[SnapshotSpec, ...] = ()
    removed_snapshots: tuple[SnapshotId, ...] = ()
    exports: tuple[SnapshotExport, ...] = ()
    """Snapshots to be readable from outside; others are withdrawn."""
    release: ReleaseId | None = None
    """Of the storage daemon. None: whatever it runs."""
    budget: DiskBudget = DiskBudget()
    pinned: frozenset[VolumeId] = frozenset()
    """Volumes that take part in an operation here: neither created, nor served otherwise, nor resized."""


OnMoment = Callable[[], Awaitable[None]]


OnCopied = Callable[[int, int], None]
"""Bytes done, bytes in all. May be called in a thread."""


Speed = Callable[[], int]
"""Bytes a second that may be copied now; 0: no limit. Called in a thread."""


class SnapshotFetch(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshots that come here by `operation`."""

    operation: OperationId
    volume: VolumeId
    source: VolumeEndpoint
    """The storage daemon that offers them."""


class BackupResult(msgspec.Struct, frozen=True, kw_only=True):
    base: BackupId | None
    """What it rests on; None: it is a full one."""
    stored_bytes: int
    why_full: str = ""
    """Why it is a full one although changes were asked for."""


class FileWritten(msgspec.Struct, frozen=True, kw_only=True):
    bytes: int
    sha256: str


class Keyring(Protocol):
    async def key(self, key: KeyId) -> bytes:
        """Unavailable if who keeps it cannot be reached, NotFound if there is none."""
        ...


class RawVolume(Protocol):
    """A volume as an agent itself reads and writes it: never one that a server has."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """To every copy. At most 4 MiB at once."""
        ...

    async def flush(self) -> None:
        """What was written is durable on return."""
        ...

    async def read(self, offset: int, length: int) -> bytes: ...

    async def close(self) -> None: ...


class Storage(Protocol):
    """Volumes of this host. Every verb can be repeated; a daemon that dies and is started again by its
    supervisor serves what was served, and no acknowledged write is lost."""

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        """Create what is missing, from its image or snapshot or blank; serve everything by its epoch; enlarge
        what is to be larger; delete what is removed; run the wanted release. Returns what was put right."""
        ...

    async def observe(self) -> tuple[VolumeStatus, ...]: ...

    async def pool(self) -> PoolStatus | None:
        """Where this host keeps its volumes; None if it keeps none itself."""
        ...

    async def release(self) -> ReleaseId | None:
        """That the daemon runs by; None while there is none."""
        ...

    async def open_raw(self, attachment: VolumeAttachment, *, writing: bool) -> RawVolume:
        """A volume of this or another host. Unavailable while it is not served."""
        ...

    async def reach_alone(self, attachments: tuple[VolumeAttachment, ...]) -> None:
        """Said before a server is booted here: only it may have them open. Whoever else has, dead or alive,
        writes no more and holds nobody up. Nothing to do for what a storage daemon serves: there, who is shut
        out has another name for it."""
        ...

    # snapshots

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        """All at one moment. Those that exist are left as they are; all or none of the others are made."""
        ...

    async def snapshot_prepare(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        """Done beforehand of `snapshot` is what servers that stand still need not wait for. Needs no undoing,
        and binds to nothing. Refused and so on as `snapshot` would be."""
        ...

    async def snapshots(self) -> tuple[SnapshotStatus, ...]: ...

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        """The volume is as it was then. Conflict while a client has it open. All snapshots stay."""
        ...

    async def offer_snapshots(self, volume: VolumeId, snapshots: tuple[SnapshotId, ...]) -> SnapshotOffer:
        """Readable by other hosts, layer by layer, until `end_offer` or until the daemon ends. Said again,
        it is an offer of its own. NotFound where one is not here, Unavailable while anything they rest on may
        still change."""
        ...

    async def end_offer(self, volume: VolumeId) -> None: ...

    async def fetch_snapshots(
        self, fetch: SnapshotFetch, offer: SnapshotOffer, *, speed: Speed, on_copied: OnCopied
    ) -> None:
        """What another host offers is here on return, all of it, as snapshots of the volume, whether that is
        here or not. Nothing that is here changes. Repeated after a crash it goes on where it was."""
        ...

    async def forget_fetched(self, fetch: SnapshotFetch) -> None:
        """The snapshots this operation has brought here, and what it has begun to copy, are gone."""
        ...

    # relocation: source

    async def serve(self, volume: VolumeSpec) -> None:
        """Reachable at this host by `volume.export`, beside any other way to it: what is copied from here
        must be written through here. Nothing to do for what is served here anyway."""
        ...

    async def relocate_start(
        self,
        volume: VolumeSpec,
        target: VolumeEndpoint,
        *,
        bytes_per_second: int,
        changes: Changes | None = None,
    ) -> None:
        """Copy all of it to `target` while it is written; from READY on every write goes to both.
        `bytes_per_second`: 0 for no limit; may be called again with another one. `changes`, of the copy at
        `target`: only what was written there or here since is copied; Conflict if that is not known here."""
        ...

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress: ...

    async def relocate_complete(self, volume: VolumeId) -> None:
        """From its return on, and after any crash from its beginning on, this host passes everything on to
        the target and its own file counts for nothing. Refused unless READY."""
        ...

    async def relocate_cancel(self, volume: VolumeId) -> None:
        """The volume is this host's alone again. Conflict once `relocate_complete` has begun."""
        ...

    async def relocate_finish(self, volume: VolumeId) -> None:
        """No client comes here any more: withdraw it, delete the file. Refused unless it was completed."""
        ...

    # relocation and replication: destination

    async def receive(self, volume: VolumeSpec) -> None:
        """A blank file of its size, served for writing to hosts by `volume.epoch`. What an earlier attempt
        has left in it is no matter."""
        ...

    async def rejoin(self, volume: VolumeSpec) -> Changes | None:
        """Instead of `receive`: what is here stays, as the base of a copy that only takes what differs, and
        is served for writing by `volume.epoch`. None: it is nothing to begin from."""
        ...

    async def step_begin(self, volume: VolumeId, step: str) -> None:
        """From now on remember what is written (as long as the daemon lives), under this name."""
        ...

    async def step_reached(self, volume: VolumeId, step: str) -> None:
        """All copies hold what was written before `step_begin` was answered by all of them: durable here on
        return. Refused if what was written since is not known."""
        ...

    # backups and files

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
        """Whole at its target when this returns. What has changed since `base`, or everything if that is not
        known or none is named; never less. Repeated after a crash, it is made of the same changes. A guest
        never waits for a target. `on_moment` is awaited as soon as it is decided which moment the backup is
        of, before anything is copied; what it raises ends this."""
        ...

    async def backup_forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        """It is not to be: the next one begins where this would have."""
        ...

    async def backup_delete(self, backup: BackupSpec) -> None:
        """It is not at its target any more; the volume need not be here. Another one of that name stays, and
        one that is not there is fine. What rests on it can be restored no more: nothing may."""
        ...

    async def restore(
        self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], *, on_copied: OnCopied
    ) -> None:
        """Into `volume`, which was received by its epoch and is blank. Refused where a backup is missing, is
        not whole, or holds something else than was written."""
        ...

    async def snapshot_file(
        self,
        snapshot: SnapshotId,
        file: Path,
        form: VolumeFormat,
        *,
        on_copied: OnCopied,
        again: bool = False,
    ) -> FileWritten:
        """`file` appears when it is complete. Conflict if there is one, unless this is said `again`: then it
        is what was written before."""
        ...

    # health

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        """Say of a copy that it was found wrong while it was served by `epoch` (`VolumeStatus.problem`),
        until it is received anew. An empty `problem`: it was found right."""
        ...

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        """SHA-256 of these bytes as they are on disk; zeros and holes are alike."""
        ...
