"""A cloud small enough to think about, for the planner's tests: the truth, what hosts report of it, and how
operations end. It asserts by itself what must never happen, apart from the planner's own check."""

import math
from collections.abc import Callable
from random import Random

import msgspec

from nahtlos.model.blueprint import (
    Blueprint,
    Campaign,
    CampaignState,
    HostIntent,
    HostPhase,
    PlannedMove,
    PlannedVerify,
    PlanReport,
    Policy,
)
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import CampaignId, HostId, OperationId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import (
    Accelerator,
    HostInventory,
    Inventory,
    OperationKind,
    OperationState,
    OperationStatus,
    RunState,
    ServerStatus,
)
from nahtlos.model.nouns import Component, HostRole, HostSpec, ServerSpec, Size
from nahtlos.planner.plan import plan
from nahtlos.planner.upgrade import campaign_over

SECOND_THOUGHTS = 3
OLD, NEW = ReleaseId("qemu-10"), ReleaseId("qemu-11")
UNAVAILABLE = ErrorRecord(kind="unavailable", message="no answer in 5 s")
REFUSED = ErrorRecord(kind="refused", message="the probe did not boot", remedy="look at the probe's console")


def host_id(number: int) -> HostId:
    return HostId(f"host-{number}")


def server_id(number: int) -> ServerId:
    return ServerId(f"vm-{number}")


def server_spec(server: ServerId, memory_mib: int = 256, vcpus: int = 1, machine: str = "m") -> ServerSpec:
    size = Size(vcpus=vcpus, memory_mib=memory_mib)
    return ServerSpec(id=server, size=size, volume=VolumeId(server), ports=(), machine=machine)


def host_spec(host: HostId, role: HostRole = HostRole.COMPUTE) -> HostSpec:
    return HostSpec(id=host, role=role, address="10.99.0.1", peer_port=7444)


class Faults(msgspec.Struct, kw_only=True):
    """How often what goes wrong, as probabilities per step."""

    undone: float = 0.0
    slow: float = 0.0
    stale: float = 0.0
    away: float = 0.0
    verify: float = 0.0


class Operation(msgspec.Struct, kw_only=True):
    planned: PlannedMove | PlannedVerify
    state: OperationState = OperationState.RUNNING
    error: ErrorRecord | None = None
    source_state: OperationState = OperationState.RUNNING
    """The source may learn the end later than the destination."""


