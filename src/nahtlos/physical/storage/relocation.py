"""Volumes that leave this host while they are written, and those that arrive.

    top ── fair ── layers        until READY: a mirror on `top` copies and writes everything to `target`, too
     `· target ── link ──> there
    top ── fair ── layers        held: as before, but `target` waits for ever where it cannot write
     `· target ── hold ──> there
    top ── fair ── remote ──> there     passed on: the layers count for nothing

A mirror whose target fails lets its source go on alone. That must not happen once the record says that
everything is passed on: a daemon that was started from it then would show the target without what was
acknowledged here since. So before that is recorded `hold` takes the place of `link`: a connection that waits
for a target that is gone. From then on nothing is acknowledged that the target lacks, whoever dies.

What a crash leaves is decided from the record and from what the daemon has (`outcome`): nothing is passed on
before the definition says so, too; so a daemon that still writes into the layers, and whose mirror does not
write to both, has the newest data, and one whose mirror does has it on both sides.
"""

import asyncio
from enum import StrEnum

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.storage import CopyPhase, CopyProgress, Deletion, ReplicaState, VolumeFormat, VolumeSpec
from nahtlos.physical.hypervisor import connections
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.storage import decisions, graph
from nahtlos.physical.storage.daemon import Job, JobStatus
from nahtlos.physical.storage.encryption import LAYER_FORMAT
from nahtlos.physical.storage.graph import Options
from nahtlos.physical.storage.layers import LayerFiles, base_file
from nahtlos.physical.storage.merging import Merging
from nahtlos.physical.storage.record import Layer, LayerRef, Mode, VolumeRecord, clones
from nahtlos.physical.storage.serving import Serving
from nahtlos.physical.storage.snapshot_offers import Offers
from nahtlos.physical.storage.sockets import Patience, Peer, bound_connections

RECONNECT_SECONDS = 1
"""A target whose daemon is started anew is there again at once; one that is gone for longer ends the copy."""
HOLD_SECONDS = 86400
SILENT_SECONDS = 1.5
GREET_SECONDS = 0.5
LOOK_SECONDS = 0.5


class Outcome(StrEnum):
    """Of a volume whose record says that it is passed on."""

    PASSED_ON = "passed on"
    FORWARD = "forward"
    """Both sides hold everything, and only together acknowledge more: go on."""
    BACK = "back"
    """It never was passed on, and the layers may hold more than the target."""


def outcome(chain: tuple[str, ...] | None, remote: str, job: Job | None, below_target: str | None) -> Outcome:
    """`chain`: what is under `top` in the daemon that runs; None if it has no such volume. `below_target`:
    the connection a mirror writes by."""
    if chain is None or chain == (remote,):
        return Outcome.PASSED_ON
    both = job is not None and in_step(job) and below_target is not None and below_target.startswith("hold")
    return Outcome.FORWARD if both else Outcome.BACK


def in_step(job: Job) -> bool:
    """Every write that is acknowledged is on both sides."""
    return job.status == JobStatus.READY and job.actively_synced


def progress_of(job: Job | None) -> CopyProgress:
    if job is None:
        return CopyProgress(phase=CopyPhase.NONE)
    if job.status == JobStatus.CONCLUDED:
        error = job.error or "the copy ended"
        return CopyProgress(phase=CopyPhase.FAILED, done=job.done, total=job.total, error=error)
    phase = CopyPhase.READY if in_step(job) else CopyPhase.COPYING
    return CopyProgress(phase=phase, done=job.done, total=job.total, error=job.error)


def job_name(volume: VolumeId) -> str:
    return graph.node_name("relocate", volume)


def target_nodes(volume: VolumeId, endpoint: VolumeEndpoint) -> tuple[Options, ...]:
    """A connection and, over it, what the mirror writes to."""
    return (connection(volume, endpoint, "link", RECONNECT_SECONDS), _target(volume, "link"))


def connection(volume: VolumeId, endpoint: VolumeEndpoint, kind: str, reconnect: int) -> Options:
    (remote,) = graph.remote_nodes(volume, endpoint)
    return {**remote, "node-name": graph.node_name(kind, volume), "reconnect-delay": reconnect}


def _target(volume: VolumeId, below: str) -> Options:
    return {
        "driver": "throttle",
        "node-name": graph.node_name("target", volume),
        "throttle-group": graph.node_name("target", volume),
        "file": graph.node_name(below, volume),
        "discard": "unmap",
    }


