"""Whether snapshots and backups can be made, shown and deleted as they are asked for. Pure; every refusal
names the field and the remedy."""

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import BackupId, HostId, SnapshotId, VolumeId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.power import PowerState
from nahtlos.model.snapshot_places import backend_of
from nahtlos.model.storage import (
    BackupSpec,
    SnapshotExport,
    SnapshotSpec,
    StorageBackend,
    VolumeSpec,
)
from nahtlos.model.volume_work import (
    BackingUp,
    DeletingBackup,
    Restoring,
    Reverting,
    SnapshotGroup,
    SnapshotMove,
    VolumeWish,
    WritingFile,
)
from nahtlos.planner.volume_places import has_room, places
from nahtlos.runtime.controllers.guest_requests import check_freezable
from nahtlos.runtime.controllers.known_volumes import check_idle, check_name_free, holder_of, known_volume
from nahtlos.runtime.controllers.network_requests import checked_project, in_use
from nahtlos.runtime.controllers.requests import compute_host, listed
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_homes import (
    administering,
    check_ceph,
    check_ceph_keeps,
    no_place,
)
from nahtlos.runtime.controllers.volume_records import EXPORT_PORTS
from nahtlos.runtime.controllers.volumes import (
    BackupRequest,
    ExportRequest,
    RestoreRequest,
    SnapshotRequest,
    TargetRequest,
)

EXPORT_SECONDS = (10, 7 * 86400)
MAX_GROUP = 32
SECURED, PLAIN = "nbds://", "nbd://"


# --- snapshots ---------------------------------------------------------------------------------------


def known_snapshot(state: State, snapshot: SnapshotId, field: str = "snapshot") -> SnapshotSpec:
    row = state.kept.snapshots.get(snapshot)
    if row is None:
        known = (name for name, each in state.kept.snapshots.items() if not each.removed)
        raise NotFound(f"no snapshot '{snapshot}'", field=field, remedy=f"snapshots: {listed(known)}")
    if row.removed:
        raise Conflict(f"{snapshot} is being deleted", field=field, remedy="wait until it is gone")
    return row.spec


def snapshot_group(state: State, inventory: Inventory, request: SnapshotRequest) -> SnapshotGroup:
    group = checked_name(request.name, "name")
    if not request.volumes:
        raise Refused("of no volume", field="volumes", remedy="name one or several")
    if len(set(request.volumes)) != len(request.volumes):
        raise Refused("one volume twice", field="volumes", remedy="name each once")
    if len(request.volumes) > MAX_GROUP:
        raise Refused(
            f"{len(request.volumes)} volumes at one moment", field="volumes", remedy=f"at most {MAX_GROUP}"
        )
    backends = {known_volume(state, volume, "volumes").backend for volume in request.volumes}
    if len(backends) > 1:
        raise Refused("volumes of hosts and of Ceph at one moment", field="volumes", remedy="take two groups")
    several = len(request.volumes) > 1
    snapshots: list[SnapshotSpec] = []
    for volume in request.volumes:
        name = f"{group}-{volume}" if several else group
        checked_name(name, "name")
        check_name_free(state, name, "snapshot")
        snapshots.append(SnapshotSpec(id=SnapshotId(name), volume=volume, group=group if several else ""))
    check_freezable(state, inventory, request.volumes, request.consistency)
    return SnapshotGroup(group=group, snapshots=tuple(snapshots), consistency=request.consistency)


def clones_of(state: State, snapshot: SnapshotSpec) -> tuple[VolumeId, ...]:
    """Volumes that rest on it: made from it, and still where it is kept."""
    return tuple(
        name
        for name, row in state.volumes.items()
        if row.spec.snapshot == snapshot.id and any(c.host in snapshot.hosts for c in row.spec.copies)
    )


