"""What is on disk for a volume, and the file that says so.

A volume is a tree of layers, each a file: a base, overlays that hold what was written since, and the one that
takes writes now (`active`). A snapshot is a name for a layer that no longer changes. A clone's first layer
rests on a layer of another volume of this host. What a record says is the truth: the header of an image names
nothing that counts.

A record is durable before anything that depends on it is done, and several records change together or not at
all (`Records.commit`). A record must be right for a daemon that is started from it at that moment as well as
for one that runs and has not yet done the step. Files that no record names are leftovers.

    serving   <-> proxy      everything is passed on to `endpoint`; the layers count for nothing
    receiving  -> serving    a blank active layer that a copy is written into
    deleting                 not served any more; layers are on their way out
    proxy      -> left       only its snapshots are here (and what was made from them rests on its layers)
"""

import os
import threading
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import NotFound
from nahtlos.model.ids import KeyId, SnapshotId, VolumeId
from nahtlos.model.storage import Deletion, VolumeFormat

SUFFIX = ".json"
_JOURNAL = ".commit"
_RAW = ".raw"


class Mode(StrEnum):
    SERVING = "serving"
    PROXY = "proxy"
    RECEIVING = "receiving"
    DELETING = "deleting"
    LEFT = "left"


class LayerRef(msgspec.Struct, frozen=True, order=True):
    volume: VolumeId
    number: int


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    """Never used twice in a volume; part of the names of its nodes."""
    file: str
    """In the folder of volumes."""
    format: VolumeFormat
    size: int
    """Bytes its reader sees."""
    backing: LayerRef | None = None
    encryption_key: KeyId | None = None


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: SnapshotId
    layer: int
    group: str = ""
    size: int = 0
    """Bytes of the volume then."""
    created_at: float = 0.0


class BitmapRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A dirty bitmap of the active layer. It is continued under the same name on every new active layer."""

    name: str
    persistent: bool = True


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that is being merged with the one it rests on, so that it can go."""

    layer: int
    into: int
    pivot: bool = False
    """`layer` is the active one, and `into` is a new layer of the base's file. Once both hold the same and
    every write goes to both, `into` is recorded as the active one; then the daemon follows."""


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    volume: VolumeId
    layers: tuple[Layer, ...]
    active: int
    """Number of the layer that takes writes."""
    format: VolumeFormat = VolumeFormat.RAW
    """As asked for: what it shall be when it has no snapshots."""
    mode: Mode = Mode.SERVING
    endpoint: VolumeEndpoint | None = None
    """Where a proxy passes everything on to."""
    epoch: int = 0
    """By which it is (to be) served; 0: not at all yet."""
    boot_id: str = ""
    """Of the host when it was first served by `epoch`."""
    withdrawn: bool = False
    """Not to be served for the moment: a step is under way that clients must not see half."""
    snapshots: tuple[SnapshotRecord, ...] = ()
    bitmaps: tuple[BitmapRecord, ...] = ()
    merge: Merge | None = None
    deletion: Deletion = Deletion.DISCARD
    last_number: int = 0
    """The highest a layer ever had."""
    in_step: str = ""
    """The last moment at which this copy held, durably, everything the others did (see `replication`)."""

    def layer(self, number: int) -> Layer:
        return next(each for each in self.layers if each.number == number)

    @property
    def active_layer(self) -> Layer:
        return self.layer(self.active)

    @property
    def size(self) -> int:
        return self.active_layer.size

    @property
    def next_number(self) -> int:
        return 1 + max(self.last_number, *(each.number for each in self.layers))

    @property
    def pivoting(self) -> bool:
        return self.merge is not None and self.merge.pivot and self.active == self.merge.into

    def snapshot(self, snapshot: SnapshotId) -> SnapshotRecord | None:
        return next((each for each in self.snapshots if each.id == snapshot), None)

    def with_layer(self, layer: Layer) -> "VolumeRecord":
        """With it added, or in the place of the one of its number."""
        others = (each for each in self.layers if each.number != layer.number)
        return msgspec.structs.replace(
            self, layers=(*others, layer), last_number=max(self.last_number, layer.number)
        )


RecordMap = Mapping[VolumeId, VolumeRecord]


