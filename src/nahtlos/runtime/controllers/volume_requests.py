"""Whether volumes can be as they are asked for, and what exactly they then are. Pure; every refusal names the
field and the remedy."""

from collections.abc import Mapping

import msgspec
from msgspec import UNSET

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, ImageId, KeyId, ServerId, VolumeId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import MOST_DATA_PLACES, ServerSpec
from nahtlos.model.power import PowerState
from nahtlos.model.storage import DiskLimits, Replica, ReplicaState, StorageBackend, VolumeFormat, VolumeSpec
from nahtlos.model.volume_work import Relocation, VolumeWish, new_names, volumes_of, words
from nahtlos.planner.volume_places import free_mib, has_room, keeps_volumes, places, spread
from nahtlos.runtime.controllers.network_requests import checked_project, in_use, same_project
from nahtlos.runtime.controllers.requests import MAX_VOLUME_MIB, compute_host, listed, present_server
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_records import without_copy
from nahtlos.runtime.controllers.volumes import RelocationRequest, VolumeChange, VolumeRequest
from nahtlos.runtime.store.volumes import VolumeSettings

MAX_COPIES = 5
MAX_PARALLEL = 64
MIN_ELSEWHERE = 30.0


# --- what exists -------------------------------------------------------------------------------------


def known_volume(state: State, volume: VolumeId, field: str = "volume") -> VolumeSpec:
    row = state.volumes.get(volume)
    if row is None:
        known = (name for name, each in state.volumes.items() if not each.removed)
        raise NotFound(f"no volume '{volume}'", field=field, remedy=f"volumes: {listed(known)}")
    if row.removed:
        raise Conflict(f"{volume} is being deleted", field=field, remedy="wait until it is gone")
    return row.spec


def holder_of(state: State, volume: VolumeId) -> ServerId | None:
    """The server that has it, as its system disk or beside it, or whose memory is saved on it."""
    found = (s for s, r in state.servers.items() if volume in (*r.spec.all_volumes, r.spec.memory_volume))
    return next(found, None)


def is_system_disk(state: State, volume: VolumeId) -> bool:
    return any(row.spec.volume == volume for row in state.servers.values())


def check_idle(state: State, volume: VolumeId) -> None:
    """Conflict while an operation of it runs or is wished."""
    running = state.blueprint.volume_tasks if state.blueprint else ()
    works = [(str(t.id), t.work) for t in running if t.id not in state.volume_ends]
    works += [(wish.id, wish.work) for wish in state.kept.wishes]
    for name, work in works:
        if volume in volumes_of(work):
            raise Conflict(
                f"{volume} is in use by {name} ({words(work)})",
                field="volume",
                remedy=f"wait until it has ended, or: nahtlos volume cancel {volume}",
            )


def wishes_of(state: State, volume: VolumeId) -> tuple[VolumeWish, ...]:
    """Those that can be taken back. Conflict if there are none."""
    found = tuple(w for w in state.kept.wishes if volume in volumes_of(w.work) and not w.cancelled)
    if not found:
        planned = state.blueprint.volume_tasks if state.blueprint else ()
        own = [t for t in planned if volume in volumes_of(t.work) and t.id not in state.volume_ends]
        remedy = "nothing is to be done"
        if own:
            remedy = f"{own[0].id} is the cloud's own ({own[0].reason}); it ends with its cause"
        raise Conflict(f"nothing is asked for of {volume}", field="volume", remedy=remedy)
    return found


def check_name_free(state: State, name: str, kind: str) -> None:
    """Volumes, snapshots and backups each have names of their own; what is only wished has its name, too."""
    taken: Mapping[str, set[str]] = {
        "volume": set(state.volumes),
        "snapshot": set(state.kept.snapshots),
        "backup": set(state.kept.backups),
    }
    wished = {new for wish in state.kept.wishes for new in new_names(wish.work)}
    if name in taken[kind] or name in wished:
        raise Conflict(f"a {kind} '{name}' exists", field="name", remedy="choose another name")


# --- making ------------------------------------------------------------------------------------------