def check_snapshot_deletable(state: State, snapshot: SnapshotId) -> SnapshotSpec:
    spec = known_snapshot(state, snapshot)
    in_use(
        f"snapshot {snapshot}",
        (f"volume {name}" for name in clones_of(state, spec)),
        "snapshot",
        "delete these clones, or relocate them, which makes them whole: nahtlos volume relocate",
    )
    for wish in state.kept.wishes:
        used = isinstance(wish.work, Reverting | WritingFile) and wish.work.snapshot == snapshot
        if used or (isinstance(wish.work, SnapshotMove) and snapshot in wish.work.snapshots):
            check_idle(state, spec.volume)
    return spec


def reverting(
    state: State, inventory: Inventory, volume: VolumeId, snapshot: SnapshotId, *, stop: bool = False
) -> Reverting:
    """A server that has it must be stopped, or be stopped for that (`stop`)."""
    held = known_volume(state, volume)
    spec = known_snapshot(state, snapshot)
    if spec.volume != volume:
        raise Refused(
            f"{snapshot} is of {spec.volume}, not of {volume}",
            field="snapshot",
            remedy=f"nahtlos snapshot list --volume {volume}",
        )
    if backend_of(spec, inventory, held) is not held.backend:
        raise Conflict(
            f"{volume} has gone elsewhere since, and left {snapshot} where it was",
            field="snapshot",
            remedy=f"clone it: nahtlos snapshot clone {snapshot} NAME",
        )
    holder = holder_of(state, volume)
    power = state.servers[holder].spec.power.state if holder is not None else PowerState.OFF
    if holder is not None and power is PowerState.SUSPENDED:
        raise Conflict(
            f"{holder}, which has {volume}, is suspended, and remembers what is on it",
            field="volume",
            remedy=f"nahtlos server resume {holder} first",
        )
    if holder is not None and power is PowerState.ON and not stop:
        raise Conflict(
            f"{volume} is attached to {holder}, which would see it change under itself",
            field="volume",
            remedy=f"let it be stopped for that: nahtlos volume revert {volume} {snapshot} --stop; or clone "
            f"the snapshot: nahtlos snapshot clone {snapshot} NAME",
        )
    if held.backend is StorageBackend.EMBEDDED and held.current and not set(held.current) & set(spec.hosts):
        raise Conflict(
            f"{snapshot} is kept on {listed(spec.hosts)}, where {volume} has no current copy",
            field="snapshot",
            remedy=f"nahtlos snapshot move {snapshot} --to {held.current[0]} first",
        )
    if holder is not None and (back := state.servers[holder].spec.going_back) is not None:
        raise Conflict(
            f"{holder}, which has {volume}, goes back to snapshot {back.snapshot}",
            field="volume",
            remedy="wait until it runs",
        )
    check_idle(state, volume)
    return Reverting(volume=volume, snapshot=snapshot)


def new_export(
    state: State,
    inventory: Inventory,
    snapshot: SnapshotId,
    request: ExportRequest,
    *,
    identity: str,
    key_hex: str,
) -> SnapshotExport:
    spec = known_snapshot(state, snapshot)
    least, most = EXPORT_SECONDS
    if not least <= request.seconds <= most:
        raise Refused(
            f"for {request.seconds} s", field="seconds", remedy=f"give {least} s to {most // 86400} days"
        )
    hosts = [host for host in spec.hosts if host in inventory.connected] or [
        host for host in spec.hosts if host in state.hosts
    ]
    if not hosts:
        raise Conflict(f"no host of {snapshot} is there", field="snapshot", remedy="bring one back")
    used = {export.port for export in state.kept.exports if export.host == hosts[0]}
    port = next((p for p in range(EXPORT_PORTS[0], EXPORT_PORTS[1] + 1) if p not in used), None)
    if port is None:
        raise Conflict(
            f"{hosts[0]} serves {len(used)} exports",
            field="snapshot",
            remedy="withdraw some: nahtlos snapshot unexport",
        )
    return SnapshotExport(
        id=identity,
        snapshot=snapshot,
        host=hosts[0],
        port=port,
        expires_at=state.now + request.seconds,
        key_hex=key_hex,
    )


