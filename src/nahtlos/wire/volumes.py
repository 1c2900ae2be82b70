"""What agents are ordered to do with volumes, and say to each other about it. See `wire.messages`.

An order names its coordinator: the one agent that carries it out, journals it and speaks to the others.
"""

import msgspec

from nahtlos.model.config import RbdEndpoint, VolumeAttachment, VolumeEndpoint
from nahtlos.model.ids import HostId, KeyId, OperationId, ServerId, SnapshotId, VolumeId
from nahtlos.model.storage import (
    BackupSpec,
    Changes,
    Consistency,
    SnapshotOffer,
    SnapshotSpec,
    VolumeFormat,
    VolumeSpec,
)
from nahtlos.wire.message import Message


class PeerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the agent of a host is reached."""

    host: HostId
    address: str
    peer_port: int


class VolumeClient(msgspec.Struct, frozen=True, kw_only=True):
    """A server that has volumes open, and where it was when the order was made. It may have moved since:
    who is asked and does not own it says Conflict, and the coordinator asks the other hosts."""

    server: ServerId
    at: PeerAddress
    attachments: tuple[VolumeAttachment, ...]
    """As they are when the order is made."""
    epoch: int = 0
    """Of the server then: a host that knows it by an older one only does not own it any more."""


class VolumeOrder(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    id: OperationId
    coordinator: HostId
    hosts: tuple[PeerAddress, ...] = ()
    """Every agent that may have to be spoken to."""

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        """Volumes no other operation may touch meanwhile."""
        raise NotImplementedError


class RelocateOrder(VolumeOrder, frozen=True, kw_only=True):
    """The copy of `volume` at `source` (who coordinates) goes to `destination`."""

    volume: VolumeSpec
    """As it is: `volume.epoch` is the source's, the destination serves it by one more."""
    source: VolumeEndpoint
    destination: VolumeSpec
    """As it shall be; its `host` may be the same if only the backend or format changes."""
    target: VolumeEndpoint
    rbd: RbdEndpoint | None = None
    """How servers reach it there, if that is not by `target`."""
    client: VolumeClient | None = None
    bytes_per_second: int = 0
    deadline: float = 24 * 3600.0
    """Seconds after which a copy that has not caught up is given up."""

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.volume.id,)


class RebuildOrder(VolumeOrder, frozen=True, kw_only=True):
    """The copy at `target` is brought up to the current ones, and is current from its end on."""

    volume: VolumeSpec
    """As it is: the copy at `target` is stale, or new."""
    source: VolumeEndpoint
    """A current copy."""
    target: VolumeEndpoint
    client: VolumeClient | None = None
    bytes_per_second: int = 0

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.volume.id,)


class MemoryTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Whose memory is saved, and where to. Its host is the coordinator."""

    server: ServerId
    attachment: VolumeAttachment


class SnapshotOrder(VolumeOrder, frozen=True, kw_only=True):
    """One crash-consistent group: with more than one copy or host the servers stand still meanwhile."""

    group: str
    snapshots: tuple[SnapshotSpec, ...]
    clients: tuple[VolumeClient, ...] = ()
    stop_seconds: float = 1.0
    """The longest that servers stand still; a group that takes longer is undone."""
    consistency: Consistency = Consistency.CRASH
    freeze_seconds: float = 20.0
    """The longest that file systems of guests stand still, the freezing included."""
    memory: MemoryTarget | None = None
    """Of the one server that has all of these disks."""

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        kept = (self.memory.attachment.volume,) if self.memory is not None else ()
        return (*(snapshot.volume for snapshot in self.snapshots), *kept)


class BackupOrder(VolumeOrder, frozen=True, kw_only=True):
    volume: VolumeSpec
    backup: BackupSpec
    base: BackupSpec | None = None
    bytes_per_second: int = 0
    clients: tuple[VolumeClient, ...] = ()
    consistency: Consistency = Consistency.CRASH
    freeze_seconds: float = 20.0
    """As of a `SnapshotOrder`."""

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.volume.id,)


class RestoreOrder(VolumeOrder, frozen=True, kw_only=True):
    """A new volume from a backup and all it rests on, oldest first."""

    volume: VolumeSpec
    chain: tuple[BackupSpec, ...]

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.volume.id,)


class DeleteBackupOrder(VolumeOrder, frozen=True, kw_only=True):
    """The coordinator takes a backup away from its target."""

    backup: BackupSpec

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.backup.volume,)


class SnapshotFileOrder(VolumeOrder, frozen=True, kw_only=True):
    """A snapshot of the coordinator becomes a file there, whole and on its own."""

    volume: VolumeId
    snapshot: SnapshotId
    file: str
    """Its whole path. It appears when it is complete."""
    format: VolumeFormat

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        """It is in nobody's way: what a snapshot holds does not change."""
        return ()