def new_volume(
    state: State,
    inventory: Inventory,
    request: VolumeRequest,
    images: Mapping[ImageId, int],
    key: KeyId | None,
) -> VolumeSpec:
    """`key`: of its encryption, if it is to be encrypted."""
    name = VolumeId(checked_name(request.name, "name"))
    check_name_free(state, name, "volume")
    project = checked_project(request.project)
    if request.image is not None and request.snapshot is not None:
        raise Refused("from an image and a snapshot", field="snapshot", remedy="name one of them")
    size, parent = _size_and_parent(state, request, images)
    if parent is not None:
        same_project(project, parent.project, f"snapshot {request.snapshot}", "snapshot")
        key = parent.encryption_key
    volume = VolumeSpec(
        id=name,
        size_mib=size,
        image=request.image,
        snapshot=request.snapshot,
        host=HostId(""),
        project=project,
        backend=request.backend,
        format=_format(request),
        limits=checked_limits(request.limits),
        limits_group=_checked_group(request.limits_group),
        encryption_key=key,
        deletion=request.deletion,
    )
    return _placed(state, inventory, volume, request)


def _size_and_parent(
    state: State, request: VolumeRequest, images: Mapping[ImageId, int]
) -> tuple[int, VolumeSpec | None]:
    least, what, parent = 1, "a volume", None
    if request.image is not None:
        if request.image not in images:
            raise NotFound(f"no image '{request.image}'", field="image", remedy=f"images: {listed(images)}")
        least, what = images[request.image], f"image {request.image}"
    if request.snapshot is not None:
        row = state.kept.snapshots.get(request.snapshot)
        if row is None or row.removed:
            known = (s for s, each in state.kept.snapshots.items() if not each.removed)
            raise NotFound(
                f"no snapshot '{request.snapshot}'", field="snapshot", remedy=f"snapshots: {listed(known)}"
            )
        least, what = row.spec.size_mib, f"snapshot {request.snapshot}"
        parent = state.volumes[row.spec.volume].spec if row.spec.volume in state.volumes else None
    if not request.size_mib and request.image is None and request.snapshot is None:
        raise Refused("a blank volume has no size by itself", field="size_mib", remedy="give a size")
    size = request.size_mib or least
    if size < least:
        raise Refused(
            f"{size} MiB do not hold {what} ({least} MiB)",
            field="size_mib",
            remedy=f"ask for at least {least}, or leave the size out",
        )
    return checked_size(size), parent


def checked_size(size_mib: int) -> int:
    if not 1 <= size_mib <= MAX_VOLUME_MIB:
        raise Refused(f"{size_mib} MiB", field="size_mib", remedy=f"ask for 1 to {MAX_VOLUME_MIB}")
    return size_mib


def _format(request: VolumeRequest) -> VolumeFormat:
    if request.backend is StorageBackend.CEPH and request.format is not VolumeFormat.RAW:
        raise Refused("images of Ceph's are raw", field="format", remedy="leave the format out")
    return request.format


def checked_limits(limits: DiskLimits) -> DiskLimits:
    values = {name: getattr(limits, name) for name in limits.__struct_fields__}
    for name, value in values.items():
        if value < 0:
            raise Refused(f"{name} of {value}", field=f"limits.{name}", remedy="give 0 for no limit, or more")
    for total in ("iops", "bytes"):
        if values[total] and (values[f"{total}_read"] or values[f"{total}_write"]):
            raise Refused(
                f"{total} in all together with those of reads or writes",
                field=f"limits.{total}",
                remedy="limit either the total or the parts",
            )
        burst = values[f"{total}_burst"]
        if (burst and burst < values[total]) or (burst and not values[total]):
            raise Refused(
                f"a burst of {burst} for {values[total] or 'no limit'}",
                field=f"limits.{total}_burst",
                remedy=f"give more than the {total} it is a burst of",
            )
    if limits.burst_seconds < 1:
        raise Refused(
            f"bursts of {limits.burst_seconds} s", field="limits.burst_seconds", remedy="give 1 or more"
        )
    return limits


def _checked_group(group: str) -> str:
    return checked_name(group, "limits_group") if group else ""


