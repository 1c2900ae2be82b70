"""Backups and restores of this host's volumes, whole or what changed since an earlier one.

    open a moment (`points`) -> copy what its map says to the target -> manifest -> close the moment;
    changes are followed from here, and no longer from the base

Nothing is followed less before a backup is whole: one that failed or was killed is repeated from the same
changes, of the same moment while the storage daemon still has it. Changes that are not known make it a full
one, and it says so. The guest never waits for a target.
"""

import asyncio
import hashlib
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import BackupId, HostId, VolumeId
from nahtlos.model.storage import BackupSpec, VolumeSpec
from nahtlos.physical.hypervisor.bundle import Bundle
from nahtlos.physical.ports import BackupResult, OnCopied, OnMoment
from nahtlos.physical.storage import encryption, graph, points
from nahtlos.physical.storage.backup_targets import (
    BackupManifest,
    Range,
    Target,
    checked_chain,
    packed,
    target_of,
    unpacked,
)
from nahtlos.physical.storage.daemon import Daemon
from nahtlos.physical.storage.graph import Places
from nahtlos.physical.storage.nbd import ALLOCATION, DIRTY, LONGEST_REQUEST, ZERO, Address, NbdClient
from nahtlos.physical.storage.points import Aside, Point, Points
from nahtlos.physical.storage.record import Mode, Records, VolumeRecord
from nahtlos.wire.tls import client_context, host_party

T = TypeVar("T")


class Ended(Exception):
    """Whoever waited for a copy has gone."""


class OwnDoor(msgspec.Struct, frozen=True, kw_only=True):
    """How this host reaches its own storage daemon as other hosts do."""

    host: HostId
    address: str
    port: int
    pki_dir: Path

    def client(self, export: str, *contexts: str) -> NbdClient:
        return NbdClient(
            Address(self.address, self.port, export),
            tls=client_context(self.pki_dir),
            expect=host_party(self.host),
            contexts=contexts,
        )


class Backups:
    def __init__(self, daemon: Daemon, records: Records, places: Places, door: OwnDoor) -> None:
        self.points = Points(daemon)
        self._daemon = daemon
        self._records = records
        self._places = places
        self._door = door

    # --- moments, for who reads by himself -----------------------------------------------------------

    async def open_point(
        self, bundle: Bundle, volume: VolumeId, moment: str, *, since: str | None, follow: float | None = None
    ) -> Point:
        """The volume as it is now, exported for hosts under `Point.export` until `close_point`."""
        record = self._serving(volume)
        aside = self._aside(record)
        if points.export_name(volume, moment) not in await self.points.open_ones():
            await self.points.close_point(volume, aside)
            await self._make_aside(bundle, record, aside)
        return await self.points.open_point(volume, moment, aside, since=since, follow=follow)

    async def close_point(self, volume: VolumeId) -> None:
        record = self._records.get(volume)
        if record is not None:
            await self.points.close_point(volume, self._aside(record))

    # --- backups -----------------------------------------------------------------------------------

    async def backup(
        self,
        bundle: Bundle,
        volume: VolumeId,
        backup: BackupSpec,
        base: BackupSpec | None,
        *,
        bytes_per_second: int,
        on_copied: OnCopied,
        on_moment: OnMoment | None = None,
    ) -> BackupResult:
        async def begin(since: BackupId | None) -> Moment:
            point = await self.open_point(bundle, volume, backup.id, since=since, follow=time.time())
            return Moment(
                export=point.export,
                size=self._records[volume].size,
                context=point.changes or ALLOCATION,
                held=partial(_held, changes=point.changes),
                since=since if point.changes is not None else None,
                why=point.why,
            )

        async def settle(manifest: BackupManifest) -> None:
            await self._settle(volume, manifest)

        return await make_backup(
            Making(self._door, begin, settle, on_copied, on_moment),
            backup,
            base,
            Pace(bytes_per_second),
        )

    async def forget(self, volume: VolumeId, backup: BackupSpec) -> None:
        """A backup that is not to be: changes since its base are followed as before."""
        record = self._records.get(volume)
        if record is not None and await self._daemon.pid() is not None:
            await self.points.close_point(volume, self._aside(record))
            await self.points.unfollow(volume, backup.id)
        await discard_at_target(backup, self._door.pki_dir)

    async def delete(self, backup: BackupSpec) -> None:
        """It is not at its target any more, and changes since it are followed no longer."""
        record = self._records.get(backup.volume)
        if record is not None and await self._daemon.pid() is not None:
            with suppress(Error):  # it would only be followed for nothing
                await self.points.unfollow(backup.volume, backup.id)
        await remove_from_target(backup, self._door.pki_dir)

    async def _settle(self, volume: VolumeId, manifest: BackupManifest) -> None:
        await self.close_point(volume)
        if manifest.base is not None:
            await self.points.unfollow(volume, manifest.base)

    async def restore(self, volume: VolumeSpec, chain: tuple[BackupSpec, ...], on_copied: OnCopied) -> None:
        await restore_chain(self._door, volume, chain, on_copied)

    # --- what is copied aside ------------------------------------------------------------------------

    def _serving(self, volume: VolumeId) -> VolumeRecord:
        record = self._records[volume]
        if not graph.served(record) or record.mode is not Mode.SERVING:
            raise Unavailable(f"volume '{volume}' is not served by this host", field="volume")
        return record

    def _aside(self, record: VolumeRecord) -> Aside:
        path = self._places.volumes / f".aside-{record.volume}"
        nodes = points.aside_nodes(record.volume, path, record.active_layer.encryption_key)
        return Aside(path=path, nodes=nodes)

    async def _make_aside(self, bundle: Bundle, record: VolumeRecord, aside: Aside) -> None:
        key = record.active_layer.encryption_key
        if key is None:
            await asyncio.to_thread(points.make_aside, aside.path, record.size)
        else:
            file = self._places.key_file(key)
            await encryption.make_container(bundle, aside.path, record.size, file)


