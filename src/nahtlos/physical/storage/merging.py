"""Layers nobody names any more go, while clients read and write.

    recorded ──job──> copied (the daemon dropped the layer) ──> recorded as gone ──> its file removed

A layer is copied into the one it rests on, and shadows it until it is gone: at any moment the chain with it
and the one without it read the same, so a crash costs no more than doing it again. Where the active layer is
what goes, both are made alike by a mirror that writes to both before anything is acknowledged; only then is
the base recorded as active, and then the daemon follows. Jobs run on in the daemon while no agent is there.
"""

import asyncio
import os
import time

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import Deletion
from nahtlos.physical.storage import decisions, graph
from nahtlos.physical.storage.daemon import COPIED_AT_ONCE, MIRROR, WAITS_IF_FAILING, Job, JobStatus
from nahtlos.physical.storage.layers import LayerFiles
from nahtlos.physical.storage.record import Layer, LayerRef, Merge, VolumeRecord, chain
from nahtlos.physical.storage.serving import Serving

PATIENCE = 1.0
"""Seconds a caller waits for copying; it goes on without him, and whoever comes next looks after it."""
_POLL = 0.005


def job_name(volume: VolumeId) -> str:
    return graph.node_name("merge", volume)


class Merging:
    def __init__(self, serving: Serving, files: LayerFiles) -> None:
        self._serving = serving
        self._files = files
        self._daemon = serving.daemon

    def is_due(self, volume: VolumeId) -> bool:
        """Whether there is anything for `tidy` to do."""
        records = self._serving.records.all()
        begun = records[volume].merge or decisions.next_merge(records, volume)
        return begun is not None or bool(decisions.unused_layers(records, volume))

    async def tidy(self, volume: VolumeId) -> None:
        """Go on as far as patience allows. Unavailable if copying failed: it will be tried again."""
        until = time.monotonic() + PATIENCE
        while await self._seen(volume) is not None:
            await self.drop_unused(volume)
            if self._record(volume).merge is None and not await self._begin(volume):
                return
            if not await self._advance(volume, until):
                return

    async def stop(self, volume: VolumeId) -> None:
        """No merge runs on return: all is as before it, or it has ended where it could not be stopped."""
        record = self._record(volume)
        if record.merge is None:
            return
        if record.pivoting or await self._is_through(record, record.merge):
            await self._advance(volume, time.monotonic() + 10 * PATIENCE)
        if self._record(volume).merge is not None:
            await self._undo(volume)

    async def drop_unused(self, volume: VolumeId) -> None:
        records = self._serving.records.all()
        record, unused = records[volume], decisions.unused_layers(records, volume)
        if not unused:
            return
        kept = tuple(layer for layer in record.layers if layer.number not in unused)
        await self._serving.keep(msgspec.structs.replace(record, layers=kept))
        await self._serving.on_step("layers.forgotten")
        await self._remove(record, tuple(layer for layer in record.layers if layer.number in unused))

    # --- steps of both kinds -----------------------------------------------------------------------

    async def _begin(self, volume: VolumeId) -> bool:
        records = self._serving.records.all()
        merge = decisions.next_merge(records, volume)
        if merge is None:
            return False
        record = records[volume]
        if merge.pivot:
            changed = decisions.with_pivot(record, merge)
            target = changed.layer(merge.into)
            await asyncio.to_thread(_at_least, self._files.path(target), target.size)
        else:
            changed = msgspec.structs.replace(record, merge=merge)
        await self._serving.keep(changed)
        await self._serving.on_step("merge.recorded")
        return True

    async def _advance(self, volume: VolumeId, until: float) -> bool:
        """Whether it has ended."""
        merge = self._record(volume).merge
        assert merge is not None, "who calls this has seen one"
        advance = self._pivot if merge.pivot else self._commit
        return await advance(volume, merge, until)

    async def _wait(self, volume: VolumeId, until: float) -> Job | None:
        """Until the job is ready or over; None: it takes longer."""
        while True:
            job = (await self._daemon.jobs()).get(job_name(volume))
            if job is None:
                raise Unavailable(f"the storage daemon was started anew while layers of '{volume}' merged")
            alike = job.status == JobStatus.READY and (job.actively_synced or job.type != MIRROR)
            if alike or job.over:
                return job
            if time.monotonic() > until:
                return None
            await asyncio.sleep(_POLL)

    async def _undo(self, volume: VolumeId) -> None:
        record = self._record(volume)
        await self._daemon.mirror_end(job_name(volume), await self._serving.written_through(volume))
        await self._serving.keep(decisions.not_merged(record))
        await self._serving.define()
        if record.merge is not None and record.merge.pivot:
            await self._remove_nodes(volume, record.layer(record.merge.into))

    async def _failed(self, volume: VolumeId, job: Job) -> Unavailable:
        await self._undo(volume)
        return Unavailable(
            f"layers of volume '{volume}' could not be merged: {job.error or 'writing failed'}",
            field="volume",
            remedy="see that the host's pool has room; it is tried again",
        )

    # --- a layer goes into the one below -----------------------------------------------------------

    async def _commit(self, volume: VolumeId, merge: Merge, until: float) -> bool:
        record = self._record(volume)
        if not await self._is_through(record, merge):
            if job_name(volume) not in await self._daemon.jobs():
                await self._start_commit(volume, merge)
                await self._serving.on_step("merge.started")
            job = await self._wait(volume, until)
            if job is None:
                return False
            if job.status == JobStatus.READY:  # nobody writes into it: there is nothing more to come
                await self._daemon.execute("job-complete", {"id": job.id})
                job = await self._daemon.job_until(job.id, JobStatus.CONCLUDED)
            if job.error:
                raise await self._failed(volume, job)
        await self._serving.on_step("merge.copied")
        into = self._files.path(record.layer(merge.into))
        await asyncio.to_thread(_at_least, into, 0)
        await self._serving.keep(*decisions.merged(self._serving.records.all(), volume, merge))
        await self._serving.on_step("merge.ended")
        await self._serving.define()
        await self._daemon.job_cancel(job_name(volume))
        await self._remove(record, (record.layer(merge.layer),))
        return True

    async def _start_commit(self, volume: VolumeId, merge: Merge) -> None:
        records = self._serving.records.all()
        leaf = decisions.leaf_above(records, LayerRef(volume, merge.layer))
        device = graph.top_node(leaf.volume)
        served = device in (await self._daemon.graph()).nodes
        if leaf.number != records[leaf.volume].active or not served:
            places = self._serving.places
            nodes = graph.chain_nodes(records, chain(records, leaf), places, writable=False)
            await self._daemon.add_nodes(nodes)
            device = graph.format_node(leaf)
        arguments = {
            "job-id": job_name(volume),
            "device": device,
            "top-node": graph.format_node(LayerRef(volume, merge.layer)),
            "base-node": graph.format_node(LayerRef(volume, merge.into)),
            "auto-dismiss": False,
        }
        if leaf != LayerRef(volume, merge.layer):
            # For the header above, where nobody reads it. Left to itself the daemon writes down the whole
            # chain; a long one does not fit, and 11.1 dies of that.
            arguments["backing-file"] = records[volume].layer(merge.into).file
        await self._daemon.execute("block-commit", arguments)

    async def _is_through(self, record: VolumeRecord, merge: Merge) -> bool:
        job = (await self._daemon.jobs()).get(job_name(record.volume))
        if job is not None and job.status == JobStatus.CONCLUDED:
            return not job.error
        records = self._serving.records.all()
        leaf = decisions.leaf_above(records, LayerRef(record.volume, merge.layer))
        seen = await self._seen(leaf.volume)
        names = (graph.format_node(LayerRef(record.volume, n)) for n in (merge.layer, merge.into))
        above, below = (name in (seen or ()) for name in names)
        return below and not above

    # --- the active layer goes into a raw base -----------------------------------------------------

    async def _pivot(self, volume: VolumeId, merge: Merge, until: float) -> bool:
        if not self._record(volume).pivoting and not await self._made_alike(volume, merge, until):
            return False
        wanted = graph.format_node(LayerRef(volume, merge.into))
        if await self._seen(volume) != (wanted,):
            job = (await self._daemon.jobs()).get(job_name(volume))
            if job is None:  # with the daemon that had it: begun again, from the layers it has now
                await self._undo(volume)
                return True
            if not job.actively_synced or job.failing:
                raise await self._failed(volume, job)
            await self._daemon.execute("job-complete", {"id": job.id})
            await self._daemon.job_end(job.id)
        await self._serving.on_step("pivot.done")
        record = self._record(volume)
        await self._serving.keep(decisions.pivoted(record, merge))
        await self._serving.on_step("pivot.ended")
        await self._serving.define()
        await self._daemon.job_cancel(job_name(volume))
        kept = self._record(volume).layers
        gone = tuple(layer for layer in record.layers if layer not in kept)
        await self._remove(record, tuple(sorted(gone, key=lambda layer: -layer.number)))
        return True

    async def _made_alike(self, volume: VolumeId, merge: Merge, until: float) -> bool:
        record = self._record(volume)
        if job_name(volume) not in await self._daemon.jobs():
            await self._start_mirror(volume, merge)
            await self._serving.on_step("pivot.started")
        job = await self._wait(volume, until)
        if job is None:
            return False
        if job.over:
            raise await self._failed(volume, job)
        await asyncio.to_thread(_at_least, self._files.path(record.layer(merge.into)), 0)
        await self._serving.on_step("pivot.alike")
        await self._serving.keep(msgspec.structs.replace(record, active=merge.into))
        await self._serving.on_step("pivot.recorded")
        await self._serving.define()
        await self._serving.on_step("pivot.defined")
        return True

    async def _start_mirror(self, volume: VolumeId, merge: Merge) -> None:
        """The base's file is open twice: read through the chain, written as what is to be active."""
        target = LayerRef(volume, merge.into)
        records, places = self._serving.records.all(), self._serving.places
        file, *rest = graph.layer_nodes(records, target, places, writable=True)
        await self._daemon.add_nodes(({**file, "locking": "off"}, *rest))
        arguments = {
            "job-id": job_name(volume),
            "device": graph.top_node(volume),
            "target": graph.format_node(target),
            "replaces": graph.format_node(LayerRef(volume, merge.layer)),
            "sync": "top",
            "copy-mode": "write-blocking",
            **WAITS_IF_FAILING,
            "buf-size": COPIED_AT_ONCE,
            "auto-dismiss": False,
        }
        await self._daemon.execute("blockdev-mirror", arguments)

    # --- what is left ------------------------------------------------------------------------------

    async def _remove(self, record: VolumeRecord, layers: tuple[Layer, ...]) -> None:
        """Nodes and files of layers that are not recorded any more."""
        for layer in layers:
            await self._remove_nodes(record.volume, layer)
        kept = self._record(record.volume).layers
        overwrite = record.deletion is Deletion.ZERO
        await asyncio.to_thread(self._files.drop, layers, kept, overwrite=overwrite)

    async def _remove_nodes(self, volume: VolumeId, layer: Layer) -> None:
        ref = LayerRef(volume, layer.number)
        await self._daemon.remove_nodes((graph.format_node(ref), graph.luks_node(ref), graph.file_node(ref)))

    async def _seen(self, volume: VolumeId) -> tuple[str, ...] | None:
        known = decisions.known_nodes(self._serving.records.all())
        return decisions.seen_chain(await self._daemon.graph(), volume, known)

    def _record(self, volume: VolumeId) -> VolumeRecord:
        return self._serving.records[volume]


def _at_least(path: os.PathLike[str], size: int) -> None:
    """All that was written is on disk on return, and the file is no smaller than this."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
