"""Routers, gateways and floating addresses on real namespaces and real packets."""

import asyncio
import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from network_namespaces import missing_programs
from routed_cloud import (
    CLIENT,
    EDGE,
    EDGE2,
    A,
    B,
    RoutedCloud,
    Server,
    floating,
    gateway,
    network,
    router,
)

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig
from nahtlos.model.ids import PortId, RouterId, ServerId
from nahtlos.model.networking import Route
from nahtlos.physical.network.routing import plan
from nahtlos.physical.ports import NetworkDesired

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
RED = network("red", 101, "10.1.0.0/24", v6="fd01::/64")
BLUE = network("blue", 102, "10.2.0.0/24", v6="fd02::/64")
SNAT, FLOATING, OTHER = "203.0.113.100", "203.0.113.150", "203.0.113.151"


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[RoutedCloud]:
    cloud = RoutedCloud(tmp_path)
    try:
        yield cloud
    finally:
        await cloud.close()


async def routed(cloud: RoutedCloud) -> tuple[Server, Server, Server]:
    """Red here and there, blue there; the way out at the first edge."""
    cloud.networks = [RED, BLUE]
    cloud.routers = [gateway(router("main", 7, [RED, BLUE]), EDGE, SNAT)]
    red = cloud.server("red-1", RED, A, "10.1.0.10", "fd01::10")
    blue = cloud.server("blue-1", BLUE, B, "10.2.0.10", "fd02::10")
    here = cloud.server("blue-2", BLUE, A, "10.2.0.11", "fd02::11")
    cloud.floating = [floating(FLOATING, blue)]
    await cloud.open()
    return red, blue, here


class Echo:
    """Answers TCP and UDP at port 7 of a namespace with what comes, and remembers from where."""

    def __init__(self, server: Server | None, cloud: RoutedCloud, ip: str) -> None:
        self.seen: list[str] = []
        self._stop = threading.Event()

        def make(kind: socket.SocketKind) -> socket.socket:
            sock = socket.socket(socket.AF_INET, kind)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((ip, 7))
            return sock

        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        if server is not None:
            self._tcp, self._udp = (server.within(lambda k=k: make(k)) for k in kinds)
        else:
            name = cloud.topology.client.namespace
            self._tcp, self._udp = (topology.within(name, lambda k=k: make(k)) for k in kinds)
        self._tcp.listen(50)
        self._threads = [threading.Thread(target=run) for run in (self._serve_udp, self._accept)]
        for thread in self._threads:
            thread.start()

    def _serve_udp(self) -> None:
        self._udp.settimeout(0.05)
        while not self._stop.is_set():
            try:
                data, sender = self._udp.recvfrom(2000)
            except TimeoutError:
                continue
            self.seen.append(sender[0])
            self._udp.sendto(data, sender)

    def _accept(self) -> None:
        self._tcp.settimeout(0.05)
        while not self._stop.is_set():
            try:
                peer, sender = self._tcp.accept()
            except TimeoutError:
                continue
            self.seen.append(sender[0])
            thread = threading.Thread(target=self._serve_tcp, args=(peer,))
            thread.start()
            self._threads.append(thread)

    def _serve_tcp(self, peer: socket.socket) -> None:
        with peer:
            peer.settimeout(0.05)
            while not self._stop.is_set():
                try:
                    data = peer.recv(4096)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not data:
                    return
                peer.sendall(data)

    def close(self) -> None:
        self._stop.set()
        for thread in list(self._threads):
            thread.join(5)
        self._tcp.close()
        self._udp.close()


def exchange(server: Server | None, cloud: RoutedCloud, to: str, kind: socket.SocketKind) -> str:
    """Whose answer comes to a question to port 7 of `to`: empty if none does."""

    def ask() -> str:
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.settimeout(1.0)
            try:
                sock.connect((to, 7))
                sock.send(b"question")
                return sock.getpeername()[0] if sock.recv(100) == b"question" else "garbled"
            except OSError:
                return ""

    if server is not None:
        return server.within(ask)
    return topology.within(cloud.topology.client.namespace, ask)


TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


def asks(frame: bytes) -> bool:
    """ARP, or a neighbour solicitation."""
    return frame[12:14] == b"\x08\x06" or (
        frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] == 135
    )


