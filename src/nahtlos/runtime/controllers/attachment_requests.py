"""Whether a server can have a volume, or be without it, and which disks it then has. Pure; every refusal
names the field and the remedy."""

import msgspec

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import ServerId, VolumeId
from nahtlos.model.nouns import MOST_DATA_PLACES, ServerSpec
from nahtlos.model.power import PowerState
from nahtlos.model.storage import VolumeSpec
from nahtlos.runtime.controllers.known_volumes import (
    check_idle,
    check_no_memory,
    holder_of,
    is_system_disk,
    known_volume,
)
from nahtlos.runtime.controllers.network_requests import same_project
from nahtlos.runtime.controllers.requests import present_server
from nahtlos.runtime.controllers.state import State


def attached_server(state: State, volume: VolumeId, server: ServerId) -> ServerSpec:
    """The server with the volume in its first free place."""
    spec = _free_volume(state, volume, "volume")
    row = state.servers[present_server(state, server)]
    check_not_suspended(row.spec)
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
    check_no_memory(state, volume, field)
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


def check_not_suspended(spec: ServerSpec) -> None:
    """Its guest remembers the disks it has."""
    if spec.power.state is PowerState.SUSPENDED:
        raise Conflict(
            f"{spec.id} is suspended, and remembers the disks it has",
            field="server",
            remedy=f"nahtlos server resume {spec.id} first",
        )
    if spec.going_back is not None:
        raise Conflict(
            f"{spec.id} goes back to snapshot {spec.going_back.snapshot}, and remembers its disks",
            field="server",
            remedy="wait until it runs",
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
    check_not_suspended(spec)
    check_idle(state, volume)
    left = [VolumeId("") if name == volume else name for name in spec.data_volumes]
    while left and not left[-1]:
        left.pop()
    return msgspec.structs.replace(spec, data_volumes=tuple(left))
