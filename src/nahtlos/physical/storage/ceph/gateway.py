"""The storage daemon that serves images over NBD while they are relocated, and the copying itself.

What it serves stands in one small file, which is durable before anything is done by it; the supervisor's
definition of the daemon is made from it. A daemon that dies serves the same when it is started again, except
that a copy under way begins anew. No doors: no daemon.

    open ── copy ── ready ── completed (a proxy) ── closed
              `─ cancelled ─> open
"""

import asyncio
import time
from typing import cast

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, VolumeId
from nahtlos.model.nouns import Component
from nahtlos.model.storage import CopyPhase, CopyProgress
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles
from nahtlos.physical.hypervisor.qmp import Answer, Denied, Gone, Qmp
from nahtlos.physical.ports import Supervisor, Unit
from nahtlos.physical.settings import AgentSettings, CephSettings
from nahtlos.physical.storage.ceph import doors
from nahtlos.physical.storage.ceph.doors import SOCKET_FD, UNIT, Door, Options
from nahtlos.wire.credentials import write_file

MIN_VERSION = (10,)
MONITOR_WITHIN = 20.0
JOB_ENDS_WITHIN = 20.0
EXPORT_GONE_WITHIN = 5.0
POLL = 0.005


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    release: ReleaseId | None = None
    doors: tuple[Door, ...] = ()


