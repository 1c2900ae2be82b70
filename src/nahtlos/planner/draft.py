"""The next blueprint while it is being made.

Owns the mutable working copy on which the steps of `plan` decide, and an index over the inventory that
makes their questions cheap. It decides nothing itself, and nothing of it outlives one call of `plan`.
"""

from collections import defaultdict

import msgspec

from nahtlos.model.blueprint import (
    Blueprint,
    Campaign,
    CampaignState,
    Failure,
    GatewayPlace,
    HostIntent,
    HostPhase,
    HostPlan,
    PlannedGatewayMove,
    PlannedMove,
    PlannedVerify,
    Policy,
    Waiting,
    WaitKind,
)
from nahtlos.model.ids import BlueprintId, HostId, OperationId, ReleaseId, RouterId, ServerId
from nahtlos.model.inventory import HostInventory, Inventory, OperationState, OperationStatus, ServerStatus
from nahtlos.model.nouns import Assignment, HostRole, Size
from nahtlos.model.power import SavedState
from nahtlos.model.snapshot_places import left_over_snapshots, snapshots_on
from nahtlos.model.storage import StorageBackend
from nahtlos.model.version_pairs import PLUGGED_MEMORY, Pair, Verdict, Way, pair_for
from nahtlos.model.volume_work import PlannedVolumeTask
from nahtlos.planner.groups import Neighbours
from nahtlos.planner.rooms import Rooms

LONGEST_REASON = 8
"""Changes named in a blueprint's reason; the rest is counted."""


