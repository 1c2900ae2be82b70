"""Whether a snapshot can go to another host as it is asked for, while its volume is used. Pure; every refusal
names the field and the remedy.

What the snapshot is made of is copied as it is, so nothing it rests on may change meanwhile: the volume is
left alone by other operations, and what belongs to another volume has to have left the host. Nothing may
rest on it there either: whoever is to let go of it could not.
"""

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, SnapshotId, VolumeId
from nahtlos.model.inventory import Inventory
from nahtlos.model.snapshot_places import snapshots_on
from nahtlos.model.storage import SnapshotSpec
from nahtlos.model.volume_work import SnapshotMove
from nahtlos.planner.snapshots import mib_on, place_for
from nahtlos.runtime.controllers.known_volumes import check_idle
from nahtlos.runtime.controllers.requests import compute_host, listed
from nahtlos.runtime.controllers.snapshot_requests import known_snapshot
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_care import checked_rate
from nahtlos.runtime.controllers.volume_homes import check_takes, no_place
from nahtlos.runtime.controllers.volumes import SnapshotMoveRequest


def moving(
    state: State, inventory: Inventory, snapshot: SnapshotId, request: SnapshotMoveRequest
) -> SnapshotMove:
    spec = known_snapshot(state, snapshot)
    rate = checked_rate(request.bytes_per_second)
    source = _source(state, inventory, spec, request.copy)
    _check_alone(state, spec, source)
    destination = _destination(state, inventory, spec, source, request.to)
    check_idle(state, spec.volume)
    return SnapshotMove(
        volume=spec.volume,
        snapshots=(snapshot,),
        source=source,
        destination=destination,
        bytes_per_second=rate,
    )


def check_understood(lacking: tuple[HostId, ...]) -> None:
    """Whoever keeps it shows it, and whoever is to have it fetches it."""
    if lacking:
        raise Refused(
            f"agents of an older release, which know nothing of this: {listed(lacking)}",
            field="snapshot",
            remedy="upgrade them first, or name other hosts with --copy and --to",
        )


def _source(state: State, inventory: Inventory, spec: SnapshotSpec, asked: HostId | None) -> HostId:
    if asked is not None and asked not in spec.hosts:
        raise NotFound(
            f"{spec.id} is not kept on {asked}",
            field="copy",
            remedy=f"name one of {listed(spec.hosts)}",
        )
    if asked is None and len(spec.hosts) > 1:
        raise Refused(
            f"{spec.id} is kept on {listed(spec.hosts)}",
            field="copy",
            remedy=f"say which it is to leave: --copy {spec.hosts[-1]}",
        )
    source = asked or next(iter(spec.hosts))
    if spec not in snapshots_on(state.policy(), inventory, source):
        raise Refused(
            f"{spec.id} is in Ceph, and on no host", field="snapshot", remedy="nothing is to be done"
        )
    return source


def _check_alone(state: State, spec: SnapshotSpec, source: HostId) -> None:
    above = [name for name in state.volumes if _rests_on(state, name, spec, source)]
    if above:
        raise Conflict(
            f"{listed(above)} {'rests' if len(above) == 1 else 'rest'} on {spec.id} on {source}",
            field="snapshot",
            remedy="delete these clones, or relocate them, which makes them whole: nahtlos volume relocate",
        )
    below = _below(state, spec.volume, source)
    if below is not None:
        raise Conflict(
            f"{spec.id} is of a clone, and rests on what {below} has on {source}",
            field="snapshot",
            remedy=f"relocate {below} first, or make a volume of it: nahtlos snapshot clone {spec.id} NAME, "
            "and relocate that",
        )


def _rests_on(state: State, volume: VolumeId, spec: SnapshotSpec, host: HostId) -> bool:
    clone = state.volumes[volume].spec
    return clone.snapshot == spec.id and any(copy.host == host for copy in clone.copies)


def _below(state: State, volume: VolumeId, host: HostId) -> VolumeId | None:
    """The volume whose layers on `host`, which it uses, this one may rest on, as far down as that goes."""
    seen: set[VolumeId] = set()
    while (row := state.volumes.get(volume)) is not None and volume not in seen:
        seen.add(volume)
        origin = state.kept.snapshots.get(row.spec.snapshot) if row.spec.snapshot is not None else None
        if origin is None:
            return None
        volume = origin.spec.volume
        below = state.volumes.get(volume)
        if below is not None and any(copy.host == host for copy in below.spec.copies):
            return volume
    return None


def _destination(
    state: State, inventory: Inventory, spec: SnapshotSpec, source: HostId, asked: HostId | None
) -> HostId:
    size = mib_on(inventory, source, spec)
    if asked is None:
        found = place_for(state.policy(), inventory, source, spec)
        if found is None:
            raise no_place(state, inventory, size, "to")
        return found
    to = compute_host(state, asked, "to")
    if to in spec.hosts:
        raise Refused(f"{spec.id} is kept on {to}", field="to", remedy="name another host")
    check_takes(state, inventory, to, size, "to")
    return to