class ScrubOrder(VolumeOrder, frozen=True, kw_only=True):
    """The copies of a volume are compared, while it is written. What differs, or cannot be read, is marked as
    such."""

    volume: VolumeSpec
    bytes_per_second: int = 0

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.volume.id,)


class RevertOrder(VolumeOrder, frozen=True, kw_only=True):
    """The coordinator's copy becomes again what the snapshot holds. No server has the volume."""

    volume: VolumeSpec
    snapshot: SnapshotId

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.volume.id,)


class MoveSnapshotsOrder(VolumeOrder, frozen=True, kw_only=True):
    """What `source` keeps of these snapshots comes to the coordinator, who fetches it. It stays there, too,
    until the end of this is recorded."""

    volume: VolumeId
    snapshots: tuple[SnapshotId, ...]
    source: VolumeEndpoint
    """Its storage daemon; exports are told by it (`VolumeOffer`)."""
    bytes_per_second: int = 0

    @property
    def volumes(self) -> tuple[VolumeId, ...]:
        return (self.volume,)


VolumeTask = (
    RelocateOrder
    | RebuildOrder
    | SnapshotOrder
    | BackupOrder
    | RestoreOrder
    | RevertOrder
    | SnapshotFileOrder
    | ScrubOrder
    | MoveSnapshotsOrder
    | DeleteBackupOrder
)


# --- messages ----------------------------------------------------------------------------------------


class BeginVolumeTask(Message, frozen=True, kw_only=True):
    """Orchestrator to the order's coordinator. Repeating it changes nothing."""

    order: VolumeTask


class VolumeReceive(Message, frozen=True, kw_only=True):
    """Coordinator to the host that shall have a copy: a blank one, served for writing (`Storage.receive`).
    Kept, although no configuration names it yet, until one does or the operation was undone."""

    id: OperationId
    volume: VolumeSpec


class VolumeKeep(Message, frozen=True, kw_only=True):
    """Coordinator to a host it had told `VolumeReceive`, once the copy there is the one that counts: it is
    served as `volume` says, and nothing may be received over it, although no configuration names it yet."""

    id: OperationId
    volume: VolumeSpec


class VolumeForget(Message, frozen=True, kw_only=True):
    """Coordinator to a host it had told `VolumeReceive`: the operation was undone, what was received counts
    for nothing. Also keeps a `VolumeReceive` that arrives late from having any effect."""

    id: OperationId
    volume: VolumeId


class VolumeRejoin(Message, frozen=True, kw_only=True):
    """As `VolumeReceive`, to a host that has an earlier copy: keep what is there (`Storage.rejoin`)."""

    id: OperationId
    volume: VolumeSpec


class VolumeRejoined(Message, frozen=True, kw_only=True):
    changes: Changes | None
    """None: `VolumeReceive` has to follow, and everything to be copied."""


class VolumeRanOn(Message, frozen=True, kw_only=True):
    """Coordinator to the host that owns `server`: has its VMM run on since it lost the copy at `gone`, and is
    all it had begun to write at the copies that are left? Conflict if not."""

    server: ServerId
    gone: VolumeEndpoint


class VolumeStep(Message, frozen=True, kw_only=True):
    """The host of a server to one with a copy it writes to: `Storage.step_begin`, `Storage.step_reached`."""

    volume: VolumeId
    step: str
    reached: bool = False


class VolumeFreeze(Message, frozen=True, kw_only=True):
    """Coordinator to the host that owns `server`: its guest stands still until `VolumeThaw`, and no longer
    than `seconds`. Conflict if it does not own the server, or a move of it runs."""

    id: OperationId
    server: ServerId
    epoch: int = 0
    seconds: float


