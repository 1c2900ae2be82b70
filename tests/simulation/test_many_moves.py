"""Many moves at once between three hosts, in all directions: of each host one at a time is switched, nobody
waits for ever, and no packet is lost. Then the same with agents killed again and again, and with a host whose
agent is of an older release and knows of no turns.
"""

import asyncio
import itertools
import os
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crash_plays import agents_of, conducted, memory
from older_release import before

from nahtlos.model.ids import HostId, OperationId, ServerId
from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.agents import AgentProcess, Dress
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import Cloudlet, Conductor, server_spec
from nahtlos.wire.messages import MoveOrder

SEEDS = int(os.environ.get("NAHTLOS_STORMS", "2"))
HOSTS = [HostId(f"host-{n}") for n in (1, 2, 3)]
SERVERS, ROUNDS = 6, 1
BOUND_SECONDS = 120.0
"""Virtual seconds for one round: all moves, and all attempts that kills made necessary."""
SWITCHED = 0.0005
"""Seconds by which two switches may seem to overlap: clocks are read before and after an act."""


@dataclass
class Crossing:
    """`seed` decides who goes where, and what is killed when."""

    seed: int
    killing: bool = False
    dirty_rate: int = 0
    dress: dict[HostId, Dress] = field(default_factory=dict[HostId, Dress])
    switches: dict[HostId, list[tuple[float, float, OperationId]]] = field(
        default_factory=lambda: {host: [] for host in HOSTS}
    )
    undone: int = 0
    kills: int = 0
    waited: set[str] = field(default_factory=set[str])
    problems: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._numbers = itertools.count(1)
        self.agents: dict[HostId, AgentProcess] = {}
        self.cloudlet: Cloudlet
        self.conductor: Conductor

    def play(self) -> "Crossing":
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            run_virtual(self._play(Path(folder)), seed=self.seed, limit_seconds=10_000)
        return self

    async def _play(self, folder: Path) -> None:
        self.cloudlet = cloudlet = Cloudlet.build(folder, hosts=len(HOSTS), seed=self.seed)
        self.conductor = Conductor(cloudlet, storage_host=HOSTS[0])
        self.agents = agents_of(cloudlet, self.dress)
        for number in range(1, 1 + SERVERS):
            self.conductor.place(server_spec(number), HOSTS[number % len(HOSTS)])
        self.problems += await conducted(self.conductor, self.agents, self._cross)
        self._judge()

    async def _cross(self) -> None:
        world, conductor = self.cloudlet.world, self.conductor
        up = [ServerId(f"web-{n}") for n in range(1, 1 + SERVERS)]
        await world.until(
            lambda: all(world.facts(s).up for s in up) and conductor.converged(), timeout=60, what="boot"
        )
        for vmm in (v for server in up for v in world.running(server)):
            vmm.dirty_rate = self.dirty_rate or vmm.dirty_rate
        for _ in range(ROUNDS):
            for server in up:
                others = [host for host in HOSTS if host != conductor.places[server][0]]
                self._order(server, self._random.choice(others))
            if self.killing:
                await self._kill_some()
            await world.until(self._all_over, timeout=BOUND_SECONDS, what="the end of all moves")
            await world.until(conductor.converged, timeout=BOUND_SECONDS, what="convergence")

    def _order(self, server: ServerId, to: HostId) -> None:
        self.conductor.move(server, to, next(self._numbers))

    async def _kill_some(self) -> None:
        for _ in range(6):
            await asyncio.sleep(self._random.uniform(0.02, 0.6))
            self.agents[self._random.choice(HOSTS)].kill("struck")
            self.kills += 1

    def _all_over(self) -> bool:
        """Those that were undone because an agent was killed are ordered again."""
        orders, over = dict(self.conductor.orders), self.conductor.over
        for report in self.conductor.reports.values():
            self.waited |= {o.waits_for for o in report.operations if "turn" in o.waits_for}
        for order in orders.values():
            status = over(order)
            if status is None:
                return False
            self._note(order)
            del self.conductor.orders[order.id]
            if status.state is OperationState.UNDONE:
                self.undone += 1
                self._order(order.server.spec.id, order.destination)
                return False
        return True

    def _note(self, order: MoveOrder) -> None:
        here = self.conductor.ended[order.id, order.source].times
        there = self.conductor.ended[order.id, order.destination].times
        if "switch" in here and "running" in there:
            for host in (order.source, order.destination):
                self.switches[host].append((here["switch"], there["running"], order.id))

    def _judge(self) -> None:
        world = self.cloudlet.world
        self.problems += [f"{v.kind}: {v.text} (at {v.at:.3f})" for v in world.violations]
        for host, agent in self.agents.items():
            self.problems += [f"bug in the agent of {host}: {b!r}" for b in agent.bugs]
        for server, (place, _) in self.conductor.places.items():
            found = [vmm.host for vmm in world.running(server)]
            if found != [place]:
                self.problems.append(f"{server} runs on {found}, should on {place}")
        if lost := world.packets_lost():
            self.problems.append(f"{lost} packets lost")

    def overlaps(self, host: HostId) -> list[str]:
        """Switches of one host that lay beside each other."""
        ordered = sorted(self.switches[host])
        pairs = itertools.pairwise(ordered)
        return [f"{a[2]} and {b[2]} on {host}" for a, b in pairs if b[0] < a[1] - SWITCHED]


def test_each_host_switches_one_at_a_time_and_nothing_is_lost() -> None:
    run = Crossing(1).play()
    assert run.problems == []
    assert run.undone == 0
    assert sum(len(found) for found in run.switches.values()) == 2 * SERVERS * ROUNDS
    assert [text for host in HOSTS for text in run.overlaps(host)] == []
    assert run.waited, "nobody ever waited: this shows nothing"


def test_who_writes_much_is_switched_in_its_turn_too() -> None:
    run = Crossing(2, dirty_rate=200 << 20).play()
    assert run.problems == []
    assert run.undone == 0
    assert [text for host in HOSTS for text in run.overlaps(host)] == []


@pytest.mark.parametrize("seed", range(1, 1 + SEEDS))
def test_no_turn_is_lost_with_an_agent_that_dies(seed: int) -> None:
    run = Crossing(seed, killing=True).play()
    assert run.problems == [], f"seed {seed}"
    assert run.kills == 6


def test_beside_an_agent_that_knows_of_no_turns() -> None:
    run = Crossing(3, dress={HOSTS[1]: before("MoveTurn", "MoveTurnBack")}).play()
    assert run.problems == []
    assert run.undone == 0
