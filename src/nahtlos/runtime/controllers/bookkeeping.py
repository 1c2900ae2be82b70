"""What has come true and is taken out of intent. Pure: the state in, a list of what to write out.

Requests that were served, servers no host runs any more, volumes no host keeps any more, operations that
ended outside every blueprint, a campaign that is over.
"""

from collections import Counter
from dataclasses import dataclass, field

import msgspec

from nahtlos.model.blueprint import CampaignState, HostIntent, Policy
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, OperationId, RouterId, ServerId, VolumeId
from nahtlos.model.inventory import Inventory, RunState
from nahtlos.model.networking import LoadBalancerSpec
from nahtlos.model.nouns import HostRole, ServerSpec
from nahtlos.model.power import PowerState
from nahtlos.model.volume_work import Reverting, volumes_of
from nahtlos.planner.upgrade import campaign_over
from nahtlos.runtime.controllers.power_requests import booted, switched_itself_off
from nahtlos.runtime.controllers.server_snapshot_records import goes_on
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_chores import VolumeChores, volume_chores
from nahtlos.runtime.executor.decide import OVER, can_begin, operations_of
from nahtlos.runtime.executor.gateway_orders import gateway_order
from nahtlos.runtime.executor.world import World


@dataclass(frozen=True, kw_only=True)
class Chores:
    served_requests: tuple[ServerId, ...] = ()
    served_replacements: tuple[ServerId, ...] = ()
    gone_servers: tuple[ServerId, ...] = ()
    started_again: tuple[ServerSpec, ...] = ()
    """Servers that were stopped while their disks were changed, as they are to be."""
    spent_memory: tuple[ServerSpec, ...] = ()
    """Servers that need what was saved of them no more, as they are now."""
    switched_off: tuple[ServerSpec, ...] = ()
    """Servers whose guests have switched themselves off, as they are to be from now on."""
    gone_volumes: tuple[VolumeId, ...] = ()
    stray_ends: tuple[tuple[HostId, OperationId], ...] = ()
    impossible_moves: tuple[tuple[HostId, OperationId, ErrorRecord], ...] = ()
    """Moves that can never begin, with the host that will say so."""
    moved_gateways: tuple[tuple[RouterId, HostId, HostId], ...] = ()
    leaving_balancers: tuple[LoadBalancerSpec, ...] = ()
    """As they are to be: on another host than the one that is drained."""
    """Routers whose way out a drain has moved: from where it was asked for, to where it is asked for now."""
    campaign_over: bool = False
    of_volumes: VolumeChores = field(default_factory=VolumeChores)

    def __bool__(self) -> bool:
        return self != Chores()


def chores(state: State, policy: Policy, inventory: Inventory, world: World) -> Chores:
    return Chores(
        of_volumes=volume_chores(state, policy, inventory, world),
        served_requests=_served_requests(policy, world),
        served_replacements=_served_replacements(policy, inventory, world),
        gone_servers=_gone_servers(state, inventory, world),
        started_again=_started_again(policy, world),
        spent_memory=_spent_memory(policy, inventory, world),
        switched_off=_switched_off(policy, inventory, world),
        gone_volumes=_gone_volumes(state, inventory),
        stray_ends=_stray_ends(state, inventory, world),
        impossible_moves=_impossible_moves(world),
        moved_gateways=_moved_gateways(world),
        leaving_balancers=leaving_balancers(world),
        campaign_over=policy.campaign is not None
        and policy.campaign.state in (CampaignState.RUNNING, CampaignState.CANCELLED)
        and campaign_over(policy, world.blueprint),
    )


def _served_requests(policy: Policy, world: World) -> tuple[ServerId, ...]:
    served = world.blueprint.served_requests
    return tuple(
        server
        for server, to in sorted(policy.requested_moves.items())
        if server in served and served[server] == to
    )


def _served_replacements(policy: Policy, inventory: Inventory, world: World) -> tuple[ServerId, ...]:
    """Seen to run the release that was asked for, by the epoch that is decided."""
    found: list[ServerId] = []
    for server, release in sorted(policy.requested_replacements.items()):
        owner = world.blueprint.servers.get(server)
        seen = inventory.hosts.get(owner.host) if owner else None
        found += [
            server
            for status in (seen.servers if seen else ())
            if owner and (status.id, status.epoch, status.release) == (server, owner.epoch, release)
        ]
    return tuple(found)


def _started_again(policy: Policy, world: World) -> tuple[ServerSpec, ...]:
    """Nothing is to be done to their disks any more."""
    works = [wish.work for wish in policy.volume_wishes] + [t.work for t in world.blueprint.volume_tasks]
    changed = {volume for work in works if isinstance(work, Reverting) for volume in volumes_of(work)}
    return tuple(
        msgspec.structs.replace(spec, power=booted(spec.power)) if spec.going_back is None else goes_on(spec)
        for _, spec in sorted(policy.servers.items())
        if spec.power.again and spec.power.state is PowerState.OFF and not changed & set(spec.all_volumes)
    )


def _spent_memory(policy: Policy, inventory: Inventory, world: World) -> tuple[ServerSpec, ...]:
    """They run by the newest request, or were stopped for good."""
    found: list[ServerSpec] = []
    for server, spec in sorted(policy.servers.items()):
        owner = world.blueprint.servers.get(server)
        if spec.memory_volume is None or owner is None or server in world.blueprint.saved:
            continue
        seen = inventory.hosts.get(owner.host)
        status = next((s for s in (seen.servers if seen else ()) if s.id == server), None)
        done = status is not None and (status.epoch, status.power) == (owner.epoch, spec.power.serial)
        if spec.power.again:
            continue  # stopped until its disks are what they were in a snapshot
        if spec.power.state is not PowerState.SUSPENDED and done:
            found.append(spec)
    return tuple(found)


