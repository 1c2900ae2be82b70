"""Whether a server can be given what is asked for, from its creation and while it runs, and what exactly it
then is. Pure; every refusal names the field and the remedy.

What is hardware (how far vCPUs and memory may be raised) is decided once, at its creation.
"""

from dataclasses import dataclass

import msgspec
from msgspec import UNSET

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.inventory import Inventory
from nahtlos.model.networking import PortSpec
from nahtlos.model.nouns import DATA_PLACES, MOST_DATA_PLACES, CpuShare, ServerSpec, Size
from nahtlos.model.power import PowerState
from nahtlos.model.storage import DiskLimits, VolumeSpec
from nahtlos.model.version_pairs import UNPLUGS_SINCE, numbers
from nahtlos.planner.place import room_to_grow, why_growth_breaks
from nahtlos.planner.reserve import KEEP
from nahtlos.runtime.controllers.cloud import ServerChange, ServerRequest
from nahtlos.runtime.controllers.consents import checked_budget, checked_priority
from nahtlos.runtime.controllers.networks import PortChange
from nahtlos.runtime.controllers.port_requests import changed_port
from nahtlos.runtime.controllers.project_requests import check_project
from nahtlos.runtime.controllers.requests import (
    MAX_MEMORY_MIB,
    MAX_VCPUS,
    check_promise,
    check_room,
    present_server,
    words,
)
from nahtlos.runtime.controllers.share_requests import check_shares, checked_share
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_requests import changed_volume
from nahtlos.runtime.controllers.volumes import VolumeChange

BLOCK_MIB = 4
"""Guests take and give back plugged memory in blocks of this size."""
GUEST_BLOCK_MIB = 128
"""Linux takes plugged memory into use in blocks of this size, so that much of it must be whole."""


# --- from the start ----------------------------------------------------------------------------------


def with_hardware(request: ServerRequest, spec: ServerSpec) -> ServerSpec:
    """A server that is to be created, with the places for what it may be given later."""
    cpu = checked_share(request.cpu, spec.size.vcpus)
    vcpus, memory = _max_vcpus(request, spec.size), _max_memory(request, spec.size)
    return msgspec.structs.replace(
        spec,
        cpu=cpu,
        data_places=_data_places(request),
        max_vcpus=vcpus,
        boot_memory_mib=spec.size.memory_mib if memory else 0,
        max_memory_mib=memory,
        display=request.display,
    )


def check_display(lacking: tuple[HostId, ...]) -> None:
    """Any host may come to run it, and an agent of an older release would start it without its card."""
    if lacking:
        raise Refused(
            f"agents of an older release, which know no displays: {', '.join(sorted(lacking))}",
            field="display",
            remedy="upgrade them first, or create the server without one",
        )


def check_data_places(lacking: tuple[HostId, ...]) -> None:
    """Likewise without its places, and it could be moved to no newer one then."""
    if lacking:
        raise Refused(
            f"agents of an older release, which know two places only: {', '.join(sorted(lacking))}",
            field="data_places",
            remedy=f"upgrade them first, or create the server with {DATA_PLACES}",
        )


def _data_places(request: ServerRequest) -> int:
    asked = request.data_places
    if not DATA_PLACES <= asked <= MOST_DATA_PLACES:
        raise Refused(
            f"places for {asked} data volumes",
            field="data_places",
            remedy=f"give {DATA_PLACES} to {MOST_DATA_PLACES}",
        )
    return asked


def _max_vcpus(request: ServerRequest, size: Size) -> int:
    asked = request.max_vcpus
    if asked and not size.vcpus <= asked <= MAX_VCPUS:
        raise Refused(
            f"at most {asked} vCPUs for a server of {size.vcpus}",
            field="max_vcpus",
            remedy=f"give {size.vcpus} to {MAX_VCPUS}, or none",
        )
    return asked


def _max_memory(request: ServerRequest, size: Size) -> int:
    asked, boot = request.max_memory_mib, size.memory_mib
    if not asked or asked == boot:
        return 0
    if not boot <= asked <= MAX_MEMORY_MIB:
        raise Refused(
            f"at most {asked} MiB for a server of {boot}",
            field="max_memory_mib",
            remedy=f"give {boot} to {MAX_MEMORY_MIB}, or none",
        )
    beyond = (asked - boot) % GUEST_BLOCK_MIB
    if beyond:
        above = asked + GUEST_BLOCK_MIB - beyond
        raise Refused(
            f"guests take memory in blocks of {GUEST_BLOCK_MIB} MiB: from {boot} to {asked} MiB is no whole "
            "number of them",
            field="max_memory_mib",
            remedy=f"give {above}" if asked - beyond == boot else f"give {asked - beyond} or {above}",
        )
    return asked


# --- while it runs -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A server, and those of its volumes that are different, as they are to be."""

    server: ServerSpec
    volumes: tuple[VolumeSpec, ...]


