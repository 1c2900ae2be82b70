"""The storage daemon that serves images over NBD while they are relocated, and the copying itself. While they
are backed up it serves moments of them.

What it serves stands in one small file, which is durable before anything is done by it; the supervisor's
definition of the daemon is made from it. A daemon that dies serves the same when it is started again, except
that a copy under way begins anew. No doors: no daemon.

    open ── copy ── ready ── held ── completed (a proxy) ── closed
              `─ cancelled ─> open

A mirror whose target fails lets its image go on alone. That must not happen once it is recorded that
everything is passed on: so before, the connection to the target is replaced by one that waits for a target
that is gone. What a crash leaves then is told from what the daemon has (`_settled`).
"""

import asyncio

import msgspec

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, VolumeId
from nahtlos.model.nouns import Component
from nahtlos.model.storage import CopyPhase, CopyProgress
from nahtlos.physical.hypervisor.bundle import Bundle, Bundles
from nahtlos.physical.hypervisor.qmp import Denied
from nahtlos.physical.ports import Supervisor, Unit
from nahtlos.physical.settings import AgentSettings, CephSettings
from nahtlos.physical.storage.ceph import doors
from nahtlos.physical.storage.ceph.doors import SOCKET_FD, UNIT, Door, Options, View
from nahtlos.physical.storage.daemon import WAITS_IF_FAILING, Daemon, in_step
from nahtlos.physical.storage.relocation import progress_of
from nahtlos.physical.storage.sockets import Patience, Peer, bound_connections
from nahtlos.wire.credentials import write_file

MIN_VERSION = (10,)


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    release: ReleaseId | None = None
    doors: tuple[Door, ...] = ()
    views: tuple[View, ...] = ()


