"""One move of one server between two hosts, run in the simulated world with something going wrong.

`Run` is the play: boot, move, converge, look. `Strike` names one moment of it, taken from the trace of a run
in which nothing went wrong, so that a step added to the agents is struck too without anybody listing it.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import OperationState, OperationStatus
from nahtlos.model.nouns import ServerSpec
from nahtlos.physical.ports import VmmId
from nahtlos.physical.sim.agents import AgentProcess, Dress
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import PRECOPY_DEADLINE, Cloudlet, Conductor, server_spec
from nahtlos.physical.sim.faults import Act, Call, Moment, Scripted
from nahtlos.physical.sim.firewalls import LEFT_BEHIND
from nahtlos.physical.sim.guests import Vmm
from nahtlos.physical.sim.world import World
from nahtlos.wire.memory import Fate, Faults

SOURCE, DESTINATION, EDGE = HostId("host-1"), HostId("host-2"), HostId("edge-1")
SERVER = ServerId("web-1")
MAC = server_spec(1).ports[0].mac
BOUND_SECONDS = 150.0
"""Virtual seconds within which everything must have come to rest after the move was ordered."""
POLLED = (
    *("console_size", "dirty_rate", "frames_from", "migrate_progress"),
    *("observe", "reconcile", "release", "releases"),
)
"""Called again and again: the first few of a run stand for all."""
POLLS_STRUCK = 2


@dataclass(frozen=True)
class Strike:
    """One verb of one driver (or one write of a ledger), the n-th on its host since the move was ordered."""

    host: str
    driver: str
    verb: str
    occurrence: int
    moment: Moment

    def __str__(self) -> str:
        return f"{self.moment} {self.driver}.{self.verb} #{self.occurrence} on {self.host}"


@dataclass
class Run:
    """`at` is struck with `act`, or `does` happens there; `faults` befall messages."""

    at: Strike | None = None
    act: Act = Act.PASS
    does: Callable[["Run"], None] | None = None
    faults: Faults | None = None
    lasting: float = 0.0
    """Seconds for which the verb at `at` keeps failing once it was struck."""
    seed: int = 1
    guarded: bool = True
    """The server has security groups: what their firewall remembers must come along."""
    spec: ServerSpec | None = None
    """Instead of the usual one."""
    dirty_rate: int | None = None
    """Bytes of memory a second the server touches."""
    bandwidth: int = 4 << 30
    boost: int = 0
    deadline: float = PRECOPY_DEADLINE
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
        self.agents: dict[str, AgentProcess] = {}

    # --- what may befall it ---

    @property
    def world(self) -> World:
        return self.cloudlet.world

    def vmm(self, host: HostId) -> Vmm | None:
        epoch = 1 if host == SOURCE else 2
        vmm = self.world.hosts[host].vmms.get(VmmId(SERVER, epoch))
        return vmm if vmm and not vmm.ended else None

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

    def play(self) -> "Run":
        with tempfile.TemporaryDirectory(dir=_memory()) as folder:
            run_virtual(self._play(Path(folder)), seed=self.seed, limit_seconds=10_000)
        return self

    async def _play(self, folder: Path) -> None:
        self.cloudlet = Cloudlet.build(
            folder, hosts=2, seed=self.seed, troubles=Scripted(self._when, self.seed), faults=self.faults
        )
        self.conductor = Conductor(self.cloudlet, storage_host=SOURCE)
        for spec in self.cloudlet.specs:
            process = AgentProcess(
                self.world,
                self.cloudlet.network,
                self.cloudlet.settings(spec.id),
                dress=self.dress.get(spec.id),
            )
            self.agents[spec.id] = process
        if self.dirty_rate is not None:
            self.world.dirty_rates[SERVER] = self.dirty_rate
        self.conductor.place(self.spec or server_spec(1, guarded=self.guarded), SOURCE)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self.conductor.run())]
            running += [tasks.create_task(a.run()) for a in self.agents.values()]
            try:
                await self._move()
            except TimeoutError as error:
                self.problems.append(str(error))
            finally:
                for task in running:
                    task.cancel()
        self._judge()

    async def _move(self) -> None:
        world, conductor = self.world, self.conductor
        await world.until(lambda: world.facts(SERVER).up and conductor.converged(), timeout=60, what="boot")
        self.begin()
        if isinstance(self.faults, StruckFrame):
            self.faults.armed = True
        order = conductor.move(
            SERVER, DESTINATION, bandwidth=self.bandwidth, boost=self.boost, deadline=self.deadline
        )
        bound = BOUND_SECONDS
        await world.until(
            lambda: conductor.over(order) is not None, timeout=bound, what="the end of the move"
        )
        self.status = conductor.over(order)
        await world.until(conductor.converged, timeout=bound, what="convergence")
        await world.until(self._tidy, timeout=bound, what="exactly one running copy and nothing left over")
        await asyncio.sleep(0.5)

    def begin(self) -> None:
        """From here on moments are counted."""
        self._since = {}

    def _tidy(self) -> bool:
        return not self._left_over()

    def _left_over(self) -> list[str]:
        found: list[str] = []
        running = self.world.running(SERVER)
        place = self.conductor.places[SERVER][0]
        if [v.host for v in running] != [place]:
            found.append(f"runs on {[v.host for v in running]}, should on {place}")
        for host in (SOURCE, DESTINATION):
            here = self.world.hosts[host]
            found += [f"{v.unit} on {host}" for v in here.vmms if not running or v != running[0].id]
            if host != place and here.board.taps:
                found.append(f"taps {sorted(here.board.taps)} on {host}")
            strangers = self.world.paths.firewalls.strangers(host, MAC)
            if host != place and strangers:
                found.append(f"connections {sorted(strangers)} remembered on {host}")
        return found

    # --- the verdict ---

    def _judge(self) -> None:
        world = self.world
        self.problems += [f"{v.kind}: {v.text} (at {v.at:.3f})" for v in world.violations]
        for host, agent in self.agents.items():
            self.problems += [f"bug in the agent of {host}: {b!r}" for b in agent.bugs]
        self.problems += self._left_over()
        if self.status is not None and self.status.state is OperationState.STUCK:
            self.problems.append(f"stuck: {self.status.error}")
        place, epoch = self.conductor.places[SERVER]
        status = self.status if not world.facts(SERVER).excuses else None
        if status is not None and (place, epoch) != self._place_wanted():
            self.problems.append(f"{status.state}, and it is on {place} by epoch {epoch}")
        if not world.facts(SERVER).excuses and not self.loss_excused:
            self._judge_packets()

    def _place_wanted(self) -> tuple[str, int]:
        """Where the server belongs as the operation ended, and by which epoch."""
        assert self.status is not None
        return (DESTINATION, 2) if self.status.state is OperationState.DONE else (SOURCE, 1)

    def _judge_packets(self) -> None:
        for flow in self.world.paths.flows.values():
            lost = {why: n for why, n in flow.lost.items() if why != LEFT_BEHIND or not self._untold}
            if lost:
                assert flow.lost_first is not None
                self.problems.append(f"from {flow.origin}: {lost} lost, first at {flow.lost_first[0]:.6f}")

    @property
    def _untold(self) -> bool:
        """An agent or a line may have died with the last that the old host's firewall had learned: a server
        that had arrived completely is then taken without its source's word."""
        return self.act is Act.CRASH or self.does is not None or self.faults is not None

    def story(self) -> str:
        """The trace since the move was ordered, without what is asked all the time."""
        return "\n".join(
            str(step) for step in self.world.trace if step.call is None or step.call.verb not in POLLED
        )


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


