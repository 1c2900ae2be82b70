"""A volume's life on this host, as a configuration wants it: made, served by its epoch, enlarged, deleted."""

import asyncio
import time

import msgspec

from nahtlos.model.errors import Conflict, Refused, Unavailable
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.storage import Deletion, VolumeFormat, VolumeSpec
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.storage import decisions, graph
from nahtlos.physical.storage.daemon import Command
from nahtlos.physical.storage.encryption import LAYER_FORMAT
from nahtlos.physical.storage.graph import Options
from nahtlos.physical.storage.layers import LayerFiles, base_file, overlay_file
from nahtlos.physical.storage.merging import Merging, job_name
from nahtlos.physical.storage.record import Layer, LayerRef, Mode, VolumeRecord
from nahtlos.physical.storage.serving import Serving

ALL_DONE: Command = ("transaction", {"actions": []})
"""Answered once no request of any volume is under way. Until then the daemon listens to nobody new."""
ROUNDS = 2
"""After so many of them an export that was shut has let go of its nodes."""
GROWN_AGAIN = 0.05
"""Seconds in which clients do what they could not do meanwhile."""
GROWN_WITHIN = 10.0


class Lifecycle:
    def __init__(self, serving: Serving, files: LayerFiles, merging: Merging) -> None:
        self._serving = serving
        self._files = files
        self._merging = merging
        self._booted = False
        self._flushes = False

    # --- made --------------------------------------------------------------------------------------

    async def create(self, spec: VolumeSpec, bundle: Bundle) -> str:
        """Blank, from its image, or over its snapshot. A crash leaves it as a whole or not at all."""
        if spec.snapshot is not None:
            layers, source = (
                await self._over_snapshot(spec, spec.snapshot, bundle),
                f"snapshot {spec.snapshot}",
            )
        else:
            layers, source = await self._from_image(spec, bundle), str(spec.image or "nothing")
        record = VolumeRecord(
            volume=spec.id,
            layers=layers,
            active=layers[-1].number,
            last_number=layers[-1].number,
            format=spec.format if spec.encryption_key is None else LAYER_FORMAT,
            epoch=spec.epoch,
            boot_id=self._serving.boot_id,
            deletion=spec.deletion,
        )
        await self._serving.on_step("create.made")
        await self._serving.keep(record)
        await self._serving.on_step("create.recorded")
        return f"volume {spec.id} created from {source}"

    async def _from_image(self, spec: VolumeSpec, bundle: Bundle) -> tuple[Layer, ...]:
        size = spec.size_mib << 20
        image = self._files.image(spec.image, size, spec.id) if spec.image is not None else None
        base = Layer(number=0, file=base_file(spec.id, VolumeFormat.RAW), format=VolumeFormat.RAW, size=size)
        if spec.encryption_key is not None:
            base = msgspec.structs.replace(
                base,
                file=base_file(spec.id, LAYER_FORMAT),
                format=LAYER_FORMAT,
                encryption_key=spec.encryption_key,
            )
            await self._files.make_encrypted(bundle, base, image)
            return (base,)
        if spec.format is VolumeFormat.RAW:
            await self._files.make_raw(base, image)
            return (base,)
        if image is None:
            return (await self._qcow2(spec, number=0, size=size, backing=None),)
        await self._files.make_raw(base, image)
        return (base, await self._qcow2(spec, number=1, size=size, backing=LayerRef(spec.id, 0)))

    async def _over_snapshot(
        self, spec: VolumeSpec, snapshot: SnapshotId, bundle: Bundle
    ) -> tuple[Layer, ...]:
        records, size = self._serving.records.all(), spec.size_mib << 20
        below = decisions.snapshot_layer(records, snapshot)
        base = records[below.volume].layer(below.number)
        if size < base.size:
            raise Refused(
                f"snapshot '{snapshot}' needs {base.size >> 20} MiB, '{spec.id}' has {spec.size_mib}",
                field="size_mib",
                remedy="ask for a larger volume",
            )
        if base.encryption_key is None:
            return (await self._qcow2(spec, number=0, size=size, backing=below),)
        layer = Layer(
            number=0,
            file=base_file(spec.id, LAYER_FORMAT),
            format=LAYER_FORMAT,
            size=size,
            backing=below,
            encryption_key=base.encryption_key,
        )
        await self._files.make_encrypted(bundle, layer, None)
        return (layer,)

    async def _qcow2(self, spec: VolumeSpec, *, number: int, size: int, backing: LayerRef | None) -> Layer:
        name = overlay_file(spec.id, number) if number else base_file(spec.id, VolumeFormat.QCOW2)
        layer = Layer(number=number, file=name, format=VolumeFormat.QCOW2, size=size, backing=backing)
        preallocated = spec.preallocated and backing is None
        await self._files.make_qcow2(LayerRef(spec.id, number), layer, preallocated=preallocated)
        return layer

    # --- served ------------------------------------------------------------------------------------

    async def after_boot(self) -> None:
        """Once: what a restart of the host may have taken writes from is not served as before."""
        if self._booted:
            return
        for volume, record in self._serving.records.all().items():
            if self.is_spent(volume, record.epoch) and not record.withdrawn:
                await self._serving.keep(msgspec.structs.replace(record, withdrawn=True))
        self._booted = True

    def is_spent(self, volume: VolumeId, epoch: int) -> bool:
        records = self._serving.records.all()
        return decisions.epoch_is_spent(records, volume, epoch, self._serving.boot_id)

    async def adopt(self, spec: VolumeSpec) -> None:
        """Its record says by which epoch it is served; not yet the daemon."""
        record = self._serving.records[spec.id]
        if record.mode in (Mode.PROXY, Mode.LEFT):
            return
        epoch = decisions.checked_epoch(record, spec.epoch)
        if self.is_spent(spec.id, epoch):
            raise Unavailable(
                f"volume '{spec.id}' was served by epoch {epoch} before its host was restarted: its clients "
                "may believe in writes that are gone",
                field="epoch",
                remedy="give it a later epoch; its server has to be started anew",
            )
        wanted = msgspec.structs.replace(
            record,
            mode=Mode.SERVING,
            epoch=epoch,
            boot_id=self._serving.boot_id,
            withdrawn=False,
            deletion=spec.deletion,
        )
        if wanted != record:
            await self._serving.keep(wanted)
            await self._serving.on_step("epoch.recorded")
        if record.mode is Mode.RECEIVING:
            await self._serving.regroup(spec.id)

    # --- enlarged ----------------------------------------------------------------------------------

    async def enlarge(self, spec: VolumeSpec) -> str | None:
        """While it is used: its clients are disconnected and come back. Refused if it would be smaller."""
        record, size = self._serving.records[spec.id], spec.size_mib << 20
        if spec.size_mib < record.size >> 20:
            raise Refused(
                f"volume '{spec.id}' has {record.size >> 20} MiB, {spec.size_mib} are less",
                field="size_mib",
                remedy="a volume cannot become smaller; copy what is needed to a new one",
            )
        if size <= record.size or record.mode is not Mode.SERVING:
            return None
        await self._merging.stop(spec.id)
        await self._serving.on_step("resize.begins")
        await self._resize(spec.id, size)
        record = self._serving.records[spec.id]
        await self._serving.on_step("resize.done")
        await self._serving.keep(record.with_layer(msgspec.structs.replace(record.active_layer, size=size)))
        return f"volume {spec.id} enlarged to {spec.size_mib} MiB"

    async def _resize(self, volume: VolumeId, size: int) -> None:
        """At one go: clients find the export where it was before they have shaken hands again; who comes
        before it is back waits a second. What is on its way is waited for while the daemon listens to nobody,
        and an image is told to grow without its disk being waited for (`_unflushed`). Where the export did
        not let go of its nodes in time, it is there again unchanged, and grows a moment later."""
        daemon, found = self._serving.daemon, (await self._serving.daemon.exports()).get(volume)
        grow = ("block_resize", {"node-name": graph.top_node(volume), "size": size})
        if found is None:
            await daemon.execute(*grow)
            return
        shut = ("block-export-del", {"id": found.id, "mode": "hard"})
        back = ("block-export-add", found.options)
        begin, end = self._unflushed(volume)
        rounds = (ALL_DONE,) * ROUNDS
        until = time.monotonic() + GROWN_WITHIN
        try:
            while True:
                await self._serving.written_out(volume)
                said = await daemon.outcomes(*begin, shut, *rounds, grow, *end, back)
                refused = said[len(begin) + 1 + len(rounds)]
                await self._serving.on_step("resize.grown")
                if refused is None:
                    break
                if not isinstance(refused, Denied) or time.monotonic() > until:
                    raise refused
                await asyncio.sleep(GROWN_AGAIN)
        finally:
            for command, arguments in (*end, back):
                await daemon.tolerating(command, dict(arguments))
        await self._serving.written_out(volume)

    def _unflushed(self, volume: VolumeId) -> tuple[tuple[Command, ...], tuple[Command, ...]]:
        """To be said before and after an image grows: its file is not flushed in between. Nobody writes into
        it then, and before it is recorded how large it is, it is written out."""
        record = self._serving.records[volume]
        if record.active_layer.format is VolumeFormat.RAW:
            return (ALL_DONE,), ()
        file = self._serving.file_node(LayerRef(volume, record.active))
        unflushed: Options = {**file, "cache": {"no-flush": True}}
        return (_reopened(unflushed),), (_reopened(file),)

    async def flush_again(self) -> None:
        """Once: an agent that ended while an image grew may have left its file unflushed."""
        if self._flushes:
            return
        left = await self._serving.daemon.unflushed()
        for record in self._serving.records.all().values():
            ref = LayerRef(record.volume, record.active)
            if graph.file_node(ref) in left:
                await self._serving.daemon.execute(*_reopened(self._serving.file_node(ref)))
        self._flushes = True

    # --- deleted -----------------------------------------------------------------------------------

    async def delete(self, volume: VolumeId) -> str:
        """Conflict while it has snapshots, or others rest on it."""
        record = self._serving.records[volume]
        if record.snapshots and record.mode is Mode.SERVING:
            names = ", ".join(sorted(each.id for each in record.snapshots))
            raise Conflict(
                f"volume '{volume}' has snapshots: {names}",
                field="volume",
                remedy="delete them first",
            )
        resting = self._resting(record)
        if resting:
            raise Conflict(
                f"{', '.join(resting)} {'rests' if len(resting) == 1 else 'rest'} on '{volume}'",
                field="volume",
                remedy="delete what was made from it first",
            )
        if record.mode is not Mode.DELETING:
            record = msgspec.structs.replace(record, mode=Mode.DELETING, merge=None)
            await self._serving.keep(record)
            await self._serving.on_step("delete.recorded")
        await self._serving.define()
        await self._serving.on_step("delete.defined")
        await self._gone_from_daemon(volume)
        await self._serving.on_step("delete.withdrawn")
        overwrite = record.deletion is Deletion.ZERO
        await asyncio.to_thread(self._files.drop, record.layers, (), overwrite=overwrite)
        await self._serving.on_step("delete.dropped")
        await self._serving.keep(removed=(volume,))
        return f"volume {volume} deleted"

    async def _gone_from_daemon(self, volume: VolumeId) -> None:
        daemon = self._serving.daemon
        if await daemon.pid() is None:
            return
        await daemon.mirror_end(job_name(volume), await self._serving.written_through(volume))
        await self._serving.withdraw(volume)
        await daemon.tolerating("object-del", {"id": graph.limits_group(volume)})
        self._serving.left_out.pop(volume, None)

    def _resting(self, record: VolumeRecord) -> tuple[VolumeId, ...]:
        records = self._serving.records.all()
        found = (decisions.clones_on(records, LayerRef(record.volume, each.number)) for each in record.layers)
        return tuple(sorted({volume for volumes in found for volume in volumes}))


def _reopened(node: Options) -> Command:
    return ("blockdev-reopen", {"options": [node]})