# --- what is the same for every kind of volume -------------------------------------------------------


class Moment(NamedTuple):
    """A volume as it was at one moment, served by this host."""

    export: str
    size: int
    context: str
    """Asked for when it is opened."""
    held: Callable[[NbdClient], Iterable[Range]]
    """What of it is to be in the backup."""
    since: BackupId | None
    """It is only what changed since then; None: everything."""
    why: str
    """… although changes were asked for."""


class Making(NamedTuple):
    """How a backup comes about."""

    door: OwnDoor
    begin: Callable[[BackupId | None], Awaitable[Moment]]
    """Said again, it is the same moment. Given: what changes are wanted since."""
    settle: Callable[[BackupManifest], Awaitable[None]]
    """The backup is whole: its moment is needed no more, and changes are followed from it."""
    on_copied: OnCopied
    on_moment: OnMoment | None


async def make_backup(
    making: Making, backup: BackupSpec, base: BackupSpec | None, pace: "Pace"
) -> BackupResult:
    target = target_of(backup, making.door.pki_dir)
    try:
        held = await asyncio.to_thread(target.manifest)
        if held is not None and (held.volume, held.created_at) == (backup.volume, backup.created_at):
            await making.settle(held)
            return BackupResult(base=held.base, stored_bytes=held.stored_bytes)
        below = await _base_manifest(base, backup.volume, making.door.pki_dir)
        moment = await making.begin(base.id if base and below else None)
        if making.on_moment is not None:
            await making.on_moment()
        rests = below if moment.since is not None else None
        manifest = await in_thread(lambda stop: _copy(stop, making, moment, backup, rests, target, pace))
        await making.settle(manifest)
    finally:
        await asyncio.to_thread(target.close)
    why = moment.why or (f"{base.id} is not at {base.target}" if base and not below else "")
    return BackupResult(
        base=manifest.base, stored_bytes=manifest.stored_bytes, why_full="" if manifest.base else why
    )


async def _base_manifest(base: BackupSpec | None, volume: VolumeId, pki_dir: Path) -> BackupManifest | None:
    """None: it cannot be rested on."""
    if base is None:
        return None
    target = target_of(base, pki_dir)
    try:
        found = await asyncio.to_thread(target.manifest)
    except Error:
        return None
    finally:
        await asyncio.to_thread(target.close)
    return found if found is not None and (found.backup, found.volume) == (base.id, volume) else None


def _copy(
    stop: threading.Event,
    making: Making,
    moment: Moment,
    backup: BackupSpec,
    base: BackupManifest | None,
    target: Target,
    pace: "Pace",
) -> BackupManifest:
    digest = hashlib.sha256()
    with making.door.client(moment.export, moment.context) as source:
        text = packed(moment.held(source), moment.size)
        ranges = tuple(unpacked(text, moment.size))
        total = sum(each.length for each in ranges)
        target.begin(moment.size)
        done = 0
        for offset, length in pieces(ranges):
            if stop.is_set():
                raise Ended
            data = source.read(offset, length)
            digest.update(data)
            if any(data):
                target.write(offset, data)
            else:
                target.zero(offset, length)
            done += length
            making.on_copied(done, total)
            pace.wait(length, stop)
    if stop.is_set():
        raise Ended
    manifest = BackupManifest(
        backup=backup.id,
        volume=backup.volume,
        base=base.backup if base else None,
        base_sha256=base.digest() if base else "",
        created_at=backup.created_at,
        size=moment.size,
        map=text,
        sha256=digest.hexdigest(),
        stored_bytes=total,
    )
    target.finish(manifest)
    return manifest


