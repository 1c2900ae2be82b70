"""Hosts that fail in the middle of a campaign and of moves, in whole simulated clouds under a seed: real
agents, the real orchestrator over a real store, and whatever can happen to a host beside them.

    calm: servers run under leases -> campaign, moves, replacements; hosts fail -> calm -> all comes right

Hosts lose their power, are cut off whole, in one direction, or from one party; agents freeze and die;
supervisors die, with the link alive or cut; the orchestrator dies and another one takes over; streams stall;
clocks differ by as much as is allowed for. Never do two copies of a server run, nor one by an older epoch.

Replay one seed with its trace:
    PYTHONPATH=tests/operation PYTHONHASHSEED=0 python tests/simulation/failure_storms.py SEED
"""

import asyncio
import gc
import random
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from campaign import leaves, worded
from quick_database import database_in_the_loop
from simulated_cloud import SimulatedCloud, memory

from nahtlos.model.availability import DRIFT, OnHostFailure
from nahtlos.model.blueprint import Strategy
from nahtlos.model.errors import Error
from nahtlos.model.ids import HostId, ServerId
from nahtlos.physical.ports import Crash
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import NEW, OLD
from nahtlos.physical.sim.faults import Seeded
from nahtlos.runtime.controllers.availability import AvailabilityChange
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.cloud_service import CloudService

LEASE, LOST = 3.0, 2.0
STORM_SECONDS = 30.0
BOUND_SECONDS = 240.0
"""Virtual seconds within which everything runs again once nothing fails any more."""
ORCHESTRATOR = "orchestrator"


@dataclass(frozen=True)
class Plan:
    """What a seed means."""

    seed: int
    servers: int
    strategy: Strategy
    upgrades: bool
    events: int
    crashing: float
    keepers: bool = True
    """False: supervisors that are dead end nothing, and nobody else does. What must be found out."""

    @classmethod
    def of(cls, seed: int) -> "Plan":
        chance = random.Random(f"failure plan {seed}")
        return cls(
            seed=seed,
            servers=chance.randint(1, 3),
            strategy=chance.choice(tuple(Strategy)),
            upgrades=chance.random() < 0.6,
            events=chance.randint(2, 8),
            crashing=chance.choice((0.0, 0.0, 0.0005)),
        )


