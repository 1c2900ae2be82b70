"""Whether a server can be stopped, started or booted anew, and the request that is written for it. Pure; None
where nothing is to be written, because that is asked for already."""

import msgspec

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import ServerSpec
from nahtlos.model.power import Power, PowerState
from nahtlos.model.storage import VolumeSpec
from nahtlos.runtime.controllers.powers import StopRequest
from nahtlos.runtime.controllers.requests import present_server
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_homes import system_disk

LONGEST_STOP = 3600.0
DEVICES_MIB = 64
"""Room for devices' state, for the heads of pages, and for the list of digests."""


def stopped(state: State, inventory: Inventory, server: ServerId, request: StopRequest) -> Power | None:
    """A stop that is under way may be made a hard one."""
    before = _power(state, inventory, server)
    seconds = _checked_seconds(request)
    if before.state is PowerState.SUSPENDED and not request.hard:
        raise Conflict(
            f"{server} is suspended: stopped, it would lose what was saved of its memory",
            field="server",
            remedy=f"nahtlos server resume {server}, then stop it; or give up what was saved: "
            f"nahtlos server stop {server} --hard",
        )
    if before.state is PowerState.OFF and not before.again and (before.hard or not request.hard):
        return None
    return Power(
        state=PowerState.OFF,
        serial=before.serial + 1,
        boot=before.boot,
        hard=request.hard,
        seconds=seconds,
    )


def stopped_for_a_while(state: State, inventory: Inventory, server: ServerId) -> ServerSpec | None:
    """Until what is to be done to its disks is done. None: it is stopped as it is."""
    power = stopped(state, inventory, server, StopRequest())
    if power is None:
        return None
    return msgspec.structs.replace(
        state.servers[server].spec, power=msgspec.structs.replace(power, again=True)
    )


def booted(power: Power) -> Power:
    return Power(state=PowerState.ON, serial=power.serial + 1, boot=power.serial + 1)


def started(state: State, inventory: Inventory, server: ServerId) -> Power | None:
    before = _power(state, inventory, server)
    if before.state is PowerState.SUSPENDED:
        raise Conflict(
            f"{server} is suspended",
            field="server",
            remedy=f"nahtlos server resume {server}; or give up what was saved: "
            f"nahtlos server stop {server} --hard, then start it",
        )
    if before.state is PowerState.ON:
        return None
    if before.again:
        raise Conflict(
            f"{server} is stopped while its volumes are reverted, and runs again after that",
            field="server",
            remedy="wait until it does, or give that up: nahtlos volume cancel VOLUME",
        )
    return booted(before)


def rebooted(state: State, inventory: Inventory, server: ServerId, request: StopRequest) -> Power:
    before = _power(state, inventory, server)
    seconds = _checked_seconds(request)
    if before.state is not PowerState.ON:
        word = "stopped" if before.state is PowerState.OFF else "suspended"
        verb = "start" if before.state is PowerState.OFF else "resume"
        raise Conflict(f"{server} is {word}", field="server", remedy=f"nahtlos server {verb} {server}")
    serial = before.serial + 1
    return Power(state=PowerState.ON, serial=serial, boot=serial, hard=request.hard, seconds=seconds)


def suspended(state: State, inventory: Inventory, server: ServerId) -> ServerSpec | None:
    """With the name of the volume on which its memory is to be saved."""
    before = _power(state, inventory, server)
    spec = state.servers[server].spec
    if before.state is PowerState.SUSPENDED:
        return None
    if before.state is PowerState.OFF:
        raise Conflict(
            f"{server} is stopped: there is no memory to save",
            field="server",
            remedy=f"nahtlos server start {server}",
        )
    if spec.going_back is not None:
        raise Conflict(
            f"{server} goes back to snapshot {spec.going_back.snapshot}",
            field="server",
            remedy="wait until it runs",
        )
    place = _place(state, server)
    seen = inventory.hosts.get(place) if place is not None else None
    if seen is None or "suspend" not in seen.knows:
        raise Conflict(
            f"{server} is on no host that can suspend it", field="server", remedy="wait until it runs"
        )
    serial = before.serial + 1
    return msgspec.structs.replace(
        spec,
        power=Power(state=PowerState.SUSPENDED, serial=serial, boot=before.boot),
        memory_volume=VolumeId(f"{server}-memory-{serial}"),
    )


def memory_volume(state: State, inventory: Inventory, spec: ServerSpec) -> VolumeSpec:
    assert spec.memory_volume is not None, f"{spec.id} is not to be suspended"
    return volume_for_memory(state, inventory, spec, spec.memory_volume)


def volume_for_memory(
    state: State, inventory: Inventory, spec: ServerSpec, name: VolumeId, times: int = 1
) -> VolumeSpec:
    """As many copies as its system disk has, encrypted if any of its disks is. `times`: how often all of the
    memory has room."""
    system = state.volumes[spec.volume].spec
    disks = (state.volumes[name].spec for name in spec.all_volumes if name in state.volumes)
    volume = VolumeSpec(
        id=name,
        size_mib=times * (spec.size.memory_mib + spec.size.memory_mib // 64) + DEVICES_MIB,
        image=None,
        host=HostId(""),
        project=spec.project,
        encryption_key=next((disk.encryption_key for disk in disks if disk.encryption_key), None),
    )
    return system_disk(state, inventory, volume, len(system.copies))


def resumed(state: State, inventory: Inventory, server: ServerId) -> Power | None:
    before = _power(state, inventory, server)
    if before.state is PowerState.ON:
        return None
    if before.state is PowerState.OFF:
        raise Conflict(
            f"{server} is stopped, not suspended", field="server", remedy=f"nahtlos server start {server}"
        )
    return Power(state=PowerState.ON, serial=before.serial + 1, boot=before.boot)


def switched_itself_off(power: Power) -> Power:
    """What is asked for follows the guest."""
    return Power(state=PowerState.OFF, serial=power.serial + 1, boot=power.boot, hard=True)


def _checked_seconds(request: StopRequest) -> float:
    if not 1 <= request.seconds <= LONGEST_STOP:
        raise Refused(
            f"{request.seconds:g} s for a guest to switch itself off",
            field="seconds",
            remedy=f"give 1 to {LONGEST_STOP:g}, or do not ask it: --hard",
        )
    return request.seconds


def _power(state: State, inventory: Inventory, server: ServerId) -> Power:
    row = state.servers[present_server(state, server)]
    place = _place(state, server)
    seen = inventory.hosts.get(place) if place is not None else None
    if place is not None and (seen is None or "power" not in seen.knows):
        raise Conflict(
            f"the agent of {place}, which has {server}, knows of no servers that are stopped",
            field="server",
            remedy=f"upgrade it, or move {server} to a host with a later one",
        )
    return row.spec.power


def _place(state: State, server: ServerId) -> HostId | None:
    owner = state.blueprint.servers.get(server) if state.blueprint else None
    return owner.host if owner else None