def export_uri(state: State, export: SnapshotExport) -> str:
    """As NBD clients take it; the file with the credential is theirs to name."""
    row = state.hosts.get(export.host)
    address = row.spec.address if row is not None else export.host
    return f"nbds://{export.id}@{address}:{export.port}/{export.snapshot}"


# --- backups -----------------------------------------------------------------------------------------


def known_backup(state: State, backup: BackupId, field: str = "backup") -> BackupSpec:
    spec = state.kept.backups.get(backup)
    if spec is None:
        known = listed(state.kept.backups)
        raise NotFound(f"no backup '{backup}'", field=field, remedy=f"backups: {known}")
    return spec


def deletions_of(state: State, backup: BackupId) -> tuple[VolumeWish, ...]:
    """Wishes that it be deleted."""
    wishes = state.kept.wishes
    return tuple(w for w in wishes if isinstance(w.work, DeletingBackup) and w.work.backup.id == backup)


def is_being_deleted(state: State, backup: BackupId) -> bool:
    return any(not wish.cancelled for wish in deletions_of(state, backup))


def _lasting(state: State, backup: BackupId) -> BackupSpec:
    spec = known_backup(state, backup)
    if is_being_deleted(state, backup):
        raise Conflict(f"{backup} is being deleted", field="backup", remedy="choose another backup")
    return spec


def rested_on_by(state: State, backup: BackupId) -> tuple[BackupId, ...]:
    return tuple(name for name, spec in state.kept.backups.items() if spec.base == backup)


def backing_up(state: State, inventory: Inventory, request: BackupRequest) -> BackingUp:
    name = BackupId(checked_name(request.name, "name"))
    check_name_free(state, name, "backup")
    parent = known_volume(state, request.volume)
    if request.bytes_per_second < 0:
        raise Refused(
            f"{request.bytes_per_second} bytes per second", field="bytes_per_second", remedy="0: no limit"
        )
    check_freezable(state, inventory, (request.volume,), request.consistency)
    place = _place(state, request.target, plain=request.plain)
    base = _newest(state, request.volume) if request.incremental else None
    if request.incremental and base is None:
        raise Conflict(
            f"{request.volume} has no backup yet",
            field="incremental",
            remedy="make a whole one first: leave --incremental out",
        )
    spec = BackupSpec(
        id=name,
        volume=request.volume,
        target=place,
        base=base.id if base is not None else None,
        encryption_key=parent.encryption_key,
    )
    return BackingUp(
        backup=spec, base=base, bytes_per_second=request.bytes_per_second, consistency=request.consistency
    )


def _newest(state: State, volume: VolumeId) -> BackupSpec | None:
    kept = state.kept.backups.values()
    made = [spec for spec in kept if spec.volume == volume and not is_being_deleted(state, spec.id)]
    return max(made, key=lambda spec: (spec.created_at, spec.id), default=None)


def _place(state: State, target: str, *, plain: bool) -> str:
    if target in state.kept.targets:
        return state.kept.targets[target]
    if target.startswith(("/", SECURED, PLAIN)):
        return checked_place(target, plain=plain)
    raise NotFound(
        f"no backup target '{target}'",
        field="target",
        remedy=f"targets: {listed(state.kept.targets)}; or a folder, or nbds://address/export",
    )


def checked_place(place: str, *, plain: bool) -> str:
    """A folder by its whole path, or an address. `plain`: one without TLS is meant so."""
    if place.startswith(PLAIN) and not plain:
        raise Refused(
            f"what is written to {place} can be read on its way",
            field="target",
            remedy=f"use {SECURED}, or allow it: --plain",
        )
    if any(place.startswith(scheme) and len(place) > len(scheme) for scheme in (SECURED, PLAIN)):
        return place
    parts = place.split("/")
    if place.startswith("/") and len(place) > 1 and ".." not in parts:
        return place.rstrip("/")
    raise Refused(
        f"'{place}' is no place for backups",
        field="target",
        remedy="give a folder's whole path on the volume's host, or nbds://address:port/export",
    )


