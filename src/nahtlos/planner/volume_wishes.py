"""From what is wished to what is decided: the copy it begins from, where it goes, who coordinates, the epoch
of what comes. Says why, where that cannot be told yet. Whether it may begin now is not asked here."""

from typing import NamedTuple

import msgspec

from nahtlos.model.blueprint import WaitKind
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.server_snapshots import MEMORY_SNAPSHOTS, MemoryOf
from nahtlos.model.storage import ReplicaState, StorageBackend, VolumeSpec
from nahtlos.model.volume_work import (
    BackingUp,
    DeletingBackup,
    Rebuilding,
    Relocation,
    Restoring,
    Reverting,
    Scrubbing,
    SnapshotGroup,
    SnapshotMove,
    VolumeWork,
    WritingFile,
    words,
)
from nahtlos.planner.draft import Draft
from nahtlos.planner.volume_places import places


class Decided(NamedTuple):
    work: VolumeWork
    """With nothing left open."""
    coordinator: HostId
    hosts: tuple[HostId, ...]
    reason: str
    wish: str = ""
    epoch: int = 0
    losses: int = 0


class Unready(NamedTuple):
    work: VolumeWork
    kind: WaitKind
    reason: str
    remedy: str = ""


def decided(draft: Draft, work: VolumeWork, reason: str, wish: str = "") -> Decided | Unready:
    match work:
        case Relocation():
            found = _relocation(draft, work)
        case Rebuilding():
            found = _rebuilding(draft, work)
        case SnapshotGroup():
            found = _snapshot(draft, work)
        case Reverting():
            found = _revert(draft, work)
        case BackingUp():
            found = _backup(draft, work)
        case SnapshotMove():
            found = _snapshot_move(draft, work)
        case Restoring():
            found = Decided(work, work.volume.host, (work.volume.host,), "")
        case Scrubbing():
            found = _scrub(draft, work)
        case WritingFile():
            found = _file(draft, work)
        case DeletingBackup():
            found = _backup_deletion(draft, work)
    return found if isinstance(found, Unready) else found._replace(reason=reason, wish=wish)


def _gone(work: VolumeWork, volume: VolumeId) -> Unready:
    return Unready(work, WaitKind.OPERATOR, f"to {words(work)}: there is no {volume} any more", "cancel it")


def _losses(draft: Draft, volume: VolumeId, host: HostId) -> int:
    return draft.policy.copy_losses.get(volume, {}).get(host, 0)


# --- copies ------------------------------------------------------------------------------------------


def _relocation(draft: Draft, work: Relocation) -> Decided | Unready:
    volume = draft.policy.volumes.get(work.volume)
    if volume is None:
        return _gone(work, work.volume)
    source = work.source or volume.host
    if all(copy.host != source for copy in volume.copies):
        text = f"{work.volume} has no copy on {source}"
        return Unready(work, WaitKind.OPERATOR, text, "cancel it, and ask for one it has")
    if source not in volume.current:
        text = f"the copy of {work.volume} on {source} is stale, so it is rebuilt before it goes elsewhere"
        return Unready(work, WaitKind.MOVE, text)
    destination = _destination(draft, work, volume, source)
    if isinstance(destination, Unready):
        return destination
    whole = msgspec.structs.replace(
        work, source=source, destination=destination, format=work.format or volume.format
    )
    return Decided(
        whole,
        source,
        tuple(dict.fromkeys((source, destination))),
        "",
        epoch=volume.newest_epoch + 1,
        losses=_losses(draft, work.volume, destination),
    )