class VolumeThaw(Message, frozen=True, kw_only=True):
    """Conflict if the guest has not stood still all the time since `VolumeFreeze` of the same operation was
    answered; it runs on in any case."""

    id: OperationId
    server: ServerId


class GuestFreeze(Message, frozen=True, kw_only=True):
    """Coordinator to the host that owns `server`: the guest's file systems are to stand still until
    `GuestThaw`, and no longer than `seconds`. Conflict of field `server` if it does not own the server, or a
    move of it runs; other errors say why its guest cannot."""

    id: OperationId
    server: ServerId
    epoch: int = 0
    seconds: float


class GuestThaw(Message, frozen=True, kw_only=True):
    """Conflict if the file systems have not stood still all the time since `GuestFreeze` of the same
    operation was answered; they are thawed in any case."""

    id: OperationId
    server: ServerId


class VolumeSnapshot(Message, frozen=True, kw_only=True):
    """Coordinator to a host that keeps some of a group: take them (`Storage.snapshot`), or with `undo` delete
    them again."""

    id: OperationId
    snapshots: tuple[SnapshotSpec, ...]
    undo: bool = False


class VolumeSnapshotPrepare(Message, frozen=True, kw_only=True):
    """Coordinator to a host that keeps some of a group, before servers stand still for it:
    `Storage.snapshot_prepare`. An agent of an earlier release refuses it, and takes longer then."""

    id: OperationId
    snapshots: tuple[SnapshotSpec, ...]


class VolumeOffer(Message, frozen=True, kw_only=True):
    """Coordinator to a host with snapshots it shall have: `Storage.offer_snapshots`."""

    id: OperationId
    volume: VolumeId
    snapshots: tuple[SnapshotId, ...]


class VolumeOffered(Message, frozen=True, kw_only=True):
    offer: SnapshotOffer


class VolumeOfferEnd(Message, frozen=True, kw_only=True):
    """Nobody reads any more what was offered of this volume."""

    id: OperationId
    volume: VolumeId


class SetCopySpeed(Message, frozen=True, kw_only=True):
    """Orchestrator to the coordinator of a copy that runs: from now on so fast; 0 for no limit."""

    id: OperationId
    bytes_per_second: int


class VolumeAttach(Message, frozen=True, kw_only=True):
    """Coordinator to the host that owns `server`: reach this volume so from now on, and durably. Conflict if
    it does not own the server; answered when the guest's writes go there."""

    id: OperationId
    server: ServerId
    epoch: int = 0
    attachment: VolumeAttachment
    instead_of: VolumeEndpoint | None = None
    """The copy whose place the one of `attachment.copies` takes. Where the server reaches the volume by
    several, the others stay; where it has let this one go meanwhile, nothing changes. None: of all."""


class ReplicaLost(Message, frozen=True, kw_only=True):
    """Agent to orchestrator: a copy does not take writes, the server stands still. Answered once it is
    durably recorded that this copy is not current; only then may the server go on without it."""

    server: ServerId
    epoch: int
    """Of the server at the asking host: whoever does not own it is refused."""
    volume: VolumeId
    lost: HostId
    export: str = ""
    """By which the copy was reached: one that came there since by another epoch is not meant."""


class ReplicasRecorded(Message, frozen=True, kw_only=True):
    """How the volume is to be reached now."""

    attachment: VolumeAttachment


class VolumeDigest(Message, frozen=True, kw_only=True):
    """Coordinator to a host with a copy: `Storage.digest`."""

    volume: VolumeId
    offset: int
    length: int


class VolumeDigested(Message, frozen=True, kw_only=True):
    sha256: bytes


class VolumeMark(Message, frozen=True, kw_only=True):
    """Coordinator to a host whose copy was found wrong: say so (`VolumeStatus.problem`) until it is made
    anew, or found right (`problem` is empty)."""

    volume: VolumeId
    epoch: int
    problem: str


class KeyRead(Message, frozen=True, kw_only=True):
    """Agent to orchestrator. Refused unless a volume of that host is encrypted by it."""

    key: KeyId


class KeyData(Message, frozen=True, kw_only=True):
    secret: bytes