def changed_server(state: State, inventory: Inventory, server: ServerId, change: ServerChange) -> Changed:
    """All that is asked for, checked as a whole."""
    before = state.servers[present_server(state, server)].spec
    if change == ServerChange():
        raise Refused("nothing to change", field="server", remedy="see nahtlos server set --help")
    size = Size(
        vcpus=_vcpus(state, inventory, before, change.vcpus),
        memory_mib=_memory(before, change.memory_mib),
    )
    cpu = checked_share(_share(before.cpu, change), size.vcpus)
    if cpu != before.cpu:
        check_shares(state, inventory, server, cpu)
    after = msgspec.structs.replace(
        before,
        size=size,
        cpu=cpu,
        ports=_ports(state, before, change),
        blackout_budget_ms=before.blackout_budget_ms
        if change.blackout_budget_ms is UNSET
        else checked_budget(change.blackout_budget_ms),
        allow_slowdown=before.allow_slowdown if change.allow_slowdown is UNSET else change.allow_slowdown,
        allow_post_copy=before.allow_post_copy if change.allow_post_copy is UNSET else change.allow_post_copy,
        on_host_failure=before.on_host_failure if change.on_host_failure is UNSET else change.on_host_failure,
        restart_priority=before.restart_priority
        if change.restart_priority is UNSET
        else checked_priority(change.restart_priority),
    )
    volumes = _volumes(state, inventory, before, change)
    check_project(state, before.project, servers={server: after}, volumes={v.id: v for v in volumes})
    if size != before.size:
        _check_at_rest(state, server)
        check_promise(state, size, instead_of=server)
        _check_room(state, inventory, after)
    return Changed(server=after, volumes=volumes)


def asked(change: ServerChange) -> str:
    """In words."""
    names = (
        "vcpus",
        "memory_mib",
        "cpu_quota",
        "cpu_weight",
        "blackout_budget_ms",
        "allow_slowdown",
        "allow_post_copy",
        "on_host_failure",
        "restart_priority",
    )
    given = {name: getattr(change, name) for name in names}
    said = [f"{name} {value}" for name, value in given.items() if value is not UNSET]
    if change.net_in is not UNSET or change.net_out is not UNSET:
        said.append("other limits of its ports")
    if change.iops is not UNSET or change.bytes_per_second is not UNSET:
        said.append("other limits of its disks")
    if change.pin is not UNSET:
        said.append(f"its place on {change.pin}" if change.pin else "no host that it is pinned to")
    return ", ".join(said)


def _vcpus(state: State, inventory: Inventory, spec: ServerSpec, asked: int | msgspec.UnsetType) -> int:
    if asked is UNSET or asked == spec.size.vcpus:
        return spec.size.vcpus
    if not spec.max_vcpus:
        raise Refused(
            f"the machine of {spec.id} has no places for vCPUs to come and go",
            field="vcpus",
            remedy="that is decided when it is created: nahtlos server create --max-vcpus N",
        )
    if not 1 <= asked <= spec.max_vcpus:
        raise Refused(
            f"{asked} is more vCPUs than the machine's shape allows" if asked > 0 else f"{asked} vCPUs",
            field="vcpus",
            remedy=f"ask for 1 to {spec.max_vcpus}",
        )
    if asked < spec.size.vcpus:
        _check_takes_back(state, inventory, spec.id)
    return asked


def _check_takes_back(state: State, inventory: Inventory, server: ServerId) -> None:
    owner = state.blueprint.servers.get(server) if state.blueprint else None
    seen = inventory.hosts.get(owner.host) if owner else None
    status = next((s for s in (seen.servers if seen else ()) if s.id == server), None)
    if seen is None or seen.accelerator is None or status is None or status.release is None:
        return
    version = numbers(state.release_versions.get(status.release, ""))
    if seen.accelerator.name == "tcg" and version and version < UNPLUGS_SINCE:
        needs = ".".join(map(str, UNPLUGS_SINCE))
        raise Conflict(
            f"{status.release} under TCG does not let go of a vCPU safely",
            field="vcpus",
            remedy=f"bring {server} to a release with QEMU {needs} or newer (nahtlos server replace-vmm), or "
            f"leave its vCPUs and give it a quota: nahtlos server set {server} --cpu-quota N",
        )


def _memory(spec: ServerSpec, asked: int | msgspec.UnsetType) -> int:
    if asked is UNSET or asked == spec.size.memory_mib:
        return spec.size.memory_mib
    if not spec.max_memory_mib:
        raise Refused(
            f"the machine of {spec.id} has no place for memory to come and go",
            field="memory_mib",
            remedy="that is decided when it is created: nahtlos server create --max-memory SIZE",
        )
    if not spec.boot_memory_mib <= asked <= spec.max_memory_mib:
        raise Refused(
            f"{asked} MiB is more memory than the machine's shape allows"
            if asked > spec.max_memory_mib
            else f"{asked} MiB is less than the {spec.boot_memory_mib} MiB that are there from the start",
            field="memory_mib",
            remedy=f"ask for {spec.boot_memory_mib} to {spec.max_memory_mib}",
        )
    beyond = (asked - spec.boot_memory_mib) % BLOCK_MIB
    if beyond:
        raise Refused(
            f"memory is plugged in blocks of {BLOCK_MIB} MiB beyond {spec.boot_memory_mib} MiB, not {asked}",
            field="memory_mib",
            remedy=f"ask for {asked - beyond} or {asked - beyond + BLOCK_MIB}",
        )
    return asked


