"""What the images of a pool mean, and what must be done to have them as wished. Pure.

A volume is the image of its name. What belongs to it stands in the image's metadata: the host that
administers it (only that one changes or deletes it), its epoch, and how it is to be deleted. An image that is
not complete yet, or of which only snapshots and clones are left, has a name no volume can have:

    .new.<volume>                being made
    .gone.<volume>.e<epoch>      deleted or gone elsewhere, kept for its snapshots and for clones of them

A snapshot `.backup.<backup>` is the moment of a backup: what has changed since is told by it. It is nobody's
snapshot, and goes with its volume.

Administration passes to another host with a higher epoch, never otherwise: two configurations of which one
is late cannot take it from each other.
"""

from enum import StrEnum

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.ids import BackupId, HostId, SnapshotId, VolumeId
from nahtlos.model.inventory import SnapshotStatus, VolumeStatus
from nahtlos.model.storage import Deletion, StorageBackend, VolumeFormat, VolumeSpec

NEW, GONE = ".new.", ".gone."
HOST, EPOCH, DELETION, RECEIVING, OFFER = "host", "epoch", "deletion", "receiving", "offer"
GROUP = "group."
"""With a snapshot's name: the group it is of."""
MOMENT = ".backup."


class SnapshotFacts(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    size: int
    trashed: bool
    """Removed, and kept out of sight for clones that rest on it."""
    children: tuple[str, ...] = ()


class ImageFacts(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    size: int
    metadata: dict[str, str]
    allocated: int
    clients: tuple[str, ...]
    snapshots: tuple[SnapshotFacts, ...]

    @property
    def host(self) -> str:
        return self.metadata.get(HOST, "")

    @property
    def epoch(self) -> int:
        return int(self.metadata.get(EPOCH, "0"))

    @property
    def receiving(self) -> bool:
        """It is the target of a relocation that has not ended."""
        return RECEIVING in self.metadata

    @property
    def live_snapshots(self) -> tuple[SnapshotFacts, ...]:
        return tuple(s for s in self.snapshots if not s.trashed and not s.name.startswith(MOMENT))

    @property
    def moments(self) -> dict[str, int]:
        """Names of snapshots that are moments of backups -> bytes of the image then."""
        return {s.name: s.size for s in self.snapshots if not s.trashed and s.name.startswith(MOMENT)}


def facts_of(said: object) -> ImageFacts | None:
    return msgspec.convert(said, ImageFacts | None)


class Act(StrEnum):
    MAKE = "make"
    FENCE = "fence"
    """Whoever has it open never writes again."""
    ENLARGE = "enlarge"
    NOTE = "note"


def steps(volume: VolumeSpec, image: ImageFacts | None, host: HostId) -> tuple[Act, ...]:
    """What brings `image` to `volume`, in order. Refused if nothing can."""
    check(volume)
    if image is None:
        return (Act.MAKE,)
    if image.host != host and volume.epoch <= image.epoch:
        raise Refused(
            f"'{volume.id}' is administered by {image.host or 'nobody known'} at epoch {image.epoch}",
            field="host",
            remedy="give it a higher epoch to take it over",
        )
    if volume.size_mib << 20 < image.size:
        raise Refused(
            f"'{volume.id}' has {image.size >> 20} MiB and cannot be made smaller", field="size_mib"
        )
    wanted: list[Act] = []
    if volume.epoch > image.epoch:
        wanted.append(Act.FENCE)
    if volume.size_mib << 20 > image.size:
        wanted.append(Act.ENLARGE)
    if changed_notes(image, notes(volume, host)):
        wanted.append(Act.NOTE)
    return tuple(wanted)


def check(volume: VolumeSpec) -> None:
    """Refused for what no image can be."""
    if volume.format is not VolumeFormat.RAW:
        raise Refused(
            f"a Ceph volume has no format {volume.format}", field="format", remedy="use raw: it is thin"
        )
    if volume.replicas:
        raise Refused("Ceph keeps its own copies", field="replicas", remedy="set the size of its pool")
    if volume.encryption_key is not None:
        raise Refused(
            "Ceph volumes are not encrypted", field="encryption_key", remedy="use the embedded storage"
        )


def notes(volume: VolumeSpec, host: HostId) -> dict[str, str | None]:
    """Metadata of a volume in use; None: not there."""
    return {
        HOST: host,
        EPOCH: str(volume.epoch),
        DELETION: volume.deletion,
        RECEIVING: None,
        OFFER: None,
    }


def changed_notes(image: ImageFacts, wanted: dict[str, str | None]) -> dict[str, str | None]:
    """An epoch never goes back."""
    changed = {key: value for key, value in wanted.items() if image.metadata.get(key) != value}
    if int(wanted.get(EPOCH) or 0) < image.epoch:
        changed.pop(EPOCH, None)
    return changed


def offer(host: HostId, epoch: int) -> str:
    """That `host` may administer an image from `epoch` on, without its clients being fenced."""
    return f"{epoch} {host}"


def moment(backup: BackupId) -> SnapshotId:
    return SnapshotId(MOMENT + backup)


def zeroed(image: ImageFacts) -> bool:
    return image.metadata.get(DELETION) == Deletion.ZERO


# --- as others see them ------------------------------------------------------------------------------


def gone(image: ImageFacts) -> str:
    """A volume may come again, and go again by a later epoch."""
    return f"{GONE}{image.name}.e{image.epoch}"


def volume_of(image: str) -> VolumeId:
    """No volume's name has a dot."""
    return VolumeId(image.removeprefix(NEW).removeprefix(GONE).partition(".")[0])


def volume_status(image: ImageFacts, host: HostId) -> VolumeStatus:
    return VolumeStatus(
        id=VolumeId(image.name),
        epoch=image.epoch,
        served=image.host == host,
        size_mib=image.size >> 20,
        allocated_bytes=image.allocated,
        clients=len(image.clients),
    )


def snapshot_statuses(image: ImageFacts) -> tuple[SnapshotStatus, ...]:
    return tuple(
        SnapshotStatus(
            id=SnapshotId(snapshot.name),
            volume=volume_of(image.name),
            group=image.metadata.get(GROUP + snapshot.name, ""),
            size_mib=snapshot.size >> 20,
            clones=tuple(VolumeId(child) for child in snapshot.children if not child.startswith(".")),
            backend=StorageBackend.CEPH,
        )
        for snapshot in image.live_snapshots
    )
