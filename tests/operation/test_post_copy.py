"""Moves by post-copy, by real agents in the simulated world: a server that touches its memory as fast as it
is sent is handed over, and the rest follows. Struck at every step: what its source still held may be lost by
that, and nothing else; it never runs twice, and whatever happened it runs in the end."""

import os

import msgspec
import pytest
from crash_plays import (
    POLLED,
    Event,
    Strike,
    StruckFrame,
    failures,
    hold_down,
    kill_agents,
    kill_orchestrator,
    lose_power,
    partition,
)
from moving import DESTINATION, SERVER, SOURCE, Run, cut_stream, kill_vmm, stall_stream

from nahtlos.model.inventory import OperationState
from nahtlos.model.prediction import Means
from nahtlos.physical.agent.precopy import NOT_CONVERGED
from nahtlos.physical.sim.cloudlet import server_spec
from nahtlos.physical.sim.faults import Act, Moment
from nahtlos.wire.memory import Fate, Faults

MIB = 1 << 20
FAST, LINK = 64 * MIB, 32 * MIB
POLLS_STRUCK = 2
THOROUGH = bool(os.environ.get("NAHTLOS_THOROUGH"))
A, B = f"host/{SOURCE}", f"host/{DESTINATION}"


def hard(
    *,
    ordered: bool = True,
    permitted: bool = True,
    budget: int = 0,
    at: Strike | None = None,
    act: Act = Act.PASS,
    does: Event | None = None,
    faults: Faults | None = None,
) -> Run:
    """The first pass over the link takes half a second, and so does what follows."""
    spec = msgspec.structs.replace(
        server_spec(1, guarded=True), allow_post_copy=permitted, blackout_budget_ms=budget
    )
    return Run(
        spec=spec,
        dirty_rate=FAST,
        bandwidth=LINK,
        post_copy=ordered,
        deadline=120.0,
        at=at,
        act=act,
        does=does,
        faults=faults,
    )


def steps() -> list[Strike]:
    """Of a run in which nothing goes wrong, from where it differs from a pre-copy; of what is asked again and
    again the first few."""
    clean = hard().play()
    assert not clean.problems, clean.problems
    found: dict[Strike, None] = {}
    handed_over = next(i for i, strike in enumerate(clean.seen) if strike.verb == "migrate_post_copy")
    for strike in clean.seen[handed_over:]:
        if strike.verb not in POLLED or strike.occurrence <= POLLS_STRUCK:
            found.setdefault(strike)
    return [strike for strike in found if strike.host in (SOURCE, DESTINATION)]


STEPS = steps()
AFTER = [s for s in STEPS if s.moment is Moment.AFTER]
SOME = AFTER if THOROUGH else AFTER[::7]


def test_ordered_it_is_handed_over_once_all_was_sent_once_and_no_packet_is_lost() -> None:
    run = hard(budget=5000).play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.status.result["means"] == Means.POST_COPY
    facts = run.world.facts(SERVER)
    assert facts.boots == 1
    assert facts.longest_blackout < 0.05
    times = run.status.times
    assert times["stopped"] - times["precopy"] < 1.0
    assert times["done"] - times["committed"] > 0.4, "its source was kept until all had followed"


def test_permitted_it_is_the_last_measure_of_a_move_that_does_not_end() -> None:
    run = hard(ordered=False).play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.status.result["means"] == Means.POST_COPY
    assert run.status.times["stopped"] - run.status.times["precopy"] > 5.0


@pytest.mark.parametrize(("permitted", "budget"), [(False, 0), (True, 100)])
def test_without_consent_or_beyond_its_budget_it_is_undone(permitted: bool, budget: int) -> None:
    run = hard(ordered=False, permitted=permitted, budget=budget).play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.UNDONE
    assert run.status.error is not None
    assert "--allow-post-copy" in run.status.error.remedy


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_to_be_compressed_follows_only_where_that_was_ordered(ordered: bool) -> None:
    run = hard(ordered=ordered)
    run.compressed = True
    run.play()
    assert not run.problems, run.problems
    assert run.status is not None
    if ordered:
        assert run.status.result["means"] == Means.POST_COPY
    else:
        assert run.status.error is not None
        assert run.status.error.field == NOT_CONVERGED


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
def test_a_host_that_cannot_is_named_before_anything_is_sent(host: str) -> None:
    def cannot(run: Run) -> None:
        run.world.hosts[SOURCE if host == SOURCE else DESTINATION].no_userfault = "no userfaultfd here"

    run = hard()
    run.prepared = cannot
    run.play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.UNDONE
    assert run.status.error is not None
    assert run.status.error.field == "post_copy"
    assert "no userfaultfd here" in run.status.error.message
    assert not any(s.verb == "migrate_start" for s in run.seen)


