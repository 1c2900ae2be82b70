"""Keeps the storage daemon at what the records say, while clients read and write.

The order of every change: the record, then the daemon's definition at its supervisor, then the running
daemon. So a daemon that is started anew at any moment serves what is right, and an agent that was started a
moment ago brings a running one to it by comparing (`settle`). What cannot be opened is left out and said.

`on_step` is called between any two steps that a crash may part; tests end the agent or the daemon there.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import VolumeId
from nahtlos.model.storage import DiskBudget
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.storage import decisions, graph, silence
from nahtlos.physical.storage.daemon import Daemon, Graph
from nahtlos.physical.storage.decisions import CatchUp
from nahtlos.physical.storage.definition import Definition, definition, groups
from nahtlos.physical.storage.graph import Export, Options, Places
from nahtlos.physical.storage.record import Records, VolumeRecord

AWAKE_WITHIN = 2.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LAST_WORDS = re.compile(r"qemu-storage-daemon: (--.*)$", re.MULTILINE)

OnStep = Callable[[str], Awaitable[None]]
Run = Callable[[Definition], Awaitable[bool]]
"""Makes the supervisor run a daemon by it; True if it had to be started."""


async def _go_on(_step: str) -> None:
    return


class Serving:
    def __init__(self, records: Records, daemon: Daemon, places: Places, run: Run) -> None:
        self.records = records
        self.daemon = daemon
        self.places = places
        self.boot_id = _BOOT_ID.read_text().strip()
        self.budget = DiskBudget()
        self.left_out: dict[VolumeId, str] = {}
        """Volumes the daemon cannot open, and why."""
        self.on_step: OnStep = _go_on
        self.changing = asyncio.Lock()
        """Held by whoever changes records and daemon together."""
        self._run = run
        self._defining = asyncio.Lock()
        self._silence = silence.Silence()
        self._budget_told = False

    # --- records and definition --------------------------------------------------------------------

    async def keep(self, *written: VolumeRecord, removed: Iterable[VolumeId] = ()) -> None:
        """Records, durable on return; all of them or none."""
        gone = tuple(removed)
        await asyncio.to_thread(lambda: self.records.commit(*written, removed=gone))

    async def define(self) -> bool:
        """What a daemon that is started from now on serves. True if it had to be started."""
        async with self._defining:
            wanted = definition(self.records.all(), self.places, self.budget, self.left_out)
            return await self._run(wanted)

    async def awake(self) -> None:
        """Returns when the daemon answers. What keeps it from starting is left out; it is tried again by
        every `settle`. One that runs and has answered nothing for long is killed: whatever it hangs in, the
        one that its supervisor starts then serves all that is recorded."""
        for _ in range(len(self.records.all()) + 1):
            if await self.daemon.answers(AWAKE_WITHIN):
                self._silence.broken()
                return
            blamed = self._blamed()
            if not blamed:
                break
            self.left_out |= blamed
            await self.define()
        if not await self.daemon.answers(5 * AWAKE_WITHIN):
            await self._give_up_silent()
            raise Unavailable(f"the storage daemon does not answer: {self.daemon.said()[-400:]}")
        self._silence.broken()

    async def _give_up_silent(self) -> None:
        silent = self._silence.lasts(await self.daemon.pid(), time.monotonic())
        if silent >= silence.SILENT_SECONDS:
            self._silence.broken()
            await self.daemon.kill()
            raise Unavailable(
                f"the storage daemon has answered nothing for {silent:.0f} s: it is started anew"
            )

    def _blamed(self) -> dict[VolumeId, str]:
        """Volumes whose node or export a daemon that would not start named in its last words."""
        said = _LAST_WORDS.findall(self.daemon.said())
        records = self.records.all()
        if not said:
            return {}
        return {
            volume: said[-1].rpartition("}: ")[2]
            for volume in records
            if volume not in self.left_out and any(f'"{name}"' in said[-1] for name in self._names(volume))
        }

    def _names(self, volume: VolumeId) -> tuple[str, ...]:
        records = self.records.all()
        nodes = (str(node["node-name"]) for node in graph.nodes(records, volume, self.places))
        objects = (str(wanted["id"]) for wanted in graph.secrets(records, volume, self.places))
        export = graph.export_of(records, volume)
        return (*nodes, *objects, *((export.id,) if export else ()))

    async def share(self, budget: DiskBudget) -> None:
        """What the host's disks may be asked for, from now on."""
        if budget == self.budget and self._budget_told:
            return
        self.budget = budget
        await self.define()
        for group in groups(budget):
            await self._object(group)
            path, limits = f"/objects/{group['id']}", group["limits"]
            await self.daemon.execute("qom-set", {"path": path, "property": "limits", "value": limits})
        self._budget_told = True

    # --- the running daemon ------------------------------------------------------------------------

    async def settle(self, volumes: Iterable[VolumeId]) -> list[str]:
        """Bring the running daemon to what is recorded of these. Returns what was changed."""
        seen, done = await self.daemon.graph(), list[str]()
        served = [v for v in volumes if v in self.records.all() and graph.served(self.records[v])]
        overlays: list[VolumeId] = []
        for volume in served:
            try:
                step = self._step(seen, volume)
                if step is CatchUp.OVERLAY:
                    overlays.append(volume)
                await self._catch_up(volume, step)
                if self.left_out.pop(volume, None):
                    await self.define()
            except Refused as refusal:
                await self._leave_out(volume, refusal.message)
        await self._put_on(overlays)
        exports = await self.daemon.exports()
        for volume in served:
            if volume not in self.left_out:
                done += await self._export(volume, exports.get(volume))
        return done

    async def clear(self, spare: Iterable[VolumeId] = ()) -> list[str]:
        """Withdraw what is not (to be) served any more, and remove nodes nobody needs."""
        records, spared, done = self.records.all(), frozenset(spare), list[str]()
        for volume, export in (await self.daemon.exports()).items():
            known = records.get(volume)
            if volume not in spared and (known is None or not graph.served(known)):
                await self.daemon.withdraw(export.id)
                done.append(f"volume {volume} no longer served at epoch {export.epoch}")
        stray = decisions.stray_nodes(await self.daemon.graph(), records)
        await self.daemon.remove_nodes(stray)
        return done

    def usable(self, volume: VolumeId) -> bool:
        record = self.records.get(volume)
        return record is not None and graph.served(record) and volume not in self.left_out

    async def regroup(self, volume: VolumeId) -> None:
        """Its filter joins the throttle group its record wants, if the daemon has it."""
        if graph.fair_node(volume) in (await self.daemon.graph()).nodes:
            await self.written_out(volume)
            data = graph.data_nodes(self.records.all(), volume, self.places)[-1]["node-name"]
            fair, _ = graph.filter_nodes(self.records[volume], str(data))
            await self.daemon.execute("blockdev-reopen", {"options": [fair]})

    async def withdraw(self, volume: VolumeId) -> None:
        """Its clients get errors, its nodes go; records are left as they are."""
        export = (await self.daemon.exports()).get(volume)
        if export is not None:
            await self.daemon.withdraw(export.id)
        await self._take_down(volume)

    async def written_through(self, volume: VolumeId) -> Options | None:
        """The export by which its servers write; None if there is none."""
        export = (await self.daemon.exports()).get(volume)
        return export.options if export is not None else None

    async def swap(self, old: Export, new: Export) -> None:
        """One export of the same name for another, at one go: clients come back before they notice."""
        await self.daemon.together(
            ("block-export-del", {"id": old.id, "mode": "hard"}), ("block-export-add", new.options)
        )

    async def written_out(self, volume: VolumeId) -> None:
        """What was written so far is on disk on return, while writes go on: a flush then has little to
        do. Without it the first write behind which is flushed waits for all that a guest never flushed."""
        path = self.places.volumes / self.records[volume].active_layer.file
        await asyncio.to_thread(_write_out, path)

    async def flush_always(self, volume: VolumeId) -> None:
        """From now on behind every write, before an overlay is put onto a raw file."""
        export = (await self.daemon.exports()).get(volume)
        if export is not None and not export.writethrough:
            new = Export(volume=volume, epoch=export.epoch, writethrough=True)
            await self.swap(export, new)

    def _step(self, seen: Graph, volume: VolumeId) -> CatchUp:
        records = self.records.all()
        chain = decisions.seen_chain(seen, volume, decisions.known_nodes(records))
        return decisions.catch_up(decisions.expected_chains(records, volume), chain)

    async def _catch_up(self, volume: VolumeId, step: CatchUp) -> None:
        if step is CatchUp.REBUILD:
            await self.withdraw(volume)
        if step in (CatchUp.BUILD, CatchUp.REBUILD):
            await self.build(volume)
        if step is CatchUp.OVERLAY:
            await self.flush_always(volume)
            await self.daemon.add_nodes(self.overlay_nodes(volume))

    async def build(self, volume: VolumeId) -> None:
        """All nodes and objects of it, those that are there left as they are."""
        records = self.records.all()
        for secret in graph.secrets(records, volume, self.places):
            # It may be another key that the daemon was started with; nodes that are open need none any more.
            await self.daemon.tolerating("object-del", {"id": secret["id"]})
            await self._object(secret)
        for wanted in (*groups(self.budget), graph.limits_object(volume)):
            await self._object(wanted)
        await self.daemon.add_nodes(graph.nodes(records, volume, self.places))

    def file_node(self, ref: graph.LayerRef) -> Options:
        """All options of the node of a layer's file."""
        return graph.layer_nodes(self.records.all(), ref, self.places, writable=True)[0]

    def overlay_nodes(self, volume: VolumeId) -> tuple[Options, ...]:
        """Of the active layer alone, to be put onto what takes writes now."""
        records = self.records.all()
        ref = graph.active_chain(records, volume)[-1]
        return graph.layer_nodes(records, ref, self.places, writable=True)

    async def open_overlay(self, record: VolumeRecord, number: int) -> None:
        """An overlay nothing is recorded of yet: `record` is as it would be. To be put on by `settle`."""
        records = {**self.records.all(), record.volume: record}
        ref = graph.LayerRef(record.volume, number)
        await self.daemon.add_nodes(graph.layer_nodes(records, ref, self.places, writable=True))

    async def _put_on(self, volumes: list[VolumeId]) -> None:
        if volumes:
            records = self.records.all()
            await self.daemon.transaction([a for v in volumes for a in overlay_actions(records[v])])

    async def _export(self, volume: VolumeId, found: Export | None) -> list[str]:
        wanted = graph.export_of(self.records.all(), volume)
        if wanted is None or wanted == found or (found is not None and self.records[volume].pivoting):
            return []
        if found is not None and found.epoch == wanted.epoch:
            await self.swap(found, wanted)
            return []
        if found is not None:
            await self.daemon.withdraw(found.id)
        await self.daemon.tolerating("block-export-add", wanted.options)
        return [f"volume {volume} served at epoch {wanted.epoch}"]

    async def _leave_out(self, volume: VolumeId, why: str) -> None:
        if self.left_out.get(volume) != why:
            self.left_out[volume] = why
            await self.define()

    async def _take_down(self, volume: VolumeId) -> None:
        await self.daemon.remove_nodes((graph.top_node(volume), graph.fair_node(volume)))
        record = self.records.get(volume)
        if record is not None:
            nodes = graph.data_nodes(self.records.all(), volume, self.places)
            await self.daemon.remove_nodes(str(node["node-name"]) for node in reversed(nodes))

    async def _object(self, wanted: Options) -> None:
        try:
            await self.daemon.execute("object-add", wanted)
        except Denied as denied:
            if "duplicate" not in denied.message:
                raise


def _write_out(path: Path) -> None:
    """Twice: what came during the first pass is little."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(2):
            os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def overlay_actions(record: VolumeRecord) -> tuple[tuple[str, Options], ...]:
    """Of a transaction: the active layer is put onto the one it rests on, its bitmaps begin with it."""
    active = record.active_layer
    assert active.backing is not None
    new = graph.format_node(graph.LayerRef(record.volume, active.number))
    snapshot: Options = {"node": graph.format_node(active.backing), "overlay": new}
    bitmaps = (
        ("block-dirty-bitmap-add", Options(node=new, name=each.name, persistent=each.persistent))
        for each in record.bitmaps
    )
    return (("blockdev-snapshot", snapshot), *bitmaps)
