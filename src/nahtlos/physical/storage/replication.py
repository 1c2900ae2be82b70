"""Copies of a volume that come back: only what differs is copied.

    all copies in step (a *step*) ── a bitmap of every copy begins ── every write ends everywhere ── flushed
      └ recorded by each copy: `in_step`

Where two copies differ later, one of them was written to since the last step both recorded: that is what the
two bitmaps of its name say. They are in the daemons' memory. One that did not survive is not known, never
guessed; then everything is copied.

    top ── (mirror: every new write goes there, too) ── fair ── (copy-before-write) ── layers
      `─────────────> link ──┐                            `─────────────> fill ──┐
                             there                                              there

The mirror begins first and copies nothing that is there. What the bitmaps say is then copied as it is at one
moment, below the mirror: a guest's write waits until its block has gone over, goes on to the layers, and only
then to the copy by the mirror. So nothing older ever overwrites what is newer, and no guest stands still.

Owns the bitmaps `step-`, the jobs and nodes of a rejoin. Never decides which copies count.
"""

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import cast

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, Error, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.storage import Changes, CopyPhase, CopyProgress, VolumeSpec
from nahtlos.physical.hypervisor import connections
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.arrivals import check_replaceable
from nahtlos.physical.storage.backup_targets import Range
from nahtlos.physical.storage.backups import OwnDoor, in_thread, pieces
from nahtlos.physical.storage.daemon import WAITS_IF_FAILING, Job, JobStatus, in_step
from nahtlos.physical.storage.encryption import LAYER_FORMAT
from nahtlos.physical.storage.graph import Options
from nahtlos.physical.storage.nbd import DIRTY
from nahtlos.physical.storage.record import Mode, VolumeRecord
from nahtlos.physical.storage.relocation import (
    GREET_SECONDS,
    RECONNECT_SECONDS,
    Relocations,
    connection,
    job_name,
)
from nahtlos.physical.storage.serving import Serving

GRANULARITY = 65536
FILLED_AT_ONCE = 2
"""Requests of what differs, of 1 MiB at most: writes wait behind them (see `daemon.COPIED_AT_ONCE`)."""
STEPS_KEPT = 4
"""Of those that copies which are away may still be at."""
MOST_RANGES = 4096
BEGIN_WITHIN = 10.0
_BITMAP = "step-"
_DIFFERS = "differs"
_ASKED = "asked"


# --- decisions -----------------------------------------------------------------------------------------


def bitmap_name(step: str) -> str:
    return f"{_BITMAP}{step}"


def mirror_name(volume: VolumeId) -> str:
    return graph.node_name("rejoin", volume)


def fill_name(volume: VolumeId) -> str:
    return graph.node_name("fill", volume)


def theirs_name(volume: VolumeId) -> str:
    return graph.node_name("theirs", volume)


def copies_in(step: str) -> int:
    """How many copies were in step then. It is told by the name of the step: `<copies>-<anything>`."""
    number = step.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def outlived(steps: Iterable[str], reached: str, before: str) -> tuple[str, ...]:
    """Steps nobody can come back from any more, now that `reached` is. The one before stays: not every copy
    may have heard of this one. Those of more copies stay, too: whoever was in them then is away."""
    away = sorted(step for step in steps if copies_in(step) > copies_in(reached))[-STEPS_KEPT:]
    kept = {reached, before, *away}
    return tuple(sorted(step for step in steps if step not in kept))


def rejoin_progress(jobs: Mapping[str, Job], volume: VolumeId) -> CopyProgress | None:
    """None: nothing of the kind runs or ran."""
    mirror, fill = jobs.get(mirror_name(volume)), jobs.get(fill_name(volume))
    if mirror is None and fill is None:
        return None
    done, total = (fill.done, fill.total) if fill else (0, 0)
    error = (mirror.error if mirror else "") or (fill.error if fill else "")
    if mirror is None or fill is None or error or mirror.over:
        error = error or "it was interrupted"
        return CopyProgress(phase=CopyPhase.FAILED, done=done, total=total, error=error)
    ready = fill.status == JobStatus.CONCLUDED and in_step(mirror)
    return CopyProgress(phase=CopyPhase.READY if ready else CopyPhase.COPYING, done=done, total=total)


def coarse(ranges: Iterable[tuple[int, int]], most: int = MOST_RANGES) -> tuple[tuple[int, int], ...]:
    """At most so many (offset, length), in order, that cover all of these."""
    found = sorted(ranges)
    if len(found) <= most:
        return tuple(found)
    gaps = sorted(after[0] - sum(before) for before, after in pairwise(found))
    bridged = gaps[len(found) - most - 1]
    joined = [found[0]]
    for offset, length in found[1:]:
        begin, so_far = joined[-1]
        if offset - (begin + so_far) <= bridged:
            joined[-1] = (begin, offset + length - begin)
        else:
            joined.append((offset, length))
    return tuple(joined)


