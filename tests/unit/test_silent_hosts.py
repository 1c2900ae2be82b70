"""Which hosts are silent while others are heard, and that an orchestrator that heard nobody blames none."""

from pathlib import Path

import pytest

from nahtlos.model.ids import HostId
from nahtlos.runtime.store.availability import DEAF_SECONDS, hear, read, silent_for
from nahtlos.runtime.store.store import Store

A, B, C = HostId("host-1"), HostId("host-2"), HostId("host-3")
LOST = 10.0


@pytest.mark.parametrize(
    ("received", "now", "hearing_since", "silent"),
    [
        ({A: 80.0, B: 99.0, C: 99.0}, 100.0, 0.0, {A}),
        ({A: 95.0, B: 99.0, C: 99.0}, 100.0, 0.0, set()),
        ({A: 80.0, B: 81.0, C: 82.0}, 100.0, 0.0, set()),  # nobody is heard
        ({A: 20.0, B: 21.0, C: 99.0}, 99.5, 99.0, set()),  # the first is back: the others get their time
        ({A: 20.0, B: 108.0, C: 108.0}, 108.5, 99.0, set()),
        ({A: 20.0, B: 110.0, C: 110.0}, 110.5, 99.0, {A}),
        ({}, 100.0, 0.0, set()),
    ],
)
def test_a_host_is_silent_if_others_were_heard_for_so_long(
    received: dict[HostId, float], now: float, hearing_since: float, silent: set[HostId]
) -> None:
    assert silent_for(LOST, received, now, hearing_since) == silent


async def test_hearing_begins_anew_after_nobody_was_heard(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "runtime.sqlite")
    heard: list[float] = []
    before: dict[HostId, float] = {}
    for host, at in ((A, 100.0), (B, 102.0), (A, 104.0), (B, 104.0 + DEAF_SECONDS + 0.1), (A, 111.0)):
        async with store.writing() as tx:
            await hear(tx, before, at)
            heard.append((await read(tx)).hearing_since)
        before[host] = at
    await store.close()
    assert heard == [100.0, 100.0, 100.0, 109.1, 109.1]
