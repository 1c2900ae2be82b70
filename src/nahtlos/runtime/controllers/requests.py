"""Whether a request can be granted, and what exactly it asks for. Pure; every refusal names the field and
the remedy."""

import ipaddress
from collections.abc import Collection, Iterable, Mapping

import msgspec
from msgspec import UNSET

from nahtlos.model.blueprint import GatewayPlace, HostIntent
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, ImageId, RouterId, ServerGroupId, ServerId, VolumeId, checked_name
from nahtlos.model.inventory import Inventory
from nahtlos.model.networking import PortSpec, RouterSpec
from nahtlos.model.nouns import USER_DATA_BYTES, Component, HostRole, HostSpec, Release, ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.planner.place import room_for
from nahtlos.runtime.controllers.cloud import HostChange, JoinRequest, ServerRequest
from nahtlos.runtime.controllers.consents import checked_budget, checked_priority
from nahtlos.runtime.controllers.state import State

MAX_VCPUS = 64
MIN_MEMORY_MIB = 32
MAX_MEMORY_MIB = 1 << 20
MAX_VOLUME_MIB = 1 << 21
MACHINE_PREFIX = "pc-q35-"
LONGEST_TTL = 7 * 86400


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


# --- what exists -------------------------------------------------------------------------------------


def known_host(state: State, host: HostId, field: str = "host") -> HostId:
    if host not in state.hosts:
        raise NotFound(f"no host '{host}'", field=field, remedy=f"hosts: {listed(state.hosts)}")
    return host


def compute_host(state: State, host: HostId, field: str = "host") -> HostId:
    if state.hosts[known_host(state, host, field)].spec.role is not HostRole.COMPUTE:
        others = [h for h, row in state.hosts.items() if row.spec.role is HostRole.COMPUTE]
        raise Refused(
            f"{host} has the role {HostRole.EDGE} and runs no servers",
            field=field,
            remedy=f"hosts that do: {listed(others)}",
        )
    return host


def check_intent(state: State, host: HostId, intent: HostIntent) -> None:
    """A drain that cannot come to its end for want of another host is refused; what waits is told later."""
    role = state.hosts[known_host(state, host)].spec.role
    if role is not HostRole.EDGE or intent is not HostIntent.DRAINED:
        return
    uplinks = [network.id for network in state.networks if network.gateway_host == host]
    if uplinks:
        raise Refused(
            f"{host} holds the uplink of {listed(uplinks)}, which stays where the settings say",
            field="host",
            remedy="name another host for it in the orchestrator's settings",
        )
    topology = state.topology()
    places = state.blueprint.gateways if state.blueprint else {}
    here = [r for r, spec in topology.routers.items() if spec.gateway and _place_of(spec, places) == host]
    others = [
        other
        for other, row in state.hosts.items()
        if other != host and row.spec.role is HostRole.EDGE and topology.external_interface(other)
    ]
    if here and not others:
        raise Conflict(
            f"{host} has the way out of {listed(here)}, and no other edge host has one to the outside",
            field="host",
            remedy="join another edge host and name its interface under `external` in the settings, or take "
            "the way out away: nahtlos router gateway unset",
        )


def _place_of(router: RouterSpec, places: Mapping[RouterId, GatewayPlace]) -> HostId | None:
    if router.id in places:
        return places[router.id].host
    return router.gateway.host if router.gateway else None


def known_server(state: State, server: ServerId) -> ServerId:
    if server not in state.servers:
        raise NotFound(f"no server '{server}'", field="server", remedy=f"servers: {listed(state.servers)}")
    return server


def present_server(state: State, server: ServerId) -> ServerId:
    if state.servers[known_server(state, server)].removed_at is not None:
        raise Conflict(f"{server} is being deleted", field="server")
    return server


# --- joining -----------------------------------------------------------------------------------------


def checked_ttl(ttl_seconds: int) -> int:
    if not 1 <= ttl_seconds <= LONGEST_TTL:
        raise Refused(
            f"{ttl_seconds} s is no life for a token",
            field="ttl_seconds",
            remedy=f"give 1 to {LONGEST_TTL} seconds",
        )
    return ttl_seconds


