"""Snapshots that come to this host from another one (see `snapshot_offers`).

    each layer, base first: copied -> on disk -> named      then, at once, all of them recorded

A layer that has its name is complete; one that is on its way goes on where it was, unless the host was
restarted: then nobody knows how much of it was on disk. No record names anything of it before all of it is
here. Nothing here is opened by the storage daemon, and nothing that is served changes. The layers are this
host's own: what comes shares nothing with what the volume has here, but snapshots that come together share
what they did.
"""

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import OfferedLayer, SnapshotOffer
from nahtlos.physical.ports import OnCopied, SnapshotFetch, Speed
from nahtlos.physical.storage.backup_targets import Range
from nahtlos.physical.storage.backups import Ended, in_thread, pieces
from nahtlos.physical.storage.nbd import ALLOCATION, ZERO, Address, NbdClient
from nahtlos.physical.storage.record import (
    Layer,
    LayerRef,
    Mode,
    RecordMap,
    SnapshotRecord,
    VolumeRecord,
    children,
    sync_folder,
)
from nahtlos.physical.storage.serving import Serving
from nahtlos.wire.tls import client_context, host_party

ARRIVING = ".arriving-"
SUFFIX = ".layer"
"""No file that ends so is taken for a volume, or for a leftover of one."""
_FLUSHED_EVERY = 64 << 20
_Heard = Callable[[int], None]


class SnapshotArrivals:
    def __init__(self, serving: Serving, pki_dir: Path) -> None:
        self._serving = serving
        self._folder = serving.places.volumes
        self._pki_dir = pki_dir

    async def copy(
        self, fetch: SnapshotFetch, offer: SnapshotOffer, *, speed: Speed, on_copied: OnCopied
    ) -> None:
        """Takes as long as it takes; `Serving.changing` is not held."""
        total, done = sum(layer.length for layer in offer.layers), 0
        throttle = _Throttle(speed)
        for layer, file in zip(offer.layers, layer_files(fetch, offer), strict=True):
            before = done

            def copied(at: int, before: int = before) -> None:
                on_copied(before + at, total)

            await in_thread(
                lambda stop, layer=layer, file=file, copied=copied: self._copy_layer(
                    fetch, layer, file, _Copying(stop, throttle, copied)
                )
            )
            done += layer.length
            copied(layer.length)
            await self._serving.on_step("fetch.layer")

    async def record(self, fetch: SnapshotFetch, offer: SnapshotOffer) -> None:
        """`Serving.changing` is held."""
        before = self._serving.records.get(fetch.volume)
        after = with_arrived(before, fetch.volume, offer, layer_files(fetch, offer))
        if after != before:
            await in_thread(lambda _: self._serving.records.commit(after))
        await self._serving.on_step("fetch.recorded")
        await asyncio.to_thread(self._remove, f"{ARRIVING}{_prefix(fetch)}")

    async def forget(self, fetch: SnapshotFetch) -> None:
        """`Serving.changing` is held."""
        records = self._serving.records.all()
        record = records.get(fetch.volume)
        if record is not None:
            after = without_arrived(records, record, _prefix(fetch))
            if after is None:
                await in_thread(lambda _: self._serving.records.commit(removed=(fetch.volume,)))
            elif after != record:
                await in_thread(lambda _: self._serving.records.commit(after))
            await self._serving.on_step("fetch.forgotten")
        await asyncio.to_thread(self._remove, f"{ARRIVING}{_prefix(fetch)}", _prefix(fetch))

    # --- in a thread -------------------------------------------------------------------------------

    def _remove(self, *beginnings: str) -> None:
        for beginning in beginnings:
            for path in self._folder.glob(f"{beginning}*"):
                path.unlink(missing_ok=True)
        if self._folder.is_dir():
            sync_folder(self._folder)

    def _copy_layer(self, fetch: SnapshotFetch, layer: OfferedLayer, file: str, copying: "_Copying") -> None:
        final = self._folder / file
        if final.exists():
            return
        arriving = self._folder / f"{ARRIVING}{file}.{self._serving.boot_id[:8]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(arriving, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with self._client(fetch, layer) as source:
                    copying.into(descriptor, source, layer.length)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            arriving.replace(final)
            sync_folder(self._folder)
        except NotFound as gone:  # its storage daemon was started anew
            raise Unavailable(f"{fetch.source.host} does not offer it any more: {gone.message}") from gone
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise Unavailable(
                f"snapshots of '{fetch.volume}' cannot be written here: {error.strerror or error}",
                field="pool",
                remedy="delete something there, or choose another host" if full else "",
            ) from error

    def _client(self, fetch: SnapshotFetch, layer: OfferedLayer) -> NbdClient:
        return NbdClient(
            Address(fetch.source.address, fetch.source.port, layer.export),
            tls=client_context(self._pki_dir),
            expect=host_party(fetch.source.host),
        )