# --- places ------------------------------------------------------------------------------------------


def _placed(state: State, inventory: Inventory, volume: VolumeSpec, request: VolumeRequest) -> VolumeSpec:
    _check_copies(request.copies)
    if request.host is not None:
        _check_takes(state, inventory, compute_host(state, request.host), volume.size_mib)
    if volume.backend is StorageBackend.CEPH:
        return _in_ceph(state, inventory, volume, request)
    near = _host_of(state, request.near) if request.near is not None else None
    kept = state.kept.snapshots[volume.snapshot].spec.hosts if volume.snapshot is not None else ()
    first = request.host or _first(state, inventory, volume.size_mib, kept, near)
    if kept and first not in kept:
        raise Refused(
            f"snapshot {volume.snapshot} is not kept on {first}",
            field="host",
            remedy=f"name one of {listed(kept)}, or leave it out",
        )
    others = _others(state, inventory, volume.size_mib, [first], request.copies - 1)
    state_of_new = ReplicaState.STALE if kept else ReplicaState.CURRENT
    replicas = tuple(
        Replica(host=host, state=ReplicaState.CURRENT if host in kept else state_of_new) for host in others
    )
    return msgspec.structs.replace(volume, host=first, replicas=replicas)


def system_disk(state: State, inventory: Inventory, volume: VolumeSpec, copies: int) -> VolumeSpec:
    """With its places; of a server that is to be created."""
    _check_copies(copies)
    checked_limits(volume.limits)
    first = _first(state, inventory, volume.size_mib, (), None)
    others = _others(state, inventory, volume.size_mib, [first], copies - 1)
    replicas = tuple(Replica(host=host) for host in others)
    return msgspec.structs.replace(volume, host=first, replicas=replicas)


def checked_settings(settings: VolumeSettings) -> VolumeSettings:
    for field, value in (("parallel", settings.parallel), ("parallel_per_host", settings.parallel_per_host)):
        if not 1 <= value <= MAX_PARALLEL:
            raise Refused(f"{value} at once", field=field, remedy=f"give 1 to {MAX_PARALLEL}")
    if settings.rebuild_bytes_per_second < 0:
        raise Refused(
            f"{settings.rebuild_bytes_per_second} bytes per second",
            field="rebuild_bytes_per_second",
            remedy="0: no limit",
        )
    if settings.elsewhere_seconds < MIN_ELSEWHERE:
        raise Refused(
            f"elsewhere after {settings.elsewhere_seconds:g} s",
            field="elsewhere_seconds",
            remedy=f"give at least {MIN_ELSEWHERE:g}: a host that restarts comes back in that time",
        )
    checked_limits(settings.budget.tenants)
    checked_limits(settings.budget.copies)
    return settings


def _check_copies(copies: int) -> None:
    if not 1 <= copies <= MAX_COPIES:
        raise Refused(f"{copies} copies", field="copies", remedy=f"ask for 1 to {MAX_COPIES}")


def _first(
    state: State, inventory: Inventory, size_mib: int, among: tuple[HostId, ...], near: HostId | None
) -> HostId:
    policy = state.policy()
    without = [host for host in state.hosts if among and host not in among]
    for as_if_connected in (False, True):
        found = places(
            policy,
            inventory,
            size_mib=size_mib,
            near=near,
            without=without,
            as_if_connected=as_if_connected,
        )
        if found:
            return found[0]
    raise no_place(state, inventory, size_mib, "host")


def _others(
    state: State, inventory: Inventory, size_mib: int, beside: list[HostId], count: int
) -> list[HostId]:
    found = spread(state.policy(), inventory, size_mib=size_mib, copies=count, beside=beside)
    if len(found) < count:
        able = [*beside, *found]
        raise Conflict(
            f"{count + len(beside)} copies need as many hosts, and {len(able)} could have one "
            f"({listed(able)})",
            field="copies",
            remedy="ask for fewer, activate or add hosts, or free space on them",
        )
    return found