@dataclass
class Storm:
    plan: Plan
    folder: Path
    problems: list[str] = field(default_factory=list[str])
    restarts: int = 0
    moves: int = 0
    trace: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        seed = self.plan.seed
        self.chance = random.Random(f"failure events {seed}")
        self.troubles = Seeded(seed)
        self.cloud = SimulatedCloud(
            self.folder, seed, troubles=self.troubles, parallel_moves=2, alone=self.chance.random() < 0.7
        )
        for host in self.cloud.world.hosts.values():
            host.clock_rate = 1 + self.chance.uniform(-DRIFT, DRIFT)
        self.names = [ServerId(f"web-{n + 1}") for n in range(self.plan.servers)]
        self._until = 0.0
        """The end of the storm."""

    # --- the play ---

    async def play(self, cloud: SimulatedCloud) -> None:
        change = AvailabilityChange(lease_seconds=LEASE, lost_seconds=LOST)
        await cloud.ask(lambda s: s.availability.change(change))
        await cloud.ready()
        for number, name in enumerate(self.names):
            host = cloud.compute[number % len(cloud.compute)]
            request = ServerRequest(
                name=name,
                memory_mib=64,
                copies=2,
                host=host,
                on_host_failure=self.chance.choice(
                    [OnHostFailure.RESTART] * 4 + [OnHostFailure.EVACUATE_ONLY]
                ),
            )
            await cloud.ask(lambda s, request=request: s.create_server(request))
        await cloud.world.until(self._all_up, timeout=120, what="all servers to be up")
        await asyncio.sleep(2 * LEASE)
        self.troubles.crashing = self.plan.crashing
        self._until = cloud.world.now() + STORM_SECONDS
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._requests())
            tasks.create_task(self._events())
            await asyncio.sleep(STORM_SECONDS)
        self._calm()
        await cloud.world.until(
            self._all_up, timeout=BOUND_SECONDS, what="all servers to be up again", every=0.5
        )
        await asyncio.sleep(2 * LEASE)

    def _all_up(self) -> bool:
        return all(self.cloud.up(name) for name in self.names)

    async def _requests(self) -> None:
        """So that something is on its way when hosts fail."""
        if self.plan.upgrades:
            await self._ask(lambda s: s.start_upgrade(NEW, None, strategy=self.plan.strategy))
        while True:
            await asyncio.sleep(self.chance.uniform(0.5, 6.0))
            if self.cloud.world.now() > self._until:
                return
            name, host = self.chance.choice(self.names), self.chance.choice(self.cloud.compute)
            if self.chance.random() < 0.7:
                await self._ask(lambda s, name=name, host=host: s.move_server(name, host))
            else:
                release = self.chance.choice((OLD, NEW))
                await self._ask(lambda s, name=name, to=release: s.replace_vmm(name, to))

    async def _ask(self, call: Callable[[CloudService], Awaitable[object]]) -> None:
        """Refusals are as good as anything else, and so is an orchestrator that dies over it."""
        service = self.cloud.orchestrator.service
        if service is None:
            return
        with suppress(Error, Crash):
            await call(service)

    async def _events(self) -> None:
        for _ in range(self.plan.events):
            await asyncio.sleep(self.chance.expovariate(self.plan.events / (STORM_SECONDS * 0.8)))
            if self.cloud.world.now() > self._until:
                return
            name, act = self.chance.choice(self._choices())
            self.cloud.world.note("", "EVENT", name)
            act()

    # --- what may happen ---

    def _choices(self) -> list[tuple[str, Callable[[], None]]]:
        cloud, chance = self.cloud, self.chance
        host = self._busy_host()
        other = chance.choice([h for h in cloud.compute if h != host])
        party = chance.choice((f"host/{other}", ORCHESTRATOR))
        one, two = chance.sample((f"host/{host}", party), 2)
        seconds = chance.choice((1.0, 4.0, 12.0, 25.0))
        return [
            (f"{host} without power for {seconds}", lambda: self._power(host, seconds)),
            (f"{host} cut off for {seconds}", lambda: self._cut_off(host, seconds)),
            (f"{one} does not reach {two} for {seconds}", lambda: self._one_way(one, two, seconds)),
            (f"{host} and {party} parted for {seconds}", lambda: self._part(f"host/{host}", party, seconds)),
            (f"agent of {host} frozen for {seconds}", lambda: self._freeze(host, seconds)),
            (f"agent of {host} killed", lambda: cloud.agents[host].kill("event")),
            (f"supervisor of {host} dead for {seconds}", lambda: self._supervisor(host, seconds)),
            (f"{host} cut off, its supervisor dead for {seconds}", lambda: self._alone(host, seconds)),
            (f"{host} cut off, its agent frozen for {seconds}", lambda: self._mute(host, seconds)),
            ("orchestrator killed", lambda: cloud.orchestrator.kill("event")),
            (f"stream {host} {other} stalled for {seconds}", lambda: self._stall(host, other, seconds)),
            (f"stream {host} {other} cut", lambda: cloud.world.cut_streams(host, other)),
        ]

    def _busy_host(self) -> HostId:
        """Mostly one with a server on it, or one that a server comes to."""
        busy = [h for h in self.cloud.compute if self.cloud.world.hosts[h].vmms]
        return self.chance.choice(busy if busy and self.chance.random() < 0.8 else self.cloud.compute)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, act)

    def _power(self, host: HostId, seconds: float) -> None:
        if self.cloud.world.hosts[host].powered:
            self.cloud.world.power_off(host)
            self.cloud.agents[host].kill("no power")
            self._later(seconds, lambda: self._power_back(host))

    def _power_back(self, host: HostId) -> None:
        if not self.cloud.world.hosts[host].powered:
            self.cloud.world.power_on(host)

    def _cut_off(self, host: HostId, seconds: float) -> None:
        others = [f"host/{h}" for h in self.cloud.agents if h != host] + [ORCHESTRATOR]
        for other in others:
            self._part(f"host/{host}", other, seconds)
        for other in self.cloud.compute:
            if other != host:
                self._stall(host, other, seconds)

    def _part(self, one: str, other: str, seconds: float) -> None:
        self.cloud.network.partition(one, other)
        self._later(seconds, lambda: self.cloud.network.heal(one, other))

    def _one_way(self, sender: str, receiver: str, seconds: float) -> None:
        self.cloud.network.cut(sender, receiver)
        self._later(seconds, lambda: self.cloud.network.heal(sender, receiver))

    def _freeze(self, host: HostId, seconds: float) -> None:
        agent = self.cloud.agents[host]
        agent.freeze()
        self._later(seconds, agent.thaw)

    def _supervisor(self, host: HostId, seconds: float) -> None:
        world = self.cloud.world
        world.kill_supervisor(host)
        world.hosts[host].keeper_up = self.plan.keepers
        self._later(seconds, lambda: world.start_supervisor(host))

    def _alone(self, host: HostId, seconds: float) -> None:
        self._cut_off(host, seconds)
        self._supervisor(host, seconds)

    def _mute(self, host: HostId, seconds: float) -> None:
        self._cut_off(host, seconds)
        self._freeze(host, seconds)

    def _stall(self, one: HostId, other: HostId, seconds: float) -> None:
        world = self.cloud.world
        world.stall_link(one, other, on=True)
        self._later(seconds, lambda: world.stall_link(one, other, on=False))

    def _calm(self) -> None:
        cloud = self.cloud
        cloud.world.note("", "faults end", "")
        self.troubles.calm()
        cloud.network.heal_all()
        for link in tuple(cloud.world.stalled_links):
            cloud.world.stall_link(*sorted(link), on=False)
        for host, agent in cloud.agents.items():
            agent.thaw()
            self._power_back(host)
            cloud.world.start_supervisor(host)

    # --- the verdict ---

    def run(self) -> "Storm":
        try:
            run_virtual(self.cloud.run(self.play), seed=self.plan.seed, limit_seconds=2000)
        except BaseExceptionGroup as group:
            self.problems += [str(e) or worded(e) for e in leaves(group)]
        except AssertionError as error:
            self.problems.append(str(error) or worded(error))
        self._judge()
        return self

    def _judge(self) -> None:
        cloud, world = self.cloud, self.cloud.world
        self.problems += [f"{v.kind}: {v.subject} {v.text} (at {v.at:.3f})" for v in world.violations]
        self.problems += cloud.problems
        for host, agent in cloud.agents.items():
            self.problems += [f"bug in the agent of {host}: {worded(b)}" for b in agent.bugs]
        self.problems += [f"bug in the orchestrator: {worded(b)}" for b in cloud.orchestrator.bugs]
        self.problems = list(dict.fromkeys(self.problems))
        self.restarts = sum(facts.boots - 1 for facts in world.servers.values())
        self.moves = sum("stream completed" in step.what for step in world.trace)
        self.trace = [str(step) for step in world.trace]


def simulate(plan: Plan) -> Storm:
    state = random.getstate()
    gc.disable()
    with database_in_the_loop(), tempfile.TemporaryDirectory(dir=memory()) as folder:
        storm = Storm(plan, Path(folder)).run()
    random.setstate(state)
    gc.enable()
    gc.collect()
    return storm


def main(which: str) -> int:
    """`7` plays one seed and prints its trace; `1..200` plays many and prints those that failed."""
    first, _, last = which.partition("..")
    seeds = range(int(first), int(last or first) + 1)
    failed = restarts = moves = 0
    for seed in seeds:
        storm = simulate(Plan.of(seed))
        restarts, moves = restarts + storm.restarts, moves + storm.moves
        if len(seeds) == 1:
            print("\n".join(storm.trace))
            print(storm.plan)
        if storm.problems:
            failed += 1
            events = [line for line in storm.trace if "EVENT" in line or "faults end" in line]
            print(f"seed {seed} failed: {storm.plan}")
            print("\n".join(f"    {line}" for line in (*storm.problems, *events)), flush=True)
    print(f"{len(seeds)} seeds, {failed} failed; {restarts} boots again, {moves} moves and replacements")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