class Gateway:
    """Not to be used by two tasks at once."""

    def __init__(self, settings: AgentSettings, ceph: CephSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._ceph = ceph
        self._supervisor = supervisor
        self._bundles = Bundles(settings.releases_dir)
        self._file = settings.state_dir / "ceph-doors.json"
        self._log = settings.state_dir / f"{UNIT}.log"
        self._monitor_path = settings.run_dir / f"{UNIT}.qmp"
        self._qmp: Qmp | None = None

    async def close_monitor(self) -> None:
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            await qmp.close()

    @property
    def doors(self) -> dict[VolumeId, Door]:
        return {door.volume: door for door in self._kept.doors}

    async def open(self, volume: VolumeId, epoch: int) -> None:
        """Its image is served from now on. Repeatable; another epoch replaces the one before."""
        known = self.doors.get(volume)
        if known is not None and known.epoch != epoch:
            if known.target is not None:
                raise Conflict(f"'{volume}' is being relocated", field="volume")
            await self.close(volume)
        door = known if known is not None and known.epoch == epoch else Door(volume=volume, epoch=epoch)
        await self._keep(door)
        await self._serve(door)

    async def close(self, volume: VolumeId, *, hard: bool = True) -> None:
        """Hard: who still comes is told that it is gone; else Conflict if somebody does. Repeatable."""
        door = self.doors.get(volume)
        if door is None:
            return
        if not hard:
            await self._close_softly(door)
        others = {kept.volume: kept for kept in self._kept.doors if kept.volume != volume}
        self._write(msgspec.structs.replace(self._kept, doors=tuple(others.values())))
        if not others:
            await self.close_monitor()
            await self._supervisor.stop(UNIT)
            return
        await self._define()
        await self._end_job(door)
        await self._withdraw(door)

    # --- copies ---

    async def copy(self, volume: VolumeId, target: VolumeEndpoint, bytes_per_second: int) -> None:
        door = self._door(volume)
        if door.completed:
            return
        if door.target is not None and door.target != target:
            raise Conflict(f"'{volume}' goes to {door.target.host} already", field="volume")
        door = await self._keep(msgspec.structs.replace(door, target=target))
        await self._serve(door)
        job = await self._job(door)
        if job is not None and job["status"] not in ("concluded", "null"):
            await self._execute("block-job-set-speed", {"device": door.job, "speed": bytes_per_second})
            return
        await self._end_job(door)
        names = await self._node_names()
        for node in doors.target_nodes(door):
            if node["node-name"] not in names:
                await self._execute("blockdev-add", node)
        await self._execute(
            "blockdev-mirror",
            {
                "job-id": door.job,
                "device": doors.top_node(volume),
                "target": doors.target_node(volume),
                "sync": "full",
                "copy-mode": "write-blocking",
                "speed": bytes_per_second,
                "auto-dismiss": False,
            },
        )

    async def progress(self, volume: VolumeId) -> CopyProgress:
        door = self.doors.get(volume)
        if door is None or door.target is None:
            return CopyProgress(phase=CopyPhase.NONE)
        if door.completed:
            return CopyProgress(phase=CopyPhase.DONE)
        job = await self._job(door)
        if job is None:
            return CopyProgress(phase=CopyPhase.FAILED, error="the storage daemon was started anew")
        done, total = cast("int", job["current-progress"]), cast("int", job["total-progress"])
        return CopyProgress(phase=_phase(job), done=done, total=total, error=str(job.get("error", "")))

    async def complete(self, volume: VolumeId) -> None:
        door = self._door(volume)
        if not door.completed:
            if (await self.progress(volume)).phase is not CopyPhase.READY:
                raise Refused(f"the copy of '{volume}' is not ready", field="volume")
            # From here on a daemon that is started anew is a proxy: the target has every acknowledged write.
            door = await self._keep(msgspec.structs.replace(door, completed=True))
        job = await self._job(door)
        if job is not None and job["status"] == "ready":
            await self._execute("job-complete", {"id": door.job})
        await self._end_job(door)

    async def cancel(self, volume: VolumeId) -> None:
        door = self.doors.get(volume)
        if door is None or door.target is None:
            return
        if door.completed:
            raise Conflict(f"'{volume}' is at {door.target.host} already", field="volume")
        job = await self._job(door)
        if job is not None and job["status"] not in ("concluded", "null"):
            await self._execute("block-job-cancel", {"device": door.job, "force": True})
        await self._end_job(door)
        await self._remove_node(doors.target_node(volume))
        await self._keep(msgspec.structs.replace(door, target=None))

    def _door(self, volume: VolumeId) -> Door:
        door = self.doors.get(volume)
        if door is None:
            raise NotFound(f"'{volume}' is not served by this host", field="volume")
        return door

    async def _job(self, door: Door) -> Answer | None:
        found = cast("list[Answer]", (await self._execute("query-jobs"))["value"])
        return next((job for job in found if job["id"] == door.job), None)

    async def _end_job(self, door: Door) -> None:
        """Wait until it has concluded, and take it away."""
        until = time.monotonic() + JOB_ENDS_WITHIN
        while (job := await self._job(door)) is not None:
            if job["status"] == "concluded":
                await self._execute("job-dismiss", {"id": door.job})
                return
            if job["status"] in ("running", "ready", "standby", "paused") and door.completed is False:
                await self._execute("block-job-cancel", {"device": door.job, "force": True})
            if time.monotonic() > until:
                raise Unavailable(f"the copy of '{door.volume}' does not end")
            await asyncio.sleep(POLL)

    # --- what is served ---

    async def _keep(self, door: Door) -> Door:
        """Durably, and in the daemon's definition."""
        others = tuple(kept for kept in self._kept.doors if kept.volume != door.volume)
        self._write(msgspec.structs.replace(self._kept, doors=(*others, door)))
        await self._define()
        return door

    async def _define(self) -> None:
        """A daemon that runs is not touched: the definition is for when it starts again."""
        kept = self._kept
        bundle = await self._bundle(kept)
        self._settings.run_dir.mkdir(parents=True, exist_ok=True)
        await self._supervisor.listen_tcp(SOCKET_FD, self._settings.address, self._ceph.nbd_port)
        arguments = doors.arguments(self._ceph, self._monitor_path, self._settings.pki_dir, kept.doors)
        await self._supervisor.start(
            Unit(
                name=UNIT,
                argv=(*bundle.storage_daemon(), *arguments),
                environment=bundle.environment,
                fds=(SOCKET_FD,),
                log=self._log,
                restart=True,
            )
        )

    async def _bundle(self, kept: _Kept) -> Bundle:
        """Of the release it was first run by, as long as it runs; the newest when it starts."""
        running = (await self._supervisor.units()).get(UNIT)
        if running is not None and kept.release is not None:
            return await self._bundles.checked(kept.release)
        bundles = [await self._bundles.checked(release) for release in await self._bundles.available()]
        fit = [
            bundle
            for bundle in bundles
            if bundle.manifest.release.component is Component.HYPERVISOR and bundle.version >= MIN_VERSION
        ]
        if not fit:
            raise NotFound(f"no release from {MIN_VERSION[0]} on in {self._settings.releases_dir}")
        newest = max(fit, key=lambda bundle: bundle.version)
        self._write(msgspec.structs.replace(kept, release=newest.release))
        return newest

    async def _serve(self, door: Door) -> None:
        if door.export in await self._exports():
            return
        names = await self._node_names()
        if doors.top_node(door.volume) not in names:
            await self._add_object(doors.limits_group(door.volume))
        for node in doors.nodes(self._ceph, door):
            if node["node-name"] not in names:
                await self._execute("blockdev-add", node)
        await self._execute("block-export-add", doors.export(door))

    async def _withdraw(self, door: Door) -> None:
        if door.export in await self._exports():
            await self._execute("block-export-del", {"id": door.export, "mode": "hard"})
        until = time.monotonic() + EXPORT_GONE_WITHIN
        while door.export in await self._exports():
            if time.monotonic() > until:
                raise Unavailable(f"export {door.export} is still there after {EXPORT_GONE_WITHIN:g} s")
            await asyncio.sleep(POLL)
        for name in (
            doors.top_node(door.volume),
            doors.rbd_node(door.volume),
            doors.target_node(door.volume),
        ):
            await self._remove_node(name)
        await self._tolerating("object-del", {"id": doors.limits_group(door.volume)})

    async def _close_softly(self, door: Door) -> None:
        if door.export not in await self._exports():
            return
        try:
            await self._execute("block-export-del", {"id": door.export, "mode": "safe"})
        except Denied as denied:
            raise Conflict(f"'{door.volume}' is still reached by this host", field="volume") from denied

    async def _remove_node(self, name: str) -> None:
        if name in await self._node_names():
            await self._execute("blockdev-del", {"node-name": name})

    async def _add_object(self, group: str) -> None:
        await self._tolerating("object-add", {"qom-type": "throttle-group", "id": group})

    async def _exports(self) -> set[str]:
        answer = await self._execute("query-block-exports")
        return {str(each["id"]) for each in cast("list[Answer]", answer["value"])}

    async def _node_names(self) -> set[str]:
        answer = await self._execute("query-named-block-nodes", {"flat": True})
        return {str(each["node-name"]) for each in cast("list[Answer]", answer["value"])}

    # --- the file ---

    @property
    def _kept(self) -> _Kept:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return _Kept()

    def _write(self, kept: _Kept) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._file, msgspec.json.encode(kept), mode=0o600)

    # --- monitor ---

    async def _execute(self, command: str, arguments: Options | None = None) -> Answer:
        return await (await self._monitor()).execute(command, arguments)

    async def _tolerating(self, command: str, arguments: Options) -> None:
        """For what may be as wanted already because an earlier call was interrupted."""
        try:
            await self._execute(command, arguments)
        except Denied as denied:
            if not any(words in denied.message for words in ("duplicate", "not found", "exists")):
                raise

    async def _monitor(self) -> Qmp:
        qmp = self._qmp
        if qmp is not None and qmp.open and qmp.loop is asyncio.get_running_loop():
            return qmp
        await self.close_monitor()
        until = time.monotonic() + MONITOR_WITHIN
        while True:
            try:
                self._qmp = await Qmp.connect(self._monitor_path)
            except Gone as gone:
                if time.monotonic() > until:
                    raise Unavailable(f"{UNIT} does not answer; see {self._log}") from gone
                await asyncio.sleep(POLL)
            else:
                return self._qmp


def _phase(job: Answer) -> CopyPhase:
    match job["status"]:
        case "ready":
            return CopyPhase.READY
        case "concluded" | "aborting" | "null":
            return CopyPhase.FAILED
        case _:
            return CopyPhase.COPYING