def no_place(state: State, inventory: Inventory, size_mib: int, field: str) -> Conflict:
    policy = state.policy()
    active = [host for host in state.hosts if keeps_volumes(policy, host)]
    if not active:
        return Conflict(
            "no host takes volumes now", field=field, remedy="join a compute host, or activate one"
        )
    most = max(active, key=lambda host: (free_mib(inventory, host) or 0, host))
    return Conflict(
        f"no host has room for {size_mib} MiB; most is free on {most}: {free_mib(inventory, most) or 0} MiB",
        field=field,
        remedy="ask for less, free space, or add a host",
    )


def _check_takes(
    state: State, inventory: Inventory, host: HostId, size_mib: int, field: str = "host"
) -> None:
    intent = state.hosts[host].intent
    if intent is not HostIntent.ACTIVE:
        raise Conflict(f"{host} is {intent}", field=field, remedy=f"nahtlos host activate {host}")
    if not has_room(inventory, host, size_mib):
        raise Conflict(
            f"{host} has {free_mib(inventory, host)} MiB free, {size_mib} are needed",
            field=field,
            remedy="name another host, ask for less, or free space",
        )


def _in_ceph(state: State, inventory: Inventory, volume: VolumeSpec, request: VolumeRequest) -> VolumeSpec:
    _check_ceph(state, request.copies)
    if volume.snapshot is not None:
        parent = state.volumes.get(state.kept.snapshots[volume.snapshot].spec.volume)
        if parent is None or parent.spec.backend is not StorageBackend.CEPH:
            raise Refused(
                f"snapshot {volume.snapshot} is not in Ceph",
                field="backend",
                remedy="clone it as it is, then relocate the clone: nahtlos volume relocate --to ceph",
            )
    compute = [h for h in state.hosts if keeps_volumes(state.policy(), h)]
    hosts = [h for h in compute if h in inventory.connected] or compute
    if not hosts:
        raise no_place(state, inventory, volume.size_mib, "host")
    return msgspec.structs.replace(volume, host=request.host or hosts[0])


def _check_ceph(state: State, copies: int) -> None:
    if state.kept.settings.ceph is None:
        raise Refused(
            "this cloud has no Ceph cluster",
            field="backend",
            remedy="name its pool: nahtlos volume settings --ceph-pool POOL",
        )
    if copies != 1:
        raise Refused(
            "Ceph keeps copies by itself", field="copies", remedy="set the size of its pool instead"
        )


def _host_of(state: State, server: ServerId) -> HostId | None:
    present_server(state, server)
    owner = state.blueprint.servers.get(server) if state.blueprint else None
    return owner.host if owner is not None else None


# --- changing ----------------------------------------------------------------------------------------


def changed_volume(state: State, inventory: Inventory, volume: VolumeId, change: VolumeChange) -> VolumeSpec:
    spec = known_volume(state, volume)
    if change.size_mib is not UNSET:
        if (holder := holder_of(state, volume)) is not None:
            _check_not_suspended(state.servers[holder].spec)
        spec = _resized(inventory, spec, change.size_mib)
    if change.limits is not UNSET:
        spec = msgspec.structs.replace(spec, limits=checked_limits(change.limits))
    if change.limits_group is not UNSET:
        spec = msgspec.structs.replace(spec, limits_group=_checked_group(change.limits_group))
    if change.deletion is not UNSET:
        spec = msgspec.structs.replace(spec, deletion=change.deletion)
    if change.copies is not UNSET and change.copies != len(spec.copies):
        check_idle(state, volume)
        spec = _with_copies(state, inventory, spec, change.copies)
    return spec


def _resized(inventory: Inventory, spec: VolumeSpec, size_mib: int) -> VolumeSpec:
    if size_mib < spec.size_mib:
        raise Refused(
            f"{spec.id} has {spec.size_mib} MiB and would have {size_mib}: it would lose its end",
            field="size_mib",
            remedy="make a smaller volume and copy what is to be kept",
        )
    checked_size(size_mib)
    for copy in spec.copies if spec.backend is StorageBackend.EMBEDDED else ():
        free = free_mib(inventory, copy.host)
        if free is not None and free < size_mib - spec.size_mib:
            raise Conflict(
                f"{copy.host} has {free} MiB free, {size_mib - spec.size_mib} more are asked for",
                field="size_mib",
                remedy=f"ask for less, or relocate it first: nahtlos volume relocate {spec.id}",
            )
    return msgspec.structs.replace(spec, size_mib=size_mib)


