"""What a campaign would do: a dry run of the same `plan` in an idealised world that ends every operation at
once and well. Times and gaps come from `estimate`, put right by what this cloud has measured. It forecasts;
it decides nothing and changes nothing.
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
    Obstacle,
    PlanReport,
    Policy,
    Strategy,
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
from nahtlos.model.placement import ReserveReport
from nahtlos.model.prediction import Means, Sample
from nahtlos.model.version_pairs import Pair, Verdict, Way, pair_for
from nahtlos.planner.capacity import count_rooms
from nahtlos.planner.draft import Draft
from nahtlos.planner.estimate import error_p90, learn, slowest
from nahtlos.planner.foretell import foretold
from nahtlos.planner.obstacles import of_campaign
from nahtlos.planner.plan import plan
from nahtlos.planner.rooms import amount
from nahtlos.planner.upgrade import campaign_over, has, to_upgrade
from nahtlos.planner.way_back import refused_ways_back

ASSUMED_VERIFY_SECONDS = 5.0
STAYING_NOTE = (
    "servers stay: only the hypervisor is replaced under them; a new kernel needs an empty host: "
    "nahtlos host drain {host}"
)
ASSUMED_REPLACE_SECONDS = 5.0
"""Of a storage daemon or network functions, until the host has reported it."""
BATCH = 64
"""Moves per step of a dry run. What a step decides does not depend on it, as only one host is emptied at a
time and the room at destinations is taken when a move is decided; the time is counted by the policy's own
number."""


def forecast(
    policy: Policy,
    inventory: Inventory,
    parent: Blueprint | None,
    to_release: ReleaseId,
    hosts: tuple[HostId, ...] | None = None,
    samples: Sequence[Sample] = (),
    verify_seconds: float | None = None,
    component: Component = Component.HYPERVISOR,
    strategy: Strategy = Strategy.AUTO,
    no_way_back: bool = False,
) -> Forecast:
    """What a campaign to `to_release` would do from here. `hosts` None: every one that has the component.
    `samples`: of what was carried over before, newest first. Verifying takes `verify_seconds` where that was
    measured."""
    accelerator = _accelerator(inventory)
    known = learn(samples, accelerator, policy.parallel_moves)
    known = msgspec.structs.replace(known, parallel=policy.parallel_moves)
    policy = msgspec.structs.replace(policy, experience=known)
    chosen = hosts if hosts is not None else _hosts_with(policy, component)
    trial = _with_campaign(policy, to_release, chosen, component, strategy, _releases(parent, chosen))
    assert trial.campaign is not None, "a forecast without a campaign"
    asked = msgspec.structs.replace(trial.campaign, no_way_back=no_way_back)
    trial = msgspec.structs.replace(trial, campaign=asked)
    run = _dry_run(trial, inventory, parent)
    ending = _ending_seconds(component, verify_seconds)
    steps = tuple(_host_forecast(policy, run, host, to_release, ending) for host in run.order)
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
        blockers=_blockers(trial, inventory, run, parent),
        basis=_basis(samples, verify_seconds, component),
        strategy=strategy,
        obstacles=_obstacles(trial, inventory, parent) if component is Component.HYPERVISOR else (),
        reserve=run.reserve,
        returns=component is Component.HYPERVISOR and not no_way_back,
        ways_back=tuple(str(row) for row in ways_back(policy, inventory, parent, to_release))
        if component is Component.HYPERVISOR
        else (),
        error_p90=error_p90(samples, policy.experience, accelerator) if samples else None,
    )


def _releases(parent: Blueprint | None, hosts: Sequence[HostId]) -> tuple[ReleaseId, ...]:
    """Hypervisors that `hosts` have now."""
    plans = parent.hosts if parent is not None else {}
    return tuple(sorted({r for h in hosts if h in plans and (r := plans[h].release) is not None}))


def _accelerator(inventory: Inventory) -> str:
    return slowest(seen.accelerator.name for seen in inventory.hosts.values() if seen.accelerator is not None)


def _hosts_with(policy: Policy, component: Component) -> tuple[HostId, ...]:
    return tuple(sorted(host for host, spec in policy.hosts.items() if has(spec.role, component)))


def _with_campaign(
    policy: Policy,
    to_release: ReleaseId,
    hosts: tuple[HostId, ...],
    component: Component,
    strategy: Strategy,
    from_releases: tuple[ReleaseId, ...],
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
        strategy=strategy,
        from_releases=from_releases,
    )
    return msgspec.structs.replace(
        policy,
        campaign=campaign,
        parallel_moves=BATCH,
        parallel_moves_per_host=BATCH,
        move_bytes_per_second=0,
    )


# --- the idealised world -----------------------------------------------------------------------------


class _World:
    """Hosts on which every operation ends well at the next look, except where an agent is away."""

    def __init__(self, inventory: Inventory) -> None:
        self.connected = inventory.connected
        self.hosts = dict(inventory.hosts)
        self.under = {s.id: s.release for seen in inventory.hosts.values() for s in seen.servers}
        """What runs each server."""

    def inventory(self) -> Inventory:
        return Inventory(hosts=dict(self.hosts), connected=self.connected)

    def carry_out(self, policy: Policy, blueprint: Blueprint) -> None:
        ended: dict[HostId, list[OperationStatus]] = {}
        places = {server: (owner.host, owner.epoch) for server, owner in blueprint.servers.items()}
        for server, (host, _) in places.items():
            if server not in self.under and (plan := blueprint.hosts.get(host)):
                self.under[server] = plan.release
        for move in blueprint.moves:
            if {move.source, move.destination} <= self.connected:
                ended.setdefault(move.destination, []).append(_done(move.id, OperationKind.MOVE))
                places[move.server] = (move.destination, move.epoch)
                self.under[move.server] = move.release or blueprint.hosts[move.destination].release
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
                    state=RunState.STOPPED if server in blueprint.off else RunState.RUNNING,
                    release=self.under.get(server),
                    size=spec.size if spec else Size(),
                    power=spec.power.serial if spec else 0,
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
        self.moves: dict[HostId, list[ForecastMove]] = {}
        self.before: dict[HostId, ReleaseId | None] = {}
        self.floor = 1.0
        self.reserve: ReserveReport | None = None
        self.over = False
        self.last: PlanReport | None = None
        self.blueprint: Blueprint | None = None
        self._seen: set[OperationId] = set()

    def note(
        self,
        parent: Blueprint | None,
        blueprint: Blueprint,
        report: PlanReport,
        policy: Policy,
        seen: Inventory,
    ) -> None:
        self.floor = min(self.floor, report.capacity.share)
        if self.reserve is None or self.reserve.kept:
            self.reserve = report.capacity.reserve
        self.last, self.blueprint = report, blueprint
        replaced = (h for h, plan in blueprint.hosts.items() if plan.replacing is not None)
        host = blueprint.upgrading or next(replaced, None)
        if host is not None and host not in self.moves:
            self.order.append(host)
            self.moves[host] = []
            plan, before = blueprint.hosts[host], (parent or blueprint).hosts.get(host)
            came = plan.previous if plan.replacing is not None else before.release if before else None
            self.before[host] = came
        new = [move for move in blueprint.moves if move.id not in self._seen]
        self._seen.update(move.id for move in new)
        draft = Draft(policy, seen, blueprint) if new else None
        for move in new:
            if draft is not None and move.source in self.moves:
                self.moves[move.source].append(foretold(draft, move))


def _dry_run(policy: Policy, inventory: Inventory, parent: Blueprint | None) -> _Run:
    world, run, blueprint = _World(inventory), _Run(), parent
    idle = 0
    bound = 20 + 4 * len(policy.hosts) + 4 * (len(policy.servers) // BATCH + 1) * max(len(policy.hosts), 1)
    bound += len(policy.servers)  # in place they take turns
    for _ in range(bound):
        seen = world.inventory()
        following, report = plan(policy, seen, blueprint)
        run.note(blueprint, following, report, policy, seen)
        run.over = campaign_over(policy, following)
        idle = idle + 1 if following is blueprint else 0
        if run.over or idle > 1:
            break
        world.carry_out(policy, following)
        blueprint = following
    return run


# --- predictions -------------------------------------------------------------------------------------


def _host_forecast(
    policy: Policy, run: _Run, host: HostId, to_release: ReleaseId, ending: float
) -> ForecastHost:
    """In place servers take turns, moves run beside each other."""
    moves = tuple(run.moves[host])
    staying = sum(move.seconds for move in moves if move.means is Means.IN_PLACE)
    leaving = [move.seconds for move in moves if move.means is not Means.IN_PLACE]
    moving = max([sum(leaving) / _at_once(policy), *leaving])
    return ForecastHost(
        host=host,
        from_release=run.before[host],
        to_release=to_release,
        moves=moves,
        seconds=max(moving, staying) + ending,
        note=STAYING_NOTE.format(host=host) if staying else "",
    )


def _at_once(policy: Policy) -> int:
    """Moves from the one host that is emptied."""
    return max(min(policy.parallel_moves, policy.parallel_moves_per_host), 1)


def _ending_seconds(component: Component, verify_seconds: float | None) -> float:
    """What a host takes beside moves."""
    if component is not Component.HYPERVISOR:
        return ASSUMED_REPLACE_SECONDS
    return verify_seconds if verify_seconds is not None else ASSUMED_VERIFY_SECONDS


def _basis(samples: Sequence[Sample], verify_seconds: float | None, component: Component) -> str:
    if component is not Component.HYPERVISOR:
        return f"no server is moved; {ASSUMED_REPLACE_SECONDS:.0f} s assumed for each host"
    verify = "" if verify_seconds is not None else f"; {ASSUMED_VERIFY_SECONDS:.0f} s assumed for each verify"
    if samples:
        return f"{len(samples)} measured move{'s' if len(samples) > 1 else ''} of this cloud{verify}"
    return f"the table of measured moves in the documentation (TCG, 2 cores){verify}"


# --- blockers ----------------------------------------------------------------------------------------


def _blockers(
    policy: Policy, inventory: Inventory, run: _Run, parent: Blueprint | None
) -> tuple[Waiting, ...]:
    """What is in the way: seen beforehand, or what the dry run ended at."""
    campaign = policy.campaign
    assert campaign is not None, "a forecast without a campaign"
    found = _unknown_hosts(policy, campaign)
    moving = campaign.component is Component.HYPERVISOR
    if moving:
        found += refused_ways_back(Draft(policy, inventory, parent), campaign)
        found += [*_accelerators(policy, inventory, campaign), *_machine_types(policy, run, campaign)]
    if not run.over and run.last is not None:
        found += [*(_too_big(policy, inventory, run) if moving else ()), *run.last.waiting]
    return tuple({(waiting.subject, waiting.reason): waiting for waiting in found}.values())


def _blocked(subject: str, reason: str, remedy: str) -> Waiting:
    return Waiting(subject=subject, kind=WaitKind.BLOCKED, reason=reason, remedy=remedy)


def _obstacles(policy: Policy, inventory: Inventory, parent: Blueprint | None) -> tuple[Obstacle, ...]:
    """Per server, beforehand, of hosts that do not have the release yet."""
    campaign, draft = policy.campaign, Draft(policy, inventory, parent)
    assert campaign is not None, "a forecast without a campaign"
    count_rooms(draft)
    plans = ((host, draft.hosts.get(host)) for host in to_upgrade(policy, campaign))
    left = [host for host, plan in plans if plan is not None and plan.release != campaign.to_release]
    return of_campaign(draft, campaign, left)


def ways_back(
    policy: Policy, inventory: Inventory, parent: Blueprint | None, to_release: ReleaseId
) -> list[Pair]:
    """For each release in use, the best row by which a server could return to it."""
    plans = parent.hosts.values() if parent is not None else ()
    versions, accelerator = policy.release_versions, _accelerator(inventory)
    used = sorted({plan.release for plan in plans if plan.release not in (None, to_release)})
    rows: list[Pair] = []
    for old in used:
        if old in versions and to_release in versions:
            both = [pair_for(way, versions[to_release], versions[old], accelerator) for way in Way]
            rows.append(next((row for row in both if row.verdict is not Verdict.REFUSED), both[0]))
    return rows


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
