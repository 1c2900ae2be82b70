"""Networks that are one with an outside one, on real namespaces and real packets: an outside client behind a
switch that learns reaches a server wherever it is, and loses nothing while it moves."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from network_namespaces import PROBE_PORT, Guest, Sender, Tally, missing_programs
from outside_network import CLIENT_IP, CLIENT_MAC, INTERFACE, OutsideCloud, tags_seen

from nahtlos.lab import topology
from nahtlos.model.errors import Unavailable
from nahtlos.physical.network.device_names import anycast_mac
from nahtlos.physical.network.provider import announcement
from nahtlos.physical.ports import MoveRole, NetworkDesired

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
A, B = "host-1", "host-2"
VLAN = 205


@pytest.fixture(params=[0, VLAN], ids=["flat", "vlan"])
async def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OutsideCloud]:
    cloud = OutsideCloud(tmp_path, request.param)
    try:
        for host in cloud.compute:
            await cloud.hosts[host].call(lambda d: d.host_init())
        yield cloud
    finally:
        await asyncio.to_thread(cloud.close)


async def until(what: str, true: Callable[[], bool], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def booted(cloud: OutsideCloud, number: int, host: str) -> Guest:
    guest = cloud.guest(number, host)
    await cloud.reconcile_all()
    await cloud.boot(guest)
    assert set((await cloud.reconcile_all()).values()) == {()}, "what verbs did is no drift"
    cloud.knows(guest.ip, guest.mac)
    return guest


async def moved(cloud: OutsideCloud, guest: Guest, to: str, hold: float) -> None:
    source = cloud.places[guest.port]
    await cloud.begin_move(guest, to)
    waiting = Guest(99)
    waiting.wait_at(cloud.fd(guest, to))
    assert await cloud.hosts[to].call(lambda d: d.move_sacrifice(guest.port))
    waiting.stop()
    assert waiting.spoiled == [None]
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


async def settled(cloud: OutsideCloud) -> None:
    """All hosts are told the new places, then that nobody need pass anything on."""
    await cloud.reconcile_all()
    for reflected in cloud.reflect.values():
        reflected.clear()
    await cloud.reconcile_all()


@contextmanager
def sending(cloud: OutsideCloud, guest: Guest) -> Iterator["list[int]"]:
    """From the outside client at 1,250 a second; how many there were is in the list afterwards."""
    sender, sent = Sender(cloud.outside, guest.ip), list[int]()
    try:
        yield sent
    finally:
        sent.append(sender.stop())


async def test_a_client_outside_loses_nothing_while_a_server_moves_there_and_back(
    cloud: OutsideCloud,
) -> None:
    guest = await booted(cloud, 10, A)
    with sending(cloud, guest) as sent:
        await until("from outside", lambda: len(guest.received) > 50)
        for to in (B, A, B):
            await moved(cloud, guest, to, hold=0.2)
            await asyncio.sleep(0.05)
            assert cloud.learnt(guest.mac) == to, "told by us: the server itself has said nothing"
            await settled(cloud)
            await asyncio.sleep(0.1)
    await asyncio.sleep(0.2)
    tally = Tally(sent[0], guest.received)
    assert (tally.lost, tally.duplicated) == ([], [])
    assert tally.sent > 500


async def test_a_switch_that_is_told_nothing_goes_on_sending_to_the_old_host(
    cloud: OutsideCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count can fail: this is what announcements are for."""
    guest = await booted(cloud, 10, A)
    os.write(cloud.fd(guest, A), guest.frame_to(CLIENT_MAC, CLIENT_IP, 1))
    await until("learnt", lambda: cloud.learnt(guest.mac) == A)
    monkeypatch.setattr(announcement, "frames", lambda _: ())
    await moved(cloud, guest, B, hold=0.05)
    await settled(cloud)
    with sending(cloud, guest) as sent:
        await asyncio.sleep(0.2)
    assert cloud.learnt(guest.mac) == A
    assert guest.received == []
    assert sent[0] > 50