def _with_copies(state: State, inventory: Inventory, spec: VolumeSpec, copies: int) -> VolumeSpec:
    """New ones are stale until they are made; of those that are too many, stale ones go first."""
    _check_copies(copies)
    if spec.backend is StorageBackend.CEPH:
        _check_ceph(state, copies)
    beside = [copy.host for copy in spec.copies]
    if copies > len(beside):
        new = _others(state, inventory, spec.size_mib, beside, copies - len(beside))
        epoch = spec.newest_epoch + 1
        added = tuple(Replica(host=host, state=ReplicaState.STALE, epoch=epoch) for host in new)
        return msgspec.structs.replace(spec, replicas=(*spec.replicas, *added))
    while len(spec.copies) > copies:
        stale = [c.host for c in spec.copies if c.state is ReplicaState.STALE]
        spec = without_copy(spec, stale[-1] if stale else spec.copies[-1].host)
    return spec


# --- attaching ---------------------------------------------------------------------------------------


def attached_server(state: State, volume: VolumeId, server: ServerId) -> ServerSpec:
    """The server with the volume in its first free place."""
    spec = _free_volume(state, volume, "volume")
    row = state.servers[present_server(state, server)]
    _check_not_suspended(row.spec)
    same_project(row.spec.project, spec.project, f"volume {volume}", "volume")
    places_of = list(row.spec.data_volumes)
    if sum(1 for place in places_of if place) >= row.spec.data_places:
        raise Conflict(
            f"{server} has {row.spec.data_places} data volumes, and no place for another",
            field="server",
            remedy="detach one first; places are decided when a server is created: --data-places",
        )
    free = places_of.index(VolumeId("")) if VolumeId("") in places_of else len(places_of)
    places_of[free : free + 1] = [volume]
    return msgspec.structs.replace(row.spec, data_volumes=tuple(places_of))


def with_data_volumes(
    state: State, server: ServerSpec, volumes: tuple[VolumeId, ...]
) -> tuple[ServerSpec, tuple[VolumeSpec, ...]]:
    """A server that is to be created, with these from the start."""
    if len(set(volumes)) != len(volumes):
        raise Refused("one volume twice", field="volumes", remedy="name each once")
    if len(volumes) > server.data_places:
        raise Refused(
            f"{len(volumes)} data volumes for {server.data_places} places",
            field="volumes",
            remedy=f"ask for more with --data-places, at most {MOST_DATA_PLACES}",
        )
    specs = tuple(_free_volume(state, volume, "volumes") for volume in volumes)
    for spec in specs:
        same_project(server.project, spec.project, f"volume {spec.id}", "volumes")
    return msgspec.structs.replace(server, data_volumes=volumes), specs


def _free_volume(state: State, volume: VolumeId, field: str) -> VolumeSpec:
    """That no server has, and of which nothing runs."""
    spec = known_volume(state, volume, field)
    holder = holder_of(state, volume)
    if holder is not None:
        what = "the system disk of" if is_system_disk(state, volume) else "attached to"
        raise Conflict(
            f"{volume} is {what} {holder}",
            field=field,
            remedy=f"one server has it at a time; nahtlos volume detach {volume} first",
        )
    check_idle(state, volume)
    return spec


def _check_not_suspended(spec: ServerSpec) -> None:
    """Its guest remembers the disks it has."""
    if spec.power.state is PowerState.SUSPENDED:
        raise Conflict(
            f"{spec.id} is suspended, and remembers the disks it has",
            field="server",
            remedy=f"nahtlos server resume {spec.id} first",
        )


