"""Machines that move in tests of the handover's hard cases: several ports, several queues, talking while
they move; and the play of a move in single acts, so that a test can do something between any two.

Owns threads that read and write taps. The hosts are those of `network_namespaces`.
"""

import asyncio
import os
import select
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import msgspec
from network_namespaces import TENANT, Cloud, Guest, probe_number

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import NetworkId, PortId
from nahtlos.physical.network import tap
from nahtlos.physical.network.endpoints import stored_name
from nahtlos.physical.ports import MoveRole

M = TypeVar("M", bound="Machine")
A, B, C, EDGE = "host-1", "host-2", "host-3", "edge-1"
STREAM = 1_000_000
"""Numbers of one stream begin at a multiple of this."""
BROADCAST, MULTICAST = "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:2a"
SECOND = msgspec.structs.replace(
    TENANT,
    id=NetworkId("second"),
    vni=101,
    cidr="10.78.0.0/24",
    gateway_ip="10.78.0.1",
    gateway_mac="02:00:00:4e:00:01",
    dhcp_ip="10.78.0.2",
)


class Machine(Guest):
    """A port of a server: its reader takes from every queue, and it can be made to talk."""

    def __init__(self, number: int, *, queues: int = 1, second: bool = False) -> None:
        super().__init__(number)
        self.queues, self.second = queues, second
        if second:
            self.ip = self.ip.replace("10.77.", "10.78.")
            self.mac = self.mac.replace(":4d:", ":4e:")
            self.port = PortId(f"server-{number}-second")
        self.by_queue: Counter[int] = Counter()
        self._fds: Sequence[int] = ()
        self._mouth = threading.Lock()

    def run_on(self, fds: Sequence[int]) -> None:
        self.stop()
        with self._mouth:
            self._fds = fds
        self._start(lambda: self._read(fds))

    def wait_on(self, fds: Sequence[int]) -> None:
        """As a VMM that waits: the next frame of every queue is taken and lost."""
        self._start(lambda: self._spoil_each(list(fds)))

    def stop(self) -> None:
        with self._mouth:
            self._fds = ()
        super().stop()

    def say(self, frame: bytes) -> bool:
        """False while it does not run."""
        with self._mouth:
            if not self._fds:
                return False
            os.write(self._fds[0], frame)
            return True

    def _read(self, fds: Sequence[int]) -> None:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        while not self._stop.is_set():
            for fd, _ in poll.poll(20):
                for view in tap.frames(fd, 64):
                    self.by_queue[list(fds).index(fd)] += 1
                    self._take(bytes(view[tap.header_size(fd) :]))

    def _take(self, frame: bytes) -> None:
        number = probe_number(frame)
        if number is None:
            self.others.append(frame)
        else:
            self.received.append(number)

    def _spoil_each(self, fds: list[int]) -> None:
        while fds and not self._stop.is_set():
            for fd in select.select(fds, [], [], 0.02)[0]:
                self.spoiled.append(probe_number(os.read(fd, 1 << 17)[tap.header_size(fd) :]))
                fds.remove(fd)


class Talker:
    """A machine that sends a numbered frame at a steady rate whenever it runs."""

    def __init__(self, machine: Machine, stream: int, mac: str, ip: str, interval: float = 0.002) -> None:
        self.machine, self.stream, self.sent = machine, stream, 0
        self._frame = lambda n: machine.frame_to(mac, ip, n)
        self._interval = interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"talker-{stream}")
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._end.is_set():
            if self.machine.say(self._frame(self.stream * STREAM + self.sent)):
                self.sent += 1
            due = max(due + self._interval, time.monotonic() - 0.05)
            time.sleep(max(0.0, due - time.monotonic()))

    def stop(self) -> int:
        self._end.set()
        self._thread.join(5)
        return self.sent


@dataclass(frozen=True)
class Count:
    """What became of one stream at one receiver."""

    sent: int
    lost: list[int]
    duplicated: list[int]
    reordered: int


def count(talker: Talker, receiver: Guest) -> Count:
    return counted(talker.stop(), [n - talker.stream * STREAM for n in receiver.received], STREAM)