async def test_subnets_are_routed_on_the_senders_own_host(cloud: RoutedCloud) -> None:
    red, blue, here = await routed(cloud)
    for there in (blue, here):
        for ip in there.addresses:
            assert red.answered(ip), (ip, red.ping(ip))
        assert there.answered(red.addresses[0]) and there.answered(red.addresses[1])
    assert red.answered("10.1.0.1") and red.answered("10.2.0.1") and red.answered("fd01::1")
    expired = red.ping("10.2.0.10", "-t", "1")
    assert "From 10.1.0.1" in expired and "Time to live exceeded" in expired
    assert "From fd01::1" in red.ping("fd02::10", "-t", "1")
    assert "100% packet loss" in red.ping("fd09::1"), "it leads outside, where nobody has it"
    # One hop each way: the way back is routed where the other server is.
    assert "ttl=63" in red.ping("10.2.0.10")
    neighbours = red.command("ip", "neigh", "show")
    assert plan.router_mac(7) in neighbours


async def test_frames_for_a_router_never_reach_another_host(cloud: RoutedCloud) -> None:
    red, blue, here = await routed(cloud)
    assert red.answered(blue.ip)
    mac = plan.router_mac(7).replace(":", "")
    with topology.within(
        cloud.hosts[B].node.namespace,
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)),
    ) as tunnel:
        tunnel.bind(("vx101", 0))
        tunnel.settimeout(0.5)
        assert red.answered(here.ip) and red.answered(blue.ip)
        cloud.hosts[A].command("ip", "link", "del", "r7-101")
        assert not red.answered(here.ip)
        frames: list[bytes] = []
        try:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                frames.append(tunnel.recv(2000))
        except TimeoutError:
            pass
    assert not [f for f in frames if f[:6].hex() == mac], "to the common MAC"
    assert not [f for f in frames if f[6:12].hex() == mac and asks(f)], "it knows everybody"
    found = await cloud.reconcile(A)
    assert any("cable r7-101 was missing" in text for text in found), found
    assert await cloud.reconcile(A) == ()
    assert red.answered(blue.ip)


async def test_static_routes_lead_through_a_server(cloud: RoutedCloud) -> None:
    cloud.networks = [RED, BLUE]
    routes = (
        Route(destination="192.168.50.0/24", next_hop="10.2.0.10"),
        Route(destination="fd99::/64", next_hop="fd02::10"),
    )
    cloud.routers = [router("main", 7, [RED, BLUE], *routes)]
    red = cloud.server("red-1", RED, A, "10.1.0.10", "fd01::10")
    blue = cloud.server("blue-1", BLUE, B, "10.2.0.10", "fd02::10")
    blue.allowed = ("192.168.50.0/24", "fd99::/64")
    await cloud.open()
    for cidr in ("192.168.50.1/32", "fd99::1/128"):
        blue.command("ip", "addr", "add", cidr, "dev", "lo", *(["nodad"] if ":" in cidr else []))
        assert red.answered(cidr.split("/")[0])
    cloud.routers = [router("main", 7, [RED, BLUE])]
    assert await cloud.reconcile(A) == (), "asked for: no drift"
    assert not red.answered("192.168.50.1")


async def test_projects_with_the_same_subnets_never_see_each_other(cloud: RoutedCloud) -> None:
    other_red = network("red-b", 201, "10.1.0.0/24", project="b")
    other_blue = network("blue-b", 202, "10.2.0.0/24", project="b")
    cloud.networks = [RED, BLUE, other_red, other_blue]
    cloud.routers = [router("main", 7, [RED, BLUE]), router("other", 8, [other_red, other_blue])]
    red = cloud.server("red-1", RED, A, "10.1.0.10")
    blue = cloud.server("blue-1", BLUE, B, "10.2.0.10")
    red_b = cloud.server("red-b", other_red, A, "10.1.0.10")
    blue_b = cloud.server("blue-b", other_blue, B, "10.2.0.10")
    await cloud.open()
    echoes = [Echo(blue, cloud, blue.ip), Echo(blue_b, cloud, blue_b.ip)]
    try:
        for sender, count in ((red, 3), (red_b, 5)):
            for _ in range(count):
                assert exchange(sender, cloud, "10.2.0.10", UDP) == "10.2.0.10"
        assert [len(echo.seen) for echo in echoes] == [3, 5]
        alone = cloud.server("alone-b", other_red, A, "10.1.0.99")
        await cloud.open()
        assert alone.answered("10.2.0.10")
        assert not red.answered("10.1.0.99"), "there, but of another project"
    finally:
        for echo in echoes:
            echo.close()


