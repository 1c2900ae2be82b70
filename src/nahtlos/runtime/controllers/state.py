"""One consistent look at the store, and the planner's and the executor's inputs put together from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import Blueprint, Policy
from nahtlos.model.config import HostConfig
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, OperationId, ProjectId, ReleaseId, ServerGroupId, ServerId, VolumeId
from nahtlos.model.inventory import (
    HostInventory,
    Inventory,
    OperationKind,
    OperationState,
    OperationStatus,
)
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import Component, HostRole, Size
from nahtlos.model.placement import ServerGroup
from nahtlos.model.prediction import Experience
from nahtlos.model.project_limits import ProjectLimits
from nahtlos.model.storage import VolumeSpec
from nahtlos.model.topology import Topology
from nahtlos.model.volume_work import VolumeEnd, kind_of, volumes_of
from nahtlos.runtime.controllers.experience import experience
from nahtlos.runtime.executor.world import World
from nahtlos.runtime.store import (
    availability,
    blueprints,
    campaigns,
    intent,
    inventories,
    leases,
    networking,
    operations,
    placement,
    projects,
    volumes,
)
from nahtlos.runtime.store.availability import Availability, silent_for
from nahtlos.runtime.store.campaigns import CampaignRow
from nahtlos.runtime.store.intent import HostRow, ServerRow, VolumeRow
from nahtlos.runtime.store.volumes import Volumes


@dataclass(frozen=True, kw_only=True)
class State:
    hosts: dict[HostId, HostRow]
    servers: dict[ServerId, ServerRow]
    volumes: dict[VolumeId, VolumeRow]
    networks: tuple[NetworkSpec, ...]
    functions: Topology
    """What is wanted of the network besides networks and ports."""
    promised: Size
    parallel_moves: int
    parallel_moves_per_host: int = 4
    release: ReleaseId | None
    storage_release: ReleaseId | None
    network_release: ReleaseId | None
    campaign: CampaignRow | None
    """The one that is not over."""
    blueprint: Blueprint | None
    configs: dict[HostId, HostConfig]
    inventories: dict[HostId, HostInventory]
    received: dict[HostId, float]
    refusals: dict[OperationId, tuple[HostId, ErrorRecord]]
    begun_at: dict[OperationId, float]
    """When each operation that has not ended was decided."""
    machine_types: dict[ReleaseId, tuple[str, ...]]
    release_versions: dict[ReleaseId, str]
    """Of hypervisors."""
    experience: Experience
    ended: frozenset[OperationId]
    """Those operations of the inventories whose end is recorded."""
    kept: Volumes = field(default_factory=Volumes)
    """Of volumes, what is not in `volumes`."""
    volume_ends: dict[OperationId, VolumeEnd] = field(default_factory=dict[OperationId, VolumeEnd])
    """Of the blueprint's volume tasks, those whose end is recorded."""
    project_limits: dict[ProjectId, ProjectLimits] = field(default_factory=dict[ProjectId, ProjectLimits])
    reserve: int = 0
    server_groups: dict[ServerGroupId, ServerGroup] = field(default_factory=dict[ServerGroupId, ServerGroup])
    now: float = 0.0
    """By the database's clock."""
    availability: Availability = field(default_factory=Availability)

    def policy(self) -> Policy:
        here = {name: row for name, row in self.servers.items() if row.removed_at is None}
        return Policy(
            hosts={host: row.spec for host, row in self.hosts.items()},
            intents={host: row.intent for host, row in self.hosts.items()},
            servers={name: row.spec for name, row in here.items()},
            removed_servers=frozenset(self.servers.keys() - here.keys()),
            volumes={name: row.spec for name, row in self.volumes.items() if not row.removed},
            networks=self.networks,
            release=self.release,
            storage_release=self.storage_release,
            network_release=self.network_release,
            campaign=self.campaign.campaign if self.campaign else None,
            gateways={r.id: r.gateway.host for r in self.functions.routers.values() if r.gateway},
            outside=self._outside(),
            placements={name: row.placement for name, row in here.items() if row.placement},
            server_groups=self.server_groups,
            reserve=self.reserve,
            members={name: row.group for name, row in self.servers.items() if row.group},
            pins={name: row.pin for name, row in here.items() if row.pin},
            machine_types=self.machine_types,
            requested_moves={name: row.move_to for name, row in here.items() if row.move_requested},
            requested_replacements={n: row.replace_by for n, row in here.items() if row.replace_by},
            release_versions=self.release_versions,
            promised=self.promised,
            parallel_moves=self.parallel_moves,
            parallel_moves_per_host=self.parallel_moves_per_host,
            move_bytes_per_second=self._moves_share(),
            lost=self._silent_for(self.availability.settings.lost_seconds),
            off=self.availability.off_since(self.received),
            power=frozenset(self.availability.settings.power),
            lease_seconds=self.availability.settings.lease_seconds,
            experience=self.experience,
            snapshots={name: row.spec for name, row in self.kept.snapshots.items() if not row.removed},
            backups=self.kept.backups,
            volume_wishes=self.kept.wishes,
            volume_ends=self.volume_ends,
            copy_losses=self.kept.losses,
            given_up=self._given_up(),
            parallel_volume_tasks=self.kept.settings.parallel,
            parallel_volume_tasks_per_host=self.kept.settings.parallel_per_host,
            rebuild_bytes_per_second=self.kept.settings.rebuild_bytes_per_second,
        )

    def _given_up(self) -> frozenset[HostId]:
        return self._silent_for(self.kept.settings.elsewhere_seconds)

    def _silent_for(self, seconds: float) -> frozenset[HostId]:
        return silent_for(seconds, self.received, self.now, self.availability.hearing_since)

    def inventory(self, connected: frozenset[HostId]) -> Inventory:
        """What was reported; an operation that an agent would not begin counts as undone by it."""
        hosts = dict(self.inventories)
        for operation, (host, error) in self.refusals.items():
            reported = hosts.get(host)
            if reported is not None and all(o.id != operation for o in reported.operations):
                hosts[host] = msgspec.structs.replace(
                    reported, operations=(*reported.operations, self._refused(operation, error))
                )
        return Inventory(hosts=hosts, connected=connected & self.hosts.keys())

    def _outside(self) -> frozenset[HostId]:
        """Edge hosts that a router can lead out by."""
        topology = self.topology()
        edges = (host for host, row in self.hosts.items() if row.spec.role is HostRole.EDGE)
        return frozenset(host for host in edges if topology.external_interface(host))

    def _moves_share(self) -> int:
        """Bytes a second of a host's underlay that are kept for moves; 0 if it is not divided."""
        shares = self.functions.underlay.shares
        return shares.bits_per_second * shares.moves // (100 * 8) if shares is not None else 0

    def _refused(self, operation: OperationId, error: ErrorRecord) -> OperationStatus:
        task = next(
            (t for t in (self.blueprint.volume_tasks if self.blueprint else ()) if t.id == operation), None
        )
        if task is not None:
            return OperationStatus(
                id=operation,
                kind=kind_of(task.work),
                state=OperationState.UNDONE,
                step="refused",
                volume=volumes_of(task.work)[0],
                error=error,
            )
        moves = {m.id: m for m in (self.blueprint.moves if self.blueprint else ())}
        move = moves.get(operation)
        gateways = {m.id: m.router for m in (self.blueprint.gateway_moves if self.blueprint else ())}
        if operation in gateways:
            return OperationStatus(
                id=operation,
                kind=OperationKind.GATEWAY,
                state=OperationState.UNDONE,
                step="refused",
                router=gateways[operation],
                error=error,
            )
        return OperationStatus(
            id=operation,
            kind=OperationKind.MOVE if move else OperationKind.VERIFY,
            state=OperationState.UNDONE,
            step="refused",
            server=move.server if move else None,
            epoch=move.epoch if move else 0,
            error=error,
        )

    def topology(self) -> Topology:
        """The virtual network whole; with ports of servers that are being deleted, which still have their
        addresses."""
        ports = [(port, name) for name, row in self.servers.items() for port in row.spec.ports]
        return msgspec.structs.replace(
            self.functions,
            networks={network.id: network for network in self.networks},
            ports={port.id: port for port, _ in ports},
            servers={port.id: name for port, name in ports},
        )

    def removed_volumes(self) -> tuple[VolumeSpec, ...]:
        return tuple(row.spec for row in self.volumes.values() if row.removed)

    def world(self, blueprint: Blueprint, connected: frozenset[HostId], now: float) -> World:
        return World(
            policy=self.policy(),
            inventory=self.inventory(connected),
            blueprint=blueprint,
            configs=self.configs,
            topology=self.topology(),
            removed_volumes=self.removed_volumes(),
            removed_snapshots=tuple(row.spec for row in self.kept.snapshots.values() if row.removed),
            exports=tuple(export for export in self.kept.exports if export.expires_at > now),
            ceph=self.kept.settings.ceph,
            disk_budget=self.kept.settings.budget,
            ended=self.ended,
            refused=frozenset(self.refusals),
            held_back=frozenset(
                move.id
                for move in (*blueprint.moves, *blueprint.gateway_moves, *blueprint.volume_tasks)
                if now < self.begun_at.get(move.id, now) + move.patience_seconds
            ),
        )


