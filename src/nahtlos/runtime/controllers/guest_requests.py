"""Whether a server's guest can be asked for something, as far as its host has told. Pure; every refusal names
the field and the remedy."""

from collections.abc import Iterable

import msgspec

from nahtlos.model.errors import Conflict, Refused
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.inventory import Inventory, ServerStatus
from nahtlos.model.nouns import HostRole, ServerSpec
from nahtlos.model.storage import Consistency
from nahtlos.runtime.controllers.state import State

FIELD = "consistency"
KNOWN = "guest-agent"
"""Among what a host's agent knows."""
INSTEAD = "or take what is consistent as after a power failure: --consistency crash (or preferred)"


def with_channel(state: State, inventory: Inventory, spec: ServerSpec) -> ServerSpec:
    """A new server has a channel to the agent in its guest, once every host can give it one: it has to be
    able to go to each of them."""
    hosts = [host for host, row in state.hosts.items() if row.spec.role is HostRole.COMPUTE]
    seen = [inventory.hosts.get(host) for host in hosts]
    able = all(each is not None and KNOWN in each.knows for each in seen)
    return msgspec.structs.replace(spec, guest_agent=able)


def check_freezable(
    state: State, inventory: Inventory, volumes: Iterable[VolumeId], consistency: Consistency
) -> None:
    """Whether the guests that write to these can freeze their file systems, where nothing less will do."""
    if consistency is not Consistency.FILESYSTEM:
        return
    for volume in volumes:
        row = state.volumes.get(volume)
        for host in row.spec.current if row is not None else ():
            seen = inventory.hosts.get(host)
            if seen is not None and KNOWN not in seen.knows:
                raise Conflict(
                    f"the agent of {host} is of a release that freezes no guests",
                    field=FIELD,
                    remedy=f"upgrade it, {INSTEAD}",
                )
        holder = next((s for s, r in state.servers.items() if volume in r.spec.all_volumes), None)
        if holder is None:
            raise Refused(
                f"{volume} is attached to no server: nobody has a file system on it open",
                field=FIELD,
                remedy="leave --consistency out",
            )
        _check_guest(state, inventory, holder)


def _check_guest(state: State, inventory: Inventory, server: ServerId) -> None:
    if not state.servers[server].spec.guest_agent:
        raise Conflict(
            f"the machine of {server} has no channel to an agent in the guest",
            field=FIELD,
            remedy=f"servers created from now on have one; {INSTEAD}",
        )
    found = _observed(inventory, server)
    if found is None or found[1].guest is None or not found[1].guest.answers:
        why = found[1].guest.why if found is not None and found[1].guest is not None else ""
        raise Conflict(
            f"no agent answers in {server}" + (f": {why}" if why else ""),
            field=FIELD,
            remedy=f"install and start qemu-guest-agent in it (see: nahtlos server show {server}), {INSTEAD}",
        )


def _observed(inventory: Inventory, server: ServerId) -> tuple[HostId, ServerStatus] | None:
    found = (
        (host, status)
        for host, seen in inventory.hosts.items()
        for status in seen.servers
        if status.id == server and status.guest is not None
    )
    return max(found, key=lambda pair: pair[1].epoch, default=None)
