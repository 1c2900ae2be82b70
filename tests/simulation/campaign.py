"""One campaign in a simulated cloud under a seed: what goes wrong, and what must hold all the same.

    calm: hosts ready, servers up -> campaign begins, faults begin -> faults end -> everything comes right

Replay one seed with its trace:  PYTHONPATH=tests/operation python tests/simulation/campaign.py SEED
"""

import asyncio
import gc
import logging
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crash_plays import memory
from other_release import newer
from quick_database import database_in_the_loop
from simulated_cloud import SimulatedCloud

from nahtlos.model.blueprint import CampaignState, WaitKind
from nahtlos.model.errors import Conflict
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import OperationState
from nahtlos.model.nouns import Component
from nahtlos.physical.sim.agents import Dress
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import EDGE, FUNCTIONS, GROUP, NETWORK, NEW
from nahtlos.physical.sim.faults import Seeded
from nahtlos.physical.sim.firewalls import LEFT_BEHIND
from nahtlos.runtime.controllers.cloud import CampaignView, ServerRequest
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.networks import PortRequest, SecurityGroupRequest
from nahtlos.wire.memory import Faults

BOUND_SECONDS = 400.0
"""Virtual seconds within which everything must come right once faults have ended."""
ORCHESTRATOR = "orchestrator"
APART_SECONDS = 1500.0
TARGETS = {Component.HYPERVISOR: NEW, Component.STORAGE: NEW, Component.NETWORK: FUNCTIONS}


@dataclass(frozen=True)
class Plan:
    """What a seed means."""

    seed: int
    hosts: int
    servers: int
    parallel: int
    alone: bool
    mixed: bool
    """Some agents are of a newer release."""
    vmm_kills: bool
    fault_seconds: float
    drop: float
    duplicate: float
    late: float
    breaks: float
    failing: float
    refusing: float
    crashing: float
    slow: float
    events: int
    guarded: bool
    """Servers are in a security group, behind a firewall that remembers connections."""
    component: Component

    @classmethod
    def of(cls, seed: int) -> "Plan":
        chance = random.Random(f"plan {seed}")
        level = chance.choice((0.0, 0.3, 1.0, 1.0, 2.0))
        messages = level * chance.choice((0.0, 1.0, 1.0))
        drivers = level * chance.choice((0.0, 1.0, 1.0))
        return cls(
            seed=seed,
            hosts=3,
            servers=chance.randint(2, 5),
            parallel=chance.randint(1, 3),
            alone=chance.random() < 0.7,
            mixed=chance.random() < 0.4,
            vmm_kills=chance.random() < 0.25,
            fault_seconds=chance.uniform(6.0, 20.0),
            drop=0.002 * messages,
            duplicate=0.02 * messages,
            late=0.02 * messages,
            breaks=0.002 * messages,
            failing=0.01 * drivers,
            refusing=0.002 * drivers,
            crashing=0.001 * drivers,
            slow=0.01 * drivers,
            events=chance.randint(0, 6) if level else 0,
            guarded=chance.random() < 0.6,
            component=chance.choice((Component.HYPERVISOR, Component.HYPERVISOR, *Component)),
        )


@dataclass
class Verdict:
    plan: Plan
    problems: list[str] = field(default_factory=list[str])
    waits: str = ""
    """What the campaign says it waits for, if it has not ended."""
    moves: int = 0
    failed_moves: int = 0
    lost: int = 0
    events: list[str] = field(default_factory=list[str])
    trace: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


