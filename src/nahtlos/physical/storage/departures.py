"""What becomes here of a volume that has left this host: nobody comes to it any more, and its files go but
for what snapshots, and volumes made from them, rest on.

    proxy -> shut -> left (with its snapshots) -> gone with the last of them
                  `> deleting -> gone
"""

import asyncio

import msgspec

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import Deletion
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.layers import LayerFiles
from nahtlos.physical.storage.record import Layer, LayerRef, Mode, VolumeRecord, clones
from nahtlos.physical.storage.relocation import Relocations
from nahtlos.physical.storage.serving import Serving
from nahtlos.physical.storage.snapshot_offers import Offers


class Departures:
    def __init__(self, serving: Serving, files: LayerFiles, offers: Offers, relocations: Relocations) -> None:
        self._serving = serving
        self._daemon = serving.daemon
        self._files = files
        self._offers = offers
        self._relocations = relocations

    async def finish(self, volume: VolumeId) -> None:
        """A file is gone before its record is: one that no record names would be taken for a volume."""
        record = self._serving.records.get(volume)
        if record is not None and record.mode not in (Mode.LEFT, Mode.DELETING):
            record = await self._withdrawn(volume)
        await self._serving.define()
        # A daemon that died since then has come back by the definition of before, and serves it again.
        await self._shut(volume)
        await self._drop_filters(volume)
        if record is not None and record.mode is Mode.DELETING:
            await drop_layers(self._files, record, ())
            await self._serving.on_step("relocate.dropped")
            await self._serving.keep(removed=(volume,))

    async def _withdrawn(self, volume: VolumeId) -> VolumeRecord:
        """Nobody comes here any more, and what is left is recorded. Conflict while somebody does."""
        record = await self._relocations.settled(volume)
        if record.mode is not Mode.PROXY:
            raise Refused(f"volume '{volume}' has not left this host", field="volume")
        await self._shut(volume)
        await self._serving.on_step("relocate.shut")
        left = left_behind(record, rested_on=self._rested_on(volume))
        await self._serving.keep(left)
        await self._serving.on_step("relocate.forgotten")
        if left.mode is Mode.LEFT:
            await drop_layers(self._files, record, left.layers)
        return left

    async def _drop_filters(self, volume: VolumeId) -> None:
        names = (graph.top_node(volume), graph.fair_node(volume), graph.remote_node(volume))
        await self._daemon.remove_nodes(names)

    async def _shut(self, volume: VolumeId) -> None:
        export = (await self._daemon.exports()).get(volume)
        if export is None:
            return
        try:
            await self._daemon.withdraw(export.id, mode="safe")
        except Denied as denied:
            raise Conflict(f"volume '{volume}' is open here still", field="volume") from denied

    async def sweep(self) -> None:
        """What is here of volumes that left, for the sake of snapshots that are gone by now. With one of them
        another may go, on which it rested."""
        while gone := self.left_for_nothing():
            for volume in gone:
                record = self._serving.records[volume]
                await self._offers.end(volume)
                await self._relocations.let_go_of_layers(record)
                await drop_layers(self._files, record, ())
                await self._serving.on_step("left.dropped")
                await self._serving.keep(removed=(volume,))

    def left_for_nothing(self) -> tuple[VolumeId, ...]:
        """Volumes that left and of which no snapshot is here any more."""
        return tuple(
            volume
            for volume, record in self._serving.records.all().items()
            if record.mode is Mode.LEFT and not record.snapshots and not self._rested_on(volume)
        )

    def _rested_on(self, volume: VolumeId) -> bool:
        return bool(clones(self._serving.records.all(), volume))


async def drop_layers(files: LayerFiles, record: VolumeRecord, kept: tuple[Layer, ...]) -> None:
    """Files of a volume that are to be here no more, as its deletion asks for."""
    gone = tuple(layer for layer in record.layers if layer not in kept)
    zero = record.deletion is Deletion.ZERO
    await asyncio.to_thread(files.drop, gone, kept, overwrite=zero)


def kept_layers(record: VolumeRecord) -> tuple[Layer, ...]:
    """What outlives the volume's data here: what its snapshots rest on; of one that has left, all of it."""
    if record.mode is Mode.LEFT:
        return record.layers
    refs = (LayerRef(record.volume, each.layer) for each in record.snapshots)
    needed: set[int] = set()
    for ref in refs:
        below: LayerRef | None = ref
        while below is not None and below.volume == record.volume:
            needed.add(below.number)
            below = record.layer(below.number).backing
    return tuple(layer for layer in record.layers if layer.number in needed)


def left_behind(record: VolumeRecord, *, rested_on: bool) -> VolumeRecord:
    """What stays of a volume that has left: its snapshots, and all of it if volumes made from it rest on its
    layers."""
    gone = msgspec.structs.replace(record, endpoint=None, epoch=0, bitmaps=(), merge=None)
    if not record.snapshots:
        return msgspec.structs.replace(gone, mode=Mode.LEFT if rested_on else Mode.DELETING)
    newest = max(each.layer for each in record.snapshots)
    layers = tuple(layer for layer in record.layers if layer.number != record.active)
    return msgspec.structs.replace(gone, mode=Mode.LEFT, layers=layers, active=newest)
