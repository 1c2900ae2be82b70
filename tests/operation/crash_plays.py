"""Plays: an operation of agents in the simulated world while something goes wrong, and what must hold then.

    hosts, their agents and an orchestrator come up -> `_go`: the operation, to its end -> `_judge`

`Play` is the frame; what is played is in modules of their own (`moving`, `relocating` and others). A `Strike`
names one moment of a play. Strikes are taken from the trace of a run in which nothing goes wrong (`moments`),
so that a step that is added to agents is struck too without anybody listing it.
"""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from nahtlos.model.ids import HostId, OperationId, ServerId
from nahtlos.model.inventory import OperationState, OperationStatus
from nahtlos.physical.sim.agents import AgentProcess, Dress
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import Cloudlet, Conductor
from nahtlos.physical.sim.faults import Act, Call, Moment, Scripted
from nahtlos.physical.sim.world import World
from nahtlos.wire.memory import Fate, Faults

EDGE = HostId("edge-1")
BOUND_SECONDS = 150.0
"""Virtual seconds within which everything must have come to rest after the operation was ordered."""
POLLED = (
    *("console_size", "dirty_rate", "frames_from", "migrate_in_flight", "migrate_progress"),
    *("observe", "reconcile", "release", "releases"),
)
"""Called again and again: the first few of a run stand for all."""
POLLS_STRUCK = 2


@dataclass(frozen=True)
class Strike:
    """One verb of one driver (or one write of a ledger), the n-th on its host since the operation was
    ordered."""

    host: str
    driver: str
    verb: str
    occurrence: int
    moment: Moment

    def __str__(self) -> str:
        return f"{self.moment} {self.driver}.{self.verb} #{self.occurrence} on {self.host}"


Event = Callable[[Any], None]
"""What may happen at a moment of the play that it is given."""


@dataclass
class Play:
    """`at` is struck with `act`, or `does` happens there; `faults` befall messages."""

    hosts: ClassVar[int] = 3
    """Beside the edge."""

    at: Strike | None = None
    act: Act = Act.PASS
    does: Event | None = None
    faults: Faults | None = None
    lasting: float = 0.0
    """Seconds for which the verb at `at` keeps failing once it was struck."""
    seed: int = 1
    dress: dict[HostId, Dress] = field(default_factory=dict[HostId, Dress])
    """What stands between an agent and the network: another release's way of speaking."""
    loss_excused: bool = False
    """Packets may be lost: what was struck is part of their path."""
    struck: bool = False
    status: OperationStatus | None = None
    seen: list[Strike] = field(default_factory=list[Strike])
    problems: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._since: dict[tuple[str, str, str], int] | None = None
        self._struck_at = 0.0
        self.cloudlet: Cloudlet
        self.conductor: Conductor
        self.agents: dict[HostId, AgentProcess] = {}

    # --- what a play says of itself ---

    def _conducted(self) -> Conductor:
        """Who stands for the orchestrator; servers are placed by it."""
        raise NotImplementedError

    async def _go(self) -> None:
        """The operation, until everything has come to rest. TimeoutError is a problem."""
        raise NotImplementedError

    def _judge(self) -> None:
        self.problems += complaints(self.world, self.agents)
        if self.status is not None and self.status.state is OperationState.STUCK:
            self.problems.append(f"stuck: {self.status.error}")

    # --- what may befall it ---

    @property
    def world(self) -> World:
        return self.cloudlet.world

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, act)

    def _when(self, call: Call, moment: Moment) -> Act:
        if self._since is None:
            return Act.PASS
        key = (call.host, call.driver, call.verb)
        first = self._since.setdefault(key, call.occurrence)
        strike = Strike(call.host, call.driver, call.verb, call.occurrence - first + 1, moment)
        self.seen.append(strike)
        if self.struck and self._still_failing(strike):
            return self.act
        if strike != self.at or self.struck:
            return Act.PASS
        self.struck = True
        self._struck_at = self.world.now()
        self.world.note("", "STRIKE", str(strike))
        if self.does:
            self.does(self)
        return self.act

    def _still_failing(self, strike: Strike) -> bool:
        at = self.at
        same = at is not None and (strike.host, strike.driver, strike.verb) == (at.host, at.driver, at.verb)
        return same and self.world.now() - self._struck_at < self.lasting

    # --- the play ---

    def play(self) -> Self:
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            run_virtual(self._play(Path(folder)), seed=self.seed, limit_seconds=10_000)
        return self

    async def _play(self, folder: Path) -> None:
        troubles = Scripted(self._when, self.seed)
        self.cloudlet = Cloudlet.build(
            folder, hosts=self.hosts, seed=self.seed, troubles=troubles, faults=self.faults
        )
        self.agents = agents_of(self.cloudlet, self.dress)
        self.conductor = self._conducted()
        self.problems += await conducted(self.conductor, self.agents, self._go)
        self._judge()

    async def _booted(self, *servers: ServerId) -> None:
        def up() -> bool:
            return all(self.world.facts(s).up for s in servers) and self.conductor.converged()

        await self.world.until(up, timeout=60, what="boot")

    def begin(self) -> None:
        """From here on moments are counted, and frames."""
        self._since = {}
        if isinstance(self.faults, StruckFrame):
            self.faults.armed = True

    async def _ends(self, operation: OperationId, coordinator: HostId) -> None:
        """Until the operation has; its status is kept."""
        ended = self.conductor.ended
        await self.world.until(
            lambda: (operation, coordinator) in ended, timeout=BOUND_SECONDS, what="the end"
        )
        self.status = ended[operation, coordinator]

    def story(self) -> str:
        """The trace since the operation was ordered, without what is asked all the time."""
        return "\n".join(
            str(step) for step in self.world.trace if step.call is None or step.call.verb not in POLLED
        )


