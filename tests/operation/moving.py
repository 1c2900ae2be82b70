"""One move of one server between two hosts, run in the simulated world with something going wrong.

`Run` is the play (see `crash_plays`): boot, move, converge, look.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from crash_plays import BOUND_SECONDS, Event, Play, Strike, StruckFrame, moments

from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.inventory import OperationState
from nahtlos.model.nouns import ServerSpec
from nahtlos.physical.ports import VmmId
from nahtlos.physical.sim.cloudlet import PRECOPY_DEADLINE, Conductor, server_spec
from nahtlos.physical.sim.faults import Act
from nahtlos.physical.sim.firewalls import LEFT_BEHIND
from nahtlos.physical.sim.guests import Vmm
from nahtlos.wire.memory import Fate

SOURCE, DESTINATION = HostId("host-1"), HostId("host-2")
SERVER = ServerId("web-1")
MAC = server_spec(1).ports[0].mac


@dataclass
class Run(Play):
    hosts: ClassVar[int] = 2

    guarded: bool = True
    """The server has security groups: what their firewall remembers must come along."""
    spec: ServerSpec | None = None
    """Instead of the usual one."""
    dirty_rate: int | None = None
    """Bytes of memory a second the server touches."""
    bandwidth: int = 4 << 30
    boost: int = 0
    post_copy: bool = False
    """It is ordered to end by post-copy."""
    compressed: bool = False
    deadline: float = PRECOPY_DEADLINE
    prepared: Callable[["Run"], None] | None = None
    """What is done to the world before anything runs in it."""

    def vmm(self, host: HostId) -> Vmm | None:
        epoch = 1 if host == SOURCE else 2
        vmm = self.world.hosts[host].vmms.get(VmmId(SERVER, epoch))
        return vmm if vmm and not vmm.ended else None

    # --- the play ---

    def _conducted(self) -> Conductor:
        conductor = Conductor(self.cloudlet, storage_host=SOURCE)
        if self.prepared:
            self.prepared(self)
        if self.dirty_rate is not None:
            self.world.dirty_rates[SERVER] = self.dirty_rate
        conductor.place(self.spec or server_spec(1, guarded=self.guarded), SOURCE)
        return conductor

    async def _go(self) -> None:
        world, conductor = self.world, self.conductor
        await self._booted(SERVER)
        self.begin()
        order = conductor.move(
            SERVER,
            DESTINATION,
            bandwidth=self.bandwidth,
            boost=self.boost,
            deadline=self.deadline,
            post_copy=self.post_copy,
            compressed=self.compressed,
        )
        bound = BOUND_SECONDS
        await world.until(
            lambda: conductor.over(order) is not None, timeout=bound, what="the end of the move"
        )
        self.status = conductor.over(order)
        await world.until(conductor.converged, timeout=bound, what="convergence")
        await world.until(self._tidy, timeout=bound, what="exactly one running copy and nothing left over")
        await asyncio.sleep(0.5)

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
        super()._judge()
        self.problems += self._left_over()
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


def strikes() -> Iterator[Strike]:
    """Every moment of a clean run, from the order to the end of the move."""
    return moments(Run())


def frames(sender: str, receiver: str, *, guarded: bool = True) -> int:
    """How many frames `sender` sends to `receiver` in a clean run."""
    counter = StruckFrame(sender, receiver, 0, Fate())
    clean = Run(faults=counter, guarded=guarded).play()
    assert not clean.problems, clean.problems
    return counter.count


# --- what may happen at a moment ---


def kill_vmm(host: HostId) -> Event:
    def does(run: Run) -> None:
        vmm = run.vmm(host)
        if vmm:
            run.world.kill_vmm(vmm, "struck")

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
