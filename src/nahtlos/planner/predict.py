"""What a campaign would do: a dry run of the same `plan` in an idealised world that ends every operation at
once and well. Times and gaps come from this cloud's own moves where there are any, else from the table of
measurements in the documentation. It forecasts; it decides nothing and changes nothing.
"""

from collections.abc import Sequence
from statistics import median

import msgspec

from nahtlos.model.blueprint import (
    Blueprint,
    Campaign,
    CampaignState,
    Forecast,
    ForecastHost,
    ForecastMove,
    PlannedMove,
    PlanReport,
    Policy,
    Waiting,
    WaitKind,
)
from nahtlos.model.ids import CampaignId, HostId, OperationId, ReleaseId, ServerId
from nahtlos.model.inventory import (
    HostInventory,
    Inventory,
    OperationKind,
    OperationState,
    OperationStatus,
    RunState,
    ServerStatus,
)
from nahtlos.model.nouns import Component, Size
from nahtlos.model.values import Value
from nahtlos.planner.plan import plan
from nahtlos.planner.rooms import amount
from nahtlos.planner.upgrade import campaign_over, has, to_upgrade

# Measured with QEMU 10 and 11 under TCG on 2 cores, a client at 1,000 packets/s; see the tables of live
# moves in the documentation.
TABLE_SECONDS = 0.42
"""A move of 256 MiB, from its order to its end."""
TABLE_SECONDS_PER_MIB = 0.0014
"""For what a server has above that: 1.57 s for 1 GiB against 0.49 s for 256 MiB, all of it touched."""
TABLE_VMM_START = 0.1
TABLE_MIB = 256
TABLE_GAP_MS = 60.0
TABLE_GAP_MS_MAX = 97.0
TABLE_PARALLEL_GAP_MS = 126.0
TABLE_PARALLEL_GAP_MS_MAX = 332.0
"""Four guests at once."""
ASSUMED_VERIFY_SECONDS = 5.0
ASSUMED_REPLACE_SECONDS = 5.0
"""Of a storage daemon or network functions, until the host has reported it."""
NEAREST_SAMPLES = 20
ENOUGH_SAMPLES = 3
BATCH = 64
"""Moves per step of a dry run. What a step decides does not depend on it, as only one host is emptied at a
time and the room at destinations is taken when a move is decided; the time is counted by the policy's own
number."""


class MoveSample(Value, frozen=True, kw_only=True):
    """One measured move of the past."""

    memory_mib: int
    seconds: float
    gap_ms: float
    """As a client saw it."""
    from_release: ReleaseId | None = None
    to_release: ReleaseId | None = None


class Prediction(Value, frozen=True, kw_only=True):
    seconds: float
    gap_ms: float
    gap_ms_max: float


def forecast(
    policy: Policy,
    inventory: Inventory,
    parent: Blueprint | None,
    to_release: ReleaseId,
    hosts: tuple[HostId, ...] | None = None,
    samples: Sequence[MoveSample] = (),
    verify_seconds: float | None = None,
    component: Component = Component.HYPERVISOR,
) -> Forecast:
    """What a campaign to `to_release` would do from here. `hosts` None: every one that has the component.
    Verifying takes `verify_seconds` where that was measured."""
    chosen = hosts if hosts is not None else _hosts_with(policy, component)
    trial = _with_campaign(policy, to_release, chosen, component)
    run = _dry_run(trial, inventory, parent)
    ending = _ending_seconds(component, verify_seconds)
    steps = tuple(_host_forecast(policy, run, host, to_release, samples, ending) for host in run.order)
    moves = [move for step in steps for move in step.moves]
    return Forecast(
        to_release=to_release,
        component=component,
        hosts=steps,
        total_moves=len(moves),
        moves_per_server=len(moves) / len(policy.servers) if policy.servers else 0.0,
        seconds=sum(step.seconds for step in steps),
        gap_ms_p50=median(move.gap_ms for move in moves) if moves else 0.0,
        capacity_floor=run.floor,
        blockers=_blockers(trial, inventory, run),
        basis=_basis(samples, verify_seconds, component),
    )