class _Throttle:
    """Not more than so many bytes a second, which may change meanwhile."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._paid_until = time.monotonic()

    def wait(self, length: int, stop: threading.Event) -> None:
        rate = self._speed()
        if rate <= 0:
            return
        self._paid_until = max(self._paid_until, time.monotonic() - 0.1) + length / rate
        if (left := self._paid_until - time.monotonic()) > 0:
            stop.wait(left)


class _Copying:
    """One layer, from where it was to its end. `copied` hears how far that is."""

    def __init__(self, stop: threading.Event, throttle: _Throttle, copied: _Heard) -> None:
        self._stop = stop
        self._throttle = throttle
        self._copied = copied

    def into(self, descriptor: int, source: NbdClient, length: int) -> None:
        if source.size < length:
            raise Refused(f"{source.size} bytes are offered, {length} were promised", field="source")
        begin, flushed = os.fstat(descriptor).st_size, 0
        for offset, size, zero in _parts(source, min(begin, source.size)):
            if self._stop.is_set():
                raise Ended
            if zero:
                os.ftruncate(descriptor, offset + size)
            else:
                _write(descriptor, source.read(offset, size), offset)
                flushed += size
                self._throttle.wait(size, self._stop)
            if flushed >= _FLUSHED_EVERY:
                os.fdatasync(descriptor)
                flushed = 0
            self._copied(min(offset + size, length))
        if self._stop.is_set():
            raise Ended
        os.ftruncate(descriptor, length)


def _parts(source: NbdClient, begin: int) -> Iterator[tuple[int, int, bool]]:
    """Offset, size, and whether it is nothing but zeros."""
    for extent in source.extents(ALLOCATION, begin, source.size - begin):
        if extent.flags & ZERO:
            yield extent.offset, extent.length, True
        else:
            for offset, size in pieces((Range(extent.offset, extent.length),)):
                yield offset, size, False


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


# --- names -------------------------------------------------------------------------------------------


def layer_files(fetch: SnapshotFetch, offer: SnapshotOffer) -> tuple[str, ...]:
    """The same ones for the same offer, so that what is here of it is found again."""
    said = msgspec.json.encode((fetch.source.host, offer))
    digest = hashlib.sha256(said).hexdigest()[:12]
    return tuple(f"{_prefix(fetch)}{digest}-{place}{SUFFIX}" for place in range(len(offer.layers)))


def _prefix(fetch: SnapshotFetch) -> str:
    return f"{fetch.volume}.{fetch.operation}."


# --- records -----------------------------------------------------------------------------------------


def with_arrived(
    record: VolumeRecord | None, volume: VolumeId, offer: SnapshotOffer, files: tuple[str, ...]
) -> VolumeRecord:
    """The record with the snapshots it lacks. Of a volume that is not here they are all there is of it."""
    if record is not None and record.mode not in (Mode.SERVING, Mode.LEFT):
        raise Conflict(
            f"volume '{volume}' is {record.mode.value} here",
            field="volume",
            remedy="wait for its operation to end",
        )
    missing = [each for each in offer.snapshots if record is None or record.snapshot(each.id) is None]
    if record is not None and not missing:
        return record
    first = record.next_number if record is not None else 0
    layers = tuple(
        Layer(
            number=first + place,
            file=file,
            format=layer.format,
            size=layer.size,
            backing=LayerRef(volume, first + layer.below) if layer.below is not None else None,
            encryption_key=layer.encryption_key,
        )
        for place, (layer, file) in enumerate(zip(offer.layers, files, strict=True))
    )
    snapshots = tuple(
        SnapshotRecord(
            id=each.id,
            layer=first + each.layer,
            group=each.group,
            size=each.size,
            created_at=each.created_at,
        )
        for each in missing
    )
    if record is None:
        return VolumeRecord(
            volume=volume,
            layers=layers,
            active=max(each.layer for each in snapshots),
            mode=Mode.LEFT,
            snapshots=snapshots,
            deletion=offer.deletion,
            last_number=layers[-1].number,
        )
    return msgspec.structs.replace(
        record,
        layers=(*record.layers, *layers),
        snapshots=(*record.snapshots, *snapshots),
        last_number=layers[-1].number,
    )


def without_arrived(records: RecordMap, record: VolumeRecord, prefix: str) -> VolumeRecord | None:
    """The record as if nothing had come by it; None if there is nothing left. Conflict once something rests
    on what came."""
    came = {layer.number for layer in record.layers if layer.file.startswith(prefix)}
    for number in came:
        for child in children(records, LayerRef(record.volume, number)):
            if child.volume != record.volume or child.number not in came:
                raise Conflict(f"{child.volume} rests on what came of '{record.volume}'", field="snapshots")
    layers = tuple(layer for layer in record.layers if layer.number not in came)
    if not layers:
        return None
    snapshots = tuple(each for each in record.snapshots if each.layer not in came)
    return msgspec.structs.replace(record, layers=layers, snapshots=snapshots)