def check_join(state: State, request: JoinRequest) -> None:
    checked_name(request.host, "host")
    if not 1 <= request.peer_port <= 65535:
        raise Refused(f"{request.peer_port} is no port", field="peer_port", remedy="give 1 to 65535")
    try:
        ipaddress.ip_address(request.address)
    except ValueError as error:
        raise Refused(f"'{request.address}' is no IP address", field="address") from error
    if request.domain:
        checked_name(request.domain, "domain")
    known = state.hosts.get(request.host)
    if known is not None and known.spec.role is not request.role:
        raise Conflict(
            f"{request.host} is known as {known.spec.role}", field="role", remedy="join by another name"
        )
    for host, row in state.hosts.items():
        if host != request.host and row.spec.address == request.address:
            raise Conflict(
                f"{host} has the address {request.address}", field="address", remedy="choose another"
            )


def domain_of(state: State, host: HostId) -> str:
    """As it was, of a host that is known; else none."""
    return state.hosts[host].spec.domain if host in state.hosts else ""


def changed_host(state: State, host: HostId, change: HostChange) -> HostSpec:
    spec = state.hosts[known_host(state, host)].spec
    if change.domain is not UNSET:
        if change.domain:
            checked_name(change.domain, "domain")
        spec = msgspec.structs.replace(spec, domain=change.domain)
    return spec


# --- servers -----------------------------------------------------------------------------------------


def server_size(request: ServerRequest) -> Size:
    if not 1 <= request.vcpus <= MAX_VCPUS:
        raise Refused(f"{request.vcpus} vCPUs", field="vcpus", remedy=f"ask for 1 to {MAX_VCPUS}")
    if not MIN_MEMORY_MIB <= request.memory_mib <= MAX_MEMORY_MIB:
        raise Refused(
            f"{request.memory_mib} MiB of memory",
            field="memory_mib",
            remedy=f"ask for {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
        )
    return Size(vcpus=request.vcpus, memory_mib=request.memory_mib)


def chosen_image(request: ServerRequest, images: Mapping[ImageId, int]) -> ImageId:
    """The image asked for, or the only one; the volume must hold it."""
    image = request.image
    if image is None:
        if len(images) != 1:
            raise Refused(
                "no image is named, and there is not exactly one",
                field="image",
                remedy=f"name one of: {listed(images)}" if images else "build an image first",
            )
        image = next(iter(images))
    if image not in images:
        raise NotFound(f"no image '{image}'", field="image", remedy=f"images: {listed(images)}")
    if not images[image] <= request.volume_mib <= MAX_VOLUME_MIB:
        raise Refused(
            f"a volume of {request.volume_mib} MiB does not hold image {image}"
            if request.volume_mib < images[image]
            else f"a volume of {request.volume_mib} MiB is too large",
            field="volume_mib",
            remedy=f"ask for {images[image]} to {MAX_VOLUME_MIB}",
        )
    return image


def machine_type(registered: Collection[Release]) -> str:
    """The newest versioned machine type that every hypervisor has, so that a server can live on each."""
    releases = [r for r in registered if r.component is Component.HYPERVISOR]
    if not releases:
        raise Conflict(
            "no hypervisor release is registered",
            field="release",
            remedy="build and register one: nahtlos release build",
        )
    common = set[str].intersection(*(set(r.machine_types) for r in releases))
    versioned = [m for m in common if m.startswith(MACHINE_PREFIX) and _version(m)]
    if not versioned:
        raise Conflict(
            f"releases {listed(r.id for r in releases)} have no machine type {MACHINE_PREFIX}* in common",
            field="release",
        )
    return max(versioned, key=_version)


def _version(machine: str) -> tuple[int, ...]:
    parts = machine.removeprefix(MACHINE_PREFIX).split(".")
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else ()