class Relocations:
    def __init__(
        self, host: HostId, serving: Serving, files: LayerFiles, merging: Merging, offers: Offers
    ) -> None:
        self._host = host
        self._serving = serving
        self._daemon = serving.daemon
        self._files = files
        self._merging = merging
        self._offers = offers
        self._looked_at = 0.0

    # --- copying -----------------------------------------------------------------------------------

    async def start(self, volume: VolumeSpec, target: VolumeEndpoint, *, bytes_per_second: int) -> None:
        record = await self._settled(volume.id)
        if record.mode is Mode.PROXY:
            return
        _check_leaves(record, volume)
        job = (await self._daemon.jobs()).get(job_name(volume.id))
        if job is not None and job.status != JobStatus.CONCLUDED and record.endpoint == target:
            await self._daemon.execute("block-job-set-speed", {"device": job.id, "speed": bytes_per_second})
            return
        await self.prepare(volume, target)
        await self._serving.on_step("relocate.noted")
        await self._mirror(volume.id, target, bytes_per_second)
        await self._serving.on_step("relocate.started")

    async def prepare(self, volume: VolumeSpec, target: VolumeEndpoint) -> None:
        """Nothing else is under way with it, and it is recorded where it is copied to."""
        record = await self._settled(volume.id)
        _check_leaves(record, volume)
        await self._stop(record)
        await self._merging.stop(volume.id)
        record = msgspec.structs.replace(self._serving.records[volume.id], endpoint=target)
        await self._serving.keep(record)

    async def connect(self, volume: VolumeId, target: VolumeEndpoint) -> None:
        """The nodes a mirror writes to."""
        await self._daemon.tolerating(
            "object-add", {"qom-type": "throttle-group", "id": graph.node_name("target", volume)}
        )
        try:
            await self._daemon.add_nodes(target_nodes(volume, target))
        except Refused as refused:
            raise Unavailable(f"{target.host} does not take {volume}: {refused.message}") from refused
        await self.bound(target)

    async def _mirror(self, volume: VolumeId, target: VolumeEndpoint, speed: int) -> None:
        await self.connect(volume, target)
        mirror: Options = {
            "job-id": job_name(volume),
            "device": graph.top_node(volume),
            "target": graph.node_name("target", volume),
            "sync": "full",
            "copy-mode": "write-blocking",
            "on-target-error": "report",
            "auto-dismiss": False,
            "speed": speed,
        }
        await self._daemon.execute("blockdev-mirror", mirror)

    async def bound(self, target: VolumeEndpoint) -> None:
        """A target that is cut off holds writers up for no longer than this says."""
        pid = await self._daemon.pid()
        if pid is not None:
            peer = Peer(target.address, target.port)
            await asyncio.to_thread(bound_connections, pid, peer, Patience())

    async def progress(self, volume: VolumeId) -> CopyProgress:
        record = self._serving.records.get(volume)
        if record is None or record.mode in (Mode.LEFT, Mode.DELETING):
            return CopyProgress(phase=CopyPhase.NONE)
        record = await self._settled(volume)
        if record.mode is Mode.PROXY:
            return CopyProgress(phase=CopyPhase.DONE)
        if record.endpoint is not None:
            await self._cut_if_silent(record.endpoint)
        return progress_of((await self._daemon.jobs()).get(job_name(volume)))

    async def _cut_if_silent(self, target: VolumeEndpoint) -> None:
        """A daemon that hangs takes what is sent and answers nothing, and writers wait: its connections
        are ended, and unless it answers new ones, the copy breaks off."""
        loop, pid = asyncio.get_running_loop(), await self._daemon.pid()
        if pid is None or loop.time() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = loop.time()
        address = (target.address, target.port)
        silences = await asyncio.to_thread(connections.silences, pid, (address,))
        if not any(each.seconds > SILENT_SECONDS for each in silences):
            return
        if not await connections.answers(address, connect_within=GREET_SECONDS, greet_within=GREET_SECONDS):
            await asyncio.to_thread(connections.end, pid, address)

    async def cancel(self, volume: VolumeId) -> None:
        record = self._serving.records.get(volume)
        if record is None or record.mode in (Mode.LEFT, Mode.DELETING):
            return
        record = await self._settled(volume)
        if record.mode is Mode.PROXY:
            raise Conflict(f"volume '{volume}' has left already", field="volume")
        await self._stop(record)

    async def _stop(self, record: VolumeRecord) -> None:
        """Nothing is copied any more, and nothing of that is left in the daemon."""
        await self._daemon.job_cancel(job_name(record.volume))
        await self._drop_target(record.volume)
        if record.endpoint is not None and record.mode is not Mode.PROXY:
            await self._serving.keep(msgspec.structs.replace(record, endpoint=None))

    async def _drop_target(self, volume: VolumeId) -> None:
        await self._daemon.remove_nodes(graph.node_name(kind, volume) for kind in ("target", "link", "hold"))
        await self._daemon.tolerating("object-del", {"id": graph.node_name("target", volume)})

    # --- the point of no return --------------------------------------------------------------------

    async def complete(self, volume: VolumeId) -> None:
        record = await self._settled(volume)
        if record.mode is Mode.PROXY:
            return
        job = (await self._daemon.jobs()).get(job_name(volume))
        if record.endpoint is None or job is None or not in_step(job):
            raise Refused(f"volume '{volume}' is not all at its target yet", field="volume")
        await self._hold(volume, record.endpoint)
        await self._serving.keep(msgspec.structs.replace(record, mode=Mode.PROXY))
        await self._serving.on_step("relocate.recorded")
        await self._pass_on(volume)

    async def _hold(self, volume: VolumeId, target: VolumeEndpoint) -> None:
        """From here on a target that is gone is waited for. Refused if it had gone before."""
        try:
            await self._daemon.add_nodes((connection(volume, target, "hold", HOLD_SECONDS),))
        except Refused as refused:
            raise Unavailable(f"{target.host} does not answer: {refused.message}") from refused
        await self._daemon.execute("blockdev-reopen", {"options": [_target(volume, "hold")]})
        await self._daemon.remove_nodes((graph.node_name("link", volume),))
        await self.bound(target)
        await self._serving.on_step("relocate.held")
        job = (await self._daemon.jobs()).get(job_name(volume))
        if job is None or not in_step(job):
            raise Refused(f"the copy of volume '{volume}' broke off", field="volume")

    async def _pass_on(self, volume: VolumeId) -> None:
        """Recorded; now what is started from here on does so, then what runs.

        A daemon that was started meanwhile has no mirror any more, and takes writes here alone: then the
        target has not all of it, and the volume stays (Unavailable)."""
        await self._stays_if_out_of_step(volume)
        await self._serving.define()
        await self._serving.on_step("relocate.defined")
        if await self._stays_if_out_of_step(volume) is Outcome.FORWARD:
            await self._reopen(volume)
        await self._serving.on_step("relocate.passed")
        await self._tidy(self._serving.records[volume])

    async def _stays_if_out_of_step(self, volume: VolumeId) -> Outcome:
        found, _ = await self._found(volume)
        if found is Outcome.BACK:
            await self._take_back(self._serving.records[volume])
            raise Unavailable(f"the copy of volume '{volume}' broke off: the storage daemon was started anew")
        return found

    async def _reopen(self, volume: VolumeId) -> None:
        records = self._serving.records.all()
        record, data = records[volume], graph.data_nodes(records, volume, self._serving.places)
        # One that was left by an earlier journey leads to an export that is gone.
        await self._daemon.remove_nodes((graph.remote_node(volume),))
        await self._daemon.add_nodes(data)
        fair = graph.filter_nodes(record, graph.remote_node(volume))[0]
        await self._daemon.execute("blockdev-reopen", {"options": [fair]})

    async def _tidy(self, record: VolumeRecord) -> None:
        """What the daemon does not need any more of a volume that is passed on."""
        await self._end_mirror(job_name(record.volume))
        await self._drop_target(record.volume)
        if record.endpoint is not None:
            await self.bound(record.endpoint)
        for layer in reversed(record.layers):
            ref = LayerRef(record.volume, layer.number)
            await self._daemon.remove_nodes((graph.format_node(ref), graph.luks_node(ref)))
            await self._daemon.remove_nodes((graph.file_node(ref),))

    async def _end_mirror(self, name: str) -> None:
        """Without force while both sides are in step: a mirror that is torn off while its connection is being
        made anew has been seen to take the daemon with it, about one time in eight."""
        job = (await self._daemon.jobs()).get(name)
        if job is None or not in_step(job):
            await self._daemon.job_cancel(name)
            return
        await self._daemon.tolerating("block-job-cancel", {"device": name, "force": False})
        await self._daemon.job_end(name)

    async def _settled(self, volume: VolumeId) -> VolumeRecord:
        """The record, after what a crash has left half done was carried on or taken back."""
        record = self._serving.records[volume]
        if record.mode is not Mode.PROXY:
            return record
        found, remains = await self._found(volume)
        match found:
            case Outcome.PASSED_ON:
                if remains is None:
                    await self._serving.settle((volume,))
                elif remains:
                    await self._tidy(record)
            case Outcome.FORWARD:
                await self._pass_on(volume)
            case Outcome.BACK:
                await self._take_back(record)
        return self._serving.records[volume]

    async def _found(self, volume: VolumeId) -> tuple[Outcome, bool | None]:
        """What the daemon that runs makes of a volume recorded as passed on, and whether anything of the copy
        remains there. None if the daemon has no such volume."""
        records, seen = self._serving.records.all(), await self._daemon.graph()
        chain = decisions.seen_chain(seen, volume, decisions.known_nodes(records))
        job = (await self._daemon.jobs()).get(job_name(volume))
        target = graph.node_name("target", volume)
        found = outcome(chain, graph.remote_node(volume), job, seen.below(target))
        return found, None if chain is None else job is not None or target in seen.nodes

    async def _take_back(self, record: VolumeRecord) -> None:
        await self._serving.keep(msgspec.structs.replace(record, mode=Mode.SERVING))
        await self._serving.define()
        await self._stop(self._serving.records[record.volume])

    # --- the end at the source ---------------------------------------------------------------------

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
            await self._drop(record, ())
            await self._serving.on_step("relocate.dropped")
            await self._serving.keep(removed=(volume,))

    async def _withdrawn(self, volume: VolumeId) -> VolumeRecord:
        """Nobody comes here any more, and what is left is recorded. Conflict while somebody does."""
        record = await self._settled(volume)
        if record.mode is not Mode.PROXY:
            raise Refused(f"volume '{volume}' has not left this host", field="volume")
        await self._shut(volume)
        await self._serving.on_step("relocate.shut")
        left = left_behind(record, rested_on=self._rested_on(volume))
        await self._serving.keep(left)
        await self._serving.on_step("relocate.forgotten")
        if left.mode is Mode.LEFT:
            await self._drop(record, left.layers)
        return left

    async def _drop(self, record: VolumeRecord, kept: tuple[Layer, ...]) -> None:
        gone = tuple(layer for layer in record.layers if layer not in kept)
        zero = record.deletion is Deletion.ZERO
        await asyncio.to_thread(self._files.drop, gone, kept, overwrite=zero)

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
                for layer in reversed(record.layers):
                    ref = LayerRef(volume, layer.number)
                    await self._daemon.remove_nodes((graph.format_node(ref), graph.luks_node(ref)))
                    await self._daemon.remove_nodes((graph.file_node(ref),))
                await self._drop(record, ())
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

    # --- arriving ----------------------------------------------------------------------------------

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
        """What was received here is gone, what is kept beside it for snapshots stays. Its file goes first:
        one that no record names would be taken for a volume."""
        record = self._serving.records[volume]
        await self._serving.keep(msgspec.structs.replace(record, withdrawn=True))
        await self._serving.define()
        await self._serving.withdraw(volume)
        kept = kept_layers(record)
        await self._drop(record, kept)
        await self._serving.on_step("receive.dropped")
        newest = max(each.layer for each in record.snapshots)
        left = msgspec.structs.replace(record, mode=Mode.LEFT, layers=kept, active=newest, epoch=0)
        await self._serving.keep(msgspec.structs.replace(left, withdrawn=False, bitmaps=(), endpoint=None))
        return f"volume {volume} was not received"

    def check_replaceable(self, record: VolumeRecord, volume: VolumeSpec) -> None:
        _check_replaceable(record, volume, self._host)

    async def _begin_anew(self, volume: VolumeSpec, record: VolumeRecord | None) -> None:
        """Recorded, but not served yet, before there is a file: what lies in the folder unrecorded is taken
        for a volume of a time without records."""
        if record is not None:
            self.check_replaceable(record, volume)
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


def _check_leaves(record: VolumeRecord, volume: VolumeSpec) -> None:
    if record.mode is not Mode.SERVING:
        raise Conflict(f"volume '{volume.id}' is {record.mode.value} here", field="volume")
    if record.epoch != volume.epoch:
        raise Stale(f"volume '{volume.id}' is served by epoch {record.epoch}", field="volume")


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


def _check_replaceable(record: VolumeRecord, volume: VolumeSpec, host: HostId) -> None:
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
