"""`physical.ports.Storage` with one qemu-storage-daemon per host.

The daemon is a unit of the supervisor (`qsd`), its listening socket is held there too (`nbd`), so its end
costs its clients a reconnect and no acknowledged write. A definition with everything served is given to
the supervisor on every change, before a file goes away and after one came: a daemon that is started again
serves what it served. Nothing has to watch it.

The release it runs under is chosen once (the newest present, 10 or later) and recorded: it is never
switched by itself. Never deletes a volume that is not named in `removed`.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import cast

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.inventory import PoolStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.nouns import Component
from nahtlos.model.storage import CopyProgress, SnapshotSpec, VolumeSpec
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles
from nahtlos.physical.hypervisor.commandline import TLS_FILES
from nahtlos.physical.hypervisor.qmp import Answer, Denied, Gone, Qmp
from nahtlos.physical.ports import StorageDesired, Supervisor, Unit
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.storage import daemon
from nahtlos.physical.storage.daemon import SOCKET_FD, UNIT, Served
from nahtlos.physical.storage.volumes import VolumeFolder

MIN_VERSION = (10,)
"""The NBD server of earlier ones lacks TCP_NODELAY: a thirtieth of the operations per second."""
MONITOR_WITHIN = 20.0
OBSERVE_WITHIN = 2.0
EXPORT_GONE_WITHIN = 5.0


class _Chosen(msgspec.Struct, frozen=True):
    release: ReleaseId


class EmbeddedStorage:
    def __init__(self, settings: AgentSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._bundles = Bundles(settings.releases_dir)
        self._folder = VolumeFolder(settings.state_dir / "volumes", settings.images_dir)
        self._qmp_path = settings.run_dir / "qsd.qmp"
        self._qmp: Qmp | None = None
        self._defined: Unit | None = None
        self._lock = asyncio.Lock()
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        """Let go of the monitor. The daemon runs on."""
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            await qmp.close()

    # --- the port ----------------------------------------------------------------------------------

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        async with self._lock:
            volumes = tuple(v for v in desired.volumes if v.id not in desired.pinned)
            present = await asyncio.to_thread(self._folder.present)
            going = [v for v in desired.removed if v in present and v not in desired.pinned]
            if not volumes and not going:
                return ()
            created = [await self._create(volume) for volume in volumes if volume.id not in present]
            target = {self._served(volume) for volume in volumes}
            target |= await self._left_alone(target, present.keys() - going)
            started = await self._define(target)
            served = await self._serve(target)
            deleted = [await self._delete(volume) for volume in going]
            return (*created, *started, *served, *deleted)

    async def observe(self) -> tuple[VolumeStatus, ...]:
        present = await asyncio.to_thread(self._folder.present)
        epochs = await self._exports_if_answering() if present else {}
        return tuple(
            VolumeStatus(id=volume, epoch=epochs.get(volume, 0), served=volume in epochs, size_mib=size)
            for volume, size in present.items()
        )

    async def pool(self) -> PoolStatus | None:
        folder = self._settings.state_dir
        found = await asyncio.to_thread(os.statvfs, folder) if folder.is_dir() else None
        return (
            PoolStatus(total=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)
            if found
            else None
        )

    async def release(self) -> ReleaseId | None:
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=_Chosen).release
        except FileNotFoundError:
            return None

    @property
    def _record(self) -> Path:
        """Of the release the daemon runs by."""
        return self._settings.state_dir / "storage-release.json"

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        raise _lacking("snapshot")

    async def snapshots(self) -> tuple[SnapshotStatus, ...]:
        return ()

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        raise _lacking("revert")

    async def serve(self, volume: VolumeSpec) -> None:
        """What is here is served from here."""

    async def relocate_start(
        self, volume: VolumeSpec, target: VolumeEndpoint, *, bytes_per_second: int
    ) -> None:
        raise _lacking("relocate_start")

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress:
        raise _lacking("relocate_progress")

    async def relocate_complete(self, volume: VolumeId) -> None:
        raise _lacking("relocate_complete")

    async def relocate_cancel(self, volume: VolumeId) -> None:
        raise _lacking("relocate_cancel")

    async def relocate_finish(self, volume: VolumeId) -> None:
        raise _lacking("relocate_finish")

    async def receive(self, volume: VolumeSpec) -> None:
        raise _lacking("receive")

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        raise _lacking("digest")

    async def _left_alone(self, target: set[Served], present: set[VolumeId]) -> set[Served]:
        """What is served and not spoken of stays as it is."""
        spoken_of = {served.volume for served in target}
        return {
            Served(volume=volume, epoch=epoch, file=str(self._folder.path(volume)))
            for volume, epoch in (await self._exports_if_answering()).items()
            if volume in present - spoken_of
        }

    # --- files -------------------------------------------------------------------------------------

    async def _create(self, volume: VolumeSpec) -> str:
        await asyncio.to_thread(self._folder.sweep)
        await asyncio.to_thread(self._folder.create, volume)
        return f"volume {volume.id} created from {volume.image or 'nothing'}"

    async def _delete(self, volume: VolumeId) -> str:
        await asyncio.to_thread(self._folder.delete, volume)
        return f"volume {volume} deleted"

    def _served(self, volume: VolumeSpec) -> Served:
        return Served(volume=volume.id, epoch=volume.epoch, file=str(self._folder.path(volume.id)))

    # --- the daemon --------------------------------------------------------------------------------

    async def _define(self, target: set[Served]) -> tuple[str, ...]:
        """The unit with all of `target` in its definition; says so if it had to be started. A daemon that
        runs is not touched: the definition is for when it starts again."""
        known = (await self._supervisor.units()).get(UNIT)
        unit = await self._unit(target)
        if unit != self._defined or known is None:
            self._settings.run_dir.mkdir(parents=True, exist_ok=True)
            address, port = self._settings.address, self._settings.nbd_port
            await self._supervisor.listen_tcp(SOCKET_FD, address, port)
            await self._supervisor.start(unit)
            self._defined = unit
        return () if known else ("storage daemon started",)

    async def _unit(self, wanted: set[Served]) -> Unit:
        bundle = await self._bundle()
        pki_dir = self._settings.pki_dir
        missing = [name for name in TLS_FILES if not (pki_dir / name).is_file()]
        if missing:
            raise Refused(
                f"{pki_dir} lacks {', '.join(missing)}",
                field="pki_dir",
                remedy="let this host join the cloud first",
            )
        arguments = daemon.arguments(self._qmp_path, pki_dir, wanted)
        return Unit(
            name=UNIT,
            argv=(*bundle.storage_daemon(), *arguments),
            environment=bundle.environment,
            fds=(SOCKET_FD,),
            log=self._settings.state_dir / "qsd.log",
            restart=True,
        )

    async def _bundle(self) -> Bundle:
        record = self._record
        if record.exists():
            return await self._bundles.checked(msgspec.json.decode(record.read_bytes(), type=_Chosen).release)
        bundle = await self._newest()
        record.parent.mkdir(parents=True, exist_ok=True)
        new = record.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(_Chosen(bundle.release)))
        new.replace(record)
        return bundle

    async def _newest(self) -> Bundle:
        bundles = [await self._bundles.checked(release) for release in await self._bundles.available()]
        hypervisors = [b for b in bundles if b.manifest.release.component is Component.HYPERVISOR]
        fit = [bundle for bundle in hypervisors if bundle.version >= MIN_VERSION]
        if not fit:
            raise NotFound(
                f"no release from {MIN_VERSION[0]} on in {self._settings.releases_dir}",
                field="releases_dir",
                remedy="build one; earlier ones serve volumes too slowly",
            )
        return max(fit, key=lambda bundle: bundle.version)

    # --- exports -----------------------------------------------------------------------------------

    async def _serve(self, target: set[Served]) -> list[str]:
        """Bring a running daemon to `target`: other epochs and what is to be deleted go first."""
        done: list[str] = []
        exports = await self._exports(MONITOR_WITHIN)
        epochs = {served.volume: served.epoch for served in target}
        for volume, epoch in exports.items():
            if epochs.get(volume) != epoch:
                await self._withdraw(volume, epoch, keep_nodes=volume in epochs)
                done.append(f"volume {volume} no longer served at epoch {epoch}")
        for served in sorted(target):
            if exports.get(served.volume) != served.epoch:
                await self._add(served)
                done.append(f"volume {served.volume} served at epoch {served.epoch}")
        return done

    async def _exports(self, within: float) -> dict[VolumeId, int]:
        qmp = await self._monitor(within)
        found = cast("list[dict[str, object]]", (await qmp.execute("query-block-exports"))["value"])
        parsed = (daemon.parse_export(str(each["id"])) for each in found if not each.get("shutting-down"))
        return dict(each for each in parsed if each is not None)

    async def _exports_if_answering(self) -> dict[VolumeId, int]:
        """Nothing is served by a daemon that does not run or answer."""
        status = (await self._supervisor.units()).get(UNIT)
        if status is None or status.pid is None:
            return {}
        try:
            return await self._exports(OBSERVE_WITHIN)
        except Unavailable:
            return {}

    async def _add(self, served: Served) -> None:
        names = await self._node_names()
        if daemon.node_name("top", served.volume) not in names:
            group = daemon.throttle_group(served.volume)
            await self._tolerating("object-add", {"qom-type": "throttle-group", "id": group})
        for node in daemon.nodes(served):
            if node["node-name"] not in names:
                await self._execute("blockdev-add", node)
        await self._execute("block-export-add", daemon.export(served))

    async def _withdraw(self, volume: VolumeId, epoch: int, *, keep_nodes: bool) -> None:
        """Hard: clients of this epoch get errors at once; that is what fencing is."""
        name = Served(volume=volume, epoch=epoch, file="").export
        await self._execute("block-export-del", {"id": name, "mode": "hard"})
        until = time.monotonic() + EXPORT_GONE_WITHIN
        while name in await self._export_ids():
            if time.monotonic() > until:
                raise Unavailable(f"export {name} is still there after {EXPORT_GONE_WITHIN:g} s")
            await asyncio.sleep(0.005)
        if not keep_nodes:
            for prefix in ("top", "raw", "file"):
                await self._execute("blockdev-del", {"node-name": daemon.node_name(prefix, volume)})
            await self._tolerating("object-del", {"id": daemon.throttle_group(volume)})

    async def _export_ids(self) -> set[str]:
        answer = await self._execute("query-block-exports")
        return {str(each["id"]) for each in cast("list[dict[str, object]]", answer["value"])}

    async def _node_names(self) -> set[str]:
        answer = await self._execute("query-named-block-nodes", {"flat": True})
        return {str(each["node-name"]) for each in cast("list[dict[str, object]]", answer["value"])}

    async def _tolerating(self, command: str, arguments: daemon.Options) -> None:
        """For what may be as wanted already because an earlier call was interrupted."""
        try:
            await self._execute(command, arguments)
        except Denied as denied:
            if not any(words in denied.message for words in ("duplicate", "not found", "exists")):
                raise

    # --- monitor -----------------------------------------------------------------------------------

    async def _execute(self, command: str, arguments: daemon.Options | None = None) -> Answer:
        return await (await self._monitor(MONITOR_WITHIN)).execute(command, arguments)

    async def _monitor(self, within: float) -> Qmp:
        async with self._connecting:
            qmp = self._qmp
            if qmp is not None and qmp.open and qmp.loop is asyncio.get_running_loop():
                return qmp
            await self.close()
            self._qmp = await self._connected(within)
            return self._qmp

    async def _connected(self, within: float) -> Qmp:
        until = time.monotonic() + within
        while True:
            try:
                return await Qmp.connect(self._qmp_path, within=within)
            except Gone as gone:
                if time.monotonic() > until:
                    raise Unavailable(
                        f"the storage daemon does not answer: {_tail(self._settings.state_dir / 'qsd.log')}"
                    ) from gone
            await asyncio.sleep(0.02)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-400:].strip() if path.exists() else "no log"


def _lacking(verb: str) -> Refused:
    return Refused(f"the embedded storage has no {verb} yet", field="verb")