def _hosts_with(policy: Policy, component: Component) -> tuple[HostId, ...]:
    return tuple(sorted(host for host, spec in policy.hosts.items() if has(spec.role, component)))


def _with_campaign(
    policy: Policy, to_release: ReleaseId, hosts: tuple[HostId, ...], component: Component
) -> Policy:
    """A campaign that runs already is forecast as itself, from where it is."""
    going = policy.campaign
    same = going is not None and (going.to_release, going.component) == (to_release, component)
    campaign = Campaign(
        id=going.id if going is not None and same else CampaignId("forecast"),
        to_release=to_release,
        hosts=hosts,
        state=CampaignState.RUNNING,
        component=component,
    )
    return msgspec.structs.replace(policy, campaign=campaign, parallel_moves=BATCH)


# --- the idealised world -----------------------------------------------------------------------------


class _World:
    """Hosts on which every operation ends well at the next look, except where an agent is away."""

    def __init__(self, inventory: Inventory) -> None:
        self.connected = inventory.connected
        self.hosts = dict(inventory.hosts)

    def inventory(self) -> Inventory:
        return Inventory(hosts=dict(self.hosts), connected=self.connected)

    def carry_out(self, policy: Policy, blueprint: Blueprint) -> None:
        ended: dict[HostId, list[OperationStatus]] = {}
        places = {server: (owner.host, owner.epoch) for server, owner in blueprint.servers.items()}
        for move in blueprint.moves:
            if {move.source, move.destination} <= self.connected:
                ended.setdefault(move.destination, []).append(_done(move.id, OperationKind.MOVE))
                places[move.server] = (move.destination, move.epoch)
        verified: dict[HostId, ReleaseId] = {}
        for verify in blueprint.verifies:
            ended.setdefault(verify.host, []).append(_done(verify.id, OperationKind.VERIFY))
            verified[verify.host] = verify.release
        self._settle(policy, blueprint, places, ended, verified)

    def _settle(
        self,
        policy: Policy,
        blueprint: Blueprint,
        places: dict[ServerId, tuple[HostId, int]],
        ended: dict[HostId, list[OperationStatus]],
        verified: dict[HostId, ReleaseId],
    ) -> None:
        running: dict[HostId, list[ServerStatus]] = {}
        for server, (host, epoch) in places.items():
            spec = policy.servers.get(server)
            running.setdefault(host, []).append(
                ServerStatus(
                    id=server,
                    epoch=epoch,
                    state=RunState.RUNNING,
                    release=None,
                    size=spec.size if spec else Size(),
                )
            )
        for host in self.connected & self.hosts.keys():
            seen, plan = self.hosts[host], blueprint.hosts.get(host)
            self.hosts[host] = msgspec.structs.replace(
                seen,
                generation=seen.target_generation,
                storage_release=(plan.storage_release if plan else None) or seen.storage_release,
                network_release=plan.network_release if plan else seen.network_release,
                servers=_with_crashed(seen, running.get(host, [])),
                operations=tuple(ended.get(host, ())),
                verified_release=verified.get(host, seen.verified_release),
            )


def _done(operation: OperationId, kind: OperationKind) -> OperationStatus:
    return OperationStatus(id=operation, kind=kind, state=OperationState.DONE, step="done")


def _with_crashed(seen: HostInventory, running: list[ServerStatus]) -> tuple[ServerStatus, ...]:
    """A server that has crashed does not come back by wishing for it."""
    crashed = {status.id: status for status in seen.servers if status.state is RunState.CRASHED}
    return tuple(crashed.get(status.id, status) for status in running)


class _Run:
    """What happened in a dry run."""

    def __init__(self) -> None:
        self.order: list[HostId] = []
        self.moves: dict[HostId, list[PlannedMove]] = {}
        self.before: dict[HostId, ReleaseId | None] = {}
        self.floor = 1.0
        self.over = False
        self.last: PlanReport | None = None
        self.blueprint: Blueprint | None = None
        self._seen: set[OperationId] = set()

    def note(self, parent: Blueprint | None, blueprint: Blueprint, report: PlanReport) -> None:
        self.floor = min(self.floor, report.capacity.share)
        self.last, self.blueprint = report, blueprint
        replaced = (h for h, plan in blueprint.hosts.items() if plan.replacing is not None)
        host = blueprint.upgrading or next(replaced, None)
        if host is not None and host not in self.moves:
            self.order.append(host)
            self.moves[host] = []
            plan, before = blueprint.hosts[host], (parent or blueprint).hosts.get(host)
            came = plan.previous if plan.replacing is not None else before.release if before else None
            self.before[host] = came
        for move in blueprint.moves:
            if move.id not in self._seen and move.source in self.moves:
                self.moves[move.source].append(move)
            self._seen.add(move.id)