async def test_floating_addresses_and_translation_side_by_side(cloud: RoutedCloud) -> None:
    red, blue, _ = await routed(cloud)
    outside, server, plain = Echo(None, cloud, CLIENT), Echo(blue, cloud, blue.ip), Echo(red, cloud, red.ip)
    try:
        for kind in (TCP, UDP):
            assert exchange(blue, cloud, CLIENT, kind) == CLIENT
            assert outside.seen.pop() == FLOATING, "a server with a floating address goes out as it"
            assert exchange(red, cloud, CLIENT, kind) == CLIENT
            assert outside.seen.pop() == SNAT, "one without as the router"
            assert exchange(None, cloud, FLOATING, kind) == FLOATING
            assert server.seen.pop() == CLIENT, "who comes from outside is seen as he is"
            assert exchange(red, cloud, FLOATING, kind) == FLOATING
            assert server.seen.pop() == SNAT, "between servers, by the outside"
            assert exchange(red, cloud, blue.ip, kind) == blue.ip
            assert server.seen.pop() == red.ip, "and untranslated inside"
        cloud.floating = [*cloud.floating, floating(OTHER, red)]
        assert await cloud.reconcile(EDGE) == ()
        for kind in (TCP, UDP):
            assert exchange(red, cloud, FLOATING, kind) == FLOATING
            assert server.seen.pop() == OTHER, "each sees the other's floating address"
            assert exchange(blue, cloud, OTHER, kind) == OTHER
            assert plain.seen.pop() == FLOATING
        assert "3 received" in cloud.outside("ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", OTHER)
        assert exchange(None, cloud, SNAT, TCP) == "", "nobody comes in by the router's own address"
        tracked = (
            cloud.command(EDGE, "gateway-7", "cat", "/proc/net/nf_conntrack")
            if Path("/proc/net/nf_conntrack").exists()
            else ""
        )
        assert FLOATING not in tracked
        cloud.floating = []
        assert await cloud.reconcile(EDGE) == ()
        cloud.outside("ip", "neigh", "flush", "dev", "lan")
        assert exchange(None, cloud, FLOATING, TCP) == ""
    finally:
        for echo in (outside, server, plain):
            echo.close()


class Stream:
    """Numbered lines over one TCP connection and numbered datagrams, at a steady rate, from behind SNAT."""

    def __init__(self, server: Server, to: str, interval: float = 0.001) -> None:
        def connected(kind: socket.SocketKind) -> socket.socket:
            sock = socket.socket(socket.AF_INET, kind)
            sock.settimeout(2.0)
            sock.connect((to, 7))
            return sock

        self.tcp, self.udp = (server.within(lambda k=k: connected(k)) for k in (TCP, UDP))
        self.interval = interval
        self.sent = 0
        self.received: set[int] = set()
        self.lines = 0
        self.longest = 0.0
        self.failed = ""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._send, self._receive, self._talk)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            with contextlib.suppress(OSError):
                self.udp.send(struct.pack("!Q", self.sent))
            self.sent += 1
            due += self.interval
            time.sleep(max(0.0, due - time.monotonic()))

    def _receive(self) -> None:
        self.udp.settimeout(0.5)
        while True:
            try:
                self.received.add(struct.unpack("!Q", self.udp.recv(100))[0])
            except TimeoutError:
                if self._stop.is_set():
                    return

    def _talk(self) -> None:
        self.tcp.settimeout(10.0)
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self.tcp.sendall(f"{self.lines:08d}".encode())
                answer = self.tcp.recv(8)
            except OSError as error:
                self.failed = repr(error)
                return
            if answer != f"{self.lines:08d}".encode():
                self.failed = f"{answer!r} to {self.lines}"
                return
            self.longest = max(self.longest, time.monotonic() - began)
            self.lines += 1
            time.sleep(0.002)

    def stop(self) -> list[int]:
        """Numbers of datagrams that nobody answered."""
        self._stop.set()
        for thread in self._threads:
            thread.join(15)
        self.tcp.close()
        self.udp.close()
        return sorted(set(range(self.sent)) - self.received)


