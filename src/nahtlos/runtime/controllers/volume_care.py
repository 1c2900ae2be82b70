"""Whether what there is of volumes can be examined, mended, paced and written out as it is asked for. Pure;
every refusal names the field and the remedy."""

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, SnapshotId, VolumeId
from nahtlos.model.inventory import Inventory
from nahtlos.model.power import PowerState
from nahtlos.model.storage import ReplicaState, StorageBackend, VolumeSpec
from nahtlos.model.volume_work import (
    BackingUp,
    Relocation,
    Scrubbing,
    SnapshotMove,
    WritingFile,
    volumes_of,
    words,
)
from nahtlos.runtime.controllers.known_volumes import check_idle, holder_of, known_volume
from nahtlos.runtime.controllers.requests import listed
from nahtlos.runtime.controllers.snapshot_requests import known_snapshot
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volumes import (
    RebuildRequest,
    ScrubRequest,
    SnapshotFileRequest,
    SpeedRequest,
)


def checked_rate(bytes_per_second: int) -> int:
    if bytes_per_second < 0:
        raise Refused(f"{bytes_per_second} bytes per second", field="bytes_per_second", remedy="0: no limit")
    return bytes_per_second


def checked_file(file: str) -> str:
    """A whole path that says what it means."""
    if not file.startswith("/") or file.endswith("/") or ".." in file.split("/") or "\0" in file:
        raise Refused(f"'{file}' is no whole path of a file", field="file", remedy="begin with /")
    return file


def scrubbing(state: State, volume: VolumeId, request: ScrubRequest) -> Scrubbing:
    spec = known_volume(state, volume)
    rate = checked_rate(request.bytes_per_second)
    if request.repair and spec.backend is StorageBackend.CEPH:
        raise Refused(
            f"Ceph mends the copies of {volume} by itself", field="repair", remedy="leave --repair out"
        )
    if request.repair and len(spec.copies) < 2:
        raise Refused(
            f"{volume} has one copy, and nothing to rebuild it from",
            field="repair",
            remedy=f"leave --repair out, or have more copies: nahtlos volume set {volume} --replicas 2",
        )
    if not spec.current:
        raise Conflict(
            f"no copy of {volume} is current",
            field="volume",
            remedy=f"restore it from a backup: nahtlos backup list --volume {volume}",
        )
    check_idle(state, volume)
    return Scrubbing(volume=volume, bytes_per_second=rate, repair=request.repair)


def copy_to_rebuild(state: State, inventory: Inventory, volume: VolumeId, request: RebuildRequest) -> HostId:
    """A current copy that others can be made of, too."""
    spec = known_volume(state, volume)
    if spec.backend is StorageBackend.CEPH:
        raise Refused(
            f"Ceph mends the copies of {volume} by itself", field="volume", remedy="nothing is to be done"
        )
    host = request.copy or _in_trouble(inventory, spec)
    copies = {copy.host: copy.state for copy in spec.copies}
    if host not in copies:
        raise NotFound(
            f"{volume} has no copy on {host}", field="copy", remedy=f"copies are on {listed(copies)}"
        )
    if copies[host] is ReplicaState.STALE:
        raise Conflict(
            f"the copy of {volume} on {host} is stale, so it is rebuilt anyway",
            field="copy",
            remedy="see how far it is: nahtlos volume tasks",
        )
    if spec.current == (host,):
        raise Conflict(
            f"the copy of {volume} on {host} is the only current one",
            field="copy",
            remedy=f"restore it from a backup: nahtlos backup list --volume {volume}",
        )
    check_idle(state, volume)
    return host


def check_leaves_first(state: State, volume: VolumeId, lacking: tuple[HostId, ...]) -> None:
    """A copy that is made anew is shut to its server. `lacking`: hosts of copies whose agents do not lead the
    server away from it first."""
    holder = holder_of(state, volume)
    if not lacking or holder is None or state.servers[holder].spec.power.state is not PowerState.ON:
        return
    raise Refused(
        f"agents of an older release would shut {volume} to {holder}, which runs: {listed(lacking)}",
        field="volume",
        remedy=f"upgrade them first, or stop it meanwhile: nahtlos server stop {holder}",
    )


def _in_trouble(inventory: Inventory, spec: VolumeSpec) -> HostId:
    found = [
        host
        for host in spec.current
        if (seen := inventory.hosts.get(host)) is not None
        and any(status.id == spec.id and status.problem for status in seen.volumes)
    ]
    if len(found) == 1:
        return found[0]
    what = "no copy" if not found else "more than one copy"
    raise Refused(
        f"{what} of {spec.id} is in trouble",
        field="copy",
        remedy=f"name the one: --copy {listed(spec.current)}",
    )


def paced(state: State, volume: VolumeId, request: SpeedRequest) -> tuple[str, Relocation | SnapshotMove]:
    """The wish, and how it reads then."""
    known_volume(state, volume)
    rate = checked_rate(request.bytes_per_second)
    wished = [w for w in state.kept.wishes if volume in volumes_of(w.work) and not w.cancelled]
    for wish in wished:
        if isinstance(wish.work, Relocation | SnapshotMove):
            return wish.id, msgspec.structs.replace(wish.work, bytes_per_second=rate)
    if any(isinstance(wish.work, BackingUp) for wish in wished):
        raise Conflict(
            f"a backup of {volume} keeps the pace it was asked for with",
            field="volume",
            remedy=f"nahtlos volume cancel {volume}, then ask for it with --bandwidth",
        )
    planned = state.blueprint.volume_tasks if state.blueprint else ()
    running = [t for t in planned if volume in volumes_of(t.work) and t.id not in state.volume_ends]
    own = [task for task in running if not task.wish]
    if own:
        raise Conflict(
            f"{own[0].id} ({words(own[0].work)}) has the pace of all rebuilds and drains",
            field="volume",
            remedy="nahtlos volume settings --rebuild RATE holds for those that run, too",
        )
    raise Conflict(
        f"neither {volume} nor a snapshot of it goes elsewhere",
        field="volume",
        remedy="nothing is to be done",
    )


def writing(state: State, snapshot: SnapshotId, request: SnapshotFileRequest) -> WritingFile:
    spec = known_snapshot(state, snapshot)
    file = checked_file(request.file)
    if request.host is not None and request.host not in spec.hosts:
        raise Refused(
            f"{snapshot} is not kept on {request.host}",
            field="host",
            remedy=f"name one of {listed(spec.hosts)}, or leave it out",
        )
    check_idle(state, spec.volume)
    return WritingFile(
        volume=spec.volume, snapshot=snapshot, file=file, format=request.format, host=request.host
    )
