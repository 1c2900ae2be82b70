"""When a host counts as failed, and that nothing but a proof makes it so."""

import math

import pytest

from nahtlos.model.availability import (
    Denial,
    DenialStatus,
    LeaseTerms,
    Off,
    Standing,
    cut_off,
    denial_seconds,
    lease_until,
)
from nahtlos.model.blueprint import HostPhase, HostPlan, Policy
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import HostInventory, Inventory
from nahtlos.model.nouns import HostRole, Size
from nahtlos.planner.failure import LEASE, proof

A, B, C, D, E = (HostId(f"host-{n}") for n in range(1, 6))
THREE = LeaseTerms(members=(A, B, C), seconds=20.0)
OTHERS = LeaseTerms(members=(A, D, E), seconds=20.0)
DENIAL = Denial(host=A, term=2, seconds=22.4)


def plan(lease: LeaseTerms | None, kept: LeaseTerms | None) -> HostPlan:
    return HostPlan(phase=HostPhase.SERVING, release=None, lease=lease, lease_kept=kept, denial=DENIAL)


def said(*, ripe: tuple[HostId, ...] = (), promised: tuple[HostId, ...] = (), term: int = 2) -> Inventory:
    hosts = {
        host: HostInventory(
            host=host,
            role=HostRole.COMPUTE,
            boot_id="",
            agent_version="",
            taken_at=0.0,
            generation=1,
            target_generation=1,
            capacity=Size(),
            standing=Standing(denials=(DenialStatus(host=A, term=term, ripe=host in ripe),)),
        )
        for host in (*ripe, *promised)
    }
    return Inventory(hosts=hosts, connected=frozenset(hosts))


def policy(*, off: bool = False) -> Policy:
    return Policy(hosts={}, intents={}, servers={}, off={A: Off(by="operator")} if off else {})


@pytest.mark.parametrize(
    ("told", "kept", "inventory", "off", "proven"),
    [
        (THREE, THREE, said(ripe=(B, C)), False, LEASE),
        (THREE, THREE, said(ripe=(B,), promised=(C,)), False, ""),
        (THREE, THREE, said(ripe=(B, C), term=1), False, ""),
        (THREE, THREE, said(ripe=(A, B)), False, ""),
        (THREE, THREE, said(promised=(A, B)), True, ""),
        (OTHERS, THREE, said(ripe=(B, C)), False, ""),
        (OTHERS, THREE, said(ripe=(B, C, D, E)), False, LEASE),
        (THREE, None, said(ripe=(B, C)), False, ""),
        (None, None, said(ripe=(B, C)), False, ""),
        (None, None, said(), True, "operator"),
        (THREE, THREE, said(promised=(B, C)), True, "operator"),
        (THREE, THREE, said(promised=(B,)), True, ""),
        (THREE, None, said(promised=(B,)), True, ""),
    ],
)
def test_a_host_is_fenced_by_a_proof_for_every_lease_it_may_keep(
    told: LeaseTerms | None, kept: LeaseTerms | None, inventory: Inventory, off: bool, proven: str
) -> None:
    assert proof(policy(off=off), inventory, A, plan(told, kept)) == proven


def test_a_lease_counts_from_the_asking_of_a_majority() -> None:
    assert lease_until(THREE, {}) == -math.inf
    assert lease_until(THREE, {B: 5.0}) == 25.0
    assert lease_until(THREE, {B: 5.0, C: 9.0, D: 99.0}) == 29.0
    five = LeaseTerms(members=(A, B, C, D, E), seconds=10.0)
    assert lease_until(five, {B: 5.0}) == -math.inf
    assert lease_until(five, {B: 5.0, C: 3.0, D: 1.0}) == 13.0


@pytest.mark.parametrize("members", range(3, 6))
def test_those_that_deny_and_those_that_grant_are_never_enough_both(members: int) -> None:
    hosts = (A, B, C, D, E)[:members]
    terms = LeaseTerms(members=hosts, seconds=10.0)
    for denying in range(members):
        granted = dict.fromkeys(hosts[1 + denying :], 1.0)
        holds = lease_until(terms, granted) != -math.inf
        assert holds != cut_off(terms, hosts[1 : 1 + denying])


def test_a_denial_outlasts_a_lease_whatever_the_rates_of_both_clocks() -> None:
    slow, fast = 0.99, 1.01
    assert denial_seconds((THREE,)) / fast >= THREE.seconds / slow + 2.0 - 1e-9
