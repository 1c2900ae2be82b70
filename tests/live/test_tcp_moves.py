"""TCP through moves behind a strict group, with real stacks: the short form of what `make bench-network`
measures. With LONG=1 one connection says nothing for more than a minute meanwhile."""

import os

import pytest
from benchmarks import network_tcp as tcp
from benchmarks.network_hosts import missing_programs

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
LONG = pytest.mark.skipif(not os.environ.get("LONG"), reason="takes more than a minute: LONG=1")
ALL = {"in", "out", "idle", "bulk"}


@pytest.mark.parametrize(
    ("moves", "pause", "silence"),
    [(3, 0.3, 1.0), pytest.param(10, 6.0, 60.0, marks=[LONG, pytest.mark.timeout(180)])],
)
async def test_all_connections_live_and_nothing_is_missing(moves: int, pause: float, silence: float) -> None:
    outcome = await tcp.through_moves(moves, pause, transfer=True)
    assert outcome.moves == moves
    assert {name for name, alive in outcome.alive.items() if alive} == ALL
    assert outcome.silence >= silence
    assert outcome.again <= outcome.counters["TCPDSACKRecvSegs"], "what was sent again had arrived before"
    assert outcome.counters["TCPTimeouts"] == 0


async def test_without_what_the_firewall_remembers_they_break() -> None:
    """The count can fail."""
    outcome = await tcp.through_moves(1, 0.3, transfer=False)
    assert {name for name, alive in outcome.alive.items() if alive} < ALL
