"""What of the processors is free, by the kernel's counters."""

from nahtlos.lab.processors import counters, free_share

STAT = """cpu  100 5 50 800 40 1 4 0 70 7
cpu0 50 2 25 400 20 1 2 0 35 3
intr 12345
"""


def test_time_of_guests_is_not_counted_twice() -> None:
    assert counters(STAT) == (100, 5, 50, 800, 40, 1, 4, 0)


def test_idle_and_waiting_for_disks_is_free() -> None:
    after = STAT.replace("cpu  100 5 50 800 40 1 4 0", "cpu  140 5 60 830 50 1 4 10")
    assert free_share(counters(STAT), counters(after)) == 0.4


def test_what_the_hypervisor_of_this_machine_took_is_not_free() -> None:
    after = STAT.replace("cpu  100 5 50 800 40 1 4 0", "cpu  100 5 50 800 40 1 4 100")
    assert free_share(counters(STAT), counters(after)) == 0.0


def test_no_time_has_passed() -> None:
    assert free_share(counters(STAT), counters(STAT)) == 0.0