async def discard_at_target(backup: BackupSpec, pki_dir: Path) -> None:
    """As far as it can be reached; what is left counts for nothing."""
    target = target_of(backup, pki_dir)
    with suppress(Error):
        await asyncio.to_thread(target.discard, backup.created_at)
    await asyncio.to_thread(target.close)


async def remove_from_target(backup: BackupSpec, pki_dir: Path) -> None:
    target = target_of(backup, pki_dir)
    try:
        await asyncio.to_thread(target.remove, backup.volume)
    finally:
        await asyncio.to_thread(target.close)


async def restore_chain(
    door: OwnDoor, volume: VolumeSpec, chain: tuple[BackupSpec, ...], on_copied: OnCopied
) -> None:
    """Into a blank volume that is served at `door` by `volume.epoch`. Repeatable. Refused where a chain has a
    gap, holds something else than it says, or does not fit."""
    targets = [target_of(each, door.pki_dir) for each in chain]
    try:
        manifests = await asyncio.to_thread(_manifests, chain, targets)
        ordered = checked_chain(manifests)
        places = {manifest.backup: target for manifest, target in zip(manifests, targets, strict=True)}
        needed = ordered[-1].size
        if needed > volume.size_mib << 20:
            raise Refused(
                f"the backup needs {-(-needed >> 20)} MiB, '{volume.id}' has {volume.size_mib}",
                field="size_mib",
                remedy="ask for a larger volume",
            )
        await in_thread(lambda stop: _apply(stop, door, volume, ordered, places, on_copied))
    finally:
        for target in targets:
            await asyncio.to_thread(target.close)


def _apply(
    stop: threading.Event,
    door: OwnDoor,
    volume: VolumeSpec,
    manifests: tuple[BackupManifest, ...],
    places: dict[BackupId, Target],
    on_copied: OnCopied,
) -> None:
    total, done = sum(manifest.stored_bytes for manifest in manifests), 0
    with door.client(volume.export) as written:
        for manifest in manifests:
            digest = hashlib.sha256()
            for offset, length in pieces(manifest.ranges()):
                if stop.is_set():
                    raise Ended
                data = places[manifest.backup].read(offset, length)
                digest.update(data)
                if any(data):
                    written.write(offset, data)
                else:
                    written.zero(offset, length)
                done += length
                on_copied(done, total)
            if digest.hexdigest() != manifest.sha256:
                raise Refused(
                    f"backup '{manifest.backup}' is damaged: it does not hold what it was made of",
                    field="backup",
                    remedy="restore from another backup",
                )
        written.flush()


class Pace:
    """Not more than so many bytes per second; 0: no limit."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._ahead_of = time.monotonic()

    def wait(self, length: int, stop: threading.Event) -> None:
        if self._rate <= 0:
            return
        self._ahead_of = max(self._ahead_of, time.monotonic() - 0.1) + length / self._rate
        if (left := self._ahead_of - time.monotonic()) > 0:
            stop.wait(left)


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Cancelled, it tells the thread, and waits until that has let go of everything."""
    stop = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait((running,))
        if not running.cancelled():
            running.exception()
        raise


def _held(source: NbdClient, *, changes: str | None) -> Iterator[Range]:
    for extent in source.extents(changes or ALLOCATION):
        if (not extent.flags & ZERO) if changes is None else extent.flags & DIRTY:
            yield Range(extent.offset, extent.length)


def pieces(ranges: Iterable[Range]) -> Iterator[tuple[int, int]]:
    """In requests' sizes."""
    for each in ranges:
        for offset in range(each.offset, each.offset + each.length, LONGEST_REQUEST):
            yield offset, min(LONGEST_REQUEST, each.offset + each.length - offset)


def _manifests(chain: tuple[BackupSpec, ...], targets: list[Target]) -> list[BackupManifest]:
    found: list[BackupManifest] = []
    for backup, target in zip(chain, targets, strict=True):
        manifest = target.manifest()
        if manifest is None or manifest.backup != backup.id:
            raise Refused(
                f"there is no whole backup '{backup.id}' at {backup.target}",
                field="chain",
                remedy="name one that was ended",
            )
        found.append(manifest)
    return found
