"""Real hosts for the network driver's tests: namespaces, a driver in each, guests at the ends of taps.

Owns namespaces of one lab of its own (`nl-nlt-net<n>-*`). A guest is a thread that reads a tap's descriptor
as a VMM would, and, while it waits for a server, takes one frame and spoils it.
"""

import asyncio
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, Uplink
from nahtlos.model.ids import HostId, NetworkId, PortId, ServerId
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import HostRole, Size
from nahtlos.physical.network import links, tap
from nahtlos.physical.network.native import NativeNetwork
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.routing.namespaces import Namespaces
from nahtlos.physical.ports import MoveRole, NetworkDesired, Unit, UnitStatus
from nahtlos.physical.settings import AgentSettings

T = TypeVar("T")
PROBE_PORT = 9999
GUEST_MAC = "52:54:00:4d:00:{:02x}"
GUEST_IP = "10.77.0.{}"

TENANT = NetworkSpec(
    id=NetworkId("tenant"),
    vni=100,
    cidr="10.77.0.0/24",
    gateway_ip="10.77.0.1",
    gateway_mac="02:00:00:4d:00:01",
    gateway_host=HostId("edge-1"),
    dhcp_ip="10.77.0.2",
)


class MemorySupervisor:
    """The supervisor's store of descriptors, and units as plain children: enough for this driver."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    async def store_fd(self, name: str, fd: int) -> None:
        await self.drop_fd(name)
        self.fds[name] = os.dup(fd)

    async def fetch_fd(self, name: str) -> int | None:
        return os.dup(self.fds[name]) if name in self.fds else None

    async def drop_fd(self, name: str) -> None:
        fd = self.fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    async def stored(self) -> frozenset[str]:
        return frozenset(self.fds)

    async def start(self, unit: Unit) -> UnitStatus:
        if unit.name not in self.processes:
            handed = {f"{{fd:{name}}}": str(self.fds[name]) for name in unit.fds}
            argv = [reduce(lambda text, fd: text.replace(*fd), handed.items(), a) for a in unit.argv]
            with unit.log.open("ab") as log:
                self.processes[unit.name] = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **unit.environment},
                    stdout=log,
                    stderr=log,
                    pass_fds=[*map(int, handed.values())],
                )
        return UnitStatus(name=unit.name, pid=self.processes[unit.name].pid)

    async def stop(self, name: str, *, grace: float = 5.0) -> None:
        process = self.processes.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    async def units(self) -> dict[str, UnitStatus]:
        return {
            name: UnitStatus(name=name, pid=None if p.poll() is not None else p.pid)
            for name, p in self.processes.items()
        }

    async def arm(self, deadline: float | None, leased: dict[str, bool]) -> None:
        """Nothing here runs by a lease."""

    def clock(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def listen_tcp(self, name: str, address: str, port: int) -> int:
        raise NotImplementedError

    async def listen_unix(self, name: str, path: Path, *, mode: int) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        for name in list(self.processes):
            await self.stop(name)
        for name in list(self.fds):
            await self.drop_fd(name)


class Host:
    """A thread with an event loop inside a host's namespace, and the driver as its agent would hold it."""

    def __init__(self, node: topology.Node, folder: Path) -> None:
        assert node.role is not None
        self.node, self.name = node, node.name
        self.supervisor = MemorySupervisor()
        self.settings = AgentSettings(
            host=HostId(node.name),
            role=node.role,
            address=node.address,
            peer_port=7444,
            orchestrator_address="10.99.0.1",
            orchestrator_port=7443,
            capacity=Size(),
            supervisor_socket=folder / "unused.sock",
            **{
                name: folder / node.name / name
                for name in (
                    "state_dir",
                    "run_dir",
                    "ram_dir",
                    "releases_dir",
                    "images_dir",
                    "cache_dir",
                    "pki_dir",
                )
            },
        )
        self.settings.run_dir.mkdir(parents=True)
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=f"host-{node.name}")
        self._thread.start()
        ready.wait(5)
        self.driver = NativeNetwork(self.settings, self.supervisor)

    def _run(self, ready: threading.Event) -> None:
        topology.enter_namespace(self.node.namespace)
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(ready.set)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def call(self, act: Callable[[NativeNetwork], Awaitable[T]]) -> T:
        """What a verb of the driver returns, called inside this host."""

        async def inside() -> T:
            return await act(self.driver)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(inside(), self._loop))

    def restart_agent(self) -> None:
        """A new process would know no more than the new driver does."""
        old = self.driver
        self._loop.call_soon_threadsafe(old.close)
        self.driver = NativeNetwork(self.settings, self.supervisor)

    def command(self, *argv: str) -> str:
        done = subprocess.run(
            [*self.node.enter, *argv], capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout

    def links(self) -> dict[str, links.LinkInfo]:
        def read() -> dict[str, links.LinkInfo]:
            with Netlink() as sock:
                return links.read_links(sock)

        return topology.within(self.node.namespace, read)

    def close(self) -> None:
        closing: Future[None] = asyncio.run_coroutine_threadsafe(self.supervisor.close(), self._loop)
        closing.result(10)
        self._loop.call_soon_threadsafe(self.driver.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        held = Namespaces(self.settings.run_dir)
        for name in held.names():
            held.destroy(name)


class Guest:
    """One server, wherever it runs: what it received, by which host's tap."""

    def __init__(self, number: int) -> None:
        self.mac, self.ip = GUEST_MAC.format(number), GUEST_IP.format(number)
        self.port = PortId(f"server-{number}-port")
        self.received: list[int] = []
        self.others: list[bytes] = []
        self.spoiled: list[int | None] = []
        self._reader: threading.Thread | None = None
        self._stop = threading.Event()

    def wait_at(self, fd: int) -> None:
        """As a VMM that waits for a server does: the next frame is taken and lost."""
        self._start(lambda: self._spoil(fd))

    def run_at(self, fd: int) -> None:
        self.stop()
        self._start(lambda: self._serve(fd))

    def stop(self) -> None:
        if self._reader is not None:
            self._stop.set()
            self._reader.join(5)
            self._reader = None

    def _start(self, act: Callable[[], None]) -> None:
        self._stop.clear()
        self._reader = threading.Thread(target=act, name="guest")
        self._reader.start()

    def _next(self, fd: int) -> bytes | None:
        while not self._stop.is_set():
            if select.select([fd], [], [], 0.02)[0]:
                return os.read(fd, 1 << 17)[tap.header_size(fd) :]
        return None

    def _spoil(self, fd: int) -> None:
        frame = self._next(fd)
        if frame is not None:
            self.spoiled.append(probe_number(frame))

    def _serve(self, fd: int) -> None:
        while (frame := self._next(fd)) is not None:
            number = probe_number(frame)
            if number is not None:
                self.received.append(number)
            else:
                self.others.append(frame)

    def frame_to(self, mac: str, ip: str, number: int) -> bytes:
        """A numbered datagram from this guest, with the header a tap wants before it."""
        payload = struct.pack("!Q", number)
        udp = struct.pack("!HHHH", PROBE_PORT, PROBE_PORT, 8 + len(payload), 0) + payload
        header = struct.pack(
            "!BBHHHBBH4s4s",
            *(0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0),
            socket.inet_aton(self.ip),
            socket.inet_aton(ip),
        )
        header = header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:]
        return bytes(10) + _ethernet(mac, self.mac, 0x0800) + header + udp


def _ethernet(to: str, sender: str, kind: int) -> bytes:
    return bytes.fromhex(to.replace(":", "") + sender.replace(":", "")) + struct.pack("!H", kind)


def internet_checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def probe_number(frame: bytes) -> int | None:
    """The number of a probe's datagram; None for any other frame."""
    if len(frame) >= 50 and frame[12:14] == b"\x08\x00" and frame[23] == 17:
        port = struct.unpack_from("!H", frame, 36)[0]
        if port == PROBE_PORT:
            return int(struct.unpack_from("!Q", frame, 42)[0])
    return None


class Sender:
    """Numbered datagrams from the client outside, at a steady rate, from a thread: `frames` of them, or until
    it is stopped."""

    def __init__(self, namespace: str, ip: str, interval: float = 0.0008, frames: int | None = None) -> None:
        self.sent = 0
        self._frames = frames
        self._stop = threading.Event()
        self._socket = topology.within(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._thread = threading.Thread(target=self._run, args=(ip, interval), name="sender")
        self._thread.start()

    def _run(self, ip: str, interval: float) -> None:
        due = time.monotonic()
        while not self._stop.is_set() and self.sent != self._frames:
            self._socket.sendto(struct.pack("!Q", self.sent), (ip, PROBE_PORT))
            self.sent += 1
            due += interval
            time.sleep(max(0.0, due - time.monotonic()))

    def stop(self) -> int:
        self._stop.set()
        return self.ended()

    def ended(self) -> int:
        self._thread.join(5)
        self._socket.close()
        return self.sent


class Tally:
    """What became of numbered datagrams."""

    def __init__(self, sent: int, received: list[int]) -> None:
        seen = Counter(received)
        self.sent = sent
        self.lost = sorted(set(range(sent)) - set(seen))
        self.duplicated = sorted(n for n, times in seen.items() if times > 1)
        self.reordered = sum(1 for a, b in pairwise(received) if b < a)


class Cloud:
    """Two hosts for servers, an edge and a client outside, all of them real as far as the kernel goes."""

    def __init__(self, folder: Path, hosts: int = 2) -> None:
        self.lab = f"nlt-net{os.getpid() % 10000}"
        self.topology = topology.create(self.lab, hosts)
        nodes = [node for node in self.topology.nodes if node.role is not None]
        self.hosts = {node.name: Host(node, folder) for node in nodes}
        self.guests: dict[PortId, Guest] = {}
        self.places: dict[PortId, str] = {}
        self.reflect: dict[str, set[PortId]] = {name: set() for name in self.hosts}
        self.generation = 0
        self._senders: list[Sender] = []

    def guest(self, number: int, host: str) -> Guest:
        guest = Guest(number)
        self.guests[guest.port], self.places[guest.port] = guest, host
        return guest

    def port(self, guest: Guest) -> PortConfig:
        host = self.hosts[self.places[guest.port]]
        return PortConfig(
            id=guest.port,
            server=ServerId(guest.port.removesuffix("-port")),
            mac=guest.mac,
            ip=guest.ip,
            host=HostId(host.name),
            vtep=host.node.address,
        )

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(
            spec=TENANT,
            ports=tuple(self.port(guest) for guest in self.guests.values()),
            gateway_vtep=self.hosts["edge-1"].node.address,
            vteps=tuple(h.node.address for h in self.hosts.values()),
        )

    def config(self, host: str, *, networks: bool = True) -> HostConfig:
        self.generation += 1
        edge = self.hosts[host].settings.role is HostRole.EDGE
        return HostConfig(
            host=HostId(host),
            generation=self.generation,
            release=None,
            networks=(self.network,) if networks else (),
            uplinks=(Uplink(network=TENANT.id, interface="out0"),) if edge and networks else (),
            reflect=tuple(sorted(self.reflect[host])),
        )

    async def reconcile(self, host: str, *pinned: PortId) -> tuple[str, ...]:
        desired = NetworkDesired(config=self.config(host), pinned=frozenset(pinned))
        return await self.hosts[host].call(lambda d: d.reconcile(desired))

    async def reconcile_all(self) -> dict[str, tuple[str, ...]]:
        return {name: await self.reconcile(name) for name in self.hosts}

    async def boot(self, guest: Guest) -> None:
        """Its tap where it belongs, and its reader there."""
        host = self.hosts[self.places[guest.port]]
        port, network = self.port(guest), self.network
        await host.call(lambda d: d.port_create(port, network, deliver=True))
        guest.run_at(self.fd(guest, host.name))

    def fd(self, guest: Guest, host: str) -> int:
        return self.hosts[host].supervisor.fds[f"tap.{guest.port}"]

    def sender(self, guest: Guest, interval: float = 0.0008, frames: int | None = None) -> Sender:
        sender = Sender(self.topology.client.namespace, guest.ip, interval, frames)
        self._senders.append(sender)
        return sender

    async def begin_move(self, guest: Guest, to: str) -> None:
        """Everything before the switch, as the two agents do it."""
        source, destination = self.hosts[self.places[guest.port]], self.hosts[to]
        port, network = self.port(guest), self.network
        await destination.call(lambda d: d.port_create(port, network, deliver=False))
        await destination.call(
            lambda d: d.move_prepare(port, network, MoveRole.DESTINATION, source.node.address)
        )
        await source.call(lambda d: d.move_prepare(port, network, MoveRole.SOURCE, destination.node.address))

    async def verb(self, host: str, guest: Guest, verb: str, role: MoveRole) -> int | None:
        port, network = self.port(guest), self.network
        return await self.hosts[host].call(lambda d: getattr(d, verb)(port, network, role))

    def close(self) -> None:
        for sender in self._senders:
            sender.stop()
        for guest in self.guests.values():
            guest.stop()
        for host in self.hosts.values():
            host.close()
        topology.destroy(self.lab)


def missing_programs() -> str:
    """Why these tests cannot run here; empty if they can."""
    if os.geteuid() != 0:
        return "needs root"
    wanted = ("nft", "ip", "dnsmasq", "nsenter")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return " ".join(f"{p} is not installed" for p in wanted if shutil.which(p, path=path) is None)
