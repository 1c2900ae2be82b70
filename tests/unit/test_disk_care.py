"""What is concluded from a VMM's connections alone."""

from nahtlos.physical.hypervisor.connections import Address
from nahtlos.physical.hypervisor.disk_care import UNSTEADY_LOOKS, Unsteady


def ends(*ports: int) -> frozenset[Address]:
    return frozenset(("10.0.0.1", port) for port in ports)


def test_a_connection_that_is_another_one_at_every_look_is_unsteady() -> None:
    unsteady = Unsteady()
    looks = [unsteady.seen(ends(port)) for port in range(UNSTEADY_LOOKS + 2)]
    assert looks == [False] * UNSTEADY_LOOKS + [True] * 2
    assert not unsteady.seen(ends(UNSTEADY_LOOKS + 1))


def test_a_daemon_that_was_started_again_or_a_further_volume_is_none() -> None:
    unsteady = Unsteady()
    looks = [
        unsteady.seen(each) for each in (ends(1), ends(2), ends(2, 3), ends(2, 3), ends(2, 4), ends(2, 4))
    ]
    assert not any(looks)


def test_one_that_is_gone_while_it_is_looked_for_has_changed_too() -> None:
    unsteady = Unsteady()
    assert [unsteady.seen(each) for each in (ends(1), ends(), ends(), ends(2))] == [False, False, False, True]