def server_of(
    request: ServerRequest,
    *,
    size: Size,
    image: ImageId,
    machine: str,
    ports: tuple[PortSpec, ...],
) -> tuple[ServerSpec, VolumeSpec]:
    """The server, and its system disk without a place."""
    name = ServerId(checked_name(request.name, "name"))
    volume = VolumeSpec(
        id=VolumeId(f"{name}-disk"),
        size_mib=request.volume_mib,
        image=image,
        host=HostId(""),
        project=request.project,
        format=request.volume_format,
        limits=request.limits,
    )
    server = ServerSpec(
        id=name,
        project=request.project,
        size=size,
        volume=volume.id,
        ports=ports,
        machine=machine,
        user_data=_checked_user_data(request.user_data),
        blackout_budget_ms=checked_budget(request.blackout_budget_ms),
        allow_slowdown=request.allow_slowdown,
        allow_post_copy=request.allow_post_copy,
        on_host_failure=request.on_host_failure,
        restart_priority=checked_priority(request.restart_priority),
    )
    return server, volume


def _checked_user_data(text: str) -> str:
    length = len(text.encode())
    if length > USER_DATA_BYTES:
        raise Refused(
            f"the user data has {length} bytes, at most {USER_DATA_BYTES} are kept",
            field="user_data",
            remedy="let it fetch the rest: cloud-init follows #include lines",
        )
    return text


def check_promise(state: State, size: Size, *, instead_of: ServerId | None = None) -> None:
    """Servers in total stay within what was promised, which is what capacity is kept for. `instead_of`: the
    server whose size this is to be."""
    if state.promised == Size():
        return
    others = (r.spec.size for s, r in state.servers.items() if r.removed_at is None and s != instead_of)
    total = sum(others, size)
    if not total.fits(state.promised):
        raise Conflict(
            f"all servers together would need {words(total)}, promised are {words(state.promised)}",
            field="vcpus" if total.vcpus > state.promised.vcpus else "memory_mib",
            remedy="delete servers, ask for less, or promise more: nahtlos promise",
        )


def check_room(
    state: State,
    inventory: Inventory,
    spec: ServerSpec,
    host: HostId | None,
    *,
    group: ServerGroupId | None = None,
) -> None:
    """Refuses what no waiting would make fit. A host that only is not ready yet is waited for. `group`: that
    of a new server."""
    policy = state.policy()
    if group is not None:
        policy = msgspec.structs.replace(policy, members={**policy.members, spec.id: group})
    answer = room_for(policy, inventory, state.blueprint, spec, host)
    if answer is None:
        return
    if answer.barred:
        raise Conflict(answer.reason, field="group" if group else "host", remedy=answer.remedy)
    lacking = answer.lacks != Size()
    if not lacking and (host is None or _becomes_ready(state, host)):
        return
    raise Conflict(answer.reason, field="host" if host else "memory_mib", remedy=answer.remedy)


def _becomes_ready(state: State, host: HostId) -> bool:
    """Whether the host is on its way into service for the first time."""
    plan = state.blueprint.hosts.get(host) if state.blueprint else None
    upgrading = state.blueprint.upgrading if state.blueprint else None
    in_service = plan is not None and plan.phase.value != "switching"
    return not in_service and host != upgrading and state.hosts[host].intent.value == "active"


def words(size: Size) -> str:
    return f"{size.vcpus} vCPU and {size.memory_mib} MiB"


# --- capacity ----------------------------------------------------------------------------------------


def check_promised(state: State, inventory: Inventory, promised: Size) -> None:
    if promised.vcpus < 0 or promised.memory_mib < 0:
        raise Refused("less than nothing", field="promised", remedy="give whole vCPUs and MiB")
    compute = [h for h, row in state.hosts.items() if row.spec.role is HostRole.COMPUTE]
    total = sum((inventory.hosts[h].capacity for h in compute if h in inventory.hosts), Size())
    if not promised.fits(total):
        lacks = promised - total
        raise Refused(
            f"the hosts hold {words(total)}: {max(0, lacks.vcpus)} vCPU and "
            f"{max(0, lacks.memory_mib)} MiB are missing",
            field="promised",
            remedy="promise less, or join hosts first",
        )