def counted(sent: int, received: list[int], limit: int = STREAM) -> Count:
    own = [n for n in received if 0 <= n < limit]
    seen = Counter(own)
    return Count(
        sent,
        sorted(set(range(sent)) - set(seen)),
        sorted(n for n, times in seen.items() if times > 1),
        sum(1 for a, b in pairwise(own) if b < a),
    )


async def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Returns when it is, or after `seconds`: what is looked for is judged by who asked."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


class Stage(Cloud):
    """Hosts, two networks, machines, and the acts of a move."""

    def __init__(self, folder: Path, hosts: int = 2) -> None:
        super().__init__(folder, hosts)
        self.mtu = TENANT.mtu
        self.talkers: list[Talker] = []

    def widen(self, mtu: int) -> None:
        """Tenants' frames may be that long, and the underlay takes them with what a tunnel adds."""
        self.mtu = mtu
        for node in self.topology.underlay:
            self.command_in(node, "ip", "link", "set", "eth0", "mtu", str(mtu + 50))
        for line in self.command_in(self.topology.switch, "ip", "-br", "link").splitlines():
            name = line.split()[0].split("@")[0]
            if name != "lo":
                self.command_in(self.topology.switch, "ip", "link", "set", name, "mtu", str(mtu + 50))

    @staticmethod
    def command_in(node: topology.Node, *argv: str) -> str:
        return subprocess.run(
            [*node.enter, *argv], check=True, capture_output=True, text=True, timeout=10
        ).stdout

    def machine(self, number: int, host: str, *, queues: int = 1, second: bool = False) -> Machine:
        return self.add(Machine(number, queues=queues, second=second), host)

    def add(self, machine: M, host: str) -> M:
        self.guests[machine.port], self.places[machine.port] = machine, host
        return machine

    def port(self, guest: Guest) -> PortConfig:
        queues = guest.queues if isinstance(guest, Machine) else 1
        return msgspec.structs.replace(super().port(guest), queues=queues)

    def network_of(self, guest: Guest) -> NetworkConfig:
        return self._network(second=isinstance(guest, Machine) and guest.second)

    def _network(self, *, second: bool) -> NetworkConfig:
        there = [g for g in self.guests.values() if (isinstance(g, Machine) and g.second) == second]
        return msgspec.structs.replace(
            super().network,
            spec=msgspec.structs.replace(SECOND if second else TENANT, mtu=self.mtu),
            ports=tuple(self.port(g) for g in there),
        )

    def config(self, host: str, *, networks: bool = True) -> HostConfig:
        both = tuple(self._network(second=s) for s in (False, True))
        return msgspec.structs.replace(super().config(host), networks=both if networks else ())

    async def opened(self, *machines: Machine) -> None:
        for _ in range(2):
            await self.reconcile_all()
            for machine in machines:
                host = self.places[machine.port]
                port, network = self.port(machine), self.network_of(machine)
                await self.on(host, lambda d, p=port, n=network: d.port_create(p, n, deliver=True))
                machine.run_on(self.fds(machine, host))

    async def on(self, host: str, act: Callable[..., Awaitable[object]]) -> object:
        return await self.hosts[host].call(act)  # type: ignore[arg-type]

    def fds(self, machine: Machine, host: str) -> list[int]:
        stored = self.hosts[host].supervisor.fds
        return [stored[stored_name(machine.port, n)] for n in range(machine.queues)]

    def talk(self, machine: Machine, stream: int, mac: str, ip: str, interval: float = 0.002) -> Talker:
        talker = Talker(machine, stream, mac, ip, interval)
        self.talkers.append(talker)
        return talker

    def move(self, to: str, *machines: Machine) -> "Move":
        return Move(self, self.places[machines[0].port], to, machines)

    async def silence(self) -> None:
        """Returns when nothing has arrived anywhere for a while."""
        before, unchanged = -1, 0
        for _ in range(40):
            now = sum(len(g.received) + len(g.others) for g in self.guests.values())
            unchanged = unchanged + 1 if now == before else 0
            if unchanged == 3:
                return
            before = now
            await asyncio.sleep(0.15)

    def close(self) -> None:
        for talker in self.talkers:
            talker.stop()
        super().close()


