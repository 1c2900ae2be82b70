"""Whether a whole server can be snapshot with its memory, and go back to that. Pure; every refusal names the
field and the remedy."""

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, ServerId, SnapshotId, VolumeId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import HostRole, ServerSpec
from nahtlos.model.power import Power, PowerState
from nahtlos.model.server_snapshots import MEMORY_SNAPSHOTS, GoingBack, MemoryOf, ServerSnapshot
from nahtlos.model.storage import SnapshotSpec, StorageBackend, VolumeSpec
from nahtlos.model.version_pairs import COPIES_SINCE, CORRUPTS, numbers
from nahtlos.model.volume_work import Reverting, SnapshotGroup
from nahtlos.planner.power import refused_pair
from nahtlos.runtime.controllers.known_volumes import check_idle, check_name_free
from nahtlos.runtime.controllers.power_requests import volume_for_memory
from nahtlos.runtime.controllers.requests import listed, present_server
from nahtlos.runtime.controllers.server_snapshots import ServerSnapshotRequest, ServerSnapshotView
from nahtlos.runtime.controllers.snapshot_requests import check_snapshot_deletable, snapshot_group
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volumes import SnapshotRequest

PAUSES = (0.05, 60.0)
TIMES = 2
"""How often all of the memory has room: what is written while it is saved is saved again."""


def known(state: State, snapshot: SnapshotId) -> ServerSnapshot:
    found = state.kept.server_snapshots.get(snapshot)
    if found is None:
        names = listed(state.kept.server_snapshots)
        raise NotFound(
            f"no snapshot '{snapshot}' of a whole server", field="snapshot", remedy=f"there are: {names}"
        )
    return found


# --- taking ------------------------------------------------------------------------------------------


def taking(
    state: State, inventory: Inventory, request: ServerSnapshotRequest
) -> tuple[SnapshotGroup, VolumeSpec]:
    """The group of its disks' snapshots, and the volume its memory is to be on."""
    name = checked_name(request.name, "name")
    spec = state.servers[present_server(state, request.server)].spec
    least, most = PAUSES
    if not least <= request.pause_seconds <= most:
        raise Refused(
            f"a pause of {request.pause_seconds:g} s",
            field="pause",
            remedy=f"allow {least:g} to {most:g} s; what stops it for longer: nahtlos server suspend",
        )
    _check_new(state, name)
    _check_runs(state, inventory, spec)
    for volume in spec.all_volumes:
        check_idle(state, volume)
        if state.volumes[volume].spec.backend is StorageBackend.CEPH:
            raise Refused(
                f"{volume} is in Ceph, and the memory would be kept by hosts",
                field="server",
                remedy="take its disks alone: nahtlos snapshot create NAME --volume VOLUME …",
            )
    disks = SnapshotRequest(name=name, volumes=spec.all_volumes)
    group = snapshot_group(state, inventory, disks)
    memory = volume_for_memory(state, inventory, spec, VolumeId(f"{name}-memory"), TIMES)
    check_name_free(state, memory.id, "volume")
    return msgspec.structs.replace(
        group,
        # Never the group's own name, which is the whole snapshot's.
        snapshots=tuple(_named(state, name, each) for each in group.snapshots),
        memory=MemoryOf(server=spec.id, volume=memory.id, pause_seconds=request.pause_seconds),
    ), memory


def _named(state: State, group: str, snapshot: SnapshotSpec) -> SnapshotSpec:
    name = checked_name(f"{group}-{snapshot.volume}", "name")
    check_name_free(state, name, "snapshot")
    return msgspec.structs.replace(snapshot, id=SnapshotId(name), group=group)


def _check_new(state: State, name: str) -> None:
    check_name_free(state, name, "snapshot")
    wished = {wish.work.group for wish in state.kept.wishes if isinstance(wish.work, SnapshotGroup)}
    if SnapshotId(name) in state.kept.server_snapshots or name in wished:
        raise Conflict(f"a snapshot '{name}' exists", field="name", remedy="choose another name")