def detached_server(state: State, volume: VolumeId) -> ServerSpec:
    """The server without the volume; its other disks keep their places."""
    known_volume(state, volume)
    holder = holder_of(state, volume)
    if holder is None:
        raise Conflict(f"{volume} is attached to no server", field="volume", remedy="nothing is to be done")
    spec = state.servers[holder].spec
    if spec.volume == volume:
        raise Refused(
            f"{volume} is the system disk of {holder}",
            field="volume",
            remedy=f"it goes with its server: nahtlos server delete {holder}",
        )
    _check_not_suspended(spec)
    check_idle(state, volume)
    left = [VolumeId("") if name == volume else name for name in spec.data_volumes]
    while left and not left[-1]:
        left.pop()
    return msgspec.structs.replace(spec, data_volumes=tuple(left))


# --- elsewhere, and no more --------------------------------------------------------------------------


def relocation(
    state: State, inventory: Inventory, volume: VolumeId, request: RelocationRequest
) -> Relocation:
    spec = known_volume(state, volume)
    check_idle(state, volume)
    source = request.copy or spec.host
    if all(copy.host != source for copy in spec.copies):
        copies = listed(copy.host for copy in spec.copies)
        raise NotFound(f"{volume} has no copy on {source}", field="copy", remedy=f"copies are on {copies}")
    backend = request.backend or (StorageBackend.EMBEDDED if request.to else spec.backend)
    if request.bytes_per_second < 0:
        raise Refused(
            f"{request.bytes_per_second} bytes per second", field="bytes_per_second", remedy="0: no limit"
        )
    if request.format not in (None, spec.format) and len(spec.copies) > 1:
        raise Refused(
            f"the copies of {volume} are all {spec.format}",
            field="format",
            remedy=f"have one copy first: nahtlos volume set {volume} --replicas 1",
        )
    if backend is StorageBackend.CEPH:
        _check_to_ceph(state, spec, request)
    elif request.to is not None:
        _check_destination(state, inventory, spec, source, request)
    elif not places(
        state.policy(),
        inventory,
        size_mib=spec.size_mib,
        beside=[copy.host for copy in spec.copies if copy.host != source],
        without=[source] if spec.backend is StorageBackend.EMBEDDED else [],
    ):
        raise no_place(state, inventory, spec.size_mib, "to")
    return Relocation(
        volume=volume,
        source=source,
        destination=request.to,
        backend=backend,
        format=request.format,
        bytes_per_second=request.bytes_per_second,
    )


def _check_to_ceph(state: State, spec: VolumeSpec, request: RelocationRequest) -> None:
    _check_ceph(state, len(spec.copies))
    if spec.backend is StorageBackend.CEPH:
        raise Refused(f"{spec.id} is in Ceph", field="to", remedy="name a host")
    if request.to is not None:
        raise Refused("to a host and to Ceph", field="to", remedy="name one of them")
    if request.format not in (None, VolumeFormat.RAW):
        raise Refused("images of Ceph's are raw", field="format", remedy="leave the format out")


def _check_destination(
    state: State, inventory: Inventory, spec: VolumeSpec, source: HostId, request: RelocationRequest
) -> None:
    assert request.to is not None, "no destination is named"
    to = compute_host(state, request.to, "to")
    changes = request.format not in (None, spec.format)
    comes_home = spec.backend is StorageBackend.CEPH
    if any(copy.host == to for copy in spec.copies) and not comes_home and not (to == source and changes):
        raise Refused(f"{spec.id} has a copy on {to}", field="to", remedy="name another host")
    _check_takes(state, inventory, to, spec.size_mib, "to")


def check_deletable(state: State, volume: VolumeId) -> None:
    spec = known_volume(state, volume)
    holder = holder_of(state, volume)
    if holder is not None:
        system = is_system_disk(state, volume)
        raise Conflict(
            f"{volume} is {'the system disk of' if system else 'attached to'} {holder}",
            field="volume",
            remedy=f"nahtlos {'server delete ' + holder if system else 'volume detach ' + volume}",
        )
    snapshots = [s for s, row in state.kept.snapshots.items() if row.spec.volume == spec.id]
    in_use(
        f"volume {volume}",
        (f"snapshot {name}" for name in snapshots),
        "volume",
        "delete them first: nahtlos snapshot delete",
    )
    check_idle(state, volume)