async def read(tx: AsyncConnection, latest: Mapping[HostId, HostInventory]) -> State:
    """`latest`: reports newer than the stored ones."""
    reported = {**await inventories.all_of(tx), **latest}
    told = (o for inventory in reported.values() for o in inventory.operations)
    over = frozenset(o.id for o in told if o.state is not OperationState.RUNNING)
    blueprint = await blueprints.target(tx)
    registered = await intent.releases(tx)
    servers = await intent.servers(tx)
    campaign = await campaigns.current(tx)
    parallel = await intent.setting(tx, intent.PARALLEL_MOVES, 1)
    return State(
        kept=await volumes.read(tx),
        volume_ends=await _volume_ends(tx, blueprint),
        now=await leases.now(tx),
        availability=await availability.read(tx),
        hosts=await intent.hosts(tx),
        servers=servers,
        volumes=await intent.volumes(tx),
        networks=await networking.networks(tx),
        functions=await networking.functions(tx),
        project_limits=await projects.limits(tx),
        server_groups=await placement.groups(tx),
        reserve=await intent.setting(tx, placement.RESERVE, 0),
        promised=await intent.promised(tx),
        parallel_moves=parallel,
        parallel_moves_per_host=await intent.setting(tx, intent.PARALLEL_MOVES_PER_HOST, 4),
        experience=await experience(tx, servers, reported, campaign=campaign is not None, parallel=parallel),
        release=await default_release(tx),
        storage_release=await default_release(tx, Component.STORAGE),
        network_release=await default_release(tx, Component.NETWORK),
        campaign=campaign,
        blueprint=blueprint,
        configs=await blueprints.host_configs(tx),
        inventories=reported,
        received=await inventories.received(tx),
        refusals=await operations.refusals(tx),
        begun_at=await operations.begun_at(tx),
        machine_types={name: r.machine_types for name, r in registered.items()},
        release_versions={n: r.version for n, r in registered.items() if r.component is Component.HYPERVISOR},
        ended=await operations.ended(tx, over),
    )


async def _volume_ends(tx: AsyncConnection, blueprint: Blueprint | None) -> dict[OperationId, VolumeEnd]:
    tasks = frozenset(task.id for task in (blueprint.volume_tasks if blueprint else ()))
    if not tasks:
        return {}
    records = await operations.get(tx, await operations.ended(tx, tasks))
    done = OperationState.DONE.value
    return {name: VolumeEnd(done=r.state == done, error=r.error) for name, r in records.items()}


async def default_release(
    tx: AsyncConnection, component: Component = Component.HYPERVISOR
) -> ReleaseId | None:
    name = await intent.setting_of(tx, intent.DEFAULTS[component], str)
    return None if name is None else ReleaseId(name)