def _share(before: CpuShare, change: ServerChange) -> CpuShare:
    return CpuShare(
        quota=before.quota if change.cpu_quota is UNSET else change.cpu_quota,
        weight=before.weight if change.cpu_weight is UNSET else change.cpu_weight,
    )


def _ports(state: State, spec: ServerSpec, change: ServerChange) -> tuple[PortSpec, ...]:
    if change.net_in is UNSET and change.net_out is UNSET:
        return spec.ports
    if not spec.ports:
        raise Conflict(f"{spec.id} has no port", field="net_in", remedy="leave out what limits its network")
    topology, asked = state.topology(), PortChange(ingress=change.net_in, egress=change.net_out)
    try:
        return tuple(changed_port(topology, port.id, asked) for port in spec.ports)
    except Refused as error:
        names = {"ingress": "net_in", "egress": "net_out"}
        error.field = names.get(error.field, error.field)
        raise


def _volumes(
    state: State, inventory: Inventory, spec: ServerSpec, change: ServerChange
) -> tuple[VolumeSpec, ...]:
    if change.iops is UNSET and change.bytes_per_second is UNSET:
        return ()
    return tuple(_limited(state, inventory, volume, change) for volume in spec.all_volumes)


def _limited(state: State, inventory: Inventory, volume: VolumeId, change: ServerChange) -> VolumeSpec:
    row = state.volumes.get(volume)
    limits = row.spec.limits if row is not None else DiskLimits()
    if change.iops is not UNSET:
        limits = msgspec.structs.replace(
            limits, iops=change.iops, iops_burst=limits.iops_burst if change.iops else 0
        )
    if change.bytes_per_second is not UNSET:
        limits = msgspec.structs.replace(
            limits,
            bytes=change.bytes_per_second,
            bytes_burst=limits.bytes_burst if change.bytes_per_second else 0,
        )
    try:
        return changed_volume(state, inventory, volume, VolumeChange(limits=limits))
    except Refused as error:
        error.message = f"{volume}: {error.message}"
        error.field = "bytes_per_second" if error.field.startswith("limits.bytes") else "iops"
        raise


def _check_at_rest(state: State, server: ServerId) -> None:
    """Both ends of a move start from one shape of the server: it is not changed under them. Nor under what
    was saved of it."""
    if state.servers[server].spec.power.state is PowerState.SUSPENDED:
        raise Conflict(
            f"{server} is suspended; its vCPUs and memory stay as they are meanwhile",
            field="server",
            remedy=f"nahtlos server resume {server} first",
        )
    if (back := state.servers[server].spec.going_back) is not None:
        raise Conflict(
            f"{server} goes back to {back.snapshot}; its vCPUs and memory stay as they are meanwhile",
            field="server",
            remedy="wait until it runs",
        )
    moves = state.blueprint.moves if state.blueprint else ()
    move = next((m for m in moves if m.server == server), None)
    if move is not None:
        what = "is being replaced in place" if move.in_place else f"is moving to {move.destination}"
        raise Conflict(
            f"{server} {what} ({move.id}); its vCPUs and memory stay as they are meanwhile",
            field="server",
            remedy="wait until that has ended; everything else can be changed now",
        )


def _check_room(state: State, inventory: Inventory, after: ServerSpec) -> None:
    server = after.id
    if state.blueprint is None or server not in state.blueprint.servers:
        check_room(state, inventory, after, state.servers[server].placement)
        return
    lacking = room_to_grow(state.policy(), inventory, state.blueprint, after)
    if lacking is None:
        if broken := why_growth_breaks(state.policy(), inventory, state.blueprint, after):
            more = after.size.memory_mib > state.servers[server].spec.size.memory_mib
            raise Conflict(broken, field="memory_mib" if more else "vcpus", remedy=KEEP)
        return
    could = lacking.has + lacking.free
    most = Size(
        vcpus=min(could.vcpus, after.max_vcpus or after.size.vcpus),
        memory_mib=min(could.memory_mib, after.max_memory_mib or after.size.memory_mib),
    )
    short_of_vcpus = lacking.needs.vcpus > lacking.free.vcpus
    elsewhere = (
        f"or move it first: nahtlos server move {server} --to {lacking.fits_on[0]}"
        if lacking.fits_on
        else "or free or add capacity"
    )
    raise Conflict(
        f"{lacking.host} can give {server} {words(lacking.free)} more, {words(lacking.needs)} are asked for",
        field="vcpus" if short_of_vcpus else "memory_mib",
        remedy=f"ask for at most {words(most)}, {elsewhere}",
    )