def _check_runs(state: State, inventory: Inventory, spec: ServerSpec) -> None:
    if spec.power.state is not PowerState.ON or spec.going_back is not None:
        raise Conflict(
            f"{spec.id} does not run: there is no memory to take",
            field="server",
            remedy=f"nahtlos server start {spec.id}; or take its disks: nahtlos snapshot create --volume",
        )
    owner = state.blueprint.servers.get(spec.id) if state.blueprint else None
    seen = inventory.hosts.get(owner.host) if owner is not None else None
    if seen is None or MEMORY_SNAPSHOTS not in seen.knows:
        raise Conflict(
            f"{spec.id} is on no host whose agent can save the memory of a server that runs",
            field="server",
            remedy="wait until it runs, or upgrade its host's agent",
        )
    status = next((each for each in seen.servers if each.id == spec.id), None)
    emulated = seen.accelerator is not None and seen.accelerator.name == "tcg"
    release = status.release if status is not None else None
    version = numbers(state.release_versions.get(release, "")) if release is not None else ()
    if emulated and version and version < COPIES_SINCE:
        raise Conflict(
            f"{spec.id} runs under {release}: {CORRUPTS}",
            field="server",
            remedy=f"bring it to a newer release first: nahtlos server replace-vmm {spec.id}; or save it "
            f"while it stands still: nahtlos server suspend {spec.id}",
        )
    if spec.max_memory_mib and emulated and status is not None:
        raise Conflict(
            f"{spec.id} has places for memory, which an emulating QEMU cannot copy while it runs",
            field="server",
            remedy=f"under KVM it can; here: nahtlos server suspend {spec.id}, which stops it meanwhile",
        )


# --- going back --------------------------------------------------------------------------------------


def going_back(
    state: State, inventory: Inventory, server: ServerId, snapshot: SnapshotId
) -> tuple[ServerSpec, tuple[Reverting, ...]]:
    """What the server is to be, and what is to be done to its disks."""
    spec = state.servers[present_server(state, server)].spec
    whole = known(state, snapshot)
    if whole.server != server:
        raise Refused(
            f"{snapshot} is of {whole.server}, not of {server}: both would have its addresses",
            field="snapshot",
            remedy=f"make a new server of its disks: nahtlos snapshot clone {listed(whole.snapshots[:1])} "
            "VOLUME, for each",
        )
    if spec.going_back is not None:
        raise Conflict(
            f"{server} goes back to snapshot {spec.going_back.snapshot} already",
            field="server",
            remedy="wait until it runs",
        )
    if spec.power.again:
        raise Conflict(f"a volume of {server} is reverted", field="server", remedy="wait until it runs")
    _check_power_known(state, inventory, spec)
    _check_machine(spec, whole)
    _check_disks(state, spec, whole)
    _check_release(state, inventory, whole)
    serial = spec.power.serial + 1
    stop = Power(state=PowerState.OFF, serial=serial, boot=spec.power.boot, hard=True, again=True)
    saved = msgspec.structs.replace(whole.saved, serial=serial)
    after = msgspec.structs.replace(
        spec,
        power=stop,
        memory_volume=saved.volume,
        going_back=GoingBack(snapshot=snapshot, saved=saved, left=spec.all_volumes),
    )
    work = tuple(
        Reverting(volume=disk.volume, snapshot=name)
        for disk, name in zip(whole.saved.disks, whole.snapshots, strict=True)
    )
    return after, work


def _check_power_known(state: State, inventory: Inventory, spec: ServerSpec) -> None:
    owner = state.blueprint.servers.get(spec.id) if state.blueprint else None
    seen = inventory.hosts.get(owner.host) if owner is not None else None
    if seen is None or "suspend" not in seen.knows:
        raise Conflict(
            f"{spec.id} is on no host that could let it go on from what was saved",
            field="server",
            remedy="wait until its host is there, or upgrade its agent",
        )


def _check_machine(spec: ServerSpec, whole: ServerSnapshot) -> None:
    saved = whole.saved
    if spec.size.memory_mib != saved.memory_mib:
        raise Conflict(
            f"{spec.id} has {spec.size.memory_mib} MiB of memory, and had {saved.memory_mib} in {whole.id}",
            field="memory",
            remedy=f"nahtlos server set {spec.id} --memory {saved.memory_mib}, then revert it",
        )
    if spec.machine != saved.machine:
        raise Conflict(
            f"{spec.id} is a {spec.machine}, and was a {saved.machine} in {whole.id}",
            field="server",
            remedy="its disks can be reverted alone: nahtlos volume revert",
        )