@pytest.mark.parametrize("act", [Act.UNAVAILABLE, Act.REFUSED, Act.CRASH])
def test_a_verb_fails_or_kills_its_agent(act: Act) -> None:
    struck = [s for s in STEPS if act is Act.CRASH or s.driver != "ledger"]
    found = failures((f"{act} {at}", hard(at=at, act=act)) for at in (struck if THOROUGH else struck[::4]))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(kill_agents(SOURCE), id="source-agent-killed"),
        pytest.param(kill_agents(DESTINATION), id="destination-agent-killed"),
        pytest.param(kill_agents(SOURCE, DESTINATION), id="both-agents-killed"),
        pytest.param(hold_down(SOURCE, 10.0), id="source-agent-down-for-10s"),
        pytest.param(kill_orchestrator, id="orchestrator-killed"),
        pytest.param(kill_vmm(SOURCE), id="source-vmm-killed"),
        pytest.param(kill_vmm(DESTINATION), id="destination-vmm-killed"),
        pytest.param(lose_power(SOURCE), id="source-host-without-power"),
        pytest.param(lose_power(DESTINATION), id="destination-host-without-power"),
        pytest.param(partition(A, B, 5.0), id="peers-parted-for-5s"),
        pytest.param(cut_stream, id="stream-cut"),
        pytest.param(stall_stream(8.0), id="stream-stalls-for-8s"),
        pytest.param(stall_stream(70.0), id="stream-stalls-for-70s"),
    ],
)
def test_something_happens_at_a_step(event: Event) -> None:
    found = failures((f"at {at}", hard(at=at, does=event)) for at in SOME)
    assert not found, "\n".join(found)


def test_a_stream_that_is_cut_is_taken_up_and_the_server_is_not_started_again() -> None:
    resumed = next(s for s in AFTER if s.verb == "resume" and s.host == DESTINATION)
    run = hard(at=resumed, does=cut_stream).play()
    assert not run.problems, run.problems
    assert run.status is not None
    assert run.status.state is OperationState.DONE
    assert run.world.facts(SERVER).boots == 1
    assert any(s.verb == "migrate_recover" for s in run.seen)


def test_a_source_that_is_lost_takes_the_server_with_it_which_is_started_again_where_it_is() -> None:
    resumed = next(s for s in AFTER if s.verb == "resume" and s.host == DESTINATION)
    run = hard(at=resumed, does=kill_vmm(SOURCE)).play()
    assert not run.problems, run.problems
    assert run.world.facts(SERVER).boots == 2
    assert [v.host for v in run.world.running(SERVER)] == [DESTINATION]


@pytest.mark.parametrize("does", [kill_vmm(SOURCE), lose_power(SOURCE), stall_stream(600.0)])
def test_what_it_needs_to_run_at_all_may_be_among_what_is_lost(does: Event) -> None:
    """Its VMM waits for a page as it is told to let it run, and answers nothing. That has an end."""
    arrived = next(s for s in AFTER if s.verb == "incoming_wait" and s.host == DESTINATION)
    run = hard(at=arrived, does=does).play()
    assert not run.problems, run.problems
    assert run.world.facts(SERVER).boots == 2
    assert [v.host for v in run.world.running(SERVER)] == [DESTINATION]


@pytest.mark.parametrize("fate", [Fate(copies=0), Fate(copies=0, breaks=True), Fate(copies=1, breaks=True)])
def test_a_message_meets_its_fate(fate: Fate) -> None:
    found: list[str] = []
    for sender, receiver in ((A, B), (B, A)):
        counter = StruckFrame(sender, receiver, 0, Fate())
        hard(faults=counter).play()
        last = range(max(1, counter.count - 11), counter.count + 1, 4)
        numbers = range(1, counter.count + 1) if THOROUGH else last
        found += failures(
            (f"{n}. from {sender}", hard(faults=StruckFrame(sender, receiver, n, fate))) for n in numbers
        )
    assert not found, "\n".join(found)