class Campaign:
    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.verdict = Verdict(plan)
        self.chance = random.Random(f"events {plan.seed}")
        self.troubles = Seeded(plan.seed)
        self.faults = Faults(plan.seed, delay=(0.0001, 0.0008))
        self.names = [ServerId(f"web-{n + 1}") for n in range(plan.servers)]
        self.cloud = SimulatedCloud(
            folder,
            plan.seed,
            hosts=plan.hosts,
            parallel_moves=plan.parallel,
            troubles=self.troubles,
            faults=self.faults,
            dress=self._dress,
            alone=plan.alone,
        )

    def _dress(self, host: HostId) -> Dress | None:
        return newer if self.plan.mixed and host in ("host-2", EDGE) else None

    # --- the play ---

    async def play(self, cloud: SimulatedCloud) -> None:
        await cloud.ready()
        if self.plan.guarded:
            await cloud.ask(_create_group)
        for name in self.names:
            await self._create(name)
        await self._all_up(60.0)
        await cloud.ask(self._start)
        async with asyncio.TaskGroup() as tasks:
            self._arm()
            tasks.create_task(self._events())
            tasks.create_task(self._newcomer())
            await asyncio.sleep(self.plan.fault_seconds)
        self._calm()
        await self._come_right()
        cloud.world.settle()

    async def _create(self, name: ServerId) -> None:
        ports = (PortRequest(network=NETWORK, security_groups=(GROUP.id,)),) if self.plan.guarded else ()

        async def create(service: CloudService) -> None:
            try:
                await service.create_server(ServerRequest(name=name, memory_mib=64, networks=ports))
            except Conflict as error:
                if error.field != "name":  # an orchestrator that died while it answered has created it
                    raise

        await self.cloud.ask(create)

    async def _newcomer(self) -> None:
        """A server created in the middle of the campaign starts."""
        await asyncio.sleep(self.chance.uniform(0.5, self.plan.fault_seconds))
        name = ServerId("late")
        await self._create(name)
        self.names.append(name)

    async def _all_up(self, timeout: float) -> None:
        world = self.cloud.world
        await world.until(
            lambda: all(self.cloud.up(n) for n in self.names), timeout=timeout, what="all servers"
        )

    def _arm(self) -> None:
        plan, faults, troubles = self.plan, self.faults, self.troubles
        faults.drop, faults.duplicate, faults.late, faults.breaks = (
            plan.drop,
            plan.duplicate,
            plan.late,
            plan.breaks,
        )
        troubles.failing, troubles.refusing = plan.failing, plan.refusing
        troubles.crashing, troubles.slow = plan.crashing, plan.slow

    def _calm(self) -> None:
        self.cloud.world.note("", "faults end", "")
        self.faults.calm()
        self.troubles.calm()
        self.cloud.network.heal_all()
        for link in tuple(self.cloud.world.stalled_links):
            self.cloud.world.stall_link(*sorted(link), on=False)

    async def _come_right(self) -> None:
        view: CampaignView | None = None
        end = self.cloud.world.now() + BOUND_SECONDS
        while self.cloud.world.now() < end:
            view = await self.cloud.ask(_newest)
            if view.campaign.ended_at is not None or _waits_for_people(view):
                break
            await asyncio.sleep(2.0)
        assert view is not None
        self.verdict.moves, self.verdict.failed_moves = view.moves_done, view.moves_failed
        if view.campaign.ended_at is None:
            self.verdict.waits = "; ".join(f"{w.subject}: {w.reason}" for w in view.waiting)
            if not _waits_for_people(view):
                self.verdict.problems.append(
                    f"the campaign has not ended; it waits for: {self.verdict.waits}"
                )
        elif view.campaign.state is not CampaignState.DONE:
            self.verdict.problems.append(f"the campaign ended as {view.campaign.state}")
        await self._all_up(120.0)
        if not self.verdict.waits:
            await self.cloud.until(_converged, timeout=120, what="every host as configured, all moves over")
            await self._check_releases()

    async def _start(self, service: CloudService) -> None:
        component = self.plan.component
        try:
            await service.start_upgrade(TARGETS[component], None, component)
        except Conflict as error:
            if error.field != "campaign":
                raise

    async def _check_releases(self) -> None:
        world = self.cloud.world
        if self.plan.component is not Component.HYPERVISOR:
            self._check_replaced()
            return
        for name in self.names:
            release = world.running(name)[0].release
            if release != NEW:
                self.verdict.problems.append(f"{name} still runs by {release}")

    def _check_replaced(self) -> None:
        target = TARGETS[self.plan.component]
        for spec in self.cloud.specs:
            host = self.cloud.world.hosts[spec.id]
            storage = self.plan.component is Component.STORAGE
            if storage and spec.id == EDGE:
                continue
            found = host.storage_release if storage else host.network_release
            if found != target:
                self.verdict.problems.append(f"{self.plan.component} of {spec.id} is {found}")
        if self.verdict.moves:
            self.verdict.problems.append(f"{self.verdict.moves} servers were moved for nothing")

    # --- events ---

    async def _events(self) -> None:
        for _ in range(self.plan.events):
            await asyncio.sleep(self.chance.expovariate(self.plan.events / self.plan.fault_seconds))
            name, act = self.chance.choice(self._choices())
            self.cloud.world.note("", "EVENT", name)
            act()

    def _choices(self) -> list[tuple[str, Callable[[], None]]]:
        cloud, chance = self.cloud, self.chance
        host = chance.choice(cloud.specs).id
        one, other = chance.sample(cloud.compute, 2)
        party = chance.choice((f"host/{other}", ORCHESTRATOR))
        seconds = chance.choice((1.0, 5.0, 20.0))
        choices = [
            (f"agent of {host} killed", lambda: cloud.agents[host].kill("event")),
            (f"agent of {one} killed", lambda: cloud.agents[one].kill("event")),
            ("orchestrator killed", lambda: cloud.orchestrator.kill("event")),
            (f"host/{one} and {party} parted", lambda: self._part(f"host/{one}", party, seconds)),
            (f"{one} and {other}: stream stalled", lambda: self._stall(one, other, seconds)),
            (f"{one} and {other}: stream cut", lambda: cloud.world.cut_streams(one, other)),
            (f"storage of {one} killed", lambda: cloud.world.kill_storage(one)),
            (f"lines of {one} broken", lambda: self._break(one)),
        ]
        if self.plan.vmm_kills:
            choices += [("a VMM killed", self._kill_vmm)] * 3
        return choices

    def _part(self, one: str, other: str, seconds: float) -> None:
        self.cloud.network.partition(one, other)
        asyncio.get_running_loop().call_later(seconds, self.cloud.network.heal, one, other)

    def _stall(self, one: HostId, other: HostId, seconds: float) -> None:
        self.cloud.world.stall_link(one, other, on=True)
        asyncio.get_running_loop().call_later(
            seconds, lambda: self.cloud.world.stall_link(one, other, on=False)
        )

    def _break(self, host: HostId) -> None:
        for other in (*(f"host/{h}" for h in self.cloud.compute), ORCHESTRATOR):
            self.cloud.network.break_channels(f"host/{host}", other)

    def _kill_vmm(self) -> None:
        vmms = [v for h in self.cloud.world.hosts.values() for v in h.vmms.values() if not v.ended]
        if vmms:
            self.cloud.world.kill_vmm(self.chance.choice(vmms), "event")

    # --- the verdict ---

    def judge(self) -> Verdict:
        cloud, world, verdict = self.cloud, self.cloud.world, self.verdict
        verdict.problems += [f"{v.kind}: {v.subject} {v.text} (at {v.at:.3f})" for v in world.violations]
        verdict.problems += cloud.problems
        for host, agent in cloud.agents.items():
            verdict.problems += [f"bug in the agent of {host}: {worded(b)}" for b in agent.bugs]
        verdict.problems += [f"bug in the orchestrator: {worded(b)}" for b in cloud.orchestrator.bugs]
        self._judge_packets()
        verdict.trace = [str(s) for s in world.trace]
        verdict.events = [str(s) for s in world.trace if s.what in ("EVENT", "faults end", "agent dies")]
        return verdict

    def _judge_packets(self) -> None:
        world = self.cloud.world
        for name, facts in world.servers.items():
            for flow in world.flows_of(name, (_mac_of(world, name),)):
                self.verdict.lost += sum(flow.lost.values())
                lost = {why: n for why, n in flow.lost.items() if why != LEFT_BEHIND or self._calm_plan()}
                if lost and not facts.excuses:
                    assert flow.lost_first is not None
                    self.verdict.problems.append(
                        f"packets from {flow.origin} to {name} lost: {lost}, "
                        f"first at {flow.lost_first[0]:.6f}"
                    )

    def _calm_plan(self) -> bool:
        """No agent and no line can have died with the last that a firewall had learned."""
        plan = self.plan
        return not (plan.events or plan.drop or plan.late or plan.breaks or plan.crashing or plan.failing)