def new_target(request: TargetRequest) -> tuple[str, str]:
    return checked_name(request.name, "name"), checked_place(request.place, plain=request.plain)


def check_target(state: State, name: str) -> None:
    if name not in state.kept.targets:
        raise NotFound(
            f"no backup target '{name}'", field="target", remedy=f"targets: {listed(state.kept.targets)}"
        )


def deleting(state: State, backup: BackupId, *, keep_files: bool) -> DeletingBackup:
    """With its files, unless these are kept: then whoever holds them need not be there."""
    spec = known_backup(state, backup)
    if not keep_files:
        _lasting(state, backup)
    in_use(
        f"backup {backup}",
        (f"backup {name}" for name in rested_on_by(state, backup)),
        "backup",
        "delete those that rest on it first",
    )
    for wish in state.kept.wishes:
        used = isinstance(wish.work, Restoring) and any(each.id == backup for each in wish.work.chain)
        if used or (isinstance(wish.work, BackingUp) and wish.work.backup.base == backup):
            raise Conflict(
                f"{wish.id} uses backup {backup} of {spec.volume}",
                field="backup",
                remedy="wait until it has ended",
            )
    if not keep_files and spec.target.startswith("/") and spec.host not in state.hosts:
        raise Conflict(
            f"{backup} is in a folder of {spec.host or 'a host'}, which is no host of this cloud",
            field="backup",
            remedy=f"forget it and leave its files: nahtlos backup delete {backup} --keep-files",
        )
    if not keep_files:
        check_idle(state, spec.volume)
    return DeletingBackup(backup=spec)


def restoring(state: State, inventory: Inventory, backup: BackupId, request: RestoreRequest) -> Restoring:
    name = VolumeId(checked_name(request.name, "name"))
    check_name_free(state, name, "volume")
    last = _lasting(state, backup)
    chain = [last]
    while chain[0].base is not None:
        chain.insert(0, _lasting(state, chain[0].base))
    parent = state.volumes.get(last.volume)
    backend = request.backend or (parent.spec.backend if parent is not None else StorageBackend.EMBEDDED)
    if backend is StorageBackend.CEPH:
        check_ceph(state, copies=1)
    host = _restoring_host(state, inventory, last, request, backend)
    volume = VolumeSpec(
        id=name,
        size_mib=last.size_mib,
        image=None,
        host=host,
        backend=backend,
        project=checked_project(request.project),
        encryption_key=last.encryption_key or (parent.spec.encryption_key if parent is not None else None),
    )
    if parent is not None and backend is StorageBackend.EMBEDDED:
        volume = msgspec.structs.replace(volume, format=parent.spec.format)
    if backend is StorageBackend.CEPH:
        check_ceph_keeps(volume)
    return Restoring(volume=volume, chain=tuple(chain))


def _restoring_host(
    state: State, inventory: Inventory, last: BackupSpec, request: RestoreRequest, backend: StorageBackend
) -> HostId:
    """Where its folder is; what is at an address can be read from everywhere."""
    asked = compute_host(state, request.host) if request.host is not None else None
    bound = last.host if last.target.startswith("/") and last.host in state.hosts else None
    if asked is not None and bound is not None and asked != bound:
        raise Refused(
            f"{last.id} is in a folder of {bound}",
            field="host",
            remedy=f"restore it there, then: nahtlos volume relocate {request.name} --to {asked}",
        )
    host = asked or bound
    if backend is StorageBackend.CEPH:
        return host or administering(state, inventory, last.size_mib)
    if host is None:
        found = places(state.policy(), inventory, size_mib=last.size_mib)
        if not found:
            raise no_place(state, inventory, last.size_mib, "host")
        return found[0]
    if not has_room(inventory, host, last.size_mib):
        raise no_place(state, inventory, last.size_mib, "host")
    return host