class StruckFrame(Faults):
    """The n-th frame from `sender` to `receiver` since the move was ordered meets `fate`."""

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


def strikes() -> Iterator[Strike]:
    """Every moment of a clean run, from the order to the end of the move."""
    clean = Run().play()
    assert not clean.problems, clean.problems
    seen: set[Strike] = set()
    for strike in clean.seen:
        often = strike.verb in POLLED and strike.occurrence > POLLS_STRUCK
        if strike not in seen and not often and strike.host != EDGE:
            seen.add(strike)
            yield strike


def frames(sender: str, receiver: str, *, guarded: bool = True) -> int:
    """How many frames `sender` sends to `receiver` in a clean run."""
    counter = StruckFrame(sender, receiver, 0, Fate())
    clean = Run(faults=counter, guarded=guarded).play()
    assert not clean.problems, clean.problems
    return counter.count


def failures(runs: Iterable[tuple[str, Run]]) -> list[str]:
    """Plays each; what went wrong, worded."""
    found: list[str] = []
    for name, run in runs:
        run.play()
        if run.problems:
            found.append(f"{name}: " + "; ".join(run.problems))
    return found


# --- what may happen at a moment ---

Event = Callable[[Run], None]


def kill_agents(*hosts: HostId) -> Event:
    """kill -9; each is started again after a moment."""

    def does(run: Run) -> None:
        for host in hosts:
            run.later(0, lambda agent=run.agents[host]: agent.kill("struck"))

    return does


def hold_down(host: HostId, seconds: float) -> Event:
    """The agent is killed and does not come back for so long."""

    def does(run: Run) -> None:
        agent = run.agents[host]
        agent.held_down = True
        run.later(0, lambda: agent.kill("struck"))
        run.later(seconds, lambda: setattr(agent, "held_down", False))

    return does


def kill_orchestrator(run: Run) -> None:
    run.later(0, run.conductor.kill)


def kill_vmm(host: HostId) -> Event:
    def does(run: Run) -> None:
        vmm = run.vmm(host)
        if vmm:
            run.world.kill_vmm(vmm, "struck")

    return does


def lose_power(host: HostId) -> Event:
    def does(run: Run) -> None:
        run.loss_excused = True
        run.world.power_off(host)
        run.later(0, lambda: run.agents[host].kill("power"))
        run.later(5.0, lambda: run.world.power_on(host))

    return does


def kill_storage(run: Run) -> None:
    run.world.kill_storage(SOURCE)


def partition(one: str, other: str, seconds: float) -> Event:
    def does(run: Run) -> None:
        run.cloudlet.network.partition(one, other)
        run.later(seconds, lambda: run.cloudlet.network.heal(one, other))

    return does


def break_lines(run: Run) -> None:
    run.cloudlet.network.break_channels(f"host/{SOURCE}", f"host/{DESTINATION}")


def stall_stream(seconds: float) -> Event:
    def does(run: Run) -> None:
        run.world.stall_link(SOURCE, DESTINATION, on=True)
        run.later(seconds, lambda: run.world.stall_link(SOURCE, DESTINATION, on=False))

    return does


def cut_stream(run: Run) -> None:
    run.world.cut_streams(SOURCE, DESTINATION)
