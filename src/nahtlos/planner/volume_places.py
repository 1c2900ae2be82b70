"""Where a copy of a volume goes: on a host that has room, in another failure domain than the others, near its
server, and where most is free. Pure; serves requests and the planner alike."""

from collections.abc import Collection, Mapping

from nahtlos.model.blueprint import HostIntent, Policy
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import HostRole, HostSpec
from nahtlos.model.storage import StorageBackend

MIB = 1 << 20


def domain_of(spec: HostSpec) -> str:
    """A host that names none is one by itself."""
    return f"={spec.domain}" if spec.domain else spec.id


def keeps_volumes(policy: Policy, host: HostId) -> bool:
    """Whether it is a host that new copies may go to."""
    spec = policy.hosts.get(host)
    active = policy.intents.get(host, HostIntent.ACTIVE) is HostIntent.ACTIVE
    return spec is not None and spec.role is HostRole.COMPUTE and active and host not in policy.given_up


def free_mib(inventory: Inventory, host: HostId) -> int | None:
    """None: not known."""
    seen = inventory.hosts.get(host)
    return None if seen is None or seen.pool is None else seen.pool.free // MIB


def has_room(inventory: Inventory, host: HostId, size_mib: int, coming_mib: int = 0) -> bool:
    free = free_mib(inventory, host)
    return free is None or free - coming_mib >= size_mib


def served_mib(policy: Policy) -> dict[HostId, int]:
    """What each host has promised to keep."""
    served: dict[HostId, int] = {}
    for volume in policy.volumes.values():
        if volume.backend is StorageBackend.EMBEDDED:
            for copy in volume.copies:
                served[copy.host] = served.get(copy.host, 0) + volume.size_mib
    return served


def places(
    policy: Policy,
    inventory: Inventory,
    *,
    size_mib: int,
    beside: Collection[HostId] = (),
    without: Collection[HostId] = (),
    near: HostId | None = None,
    coming: Mapping[HostId, int] | None = None,
    as_if_connected: bool = False,
) -> list[HostId]:
    """Hosts that could take one more copy, best first. `beside`: hosts of the other copies; `coming`: MiB
    that are on their way to each."""
    taken = {domain_of(policy.hosts[h]) for h in beside if h in policy.hosts}
    served, on_way = served_mib(policy), coming or {}
    able = [
        host
        for host in policy.hosts
        if keeps_volumes(policy, host)
        and host not in beside
        and host not in without
        and (as_if_connected or host in inventory.connected)
        and has_room(inventory, host, size_mib, on_way.get(host, 0))
    ]

    def rank(host: HostId) -> tuple[bool, bool, int, int, HostId]:
        free = free_mib(inventory, host)
        return (
            domain_of(policy.hosts[host]) in taken,
            host != near,
            served.get(host, 0) + on_way.get(host, 0),
            -(free or 0),
            host,
        )

    return sorted(able, key=rank)


def spread(
    policy: Policy,
    inventory: Inventory,
    *,
    size_mib: int,
    copies: int,
    beside: Collection[HostId] = (),
    without: Collection[HostId] = (),
    near: HostId | None = None,
    as_if_connected: bool = False,
) -> list[HostId]:
    """So many hosts for further copies, or as many as there are."""
    chosen: list[HostId] = []
    for _ in range(copies):
        found = places(
            policy,
            inventory,
            size_mib=size_mib,
            beside=(*beside, *chosen),
            without=without,
            near=near,
            as_if_connected=as_if_connected,
        )
        if not found:
            break
        chosen.append(found[0])
    return chosen
