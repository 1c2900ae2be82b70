"""Snapshots of this host as other hosts can fetch them: the files of their layers, read-only, byte by byte.

    file of a layer ── offer<n>-… ── export offer.<volume>.<of volume>.<n>      one for each layer

Layers are offered as they are on disk, so what is encrypted stays so, what is thin stays thin, and what two
snapshots share goes once. Nothing that is offered changes meanwhile: the volume has left, or no layers of it
merge. Never decides what may go: whoever drops a layer ends its offer first.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping

from nahtlos.model.errors import NotFound, Unavailable
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.storage import OfferedLayer, OfferedSnapshot, SnapshotOffer
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.graph import Options
from nahtlos.physical.storage.layers import LayerFiles
from nahtlos.physical.storage.merging import Merging
from nahtlos.physical.storage.record import LayerRef, Mode, RecordMap, chain
from nahtlos.physical.storage.serving import Serving


class Offers:
    """Whoever calls holds `Serving.changing`."""

    def __init__(self, serving: Serving, files: LayerFiles, merging: Merging) -> None:
        self._serving = serving
        self._daemon = serving.daemon
        self._files = files
        self._merging = merging

    async def make(self, volume: VolumeId, snapshots: tuple[SnapshotId, ...]) -> SnapshotOffer:
        """Anew, whatever was offered of this volume before."""
        record = self._serving.records.get(volume)
        if record is not None and record.mode is Mode.SERVING:
            await self._merging.stop(volume)
        records = self._serving.records.all()
        refs = offered_layers(records, volume, snapshots)
        lengths = await asyncio.to_thread(self._lengths, records, refs)
        await self._serving.define()
        await self._serving.awake()
        await self.end(volume)
        for ref in refs:
            await self._show(records, volume, ref)
        await self._serving.on_step("offer.made")
        return offer_of(records, volume, snapshots, lengths)

    async def end(self, volume: VolumeId) -> None:
        """A node of a file that is gone would keep its blocks, and show them by the name of the next one."""
        await self._end(lambda of: of == volume)

    async def sweep(self, pinned: Collection[VolumeId]) -> None:
        """What is offered of volumes of which no operation runs: whoever made the offer was not heard of
        again."""
        if await self._daemon.pid() is not None:
            await self._end(lambda of: of not in pinned)

    async def _end(self, meant: Callable[[str], bool]) -> None:
        for identity, node in (await self._daemon.export_nodes()).items():
            kind, _, rest = identity.partition(".")
            if kind == "offer" and meant(rest.partition(".")[0]):
                await self._daemon.withdraw(identity)
                await self._daemon.remove_nodes((node,))

    async def _show(self, records: RecordMap, volume: VolumeId, ref: LayerRef) -> None:
        node = graph.node_name(f"offer{ref.number}", f"{volume}.{ref.volume}")
        await self._daemon.remove_nodes((node,))
        file = self._files.path(records[ref.volume].layer(ref.number))
        await self._daemon.add_nodes(
            ({"driver": "file", "node-name": node, "filename": str(file), "read-only": True},)
        )
        name = export_name(volume, ref)
        export: Options = {"type": "nbd", "id": name, "name": name, "node-name": node, "writable": False}
        await self._daemon.execute("block-export-add", export)

    def _lengths(self, records: RecordMap, refs: tuple[LayerRef, ...]) -> dict[LayerRef, int]:
        return {ref: self._files.path(records[ref.volume].layer(ref.number)).stat().st_size for ref in refs}


def export_name(volume: VolumeId, ref: LayerRef) -> str:
    """Of a layer that is offered with snapshots of `volume`. Names of volumes have no dots."""
    return f"offer.{volume}.{ref.volume}.{ref.number}"


def offered_layers(
    records: RecordMap, volume: VolumeId, snapshots: tuple[SnapshotId, ...]
) -> tuple[LayerRef, ...]:
    """All that these snapshots rest on, each after the one it rests on, of whatever volume it is."""
    record, found = records.get(volume), dict[LayerRef, None]()
    for snapshot in snapshots:
        known = record.snapshot(snapshot) if record is not None else None
        if known is None:
            raise NotFound(f"snapshot '{snapshot}' of '{volume}' is not on this host", field="snapshots")
        found.update(dict.fromkeys(chain(records, LayerRef(volume, known.layer))))
    for ref in found:
        below = records[ref.volume]
        own = ref.volume == volume and below.mode is Mode.SERVING and below.merge is None
        if below.mode is not Mode.LEFT and not own:
            raise Unavailable(
                f"snapshots of '{volume}' rest on '{ref.volume}', which is {below.mode.value} here",
                field="snapshots",
                remedy=f"relocate '{ref.volume}' first",
            )
    return tuple(found)


def offer_of(
    records: RecordMap, volume: VolumeId, snapshots: tuple[SnapshotId, ...], lengths: Mapping[LayerRef, int]
) -> SnapshotOffer:
    """`lengths`: of the files, in the order of `offered_layers`."""
    places = {ref: place for place, ref in enumerate(lengths)}
    layers: list[OfferedLayer] = []
    for ref, length in lengths.items():
        layer = records[ref.volume].layer(ref.number)
        layers.append(
            OfferedLayer(
                export=export_name(volume, ref),
                length=length,
                size=layer.size,
                format=layer.format,
                below=places[layer.backing] if layer.backing is not None else None,
                encryption_key=layer.encryption_key,
            )
        )
    record = records[volume]
    return SnapshotOffer(
        snapshots=tuple(
            OfferedSnapshot(
                id=each.id,
                layer=places[LayerRef(volume, each.layer)],
                group=each.group,
                size=each.size,
                created_at=each.created_at,
            )
            for each in record.snapshots
            if each.id in snapshots
        ),
        layers=tuple(layers),
        deletion=record.deletion,
    )
