"""A VMM's replacement in place under single faults: every verb fails or kills its agent, before and after its
effect; the agent, either VMM, the host end at every step. What must hold is in `moving.Run`, and: of the two
VMMs that share the server's memory none runs again after the other has."""

from collections.abc import Iterator

import pytest
from crash_plays import (
    BOUND_SECONDS,
    Event,
    Strike,
    failures,
    hold_down,
    kill_agents,
    kill_orchestrator,
    kill_storage,
    lose_power,
    moments,
)
from moving import SERVER, SOURCE, Run

from nahtlos.model.inventory import OperationState
from nahtlos.physical.ports import VmmId
from nahtlos.physical.sim.cloudlet import NEW
from nahtlos.physical.sim.faults import Act, Moment


class Replacing(Run):
    """The server's VMM goes from the old release to the new one, on the host where it is."""

    async def _go(self) -> None:
        world, conductor = self.world, self.conductor
        await self._booted(SERVER)
        self.begin()
        order = conductor.replace(SERVER, NEW)
        await world.until(
            lambda: conductor.replaced(order) is not None, timeout=BOUND_SECONDS, what="the end"
        )
        self.status = conductor.replaced(order)
        await world.until(conductor.converged, timeout=BOUND_SECONDS, what="convergence")
        await world.until(self._tidy, timeout=BOUND_SECONDS, what="exactly one running copy, nothing else")

    def _left_over(self) -> list[str]:
        here = self.world.hosts[SOURCE]
        spares = [f"spare queues of {port}" for port in here.board.spares]
        return [*super()._left_over(), *spares, *(name for name in here.fds if name.startswith("spare."))]

    def _place_wanted(self) -> tuple[str, int]:
        assert self.status is not None
        return SOURCE, 2 if self.status.state is OperationState.DONE else 1


def strikes() -> Iterator[Strike]:
    return moments(Replacing(), counts=lambda strike: strike.host == SOURCE)


STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER or s.driver == "ledger"]


def kill(epoch: int) -> Event:
    def does(run: Run) -> None:
        vmm = run.world.hosts[SOURCE].vmms.get(VmmId(SERVER, epoch))
        if vmm is not None and not vmm.ended:
            run.world.kill_vmm(vmm, "kill -9")

    return does


def test_undisturbed_the_release_changes_and_no_packet_is_lost() -> None:
    run = Replacing().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    (vmm,) = run.world.running(SERVER)
    assert (vmm.host, vmm.release, vmm.id.epoch) == (SOURCE, NEW, 2)
    steady = [f for f in run.world.paths.flows.values() if f.steady]
    assert steady[0].delivered > 20
    assert steady[0].reordered == 0
    assert run.world.facts(SERVER).boots == 1
    times = run.status.times
    assert times["running"] < times["answered"] < times["done"], "its guest talks, and was heard again"


def test_the_steps_of_a_clean_run_are_found() -> None:
    struck = {f"{s.driver}.{s.verb}" for s in STRIKES}
    assert struck >= {
        "network.replace_prepare",
        "network.replace_join",
        "network.replace_switch",
        "network.replace_leave",
        "network.replace_settle",
        "network.frames_from",
        "hypervisor.incoming_start",
        "hypervisor.replace_send",
        "hypervisor.pause",
        "ledger.take over",
        "hypervisor.resume",
        "hypervisor.kill",
    }


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_the_agent(act: Act) -> None:
    found = failures(
        (f"{act} {at}", Replacing(at=at, act=act))
        for at in STRIKES
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


def test_a_verb_keeps_failing_for_a_while() -> None:
    found = failures(
        (f"for 5 s {at}", Replacing(at=at, act=Act.UNAVAILABLE, lasting=5.0))
        for at in STRIKES
        if at.driver != "ledger" and at.occurrence == 1
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(SOURCE), id="agent-killed"),
        pytest.param(hold_down(SOURCE, 10.0), id="agent-down-for-10s"),
        pytest.param(kill_orchestrator, id="orchestrator-killed"),
        pytest.param(kill(1), id="old-vmm-killed"),
        pytest.param(kill(2), id="new-vmm-killed"),
        pytest.param(lose_power(SOURCE), id="host-without-power"),
        pytest.param(kill_storage(SOURCE), id="storage-daemon-killed"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", Replacing(at=at, does=event)) for at in STEPS)
    assert not found, "\n".join(found)