# --- the frame, also of plays that chance directs -----------------------------------------------------


def memory() -> str | None:
    """A folder that no disk is behind, for what simulated hosts write."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def agents_of(cloudlet: Cloudlet, dress: Mapping[HostId, Dress] | None = None) -> dict[HostId, AgentProcess]:
    wearing = dress or {}
    return {
        spec.id: AgentProcess(
            cloudlet.world, cloudlet.network, cloudlet.settings(spec.id), dress=wearing.get(spec.id)
        )
        for spec in cloudlet.specs
    }


async def conducted(
    conductor: Conductor, agents: Mapping[HostId, AgentProcess], act: Callable[[], Awaitable[None]]
) -> list[str]:
    """`act` while orchestrator and agents run. Returns what was waited for in vain."""
    problems: list[str] = []
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(conductor.run())]
        running += [tasks.create_task(agent.run()) for agent in agents.values()]
        try:
            await act()
        except TimeoutError as error:
            problems.append(str(error))
        finally:
            for task in running:
                task.cancel()
    return problems


def complaints(world: World, agents: Mapping[HostId, AgentProcess]) -> list[str]:
    """What must never happen in any play, and has."""
    found = [f"{v.kind}: {v.subject}: {v.text} (at {v.at:.3f})" for v in world.violations]
    for host, agent in agents.items():
        found += [f"bug in the agent of {host}: {bug!r}" for bug in agent.bugs]
    return found


# --- moments -------------------------------------------------------------------------------------------


def moments(
    clean: Play,
    *,
    often: Iterable[str] = POLLED,
    counts: Callable[[Strike], bool] = lambda strike: strike.host != EDGE,
) -> Iterator[Strike]:
    """Every moment of a clean run, from the order to its end, that `counts`; of verbs that are called
    `often` the first few."""
    clean.play()
    assert not clean.problems, clean.problems
    seen: set[Strike] = set()
    for strike in clean.seen:
        late = strike.verb in often and strike.occurrence > POLLS_STRUCK
        if strike not in seen and not late and counts(strike):
            seen.add(strike)
            yield strike


class StruckFrame(Faults):
    """The n-th frame from `sender` to `receiver` since the operation was ordered meets `fate`."""

    def __init__(self, sender: str, receiver: str, number: int, fate: Fate) -> None:
        super().__init__(1, delay=(0.0001, 0.0008))
        self.armed = False
        self.count = 0
        self._of = (sender, receiver)
        self._number = number
        self._fate = fate

    def fate(self, sender: str, receiver: str) -> Fate:
        usual = super().fate(sender, receiver)
        if not self.armed or (sender, receiver) != self._of:
            return usual
        self.count += 1
        return self._fate if self.count == self._number else usual


# --- what comes out ------------------------------------------------------------------------------------


def failures(plays: Iterable[tuple[str, Play]]) -> list[str]:
    """Plays each; what went wrong, worded."""
    found: list[str] = []
    for name, each in plays:
        each.play()
        if each.problems:
            found.append(f"{name}: " + "; ".join(each.problems))
    return found


def failures_of_frames(
    of: Callable[[Faults], Play], lines: Iterable[tuple[str, str]], fate: Fate
) -> list[str]:
    """Each frame of a clean run on each of `lines` (sender, receiver) meets `fate`."""
    found: list[str] = []
    for sender, receiver in lines:
        counter = StruckFrame(sender, receiver, 0, Fate())
        clean = of(counter).play()
        assert not clean.problems, clean.problems
        found += failures(
            (f"{number}. from {sender} to {receiver}", of(StruckFrame(sender, receiver, number, fate)))
            for number in range(1, counter.count + 1)
        )
    return found


# --- what may happen at a moment -----------------------------------------------------------------------


def kill_agents(*hosts: HostId) -> Event:
    """kill -9; each is started again after a moment."""

    def does(play: Play) -> None:
        for host in hosts:
            play.later(0, lambda agent=play.agents[host]: agent.kill("struck"))

    return does


def hold_down(host: HostId, seconds: float) -> Event:
    """The agent is killed and does not come back for so long."""

    def does(play: Play) -> None:
        agent = play.agents[host]
        agent.held_down = True
        play.later(0, lambda: agent.kill("struck"))
        play.later(seconds, lambda: setattr(agent, "held_down", False))

    return does


def kill_orchestrator(play: Play) -> None:
    play.later(0, play.conductor.kill)


def lose_power(host: HostId, seconds: float = 5.0) -> Event:
    def does(play: Play) -> None:
        play.loss_excused = True
        play.world.power_off(host)
        play.later(0, lambda: play.agents[host].kill("power"))
        play.later(seconds, lambda: play.world.power_on(host))

    return does


def kill_storage(*hosts: HostId) -> Event:
    """kill -9 of their storage daemons."""

    def does(play: Play) -> None:
        for host in hosts:
            play.world.kill_storage(host)

    return does


def partition(one: str, other: str, seconds: float) -> Event:
    def does(play: Play) -> None:
        play.cloudlet.network.partition(one, other)
        play.later(seconds, lambda: play.cloudlet.network.heal(one, other))

    return does


def all_at_once(*events: Event) -> Event:
    def does(play: Play) -> None:
        for event in events:
            event(play)

    return does