async def test_the_place_of_translation_moves_under_a_connection(cloud: RoutedCloud) -> None:
    red, _, _ = await routed(cloud)
    outside = Echo(None, cloud, CLIENT)
    number, name = 7, RouterId("main")
    try:
        stream = Stream(red, CLIENT)
        idle = red.within(lambda: socket.create_connection((CLIENT, 7), timeout=2.0))
        await asyncio.sleep(0.3)
        for old, new in ((EDGE, EDGE2), (EDGE2, EDGE)):
            cloud.routers = [gateway(router("main", number, [RED, BLUE]), new, SNAT)]
            config = cloud.config(new)
            await cloud.hosts[new].call(lambda d, c=config: d.routing.gateway_prepare(c, name))
            await cloud.hosts[new].call(lambda d, c=config: d.routing.gateway_prepare(c, name))
            state = await cloud.hosts[old].call(lambda d: d.routing.gateway_state_export(number))
            taken = await cloud.hosts[new].call(lambda d, s=state: d.routing.gateway_state_import(number, s))
            assert taken >= 3
            await cloud.reconcile(new)
            await cloud.reconcile(A)
            await cloud.reconcile(B)
            await asyncio.sleep(0.2)
            state = await cloud.hosts[old].call(lambda d: d.routing.gateway_state_export(number))
            await cloud.hosts[new].call(lambda d, s=state: d.routing.gateway_state_import(number, s))
            await cloud.reconcile(old)
            assert not cloud.path(old, "gateway-7").exists()
            assert not any((await cloud.reconcile_all()).values())
            await asyncio.sleep(0.3)
        lost = stream.stop()
        assert stream.sent > 500 and stream.lines > 50
        assert stream.failed == ""
        assert lost == [], f"{len(lost)} of {stream.sent}"
        assert stream.longest < 1.0, "nothing had to be sent again after a timeout"
        with idle:
            idle.sendall(b"still")
            assert idle.recv(10) == b"still"
        assert set(outside.seen) == {SNAT}
    finally:
        outside.close()


async def test_without_its_state_a_connection_would_break(cloud: RoutedCloud) -> None:
    """What the test above shows is the transfer's doing."""
    red, _, _ = await routed(cloud)
    outside = Echo(None, cloud, CLIENT)
    try:
        held = red.within(lambda: socket.create_connection((CLIENT, 7), timeout=1.0))
        cloud.routers = [gateway(router("main", 7, [RED, BLUE]), EDGE2, SNAT)]
        await cloud.reconcile_all()
        with held, pytest.raises(OSError):
            held.sendall(b"lost")
            held.recv(10)
        assert exchange(red, cloud, CLIENT, TCP) == CLIENT, "new ones go by the new place"
    finally:
        outside.close()


@pytest.mark.parametrize(
    ("where", "space", "command", "words"),
    [
        (A, "router-7", "ip route del default", "route to 0.0.0.0/0"),
        (A, "router-7", "ip neigh del 10.2.0.10 dev n102", "neighbour 10.2.0.10"),
        (A, "router-7", "ip addr del 10.1.0.1/24 dev n101", "address 10.1.0.1/24"),
        (A, "router-7", "ip -6 addr del fd01::1/64 dev n101", "address fd01::1/64"),
        (A, "router-7", "ip link del n102", "cable r7-102 was missing"),
        (A, "router-7", "ip link set n101 down", "device n101"),
        (A, "router-7", "ip route add 192.0.2.0/24 dev n101", "was not asked for: removed"),
        (A, "router-7", "sysctl -qw net.ipv4.conf.all.forwarding=0", "forwarding = 1"),
        (A, "", "ip link set r7-101 nomaster", "cable r7-101 was different"),
        (A, "", "bridge fdb del 02:6e:72:00:00:07 dev r7-101 master", "forwarding of 02:6e:72:00:00:07"),
        (A, "", "ip neigh del 10.1.0.1 dev br101", "neighbour 10.1.0.1"),
        (EDGE, "gateway-7", "nft flush ruleset", "its packet filter was different"),
        (EDGE, "", "ip route del 203.0.113.150", "route to 203.0.113.150/32"),
        (EDGE, "", "ip neigh del proxy 203.0.113.100 dev out0", "answering for 203.0.113.100"),
        (EDGE, "", "ip link del o7", "cable o7 was missing"),
    ],
)
async def test_what_was_broken_is_restored_and_said(
    shared: tuple[RoutedCloud, Server, Server], where: str, space: str, command: str, words: str
) -> None:
    cloud, red, blue = shared
    argv = command.split()
    cloud.command(where, space, *argv) if space else cloud.hosts[where].command(*argv)
    found = await cloud.reconcile(where)
    assert any(words in text for text in found), found
    assert len(found) <= 16, found
    before = cloud.hosts[where].driver.routing.writes
    assert await cloud.reconcile(where) == ()
    assert cloud.hosts[where].driver.routing.writes == before, "what is right is not touched"
    assert red.answered(blue.ip) and red.answered(blue.addresses[1])
    assert red.answered(CLIENT) and blue.answered(CLIENT)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RoutedCloud, Server, Server]]:
    """One cloud for all of them; its hosts have event loops of their own."""
    cloud = RoutedCloud(tmp_path_factory.mktemp("shared"))
    try:
        red, blue, _ = asyncio.run(routed(cloud))
        yield cloud, red, blue
    finally:
        asyncio.run(cloud.close())


