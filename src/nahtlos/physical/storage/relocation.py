"""Volumes that leave this host while they are written. Their end here is in `departures`, their other side in
`arrivals`.

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
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import CopyPhase, CopyProgress, VolumeSpec
from nahtlos.physical.hypervisor import connections
from nahtlos.physical.storage import decisions, graph
from nahtlos.physical.storage.daemon import COPIED_AT_ONCE, WAITS_IF_FAILING, Job, in_step
from nahtlos.physical.storage.graph import Options
from nahtlos.physical.storage.merging import Merging
from nahtlos.physical.storage.record import LayerRef, Mode, VolumeRecord
from nahtlos.physical.storage.serving import Serving
from nahtlos.physical.storage.sockets import Patience, Peer, bound_connections

RECONNECT_SECONDS = 1
"""A target whose daemon is started anew is there again at once; one that is gone for longer ends the copy."""
HOLD_SECONDS = 86400
SILENT_SECONDS = 1.5
GREET_SECONDS = 0.5
LOOK_SECONDS = 0.5
ENDS_WITHIN = 3.0
"""A mirror in step; one whose target hangs does not."""


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


def progress_of(job: Job | None) -> CopyProgress:
    if job is None:
        return CopyProgress(phase=CopyPhase.NONE)
    if job.over:
        error = job.error or "one of both sides cannot be read or written any more"
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
    def __init__(self, serving: Serving, merging: Merging) -> None:
        self._serving = serving
        self._daemon = serving.daemon
        self._merging = merging
        self._looked_at = 0.0

    # --- copying -----------------------------------------------------------------------------------

    async def start(self, volume: VolumeSpec, target: VolumeEndpoint, *, bytes_per_second: int) -> None:
        record = await self.settled(volume.id)
        if record.mode is Mode.PROXY:
            return
        _check_leaves(record, volume)
        job = (await self._daemon.jobs()).get(job_name(volume.id))
        if job is not None and not job.over and record.endpoint == target:
            await self._daemon.execute("block-job-set-speed", {"device": job.id, "speed": bytes_per_second})
            return
        await self.prepare(volume, target)
        await self._serving.on_step("relocate.noted")
        await self._mirror(volume.id, target, bytes_per_second)
        await self._serving.on_step("relocate.started")

    async def prepare(self, volume: VolumeSpec, target: VolumeEndpoint) -> None:
        """Nothing else is under way with it, and it is recorded where it is copied to."""
        record = await self.settled(volume.id)
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
            **WAITS_IF_FAILING,
            "auto-dismiss": False,
            "buf-size": COPIED_AT_ONCE,
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
        record = await self.settled(volume)
        if record.mode is Mode.PROXY:
            return CopyProgress(phase=CopyPhase.DONE)
        if record.endpoint is not None:
            await self._cut_if_silent(record.endpoint)
        job = (await self._daemon.jobs()).get(job_name(volume))
        if job is not None and job.failing:
            await self.give_up_mirror(volume, job.id)
        return progress_of(job)

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
        record = await self.settled(volume)
        if record.mode is Mode.PROXY:
            raise Conflict(f"volume '{volume}' has left already", field="volume")
        await self._stop(record)

    async def _stop(self, record: VolumeRecord) -> None:
        """Nothing is copied any more, and nothing of that is left in the daemon."""
        await self.give_up_mirror(record.volume, job_name(record.volume))
        await self._drop_target(record.volume)
        if record.endpoint is not None and record.mode is not Mode.PROXY:
            await self._serving.keep(msgspec.structs.replace(record, endpoint=None))

    async def _drop_target(self, volume: VolumeId) -> None:
        await self._daemon.remove_nodes(graph.node_name(kind, volume) for kind in ("target", "link", "hold"))
        await self._daemon.tolerating("object-del", {"id": graph.node_name("target", volume)})

    # --- the point of no return --------------------------------------------------------------------

    async def complete(self, volume: VolumeId) -> None:
        record = await self.settled(volume)
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
        await self._serving.written_out(volume)  # the daemon flushes what is left behind, and writers wait
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
        written = await self._serving.written_through(record.volume)
        await self._daemon.mirror_end(job_name(record.volume), written)
        await self._drop_target(record.volume)
        if record.endpoint is not None:
            await self.bound(record.endpoint)
        await self.let_go_of_layers(record)

    async def let_go_of_layers(self, record: VolumeRecord) -> None:
        """The daemon has none of its files open any more."""
        for layer in reversed(record.layers):
            ref = LayerRef(record.volume, layer.number)
            await self._daemon.remove_nodes((graph.format_node(ref), graph.luks_node(ref)))
            await self._daemon.remove_nodes((graph.file_node(ref),))

    async def give_up_mirror(self, volume: VolumeId, name: str) -> None:
        """Gone on return, whatever its target does: one that hangs is cut off."""
        written = await self._serving.written_through(volume)
        try:
            await self._daemon.mirror_end(name, written, within=ENDS_WITHIN)
        except (Refused, Unavailable):
            target, pid = self._serving.records[volume].endpoint, await self._daemon.pid()
            if target is not None and pid is not None:
                await asyncio.to_thread(connections.end, pid, (target.address, target.port))
            await self._daemon.mirror_break(name, written)

    async def settled(self, volume: VolumeId) -> VolumeRecord:
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


def _check_leaves(record: VolumeRecord, volume: VolumeSpec) -> None:
    if record.mode is not Mode.SERVING:
        raise Conflict(f"volume '{volume.id}' is {record.mode.value} here", field="volume")
    if record.epoch != volume.epoch:
        raise Stale(f"volume '{volume.id}' is served by epoch {record.epoch}", field="volume")
