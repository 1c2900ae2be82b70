"""Volumes that arrive here: blank files that the other side writes into, until the record says that they are
the volume. What they bring with them of snapshots is in `snapshot_arrivals`."""

import asyncio
from collections.abc import Collection

import msgspec

from nahtlos.model.errors import Conflict, Stale
from nahtlos.model.ids import HostId, SnapshotId, VolumeId
from nahtlos.model.storage import ReplicaState, VolumeFormat, VolumeSpec
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.storage.departures import drop_layers, kept_layers
from nahtlos.physical.storage.encryption import LAYER_FORMAT
from nahtlos.physical.storage.layers import LayerFiles, base_file
from nahtlos.physical.storage.record import Layer, LayerRef, Mode, VolumeRecord
from nahtlos.physical.storage.serving import Serving


class Arrivals:
    def __init__(self, host: HostId, serving: Serving, files: LayerFiles) -> None:
        self._host = host
        self._serving = serving
        self._files = files

    async def receive(self, volume: VolumeSpec, bundle: Bundle) -> None:
        record = self._serving.records.get(volume.id)
        if record is None or not _received(record, volume):
            await self._begin_anew(volume, record)
        record = self._serving.records[volume.id]
        if record.mode is not Mode.RECEIVING:
            return  # it has become the volume since
        await self._blank(record, volume, bundle)
        await self._serving.on_step("receive.made")
        if record.epoch != volume.epoch:
            boot = self._serving.boot_id
            await self._serving.keep(msgspec.structs.replace(record, epoch=volume.epoch, boot_id=boot))
        await self._serving.define()
        await self._serving.on_step("receive.defined")
        await self._serving.settle((volume.id,))

    async def give_back(self, volume: VolumeId) -> str:
        """What was received here, or was a copy, is gone; what is kept beside it for snapshots stays. Its
        file goes first: one that no record names would be taken for a volume."""
        record = self._serving.records[volume]
        await self._serving.keep(msgspec.structs.replace(record, withdrawn=True))
        await self._serving.define()
        await self._serving.withdraw(volume)
        kept = kept_layers(record)
        await drop_layers(self._files, record, kept)
        await self._serving.on_step("receive.dropped")
        newest = max(each.layer for each in record.snapshots)
        left = msgspec.structs.replace(record, mode=Mode.LEFT, layers=kept, active=newest, epoch=0)
        await self._serving.keep(msgspec.structs.replace(left, withdrawn=False, bitmaps=(), endpoint=None))
        return f"volume {volume} is not here any more, its snapshots are"

    async def _begin_anew(self, volume: VolumeSpec, record: VolumeRecord | None) -> None:
        """Recorded, but not served yet, before there is a file: what lies in the folder unrecorded is taken
        for a volume of a time without records."""
        if record is not None:
            check_replaceable(record, volume, self._host)
            if record.mode is not Mode.LEFT:
                await self._serving.withdraw(volume.id)
        new = blank_record(volume, record)
        await self._serving.keep(new)
        await self._serving.on_step("receive.recorded")
        kept = new.layers
        if record is not None:
            gone = tuple(layer for layer in record.layers if layer not in kept)
            await asyncio.to_thread(self._files.drop, gone, kept, overwrite=False)

    async def _blank(self, record: VolumeRecord, volume: VolumeSpec, bundle: Bundle) -> None:
        layer = record.active_layer
        if await asyncio.to_thread(self._files.path(layer).exists):
            return
        if layer.encryption_key is not None:
            await self._files.make_encrypted(bundle, layer, None)
        elif layer.format is VolumeFormat.RAW:
            await self._files.make_raw(layer, None)
        else:
            ref = LayerRef(record.volume, layer.number)
            await self._files.make_qcow2(ref, layer, preallocated=volume.preallocated)


def _received(record: VolumeRecord, volume: VolumeSpec) -> bool:
    """Said twice, or late: what is there may be all there is."""
    if record.epoch > volume.epoch and record.mode is not Mode.LEFT:
        raise Stale(f"volume '{volume.id}' is served by epoch {record.epoch}", field="volume")
    if record.mode is Mode.RECEIVING:
        if record.withdrawn:
            return False  # its host was restarted: what was copied may not all have been on disk
        same = record.size == volume.size_mib << 20 and (
            volume.encryption_key is not None or record.format is volume.format
        )
        return same and record.epoch in (0, volume.epoch)
    return record.mode is Mode.SERVING and record.epoch == volume.epoch


def has_gone(record: VolumeRecord, wanted: Collection[SnapshotId]) -> bool:
    """Only snapshots that are to stay are left of it."""
    return record.mode is Mode.LEFT and any(each.id in wanted for each in record.snapshots)


def goes_alone(record: VolumeRecord, wanted: Collection[SnapshotId]) -> bool:
    """Whether a volume that is to be here no more leaves its snapshots behind: one that was not received to
    its end, and a copy that its volume does without while its host keeps snapshots of it."""
    if record.mode is Mode.SERVING and record.snapshots and record.merge is None:
        return all(each.id in wanted for each in record.snapshots)
    return record.mode is Mode.RECEIVING


def check_replaceable(record: VolumeRecord, volume: VolumeSpec, host: HostId) -> None:
    """What counts is never overwritten: only an earlier attempt, what has left, and a copy that is recorded
    as stale."""
    stale = any(copy.host == host and copy.state is ReplicaState.STALE for copy in volume.copies)
    if record.mode in (Mode.RECEIVING, Mode.LEFT) or (record.mode is Mode.SERVING and stale):
        return
    raise Conflict(f"volume '{volume.id}' is {record.mode.value} here", field="volume")


def blank_record(volume: VolumeSpec, before: VolumeRecord | None) -> VolumeRecord:
    """With a layer of its own, beside those that snapshots name. Not served yet."""
    kept = kept_layers(before) if before is not None else ()
    number = before.next_number if before is not None else 0
    form = LAYER_FORMAT if volume.encryption_key is not None else volume.format
    layer = Layer(
        number=number,
        file=base_file(volume.id, form) if number == 0 else f"{volume.id}.{number}.{form.value}",
        format=form,
        size=volume.size_mib << 20,
        encryption_key=volume.encryption_key,
    )
    return VolumeRecord(
        volume=volume.id,
        layers=(*kept, layer),
        active=number,
        format=form,
        mode=Mode.RECEIVING,
        snapshots=before.snapshots if before is not None else (),
        deletion=volume.deletion,
        last_number=number,
    )