async def test_a_lost_namespace_comes_back_and_a_new_agent_finds_all_others(cloud: RoutedCloud) -> None:
    red, blue, _ = await routed(cloud)
    inodes = {
        (host, space): cloud.path(host, space).stat().st_ino
        for host, space in ((A, "router-7"), (B, "router-7"), (EDGE, "gateway-7"))
    }
    for host in cloud.hosts.values():
        host.restart_agent()
    assert not any((await cloud.reconcile_all()).values())
    assert all(cloud.path(h, s).stat().st_ino == inode for (h, s), inode in inodes.items())
    for host, space in ((A, "router-7"), (EDGE, "gateway-7")):
        cloud.hosts[host].driver.routing._spaces.namespaces.destroy(space)
        found = await cloud.reconcile(host)
        assert any(f"{space}: its namespace was missing" in text for text in found), found
        assert await cloud.reconcile(host) == ()
    assert red.answered(blue.ip) and red.answered(CLIENT)
    assert "3 received" in cloud.outside("ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", FLOATING)


async def test_what_is_no_longer_wanted_leaves_nothing(cloud: RoutedCloud) -> None:
    red, blue, _ = await routed(cloud)
    cloud.routers = []
    for name in cloud.hosts:
        assert await cloud.reconcile(name) == ()
        there = cloud.hosts[name].links()
        assert not [n for n, d in there.items() if d.alias.startswith("nahtlos-routing/")]
        assert cloud.hosts[name].driver.routing._spaces.namespaces.names() == ()
        assert "02:6e:72" not in cloud.hosts[name].command("bridge", "fdb")
        assert "02:6e:72" not in cloud.hosts[name].command("ip", "neigh", "show", "nud", "permanent")
    assert SNAT not in cloud.hosts[EDGE].command("ip", "neigh", "show", "proxy")
    assert not red.answered(blue.ip)


async def test_many_ports_are_programmed_in_batches(cloud: RoutedCloud) -> None:
    """Ten subnets of a hundred ports: the first pass, one that finds nothing, one after a change."""
    cloud.networks = [network(f"n{i}", 300 + i, f"10.{i}.0.0/24") for i in range(10)]
    cloud.routers = [gateway(router("main", 7, cloud.networks), EDGE, SNAT)]
    base = cloud.config(A)
    some = cloud.server("some", cloud.networks[0], B, "10.0.0.200")
    template = cloud.port(some)
    networks = tuple(
        msgspec.structs.replace(
            n,
            ports=tuple(
                msgspec.structs.replace(
                    template,
                    id=PortId(f"p{i}-{k}"),
                    server=ServerId(f"s{i}-{k}"),
                    mac=f"52:54:00:53:{i:02x}:{k:02x}",
                    ip=f"10.{i}.0.{k + 10}",
                )
                for k in range(100)
            ),
        )
        for i, n in enumerate(base.networks)
    )
    config = msgspec.structs.replace(base, networks=networks)
    routing = cloud.hosts[A].driver.routing
    await cloud.hosts[A].call(lambda d: d.reconcile(_desired(msgspec.structs.replace(config, routers=()))))
    times: list[float] = []
    for _ in range(2):
        began = time.perf_counter()
        assert await cloud.hosts[A].call(lambda d: d.routing.reconcile(config, {})) == ()
        times.append(time.perf_counter() - began)
    neighbours = cloud.command(A, "router-7", "ip", "neigh", "show", "nud", "permanent")
    assert len(re.findall(r"52:54:00:53", neighbours)) == 1000
    writes = routing.writes
    cloud.command(A, "router-7", "ip", "neigh", "del", "10.3.0.50", "dev", "n303")
    began = time.perf_counter()
    assert len(await cloud.hosts[A].call(lambda d: d.routing.reconcile(config, {}))) == 1
    times.append(time.perf_counter() - began)
    assert routing.writes == writes + 1, "one entry, one request"
    print(f"1,000 ports, 10 subnets: {times[0]:.3f} s, again {times[1]:.3f} s, repair {times[2]:.3f} s")
    assert times[1] < times[0] and times[0] < 10.0


def _desired(config: HostConfig) -> NetworkDesired:
    return NetworkDesired(config=config)
