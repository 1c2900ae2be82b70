"""A relocation under single faults: every verb of the three hosts fails or kills its agent, before and after
its effect; agents, daemons, hosts and lines are struck at every step; every message is lost, doubled, late.

What must hold is in `relocating.Relocating` and in the simulated world: no acknowledged write is ever missing
from what is read, never are there two homes, the operation ends, and the server's writes go on.
"""

import os
from collections.abc import Callable

import pytest
from crash_plays import (
    Event,
    Strike,
    all_at_once,
    failures,
    failures_of_frames,
    hold_down,
    kill_agents,
    kill_orchestrator,
    kill_storage,
    lose_power,
    partition,
)
from relocating import CLIENT, HOME, SERVER, TARGET, VOLUME, Relocating, VolumeConductor, strikes

from nahtlos.model.inventory import OperationState
from nahtlos.physical.sim.faults import Act, Moment
from nahtlos.wire.memory import Fate
from nahtlos.wire.messages import CancelOperation
from nahtlos.wire.volumes import SetCopySpeed

STRIKES = list(strikes())
STEPS = [s for s in STRIKES if s.moment is Moment.AFTER or s.driver == "ledger"]
THOROUGH = bool(os.environ.get("NAHTLOS_THOROUGH"))
SOME_STEPS = STEPS if THOROUGH else STEPS[::4]
A, B, C, ORCHESTRATOR = f"host/{HOME}", f"host/{TARGET}", f"host/{CLIENT}", "orchestrator"


def test_undisturbed_the_volume_goes_and_its_server_writes_on() -> None:
    run = Relocating().play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.world.facts(SERVER).boots == 1
    assert not run.left
    assert VOLUME not in run.world.hosts[HOME].volumes


def test_the_steps_of_a_clean_run_are_found() -> None:
    struck = {(s.host, f"{s.driver}.{s.verb}") for s in STRIKES}
    for verb in ("relocate_start", "relocate_progress", "relocate_complete", "relocate_finish"):
        assert (HOME, f"storage.{verb}") in struck
    assert (TARGET, "storage.receive") in struck
    assert (TARGET, "ledger.receive") in struck
    assert (TARGET, "ledger.keep") in struck
    assert (CLIENT, "ledger.adopt") in struck
    assert (CLIENT, "hypervisor.disks_reconcile") in struck
    assert (HOME, "ledger.pivot") in struck


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_its_agent(act: Act) -> None:
    found = failures(
        (f"{act} {at}", Relocating(at=at, act=act))
        for at in STRIKES
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


def test_a_verb_keeps_failing_for_a_while() -> None:
    found = failures(
        (f"for 5 s {at}", Relocating(at=at, act=Act.UNAVAILABLE, lasting=5.0))
        for at in STRIKES
        if at.driver != "ledger" and at.occurrence == 1
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(HOME), id="source-agent-killed"),
        pytest.param(kill_agents(TARGET), id="destination-agent-killed"),
        pytest.param(kill_agents(HOME, TARGET, CLIENT), id="all-agents-killed"),
        pytest.param(kill_orchestrator, id="orchestrator-killed"),
        pytest.param(kill_storage(HOME), id="source-daemon-killed"),
        pytest.param(kill_storage(TARGET), id="destination-daemon-killed"),
        pytest.param(kill_storage(HOME, TARGET), id="both-daemons-killed"),
        pytest.param(
            all_at_once(kill_storage(HOME, TARGET), kill_agents(HOME, TARGET)), id="daemons-and-agents-killed"
        ),
        pytest.param(partition(A, B, 5.0), id="peers-parted-for-5s"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", Relocating(at=at, does=event)) for at in STEPS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(hold_down(HOME, 30.0), id="source-agent-down-for-30s"),
        pytest.param(hold_down(TARGET, 30.0), id="destination-agent-down-for-30s"),
        pytest.param(hold_down(CLIENT, 30.0), id="client-agent-down-for-30s"),
        pytest.param(lose_power(HOME), id="source-host-without-power"),
        pytest.param(lose_power(TARGET), id="destination-host-without-power"),
        pytest.param(partition(A, C, 30.0), id="client-parted-for-30s"),
    ],
)
def test_something_lasts_long_from_a_step_on(event: Event) -> None:
    found = failures((f"at {at}", Relocating(at=at, does=event)) for at in SOME_STEPS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "fate",
    [
        pytest.param(Fate(copies=0), id="lost"),
        pytest.param(Fate(copies=2), id="doubled"),
        pytest.param(Fate(delay=2.0), id="late"),
        pytest.param(Fate(copies=1, breaks=True), id="line-breaks-after"),
    ],
)
def test_a_message_meets_its_fate(fate: Fate) -> None:
    lines = ((A, B), (B, A), (A, C), (C, A), (ORCHESTRATOR, A))
    found = failures_of_frames(lambda faults: Relocating(faults=faults), lines, fate)
    assert not found, "\n".join(found)


def at_every_moment(of: Callable[[float], Relocating], *, until: float = 0.8) -> list[str]:
    moments = [n * 0.02 for n in range(int(until / (0.02 if THOROUGH else 0.06)))]
    return failures((f"{moment:.2f} s", of(moment)) for moment in moments)


def test_the_server_moves_meanwhile() -> None:
    found = at_every_moment(lambda moment: Relocating(moves=moment))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.CRASH])
def test_the_server_moves_meanwhile_and_a_verb_fails(act: Act) -> None:
    steps = list(strikes(moves=0.3))
    found = failures(
        (f"{act} {at}", Relocating(at=at, act=act, moves=0.3))
        for at in (steps if THOROUGH else steps[::3])
        if act is Act.CRASH or at.driver != "ledger"
    )
    assert not found, "\n".join(found)


def told(message: CancelOperation | SetCopySpeed, seconds: float) -> Event:
    """The orchestrator says it to the coordinator so long after the order."""

    def does(run: Relocating) -> None:
        assert isinstance(run.conductor, VolumeConductor)
        run.later(seconds, lambda: run.conductor.say(HOME, message))

    return does


def first_step() -> Strike:
    return next(s for s in STRIKES if s.host == HOME and s.verb == "receive")


def test_cancelled_at_any_moment_it_is_where_it_was_or_where_it_goes() -> None:
    ends: set[OperationState] = set()
    cancel = CancelOperation(id=f"op-{VOLUME}-1-1")
    for moment in [n * 0.03 for n in range(20)]:
        run = Relocating(at=first_step(), does=told(cancel, moment)).play()
        assert not run.problems, (moment, run.problems)
        assert run.status is not None
        ends.add(run.status.state)
    assert ends == {OperationState.UNDONE, OperationState.DONE}


def test_the_speed_is_changed_while_it_runs() -> None:
    slow = Relocating(bytes_per_second=8 << 20)
    seconds = duration(slow)
    assert 19 < seconds < 23, seconds
    faster = SetCopySpeed(id=f"op-{VOLUME}-1-1", bytes_per_second=80 << 20)
    seconds = duration(Relocating(bytes_per_second=8 << 20, at=first_step(), does=told(faster, 2.0)))
    assert 3 < seconds < 6, seconds


def duration(run: Relocating) -> float:
    run.play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    return run.status.times["done"] - run.status.times["begin"]


def test_a_deadline_that_passes_undoes_it_and_says_why() -> None:
    run = Relocating(bytes_per_second=1 << 20, deadline=3.0).play()
    assert not run.problems
    assert run.status is not None
    assert run.status.state is OperationState.UNDONE
    assert run.status.error is not None
    assert "caught up" in run.status.error.message