class World:
    """Hosts, who owns which server there, and operations on their way."""

    def __init__(
        self, capacities: dict[HostId, Size], *, seed: int = 0, faults: Faults | None = None
    ) -> None:
        self.capacities = capacities
        self.random = Random(seed)
        self.faults = faults or Faults()
        self.owner: dict[ServerId, tuple[HostId, int]] = {}
        self.sizes: dict[ServerId, Size] = {}
        self.state: dict[ServerId, RunState] = {}
        self.under: dict[ServerId, ReleaseId | None] = {}
        """What runs each server."""
        self.accelerator: Accelerator | None = None
        self.now: dict[HostId, ReleaseId | None] = {}
        """Of each host, what servers start or arrive under."""
        self.verified: dict[HostId, ReleaseId | None] = dict.fromkeys(capacities)
        self.releases: dict[HostId, tuple[ReleaseId, ...]] = dict.fromkeys(capacities, (OLD, NEW))
        self.storage: dict[HostId, ReleaseId | None] = dict.fromkeys(capacities, OLD)
        self.network: dict[HostId, ReleaseId | None] = dict.fromkeys(capacities)
        self.problems: dict[HostId, ErrorRecord] = {}
        self.knows: tuple[str, ...] = ()
        """What agents of all hosts can be asked for."""
        self.no_post_copy: dict[HostId, str] = {}
        """Why a host's kernel cannot."""
        self.operations: dict[OperationId, Operation] = {}
        self.script: dict[str, list[tuple[OperationState, ErrorRecord | None]]] = {}
        """Outcomes decided beforehand, by server or host; None to let it run."""
        self.away: set[HostId] = set()
        self.reports: dict[HostId, HostInventory] = {}
        self.moves_done: dict[ServerId, int] = {}
        self.extra: dict[HostId, tuple[ServerStatus, ...]] = {}

    # what is seen of it

    def look(self) -> Inventory:
        for host in self.capacities:
            stale = host in self.reports and self.random.random() < self.faults.stale
            if host not in self.away and not stale:
                self.reports[host] = self._report(host)
        return Inventory(hosts=dict(self.reports), connected=frozenset(self.capacities.keys() - self.away))

    def _report(self, host: HostId) -> HostInventory:
        servers = [
            ServerStatus(
                id=server,
                epoch=epoch,
                state=self.state[server],
                release=self.under.get(server),
                size=self.sizes[server],
            )
            for server, (where, epoch) in self.owner.items()
            if where == host
        ]
        return HostInventory(
            host=host,
            role=HostRole.COMPUTE,
            boot_id="boot",
            agent_version="0",
            taken_at=0.0,
            generation=1,
            target_generation=1,
            capacity=self.capacities[host],
            releases=self.releases[host],
            verified_release=self.verified[host],
            accelerator=self.accelerator,
            storage_release=self.storage.get(host, OLD),
            network_release=self.network.get(host),
            problems=(self.problems[host],) if host in self.problems else (),
            knows=self.knows,
            why_no_post_copy=self.no_post_copy.get(host, ""),
            servers=(*servers, *self.extra.get(host, ())),
            operations=tuple(
                self._status(operation, host)
                for operation in self.operations.values()
                if host in hosts_of(operation.planned)
            ),
        )

    def _status(self, operation: Operation, host: HostId) -> OperationStatus:
        planned = operation.planned
        if isinstance(planned, PlannedVerify):
            kind, server, state = OperationKind.VERIFY, None, operation.state
        else:
            kind, server = OperationKind.MOVE, planned.server
            state = operation.source_state if host == planned.source else operation.state
        error = operation.error if state is not OperationState.RUNNING else None
        return OperationStatus(id=planned.id, kind=kind, state=state, step="", server=server, error=error)

    # how it goes on

    def carry_out(self, policy: Policy, blueprint: Blueprint) -> None:
        self.now = {host: plan.release for host, plan in blueprint.hosts.items()}
        self._flap()
        self._acknowledge(blueprint)
        self._start_and_remove(policy, blueprint)
        for planned in (*blueprint.moves, *blueprint.verifies):
            if planned.id not in self.operations and not set(hosts_of(planned)) & self.away:
                self._begin(blueprint, planned)
        for operation in self.operations.values():
            self._go_on(operation)
        self._replace(blueprint)
        self._assert_room()

    def _replace(self, blueprint: Blueprint) -> None:
        """Hosts become what they are told, in their own time."""
        for host, wanted in blueprint.hosts.items():
            if host in self.away or (self.faults.slow and self.random.random() < self.faults.slow):
                continue
            if wanted.storage_release is not None:
                self.storage[host] = wanted.storage_release
            self.network[host] = wanted.network_release

    def _flap(self) -> None:
        if self.faults.away:
            for host in sorted(self.capacities):
                if self.random.random() < self.faults.away:
                    self.away ^= {host}

    def _acknowledge(self, blueprint: Blueprint) -> None:
        wanted = {planned.id for planned in (*blueprint.moves, *blueprint.verifies)}
        for name, operation in tuple(self.operations.items()):
            settled = OperationState.RUNNING not in (operation.state, operation.source_state)
            if name not in wanted:
                assert operation.state is not OperationState.RUNNING, f"{name} was dropped while it runs"
                if settled and not set(hosts_of(operation.planned)) & self.away:
                    del self.operations[name]

    def _start_and_remove(self, policy: Policy, blueprint: Blueprint) -> None:
        for server in tuple(self.owner):
            if server not in blueprint.servers:
                del self.owner[server]
        for server, assignment in blueprint.servers.items():
            if server not in self.owner and assignment.host not in self.away:
                self.owner[server] = (assignment.host, assignment.epoch)
                self.sizes[server] = policy.servers[server].size
                self.state[server] = RunState.STARTING
                self.under[server] = blueprint.hosts[assignment.host].release
            elif self.state.get(server) is RunState.STARTING:
                self.state[server] = RunState.RUNNING

    def _begin(self, blueprint: Blueprint, planned: PlannedMove | PlannedVerify) -> None:
        if isinstance(planned, PlannedMove):
            where, epoch = self.owner[planned.server]
            assert where == planned.source, f"{planned.id} starts where {planned.server} is not"
            assert planned.epoch == epoch + 1, f"{planned.id} has the wrong epoch"
            assert self.state[planned.server] is RunState.RUNNING, f"{planned.server} does not run"
            if self._refuses(planned):
                return
        else:
            others = [
                server
                for server, (host, _) in self.owner.items()
                if host == planned.host and self.under[server] != planned.release
            ]
            put_back = blueprint.hosts[planned.host].previous is None
            assert put_back or not others, f"{planned.host} is switched under {others}"
            assert blueprint.hosts[planned.host].release == planned.release
        self.operations[planned.id] = Operation(planned=planned)

    def _refuses(self, planned: PlannedMove) -> bool:
        """As an agent does while it still ends an earlier move of the server: ask it again later."""
        earlier = [
            operation
            for operation in self.operations.values()
            if isinstance(operation.planned, PlannedMove) and operation.planned.server == planned.server
        ]
        for operation in earlier:
            assert operation.state is not OperationState.RUNNING, f"{planned.server} moves already"
        return any(
            operation.source_state is OperationState.RUNNING and operation.planned.source == planned.source
            for operation in earlier
            if isinstance(operation.planned, PlannedMove)
        )

    def _go_on(self, operation: Operation) -> None:
        if operation.state is OperationState.RUNNING:
            if self.random.random() >= self.faults.slow:
                self._end(operation)
        elif self.random.random() >= self.faults.slow:
            operation.source_state = operation.state

    def _end(self, operation: Operation) -> None:
        planned = operation.planned
        operation.state, operation.error = self._outcome(planned)
        done = operation.state is OperationState.DONE
        if self.random.random() >= self.faults.slow or not isinstance(planned, PlannedMove):
            operation.source_state = operation.state
        if done and isinstance(planned, PlannedMove):
            self.owner[planned.server] = (planned.destination, planned.epoch)
            self.under[planned.server] = planned.release or self.now[planned.destination]
            self.moves_done[planned.server] = self.moves_done.get(planned.server, 0) + 1
        elif done and isinstance(planned, PlannedVerify):
            self.verified[planned.host] = planned.release

    def _outcome(self, planned: PlannedMove | PlannedVerify) -> tuple[OperationState, ErrorRecord | None]:
        subject = planned.server if isinstance(planned, PlannedMove) else planned.host
        if script := self.script.get(subject):
            return script.pop(0)
        odds = self.faults.undone if isinstance(planned, PlannedMove) else self.faults.verify
        if self.random.random() < odds:
            error = self.random.choice((UNAVAILABLE, REFUSED))
            return OperationState.UNDONE, error
        return OperationState.DONE, None

    def _assert_room(self) -> None:
        for host, capacity in self.capacities.items():
            held = [self.sizes[server] for server, (where, _) in self.owner.items() if where == host]
            held += [
                self.sizes[operation.planned.server]
                for operation in self.operations.values()
                if isinstance(operation.planned, PlannedMove)
                and operation.state is OperationState.RUNNING
                and operation.planned.destination == host
                and not operation.planned.in_place
            ]
            used = sum((size.memory_mib for size in held), 0), sum((size.vcpus for size in held), 0)
            assert used[0] <= capacity.memory_mib and used[1] <= capacity.vcpus, f"{host} is over-full"


