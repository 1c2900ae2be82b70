"""Servers with a whole IP stack for the firewall's tests: a namespace, a device in it, and a relay that
stands where a VMM would, between that device and the tap at the host.

Owns the namespaces `nlt-fw<n>-*`. Frames can also be written into the tap by hand, as a server that lies
would, and what is delivered to a server is kept.
"""

import contextlib
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from network_namespaces import TENANT, Cloud, Guest, internet_checksum

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig
from nahtlos.model.ids import NetworkId, SecurityGroupId, SubnetId
from nahtlos.model.networking import (
    AddressPair,
    Direction,
    Family,
    NetworkSpec,
    SecurityGroupSpec,
    SecurityRule,
    SubnetSpec,
)
from nahtlos.physical.network import tap
from nahtlos.physical.ports import MoveRole

A, B, C = "host-1", "host-2", "host-3"
HEADER = 10
"""Bytes of virtio-net header before each frame of a tap."""
SIX = SubnetSpec(id=SubnetId("tenant-six"), network=TENANT.id, cidr="fd77::/64", dhcp=False)
FIRST = msgspec.structs.replace(TENANT, subnets=(SIX,))
SECOND = NetworkSpec(
    id=NetworkId("other"),
    vni=200,
    cidr=TENANT.cidr,
    gateway_ip="10.77.0.1",
    gateway_mac="",
    gateway_host=TENANT.gateway_host,
    dhcp_ip="10.77.0.2",
    subnets=(msgspec.structs.replace(SIX, network=NetworkId("other")),),
)


def rule(direction: Direction, protocol: str = "", port: int | None = None, **more: object) -> SecurityRule:
    return SecurityRule(
        direction=direction,
        protocol=protocol,
        port_min=port,
        port_max=None if protocol == "icmp" else port,
        **more,  # type: ignore[arg-type]
    )


def both(direction: Direction, protocol: str = "", port: int | None = None) -> list[SecurityRule]:
    """For IPv4 and IPv6."""
    return [rule(direction, protocol, port, family=family) for family in Family]


def group(name: str, *rules: SecurityRule, stateful: bool = True) -> SecurityGroupSpec:
    return SecurityGroupSpec(id=SecurityGroupId(name), rules=rules, stateful=stateful)