def _destination(draft: Draft, work: Relocation, volume: VolumeSpec, source: HostId) -> HostId | Unready:
    """Whoever coordinates an image of Ceph's administers it from then on."""
    others = [copy.host for copy in volume.copies if copy.host != source]
    changes = volume.backend is not work.backend or work.format not in (None, volume.format)
    if work.backend is StorageBackend.CEPH:
        if volume.backend is StorageBackend.CEPH:
            return Unready(work, WaitKind.OPERATOR, f"{work.volume} is in Ceph already", "cancel it")
        return source
    if work.destination is not None:
        if work.destination in others or (work.destination == source and not changes):
            text = f"{work.destination} has a copy of {work.volume} already"
            return Unready(work, WaitKind.OPERATOR, text, "cancel it, and name another host")
        return work.destination
    found = places(
        draft.policy,
        draft.observed.inventory,
        size_mib=volume.size_mib,
        beside=others,
        without=() if volume.backend is StorageBackend.CEPH else (source,),
        near=_server_host(draft, work.volume),
        coming=_coming(draft),
    )
    if not found:
        text = f"no host could take the copy of {work.volume} from {source} ({volume.size_mib} MiB)"
        return Unready(work, WaitKind.CAPACITY, text, "activate or add a host, or free space on one")
    return found[0]


def _server_host(draft: Draft, volume: VolumeId) -> HostId | None:
    server = next((s for s, spec in draft.policy.servers.items() if volume in spec.all_volumes), None)
    owner = draft.servers.get(server) if server is not None else None
    return owner.host if owner is not None else None


def _coming(draft: Draft) -> dict[HostId, int]:
    """MiB on their way to each host."""
    coming: dict[HostId, int] = {}
    for task in draft.volume_tasks.values():
        work = task.work
        to = work.destination if isinstance(work, Relocation) else None
        volume = draft.policy.volumes.get(work.volume) if isinstance(work, Relocation) else None
        if to is not None and volume is not None:
            coming[to] = coming.get(to, 0) + volume.size_mib
    return coming


def _rebuilding(draft: Draft, work: Rebuilding) -> Decided | Unready:
    volume = draft.policy.volumes.get(work.volume)
    if volume is None:
        return _gone(work, work.volume)
    return Decided(
        work,
        work.source,
        (work.source, work.target),
        "",
        epoch=volume.newest_epoch + 1,
        losses=_losses(draft, work.volume, work.target),
    )


# --- snapshots and backups ---------------------------------------------------------------------------


def _snapshot(draft: Draft, work: SnapshotGroup) -> Decided | Unready:
    """On every host with a current copy. One that is stale, or whose host is away, would lack it."""
    whole = work
    hosts: list[HostId] = []
    for number, snapshot in enumerate(work.snapshots):
        volume = draft.policy.volumes.get(snapshot.volume)
        if volume is None:
            return _gone(work, snapshot.volume)
        where = (volume.host,) if volume.backend is StorageBackend.CEPH else volume.current
        full = msgspec.structs.replace(snapshot, hosts=where, size_mib=volume.size_mib)
        others = (*whole.snapshots[:number], full, *whole.snapshots[number + 1 :])
        whole = msgspec.structs.replace(whole, snapshots=others)
        hosts += where
    if work.memory is not None:
        return _with_memory(draft, whole, work.memory, hosts)
    return Decided(whole, hosts[0], tuple(dict.fromkeys(hosts)), "")


def _with_memory(
    draft: Draft, work: SnapshotGroup, memory: MemoryOf, hosts: list[HostId]
) -> Decided | Unready:
    """Its own host's agent coordinates: it alone speaks to its VMM."""
    kept, owner = draft.policy.volumes.get(memory.volume), draft.servers.get(memory.server)
    if kept is None or memory.server not in draft.policy.servers:
        return _gone(work, memory.volume)
    seen = draft.observed.host(owner.host) if owner is not None else None
    if owner is None or memory.server in draft.off or seen is None:
        text = f"{memory.server} is snapshot with its memory once it runs"
        return Unready(work, WaitKind.MOVE, text, "start it, or cancel it")
    if MEMORY_SNAPSHOTS not in seen.knows:
        text = f"the agent of {owner.host} is of a release that saves no memory of servers that run"
        return Unready(work, WaitKind.HOST, text, f"upgrade it, or move {memory.server} to a later one")
    everybody = dict.fromkeys((owner.host, *hosts, *kept.current))
    return Decided(work, owner.host, tuple(everybody), "")