def hosts_of(planned: PlannedMove | PlannedVerify) -> tuple[HostId, ...]:
    return (planned.source, planned.destination) if isinstance(planned, PlannedMove) else (planned.host,)


class Cloud:
    """A world, what people want of it, and the blueprint it is at."""

    def __init__(
        self,
        hosts: int,
        capacity_mib: int = 1024,
        vcpus: int = 8,
        *,
        seed: int = 0,
        faults: Faults | None = None,
    ) -> None:
        ids = [host_id(number) for number in range(1, hosts + 1)]
        self.world = World(
            {host: Size(vcpus=vcpus, memory_mib=capacity_mib) for host in ids}, seed=seed, faults=faults
        )
        self.policy = Policy(
            hosts={host: host_spec(host) for host in ids}, intents={}, servers={}, release=OLD
        )
        self.blueprint: Blueprint | None = None
        self.report: PlanReport | None = None
        self.history: list[Blueprint] = []

    def want(self, **changes: object) -> None:
        self.policy = msgspec.structs.replace(self.policy, **changes)

    def create(
        self, server: int, memory_mib: int = 256, *, on: int | None = None, machine: str = "m"
    ) -> None:
        spec = server_spec(server_id(server), memory_mib, machine=machine)
        self.want(servers={**self.policy.servers, spec.id: spec})
        if on is not None:
            self.want(placements={**self.policy.placements, spec.id: host_id(on)})

    def remove(self, server: int) -> None:
        left = {name: spec for name, spec in self.policy.servers.items() if name != server_id(server)}
        self.want(servers=left, removed_servers=self.policy.removed_servers | {server_id(server)})

    def intend(self, host: int, intent: HostIntent) -> None:
        self.want(intents={**self.policy.intents, host_id(host): intent})

    def request(self, server: int, host: int | None) -> None:
        destination = None if host is None else host_id(host)
        self.want(requested_moves={**self.policy.requested_moves, server_id(server): destination})

    def campaign(
        self,
        state: CampaignState = CampaignState.RUNNING,
        hosts: tuple[int, ...] | None = None,
        component: Component = Component.HYPERVISOR,
        to: ReleaseId = NEW,
        name: str = "c-1",
    ) -> None:
        chosen = tuple(self.policy.hosts) if hosts is None else tuple(host_id(number) for number in hosts)
        self.want(
            campaign=Campaign(
                id=CampaignId(name), to_release=to, hosts=chosen, state=state, component=component
            )
        )

    def plan(self) -> PlanReport:
        """Decide, and make the decision the target."""
        seen = self.world.look()
        following, self.report = plan(self.policy, seen, self.blueprint)
        self._assert_settled(seen, following)
        if following is not self.blueprint:
            self.history.append(following)
        self.blueprint = following
        return self.report

    def _assert_settled(self, seen: Inventory, following: Blueprint) -> None:
        """Planning again from the same look decides nothing more, or at most a little more."""
        for _ in range(SECOND_THOUGHTS):
            again, _ = plan(self.policy, seen, following)
            if again is following:
                return
            following = again
        raise AssertionError(f"planned again and again, decided each time: {following.reason}")

    def step(self) -> PlanReport:
        report = self.plan()
        self.world.carry_out(self.policy, self.now)
        return report

    def follow(self, until: Callable[[], bool], steps: int = 600) -> list[PlanReport]:
        """Go on until something is so."""
        reports: list[PlanReport] = []
        while not until():
            assert len(reports) < steps, f"it did not come to that: {self.report}"
            reports.append(self.step())
        return reports

    def over(self) -> bool:
        return campaign_over(self.policy, self.now)

    def settle(self, steps: int = 400) -> PlanReport:
        """Go on until nothing changes any more, neither the plan nor the world."""
        quiet = 0
        for _ in range(steps):
            before = self.blueprint
            report = self.step()
            quiet = quiet + 1 if self.blueprint is before else 0
            if quiet >= 4:
                return report
        raise AssertionError(f"still not quiet: {self.report}")

    @property
    def now(self) -> Blueprint:
        assert self.blueprint is not None, "nothing was planned yet"
        return self.blueprint

    def where(self, server: int) -> HostId:
        return self.now.servers[server_id(server)].host

    def phase(self, host: int) -> HostPhase:
        return self.now.hosts[host_id(host)].phase

    def release(self, host: int) -> ReleaseId | None:
        return self.now.hosts[host_id(host)].release

    def spread(self) -> list[int]:
        """How many servers each host owns."""
        owners = [owner.host for owner in self.now.servers.values()]
        return [owners.count(host) for host in sorted(self.world.capacities)]

    def reasons(self, subject: str) -> str:
        assert self.report is not None
        return " | ".join(waiting.reason for waiting in self.report.waiting if waiting.subject == subject)

    def moves_done(self) -> int:
        return sum(self.world.moves_done.values())


def running_cloud(
    layout: tuple[int, ...], capacity_mib: int = 1024, memory_mib: int = 256, **kwargs: object
) -> Cloud:
    """A converged cloud with so many servers on each host, named vm-1, vm-2, … host by host."""
    cloud = Cloud(len(layout), capacity_mib, **kwargs)  # type: ignore[arg-type]
    number = 0
    for host, count in enumerate(layout, start=1):
        for _ in range(count):
            number += 1
            cloud.create(number, memory_mib, on=host)
    report = cloud.settle()
    assert report.converged, report
    assert cloud.spread() == list(layout)
    return cloud


def at_most(servers: int) -> int:
    """Moves allowed for a balanced world."""
    return math.ceil(1.35 * servers)
