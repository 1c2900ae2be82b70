"""Upgrades of whole simulated clouds under seeded faults: lost, late and doubled messages, partitions, broken
lines, killed processes (also between any two journal writes), failing drivers, stalled and cut streams, two
releases mixed.

What must hold is in `campaign.Campaign`: never two running copies, no reboot and no lost packet unless a VMM
was killed, epochs rise, and once faults have ended the campaign ends, or says what a person must do.

`NAHTLOS_SEEDS` is how many seeds are played (default 60; 200 with NAHTLOS_THOROUGH), `NAHTLOS_FIRST_SEED` the
first of them.
"""

import os

import pytest
from campaign import Plan, replay_command, simulate, simulate_apart

from nahtlos.model.nouns import Component

SEEDS = int(os.environ.get("NAHTLOS_SEEDS", "200" if os.environ.get("NAHTLOS_THOROUGH") else "60"))
FIRST = int(os.environ.get("NAHTLOS_FIRST_SEED", "1"))


@pytest.mark.timeout(1600)
def test_campaigns_under_faults() -> None:
    results = simulate_apart(range(FIRST, FIRST + SEEDS), workers=os.cpu_count() or 1)
    failed = [output for code, output in results if code != 0]
    assert not failed, "\n".join(failed)


def test_the_same_seed_does_the_same_things() -> None:
    one, again = simulate(3), simulate(3)
    assert one.trace == again.trace
    assert len(one.trace) > 1000


def test_a_problem_names_its_seed_and_how_to_replay_it() -> None:
    assert replay_command(7).endswith("campaign.py 7")
    assert Plan.of(7) == Plan.of(7)


def test_undisturbed_no_move_fails_and_nothing_is_lost() -> None:
    seed = next(s for s in range(1, 100) if _calm(Plan.of(s)))
    verdict = simulate(seed)
    assert not verdict.problems
    assert not verdict.waits
    assert (verdict.failed_moves, verdict.lost) == (0, 0)
    assert verdict.moves >= Plan.of(seed).servers


def _calm(plan: Plan) -> bool:
    return _undisturbed(plan) and plan.component is Component.HYPERVISOR


def _undisturbed(plan: Plan) -> bool:
    return plan.events == 0 and plan.failing == plan.drop == plan.late == 0.0


@pytest.mark.parametrize("component", [Component.STORAGE, Component.NETWORK])
def test_what_is_replaced_under_servers_moves_none_and_each_host_once(component: Component) -> None:
    seed = next(s for s in range(1, 400) if _undisturbed(Plan.of(s)) and Plan.of(s).component is component)
    verdict = simulate(seed)
    assert not verdict.problems and not verdict.waits
    assert (verdict.moves, verdict.failed_moves, verdict.lost) == (0, 0, 0)
    word = "storage daemon replaced" if component is Component.STORAGE else "network functions replaced"
    hosts = Plan.of(seed).hosts + (component is Component.NETWORK)
    assert sum(word in line for line in verdict.trace) == hosts


def test_agents_of_two_releases_work_together() -> None:
    seed = next(s for s in range(1, 100) if _calm(Plan.of(s)) and Plan.of(s).mixed)
    verdict = simulate(seed)
    assert not verdict.problems
    assert verdict.failed_moves == 0
    assert verdict.moves >= Plan.of(seed).servers