def _revert(draft: Draft, work: Reverting) -> Decided | Unready:
    volume, snapshot = draft.policy.volumes.get(work.volume), draft.policy.snapshots.get(work.snapshot)
    if volume is None or snapshot is None:
        return _gone(work, work.volume)
    able = [c.host for c in volume.copies if c.host in snapshot.hosts and c.state is ReplicaState.CURRENT]
    if not able:
        text = f"no current copy of {work.volume} is where {work.snapshot} is kept"
        return Unready(work, WaitKind.OPERATOR, text, "cancel it, and clone the snapshot instead")
    server = next((s for s, spec in draft.policy.servers.items() if work.volume in spec.all_volumes), None)
    if server is not None and (server not in draft.off or server in draft.saved):
        text = f"{work.volume} is reverted once {server} is stopped"
        return Unready(work, WaitKind.MOVE, text, f"nahtlos server stop {server}, or cancel it")
    return Decided(work, able[0], (able[0],), "", epoch=volume.newest_epoch + 1)


def _snapshot_move(draft: Draft, work: SnapshotMove) -> Decided | Unready:
    for name in work.snapshots:
        spec = draft.policy.snapshots.get(name)
        if spec is None or work.source not in spec.hosts or work.destination in spec.hosts:
            text = f"{work.source} does not keep {name} any more, or {work.destination} does already"
            return Unready(work, WaitKind.OPERATOR, text, "cancel it")
    return Decided(work, work.destination, (work.source, work.destination), "")


def _backup(draft: Draft, work: BackingUp) -> Decided | Unready:
    volume = draft.policy.volumes.get(work.backup.volume)
    if volume is None:
        return _gone(work, work.backup.volume)
    if not volume.current:
        return Unready(work, WaitKind.BLOCKED, f"no copy of {volume.id} is current")
    host = _where_base_was_made(work, volume)
    told = msgspec.structs.replace(work.backup, size_mib=volume.size_mib, host=host)
    return Decided(msgspec.structs.replace(work, backup=told), host, (host,), "")


def _where_base_was_made(work: BackingUp, volume: VolumeSpec) -> HostId:
    """There it is known what has changed since."""
    base = work.base.host if work.base is not None else volume.host
    return base if base in volume.current else volume.current[0]


def _scrub(draft: Draft, work: Scrubbing) -> Decided | Unready:
    """Of all current copies. One that is stale is rebuilt, and so compared with another scrub."""
    volume = draft.policy.volumes.get(work.volume)
    if volume is None:
        return _gone(work, work.volume)
    if not volume.current:
        return Unready(work, WaitKind.BLOCKED, f"no copy of {volume.id} is current")
    return Decided(work, volume.current[0], volume.current, "")


def _file(draft: Draft, work: WritingFile) -> Decided | Unready:
    snapshot = draft.policy.snapshots.get(work.snapshot)
    if snapshot is None or work.volume not in draft.policy.volumes:
        text = f"to {words(work)}: there is no {work.snapshot} any more"
        return Unready(work, WaitKind.OPERATOR, text, "cancel it")
    if work.host is not None and work.host not in snapshot.hosts:
        text = f"{work.snapshot} is not kept on {work.host}"
        return Unready(work, WaitKind.OPERATOR, text, "cancel it, and name another host")
    near = [host for host in snapshot.hosts if draft.observed.connected(host)]
    host = work.host or next(iter(near or snapshot.hosts))
    return Decided(msgspec.structs.replace(work, host=host), host, (host,), "")


def _backup_deletion(draft: Draft, work: DeletingBackup) -> Decided | Unready:
    """By whoever made it: its folder is there. What is at an address can be taken away from everywhere."""
    host = work.backup.host
    if host in draft.policy.hosts and (work.backup.target.startswith("/") or draft.observed.connected(host)):
        return Decided(work, host, (host,), "")
    there = [name for name in sorted(draft.policy.hosts) if draft.observed.connected(name)]
    if work.backup.target.startswith("/") or not there:
        text = f"to {words(work)}: {host or 'its host'} is no host of this cloud any more"
        return Unready(work, WaitKind.OPERATOR, text, f"nahtlos backup delete {work.backup.id} --keep-files")
    return Decided(work, there[0], (there[0],), "")
