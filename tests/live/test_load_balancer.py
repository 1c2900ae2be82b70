"""Load balancers inside a network: real HAProxy, real connections, a real supervisor."""

import asyncio
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from network_namespaces import missing_programs
from routed_cloud import A, B, RoutedCloud, Server, network, router

from nahtlos.lab import topology
from nahtlos.model.ids import HostId, LoadBalancerId
from nahtlos.model.networking import HealthCheck, LoadBalancerSpec, Member
from nahtlos.physical.network.routing import balancer as subject
from nahtlos.physical.network.routing.balancer import BalancerStatus
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.physical.supervisor.launch import launch_supervisor

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
    pytest.mark.skipif(shutil.which("haproxy", path="/usr/sbin:/usr/bin") is None, reason="needs haproxy"),
]
RED, BLUE = network("red", 101, "10.1.0.0/24"), network("blue", 102, "10.2.0.0/24")
VIP, PORT = "10.1.0.200", 80
ID = LoadBalancerId("web")


class Named:
    """A service that says its name to whoever connects, and again for every byte it gets."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.peers: list[str] = []
        self._stop = threading.Event()
        self._listening: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self.start()

    def start(self) -> None:
        def listen() -> socket.socket:
            sock = socket.create_server((self.server.ip, PORT), backlog=200)
            sock.settimeout(0.05)
            return sock

        self._listening = self.server.within(listen)
        self._run(self._accept, self._listening)

    def refuse(self) -> None:
        """Its process has died: whoever connects is refused, who is connected stays so."""
        listening, self._listening = self._listening, None
        assert listening is not None
        listening.shutdown(socket.SHUT_RDWR)  # at once, though a thread waits for it
        listening.close()

    def _run(self, act: object, sock: socket.socket) -> None:
        thread = threading.Thread(target=act, args=(sock,))
        thread.start()
        self._threads.append(thread)

    def _accept(self, listening: socket.socket) -> None:
        while not self._stop.is_set():
            try:
                peer, sender = listening.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.peers.append(sender[0])
            self._run(self._serve, peer)

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            peer.settimeout(0.05)
            try:
                peer.sendall(f"{self.server.name}\n".encode())
                while not self._stop.is_set():
                    try:
                        if not peer.recv(100):
                            return
                    except TimeoutError:
                        continue
                    peer.sendall(f"{self.server.name}\n".encode())
            except OSError:
                return

    def close(self) -> None:
        self._stop.set()
        if self._listening is not None:
            self._listening.close()
        for thread in list(self._threads):
            thread.join(5)


class Balanced:
    """A client here, members on both hosts and in another subnet, the load balancer on the second host."""

    def __init__(self, folder: Path) -> None:
        self.cloud = RoutedCloud(folder)
        self.client = self.cloud.server("client", RED, A, "10.1.0.10")
        self.servers = [
            self.cloud.server("one", RED, A, "10.1.0.11"),
            self.cloud.server("two", RED, B, "10.1.0.12"),
            self.cloud.server("three", BLUE, A, "10.2.0.13"),
        ]
        self.cloud.networks = [RED, BLUE]
        self.cloud.routers = [router("main", 7, [RED, BLUE])]
        self.spec = LoadBalancerSpec(
            id=ID,
            number=3,
            network=RED.id,
            vip=VIP,
            port=PORT,
            host=HostId(B),
            members=tuple(Member(address=s.ip, port=PORT) for s in self.servers),
            health=HealthCheck(interval_ms=100, timeout_ms=200, fall=2, rise=1),
        )
        self.services: list[Named] = []

    async def open(self) -> None:
        self.services = [Named(s) for s in self.servers]
        await self.set(self.spec)
        for server in self.cloud.servers:
            await self.cloud.boot(server)
        for name in self.cloud.hosts:
            await self.cloud.reconcile(name)
        await self.until(lambda s: all(m.up for m in s.members))

    async def set(self, spec: LoadBalancerSpec) -> dict[str, tuple[str, ...]]:
        self.spec = spec
        self.cloud.balancers = [spec]
        return await self.cloud.reconcile_all()

    def with_members(self, **changes: dict[str, object]) -> LoadBalancerSpec:
        names = {s.ip: s.name for s in self.servers}
        members = tuple(
            msgspec.structs.replace(m, **changes.get(names[m.address], {})) for m in self.spec.members
        )
        return msgspec.structs.replace(self.spec, members=members)

    async def status(self) -> BalancerStatus:
        return await self.cloud.hosts[B].call(lambda d: d.routing.balancer_status(ID))

    async def until(self, true: object, seconds: float = 8.0) -> BalancerStatus:
        deadline = time.monotonic() + seconds
        while not true(status := await self.status()):
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.05)
        return status

    def connect(self) -> socket.socket:
        return self.client.within(lambda: socket.create_connection((VIP, PORT), timeout=3.0))

    def asked(self, times: int) -> Counter[str]:
        """Who answered, each on a connection of its own; `""` for those that failed."""

        def ask() -> Counter[str]:
            answers: Counter[str] = Counter()
            for _ in range(times):
                try:
                    with socket.create_connection((VIP, PORT), timeout=3.0) as sock:
                        answers[sock.recv(20).decode().strip()] += 1
                except OSError:
                    answers[""] += 1
            return answers

        return self.client.within(ask)

    async def close(self, client: SupervisorClient) -> None:
        async def let_go() -> None:
            client.close()

        for service in self.services:
            service.close()
        try:
            await self.cloud.clear()
        finally:
            await self.cloud.hosts[B].call(lambda _: let_go())
            await self.cloud.close()


@pytest.fixture
async def balanced() -> AsyncIterator[Balanced]:
    folder = Path(tempfile.mkdtemp(prefix="nlt-"))  # short: paths of sockets are limited
    balanced = Balanced(folder)
    node = balanced.cloud.hosts[B].node
    socket_ = folder / "supervisor.sock"
    running = launch_supervisor(socket_, folder / "supervisor", namespace=node.namespace)
    host = balanced.cloud.hosts[B]
    client = SupervisorClient(socket_)
    host.driver.routing._balancers._supervisor = client
    try:
        await balanced.open()
        yield balanced
    finally:
        try:
            await balanced.close(client)
        finally:
            await running.close()
            shutil.rmtree(folder)


async def test_shares_by_weight_and_from_the_address_that_is_told(balanced: Balanced) -> None:
    assert balanced.asked(30) == {"one": 10, "two": 10, "three": 10}
    assert {peer for s in balanced.services for peer in s.peers} == {VIP}
    found = await balanced.set(balanced.with_members(one={"weight": 3}, three={"weight": 0}))
    assert not any(found.values()), "asked for: no drift"
    answers = balanced.asked(40)
    assert answers.total() == answers["one"] + answers["two"] == 40
    assert abs(answers["one"] - 30) <= 2, answers  # where the round begins depends on what went before
    before = await balanced.status()
    assert [m.weight for m in before.members] == [3, 1, 0]
    assert not any((await balanced.cloud.reconcile_all()).values())
    assert (await balanced.status()).configuration == before.configuration, "weights need no new worker"
    assert balanced.client.answered(VIP)


async def test_a_dead_member_is_taken_out_and_comes_back(balanced: Balanced) -> None:
    balanced.services[1].refuse()
    assert balanced.asked(15)[""] == 0, "who is refused is sent on, before anybody has noticed"
    status = await balanced.until(lambda s: [m.up for m in s.members] == [True, False, True])
    assert status.members[1].member.address == "10.1.0.12"
    (told,) = await balanced.cloud.hosts[B].call(lambda d: d.load_balancers())
    assert told.id == ID
    assert [(m.address, m.port, m.up) for m in told.members] == [
        (s.ip, PORT, s is not balanced.servers[1]) for s in balanced.servers
    ]
    assert balanced.asked(20) == {"one": 10, "three": 10}
    balanced.services[1].start()
    await balanced.until(lambda s: all(m.up for m in s.members))
    assert balanced.asked(30)["two"] == 10


async def test_draining_keeps_what_there_is_and_gives_nothing_new(balanced: Balanced) -> None:
    held = [balanced.connect() for _ in range(3)]
    try:
        names = [sock.recv(20) for sock in held]
        assert sorted(names) == [b"one\n", b"three\n", b"two\n"]
        await balanced.set(balanced.with_members(two={"draining": True}))
        assert balanced.asked(20) == {"one": 10, "three": 10}
        old = held[names.index(b"two\n")]
        old.sendall(b"x")
        assert old.recv(20) == b"two\n"
        assert (await balanced.status()).members[1].connections == 1
    finally:
        for sock in held:
            sock.close()
    await balanced.until(lambda s: s.members[1].connections == 0)


class Load:
    """Connections one after another, by several threads, while something happens."""

    def __init__(self, balanced: Balanced) -> None:
        self.answers: Counter[str] = Counter()
        self._balanced = balanced
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.answers += self._balanced.asked(5)

    def stop(self) -> Counter[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        return self.answers


async def test_members_change_under_load_without_a_failed_connection(balanced: Balanced) -> None:
    held = balanced.connect()
    name = held.recv(20)
    load = Load(balanced)
    everyone = balanced.spec.members
    digests = set()
    for round_ in range(6):
        members = everyone[:2] if round_ % 2 == 0 else everyone
        found = await balanced.set(msgspec.structs.replace(balanced.spec, members=members))
        assert not any(found.values()), found
        digests.add((await balanced.status()).configuration)
        await asyncio.sleep(0.2)
    answers = load.stop()
    assert len(digests) == 2
    assert answers[""] == 0, answers
    assert answers.total() > 100 and set(answers) == {"one", "two", "three"}
    with held:
        held.sendall(b"x")
        assert held.recv(20) == name, "a connection from before all of it"


async def test_it_outlives_its_agent_and_comes_back_when_killed(balanced: Balanced) -> None:
    host = balanced.cloud.hosts[B]
    supervisor = host.driver.routing._balancers._supervisor
    unit = (await host.call(lambda _: supervisor.units()))[subject.PREFIX + ID]
    host.restart_agent()
    host.driver.routing._balancers._supervisor = supervisor
    assert not any((await balanced.cloud.reconcile_all()).values())
    assert balanced.asked(3)[""] == 0
    assert unit.pid is not None
    os.kill(unit.pid, signal.SIGKILL)
    deadline = time.monotonic() + 8
    while balanced.asked(3)[""]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    again = (await host.call(lambda _: supervisor.units()))[subject.PREFIX + ID]
    assert again.pid not in (None, unit.pid)
    await balanced.set(balanced.with_members(one={"weight": 2}))
    await balanced.until(lambda s: [(m.weight, m.up) for m in s.members] == [(2, True), (1, True), (1, True)])


async def test_what_was_broken_is_restored_and_said(balanced: Balanced) -> None:
    host = balanced.cloud.hosts[B]
    routing = host.driver.routing

    async def lose_namespace() -> None:
        routing._spaces.namespaces.destroy("balancer-3")
        host.command("ip", "link", "del", "l3")

    async def lose_cable() -> None:
        host.command("ip", "link", "del", "l3")

    async def lose_unit() -> None:
        await host.call(lambda _: routing._balancers._supervisor.stop(subject.PREFIX + ID, grace=0))

    async def lose_weight() -> None:
        command = "set server members/10.1.0.11_80 weight 9"
        await host.call(lambda _: subject._ask(routing._balancers._socket(ID), command))

    for broken in (lose_namespace, lose_cable, lose_unit, lose_weight):
        await broken()
        found = await balanced.cloud.reconcile(B)
        assert found, broken
        assert await balanced.cloud.reconcile(B) == (), broken
        await balanced.until(lambda s: all(m.up for m in s.members))
        answers = balanced.asked(9)
        assert answers.total() == 9 and set(answers) == {"one", "two", "three"}, (broken, answers)


async def test_what_is_no_longer_wanted_leaves_nothing(balanced: Balanced) -> None:
    host = balanced.cloud.hosts[B]
    balanced.cloud.balancers = []
    assert not any((await balanced.cloud.reconcile_all()).values())
    supervisor = host.driver.routing._balancers._supervisor
    assert not [n for n in await host.call(lambda _: supervisor.units()) if n.startswith(subject.PREFIX)]
    assert "l3" not in host.links()
    assert balanced.asked(1)[""] == 1
    listening = topology.within(host.node.namespace, lambda: Path("/proc/net/tcp").read_text())
    assert f":{PORT:04X} 00000000:0000 0A" not in listening