@dataclass
class Move:
    """One server, with all its ports. Each act may be repeated."""

    stage: Stage
    source: str
    destination: str
    machines: Sequence[Machine]
    window: float = 0.0
    """Seconds between the first act of the two switches and the last."""
    spoiled: list[int | None] = field(default_factory=list[int | None])

    async def _each(self, host: str, verb: str, role: MoveRole, *more: object) -> list[object]:
        results: list[object] = []
        for machine in self.machines:
            port, network = self.stage.port(machine), self.stage.network_of(machine)
            results.append(
                await self.stage.on(host, lambda d, p=port, n=network: getattr(d, verb)(p, n, role, *more))
            )
        return results

    async def create(self) -> None:
        for machine in self.machines:
            port, network = self.stage.port(machine), self.stage.network_of(machine)
            await self.stage.on(
                self.destination, lambda d, p=port, n=network: d.port_create(p, n, deliver=False)
            )

    async def prepare_destination(self) -> None:
        vtep = self.stage.hosts[self.source].node.address
        await self._each(self.destination, "move_prepare", MoveRole.DESTINATION, vtep)

    async def sacrifice(self) -> None:
        for machine in self.machines:
            waiting = Machine(99)
            waiting.wait_on(self.stage.fds(machine, self.destination))
            taken = await self.stage.on(self.destination, lambda d, p=machine.port: d.move_sacrifice(p))
            deadline = time.monotonic() + 1
            while len(waiting.spoiled) < machine.queues and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
            waiting.stop()
            assert taken and waiting.spoiled == [None] * machine.queues, "one frame of each queue"

    async def prepare_source(self) -> None:
        vtep = self.stage.hosts[self.destination].node.address
        await self._each(self.source, "move_prepare", MoveRole.SOURCE, vtep)

    async def switch_destination(self) -> None:
        self.window = time.monotonic()
        await self._each(self.destination, "move_switch", MoveRole.DESTINATION)

    async def switch_source(self) -> None:
        await self._each(self.source, "move_switch", MoveRole.SOURCE)
        self.window = time.monotonic() - self.window

    async def drain(self, timeout: float = 1.0) -> bool:
        drained = [
            await self.stage.on(self.source, lambda d, p=m.port: d.move_drain(p, timeout=timeout))
            for m in self.machines
        ]
        return all(drained)

    async def stop(self) -> None:
        for machine in self.machines:
            machine.stop()

    async def resume(self) -> None:
        for machine in self.machines:
            machine.run_on(self.stage.fds(machine, self.destination))

    async def settle_destination(self) -> None:
        await self._each(self.destination, "move_settle", MoveRole.DESTINATION)

    async def settle_source(self) -> None:
        await self._each(self.source, "move_settle", MoveRole.SOURCE)
        for machine in self.machines:
            self.stage.places[machine.port] = self.destination
            self.stage.reflect[self.source].add(machine.port)
            self.stage.reflect[self.destination].discard(machine.port)

    async def revert_source(self) -> None:
        await self._each(self.source, "move_revert", MoveRole.SOURCE)

    async def resume_at_source(self) -> None:
        for machine in self.machines:
            machine.run_on(self.stage.fds(machine, self.source))

    async def revert_destination(self) -> int:
        return sum(
            int(str(n)) for n in await self._each(self.destination, "move_revert", MoveRole.DESTINATION)
        )

    async def clear_destination(self) -> None:
        for machine in self.machines:
            await self.stage.on(self.destination, lambda d, p=machine.port: d.port_delete(p))

    async def begin(self) -> None:
        await self.create()
        await self.prepare_destination()
        await self.sacrifice()
        await self.prepare_source()

    async def switch(self) -> None:
        await self.switch_destination()
        await self.switch_source()
        assert await self.drain()
        await self.stop()

    async def finish(self) -> None:
        await self.resume()
        await self.settle_destination()
        await self.settle_source()

    async def give_up(self) -> int:
        await self.revert_source()
        await self.resume_at_source()
        returned = await self.revert_destination()
        await self.clear_destination()
        return returned

    async def whole(self, hold: float = 0.1) -> None:
        await self.begin()
        await self.switch()
        await asyncio.sleep(hold)
        await self.finish()