def may_rejoin(record: VolumeRecord, volume: VolumeSpec) -> bool:
    """What is there can be the base of what `volume` shall be. Stale if it is past that."""
    if record.epoch > volume.epoch:
        raise Stale(f"volume '{volume.id}' is served by epoch {record.epoch}", field="volume")
    if not record.in_step or record.mode not in (Mode.SERVING, Mode.RECEIVING):
        return False
    if record.mode is Mode.SERVING and record.epoch == volume.epoch:
        return False  # it has become the volume since
    wanted = LAYER_FORMAT if volume.encryption_key is not None else volume.format
    return record.format is wanted and record.size == volume.size_mib << 20


# --- what is done --------------------------------------------------------------------------------------


class Replication:
    def __init__(self, host: HostId, serving: Serving, relocations: Relocations, door: OwnDoor) -> None:
        self._host = host
        self._serving = serving
        self._daemon = serving.daemon
        self._relocations = relocations
        self._door = door

    # --- steps -------------------------------------------------------------------------------------

    async def begin_step(self, volume: VolumeId, step: str) -> None:
        record = self._serving.records[volume]
        if record.mode is not Mode.SERVING or not graph.served(record):
            raise Unavailable(f"volume '{volume}' is not served by this host", field="volume")
        if step in await self._steps(volume):
            raise Conflict(f"step {step} of '{volume}' has begun already", field="step")
        await self._daemon.execute("block-dirty-bitmap-add", self._bitmap(volume, bitmap_name(step)))

    async def reach_step(self, volume: VolumeId, step: str) -> None:
        record = self._serving.records[volume]
        known = await self._steps(volume)
        if step not in known or record.mode is not Mode.SERVING:
            raise Refused(f"what was written to '{volume}' since step {step} is not known", field="step")
        await in_thread(lambda _: self._flush(f"{volume}.e{record.epoch}"))
        await self._serving.keep(msgspec.structs.replace(record, in_step=step))
        await self._serving.on_step("step.recorded")
        for old in outlived(known, step, record.in_step):
            await self._remove_bitmap(volume, bitmap_name(old))

    async def forget_steps(self, volume: VolumeId) -> None:
        """It has become another without its writes having been seen, or is about to."""
        record = self._serving.records.get(volume)
        if record is not None and record.in_step:
            await self._serving.keep(msgspec.structs.replace(record, in_step=""))
        if await self._daemon.pid() is not None:
            for step in await self._steps(volume):
                await self._remove_bitmap(volume, bitmap_name(step))

    async def _written_out_there(self, volume: VolumeId) -> None:
        """A mirror that ends in step flushes its target while writers wait: little is left of that now."""
        record = self._serving.records.get(volume)
        target = record.endpoint if record is not None else None
        if target is None:
            return
        at = (target.address, target.port)
        if not await connections.answers(at, connect_within=GREET_SECONDS, greet_within=GREET_SECONDS):
            return
        with suppress(Error, OSError):
            await in_thread(lambda _: self._flush(target.export, target))

    def _flush(self, export: str, there: VolumeEndpoint | None = None) -> None:
        """Of this host, or of another one."""
        door = self._door
        if there is not None:
            door = msgspec.structs.replace(door, host=there.host, address=there.address, port=there.port)
        with door.client(export) as client:
            client.flush()

    async def _steps(self, volume: VolumeId) -> frozenset[str]:
        """What was written since is known."""
        return frozenset(
            name.removeprefix(_BITMAP) for name in await self._bitmaps(volume) if name.startswith(_BITMAP)
        )

    async def _bitmaps(self, volume: VolumeId) -> frozenset[str]:
        about = (await self._daemon.images()).get(graph.fair_node(volume), {})
        found = cast("list[dict[str, object]]", about.get("dirty-bitmaps", []))
        return frozenset(
            str(each["name"]) for each in found if "name" in each and not each.get("inconsistent")
        )

    def _bitmap(self, volume: VolumeId, name: str, *, disabled: bool = False) -> Options:
        return {
            "node": graph.fair_node(volume),
            "name": name,
            "granularity": GRANULARITY,
            "disabled": disabled,
        }

    async def _remove_bitmap(self, volume: VolumeId, name: str) -> None:
        arguments: Options = {"node": graph.fair_node(volume), "name": name}
        await self._daemon.tolerating("block-dirty-bitmap-remove", arguments)

    async def _merged(self, volume: VolumeId, name: str, sources: list[object]) -> None:
        """A bitmap that changes no more: these together, as they are now."""
        await self._remove_bitmap(volume, name)
        await self._daemon.execute("block-dirty-bitmap-add", self._bitmap(volume, name, disabled=True))
        arguments = {"node": graph.fair_node(volume), "target": name, "bitmaps": sources}
        await self._daemon.execute("block-dirty-bitmap-merge", arguments)

    # --- the copy that comes back --------------------------------------------------------------------

    async def rejoin(self, volume: VolumeSpec) -> Changes | None:
        """What is here is served by another epoch first: nobody but who copies writes into it then."""
        record = self._serving.records.get(volume.id)
        if record is None or not may_rejoin(record, volume):
            return None
        check_replaceable(record, volume, self._host)
        wanted = msgspec.structs.replace(
            record,
            mode=Mode.RECEIVING,
            epoch=volume.epoch,
            boot_id=self._serving.boot_id,
            withdrawn=False,
            endpoint=None,
        )
        if wanted != record:
            await self._serving.keep(wanted)
            await self._serving.on_step("rejoin.recorded")
        await self._serving.define()
        await self._serving.on_step("rejoin.defined")
        await self._serving.settle((volume.id,))
        await self._serving.regroup(volume.id)
        return Changes(since=record.in_step, ranges=await self._written(volume.id, record.in_step))

    async def _written(self, volume: VolumeId, step: str) -> tuple[tuple[int, int], ...] | None:
        if step not in await self._steps(volume):
            return None
        export = f"{volume}.{_ASKED}"
        if export in await self._exports():
            await self._daemon.withdraw(export)
        await self._merged(volume, _ASKED, [bitmap_name(step)])
        try:
            options: Options = {
                "type": "nbd",
                "id": export,
                "name": export,
                "node-name": graph.top_node(volume),
                "writable": False,
                "bitmaps": [{"node": graph.fair_node(volume), "name": _ASKED}],
            }
            await self._daemon.execute("block-export-add", options)
            try:
                return await in_thread(lambda _: self._read_bitmap(export, f"qemu:dirty-bitmap:{_ASKED}"))
            finally:
                await self._daemon.withdraw(export)
        finally:
            await self._remove_bitmap(volume, _ASKED)

    def _read_bitmap(self, export: str, context: str) -> tuple[tuple[int, int], ...]:
        with self._door.client(export, context) as client:
            return coarse((e.offset, e.length) for e in client.extents(context) if e.flags & DIRTY)

    async def _exports(self) -> frozenset[str]:
        answer = await self._daemon.execute("query-block-exports")
        return frozenset(str(each["id"]) for each in cast("list[dict[str, object]]", answer["value"]))

    # --- the copy that has everything ----------------------------------------------------------------

    async def start(
        self, volume: VolumeSpec, target: VolumeEndpoint, *, bytes_per_second: int, changes: Changes | None
    ) -> None:
        """See `ports.Storage.relocate_start`."""
        jobs = await self._daemon.jobs()
        progress = rejoin_progress(jobs, volume.id)
        runs = progress is not None and progress.phase is not CopyPhase.FAILED
        if runs and self._serving.records[volume.id].endpoint == target:
            if (fill := jobs[fill_name(volume.id)]).status != JobStatus.CONCLUDED:
                await self._daemon.execute(
                    "block-job-set-speed", {"device": fill.id, "speed": bytes_per_second}
                )
            return
        await self.stop(volume.id)
        full = jobs.get(job_name(volume.id))
        if changes is None or (full is not None and not full.over):
            await self._relocations.start(volume, target, bytes_per_second=bytes_per_second)
            return
        if changes.since not in await self._steps(volume.id):
            raise Conflict(
                f"what was written to '{volume.id}' since step {changes.since} is not known here: its "
                "storage daemon was started anew since, or its copy came later",
                field="changes",
            )
        await self._relocations.prepare(volume, target)
        await self._serving.on_step("rejoin.noted")
        try:
            await self._copy(volume.id, target, changes, bytes_per_second)
        except Denied as denied:
            await self.stop(volume.id)
            raise Unavailable(f"what differs of '{volume.id}' cannot be copied: {denied.message}") from denied
        await self._serving.on_step("rejoin.started")

    async def _copy(self, volume: VolumeId, target: VolumeEndpoint, changes: Changes, speed: int) -> None:
        await self._relocations.connect(volume, target)
        try:
            await self._daemon.add_nodes((connection(volume, target, "fill", RECONNECT_SECONDS),))
        except Refused as refused:
            raise Unavailable(f"{target.host} does not take {volume}: {refused.message}") from refused
        await self._relocations.bound(target)
        mirror: Options = {
            "job-id": mirror_name(volume),
            "device": graph.top_node(volume),
            "target": graph.node_name("target", volume),
            "sync": "none",
            "copy-mode": "write-blocking",
            **WAITS_IF_FAILING,
            "auto-dismiss": False,
        }
        await self._daemon.execute("blockdev-mirror", mirror)
        await self._mirrored(volume)
        await self._serving.on_step("rejoin.mirrored")
        sources: list[object] = [bitmap_name(changes.since)]
        if changes.ranges:
            await self._mark_theirs(volume, changes.ranges)
            sources.append({"node": theirs_name(volume), "name": _DIFFERS})
        await self._merged(volume, _DIFFERS, sources)
        await self._fill(volume, speed)

    async def _mirrored(self, volume: VolumeId) -> None:
        """Returns once every write that is acknowledged goes to both."""
        try:
            async with asyncio.timeout(BEGIN_WITHIN):
                while (job := (await self._daemon.jobs()).get(mirror_name(volume))) is not None:
                    if in_step(job):
                        return
                    if job.over:
                        raise Unavailable(f"the copy of '{volume}' takes nothing: {job.error}")
                    await asyncio.sleep(0.002)
        except TimeoutError:
            pass
        raise Unavailable(f"the copy of '{volume}' takes nothing")

    async def _fill(self, volume: VolumeId, speed: int) -> None:
        backup: Options = {
            "job-id": fill_name(volume),
            "device": graph.fair_node(volume),
            "target": graph.node_name("fill", volume),
            "sync": "bitmap",
            "bitmap": _DIFFERS,
            "bitmap-mode": "never",
            "auto-dismiss": False,
            "speed": speed,
            "x-perf": {"max-workers": FILLED_AT_ONCE},
        }
        try:
            # a copy that goes away again is no matter of the guest's
            await self._daemon.execute("blockdev-backup", {**backup, "on-cbw-error": "break-snapshot"})
        except Denied as denied:
            if "on-cbw-error" not in denied.message:
                raise
            await self._daemon.execute("blockdev-backup", backup)  # before QEMU 10.1

    async def _mark_theirs(self, volume: VolumeId, ranges: tuple[tuple[int, int], ...]) -> None:
        """What is said of the other copy's writes, as a bitmap: of a device that only takes note of them."""
        name = theirs_name(volume)
        size = self._serving.records[volume].size
        node: Options = {"driver": "null-co", "node-name": name, "size": size, "read-zeroes": True}
        await self._daemon.add_nodes((node,))
        try:
            bitmap: Options = {"node": name, "name": _DIFFERS, "granularity": GRANULARITY}
            await self._daemon.execute("block-dirty-bitmap-add", bitmap)
            export: Options = {"type": "nbd", "id": name, "name": name, "node-name": name, "writable": True}
            await self._daemon.execute("block-export-add", export)
            await in_thread(lambda _: self._write_bitmap(name, ranges))
        finally:
            await self._daemon.tolerating("block-export-del", {"id": name, "mode": "hard"})

    def _write_bitmap(self, export: str, ranges: tuple[tuple[int, int], ...]) -> None:
        with self._door.client(export) as client:
            for offset, length in pieces(Range(offset, length) for offset, length in ranges):
                client.zero(offset, length)

    # --- progress ----------------------------------------------------------------------------------

    async def progress(self, volume: VolumeId) -> CopyProgress:
        jobs = await self._daemon.jobs()
        found, mirror = rejoin_progress(jobs, volume), jobs.get(mirror_name(volume))
        if mirror is not None and mirror.failing:
            await self._relocations.give_up_mirror(volume, mirror.id)
        return found if found is not None else await self._relocations.progress(volume)

    async def stop(self, volume: VolumeId) -> None:
        """Nothing of a rejoin is left in the daemon; fine if there was none."""
        jobs = await self._daemon.jobs()
        if theirs_name(volume) in await self._exports():
            await self._daemon.withdraw(theirs_name(volume))
        if fill_name(volume) in jobs:
            await self._daemon.job_cancel(fill_name(volume))
        for name in (mirror_name(volume), job_name(volume)):
            if name in jobs and in_step(jobs[name]):
                await self._written_out_there(volume)
        if mirror_name(volume) in jobs:
            await self._relocations.give_up_mirror(volume, mirror_name(volume))
        await self._daemon.remove_nodes((graph.node_name("fill", volume), theirs_name(volume)))
        if _DIFFERS in await self._bitmaps(volume):
            await self._remove_bitmap(volume, _DIFFERS)