async def test_frames_are_on_the_wire_with_the_tag_and_no_other(cloud: OutsideCloud) -> None:
    guest = await booted(cloud, 10, A)
    with cloud.watched(A) as watching, sending(cloud, guest):
        await until("from outside", lambda: len(guest.received) > 50)
        for number in range(20):
            os.write(cloud.fd(guest, A), guest.frame_to(CLIENT_MAC, CLIENT_IP, number))
        assert tags_seen(watching, 0.3) == {cloud.vlan}


async def test_servers_of_two_hosts_and_the_outside_reach_each_other(cloud: OutsideCloud) -> None:
    here, there = await booted(cloud, 10, A), await booted(cloud, 11, B)

    def listen() -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.bind((CLIENT_IP, PROBE_PORT))
        found.settimeout(2)
        return found

    with topology.within(cloud.outside, listen) as outside:
        os.write(cloud.fd(here, A), here.frame_to(CLIENT_MAC, CLIENT_IP, 7))
        assert outside.recv(100)[-1] == 7
    for number in range(20):
        os.write(cloud.fd(here, A), here.frame_to(there.mac, there.ip, number))
    await until("from the other host", lambda: len(there.received) == 20)
    assert here.received == [], "nothing goes round"


async def test_a_broadcast_is_heard_once_by_everybody_and_goes_round_nowhere(cloud: OutsideCloud) -> None:
    here, there = await booted(cloud, 10, A), await booted(cloud, 11, B)
    frame = here.frame_to("ff:ff:ff:ff:ff:ff", "10.77.0.255", 1)
    for _ in range(5):
        os.write(cloud.fd(here, A), frame)
    await until("at the other host", lambda: len(there.received) >= 5)
    await asyncio.sleep(0.1)
    assert (len(there.received), len(here.received)) == (5, 0)


async def test_what_the_cloud_tells_its_servers_stays_inside(cloud: OutsideCloud) -> None:
    """Every host has the same service address and MAC: outside, they would be in several places at once."""
    await booted(cloud, 10, A)
    await booted(cloud, 11, B)
    with topology.within(cloud.outside, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asking:
        for _ in range(3):
            asking.sendto(b"x", ("10.77.0.2", 53))
            await asyncio.sleep(0.05)
    assert cloud.learnt(anycast_mac(100)) == ""


async def test_what_was_taken_away_by_hand_is_put_back(cloud: OutsideCloud) -> None:
    guest = await booted(cloud, 10, A)
    host = cloud.hosts[A]
    if cloud.vlan:
        host.command("tc", "qdisc", "del", "dev", INTERFACE, "clsact")
    else:
        host.command("ip", "link", "set", INTERFACE, "nomaster")
    assert await cloud.reconcile(A) != ()
    assert await cloud.reconcile(A) == ()
    with sending(cloud, guest):
        await until("from outside", lambda: len(guest.received) > 20)


async def test_the_interface_is_left_as_it_was_when_the_network_goes(cloud: OutsideCloud) -> None:
    await cloud.reconcile_all()
    host = cloud.hosts[A]
    empty = cloud.config(A, networks=False)
    await host.call(lambda d: d.reconcile(NetworkDesired(config=empty)))
    found = host.links()
    assert INTERFACE in found
    assert (found[INTERFACE].master, found[INTERFACE].alias) == (0, "")
    assert not {name for name in found if name.startswith(("pv", "pw", "br"))}
    if cloud.vlan:
        assert "nahtlos" not in host.command("tc", "filter", "show", "dev", INTERFACE, "ingress")


async def test_a_host_without_the_interface_takes_no_server(tmp_path: Path) -> None:
    cloud = OutsideCloud(tmp_path, without=(B,))
    try:
        guest = cloud.guest(10, B)
        assert (await cloud.reconcile_all())[B] == ()
        with pytest.raises(Unavailable, match="has no interface phys0") as refused:
            await cloud.boot(guest)
        assert refused.value.field == "provider"
        cloud.cable(B)
        await cloud.reconcile_all()
        await cloud.boot(guest)
    finally:
        await asyncio.to_thread(cloud.close)
