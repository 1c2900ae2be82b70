"""The native network driver on real namespaces and real packets: exact counts."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from network_namespaces import Cloud, Guest, Tally, missing_programs

from nahtlos.model.errors import Conflict
from nahtlos.physical.ports import MoveRole, NetworkDesired

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
A, B, EDGE = "host-1", "host-2", "edge-1"


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[Cloud]:
    cloud = Cloud(tmp_path)
    try:
        yield cloud
    finally:
        await asyncio.to_thread(cloud.close)


async def until(what: str, true: object, seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def opened(cloud: Cloud, *numbers: int) -> list[Guest]:
    guests = [cloud.guest(number, A if number % 2 == 0 else B) for number in numbers]
    await cloud.reconcile_all()
    for guest in guests:
        await cloud.boot(guest)
    return guests


async def moved(cloud: Cloud, guest: Guest, to: str, hold: float) -> None:
    """The proven recipe, with a reader in place of a VMM."""
    source = cloud.places[guest.port]
    await cloud.begin_move(guest, to)
    waiting = Guest(99)
    waiting.wait_at(cloud.fd(guest, to))
    assert await cloud.hosts[to].call(lambda d: d.move_sacrifice(guest.port))
    waiting.stop()
    assert waiting.spoiled == [None], "the frame that was taken is the one nobody misses"
    await cloud.verb(to, guest, "move_switch", MoveRole.DESTINATION)
    await cloud.verb(source, guest, "move_switch", MoveRole.SOURCE)
    assert await cloud.hosts[source].call(lambda d: d.move_drain(guest.port, timeout=1.0))
    guest.stop()
    await asyncio.sleep(hold)
    guest.run_at(cloud.fd(guest, to))
    await cloud.verb(to, guest, "move_settle", MoveRole.DESTINATION)
    await cloud.verb(source, guest, "move_settle", MoveRole.SOURCE)
    cloud.places[guest.port] = to
    cloud.reflect[source].add(guest.port)


async def test_outside_and_other_hosts_reach_a_server(cloud: Cloud) -> None:
    here, there = await opened(cloud, 10, 11)
    sender = cloud.sender(there, 0.005)
    await until("from outside", lambda: len(there.received) > 20)
    sender.stop()
    import os

    for number in range(1000, 1020):
        os.write(cloud.fd(here, A), here.frame_to(there.mac, there.ip, number))
    await until("from the other host", lambda: 1019 in there.received)
    assert Tally(sender.sent, [n for n in there.received if n < 1000]).lost == []


@pytest.mark.parametrize("hold", [0.2])
async def test_handover_under_load_loses_and_doubles_nothing(cloud: Cloud, hold: float) -> None:
    (guest,) = await opened(cloud, 10)
    sender = cloud.sender(guest)
    await asyncio.sleep(0.2)
    await moved(cloud, guest, B, hold)
    await asyncio.sleep(0.1)
    assert await cloud.reconcile(B) == ()
    assert await cloud.reconcile(A) == ()
    assert await cloud.reconcile(EDGE) == ()
    await asyncio.sleep(0.1)
    await moved(cloud, guest, A, hold)
    await asyncio.sleep(0.2)
    sent = sender.stop()
    await asyncio.sleep(0.2)
    tally = Tally(sent, guest.received)
    assert sent > 600
    assert (tally.lost, tally.duplicated, tally.reordered) == ([], [], 0)
