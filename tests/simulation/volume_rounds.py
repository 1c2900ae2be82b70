"""Volumes that go from host to host while their servers write and move; a seed decides what goes wrong.

    calm: servers up -> faults begin -> relocations and moves at random, one after another for each volume
    -> faults end -> everything comes to rest, and everything acknowledged is there

Replay one seed with its trace:  python tests/simulation/volume_rounds.py SEED
"""

import asyncio
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from crash_plays import EDGE, agents_of, complaints, conducted, memory
from relocating import VolumeConductor

from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.agents import AgentProcess
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import Cloudlet, server_spec
from nahtlos.physical.sim.faults import Seeded
from nahtlos.physical.sim.volumes import hosts_with
from nahtlos.wire.memory import Faults
from nahtlos.wire.volumes import RelocateOrder

HOSTS = (HostId("host-1"), HostId("host-2"), HostId("host-3"))
BOUND_SECONDS = 400.0


@dataclass
class Rounds:
    seed: int
    servers: int = 2
    seconds: float = 12.0
    """During which things go wrong."""
    problems: list[str] = field(default_factory=list[str])
    relocated: int = 0
    undone: int = 0
    moved: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(f"volumes {self.seed}")
        level = self.chance.choice((0.3, 1.0, 2.0))
        self.troubles = Seeded(self.seed)
        self._levels = {
            "failing": 0.01 * level,
            "refusing": 0.002 * level,
            "crashing": 0.002 * level,
            "slow": 0.01 * level,
        }
        self._drop = 0.002 * level
        self.faults = Faults(self.seed, delay=(0.0001, 0.0008))
        self.cloudlet: Cloudlet
        self.conductor: VolumeConductor
        self.agents: dict[HostId, AgentProcess] = {}
        self._relocations: list[RelocateOrder] = []

    def play(self) -> "Rounds":
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            run_virtual(self._play(Path(folder)), seed=self.seed, limit_seconds=10_000)
        return self

    @property
    def names(self) -> list[ServerId]:
        return [ServerId(f"web-{n + 1}") for n in range(self.servers)]

    async def _play(self, folder: Path) -> None:
        self.cloudlet = Cloudlet.build(
            folder, hosts=3, seed=self.seed, troubles=self.troubles, faults=self.faults
        )
        self.conductor = VolumeConductor(self.cloudlet, storage_host=HOSTS[0])
        self.agents = agents_of(self.cloudlet)
        for number in range(self.servers):
            self.conductor.place(server_spec(number + 1), self.chance.choice(HOSTS))
        self.problems += await conducted(self.conductor, self.agents, self._go)
        self._judge()

    async def _go(self) -> None:
        world = self.cloudlet.world
        await world.until(self._up, timeout=120, what="boot")
        for name, value in self._levels.items():
            setattr(self.troubles, name, value)
        self.faults.drop = self._drop
        ends = world.now() + self.seconds
        while world.now() < ends:
            await asyncio.sleep(self.chance.expovariate(2.0))
            self.chance.choice((self._relocate, self._relocate, self._move, self._event))()
        self.troubles.calm()
        self.faults.drop = 0.0
        world.note("", "faults end", "")
        await world.until(self._at_rest, timeout=BOUND_SECONDS, what="an end of everything begun")
        before = dict(world.disks.acknowledged)
        await asyncio.sleep(0.5)
        for name in self.names:
            volume = VolumeId(f"{name}-v")
            world.disks.touch(volume)
            if world.disks.acknowledged[volume] <= before[volume]:
                self.problems.append(f"{name}'s writes are not taken any more")

    def _up(self) -> bool:
        world = self.cloudlet.world
        return all(world.facts(name).up for name in self.names) and self.conductor.converged()

    # --- what happens ---

    def _relocate(self) -> None:
        self.conductor.learn()
        name = self.chance.choice(self.names)
        volume = VolumeId(f"{name}-v")
        if any(order.volume.id == volume and self._runs(order) for order in self._relocations):
            return
        home, _ = self.conductor.home(volume)
        target = self.chance.choice([host for host in HOSTS if host != home])
        speed = self.chance.choice((0, 0, 100 << 20))
        self._relocations.append(self.conductor.relocate(name, target, bytes_per_second=speed))

    def _runs(self, order: RelocateOrder) -> bool:
        return (order.id, order.coordinator) not in self.conductor.ended

    def _move(self) -> None:
        name = self.chance.choice(self.names)
        moving = {
            order.server.spec.id for order in self.conductor.orders.values() if not self._over(order.id)
        }
        if name in moving:
            return
        place, _ = self.conductor.places[name]
        target = self.chance.choice([host for host in HOSTS if host != place])
        number = 1 + sum(order.server.spec.id == name for order in self.conductor.orders.values())
        self.conductor.move(name, target, number + 1000 * len(self.conductor.stale))

    def _over(self, operation: str) -> bool:
        order = next(o for o in self.conductor.orders.values() if o.id == operation)
        return self.conductor.over(order) is not None

    def _event(self) -> None:
        world, host = self.cloudlet.world, self.chance.choice(HOSTS)
        one, other = self.chance.sample(HOSTS, 2)
        seconds = self.chance.choice((0.5, 3.0, 8.0))
        network = self.cloudlet.network
        loop = asyncio.get_running_loop()

        def part() -> None:
            network.partition(f"host/{one}", f"host/{other}")
            loop.call_later(seconds, network.heal, f"host/{one}", f"host/{other}")

        def stall() -> None:
            world.stall_link(one, other, on=True)
            loop.call_later(seconds, lambda: world.stall_link(one, other, on=False))

        choices: list[tuple[str, Callable[[], None]]] = [
            (f"agent of {host} killed", lambda: self.agents[host].kill("event")),
            (f"daemon of {host} killed", lambda: world.kill_storage(host)),
            (f"daemon and agent of {host} killed", lambda: self._kill_both(host)),
            (f"{one} and {other} parted", part),
            (f"{one} and {other}: link stalled", stall),
            ("orchestrator killed", self.conductor.kill),
        ]
        name, act = self.chance.choice(choices)
        world.note("", "EVENT", name)
        act()

    def _kill_both(self, host: HostId) -> None:
        self.cloudlet.world.kill_storage(host)
        self.agents[host].kill("event")

    # --- the verdict ---

    def _at_rest(self) -> bool:
        world, conductor = self.cloudlet.world, self.conductor
        conductor.learn()
        return (
            not any(self._runs(order) for order in self._relocations)
            and all(self._over(operation) for operation in conductor.orders)
            and conductor.converged()
            and all(len(world.running(name)) == 1 for name in self.names)
        )

    def _judge(self) -> None:
        world, conductor = self.cloudlet.world, self.conductor
        self.problems += complaints(world, self.agents)
        for order in self._relocations:
            ended = conductor.ended.get((order.id, order.coordinator))
            self.relocated += ended is not None and ended.state is OperationState.DONE
            self.undone += ended is not None and ended.state is OperationState.UNDONE
            if ended is not None and ended.state is OperationState.STUCK:
                self.problems.append(f"stuck: {ended.error}")
        self.moved = sum(place[1] - 1 for place in conductor.places.values())
        for name in self.names:
            self._judge_volume(VolumeId(f"{name}-v"))

    def _judge_volume(self, volume: VolumeId) -> None:
        home, epoch = self.conductor.home(volume)
        held = hosts_with(self.cloudlet.world, volume)
        own = {host for host, copy in held.items() if not copy.received and copy.proxy is None}
        if own != {home}:
            self.problems.append(f"{volume} is at home at {sorted(own)}, told to be at {home}")
        passed_on = sorted(host for host, copy in held.items() if copy.proxy is not None)
        if passed_on:
            self.problems.append(f"{volume} is still passed on by {passed_on}")
        if held.get(home) is not None and held[home].spec.epoch != epoch:
            self.problems.append(f"{volume} is served by {held[home].spec.epoch}, not {epoch}")


if __name__ == "__main__":
    run = Rounds(int(sys.argv[1])).play()
    for step in run.cloudlet.world.trace:
        if step.call is None or step.call.verb not in (
            "observe",
            "releases",
            "relocate_progress",
            "snapshots",
        ):
            print(step)
    print(run.problems, run.relocated, run.undone, run.moved, EDGE)