class Observed:
    """An index over an inventory."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.operations: dict[OperationId, list[tuple[HostId, OperationStatus]]] = defaultdict(list)
        self.running_on: dict[HostId, list[OperationId]] = defaultdict(list)
        self.busy: dict[ServerId, OperationId] = {}
        """Servers with an operation that runs, on a host that can be asked about it."""
        self.copies: dict[ServerId, list[tuple[HostId, ServerStatus]]] = defaultdict(list)
        for host, seen in inventory.hosts.items():
            self._index(host, seen)

    def _index(self, host: HostId, seen: HostInventory) -> None:
        for status in seen.servers:
            self.copies[status.id].append((host, status))
        for operation in seen.operations:
            self.operations[operation.id].append((host, operation))
            if operation.state is OperationState.RUNNING and host in self.inventory.connected:
                self.running_on[host].append(operation.id)
                if operation.server is not None:
                    self.busy[operation.server] = operation.id

    def host(self, host: HostId) -> HostInventory | None:
        return self.inventory.hosts.get(host)

    def connected(self, host: HostId) -> bool:
        return host in self.inventory.connected and host in self.inventory.hosts

    def at_least(self, server: ServerId, size: Size) -> Size:
        """`size`, or what the server has been seen to have if that is more."""
        for _, status in self.copies.get(server, ()):
            has = status.compute
            if has.vcpus > size.vcpus or has.memory_mib > size.memory_mib:
                size = Size(vcpus=max(has.vcpus, size.vcpus), memory_mib=max(has.memory_mib, size.memory_mib))
        return size

    def server_on(self, server: ServerId, host: HostId) -> ServerStatus | None:
        copies = self.copies.get(server, ())
        return next((status for where, status in copies if where == host), None)


class Draft:
    """Everything `plan` knows and everything it has decided so far."""

    def __init__(self, policy: Policy, inventory: Inventory, parent: Blueprint | None) -> None:
        base = parent or Blueprint(id=BlueprintId("bp-0"), parent=None, hosts={}, servers={})
        self.policy = policy
        self.parent = parent
        self.observed = Observed(inventory)
        self.hosts: dict[HostId, HostPlan] = dict(base.hosts)
        self.servers: dict[ServerId, Assignment] = dict(base.servers)
        self.off: dict[ServerId, int] = dict(base.off)
        self.off_before = frozenset(base.off)
        self.saved: dict[ServerId, SavedState] = dict(base.saved)
        self.moves: dict[OperationId, PlannedMove] = {move.id: move for move in base.moves}
        self.moving: dict[ServerId, PlannedMove] = {move.server: move for move in base.moves}
        self.verifies: dict[OperationId, PlannedVerify] = {verify.id: verify for verify in base.verifies}
        self.gateways: dict[RouterId, GatewayPlace] = dict(base.gateways)
        self.gateway_moves: dict[OperationId, PlannedGatewayMove] = {m.id: m for m in base.gateway_moves}
        self.failed_gateway_moves: dict[RouterId, Failure] = dict(base.failed_gateway_moves)
        self.attempts = dict(base.attempts)
        self.failed_moves: dict[ServerId, Failure] = dict(base.failed_moves)
        self.failed_verifies: dict[HostId, Failure] = dict(base.failed_verifies)
        self.volume_tasks: dict[OperationId, PlannedVolumeTask] = {t.id: t for t in base.volume_tasks}
        self.failed_volume_tasks: dict[str, Failure] = dict(base.failed_volume_tasks)
        self.passed_over: dict[HostId, dict[ServerId, int]] = dict(base.passed_over)
        self.served_requests = dict(base.served_requests)
        self.campaign = base.campaign
        self.upgrading = base.upgrading
        self.ended_moves = base.ended_moves
        self.counter = base.counter
        self.stuck: set[OperationId] = set()
        self.wanted: set[ServerId] = set()
        """Servers somebody wants elsewhere."""
        self.rooms = Rooms({})
        self.neighbours = Neighbours({}, {}, self.serves)
        self.changes: list[str] = []
        self.waiting: list[Waiting] = []

    # what is asked of it

    @property
    def running_campaign(self) -> Campaign | None:
        """The campaign if it is to go on now."""
        campaign = self.policy.campaign
        return campaign if campaign and campaign.state is CampaignState.RUNNING else None

    @property
    def open_campaign(self) -> Campaign | None:
        """The campaign if it is going on or may go on."""
        campaign = self.policy.campaign
        going_on = (CampaignState.RUNNING, CampaignState.PAUSED)
        return campaign if campaign and campaign.state in going_on else None

    @property
    def replaced(self) -> HostId | None:
        """The host a campaign replaces something of under its servers."""
        return next((host for host, plan in self.hosts.items() if plan.replacing is not None), None)

    def intent(self, host: HostId) -> HostIntent:
        """A host that policy no longer names is to be given up: it is drained."""
        if host not in self.policy.hosts:
            return HostIntent.DRAINED
        return self.policy.intents.get(host, HostIntent.ACTIVE)

    def serves(self, host: HostId) -> bool:
        """Whether it is decided that it takes servers."""
        plan = self.hosts.get(host)
        return plan is not None and plan.phase is HostPhase.SERVING and not plan.fenced

    def is_compute(self, host: HostId) -> bool:
        spec = self.policy.hosts.get(host)
        return spec is not None and spec.role is HostRole.COMPUTE

    def size(self, server: ServerId) -> Size:
        """What it takes of a host: as asked for, or as seen where that is more (a guest gives memory back in
        its own time); of a server that is being removed, as last seen. One that is off takes nothing."""
        if server in self.off:
            return Size()
        spec = self.policy.servers.get(server)
        if spec is not None:
            return self.observed.at_least(server, spec.size)
        return max(
            (status.size for _, status in self.observed.copies.get(server, ())),
            key=lambda size: size.memory_mib,
            default=Size(),
        )

    def by_host(self) -> dict[HostId, list[ServerId]]:
        """Without those that are off."""
        owned: dict[HostId, list[ServerId]] = defaultdict(list)
        for server, assignment in self.servers.items():
            if server not in self.off:
                owned[assignment.host].append(server)
        return owned

    def verify_of(self, host: HostId) -> PlannedVerify | None:
        return next((verify for verify in self.verifies.values() if verify.host == host), None)

    def refused_move(self, server: ServerId, release: ReleaseId | None) -> Pair | None:
        """The row of the table of version pairs that forbids to move `server` to a host of `release`."""
        owner = self.servers.get(server)
        status = self.observed.server_on(server, owner.host) if owner else None
        seen = self.observed.host(owner.host) if owner else None
        versions = self.policy.release_versions
        if status is None or status.release is None or seen is None or seen.accelerator is None:
            return None
        old, new = versions.get(status.release), versions.get(release) if release is not None else None
        if old is None or new is None:
            return None
        pair = pair_for(Way.MOVE, old, new, seen.accelerator.name)
        spec = self.policy.servers.get(server)
        if spec and spec.max_memory_mib and seen.accelerator.name == PLUGGED_MEMORY.accelerator:
            return PLUGGED_MEMORY
        return pair if pair.verdict is Verdict.REFUSED else None

    def can_run(self, server: ServerId, release: ReleaseId | None) -> bool:
        """Whether `release` has the server's machine type, as far as that is known."""
        spec = self.policy.servers.get(server)
        known = self.policy.machine_types.get(release) if release is not None else None
        return known is None or spec is None or spec.machine in known

    def is_told(self, server: ServerId, host: HostId) -> bool:
        """Whether the agent of `host` knows of servers that were stopped or booted anew; an older one would
        forget how far these requests have come."""
        spec, seen = self.policy.servers.get(server), self.observed.host(host)
        asked = spec is not None and spec.power.serial > 0
        return not asked or (seen is not None and "power" in seen.knows)

    @property
    def moving_gateways(self) -> frozenset[RouterId]:
        return frozenset(move.router for move in self.gateway_moves.values())

    def holds(self, host: HostId) -> bool:
        """Whether something is at `host` that a drain has to take away first."""
        servers = any(assignment.host == host for assignment in self.servers.values())
        gateways = any(place.host == host for place in self.gateways.values())
        return servers or gateways or any(n.gateway_host == host for n in self.policy.networks)

    def keeps_volumes(self, host: HostId) -> bool:
        """Whether a copy of a volume is on `host`. An image of Ceph's is on none."""
        return any(
            copy.host == host
            for volume in self.policy.volumes.values()
            if volume.backend is StorageBackend.EMBEDDED
            for copy in volume.copies
        )

    def keeps_snapshots(self, host: HostId) -> bool:
        """Whether one is in files of `host`, also one that is kept elsewhere by now."""
        seen = self.observed.inventory
        return bool(snapshots_on(self.policy, seen, host) or left_over_snapshots(self.policy, seen, host))

    def volume_hosts(self, server: ServerId) -> set[HostId]:
        """Hosts that serve volumes of `server`."""
        spec = self.policy.servers.get(server)
        names = (spec.volume, *spec.data_volumes) if spec is not None else ()
        volumes = [self.policy.volumes[name] for name in names if name in self.policy.volumes]
        return {copy.host for volume in volumes for copy in volume.copies}

    # what is written to it

    def change(self, text: str) -> None:
        self.changes.append(text)

    def wait(self, subject: str, kind: WaitKind, reason: str, remedy: str = "") -> None:
        self.waiting.append(Waiting(subject=subject, kind=kind, reason=reason, remedy=remedy))

    def next_operation(self, kind: str) -> OperationId:
        self.counter += 1
        return OperationId(f"{kind}-{self.counter}")

    def add_move(self, move: PlannedMove) -> None:
        self.moves[move.id] = move
        self.moving[move.server] = move
        if not move.in_place:  # the memory is shared
            self.rooms.admit(move.destination, move.server, self.size(move.server))
            self.neighbours.take(move.destination, move.server, moving=True)
            self.set_aside_for_groups()

    def set_aside_for_groups(self) -> None:
        """An affinity group that has begun to go elsewhere must find room there for all of it."""
        for home, servers in self.neighbours.scattered() if self.neighbours else ():
            for server in servers:
                self.rooms.set_aside(home, server, self.size(server))

    def drop_move(self, move: PlannedMove) -> None:
        del self.moves[move.id]
        del self.moving[move.server]

    def rest_phase(self, host: HostId) -> HostPhase:
        """Where its operator wants a host that no campaign touches."""
        match self.intent(host):
            case HostIntent.ACTIVE:
                return HostPhase.SERVING
            case HostIntent.CORDONED:
                return HostPhase.CORDONED
            case HostIntent.DRAINED:
                held = self.holds(host) or self.keeps_volumes(host) or self.keeps_snapshots(host)
                return HostPhase.EMPTYING if held else HostPhase.DRAINED

    def set_phase(self, host: HostId, phase: HostPhase) -> None:
        plan = self.hosts[host]
        if plan.phase is not phase:
            self.hosts[host] = msgspec.structs.replace(plan, phase=phase)

    def return_to_service(self, host: HostId) -> None:
        """After a verify that went well: what it was switched to is final."""
        self.hosts[host] = msgspec.structs.replace(
            self.hosts[host], phase=self.rest_phase(host), previous=None
        )
        if self.upgrading == host:
            self.upgrading = None

    def finish(self) -> Blueprint:
        """The parent itself if nothing is different from it."""
        candidate = Blueprint(
            id=next_id(self.parent),
            parent=self.parent.id if self.parent else None,
            hosts=self.hosts,
            servers=self.servers,
            off=self.off,
            saved=self.saved,
            moves=tuple(self.moves.values()),
            verifies=tuple(self.verifies.values()),
            volume_tasks=tuple(self.volume_tasks.values()),
            failed_volume_tasks=self.failed_volume_tasks,
            gateways=self.gateways,
            gateway_moves=tuple(self.gateway_moves.values()),
            failed_gateway_moves=self.failed_gateway_moves,
            attempts=self.attempts,
            failed_moves=self.failed_moves,
            failed_verifies=self.failed_verifies,
            passed_over=self.passed_over,
            served_requests=self.served_requests,
            campaign=self.campaign,
            upgrading=self.upgrading,
            ended_moves=self.ended_moves,
            counter=self.counter,
            reason=_summary(self.changes),
        )
        if self.parent is not None and _same(candidate, self.parent):
            return self.parent
        return candidate


def next_id(parent: Blueprint | None) -> BlueprintId:
    return BlueprintId(f"bp-{number_of(parent.id) + 1 if parent else 1}")


def number_of(blueprint: BlueprintId) -> int:
    return int(blueprint.removeprefix("bp-"))


def _same(candidate: Blueprint, parent: Blueprint) -> bool:
    renamed = msgspec.structs.replace(candidate, id=parent.id, parent=parent.parent, reason=parent.reason)
    return renamed == parent


def _summary(changes: list[str]) -> str:
    named = "; ".join(changes[:LONGEST_REASON])
    more = len(changes) - LONGEST_REASON
    return f"{named}; and {more} more" if more > 0 else named