class Box(Guest):
    """A server: its stack is a namespace of its own."""

    def __init__(self, number: int, groups: tuple[str, ...], network: NetworkSpec, stage: str) -> None:
        super().__init__(number)
        self.network = network
        self.groups = tuple(SecurityGroupId(g) for g in groups)
        self.pairs: tuple[AddressPair, ...] = ()
        self.ip6 = f"fd77::{number:x}"
        self.delivered: list[bytes] = []
        self._far = -1
        self._closing: list[Callable[[], None]] = []
        if network is SECOND:
            self.mac = f"52:54:00:4e:00:{number:02x}"
            self.port = type(self.port)(f"other-{number}-port")
        self.namespace = f"nlt-{stage}-{network.vni}-{number}"
        self.device = self._build()

    def _build(self) -> int:
        """The server's own end."""
        _run("ip", "netns", "add", self.namespace)

        def made() -> int:
            Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
            fd = tap.open_tap("eth0")
            lines = (
                f"link set eth0 address {self.mac}",
                "link set lo up",
                "link set eth0 mtu 1500 up",
                f"addr add {self.ip}/24 dev eth0",
                f"addr add {self.ip6}/64 dev eth0 nodad",
            )
            text = "".join(f"{line}\n" for line in lines)
            subprocess.run(("ip", "-batch", "-"), input=text, text=True, check=True, timeout=10)
            return fd

        return topology.within(self.namespace, made)

    def run_at(self, fd: int) -> None:
        self.stop()
        self._far = fd
        self._start(lambda: self._relay(fd))

    def _relay(self, fd: int) -> None:
        while not self._stop.is_set():
            for ready in select.select([fd, self.device], [], [], 0.02)[0]:
                frame = os.read(ready, 1 << 17)
                if ready == fd:
                    self.delivered.append(frame[HEADER:])
                with contextlib.suppress(OSError):
                    os.write(self.device if ready == fd else fd, frame)

    def say(self, frame: bytes) -> None:
        """Whatever its stack thinks."""
        os.write(self._far, bytes(HEADER) + frame)

    def got(self, marker: bytes) -> bool:
        return any(marker in frame for frame in tuple(self.delivered))

    # --- what its applications do --------------------------------------------------------------------

    def endpoint(self, kind: socket.SocketKind, family: Family = Family.IPV4) -> socket.socket:
        af = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
        return topology.within(self.namespace, lambda: socket.socket(af, kind))

    def address(self, family: Family) -> str:
        return self.ip if family is Family.IPV4 else self.ip6

    def serve(self, *ports: int) -> None:
        """Answers on TCP with what it is sent, and on UDP, in both families."""
        for port in ports:
            for family in Family:
                listening = self.endpoint(socket.SOCK_STREAM, family)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind((self.address(family), port))
                listening.listen(16)
                self._thread(listening, self._accept)
                datagrams = self.endpoint(socket.SOCK_DGRAM, family)
                datagrams.bind((self.address(family), port))
                self._thread(datagrams, self._answer)

    def _thread(self, sock: socket.socket, act: Callable[[socket.socket], None]) -> None:
        sock.settimeout(0.1)
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    act(sock)

        thread = threading.Thread(target=run, name="server")
        thread.start()

        def close() -> None:
            ended.set()
            thread.join(5)
            sock.close()

        self._closing.append(close)

    def _accept(self, listening: socket.socket) -> None:
        accepted, _ = listening.accept()
        self._thread(accepted, _echo)

    def _answer(self, datagrams: socket.socket) -> None:
        data, sender = datagrams.recvfrom(1 << 16)
        datagrams.sendto(data, sender)

    def connect(self, to: "Box", port: int, family: Family = Family.IPV4) -> socket.socket:
        made = self.endpoint(socket.SOCK_STREAM, family)
        made.settimeout(0.4)
        try:
            made.connect((to.address(family), port))
        except OSError:
            made.close()
            raise
        return made

    def tcp(self, to: "Box", port: int, family: Family = Family.IPV4) -> bool:
        try:
            with self.connect(to, port, family) as made:
                return echoes(made)
        except OSError:
            return False

    def udp(self, to: "Box", port: int, family: Family = Family.IPV4, size: int = 10) -> bool:
        data = os.urandom(size)
        with self.endpoint(socket.SOCK_DGRAM, family) as sock:
            sock.settimeout(0.3)
            sock.sendto(data, (to.address(family), port))
            try:
                return sock.recv(1 << 16) == data
            except TimeoutError:
                return False

    def ask(self, to: "Box", port: int, family: Family = Family.IPV4) -> socket.socket:
        """One datagram of a flow of its own; see `heard`."""
        sock = self.endpoint(socket.SOCK_DGRAM, family)
        sock.sendto(b"anybody?", (to.address(family), port))
        return sock

    def ping(self, to: "Box", family: Family = Family.IPV4) -> bool:
        """By a raw socket; only its own answer counts."""
        four = family is Family.IPV4
        af, protocol = (socket.AF_INET, socket.IPPROTO_ICMP) if four else (socket.AF_INET6, 58)
        body = struct.pack("!BBHHH", 8 if four else 128, 0, 0, os.getpid() & 0xFFFF, 1) + os.urandom(8)
        if four:
            body = body[:2] + struct.pack("!H", internet_checksum(body)) + body[4:]
        with topology.within(self.namespace, lambda: socket.socket(af, socket.SOCK_RAW, protocol)) as sock:
            sock.sendto(body, (to.address(family), 0))
            deadline = time.monotonic() + 0.3
            while (left := deadline - time.monotonic()) > 0:
                sock.settimeout(left)
                try:
                    answer = sock.recv(200)
                except TimeoutError:
                    return False
                if answer.endswith(body[8:]) and answer[20 if four else 0] in (0, 129):
                    return True
        return False

    def close(self) -> None:
        for close in reversed(self._closing):
            close()
        self.stop()
        os.close(self.device)
        _run("ip", "netns", "del", self.namespace)


