"""`physical.ports.Storage` by RBD images of one pool.

Volumes of this host are the images it administers: those it was told of, listed in one small file, and of
which the image itself says so. Servers open them directly, wherever they run; this host makes, enlarges,
fences, snapshots and deletes them. Everything durable is in the pool; what an agent that was killed has left
half done has names of its own and is swept or completed by the next `reconcile`.

Fencing: when the epoch rises, whoever has the image open is put on the cluster's blocklist before the new
epoch is noted, and so before anybody is told of it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec

from nahtlos.model.config import RbdEndpoint, VolumeAttachment, VolumeEndpoint
from nahtlos.model.errors import Conflict, Error, NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.inventory import PoolStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.storage import (
    BackupSpec,
    Changes,
    CopyPhase,
    CopyProgress,
    SnapshotOffer,
    SnapshotSpec,
    StorageBackend,
    VolumeFormat,
    VolumeSpec,
)
from nahtlos.physical.ports import (
    BackupResult,
    FileWritten,
    OnCopied,
    OnMoment,
    RawVolume,
    SnapshotFetch,
    Speed,
    StorageDesired,
    Supervisor,
)
from nahtlos.physical.settings import AgentSettings, CephSettings
from nahtlos.physical.storage.backups import OwnDoor, in_thread
from nahtlos.physical.storage.ceph import clients, doors, images
from nahtlos.physical.storage.ceph.backups import ImageBackups
from nahtlos.physical.storage.ceph.gateway import Gateway
from nahtlos.physical.storage.ceph.images import GONE, NEW, Act, ImageFacts
from nahtlos.physical.storage.ceph.process import Exists, RbdProcess
from nahtlos.physical.storage.snapshot_file import file_facts, write_node
from nahtlos.wire.credentials import write_file


class CephStorage:
    def __init__(self, settings: AgentSettings, ceph: CephSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._ceph = ceph
        self._rbd = RbdProcess(ceph)
        self._reach = clients.Reach()
        self._gateway = Gateway(settings, ceph, supervisor)
        self._file = settings.state_dir / "ceph-volumes.json"
        self._lock = asyncio.Lock()
        door = OwnDoor(
            host=settings.host, address=settings.address, port=ceph.nbd_port, pki_dir=settings.pki_dir
        )
        self._backups = ImageBackups(self._rbd, self._gateway, door, self._image, self._lock)

    async def close(self) -> None:
        """Let go of the cluster and of the gateway's monitor. The gateway runs on."""
        await self._rbd.close()
        await self._reach.close()
        await self._gateway.close_monitor()

    # --- the port ----------------------------------------------------------------------------------

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        volumes = [
            v for v in desired.volumes if v.backend is StorageBackend.CEPH and v.id not in desired.pinned
        ]
        removed = [v for v in desired.removed if v in self._known and v not in desired.pinned]
        async with self._lock:
            if not volumes and not self._file.exists():
                return ()
            done: list[str] = []
            failed: list[Error] = []
            acts: list[Callable[[], Awaitable[list[str]]]] = [
                *(partial(self._volume, volume) for volume in volumes),
                *(partial(self._delete, volume) for volume in removed),
                *(partial(self._remove_snapshot, snapshot) for snapshot in desired.removed_snapshots),
                self._sweep,
            ]
            for act in acts:
                try:
                    done += await act()
                except Error as error:  # what is wrong with one must not keep the others from being made
                    failed.append(error)
            if failed:
                raise failed[0]
            return tuple(done)

    async def observe(self) -> tuple[VolumeStatus, ...]:
        found = await self._facts(self._known)
        host = self._settings.host
        return tuple(images.volume_status(image, host) for image in found if image.host == host)

    async def pool(self) -> PoolStatus | None:
        return None

    async def release(self) -> ReleaseId | None:
        return None

    async def open_raw(self, attachment: VolumeAttachment, *, writing: bool) -> RawVolume:
        raise Refused(f"{attachment.volume} is written by its servers only", field="volume")

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        async with self._lock:
            made: list[SnapshotSpec] = []
            try:
                for wanted in snapshots:
                    made += [wanted] if await self._snapshot(wanted) else []
            except Error:
                for each in made:
                    await self._rbd.ask("snapshot_remove", name=each.volume, snapshot=each.id)
                raise

    async def snapshot_prepare(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        """Nothing has to be made beforehand."""

    async def snapshots(self) -> tuple[SnapshotStatus, ...]:
        return tuple(status for image in await self._own() for status in images.snapshot_statuses(image))

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        async with self._lock:
            await self._gateway.close(volume.id)
            image = await self._owned(volume.id)
            if snapshot not in {each.name for each in image.live_snapshots}:
                raise NotFound(f"'{volume.id}' has no snapshot '{snapshot}'", field="snapshot")
            await clients.let_go(self._rbd, image)
            for moment in image.moments:  # what changes now is not told by them
                await self._rbd.ask("snapshot_remove", name=volume.id, snapshot=moment)
            await self._rbd.work("rollback", name=volume.id, snapshot=snapshot)

    async def relocate_start(
        self,
        volume: VolumeSpec,
        target: VolumeEndpoint,
        *,
        bytes_per_second: int,
        changes: Changes | None = None,
    ) -> None:
        async with self._lock:
            image = await self._owned(volume.id)
            if self._taken_over(image, target):
                return
            await self._gateway.open(volume.id, volume.epoch)
            await self._no_others(volume.id)
            await self._gateway.copy(volume.id, target, bytes_per_second)

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress:
        async with self._lock:
            if volume in self._gateway.doors:
                return await self._gateway.progress(volume)
            image = await self._image(volume)
            if image is None or volume not in self._known:
                return CopyProgress(phase=CopyPhase.NONE)
            if image.host != self._settings.host:
                return CopyProgress(phase=CopyPhase.DONE, done=image.size, total=image.size)
            phase = CopyPhase.READY if images.OFFER in image.metadata else CopyPhase.NONE
            return CopyProgress(phase=phase, done=image.size, total=image.size)

    async def relocate_complete(self, volume: VolumeId) -> None:
        async with self._lock:
            if volume in self._gateway.doors:
                await self._gateway.complete(volume)
                return
            image = await self._image(volume)
            if image is None:
                raise NotFound(f"there is no volume '{volume}'", field="volume")
            if image.host == self._settings.host:
                await self._hand_over(image)

    async def relocate_cancel(self, volume: VolumeId) -> None:
        async with self._lock:
            await self._gateway.cancel(volume)
            image = await self._image(volume)
            if image is not None and image.host != self._settings.host and volume in self._known:
                raise Conflict(f"'{volume}' is administered by {image.host} already", field="volume")
            if image is not None and images.OFFER in image.metadata:
                await self._note(image, {images.OFFER: None})

    async def relocate_finish(self, volume: VolumeId) -> None:
        async with self._lock:
            door = self._gateway.doors.get(volume)
            image = await self._image(volume)
            if door is not None:
                if not door.completed:
                    raise Refused(f"'{volume}' was not relocated", field="volume")
                await self._gateway.close(volume, hard=False)
                if image is not None:
                    await self._put_away(image)
            elif image is not None and image.host == self._settings.host:
                raise Refused(f"'{volume}' was not relocated", field="volume")
            self._know(self._known - {volume})

    async def rejoin(self, volume: VolumeSpec) -> Changes | None:
        """An image has no copies that nahtlos knows of."""
        return None

    async def step_begin(self, volume: VolumeId, step: str) -> None:
        raise Refused(f"'{volume}' is an image of Ceph: it has no copies here", field="volume")

    async def step_reached(self, volume: VolumeId, step: str) -> None:
        raise Refused(f"'{volume}' is an image of Ceph: it has no copies here", field="volume")

    async def receive(self, volume: VolumeSpec) -> None:
        """An image of this pool that another host administers is not copied: that host hands it over."""
        images.check(volume)
        async with self._lock:
            image = await self._image(volume.id)
            if image is not None and image.host != self._settings.host:
                await self._note(image, {images.OFFER: images.offer(self._settings.host, volume.epoch)})
                return
            if image is None:
                await self._make_blank(volume, {images.RECEIVING: "yes"})
            elif not image.receiving:
                raise Conflict(f"'{volume.id}' is here already", field="volume")
            else:
                await self._rbd.ask("resize", name=volume.id, size=volume.size_mib << 20)
                await self._note(image, {images.EPOCH: str(volume.epoch)})
            self._know(self._known | {volume.id})
            await self._gateway.open(volume.id, volume.epoch)

    # --- backups and files ---------------------------------------------------------------------------

    async def backup(
        self,
        volume: VolumeId,
        backup: BackupSpec,
        base: BackupSpec | None,
        *,
        bytes_per_second: int,
        on_copied: OnCopied,
        on_moment: OnMoment | None = None,
    ) -> BackupResult:
        return await self._backups.backup(
            volume,
            backup,
            base,
            bytes_per_second=bytes_per_second,
            on_copied=on_copied,
            on_moment=on_moment,
        )

    async def backup_forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        await self._backups.forget(volume, backup)

    async def restore(
        self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], *, on_copied: OnCopied
    ) -> None:
        images.check(volume)
        await self._backups.restore(volume, chain, on_copied)

    async def backup_delete(self, backup: BackupSpec) -> None:
        await self._backups.delete(backup)

    async def snapshot_file(
        self,
        snapshot: SnapshotId,
        file: Path,
        form: VolumeFormat,
        *,
        on_copied: OnCopied,
        again: bool = False,
    ) -> FileWritten:
        if not (again and file.exists()):
            node = await self.snapshot_node(snapshot, "snapshot")
            await write_node(await self._gateway.bundle(), node, file, form, on_copied)
        return await in_thread(lambda stop: file_facts(file, stop))

    async def offer_snapshots(self, volume: VolumeId, snapshots: tuple[SnapshotId, ...]) -> SnapshotOffer:
        raise _lacking("offer_snapshots")

    async def end_offer(self, volume: VolumeId) -> None:
        """None is ever made here."""

    async def fetch_snapshots(
        self, fetch: SnapshotFetch, offer: SnapshotOffer, *, speed: Speed, on_copied: OnCopied
    ) -> None:
        raise _lacking("fetch_snapshots")

    async def forget_fetched(self, fetch: SnapshotFetch) -> None:
        """None ever comes here."""

    async def mark(self, volume: VolumeId, epoch: int, problem: str) -> None:
        raise _lacking("mark")

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        return bytes.fromhex(
            msgspec.convert(
                await self._rbd.ask("digest", name=volume, offset=offset, length=length), type=str
            )
        )

    async def serve(self, volume: VolumeSpec) -> None:
        """Over NBD, until a `reconcile` finds that no operation needs it."""
        async with self._lock:
            await self._owned(volume.id)
            await self._gateway.open(volume.id, volume.epoch)

    async def reach_alone(self, attachments: tuple[VolumeAttachment, ...]) -> None:
        await self._reach.alone(attachments)

    # --- beside the port ---------------------------------------------------------------------------

    @property
    def nbd_port(self) -> int:
        return self._ceph.nbd_port

    def holds(self, volume: VolumeId) -> bool:
        return volume in self._known

    def endpoint(self, image: str) -> RbdEndpoint:
        ceph = self._ceph
        return RbdEndpoint(pool=ceph.pool, image=image, user=ceph.user, configuration=str(ceph.configuration))

    async def snapshot_node(self, snapshot: SnapshotId, name: str) -> doors.Options:
        """A read-only block node of it, for a daemon that exports it."""
        image = await self._holder(snapshot)
        return doors.image_node(self._ceph, name, image.name, snapshot)

    # --- volumes -----------------------------------------------------------------------------------

    async def _volume(self, volume: VolumeSpec) -> list[str]:
        image = await self._image(volume.id)
        wanted = images.steps(volume, image, self._settings.host)
        self._know(self._known | {volume.id})
        done: list[str] = []
        if Act.MAKE in wanted:
            await self._make(volume)
            return [f"volume {volume.id} created"]
        assert image is not None
        if Act.FENCE in wanted:
            done += await self._fence(volume)
        elif volume.id in self._gateway.doors and not image.receiving:
            done += await self._close_unused(volume.id)
        if Act.ENLARGE in wanted:
            await self._rbd.ask("resize", name=volume.id, size=volume.size_mib << 20)
            done.append(f"volume {volume.id} enlarged to {volume.size_mib} MiB")
        if Act.NOTE in wanted:
            await self._note(image, images.notes(volume, self._settings.host))
        return done

    async def _close_unused(self, volume: VolumeId) -> list[str]:
        """What has just arrived is still written by its door: whoever has it open is led past it first, and
        may be told to keep it more than once."""
        try:
            await self._gateway.close(volume, hard=False)
        except Conflict:
            return []
        return [f"volume {volume} no longer served over NBD"]

    async def _fence(self, volume: VolumeSpec) -> list[str]:
        await self._gateway.close(volume.id)
        found = await clients.fence(self._rbd, volume.id)
        fenced = [f"volume {volume.id}: {client} shut out" for client in found]
        return [*fenced, f"volume {volume.id} at epoch {volume.epoch}"]

    async def _make(self, volume: VolumeSpec) -> None:
        if volume.snapshot is not None:
            await self._make_clone(volume, volume.snapshot)
        elif volume.image is not None:
            await self._make_filled(volume)
        else:
            await self._make_blank(volume, {})

    async def _make_blank(self, volume: VolumeSpec, extra: dict[str, str | None]) -> None:
        await self._discard_unfinished(volume.id)
        await self._rbd.ask("create", name=NEW + volume.id, size=volume.size_mib << 20)
        await self._appear(volume, extra)

    async def _make_clone(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        parent = await self._holder(snapshot)
        size = next(each.size for each in parent.snapshots if each.name == snapshot)
        _fits(volume, f"snapshot '{snapshot}'", size)
        await self._discard_unfinished(volume.id)
        await self._rbd.ask("clone", parent=parent.name, snapshot=snapshot, name=NEW + volume.id)
        await self._rbd.ask("resize", name=NEW + volume.id, size=volume.size_mib << 20)
        await self._appear(volume, {})

    async def _make_filled(self, volume: VolumeSpec) -> None:
        """The copying goes on while nobody waits for it."""
        path = self._settings.images_dir / f"{volume.image}.raw"
        if not path.is_file():
            raise Refused(
                f"image '{volume.image}' is not on this host", field="image", remedy="build or copy it here"
            )
        _fits(volume, f"image '{volume.image}'", path.stat().st_size)
        key, name = f"fill {volume.id}", NEW + volume.id
        if not self._rbd.goes_on(key):
            await self._discard_unfinished(volume.id)
            await self._rbd.ask("create", name=name, size=volume.size_mib << 20)
        if not await self._rbd.go_on(key, "fill", name=name, path=str(path)):
            raise Unavailable(f"'{volume.id}' is being made: {self._rbd.progress(key):.0%}", field="volume")
        await self._appear(volume, {})

    async def _appear(self, volume: VolumeSpec, extra: dict[str, str | None]) -> None:
        """Under its own name, complete."""
        noted = {**images.notes(volume, self._settings.host), **extra}
        await self._rbd.ask("note", name=NEW + volume.id, metadata=noted)
        try:
            await self._rbd.ask("rename", name=NEW + volume.id, to=volume.id)
        except Exists:
            raise Conflict(f"another host has made '{volume.id}' meanwhile", field="volume") from None

    async def _discard_unfinished(self, volume: VolumeId) -> None:
        await self._rbd.work("bury", name=NEW + volume, zero=False)

    # --- deletion ----------------------------------------------------------------------------------

    async def _delete(self, volume: VolumeId) -> list[str]:
        await self._gateway.close(volume)
        await self._gateway.hide(volume)
        image = await self._image(volume)
        own = image is not None and image.host == self._settings.host
        if image is not None and own:
            await self._put_away(image)
        self._know(self._known - {volume})
        return [f"volume {volume} deleted"] if own else []

    async def _put_away(self, image: ImageFacts) -> None:
        """It is no volume from here on. Its snapshots stay."""
        await clients.fence(self._rbd, image.name)
        await self._rbd.ask("rename", name=image.name, to=images.gone(image))

    async def _remove_snapshot(self, snapshot: SnapshotId) -> list[str]:
        for image in await self._own():
            if snapshot in {each.name for each in image.live_snapshots}:
                await self._rbd.ask("snapshot_remove", name=image.name, snapshot=snapshot)
                await self._note(image, {images.GROUP + snapshot: None})
                return [f"snapshot {snapshot} deleted"]
        return []

    async def _sweep(self) -> list[str]:
        """What was deleted and has no snapshot any more: clones of it come to stand alone, then it goes."""
        for image in await self._gone():
            for moment in image.moments:
                await self._rbd.ask("snapshot_remove", name=image.name, snapshot=moment)
            if not image.live_snapshots:
                await self._rbd.go_on(
                    f"bury {image.name}", "bury", name=image.name, zero=images.zeroed(image)
                )
        return []

    # --- snapshots ---------------------------------------------------------------------------------

    async def _snapshot(self, wanted: SnapshotSpec) -> bool:
        """Whether it was made now."""
        image = await self._owned(wanted.volume)
        if wanted.id in {each.name for each in image.live_snapshots}:
            return False
        await clients.check_answers(self._rbd, image)
        await self._note(image, {images.GROUP + wanted.id: wanted.group or None})
        await self._rbd.ask("snapshot", name=image.name, snapshot=wanted.id)
        return True

    async def _holder(self, snapshot: SnapshotId) -> ImageFacts:
        """The image it is of, whoever administers that."""
        own = await self._own()
        found = next((i for i in own if snapshot in {s.name for s in i.live_snapshots}), None)
        if found is None:
            known = {image.name for image in own}
            others = [name for name in await self._names() if name not in known and not name.startswith(NEW)]
            every = await self._facts(others)
            found = next((i for i in every if snapshot in {s.name for s in i.live_snapshots}), None)
        if found is None:
            raise NotFound(f"there is no snapshot '{snapshot}' in this pool", field="snapshot")
        return found

    # --- relocation --------------------------------------------------------------------------------

    def _taken_over(self, image: ImageFacts, target: VolumeEndpoint) -> bool:
        """Whether the other side is of this pool too: nothing is to be copied."""
        offered = image.metadata.get(images.OFFER, "")
        return offered.partition(" ")[2] == target.host

    async def _hand_over(self, image: ImageFacts) -> None:
        epoch, _, host = image.metadata.get(images.OFFER, "").partition(" ")
        if not host:
            raise Refused(f"no host takes over '{image.name}'", field="volume")
        await self._note(image, {images.EPOCH: epoch, images.HOST: host, images.OFFER: None})

    async def _no_others(self, volume: VolumeId) -> None:
        """The gateway's own connection is the only one: what others write would not be copied. One that does
        not answer may be the gateway's earlier self, which died: Unavailable, it is asked again."""
        image = await self._owned(volume)
        if len(image.clients) > 1:
            await clients.check_answers(self._rbd, image)
            image = await self._owned(volume)  # one that died may have been given up while it was asked
        if len(image.clients) > 1:
            raise Conflict(
                f"'{image.name}' is still open at {', '.join(image.clients)}",
                field="volume",
                remedy="let its server reach it by this host first",
            )

    # --- facts -------------------------------------------------------------------------------------

    async def _image(self, name: str) -> ImageFacts | None:
        return images.facts_of(await self._rbd.ask("facts", name=name))

    async def _owned(self, volume: VolumeId) -> ImageFacts:
        image = await self._image(volume)
        if image is None or image.host != self._settings.host:
            raise NotFound(f"volume '{volume}' is not administered by this host", field="volume")
        return image

    async def _facts(self, names: Iterable[str]) -> list[ImageFacts]:
        found = await asyncio.gather(*(self._image(name) for name in sorted(names)))
        return [image for image in found if image is not None]

    async def _names(self) -> list[str]:
        return msgspec.convert(await self._rbd.ask("names"), type=list[str])

    async def _gone(self) -> list[ImageFacts]:
        if not self._file.exists():
            return []
        names = [name for name in await self._names() if name.startswith(GONE)]
        return [image for image in await self._facts(names) if image.host == self._settings.host]

    async def _own(self) -> list[ImageFacts]:
        """Volumes of this host, and what is left of deleted ones."""
        volumes = [i for i in await self._facts(self._known) if i.host == self._settings.host]
        return [*volumes, *await self._gone()]

    async def _note(self, image: ImageFacts, wanted: dict[str, str | None]) -> None:
        changed = images.changed_notes(image, wanted)
        if changed:
            await self._rbd.ask("note", name=image.name, metadata=changed)

    @property
    def _known(self) -> frozenset[VolumeId]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=frozenset[VolumeId])
        except FileNotFoundError:
            return frozenset()

    def _know(self, volumes: frozenset[VolumeId]) -> None:
        if volumes != self._known or not self._file.exists():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._file, msgspec.json.encode(sorted(volumes)), mode=0o600)


def _fits(volume: VolumeSpec, what: str, size: int) -> None:
    if size > volume.size_mib << 20:
        raise Refused(
            f"{what} needs {-(-size >> 20)} MiB, '{volume.id}' has {volume.size_mib}",
            field="size_mib",
            remedy="ask for a larger volume",
        )


def _lacking(verb: str) -> Refused:
    return Refused(f"volumes in Ceph have no {verb}", field="backend", remedy="relocate it to a host first")
