"""On which hosts, or in Ceph, a volume and its copies can be as they are asked for. Pure; every refusal names
the field and the remedy."""

import msgspec

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import Inventory
from nahtlos.model.storage import Replica, ReplicaState, StorageBackend, VolumeSpec
from nahtlos.planner.volume_places import free_mib, has_room, keeps_volumes, places, spread
from nahtlos.runtime.controllers.requests import compute_host, listed, present_server
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_settings import checked_limits
from nahtlos.runtime.controllers.volumes import VolumeRequest

MAX_COPIES = 5


def placed(state: State, inventory: Inventory, volume: VolumeSpec, request: VolumeRequest) -> VolumeSpec:
    check_copies(request.copies)
    if request.host is not None:
        check_takes(state, inventory, compute_host(state, request.host), volume.size_mib)
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
    others = further_homes(state, inventory, volume.size_mib, [first], request.copies - 1)
    state_of_new = ReplicaState.STALE if kept else ReplicaState.CURRENT
    replicas = tuple(
        Replica(host=host, state=ReplicaState.CURRENT if host in kept else state_of_new) for host in others
    )
    return msgspec.structs.replace(volume, host=first, replicas=replicas)


def system_disk(state: State, inventory: Inventory, volume: VolumeSpec, copies: int) -> VolumeSpec:
    """With its places; of a server that is to be created."""
    check_copies(copies)
    checked_limits(volume.limits)
    first = _first(state, inventory, volume.size_mib, (), None)
    others = further_homes(state, inventory, volume.size_mib, [first], copies - 1)
    replicas = tuple(Replica(host=host) for host in others)
    return msgspec.structs.replace(volume, host=first, replicas=replicas)


def check_copies(copies: int) -> None:
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


def further_homes(
    state: State, inventory: Inventory, size_mib: int, beside: list[HostId], count: int
) -> list[HostId]:
    found = spread(state.policy(), inventory, size_mib=size_mib, copies=count, beside=beside)
    if len(found) < count:
        able = [*beside, *found]
        raise Conflict(
            f"{count + len(beside)} copies need as many hosts, and {len(able)} could have one "
            f"({listed(able)})",
            field="copies",
            remedy="ask for fewer, add or activate hosts, wait for those away, or free space on them",
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


def check_takes(state: State, inventory: Inventory, host: HostId, size_mib: int, field: str = "host") -> None:
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
    check_ceph(state, request.copies)
    check_ceph_keeps(volume)
    host = request.host or administering(state, inventory, volume.size_mib)
    return msgspec.structs.replace(volume, host=host)


def administering(state: State, inventory: Inventory, size_mib: int) -> HostId:
    """A host for a new image of Ceph's, which takes no room on it."""
    compute = [h for h in state.hosts if keeps_volumes(state.policy(), h)]
    hosts = [h for h in compute if h in inventory.connected] or compute
    if not hosts:
        raise no_place(state, inventory, size_mib, "host")
    return hosts[0]


def check_ceph(state: State, copies: int) -> None:
    ceph = state.kept.settings.ceph
    if ceph is None:
        raise Refused(
            "this cloud has no Ceph cluster",
            field="backend",
            remedy="name its pool: nahtlos volume settings --ceph-pool POOL",
        )
    if copies != 1:
        raise Refused(
            f"{copies} copies in Ceph, which keeps as many as pool {ceph.pool} is told to",
            field="copies",
            remedy=f"leave it out, and set it for the pool: ceph osd pool set {ceph.pool} size {copies}",
        )


def check_ceph_keeps(volume: VolumeSpec) -> None:
    if volume.encryption_key is not None:
        raise Refused(
            f"{volume.id} is encrypted, and images of Ceph's are not",
            field="encrypted",
            remedy="keep it on hosts: leave --backend out",
        )


def _host_of(state: State, server: ServerId) -> HostId | None:
    present_server(state, server)
    owner = state.blueprint.servers.get(server) if state.blueprint else None
    return owner.host if owner is not None else None
