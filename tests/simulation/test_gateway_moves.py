"""A router's way out goes to another edge host, with an agent killed at every write of its ledger and around
every verb, drivers that fail, hosts parted, an orchestrator killed: nobody loses a connection or the way
out."""

import pytest
from crash_plays import Strike
from gateway_moving import DESTINATION, SOURCE, GatewayRun, strikes

from nahtlos.physical.sim.faults import Act
from nahtlos.wire.memory import Faults

SHARES = 4
GATEWAY_VERBS = ("gateway_prepare", "gateway_state_export", "gateway_state_import", "reconcile")


def moments(drivers: tuple[str, ...]) -> list[Strike]:
    return [s for s in strikes() if s.driver in drivers and s.verb != "release"]


def failures(act: Act, at: list[Strike]) -> list[str]:
    assert at, "nothing to strike"
    found: list[str] = []
    for strike in at:
        run = GatewayRun(at=strike, act=act).play()
        if run.problems or not run.struck:
            found.append(f"{act} {strike}: {'; '.join(run.problems) or 'was not struck'}")
    return found


def test_undisturbed_every_connection_is_known_at_the_new_place() -> None:
    run = GatewayRun().play()
    assert run.problems == []
    assert run.opened > 100
    words = [step.what for step in run.cloud.world.trace]
    assert words.count("way out passes on") == 1, "the old place led out what others still sent"


def test_a_drained_edge_host_gives_its_ways_out_away() -> None:
    assert GatewayRun(by_drain=True).play().problems == []


@pytest.mark.parametrize("share", range(SHARES))
def test_an_agent_killed_at_every_write_of_its_ledger(share: int) -> None:
    assert failures(Act.CRASH, moments(("ledger",))[share::SHARES]) == []


@pytest.mark.parametrize("share", range(2))
def test_an_agent_killed_around_every_verb(share: int) -> None:
    assert failures(Act.CRASH, moments(("network",))[share::2]) == []


def test_verbs_that_fail_before_or_after_their_effect() -> None:
    assert failures(Act.UNAVAILABLE, [s for s in moments(("network",)) if s.verb in GATEWAY_VERBS][::2]) == []


def orchestrator(run: GatewayRun) -> None:
    run.cloud.orchestrator.kill("struck")


def parted(run: GatewayRun) -> None:
    run.cloud.network.partition(f"host/{SOURCE}", f"host/{DESTINATION}")
    run.later(8.0, lambda: run.cloud.network.heal(f"host/{SOURCE}", f"host/{DESTINATION}"))


def both_agents(run: GatewayRun) -> None:
    for host in (SOURCE, DESTINATION):
        run.later(0.0, lambda host=host: run.cloud.agents[host].kill("struck"))


@pytest.mark.parametrize("does", [orchestrator, parted, both_agents])
def test_whatever_else_happens_in_the_middle(does: object) -> None:
    at = [s for s in moments(("ledger",)) if s.verb in ("prepared", "take", "committed")]
    found = []
    for strike in at[::2]:
        run = GatewayRun(at=strike, does=does).play()  # type: ignore[arg-type]
        found += [f"{strike}: {problem}" for problem in run.problems]
    assert found == []


def test_messages_late_doubled_and_lost() -> None:
    for seed in range(1, 4):
        faults = Faults(seed, delay=(0.0001, 0.002), drop=0.01, duplicate=0.05, late=0.05)
        assert GatewayRun(faults=faults, seed=seed).play().problems == []
