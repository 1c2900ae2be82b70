"""Snapshots of volumes of this host: taken at one moment, named, given up, and gone back to.

A snapshot freezes the layer that was written into and puts an empty overlay onto it. It is taken once the
records of all its volumes say so (together or not at all); a daemon that dies then comes back with the
overlays, one that runs is brought to them in one transaction.

Overlays may be prepared: files no record names, which the daemon has open already, kept in mind here for
whoever takes the next snapshot of their volume. One that does not fit any more, or nobody came for, goes.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.inventory import SnapshotStatus
from nahtlos.model.storage import SnapshotSpec, VolumeFormat
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.storage import decisions
from nahtlos.physical.storage.layers import LayerFiles, overlay_file
from nahtlos.physical.storage.merging import Merging
from nahtlos.physical.storage.record import Layer, LayerRef, Mode, RecordMap, SnapshotRecord, VolumeRecord
from nahtlos.physical.storage.serving import Serving

PREPARED_SECONDS = 60.0
"""So long an overlay is kept for who prepared it."""


class Prepared(msgspec.Struct, frozen=True):
    layer: Layer
    at: float


class Snapshots:
    def __init__(self, serving: Serving, files: LayerFiles, merging: Merging) -> None:
        self._serving = serving
        self._files = files
        self._merging = merging
        self._prepared: dict[VolumeId, Prepared] = {}

    # --- prepared ----------------------------------------------------------------------------------

    async def prepare(self, wanted: Sequence[SnapshotSpec], bundle: Bundle) -> None:
        """What clients need not wait for while the snapshots are taken. Changes nothing they would notice
        later; it may all be in vain."""
        volumes = [each.volume for each in to_take(self._serving.records.all(), wanted)]
        for volume in volumes:
            await self._merging.stop(volume)
            record = self._serving.records[volume]
            layer = await self.overlay(record, LayerRef(volume, record.active), bundle)
            self._prepared[volume] = Prepared(layer, time.monotonic())
            await self._serving.on_step("snapshot.prepared")
            await self._serving.open_overlay(record.with_layer(layer), layer.number)
            await self._serving.written_out(volume)
            await self._serving.flush_always(volume)
            await self._serving.written_out(volume)

    async def drop_prepared(self, volumes: Iterable[VolumeId] = ()) -> None:
        """Of these volumes, and what nobody came for."""
        old = time.monotonic() - PREPARED_SECONDS
        given_up = {volume for volume, each in self._prepared.items() if each.at < old}
        for volume in given_up | (self._prepared.keys() & set(volumes)):
            await self._unmake({volume: self._prepared.pop(volume).layer})

    def _prepared_for(self, record: VolumeRecord, below: LayerRef) -> Layer | None:
        """What was prepared is used once, or never."""
        found = self._prepared.pop(record.volume, None)
        if found is None:
            return None
        fits = msgspec.structs.replace(self._layer(record, below), number=found.layer.number)
        if found.layer != fits or found.layer.number != record.next_number:
            return None
        return found.layer if self._files.path(found.layer).exists() else None

    # --- taken -------------------------------------------------------------------------------------

    async def take(self, wanted: Sequence[SnapshotSpec], bundle: Bundle) -> None:
        """All at one moment, or none; those that exist are left as they are. A crash leaves all or none."""
        missing = to_take(self._serving.records.all(), wanted)
        if not missing:
            return
        volumes = [snapshot.volume for snapshot in missing]
        for volume in volumes:
            await self._merging.stop(volume)
        made = await self._overlays(volumes, bundle)
        await self._serving.on_step("snapshot.made")
        try:
            for volume in volumes:
                await self._serving.written_out(volume)
            for volume in volumes:
                await self._serving.flush_always(volume)
            records = self._serving.records.all()
            taken = (with_snapshot(records[s.volume], s, made[s.volume]) for s in missing)
            await self._serving.keep(*taken)
        except BaseException:
            if any(decisions.volume_of(self._serving.records.all(), s.id) is None for s in missing):
                await self._unmake(made)
            raise
        await self._serving.on_step("snapshot.recorded")
        await self._serving.define()
        await self._serving.on_step("snapshot.defined")
        await self._serving.settle(volumes)
        await self._serving.on_step("snapshot.taken")

    async def _overlays(self, volumes: Sequence[VolumeId], bundle: Bundle) -> dict[VolumeId, Layer]:
        made: dict[VolumeId, Layer] = {}
        try:
            for volume in volumes:
                record = self._serving.records[volume]
                made[volume] = await self.overlay(record, LayerRef(volume, record.active), bundle)
        except BaseException:
            await self._unmake(made)
            raise
        return made

    async def overlay(self, record: VolumeRecord, below: LayerRef, bundle: Bundle) -> Layer:
        """A new empty layer of `record` over `below`, as large as the volume is. Not recorded yet."""
        if (prepared := self._prepared_for(record, below)) is not None:
            return prepared
        layer = self._layer(record, below)
        ref = LayerRef(record.volume, layer.number)
        await self._files.unmake(ref, layer)  # what was prepared by an agent that ended may still be open
        if layer.encryption_key is not None:
            await self._files.make_encrypted(bundle, layer, None)
        else:
            await self._files.make_qcow2(ref, layer)
        return layer

    def _layer(self, record: VolumeRecord, below: LayerRef) -> Layer:
        base = self._serving.records[below.volume].layer(below.number)
        return Layer(
            number=record.next_number,
            file=overlay_file(record.volume, record.next_number),
            format=VolumeFormat.QCOW2,
            size=max(record.size, base.size),
            backing=below,
            encryption_key=base.encryption_key,
        )

    async def _unmake(self, made: dict[VolumeId, Layer]) -> None:
        for volume, layer in made.items():
            await self._files.unmake(LayerRef(volume, layer.number), layer)

    # --- listed ------------------------------------------------------------------------------------

    async def list(self) -> tuple[SnapshotStatus, ...]:
        records = self._serving.records.all()
        return await asyncio.to_thread(self._list, records)

    def _list(self, records: RecordMap) -> tuple[SnapshotStatus, ...]:
        return tuple(
            SnapshotStatus(
                id=each.id,
                volume=record.volume,
                group=each.group,
                size_mib=each.size >> 20,
                allocated_bytes=self._files.allocated_by(record.layer(each.layer)),
                clones=decisions.clones_on(records, LayerRef(record.volume, each.layer)),
            )
            for record in records.values()
            if record.mode is not Mode.DELETING
            for each in record.snapshots
        )

    # --- given up ----------------------------------------------------------------------------------

    async def remove(self, snapshot: SnapshotId) -> VolumeId | None:
        """Its volume, whose layers may merge now; None if there is no such snapshot. Conflict while volumes
        rest on it."""
        changed = decisions.without_snapshot(self._serving.records.all(), snapshot)
        if changed is None:
            return None
        await self._serving.keep(changed)
        await self._serving.on_step("snapshot.removed")
        return changed.volume

    # --- gone back to ------------------------------------------------------------------------------

    async def revert(self, volume: VolumeId, snapshot: SnapshotId, bundle: Bundle) -> None:
        records = self._serving.records.all()
        below = decisions.snapshot_layer(records, snapshot)
        if below.volume != volume:
            raise Refused(f"snapshot '{snapshot}' is of '{below.volume}'", field="snapshot")
        _check_serving(self._serving.records[volume])
        await self._shut(volume)
        await self._serving.on_step("revert.shut")
        await self._merging.stop(volume)
        record = msgspec.structs.replace(self._serving.records[volume], withdrawn=True)
        await self._serving.keep(record)
        await self._serving.define()
        await self._serving.on_step("revert.withdrawn")
        below = decisions.snapshot_layer(self._serving.records.all(), snapshot)
        layer = await self.overlay(record, below, bundle)
        await self._serving.on_step("revert.made")
        record = record.with_layer(layer)
        await self._serving.withdraw(volume)
        await self._serving.keep(msgspec.structs.replace(record, active=layer.number, withdrawn=False))
        await self._serving.on_step("revert.recorded")
        await self._serving.define()
        await self._serving.on_step("revert.defined")
        await self._serving.settle((volume,))
        await self._serving.on_step("revert.done")

    async def _shut(self, volume: VolumeId) -> None:
        export = (await self._serving.daemon.exports()).get(volume)
        if export is None:
            return
        try:
            await self._serving.daemon.withdraw(export.id, mode="safe")
        except Denied as denied:
            raise Conflict(
                f"volume '{volume}' is in use",
                field="volume",
                remedy="stop its server, or detach it, first",
            ) from denied


def to_take(records: RecordMap, wanted: Sequence[SnapshotSpec]) -> tuple[SnapshotSpec, ...]:
    """Those that are not there yet, checked."""
    missing: list[SnapshotSpec] = []
    for snapshot in wanted:
        record = decisions.volume_of(records, snapshot.id)
        if record is not None and record.volume != snapshot.volume:
            raise Conflict(f"snapshot '{snapshot.id}' is of '{record.volume}'", field="snapshot")
        if record is None:
            missing.append(snapshot)
    volumes = [snapshot.volume for snapshot in missing]
    for volume in volumes:
        if volume not in records:
            raise NotFound(f"volume '{volume}' is not on this host", field="volume")
        if volumes.count(volume) > 1:
            raise Refused(f"'{volume}' is named twice", field="snapshots", remedy="name each volume once")
        _check_serving(records[volume])
    return tuple(missing)


def with_snapshot(record: VolumeRecord, snapshot: SnapshotSpec, overlay: Layer) -> VolumeRecord:
    """What was active has its name now, the overlay is active."""
    named = SnapshotRecord(
        id=snapshot.id,
        layer=record.active,
        group=snapshot.group,
        size=record.size,
        created_at=snapshot.created_at,
    )
    return msgspec.structs.replace(
        record.with_layer(overlay), active=overlay.number, snapshots=(*record.snapshots, named)
    )


def _check_serving(record: VolumeRecord) -> None:
    if record.mode is not Mode.SERVING:
        raise Conflict(
            f"volume '{record.volume}' is {record.mode.value} here",
            field="volume",
            remedy="wait for its operation to end",
        )
