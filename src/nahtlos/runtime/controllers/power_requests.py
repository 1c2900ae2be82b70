"""Whether a server can be stopped, started or booted anew, and the request that is written for it. Pure; None
where nothing is to be written, because that is asked for already."""

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import Inventory
from nahtlos.model.power import Power, PowerState
from nahtlos.runtime.controllers.powers import StopRequest
from nahtlos.runtime.controllers.requests import present_server
from nahtlos.runtime.controllers.state import State

LONGEST_STOP = 3600.0


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
    if before.state is PowerState.OFF and (before.hard or not request.hard):
        return None
    return Power(
        state=PowerState.OFF,
        serial=before.serial + 1,
        boot=before.boot,
        hard=request.hard,
        seconds=seconds,
    )


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
    return Power(state=PowerState.ON, serial=before.serial + 1, boot=before.serial + 1)


def rebooted(state: State, inventory: Inventory, server: ServerId, request: StopRequest) -> Power:
    before = _power(state, inventory, server)
    seconds = _checked_seconds(request)
    if before.state is not PowerState.ON:
        word = "stopped" if before.state is PowerState.OFF else "suspended"
        verb = "start" if before.state is PowerState.OFF else "resume"
        raise Conflict(f"{server} is {word}", field="server", remedy=f"nahtlos server {verb} {server}")
    serial = before.serial + 1
    return Power(state=PowerState.ON, serial=serial, boot=serial, hard=request.hard, seconds=seconds)


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