def _check_disks(state: State, spec: ServerSpec, whole: ServerSnapshot) -> None:
    gone = missing(state, whole)
    if gone or len(whole.snapshots) != len(whole.saved.disks):
        raise Conflict(
            f"{listed(gone)} of {whole.id} was deleted",
            field="snapshot",
            remedy=f"revert what is left: nahtlos volume revert; the memory goes by: "
            f"nahtlos snapshot delete {whole.id}",
        )
    had = tuple(disk.volume for disk in whole.saved.disks)
    if spec.all_volumes != had:
        raise Conflict(
            f"{spec.id} has {listed(spec.all_volumes)}, and had {listed(had)} in {whole.id}",
            field="volume",
            remedy="attach and detach until it has those, in that order",
        )
    for disk, name in zip(whole.saved.disks, whole.snapshots, strict=True):
        volume, snapshot = state.volumes[disk.volume].spec, state.kept.snapshots[name].spec
        check_idle(state, volume.id)
        if volume.size_mib != disk.size_mib:
            raise Conflict(
                f"{volume.id} has {volume.size_mib} MiB, and had {disk.size_mib} in {whole.id}",
                field="volume",
                remedy=f"what it held: nahtlos snapshot clone {name} VOLUME",
            )
        if not set(volume.current) & set(snapshot.hosts):
            raise Conflict(
                f"no current copy of {volume.id} is where {name} is kept ({listed(snapshot.hosts)})",
                field="volume",
                remedy=f"nahtlos volume relocate {volume.id} --to {snapshot.hosts[0]}, then revert it"
                if snapshot.hosts
                else f"nahtlos snapshot clone {name} VOLUME",
            )


def _check_release(state: State, inventory: Inventory, whole: ServerSnapshot) -> None:
    """Some host must have a release that can load it; which, the planner sees to."""
    versions = state.release_versions
    old, why = versions.get(whole.saved.release), ""
    for host in _computing(state, inventory):
        plan = state.blueprint.hosts.get(host) if state.blueprint else None
        new = versions.get(plan.release) if plan is not None and plan.release is not None else None
        pair = refused_pair(whole.saved, old, new)
        if pair is None:
            return
        why = str(pair)
    raise Conflict(
        f"no host can load the memory of {whole.id}: {why or 'none is there'}",
        field="snapshot",
        remedy="give a host a release it can go on by; docs/version-pairs.md lists them",
    )


def _computing(state: State, inventory: Inventory) -> tuple[HostId, ...]:
    return tuple(
        host
        for host, row in state.hosts.items()
        if row.spec.role is HostRole.COMPUTE and host in inventory.connected
    )


# --- deleting and showing ----------------------------------------------------------------------------


def missing(state: State, whole: ServerSnapshot) -> tuple[SnapshotId, ...]:
    rows = state.kept.snapshots
    return tuple(name for name in whole.snapshots if name not in rows or rows[name].removed)


def deletable(state: State, snapshot: SnapshotId) -> ServerSnapshot:
    whole = known(state, snapshot)
    for name, row in state.servers.items():
        if row.spec.going_back is not None and row.spec.going_back.snapshot == snapshot:
            raise Conflict(f"{name} goes back to {snapshot}", field="snapshot", remedy="wait until it runs")
    for name in set(whole.snapshots) - set(missing(state, whole)):
        check_snapshot_deletable(state, name)
    check_idle(state, whole.saved.volume)
    return whole


def view(state: State, inventory: Inventory, whole: ServerSnapshot) -> ServerSnapshotView:
    kept = state.volumes.get(whole.saved.volume)
    taken = sum(
        status.allocated_bytes
        for seen in inventory.hosts.values()
        for status in (*seen.snapshots, *seen.volumes)
        if status.id in (*whole.snapshots, whole.saved.volume)
    )
    try:
        going_back(state, inventory, whole.server, whole.id)
        why_not = ""
    except (Refused, Conflict, NotFound) as error:
        why_not = error.message
    return ServerSnapshotView(
        spec=whole,
        missing=missing(state, whole),
        memory_mib=kept.spec.size_mib if kept is not None else 0,
        allocated_bytes=taken,
        why_not=why_not,
    )
