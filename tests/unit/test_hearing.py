"""When a guest is heard again: its own frames count, not its VMM's, and only if it talks all the time."""

import asyncio
from collections.abc import Callable

import pytest

from nahtlos.model.blackout import HEARD_MS, woke_ms
from nahtlos.physical.agent.hearing import ANNOUNCED, WITHIN, first_heard
from nahtlos.physical.sim.clock import run_virtual

Speaks = Callable[[float], int]


def heard(speaks: Speaks, *, announced: bool = False) -> float | None:
    """Seconds after the start. `speaks`: frames sent so many seconds after it."""

    async def play() -> float | None:
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def frames() -> int:
            return 1000 + speaks(loop.time() - began)

        return await first_heard(frames, lambda: loop.time() - began, announced=announced)

    return run_virtual(play(), seed=1, limit_seconds=10)


def talks(since: float, each_second: int = 1000) -> Speaks:
    return lambda at: max(0, int((at - since) * each_second))


@pytest.mark.parametrize("since", [0.04, 0.3, 0.5])
def test_a_guest_that_talks_is_heard_when_it_begins_to(since: float) -> None:
    at = heard(talks(since))
    assert at is not None and since <= at <= since + 0.01


def test_what_its_vmm_announces_is_not_the_guest() -> None:
    def announces(at: float) -> int:
        return sum(when <= at for when in ANNOUNCED)

    assert heard(announces, announced=True) is None
    at = heard(lambda at: announces(at) + talks(0.3)(at), announced=True)
    assert at is not None and at >= 0.3


def test_of_a_guest_that_says_little_nothing_is_believed() -> None:
    assert heard(lambda at: int(at > 0.2)) is None
    assert heard(talks(0.1, each_second=20)) is None
    assert heard(lambda at: 0) is None
    assert heard(talks(WITHIN + 0.1)) is None


def test_what_hosts_do_not_see_is_added() -> None:
    assert woke_ms({"running": 10.0, "answered": 10.05}) == pytest.approx(50.0 + HEARD_MS)
    assert woke_ms({"running": 10.0}) is None
    assert woke_ms({"running": 10.0, "answered": 9.0}) is None, "clocks of two agents that differ"
