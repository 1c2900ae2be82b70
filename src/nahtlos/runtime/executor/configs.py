"""The whole configuration of one host, from a blueprint. Pure.

A server that moves is still its source's here, and its ports are at the source, until the blueprint says
that the move is over: meanwhile the two agents' ledgers know better and protect it. After a move the former
host passes frames on (`reflect`) until every host has converged to the ports' new place.
"""

from collections.abc import Mapping

import msgspec

from nahtlos.model.availability import PassedOver
from nahtlos.model.config import HostConfig, ServerConfig
from nahtlos.model.ids import HostId, NetworkId, PortId, ServerId
from nahtlos.model.nouns import HostRole, ServerSpec
from nahtlos.model.power import Power, PowerState
from nahtlos.model.storage import DiskBudget
from nahtlos.runtime.executor.attachments import attachment
from nahtlos.runtime.executor.networks import (
    load_balancers,
    network_configs,
    routers,
    security_groups,
    uplinks,
)
from nahtlos.runtime.executor.volumes import (
    exports,
    pinned,
    removed_snapshots,
    removed_volumes,
    snapshots_kept,
    volumes_kept,
)
from nahtlos.runtime.executor.world import World


def next_config(world: World, host: HostId) -> HostConfig:
    """What `host` shall be told: the last configuration itself if nothing changed, else one generation
    more."""
    last = world.configs.get(host)
    wanted = _content(world, host, last)
    if last is None:
        return msgspec.structs.replace(wanted, generation=1)
    same = msgspec.structs.replace(wanted, generation=last.generation)
    return last if same == last else msgspec.structs.replace(wanted, generation=last.generation + 1)


def server_config(world: World, server: ServerId, epoch: int) -> ServerConfig | None:
    """`server` as its owner by `epoch` must run it; None if its system disk is nowhere. A data volume that is
    nowhere is left out."""
    spec = world.policy.servers[server]
    reached = [
        attachment(world.policy.volumes[name], world.policy.hosts, world.ceph)
        if name in world.policy.volumes
        else None
        for name in spec.all_volumes
    ]
    system, *data = reached
    if system is None:
        return None
    memory = world.policy.volumes.get(spec.memory_volume) if spec.memory_volume is not None else None
    return ServerConfig(
        spec=msgspec.structs.replace(spec, power=_power(world, spec)),
        epoch=epoch,
        volume=system,
        data_volumes=tuple(d for d in data if d is not None),
        memory=attachment(memory, world.policy.hosts) if memory is not None else None,
        saved=world.blueprint.saved.get(server),
    )


def _power(world: World, spec: ServerSpec) -> Power:
    """As asked for; of a server that is off and is to run again, off, until it was decided where."""
    asked, off = spec.power, world.blueprint.off.get(spec.id)
    if off is None or asked.state is not PowerState.ON:
        return asked
    state = PowerState.SUSPENDED if spec.id in world.blueprint.saved else PowerState.OFF
    return Power(state=state, serial=off, boot=min(asked.boot, off))


def _content(world: World, host: HostId, last: HostConfig | None) -> HostConfig:
    policy = world.policy
    networks = network_configs(world, host)
    compute = policy.hosts[host].role is HostRole.COMPUTE
    plan = world.blueprint.hosts.get(host)
    return HostConfig(
        host=host,
        generation=0,
        release=plan.release if plan and compute else None,
        storage_release=plan.storage_release if plan and compute else None,
        network_release=plan.network_release if plan else None,
        networks=networks,
        uplinks=uplinks(world, host),
        servers=_servers(world, host),
        removed_servers=tuple(sorted(policy.removed_servers)) if compute else (),
        disk_budget=world.disk_budget if compute else DiskBudget(),
        volumes=volumes_kept(world, host),
        removed_volumes=removed_volumes(world, host),
        snapshots=snapshots_kept(world, host),
        removed_snapshots=removed_snapshots(world, host),
        snapshot_exports=exports(world, host),
        pinned_volumes=pinned(world, host),
        reflect=_reflect(world, host, last),
        security_groups=security_groups(world, networks),
        routers=routers(world, host, networks),
        load_balancers=load_balancers(world, networks),
        underlay=world.topology.underlay.shares,
        hosts=tuple(spec for _, spec in sorted(policy.hosts.items())),
        lease=plan.lease if plan else None,
        denials=tuple(p.denial for _, p in sorted(world.blueprint.hosts.items()) if p.denial is not None),
        passed_over=tuple(
            PassedOver(server=server, epoch=epoch)
            for server, epoch in sorted(world.blueprint.passed_over.get(host, {}).items())
        ),
    )


def _servers(world: World, host: HostId) -> tuple[ServerConfig, ...]:
    found: list[ServerConfig] = []
    for server, assignment in sorted(world.blueprint.servers.items()):
        if world.place_of(server) == host:
            config = server_config(world, server, assignment.epoch)
            if config is not None:
                found.append(config)
    return tuple(found)


# --- passing on --------------------------------------------------------------------------------------


def _reflect(world: World, host: HostId, last: HostConfig | None) -> tuple[PortId, ...]:
    """Ports that were at `host`, are elsewhere, and that some host may still look for here."""
    if last is None:
        return ()
    places = world.port_places()
    were_here = {port for port, place in _placed(last).items() if place == host} | set(last.reflect)
    return tuple(
        sorted(
            port
            for port in were_here
            if places.get(port, host) != host and not _all_know(world, port, places[port], except_for=host)
        )
    )


def _all_know(world: World, port: PortId, place: HostId, *, except_for: HostId) -> bool:
    """Whether every other host has converged to a configuration that has `port` at `place`. Hosts out of
    reach count, too: what they send still goes to the old place."""
    network = next(p.network for s in world.policy.servers.values() for p in s.ports if p.id == port)
    return all(
        _knows(world, host, port, network, place)
        for host in world.policy.hosts
        if host != except_for and host in world.configs
    )


def _knows(world: World, host: HostId, port: PortId, network: NetworkId, place: HostId) -> bool:
    """Converged is not enough: a host leaves the ports of a server as they are while it has an operation
    of that server, for instance one that was undone without its knowing. Ended ones count until they are
    acknowledged, which gives the host time to put its ports right. Who has no part in the network sends
    nothing there."""
    config = world.configs[host]
    seen = world.inventory.hosts.get(host)
    if seen is None or seen.generation < config.generation:
        return False
    part = next((n for n in config.networks if n.spec.id == network), None)
    if part is None:
        return True
    told = next((p for p in part.ports if p.id == port), None)
    if told is None or told.host != place:
        return False
    return all(operation.server != told.server for operation in seen.operations)


def _placed(config: HostConfig) -> Mapping[PortId, HostId]:
    return {port.id: port.host for network in config.networks for port in network.ports}