def _dry_run(policy: Policy, inventory: Inventory, parent: Blueprint | None) -> _Run:
    world, run, blueprint = _World(inventory), _Run(), parent
    idle = 0
    bound = 20 + 4 * len(policy.hosts) + 4 * (len(policy.servers) // BATCH + 1) * max(len(policy.hosts), 1)
    for _ in range(bound):
        following, report = plan(policy, world.inventory(), blueprint)
        run.note(blueprint, following, report)
        run.over = campaign_over(policy, following)
        idle = idle + 1 if following is blueprint else 0
        if run.over or idle > 1:
            break
        world.carry_out(policy, following)
        blueprint = following
    return run


# --- predictions -------------------------------------------------------------------------------------


def predict_move(
    memory_mib: int,
    releases: tuple[ReleaseId | None, ReleaseId | None],
    parallel: int,
    samples: Sequence[MoveSample],
) -> Prediction:
    """From the samples nearest in size, those between the same releases if there are enough of them."""
    same = [sample for sample in samples if (sample.from_release, sample.to_release) == releases]
    chosen = same if len(same) >= ENOUGH_SAMPLES else samples
    if not chosen:
        return _from_table(memory_mib, parallel)
    nearest = sorted(chosen, key=lambda sample: abs(sample.memory_mib - memory_mib))[:NEAREST_SAMPLES]
    return Prediction(
        seconds=median(sample.seconds for sample in nearest),
        gap_ms=median(sample.gap_ms for sample in nearest),
        gap_ms_max=max(sample.gap_ms for sample in nearest),
    )


def _from_table(memory_mib: int, parallel: int) -> Prediction:
    stream = TABLE_SECONDS + max(memory_mib - TABLE_MIB, 0) * TABLE_SECONDS_PER_MIB
    return Prediction(
        seconds=stream + TABLE_VMM_START,
        gap_ms=TABLE_GAP_MS if parallel <= 1 else TABLE_PARALLEL_GAP_MS,
        gap_ms_max=TABLE_GAP_MS_MAX if parallel <= 1 else TABLE_PARALLEL_GAP_MS_MAX,
    )


def _host_forecast(
    policy: Policy,
    run: _Run,
    host: HostId,
    to_release: ReleaseId,
    samples: Sequence[MoveSample],
    ending: float,
) -> ForecastHost:
    moves = tuple(_move_forecast(policy, run, move, samples) for move in run.moves[host])
    moving = sum(move.seconds for move in moves) / max(policy.parallel_moves, 1)
    return ForecastHost(
        host=host,
        from_release=run.before[host],
        to_release=to_release,
        moves=moves,
        seconds=max([moving, *(move.seconds for move in moves)]) + ending,
    )


def _ending_seconds(component: Component, verify_seconds: float | None) -> float:
    """What a host takes beside moves."""
    if component is not Component.HYPERVISOR:
        return ASSUMED_REPLACE_SECONDS
    return verify_seconds if verify_seconds is not None else ASSUMED_VERIFY_SECONDS


def _move_forecast(
    policy: Policy, run: _Run, move: PlannedMove, samples: Sequence[MoveSample]
) -> ForecastMove:
    spec = policy.servers.get(move.server)
    arriving = run.blueprint.hosts.get(move.destination) if run.blueprint else None
    releases = (run.before[move.source], arriving.release if arriving else None)
    memory = spec.size.memory_mib if spec else 0
    prediction = predict_move(memory, releases, policy.parallel_moves, samples)
    return ForecastMove(
        server=move.server,
        source=move.source,
        destination=move.destination,
        seconds=prediction.seconds,
        gap_ms=prediction.gap_ms,
        gap_ms_max=prediction.gap_ms_max,
    )


def _basis(samples: Sequence[MoveSample], verify_seconds: float | None, component: Component) -> str:
    if component is not Component.HYPERVISOR:
        return f"no server is moved; {ASSUMED_REPLACE_SECONDS:.0f} s assumed for each host"
    verify = "" if verify_seconds is not None else f"; {ASSUMED_VERIFY_SECONDS:.0f} s assumed for each verify"
    if samples:
        return f"{len(samples)} measured move{'s' if len(samples) > 1 else ''} of this cloud{verify}"
    return f"the table of measured moves in the documentation (TCG, 2 cores){verify}"


# --- blockers ----------------------------------------------------------------------------------------


def _blockers(policy: Policy, inventory: Inventory, run: _Run) -> tuple[Waiting, ...]:
    """What is in the way: seen beforehand, or what the dry run ended at."""
    campaign = policy.campaign
    assert campaign is not None, "a forecast without a campaign"
    found = _unknown_hosts(policy, campaign)
    moving = campaign.component is Component.HYPERVISOR
    if moving:
        found += [*_accelerators(policy, inventory, campaign), *_machine_types(policy, run, campaign)]
    if not run.over and run.last is not None:
        found += [*(_too_big(policy, inventory, run) if moving else ()), *run.last.waiting]
    return tuple({(waiting.subject, waiting.reason): waiting for waiting in found}.values())


def _blocked(subject: str, reason: str, remedy: str) -> Waiting:
    return Waiting(subject=subject, kind=WaitKind.BLOCKED, reason=reason, remedy=remedy)


def _unknown_hosts(policy: Policy, campaign: Campaign) -> list[Waiting]:
    known = set(to_upgrade(policy, campaign))
    return [
        _blocked(
            host,
            f"{host} is no host of this cloud with a {campaign.component}"
            if campaign.component is not Component.HYPERVISOR
            else f"{host} is no compute host of this cloud",
            "leave it out, or let it join first",
        )
        for host in campaign.hosts
        if host not in known
    ]


def _accelerators(policy: Policy, inventory: Inventory, campaign: Campaign) -> list[Waiting]:
    return [
        _blocked(
            host,
            f"{host} has found no accelerator: no probe has booted there",
            f"look at `nahtlos doctor` on {host}",
        )
        for host in to_upgrade(policy, campaign)
        if (seen := inventory.hosts.get(host)) and seen.accelerator is None and seen.verified_release is None
    ]


def _machine_types(policy: Policy, run: _Run, campaign: Campaign) -> list[Waiting]:
    """Servers the new release cannot run at all: they would have to stay behind."""
    known = policy.machine_types.get(campaign.to_release)
    owners = run.blueprint.servers if run.blueprint else {}
    targets = set(to_upgrade(policy, campaign))
    return [
        _blocked(
            server,
            f"{campaign.to_release} lacks the machine type {spec.machine} of {server}",
            f"choose a release that has it, or create {server} anew with one of: {', '.join(known)}",
        )
        for server, spec in sorted(policy.servers.items())
        if known is not None
        and spec.machine not in known
        and (owner := owners.get(server))
        and owner.host in targets
    ]


def _too_big(policy: Policy, inventory: Inventory, run: _Run) -> list[Waiting]:
    """Servers larger than every other host, however empty."""
    owners = run.blueprint.servers if run.blueprint else {}
    found: list[Waiting] = []
    for server, owner in sorted(owners.items()):
        spec = policy.servers.get(server)
        others = [
            inventory.hosts[host].capacity
            for host in _hosts_with(policy, Component.HYPERVISOR)
            if host != owner.host and host in inventory.hosts
        ]
        if spec and not any(spec.size.fits(capacity) for capacity in others):
            largest = max(others, key=lambda size: size.memory_mib, default=Size())
            found.append(
                _blocked(
                    server,
                    f"{server} ({amount(spec.size)}) is too big for every host but {owner.host}"
                    f" (the largest other: {amount(largest)})",
                    f"add a host with at least {amount(spec.size)}",
                )
            )
    return found