def _echo(accepted: socket.socket) -> None:
    data = accepted.recv(1 << 16)
    if not data:
        time.sleep(0.05)
        return
    accepted.sendall(data)


def heard(asked: socket.socket) -> bool:
    """The answer to `Box.ask` has come, or comes now."""
    asked.settimeout(0.3)
    with asked:
        try:
            return bool(asked.recv(1 << 16))
        except TimeoutError:
            return False


def echoes(made: socket.socket) -> bool:
    """A connection that is up carries a line there and back."""
    line = os.urandom(12)
    try:
        made.sendall(line)
        found = b""
        while len(found) < len(line):
            found += made.recv(100) or b"\0" * len(line)
    except OSError:
        return False
    return found == line


class Stage(Cloud):
    """Two hosts, servers in groups, two networks that have the same addresses."""

    def __init__(self, folder: Path, hosts: int = 2) -> None:
        super().__init__(folder, hosts)
        self.groups: list[SecurityGroupSpec] = []
        self.boxes: list[Box] = []

    def box(self, number: int, host: str, *groups: str, network: NetworkSpec = FIRST) -> Box:
        box = Box(number, groups, network, f"fw{os.getpid() % 10000}")
        self.boxes.append(box)
        self.guests[box.port], self.places[box.port] = box, host
        return box

    def port(self, guest: Guest) -> PortConfig:
        assert isinstance(guest, Box)
        return msgspec.structs.replace(
            super().port(guest),
            addresses=(guest.ip6,),
            security_groups=guest.groups,
            allowed_pairs=guest.pairs,
        )

    def network_of(self, spec: NetworkSpec) -> NetworkConfig:
        whole = super().network
        ports = tuple(self.port(box) for box in self.boxes if box.network is spec)
        return msgspec.structs.replace(whole, spec=spec, ports=ports)

    @property
    def network(self) -> NetworkConfig:
        return self.network_of(FIRST)

    def config(self, host: str, *, networks: bool = True) -> HostConfig:
        found = super().config(host, networks=networks)
        specs = [FIRST, *({SECOND} if any(b.network is SECOND for b in self.boxes) else ())]
        return msgspec.structs.replace(
            found,
            networks=tuple(self.network_of(s) for s in specs) if networks else (),
            security_groups=tuple(self.groups),
        )

    async def boot(self, guest: Guest) -> None:
        assert isinstance(guest, Box)
        host = self.hosts[self.places[guest.port]]
        port, network = self.port(guest), self.network_of(guest.network)
        await host.call(lambda d: d.port_create(port, network, deliver=True))
        guest.run_at(self.fd(guest, host.name))

    async def opened(self) -> None:
        """All that are on the stage run, and nothing is different from what was asked for."""
        await self.converge()
        for box in self.boxes:
            await self.boot(box)
        await self.converge()
        assert await self.converge() == {A: (), B: ()}

    async def converge(self) -> dict[str, tuple[str, ...]]:
        """The hosts that run servers."""
        return {name: await self.reconcile(name) for name in (A, B)}

    def nft(self, host: str, *arguments: str) -> str:
        return self.hosts[host].command("nft", *arguments)

    async def move(
        self,
        box: Box,
        to: str,
        *,
        during: Callable[[], None] = lambda: None,
        stopping: Callable[[], None] = lambda: None,
        runs: Callable[[], None] = lambda: None,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        """As two agents do it, with what is remembered of connections. `stopping`: the path leads to the new
        host, and it still runs at the old one; `during`: it is nowhere; `runs`: at the new host, and the old
        one has not heard of it; `arrived`: it runs, and the old host still has its tap."""
        source, port, network = self.places[box.port], self.port(box), self.network_of(box.network)
        here, there = self.hosts[source], self.hosts[to]
        await there.call(lambda d: d.port_create(port, network, deliver=False))
        await there.call(
            lambda d: d.move_prepare(port, network, MoveRole.DESTINATION, here.node.address, marked=True)
        )
        await here.call(
            lambda d: d.move_prepare(port, network, MoveRole.SOURCE, there.node.address, marked=True)
        )
        state = await here.call(lambda d: d.move_state_begin(port.id))
        await there.call(lambda d: d.move_state_load(port.id, state))
        await there.call(lambda d: d.move_switch(port, network, MoveRole.DESTINATION))
        await here.call(lambda d: d.move_switch(port, network, MoveRole.SOURCE))
        await here.call(lambda d: d.move_drain(port.id, timeout=1.0))
        stopping()
        box.stop()
        last = await here.call(lambda d: d.move_state_changes(port.id))
        if last:
            await there.call(lambda d: d.move_state_load(port.id, last))
        during()
        box.run_at(self.fd(box, to))
        runs()
        await there.call(lambda d: d.move_settle(port, network, MoveRole.DESTINATION))
        await here.call(lambda d: d.move_commit(port, network))
        arrived()
        await here.call(lambda d: d.move_settle(port, network, MoveRole.SOURCE))
        self.places[box.port] = to
        self.reflect[source].add(box.port)

    def close(self) -> None:
        for box in self.boxes:
            box.close()
        super().close()


@contextlib.contextmanager
def downloading(client: Box, server: Box, port: int) -> Iterator["Download"]:
    download = Download(client.connect(server, port))
    try:
        yield download
    finally:
        download.close()


class Download:
    """A connection in the middle of its work: bytes are sent and come back all the time."""

    def __init__(self, made: socket.socket) -> None:
        self._socket = made
        made.settimeout(0.05)
        self.received = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=act, name="download") for act in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError):
                self._socket.send(bytes(1000))
            time.sleep(0.001)

    def _receive(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError):
                self.received += len(self._socket.recv(1 << 16))

    def proceeds(self, seconds: float = 0.5) -> bool:
        """Whether anything comes back within that time."""
        before, deadline = self.received, time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.received > before:
                return True
            time.sleep(0.005)
        return False

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(5)
        self._socket.close()


