"""Hosts that keep volumes, for the planner's and the executor's tests: what is wanted, what was seen."""

import msgspec

from nahtlos.model.blueprint import Blueprint, HostIntent, Policy
from nahtlos.model.config import HostConfig
from nahtlos.model.ids import HostId, OperationId, ReleaseId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import (
    HostInventory,
    Inventory,
    OperationKind,
    OperationState,
    OperationStatus,
    PoolStatus,
    RunState,
    ServerStatus,
    SnapshotStatus,
    VolumeStatus,
)
from nahtlos.model.nouns import Assignment, HostRole, HostSpec, ServerSpec, Size
from nahtlos.model.storage import Replica, ReplicaState, SnapshotSpec, VolumeSpec
from nahtlos.model.volume_work import PlannedVolumeTask, Rebuilding, Relocation, SnapshotMove, VolumeEnd
from nahtlos.planner.plan import plan
from nahtlos.runtime.controllers.volume_records import moved_snapshot, relocated
from nahtlos.runtime.store.volumes import with_state

OLD = ReleaseId("qemu-10")
MIB = 1 << 20


def host(number: int) -> HostId:
    return HostId(f"host-{number}")


def volume(
    name: str, *places: int, size_mib: int = 64, stale: tuple[int, ...] = (), **changes: object
) -> VolumeSpec:
    """With copies on these hosts, the first one's first."""

    def state(place: int) -> ReplicaState:
        return ReplicaState.STALE if place in stale else ReplicaState.CURRENT

    spec = VolumeSpec(
        id=VolumeId(name),
        size_mib=size_mib,
        image=None,
        host=host(places[0]),
        state=state(places[0]),
        replicas=tuple(Replica(host=host(place), state=state(place)) for place in places[1:]),
    )
    return msgspec.structs.replace(spec, **changes)


def server(name: str, *volumes: str) -> ServerSpec:
    system, *data = (VolumeId(v) for v in volumes)
    return ServerSpec(
        id=ServerId(name),
        size=Size(vcpus=1, memory_mib=128),
        volume=system,
        data_volumes=tuple(data),
        ports=(),
        machine="m",
    )