class Gateway:
    """Not to be used by two tasks at once."""

    def __init__(self, settings: AgentSettings, ceph: CephSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._ceph = ceph
        self._supervisor = supervisor
        self._bundles = Bundles(settings.releases_dir)
        self._file = settings.state_dir / "ceph-doors.json"
        log, monitor = settings.state_dir / f"{UNIT}.log", settings.run_dir / f"{UNIT}.qmp"
        self._daemon = Daemon(supervisor, monitor, log, UNIT)

    async def close_monitor(self) -> None:
        await self._daemon.close()

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
            known = None
        door = known or Door(volume=volume, epoch=epoch)
        await self._keep(door)
        await self._serve(door)

    async def close(self, volume: VolumeId, *, hard: bool = True) -> None:
        """Hard: who still comes is told that it is gone; else Conflict if somebody does. Repeatable."""
        door = self.doors.get(volume)
        if door is None:
            return
        if not hard:
            await self._withdraw(door, "safe")
        others = tuple(kept for kept in self._kept.doors if kept.volume != volume)
        self._write(msgspec.structs.replace(self._kept, doors=others))
        if await self._ended():
            return
        await self._define()
        await self._withdraw(door, "hard")
        await self._daemon.job_cancel(door.job)
        names = (doors.top_node, doors.fair_node, doors.rbd_node, doors.there_node)
        await self._daemon.remove_nodes(name(volume) for name in names)
        await self._drop_target(door)
        await self._daemon.tolerating("object-del", {"id": doors.limits_group(volume)})

    async def _ended(self) -> bool:
        """The daemon is, if it has nothing to serve any more."""
        kept = self._kept
        if kept.doors or kept.views:
            return False
        await self._daemon.close()
        await self._supervisor.stop(UNIT)
        return True

    # --- views -------------------------------------------------------------------------------------

    async def show(self, view: View) -> None:
        """It can be read from now on; another one of its volume no longer. Repeatable."""
        if view not in self._kept.views:
            await self.hide(view.volume)
            self._write(msgspec.structs.replace(self._kept, views=(*self._kept.views, view)))
        await self._define()
        if view.export not in await self._daemon.export_nodes():
            await self._daemon.add_nodes((doors.view(self._ceph, view),))
            await self._daemon.execute("block-export-add", doors.view_export(view))

    async def hide(self, volume: VolumeId) -> None:
        """Whatever view of it there is. Repeatable."""
        gone = [view for view in self._kept.views if view.volume == volume]
        if not gone:
            return
        others = tuple(view for view in self._kept.views if view.volume != volume)
        self._write(msgspec.structs.replace(self._kept, views=others))
        if await self._ended():
            return
        await self._define()
        for view in gone:
            if view.export in await self._daemon.export_nodes():
                await self._daemon.withdraw(view.export)
        await self._daemon.remove_nodes((doors.view_node(volume),))

    # --- copies ------------------------------------------------------------------------------------

    async def copy(self, volume: VolumeId, target: VolumeEndpoint, bytes_per_second: int) -> None:
        door = await self._settled(self._door(volume))
        if door.completed:
            return
        job = (await self._daemon.jobs()).get(door.job)
        if job is not None and not job.over and door.target == target:
            await self._daemon.execute("block-job-set-speed", {"device": job.id, "speed": bytes_per_second})
            return
        await self._drop_target(door)
        door = await self._keep(msgspec.structs.replace(door, target=target))
        await self._serve(door)
        await self._connect(door, doors.connection(door, doors.link_node(volume), doors.LINK_SECONDS))
        await self._daemon.add_nodes((doors.target(door, doors.link_node(volume)),))
        mirror: Options = {
            "job-id": door.job,
            "device": doors.top_node(volume),
            "target": doors.target_node(volume),
            "sync": "full",
            "copy-mode": "write-blocking",
            **WAITS_IF_FAILING,
            "speed": bytes_per_second,
            "auto-dismiss": False,
        }
        await self._daemon.execute("blockdev-mirror", mirror)

    async def progress(self, volume: VolumeId) -> CopyProgress:
        door = self.doors.get(volume)
        if door is None or door.target is None:
            return CopyProgress(phase=CopyPhase.NONE)
        door = await self._settled(door)
        if door.completed:
            return CopyProgress(phase=CopyPhase.DONE)
        job = (await self._daemon.jobs()).get(door.job)
        if job is not None and job.failing:
            await self._daemon.mirror_break(job.id, doors.export(door))
        return progress_of(job)

    async def complete(self, volume: VolumeId) -> None:
        door = await self._settled(self._door(volume))
        if door.completed:
            return
        if not await self._in_step(door):
            raise Refused(f"the copy of '{volume}' is not ready", field="volume")
        await self._connect(door, doors.connection(door, doors.hold_node(volume), doors.HOLD_SECONDS))
        held = doors.target(door, doors.hold_node(volume))
        await self._daemon.execute("blockdev-reopen", {"options": [held]})
        if not await self._in_step(door):
            raise Refused(f"the copy of '{volume}' broke off", field="volume")
        # From here on a daemon that is started anew is a proxy: the target has every acknowledged write.
        await self._pass_on(await self._keep(msgspec.structs.replace(door, completed=True)))

    async def cancel(self, volume: VolumeId) -> None:
        door = self.doors.get(volume)
        if door is None or door.target is None:
            return
        door = await self._settled(door)
        if door.completed:
            raise Conflict(f"'{volume}' has left already", field="volume")
        await self._drop_target(door)
        await self._serve(door)  # an agent that ended while a mirror was torn off left it withdrawn
        await self._keep(msgspec.structs.replace(door, target=None))

    def _door(self, volume: VolumeId) -> Door:
        door = self.doors.get(volume)
        if door is None:
            raise NotFound(f"'{volume}' is not served by this host", field="volume")
        return door

    async def _in_step(self, door: Door) -> bool:
        job = (await self._daemon.jobs()).get(door.job)
        return job is not None and in_step(job)

    async def _settled(self, door: Door) -> Door:
        """After what was recorded was carried out, or taken back: then the image may hold more than the
        target, as the mirror between them broke off before anything was passed on."""
        if not door.completed:
            return door
        graph = await self._daemon.graph()
        below = graph.below(doors.fair_node(door.volume))
        if below == doors.there_node(door.volume):
            await self._tidy(door)
            return door
        held = graph.below(doors.target_node(door.volume)) == doors.hold_node(door.volume)
        if held and await self._in_step(door):
            await self._pass_on(door)
            return door
        return await self._keep(msgspec.structs.replace(door, completed=False))

    async def _pass_on(self, door: Door) -> None:
        await self._connect(door, doors.there(door))
        passing = doors.fair(door, doors.there_node(door.volume))
        await self._daemon.execute("blockdev-reopen", {"options": [passing]})
        await self._tidy(door)

    async def _tidy(self, door: Door) -> None:
        """What the daemon does not need any more of a volume that is passed on."""
        await self._drop_target(door)
        await self._daemon.remove_nodes((doors.rbd_node(door.volume),))

    async def _drop_target(self, door: Door) -> None:
        await self._daemon.mirror_end(door.job, doors.export(door))
        names = (doors.target_node, doors.link_node, doors.hold_node)
        await self._daemon.remove_nodes(name(door.volume) for name in names)

    async def _connect(self, door: Door, node: Options) -> None:
        """A target that is cut off holds writers up for a bounded time."""
        assert door.target is not None, f"{door.volume} goes nowhere"
        try:
            await self._daemon.add_nodes((node,))
        except Refused as refused:
            raise Unavailable(
                f"{door.target.host} does not take '{door.volume}': {refused.message}"
            ) from refused
        pid = await self._daemon.pid()
        if pid is not None:
            peer = Peer(door.target.address, door.target.port)
            await asyncio.to_thread(bound_connections, pid, peer, Patience())

    # --- what is served ----------------------------------------------------------------------------

    async def _keep(self, door: Door) -> Door:
        """Durably, and in the daemon's definition."""
        others = tuple(kept for kept in self._kept.doors if kept.volume != door.volume)
        self._write(msgspec.structs.replace(self._kept, doors=(*others, door)))
        await self._define()
        return door

    async def _define(self) -> None:
        """A daemon that runs is not touched: the definition is for when it starts again."""
        bundle = await self.bundle()
        self._settings.run_dir.mkdir(parents=True, exist_ok=True)
        await self._supervisor.listen_tcp(SOCKET_FD, self._settings.address, self._ceph.nbd_port)
        arguments = doors.arguments(
            self._ceph,
            self._daemon.qmp_path,
            self._settings.pki_dir,
            self._kept.doors,
            self._kept.views,
        )
        await self._supervisor.start(
            Unit(
                name=UNIT,
                argv=(*bundle.storage_daemon(), *arguments),
                environment=bundle.environment,
                fds=(SOCKET_FD,),
                log=self._daemon.log,
                restart=True,
            )
        )

    async def bundle(self) -> Bundle:
        """Of the release it runs by; the newest when it starts."""
        release = self._kept.release
        if release is not None and UNIT in await self._supervisor.units():
            return await self._bundles.checked(release)
        bundles = [await self._bundles.checked(found) for found in await self._bundles.available()]
        fit = [
            bundle
            for bundle in bundles
            if bundle.manifest.release.component is Component.HYPERVISOR and bundle.version >= MIN_VERSION
        ]
        if not fit:
            raise NotFound(f"no release from {MIN_VERSION[0]} on in {self._settings.releases_dir}")
        newest = max(fit, key=lambda bundle: bundle.version)
        self._write(msgspec.structs.replace(self._kept, release=newest.release))
        return newest

    async def _serve(self, door: Door) -> None:
        if door.volume in await self._daemon.exports():
            return
        group = {"qom-type": "throttle-group", "id": doors.limits_group(door.volume)}
        await self._daemon.tolerating("object-add", dict[str, object](group))
        await self._daemon.add_nodes(doors.nodes(self._ceph, door))
        await self._daemon.execute("block-export-add", doors.export(door))

    async def _withdraw(self, door: Door, mode: str) -> None:
        if door.volume not in await self._daemon.exports():
            return
        try:
            await self._daemon.withdraw(door.export, mode=mode)
        except Denied as denied:
            raise Conflict(f"'{door.volume}' is still reached by this host", field="volume") from denied

    # --- the file ----------------------------------------------------------------------------------

    @property
    def _kept(self) -> _Kept:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return _Kept()

    def _write(self, kept: _Kept) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._file, msgspec.json.encode(kept), mode=0o600)