# --- frames by hand ----------------------------------------------------------------------------------


def packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(to: str, sender: str, kind: int, body: bytes) -> bytes:
    return packed(to) + packed(sender) + struct.pack("!H", kind) + body


def ipv4(source: str, destination: str, protocol: int, body: bytes) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + ends
    return header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:] + body


def ipv6(source: str, destination: str, protocol: int, body: bytes) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    return struct.pack("!IHBB", 6 << 28, len(body), protocol, 255) + ends + body


def udp(source: int, destination: int, body: bytes) -> bytes:
    return struct.pack("!HHHH", source, destination, 8 + len(body), 0) + body


def tcp_ack(source: str, destination: str, ports: tuple[int, int], body: bytes) -> bytes:
    """A segment from the middle of a connection that never was, with a checksum that is right."""
    segment = struct.pack("!HHIIBBHHH", *ports, 12345, 54321, 0x50, 0x18, 1000, 0, 0) + body
    pseudo = socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack("!HH", 6, len(segment))
    whole = pseudo + segment + bytes(len(segment) % 2)
    return segment[:16] + struct.pack("!H", internet_checksum(whole)) + segment[18:]


def arp(operation: int, mac: str, ip: str, target: str) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return head + packed(mac) + socket.inet_aton(ip) + bytes(6) + socket.inet_aton(target) + bytes(18)


def icmpv6(source: str, destination: str, body: bytes) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    total = internet_checksum(ends + struct.pack("!II", len(body), 58) + body + bytes(len(body) % 2))
    return ipv6(source, destination, 58, body[:2] + struct.pack("!H", total) + body[4:])


def advertisement(target: str, mac: str | None, flags: int = 0x20000000) -> bytes:
    """ND: `target` is at `mac`."""
    option = b"\x02\x01" + packed(mac) if mac else b""
    return struct.pack("!BBHI", 136, 0, 0, flags) + socket.inet_pton(socket.AF_INET6, target) + option


def solicitation(target: str, mac: str | None) -> bytes:
    option = b"\x01\x01" + packed(mac) if mac else b""
    return struct.pack("!BBHI", 135, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, target) + option


def router_advertisement() -> bytes:
    return struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=10)