class Site:
    """A converged cloud of so many hosts. `domains`: which fail together, by host."""

    def __init__(self, hosts: int = 4, domains: dict[int, str] | None = None, free_mib: int = 10_000) -> None:
        known = domains or {}
        self.policy = Policy(
            hosts={
                host(n): HostSpec(
                    id=host(n),
                    role=HostRole.COMPUTE,
                    address=f"10.0.0.{n}",
                    peer_port=1,
                    domain=known.get(n, ""),
                )
                for n in range(1, hosts + 1)
            },
            intents={},
            servers={},
            release=OLD,
        )
        self.free = dict.fromkeys(self.policy.hosts, free_mib)
        self.away: set[HostId] = set()
        self.lingering: dict[HostId, tuple[SnapshotStatus, ...]] = {}
        """Snapshots that are kept elsewhere by now, and still there."""
        self.operations: dict[HostId, list[OperationStatus]] = {}
        self.configs: dict[HostId, HostConfig] = {}
        self.blueprint: Blueprint | None = None
        self.waits: list[str] = []

    def want(self, *volumes: VolumeSpec, **changes: object) -> None:
        kept = {**self.policy.volumes, **{v.id: v for v in volumes}}
        self.policy = msgspec.structs.replace(self.policy, volumes=kept, **changes)

    def drain(self, *numbers: int) -> None:
        intents = {**self.policy.intents, **{host(n): HostIntent.DRAINED for n in numbers}}
        self.policy = msgspec.structs.replace(self.policy, intents=intents)

    def serve(self, spec: ServerSpec, on: int) -> None:
        self.policy = msgspec.structs.replace(
            self.policy,
            servers={**self.policy.servers, spec.id: spec},
            placements={**self.policy.placements, spec.id: host(on)},
        )

    def look(self) -> Inventory:
        return Inventory(
            hosts={name: self._seen(name) for name in self.policy.hosts},
            connected=frozenset(self.policy.hosts.keys() - self.away),
        )

    def _seen(self, name: HostId) -> HostInventory:
        owned = self.blueprint.servers.values() if self.blueprint else ()
        config = self.configs.get(name)
        return HostInventory(
            host=name,
            role=HostRole.COMPUTE,
            boot_id="b",
            agent_version="0",
            taken_at=0.0,
            generation=config.generation if config else 0,
            target_generation=config.generation if config else 0,
            capacity=Size(vcpus=8, memory_mib=4096),
            releases=(OLD,),
            verified_release=OLD,
            servers=tuple(
                ServerStatus(id=a.server, epoch=a.epoch, state=RunState.RUNNING, release=OLD, size=Size())
                for a in owned
                if a.host == name
            ),
            volumes=tuple(
                VolumeStatus(id=v.id, epoch=v.at(name).epoch, served=True, size_mib=v.size_mib)
                for v in self.policy.volumes.values()
                if any(copy.host == name for copy in v.copies)
            ),
            snapshots=(
                *(
                    SnapshotStatus(id=s.id, volume=s.volume, size_mib=s.size_mib, allocated_bytes=3 * MIB)
                    for s in self.policy.snapshots.values()
                    if name in s.hosts
                ),
                *self.lingering.get(name, ()),
            ),
            pool=PoolStatus(total=100_000 * MIB, free=self.free[name] * MIB),
            operations=tuple(self.operations.get(name, ())),
        )

    def plan(self) -> Blueprint:
        """Until nothing more is decided on the same look."""
        seen = self.look()
        for _ in range(16):
            following, report = plan(self.policy, seen, self.blueprint)
            if following is self.blueprint:
                break
            self.blueprint = following
        else:
            raise AssertionError("planned again and again")
        self.waits = [w.reason for w in report.waiting]
        return following

    @property
    def tasks(self) -> tuple[PlannedVolumeTask, ...]:
        assert self.blueprint is not None, "nothing was planned yet"
        return self.blueprint.volume_tasks

    def moved_server(self, name: str, to: int) -> None:
        """As a move that has ended leaves it."""
        assert self.blueprint is not None
        owner = self.blueprint.servers[ServerId(name)]
        after = Assignment(server=owner.server, host=host(to), epoch=owner.epoch + 1)
        servers = {**self.blueprint.servers, owner.server: after}
        self.blueprint = msgspec.structs.replace(self.blueprint, servers=servers)

    def end(self, task: PlannedVolumeTask, *, done: bool = True) -> None:
        """As its record does: what follows from it is in the policy."""
        work = task.work
        if done and isinstance(work, Relocation):
            self.want(relocated(self.policy.volumes[work.volume], work, task.epoch))
        if done and isinstance(work, Rebuilding):
            spec = self.policy.volumes[work.volume]
            self.want(with_state(spec, work.target, ReplicaState.CURRENT, task.epoch))
        if done and isinstance(work, SnapshotMove):
            self._moved(work)
        wishes = tuple(w for w in self.policy.volume_wishes if not done or w.id != task.wish)
        ends: dict[OperationId, VolumeEnd] = {task.id: VolumeEnd(done=done)}
        self.policy = msgspec.structs.replace(self.policy, volume_wishes=wishes, volume_ends=ends)

    def _moved(self, work: SnapshotMove) -> None:
        known = dict[SnapshotId, SnapshotSpec](self.policy.snapshots)
        for name in work.snapshots:
            known[name] = moved_snapshot(known[name], work.source, work.destination)
        self.want(snapshots=known)
        still = tuple(SnapshotStatus(id=name, volume=work.volume) for name in work.snapshots)
        self.lingering[work.source] = (*self.lingering.get(work.source, ()), *still)

    def running(self, task: PlannedVolumeTask, state: OperationState = OperationState.RUNNING) -> None:
        status = OperationStatus(id=task.id, kind=OperationKind.RELOCATE, state=state, step="copy")
        self.operations[task.coordinator] = [status]
