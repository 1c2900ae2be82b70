"""Whether volumes can be as they are asked for, and what exactly they then are. Pure; every refusal names the
field and the remedy."""

from collections.abc import Mapping

import msgspec
from msgspec import UNSET

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, ImageId, KeyId, VolumeId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.snapshot_places import backend_of
from nahtlos.model.storage import Replica, ReplicaState, StorageBackend, VolumeFormat, VolumeSpec
from nahtlos.model.volume_work import Relocation
from nahtlos.planner.volume_places import free_mib, places
from nahtlos.runtime.controllers.attachment_requests import check_not_suspended
from nahtlos.runtime.controllers.known_volumes import (
    check_idle,
    check_name_free,
    check_no_memory,
    check_stays,
    holder_of,
    is_system_disk,
    known_volume,
)
from nahtlos.runtime.controllers.network_requests import checked_project, in_use, same_project
from nahtlos.runtime.controllers.requests import MAX_VOLUME_MIB, compute_host, listed
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_homes import (
    check_ceph,
    check_ceph_keeps,
    check_copies,
    check_takes,
    further_homes,
    no_place,
    placed,
)
from nahtlos.runtime.controllers.volume_records import without_copy
from nahtlos.runtime.controllers.volume_settings import checked_limits
from nahtlos.runtime.controllers.volumes import RelocationRequest, VolumeChange, VolumeRequest

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
    backend = _backend(state, inventory, request)
    volume = VolumeSpec(
        id=name,
        size_mib=size,
        image=request.image,
        snapshot=request.snapshot,
        host=HostId(""),
        project=project,
        backend=backend,
        format=_format(backend, request.format),
        limits=checked_limits(request.limits),
        limits_group=_checked_group(request.limits_group),
        encryption_key=key,
        deletion=request.deletion,
    )
    return placed(state, inventory, volume, request)


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
        check_stays(state, request.snapshot)
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


def _backend(state: State, inventory: Inventory, request: VolumeRequest) -> StorageBackend:
    """A clone is where its snapshot is."""
    if request.snapshot is None:
        return request.backend
    spec = state.kept.snapshots[request.snapshot].spec
    volume = state.volumes.get(spec.volume)
    backend = backend_of(spec, inventory, volume.spec if volume is not None else None)
    if request.backend is StorageBackend.CEPH and backend is not request.backend:
        raise Refused(
            f"snapshot {request.snapshot} is not in Ceph",
            field="backend",
            remedy="clone it as it is, then relocate the clone: nahtlos volume relocate --to ceph",
        )
    return backend


def _format(backend: StorageBackend, asked: VolumeFormat) -> VolumeFormat:
    if backend is StorageBackend.CEPH and asked is not VolumeFormat.RAW:
        raise Refused("images of Ceph's are raw", field="format", remedy="leave the format out")
    return asked


def _checked_group(group: str) -> str:
    return checked_name(group, "limits_group") if group else ""


# --- changing ----------------------------------------------------------------------------------------


def changed_volume(state: State, inventory: Inventory, volume: VolumeId, change: VolumeChange) -> VolumeSpec:
    spec = known_volume(state, volume)
    if change.size_mib is not UNSET:
        if (holder := holder_of(state, volume)) is not None:
            check_not_suspended(state.servers[holder].spec)
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
    check_copies(copies)
    if spec.backend is StorageBackend.CEPH:
        check_ceph(state, copies)
    beside = [copy.host for copy in spec.copies]
    if copies > len(beside):
        new = further_homes(state, inventory, spec.size_mib, beside, copies - len(beside))
        epoch = spec.newest_epoch + 1
        added = tuple(Replica(host=host, state=ReplicaState.STALE, epoch=epoch) for host in new)
        return msgspec.structs.replace(spec, replicas=(*spec.replicas, *added))
    while len(spec.copies) > copies:
        stale = [c.host for c in spec.copies if c.state is ReplicaState.STALE]
        spec = without_copy(spec, stale[-1] if stale else spec.copies[-1].host)
    return spec


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
    check_ceph(state, len(spec.copies))
    check_ceph_keeps(spec)
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
    check_takes(state, inventory, to, spec.size_mib, "to")


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
    check_no_memory(state, volume, "volume")
    snapshots = [s for s, row in state.kept.snapshots.items() if row.spec.volume == spec.id]
    in_use(
        f"volume {volume}",
        (f"snapshot {name}" for name in snapshots),
        "volume",
        "delete them first: nahtlos snapshot delete",
    )
    check_idle(state, volume)
