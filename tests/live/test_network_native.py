"""The native network driver on real namespaces and real packets: exact counts."""

import asyncio
import fcntl
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from network_namespaces import Cloud, Guest, Tally, internet_checksum, missing_programs

from nahtlos.lab import topology
from nahtlos.model.errors import Conflict, Unavailable
from nahtlos.physical.network.device_names import anycast_mac
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


async def until(what: str, true: Callable[[], bool], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def opened(cloud: Cloud, *numbers: int) -> list[Guest]:
    guests = [cloud.guest(number, A if number % 2 == 0 else B) for number in numbers]
    await cloud.reconcile_all()
    for guest in guests:
        await cloud.boot(guest)
    assert await cloud.reconcile_all() == {A: (), B: (), EDGE: ()}, "what verbs did is no drift"
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
    for number in range(1000, 1020):
        os.write(cloud.fd(here, A), here.frame_to(there.mac, there.ip, number))
    await until("from the other host", lambda: 1019 in there.received)
    assert Tally(sender.sent, [n for n in there.received if n < 1000]).lost == []


async def test_handover_under_load_loses_and_doubles_nothing(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    began = time.monotonic()
    sender = cloud.sender(guest)
    for to, source in ((B, A), (A, B)):
        await asyncio.sleep(0.2)
        await moved(cloud, guest, to, hold=0.2)
        assert (await cloud.hosts[source].call(lambda d: d.observe())).reflecting == (guest.port,)
        assert await cloud.reconcile(to) == ()
        assert await cloud.reconcile(source) == ()
        assert await cloud.reconcile(EDGE) == ()
        cloud.reflect[source].clear()
        assert await cloud.reconcile(source) == ()
        assert (await cloud.hosts[source].call(lambda d: d.observe())).reflecting == ()
    await asyncio.sleep(0.1)
    sent, seconds = sender.stop(), time.monotonic() - began
    await asyncio.sleep(0.2)
    tally = Tally(sent, guest.received)
    assert sent / seconds > 1000, "the load that the promise is about"
    assert (tally.lost, tally.duplicated, tally.reordered) == ([], [], 0)


async def test_an_abort_after_the_switch_loses_nothing(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    sender = cloud.sender(guest)
    await asyncio.sleep(0.1)
    await cloud.begin_move(guest, B)
    waiting = Guest(99)
    waiting.wait_at(cloud.fd(guest, B))
    assert await cloud.hosts[B].call(lambda d: d.move_sacrifice(guest.port))
    await cloud.verb(B, guest, "move_switch", MoveRole.DESTINATION)
    await cloud.verb(A, guest, "move_switch", MoveRole.SOURCE)
    assert await cloud.hosts[A].call(lambda d: d.move_drain(guest.port, timeout=1.0))
    guest.stop()
    await asyncio.sleep(0.15)
    waiting.stop()

    assert await cloud.verb(A, guest, "move_revert", MoveRole.SOURCE) == 0
    guest.run_at(cloud.fd(guest, A))
    returned = await cloud.verb(B, guest, "move_revert", MoveRole.DESTINATION)
    assert returned is not None and returned > 100
    assert await cloud.verb(B, guest, "move_revert", MoveRole.DESTINATION) == 0, "repeating returns nothing"
    await cloud.hosts[B].call(lambda d: d.port_delete(guest.port))
    await asyncio.sleep(0.1)
    assert await cloud.reconcile_all() == {A: (), B: (), EDGE: ()}
    await asyncio.sleep(0.1)
    sent = sender.stop()
    await asyncio.sleep(0.2)
    tally = Tally(sent, guest.received)
    assert (tally.lost, tally.duplicated) == ([], [])


async def test_a_restarted_agent_carries_a_move_on(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    sender = cloud.sender(guest)
    await asyncio.sleep(0.1)
    await cloud.begin_move(guest, B)
    cloud.hosts[B].restart_agent()
    waiting = Guest(99)
    waiting.wait_at(cloud.fd(guest, B))
    assert await cloud.hosts[B].call(lambda d: d.move_sacrifice(guest.port))
    waiting.stop()
    cloud.hosts[A].restart_agent()
    pinned = guest.port
    assert await cloud.reconcile(A, pinned) == ()
    assert await cloud.reconcile(B, pinned) == ()
    await cloud.verb(B, guest, "move_switch", MoveRole.DESTINATION)
    await cloud.verb(A, guest, "move_switch", MoveRole.SOURCE)
    cloud.hosts[A].restart_agent()
    cloud.hosts[B].restart_agent()
    assert await cloud.reconcile(A, pinned) == (), "left alone while it moves"
    assert await cloud.reconcile(B, pinned) == ()
    assert await cloud.hosts[A].call(lambda d: d.move_drain(guest.port, timeout=1.0))
    guest.run_at(cloud.fd(guest, B))
    for _ in range(2):
        await cloud.verb(B, guest, "move_settle", MoveRole.DESTINATION)
        await cloud.verb(A, guest, "move_settle", MoveRole.SOURCE)
    await asyncio.sleep(0.1)
    sent = sender.stop()
    await asyncio.sleep(0.2)
    tally = Tally(sent, guest.received)
    assert (tally.lost, tally.duplicated) == ([], [])


async def test_draining_waits_for_the_last_frame_and_says_if_it_does_not_come(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    driver = cloud.hosts[A]
    assert await driver.call(lambda d: d.move_drain(guest.port, timeout=0.2))
    guest.stop()
    sender = cloud.sender(guest, 0.001)
    await asyncio.sleep(0.05)
    sent = sender.stop()
    await asyncio.sleep(0.02)
    assert not await driver.call(lambda d: d.move_drain(guest.port, timeout=0.05))
    guest.run_at(cloud.fd(guest, A))
    assert await driver.call(lambda d: d.move_drain(guest.port, timeout=1.0))
    await asyncio.sleep(0.02)
    assert guest.received == list(range(sent))


async def test_a_stale_ring_is_emptied_and_not_delivered(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    port, network = cloud.port(guest), cloud.network
    await cloud.hosts[B].call(lambda d: d.port_create(port, network, deliver=False))
    await cloud.hosts[B].call(lambda d: d.move_sacrifice(guest.port))
    await cloud.hosts[B].call(lambda d: d.port_create(port, network, deliver=False))
    reader = Guest(99)
    reader.run_at(cloud.fd(guest, B))
    await asyncio.sleep(0.1)
    reader.stop()
    assert reader.others == []


async def test_repeats_write_nothing(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    port, network = cloud.port(guest), cloud.network
    for name, host in cloud.hosts.items():
        before = host.driver.writes
        assert await cloud.reconcile(name) == ()
        if name == A:
            await host.call(lambda d: d.port_create(port, network, deliver=True))
        assert host.driver.writes == before


async def test_a_new_place_is_no_drift(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    other = cloud.guest(12, B)
    assert await cloud.reconcile_all() == {A: (), B: (), EDGE: ()}
    del cloud.guests[other.port]
    assert await cloud.reconcile_all() == {A: (), B: (), EDGE: ()}
    assert other.mac not in cloud.hosts[A].command("bridge", "fdb")
    assert guest.mac in cloud.hosts[EDGE].command("bridge", "fdb")


@pytest.mark.parametrize(
    ("where", "command", "words"),
    [
        (EDGE, "ip link del br100", "bridge br100 was missing"),
        (A, "ip link del br100", "bridge br100 was missing"),
        (A, "ip link del vx100", "vxlan vx100 was missing"),
        (B, "ip link del gm100", "veth gm100 was missing"),
        (A, "bridge fdb del 52:54:00:4d:00:0a dev {tap} master", "forwarding of 52:54:00:4d:00:0a"),
        (EDGE, "bridge fdb del 52:54:00:4d:00:0a dev vx100 self", "tunnel entry for 52:54:00:4d:00:0a"),
        (A, "bridge link set dev vx100 learning on", "flooding settings of vx100"),
        (A, "bridge fdb add 52:54:00:4d:00:77 dev vx100 master static", "was not asked for"),
        (B, "nft flush ruleset", "packet filter"),
        (EDGE, "ip neigh del 10.77.0.10 dev br100", "neighbour 10.77.0.10"),
        (EDGE, "ip addr del 10.77.0.1/24 dev br100", "address 10.77.0.1/24"),
        (EDGE, "sysctl -qw net.ipv4.conf.out0.forwarding=0", "out0.forwarding"),
    ],
)
async def test_reconcile_repairs_what_was_broken_and_says_so(
    cloud: Cloud, where: str, command: str, words: str
) -> None:
    guest, _ = await opened(cloud, 10, 11)
    tap = next(name for name in cloud.hosts[A].links() if name.startswith("tp"))
    cloud.hosts[where].command(*command.format(tap=tap).split())
    found = await cloud.reconcile(where)
    assert any(words in text for text in found), found
    assert len(found) <= 3, found
    assert await cloud.reconcile(where) == ()
    sender = cloud.sender(guest, 0.005)
    await until("frames again", lambda: len(guest.received) > 10)
    sender.stop()


async def test_what_is_no_longer_desired_goes_and_what_is_foreign_stays(cloud: Cloud) -> None:
    host = cloud.hosts[A]
    host.command("ip", "link", "add", "br999", "type", "bridge")
    host.command("nft", "add", "table", "inet", "foreign")
    await opened(cloud, 11)
    await host.call(lambda d: d.reconcile(NetworkDesired(config=cloud.config(A, networks=False))))
    assert set(host.links()) == {"lo", "eth0", "br999"}
    assert "foreign" in host.command("nft", "list", "tables")
    assert await host.supervisor.units() == {}
    assert (await host.call(lambda d: d.observe())).networks == ()


async def test_a_foreign_device_in_the_way_is_named(cloud: Cloud) -> None:
    cloud.hosts[A].command("ip", "link", "add", "br100", "type", "bridge")
    with pytest.raises(Conflict, match="br100"):
        await cloud.reconcile(A)


async def test_servers_reach_no_service_of_their_host(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    host = cloud.hosts[A]
    with topology.within(host.node.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s:
        s.bind(("0.0.0.0", 9999))
        s.settimeout(0.3)
        bridge = host.links()["br100"].mac
        os.write(cloud.fd(guest, A), guest.frame_to(bridge, host.node.address, 1))
        with pytest.raises(TimeoutError):
            s.recv(100)


def discover(mac: str) -> bytes:
    hardware = bytes.fromhex(mac.replace(":", ""))
    message = struct.pack("!BBBBIHH16x16s192xI", 1, 1, 6, 0, 0x4E41, 0, 0x8000, hardware, 0x63825363)
    message += bytes((53, 1, 1, 55, 2, 3, 26, 255))
    message += bytes(300 - len(message))
    udp = struct.pack("!HHHH", 68, 67, 8 + len(message), 0) + message
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    header = header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:]
    return bytes(10) + b"\xff" * 6 + hardware + b"\x08\x00" + header + udp


def offers(frames: list[bytes]) -> list[tuple[str, str]]:
    """Address offered and server, of each DHCP answer."""
    answers = [f for f in frames if f[12:14] == b"\x08\x00" and f[23] == 17 and f[34:36] == b"\x00\x43"]
    return [(socket.inet_ntoa(f[58:62]), socket.inet_ntoa(f[26:30])) for f in answers]


async def test_dhcp_is_answered_once_and_by_the_own_host(cloud: Cloud) -> None:
    guest, other = await opened(cloud, 10, 11)
    for asking, host in ((guest, A), (other, B)):
        asking.others.clear()
        deadline = time.monotonic() + 5
        while not offers(asking.others):
            assert time.monotonic() < deadline, cloud.hosts[host].links().keys()
            os.write(cloud.fd(asking, host), discover(asking.mac))
            await asyncio.sleep(0.3)
        assert set(offers(asking.others)) == {(asking.ip, "10.77.0.2")}
    third = cloud.guest(12, A)
    await cloud.reconcile_all()
    await cloud.boot(third)
    await asyncio.sleep(0.2)
    os.write(cloud.fd(third, A), discover(third.mac))
    await until("an address for a server created later", lambda: bool(offers(third.others)))
    await asyncio.sleep(0.2)
    assert offers(third.others) == [(third.ip, "10.77.0.2")]


async def test_dhcp_comes_back_with_a_bridge_and_by_itself(cloud: Cloud) -> None:
    (guest,) = await opened(cloud, 10)
    host = cloud.hosts[A]

    async def answered() -> bool:
        guest.others.clear()
        for _ in range(10):
            os.write(cloud.fd(guest, A), discover(guest.mac))
            await asyncio.sleep(0.1)
            if offers(guest.others):
                return True
        return False

    assert await answered()
    host.command("ip", "link", "del", "br100")
    assert not await answered()
    await cloud.reconcile(A)
    assert await answered()
    host.supervisor.processes["dnsmasq.tenant"].kill()
    host.supervisor.processes["dnsmasq.tenant"].wait()
    assert await cloud.reconcile(A) == ("DHCP of network tenant was not served: started",)
    assert await answered()
    assert await cloud.reconcile(A) == ()


def arp_request(guest: Guest, ip: str) -> bytes:
    sender = bytes.fromhex(guest.mac.replace(":", ""))
    body = struct.pack(
        "!HHBBH6s4s6s4s",
        1,
        0x0800,
        6,
        4,
        1,
        sender,
        socket.inet_aton(guest.ip),
        bytes(6),
        socket.inet_aton(ip),
    )
    return bytes(10) + b"\xff" * 6 + sender + b"\x08\x06" + body + bytes(18)


def arp(frames: list[bytes], operation: int) -> list[tuple[str, str]]:
    """MAC and IP of each sender of an ARP request (1) or answer (2)."""
    found = [f for f in frames if f[12:14] == b"\x08\x06" and f[21] == operation]
    return [(f[22:28].hex(":"), socket.inet_ntoa(f[28:32])) for f in found]


async def test_arp_is_answered_at_once_on_the_own_host(cloud: Cloud) -> None:
    here, there, neighbour = await opened(cloud, 10, 11, 12)
    dhcp_mac = anycast_mac(100)
    expected = {there.ip: there.mac, "10.77.0.1": "02:00:00:4d:00:01", "10.77.0.2": dhcp_mac}
    for ip, mac in expected.items():
        here.others.clear()
        os.write(cloud.fd(here, A), arp_request(here, ip))
        await asyncio.sleep(0.1)
        assert arp(here.others, 2) == [(mac, ip)], "answered once"
    assert arp(there.others, 1) == [], "no server elsewhere was asked"
    os.write(cloud.fd(here, A), arp_request(here, neighbour.ip))
    await until("the neighbour on the same host is asked", lambda: len(arp(neighbour.others, 1)) > 0)
    assert arp(there.others, 1) == []


async def test_broadcasts_reach_servers_of_all_hosts_but_not_one_that_is_expected(cloud: Cloud) -> None:
    here, there = await opened(cloud, 10, 11)
    await cloud.begin_move(here, B)
    expected = Guest(99)
    expected.run_at(cloud.fd(here, B))
    os.write(
        cloud.fd(here, A),
        bytes(10) + b"\xff" * 6 + bytes.fromhex(here.mac.replace(":", "")) + b"\x88\xb6" + bytes(46),
    )
    await until("a broadcast", lambda: any(f[12:14] == b"\x88\xb6" for f in there.others))
    expected.stop()
    assert expected.others == []


async def test_an_uplink_that_is_not_there_is_named_and_the_rest_works(cloud: Cloud) -> None:
    edge = cloud.hosts[EDGE]
    edge.command("ip", "link", "set", "out0", "name", "other0")
    with pytest.raises(Unavailable, match="out0") as error:
        await cloud.reconcile(EDGE)
    assert error.value.field == "uplinks"
    assert "br100" in edge.links()


async def test_capital_letters_in_a_mac_are_no_difference(cloud: Cloud) -> None:
    guest = cloud.guest(10, A)
    guest.mac = guest.mac.upper()
    await cloud.reconcile_all()
    await cloud.boot(guest)
    await cloud.begin_move(guest, B)
    assert await cloud.reconcile(A, guest.port) == ()
    assert await cloud.reconcile_all() == {A: (), B: (), EDGE: ()}
    before = cloud.hosts[A].driver.writes
    assert await cloud.reconcile(A) == ()
    assert cloud.hosts[A].driver.writes == before


async def test_frames_with_a_longer_header_go_back_unharmed(cloud: Cloud) -> None:
    """A VMM may have asked for 12 bytes of virtio-net header instead of 10."""
    (guest,) = await opened(cloud, 10)
    await cloud.begin_move(guest, B)
    fcntl.ioctl(cloud.fd(guest, B), 0x400454D8, struct.pack("i", 12))
    await cloud.verb(B, guest, "move_switch", MoveRole.DESTINATION)
    await cloud.verb(A, guest, "move_switch", MoveRole.SOURCE)
    sender = cloud.sender(guest, 0.001)
    await asyncio.sleep(0.2)
    sent = sender.stop()
    await asyncio.sleep(0.05)
    await cloud.verb(A, guest, "move_revert", MoveRole.SOURCE)
    assert await cloud.verb(B, guest, "move_revert", MoveRole.DESTINATION) == sent
    await until("all of them", lambda: len(guest.received) == sent)
    assert guest.received == list(range(sent))


async def test_a_switch_takes_far_less_than_a_frame(cloud: Cloud) -> None:
    """Two flips on one host, the thread's hop included: nothing waits for a process."""
    (guest,) = await opened(cloud, 10)
    await cloud.begin_move(guest, B)
    port, network = cloud.port(guest), cloud.network

    async def timed() -> float:
        driver = cloud.hosts[A].driver
        began = time.perf_counter()
        await driver.move_switch(port, network, MoveRole.SOURCE)
        took = time.perf_counter() - began
        await driver.move_revert(port, network, MoveRole.SOURCE)
        return took

    times = [await cloud.hosts[A].call(lambda _: timed()) for _ in range(50)]
    assert sorted(times)[25] < 0.001


async def test_capabilities_say_what_is_used(cloud: Cloud) -> None:
    found = await cloud.hosts[A].call(lambda d: d.capabilities())
    assert found.lossless_move
    assert found.details["gate"].startswith("used")
    assert "nahtlos" not in cloud.hosts[A].command("nft", "list", "tables")
    await cloud.hosts[A].call(lambda d: d.host_init())
    await cloud.hosts[A].call(lambda d: d.host_init())


async def test_what_a_hosts_own_routers_listen_to_is_told_to_no_other_host(cloud: Cloud) -> None:
    """Reports of servers are, as a server may be a router for multicast."""
    here, there = await opened(cloud, 10, 11)

    def report(sender: str, marker: bytes) -> None:
        head = bytes.fromhex("333300000016" + sender.replace(":", "")) + b"\x86\xdd"
        source, all_routers = bytes.fromhex("fe80" + "00" * 14), bytes.fromhex("ff02" + "00" * 13 + "16")
        body = b"\x8f\0\0\0" + marker.ljust(24, b"\0")
        ip = struct.pack("!IHBB", 6 << 28, len(body), 58, 1) + source + all_routers
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sending:
            sending.bind(("vx100", 0))
            sending.send(head + ip + body)

    host = cloud.hosts[A].node.namespace
    for sender, marker in (("02:6e:72:00:00:07", b"a router"), (here.mac, b"a server")):
        topology.within(host, lambda s=sender, m=marker: report(s, m))
    await until("a server's", lambda: any(b"a server" in frame for frame in there.others))
    assert not any(b"a router" in frame for frame in there.others)