def chain(records: RecordMap, ref: LayerRef) -> tuple[LayerRef, ...]:
    """From the base up to `ref`, across volumes."""
    found = [ref]
    while (below := records[found[-1].volume].layer(found[-1].number).backing) is not None:
        found.append(below)
    return tuple(reversed(found))


def active_chain(records: RecordMap, volume: VolumeId) -> tuple[LayerRef, ...]:
    return chain(records, LayerRef(volume, records[volume].active))


def children(records: RecordMap, ref: LayerRef) -> tuple[LayerRef, ...]:
    """Layers that rest on it, of this volume and of clones."""
    return tuple(
        LayerRef(record.volume, layer.number)
        for record in records.values()
        for layer in record.layers
        if layer.backing == ref
    )


def clones(records: RecordMap, volume: VolumeId, snapshot: SnapshotId | None = None) -> tuple[VolumeId, ...]:
    """Other volumes that rest on `snapshot` of `volume`; on any layer of it if none is named."""
    named = {each.layer for each in records[volume].snapshots if snapshot in (None, each.id)}
    numbers = named if snapshot else {each.number for each in records[volume].layers}
    found = {ref.volume for number in numbers for ref in children(records, LayerRef(volume, number))}
    return tuple(sorted(found - {volume}))


class _Commit(msgspec.Struct, frozen=True):
    """Several records that change together."""

    written: tuple[VolumeRecord, ...] = ()
    removed: tuple[VolumeId, ...] = ()


class Records:
    """The records of one folder, in memory and on disk. One per process and folder. `commit` waits for the
    disk: in an event loop, call it in a thread (`Serving.keep`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[VolumeId, VolumeRecord] | None = None
        self._writing = threading.Lock()

    def all(self) -> RecordMap:
        if self._known is None:
            self._known = self._load()
        return self._known

    def get(self, volume: VolumeId) -> VolumeRecord | None:
        return self.all().get(volume)

    def __getitem__(self, volume: VolumeId) -> VolumeRecord:
        record = self.get(volume)
        if record is None:
            raise NotFound(f"volume '{volume}' is not on this host", field="volume")
        return record

    def commit(self, *written: VolumeRecord, removed: Iterable[VolumeId] = ()) -> None:
        """Durable on return; after a crash in between all of it or nothing."""
        change = _Commit(written, tuple(removed))
        with self._writing:
            if len(change.written) + len(change.removed) > 1:
                self._write(_JOURNAL, change)
                self._apply(change)
                self._remove(_JOURNAL)
            else:
                self._apply(change)
            known = {**self.all(), **{record.volume: record for record in written}}
            self._known = {name: record for name, record in known.items() if name not in change.removed}

    def _load(self) -> dict[VolumeId, VolumeRecord]:
        if not self.folder.is_dir():
            return {}
        journal = self.folder / f"{_JOURNAL}{SUFFIX}"
        if journal.exists():
            self._apply(msgspec.json.decode(journal.read_bytes(), type=_Commit))
            self._remove(_JOURNAL)
        found: dict[VolumeId, VolumeRecord] = {}
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if not path.name.startswith("."):
                record = msgspec.json.decode(path.read_bytes(), type=VolumeRecord)
                found[record.volume] = record
        named = {layer.file for record in found.values() for layer in record.layers}
        for path in sorted(self.folder.glob(f"*{_RAW}")):
            if not path.name.startswith(".") and path.name not in named and path.stem not in found:
                found[VolumeId(path.stem)] = adopted(path)
        return found

    def _apply(self, change: _Commit) -> None:
        for record in change.written:
            self._write(record.volume, record)
        for volume in change.removed:
            self._remove(volume)

    def _write(self, name: str, value: VolumeRecord | _Commit) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path, new = self.folder / f"{name}{SUFFIX}", self.folder / f".{name}.new"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(value))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_folder(self.folder)

    def _remove(self, name: str) -> None:
        (self.folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
        sync_folder(self.folder)


def adopted(path: Path) -> VolumeRecord:
    """A raw file of a time when volumes had no records. Its record is written when something changes."""
    layer = Layer(number=0, file=path.name, format=VolumeFormat.RAW, size=path.stat().st_size)
    return VolumeRecord(volume=VolumeId(path.stem), layers=(layer,), active=0)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