def _mac_of(world: object, name: ServerId) -> str:
    running = world.running(name)  # type: ignore[attr-defined]
    return running[0].server.spec.ports[0].mac if running else ""


def worded(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


async def _create_group(service: CloudService) -> None:
    try:
        await service.networks.create_security_group(SecurityGroupRequest(name=GROUP.id, rules=GROUP.rules))
    except Conflict as error:
        if error.field != "name":
            raise


async def _newest(service: CloudService) -> CampaignView:
    return await service.campaign(None)


def _waits_for_people(view: CampaignView) -> bool:
    """It says that it will not go on without a person, and what that person is to do."""
    lasting = [w for w in view.waiting if w.kind in (WaitKind.OPERATOR, WaitKind.BLOCKED)]
    return bool(lasting) and not view.running and all(w.remedy for w in lasting)


async def _converged(service: CloudService) -> bool:
    hosts = [await service.host(v.id) for v in await service.hosts()]
    return all(
        h.connected
        and h.generation == h.target_generation
        and h.inventory is not None
        and not h.inventory.problems
        and all(o.state is not OperationState.RUNNING for o in h.inventory.operations)
        for h in hosts
    )


def simulate(seed: int) -> Verdict:
    """Plays one seed. Problems are in the verdict; nothing is raised for them."""
    random_state = random.getstate()
    gc.disable()  # a run is short and allocates much; what is left of it goes at its end
    with (
        database_in_the_loop(),
        tempfile.TemporaryDirectory(dir=memory()) as folder,
        _bugs_logged() as bugs,
    ):
        campaign = Campaign(Plan.of(seed), Path(folder))
        try:
            run_virtual(campaign.cloud.run(campaign.play), seed=seed, limit_seconds=5000)
        except BaseExceptionGroup as group:
            campaign.verdict.problems += [str(e) or worded(e) for e in leaves(group)]
        except AssertionError as error:
            campaign.verdict.problems.append(str(error) or worded(error))
        verdict = campaign.judge()
        verdict.problems += bugs
    random.setstate(random_state)
    gc.enable()
    gc.collect()
    return verdict


class _bugs_logged(logging.Handler):  # noqa: N801 - used as a context
    """Collects what the runtime logs as bugs of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._found: list[str] = []

    def __enter__(self) -> list[str]:
        logging.getLogger("nahtlos").addHandler(self)
        return self._found

    def __exit__(self, *_: object) -> None:
        logging.getLogger("nahtlos").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and "bug" in record.getMessage():
            self._found.append(f"{record.getMessage()}: {worded(record.exc_info[1])}")  # type: ignore[arg-type]


def replay_command(seed: int) -> str:
    return f"PYTHONPATH=tests/operation PYTHONHASHSEED=0 python tests/simulation/campaign.py {seed}"


def simulate_apart(seeds: range, workers: int) -> list[tuple[int, str]]:
    """Spread over processes whose hash seed is that of a replay; exit code and output of each."""
    share = -(-len(seeds) // workers)
    running = [
        subprocess.Popen(
            [sys.executable, __file__, f"{part.start}..{part.stop - 1}"],
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in (seeds[i : i + share] for i in range(0, len(seeds), share))
    ]
    try:
        outputs = [process.communicate(timeout=APART_SECONDS)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


def main(which: str) -> int:
    """`7` plays one seed and prints its trace; `1..200` plays many and prints those that failed."""
    first, _, last = which.partition("..")
    seeds = range(int(first), int(last or first) + 1)
    failed = waiting = lost = moves = failed_moves = 0
    for seed in seeds:
        verdict = simulate(seed)
        moves, failed_moves = moves + verdict.moves, failed_moves + verdict.failed_moves
        waiting, lost = waiting + bool(verdict.waits), lost + verdict.lost
        if len(seeds) == 1:
            print("\n".join(verdict.trace))
            print(verdict.plan)
        if verdict.problems:
            failed += 1
            print(f"seed {seed} failed; replay: {replay_command(seed)}")
            print("\n".join(f"    {p}" for p in verdict.problems))
            print("\n".join(f"        {e}" for e in verdict.events[-40:]))
        elif verdict.waits:
            print(f"seed {seed} waits for people: {verdict.waits}")
    print(
        f"{len(seeds)} seeds, {failed} failed, {waiting} wait for people; {moves} moves, "
        f"{failed_moves} undone; {lost} packets lost, all with killed VMMs"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