def _switched_off(policy: Policy, inventory: Inventory, world: World) -> tuple[ServerSpec, ...]:
    """Nobody has asked for anything else since: what is wanted follows the guest."""
    found: list[ServerSpec] = []
    for server, owner in sorted(world.blueprint.servers.items()):
        spec, seen = policy.servers.get(server), inventory.hosts.get(owner.host)
        status = next((s for s in (seen.servers if seen else ()) if s.id == server), None)
        if spec is None or status is None or server in world.blueprint.off:
            continue
        asked = spec.power
        if (status.epoch, status.power, status.state) != (owner.epoch, asked.serial, RunState.STOPPED):
            continue
        if asked.state is not PowerState.OFF:
            found.append(msgspec.structs.replace(spec, power=switched_itself_off(asked)))
    return tuple(found)


def _gone_servers(state: State, inventory: Inventory, world: World) -> tuple[ServerId, ...]:
    """Every compute host has converged to a configuration that names the server as removed, and none
    reports it: no host's ledger knows it any more."""
    compute = [h for h, row in state.hosts.items() if row.spec.role is HostRole.COMPUTE]
    return tuple(
        server
        for server, row in state.servers.items()
        if row.removed_at is not None
        and server not in world.blueprint.servers
        and all(_has_removed(state, inventory, host, server) for host in compute)
    )


def _has_removed(state: State, inventory: Inventory, host: HostId, server: ServerId) -> bool:
    config, seen = state.configs.get(host), inventory.hosts.get(host)
    if config is None or seen is None:
        return False
    return (
        server in config.removed_servers
        and seen.generation >= config.generation
        and all(s.id != server for s in seen.servers)
        and all(o.server != server or o.state in OVER for o in seen.operations)
    )


def _gone_volumes(state: State, inventory: Inventory) -> tuple[VolumeId, ...]:
    """No host that had a copy has it any more."""
    return tuple(
        volume.id
        for volume in state.removed_volumes()
        if all(
            _has_deleted(state, inventory, copy.host, volume.id)
            for copy in volume.copies
            if copy.host in state.hosts
        )
    )


def _has_deleted(state: State, inventory: Inventory, host: HostId, volume: VolumeId) -> bool:
    config, seen = state.configs.get(host), inventory.hosts.get(host)
    if config is None or seen is None or volume not in config.removed_volumes:
        return False
    return seen.generation >= config.generation and all(v.id != volume for v in seen.volumes)


def _stray_ends(state: State, inventory: Inventory, world: World) -> tuple[tuple[HostId, OperationId], ...]:
    """Ended operations that wait for an acknowledgement although no blueprint names them and no record
    tells of their end."""
    current = operations_of(world.blueprint)
    return tuple(
        (host, o.id)
        for host, seen in sorted(inventory.hosts.items())
        for o in seen.operations
        if o.state in OVER and o.id not in current and o.id not in state.ended
    )


def _impossible_moves(world: World) -> tuple[tuple[HostId, OperationId, ErrorRecord], ...]:
    """The server was deleted before an agent was told of the move: the source will never begin it."""
    found: list[tuple[HostId, OperationId, ErrorRecord]] = []
    for move in world.blueprint.moves:
        told = world.status(move.source, move.id) or world.status(move.destination, move.id)
        if told is None and move.id not in world.refused and not can_begin(world, move):
            error = ErrorRecord(kind="refused", message=f"{move.server} is not to exist any more")
            found.append((move.source, move.id, error))
    for gateway in world.blueprint.gateway_moves:
        told = world.status(gateway.source, gateway.id) or world.status(gateway.destination, gateway.id)
        if told is None and gateway.id not in world.refused and gateway_order(world, gateway) is None:
            error = ErrorRecord(kind="refused", message=f"{gateway.router} has no way out any more")
            found.append((gateway.source, gateway.id, error))
    return tuple(found)


def _moved_gateways(world: World) -> tuple[tuple[RouterId, HostId, HostId], ...]:
    """It stays where a drain has sent it, also once the drained host is taken back."""
    moving = {move.router for move in world.blueprint.gateway_moves}
    places, policy = world.blueprint.gateways, world.policy
    return tuple(
        (router, asked, places[router].host)
        for router, asked in sorted(policy.gateways.items())
        if router in places
        and router not in moving
        and places[router].host != asked
        and policy.intents.get(asked) is HostIntent.DRAINED
    )


def leaving_balancers(world: World) -> tuple[LoadBalancerSpec, ...]:
    """A load balancer leaves a host that is drained for the one that carries fewest. What it passes on at
    that moment is cut off, as connections end in it; new ones are taken at its new place."""
    policy, balancers = world.policy, world.topology.balancers
    carried = Counter(balancer.host for balancer in balancers.values())
    open_hosts = sorted(
        host
        for host, spec in policy.hosts.items()
        if spec.role is HostRole.COMPUTE
        and policy.intents.get(host, HostIntent.ACTIVE) is HostIntent.ACTIVE
        and host in world.inventory.connected
    )
    found: list[LoadBalancerSpec] = []
    for _, balancer in sorted(balancers.items()):
        if policy.intents.get(balancer.host) is HostIntent.DRAINED and open_hosts:
            place = min(open_hosts, key=lambda host: (carried[host], host))
            carried[place] += 1
            found.append(msgspec.structs.replace(balancer, host=place))
    return tuple(found)
