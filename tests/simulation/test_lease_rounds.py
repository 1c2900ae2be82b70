"""Never two copies, whatever becomes of messages, links, agents, supervisors, orchestrators, power and
clocks: `lease_rounds` over seeds.

`NAHTLOS_THOROUGH=1` plays some thousands.
"""

import os

import pytest
from lease_rounds import Round

SEEDS = 4000 if os.environ.get("NAHTLOS_THOROUGH") else 80


def test_no_seed_runs_two_copies_and_many_restart() -> None:
    rounds = [Round(seed).play() for seed in range(SEEDS)]
    assert not [line for each in rounds for line in each.violations]
    assert sum(each.restarted_at is not None for each in rounds) > SEEDS / 4


def test_a_dead_supervisor_without_a_keeper_is_found_out() -> None:
    assert any(Round(seed, kept=False).play().violations for seed in range(60))


def test_whoever_does_not_wait_for_the_lease_to_run_out_is_found_out() -> None:
    assert any(Round(seed, impatient=True).play().violations for seed in range(60))


@pytest.mark.parametrize("seed", [201, 354, 420])
def test_a_host_that_is_told_that_it_is_denied_is_none_of_those_that_deny(seed: int) -> None:
    """In these its own promise was counted, and the lease it still held ran beside the other copy."""
    assert not Round(seed).play().violations
