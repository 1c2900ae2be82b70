"""What servers are told about their addresses, by real packets: real clients behind real taps.

A client is a namespace of its own with the kernel's IPv6, a tap with the port's MAC, and two threads that
carry frames between it and the port's tap, as a VMM would.
"""

import asyncio
import contextlib
import http.client
import json
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from network_namespaces import Host, missing_programs

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, RouterConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import (
    HostId,
    NetworkId,
    PortId,
    ProjectId,
    RouterId,
    SecurityGroupId,
    ServerId,
    SubnetId,
)
from nahtlos.model.networking import NetworkSpec, RouterInterface, RouterSpec, SecurityGroupSpec, SubnetSpec
from nahtlos.physical.network import tap
from nahtlos.physical.network.device_names import anycast_mac
from nahtlos.physical.network.routing.plan import router_mac
from nahtlos.physical.network.services.addressing import dhcp_hosts, dns_names, link_local, made_of_mac
from nahtlos.physical.ports import NetworkDesired

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
    pytest.mark.skipif(not Path("/usr/bin/busybox").exists(), reason="busybox is not installed"),
]
A, B = "host-1", "host-2"
PREFIX = "fd00:77::/64"
SECOND_RANGE = "10.78.0.0/24"
TUNSETIFF = 0x400454CA

T = TypeVar("T")


def network_spec(name: str, vni: int, **other: object) -> NetworkSpec:
    given: dict[str, object] = {
        "cidr": "10.77.0.0/24",
        "gateway_ip": "10.77.0.1",
        "gateway_mac": "",
        "gateway_host": HostId(""),
        "dhcp_ip": "10.77.0.2",
        **other,
    }
    return NetworkSpec(id=NetworkId(name), vni=vni, **given)  # type: ignore[arg-type]


def subnet(network: str, cidr: str, **other: object) -> SubnetSpec:
    return SubnetSpec(id=SubnetId(f"{network}-{len(cidr)}"), network=NetworkId(network), cidr=cidr, **other)  # type: ignore[arg-type]


RED = network_spec(
    "red",
    100,
    mtu=1450,
    project=ProjectId("reds"),
    subnets=(subnet("red", PREFIX), subnet("red", SECOND_RANGE, gateway_ip="10.78.0.1")),
)
BLUE = network_spec("blue", 200, mtu=1400, gateway_ip="", subnets=(subnet("blue", PREFIX),))
RED_SERVICE = made_of_mac(PREFIX, anycast_mac(100))
ALL_DHCP_SERVERS = "ff02::1:2"
ROUTER, STRICT = 7, SecurityGroupId("strict")


class Client:
    """A server's operating system: `run` and `within` act inside it."""

    def __init__(self, name: str, mac: str, mtu: int, port_tap: int) -> None:
        self.namespace = f"nlt-addr{os.getpid() % 10000}-{name}"
        self.mac = mac
        subprocess.run(["ip", "netns", "add", self.namespace], check=True, timeout=10)
        self._tap = topology.within(self.namespace, lambda: tap.open_tap("eth0"))
        self._port_tap = os.dup(port_tap)
        self._stop = threading.Event()
        self._pumps = [
            threading.Thread(target=self._pump, args=pair)
            for pair in ((self._port_tap, self._tap), (self._tap, self._port_tap))
        ]
        for pump in self._pumps:
            pump.start()
        self.run("ip", "link", "set", "eth0", "address", mac, "mtu", str(mtu))
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "up")

    def _pump(self, source: int, target: int) -> None:
        while not self._stop.is_set():
            if select.select([source], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.write(target, os.read(source, 1 << 17))

    def run(self, *argv: str) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, *argv],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def within(self, act: Callable[[], T]) -> T:
        return topology.within(self.namespace, act)

    def close(self) -> None:
        self._stop.set()
        for pump in self._pumps:
            pump.join(5)
        os.close(self._tap)
        os.close(self._port_tap)
        subprocess.run(["ip", "netns", "del", self.namespace], check=False, timeout=10)

    # --- asking ---

    def lease(self, folder: Path) -> dict[str, str]:
        """What a real DHCP client is given."""
        script = folder / f"{self.namespace}.sh"
        script.write_text(f"#!/bin/sh\n[ $1 = bound ] && env > {folder}/{self.namespace}.env; exit 0\n")
        script.chmod(0o755)
        self.run(
            *("busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "5", "-T", "1", "-s", str(script)),
            *("-O", "mtu", "-O", "121", "-O", "dns", "-O", "domain", "-O", "router"),
        )
        text = (folder / f"{self.namespace}.env").read_text()
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def use(self, lease: dict[str, str]) -> None:
        self.run("ip", "addr", "replace", f"{lease['ip']}/{lease['mask']}", "dev", "eth0")
        routes = lease["staticroutes"].split()
        for destination, by in zip(routes[::2], routes[1::2], strict=True):
            way = ["scope", "link"] if by == "0.0.0.0" else ["via", by]
            self.run("ip", "route", "replace", destination, *way, "dev", "eth0")

    def ask(self, name: str, kind: int, server: str) -> tuple[int, list[str]]:
        """DNS: the answer's code, and addresses or names."""
        return self.within(lambda: dns_question(name, kind, server))

    def get(self, path: str, server: str = "169.254.169.254") -> tuple[int, str]:
        def act() -> tuple[int, str]:
            connection = http.client.HTTPConnection(server, 80, timeout=5)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            finally:
                connection.close()

        return self.within(act)

    def dhcpv6(self, kind: int, *options: bytes) -> dict[int, bytes]:
        """Options of what a DHCPv6 server answers to a message of this kind."""
        identity = struct.pack("!HHHH", 1, 10, 3, 1) + bytes.fromhex(self.mac.replace(":", ""))
        message = struct.pack("!I", kind << 24 | 0x4E41) + b"".join((identity, *options))

        def act() -> bytes:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as asking:
                scope = socket.if_nametoindex("eth0")
                asking.bind(("::", 546, 0, 0))
                asking.settimeout(1)
                for _ in range(5):
                    asking.sendto(message, (ALL_DHCP_SERVERS, 547, 0, scope))
                    with contextlib.suppress(TimeoutError):
                        return asking.recv(1500)
            raise TimeoutError("no DHCPv6 server answers")

        return dhcpv6_options(self.within(act)[4:])

    def ipv6(self) -> dict[str, str]:
        """Usable addresses by scope and origin, from the kernel."""
        found = json.loads(self.run("ip", "-json", "-6", "addr", "show", "dev", "eth0"))
        return {a["local"]: "tentative" if a.get("tentative") else a["scope"] for a in found[0]["addr_info"]}


SOLICIT, INFORMATION_REQUEST, IA_NA, IA_ADDRESS, REQUESTED, DNS_SERVERS = 1, 11, 3, 5, 6, 23


def dhcpv6_options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        kind, length = struct.unpack_from("!HH", data)
        found[kind] = data[4 : 4 + length]
        data = data[4 + length :]
    return found


A_RECORD, PTR, AAAA = 1, 12, 28
REFUSED, NO_SUCH_NAME = 5, 3


def dns_question(name: str, kind: int, server: str) -> tuple[int, list[str]]:
    labels = b"".join(bytes((len(part),)) + part.encode() for part in name.split("."))
    query = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + struct.pack("!BHH", 0, kind, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.settimeout(1)
        for _ in range(5):
            asking.sendto(query, (server, 53))
            with contextlib.suppress(TimeoutError):
                return _answers(asking.recv(1500), len(query))
    raise TimeoutError(f"{server} does not answer")


def _answers(data: bytes, offset: int) -> tuple[int, list[str]]:
    code, count = data[3] & 15, struct.unpack_from("!H", data, 6)[0]
    found: list[str] = []
    for _ in range(count):
        kind, _, _, length = struct.unpack_from("!HHIH", data, offset + 2)
        value = data[offset + 12 : offset + 12 + length]
        found.append(_value(kind, value))
        offset += 12 + length
    return code, sorted(found)


def _value(kind: int, value: bytes) -> str:
    if kind in (A_RECORD, AAAA):
        return socket.inet_ntop(socket.AF_INET if kind == A_RECORD else socket.AF_INET6, value)
    parts: list[str] = []
    while value and value[0] and value[0] < 64:
        parts.append(value[1 : 1 + value[0]].decode())
        value = value[1 + value[0] :]
    return ".".join(parts)


class Site:
    """Two hosts with the driver, networks on both, and clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lab = f"nlt-ad{os.getpid() % 10000}"
        self.topology = topology.create(self.lab, 2)
        self.hosts = {node.name: Host(node, folder) for node in self.topology.hosts}
        self.ports: dict[str, list[PortConfig]] = {}
        self.specs = {"red": RED, "blue": BLUE}
        self.clients: list[Client] = []
        self.routers: tuple[RouterConfig, ...] = ()
        self.generation = 0

    def port(self, network: str, number: int, host: str = A, **other: object) -> PortConfig:
        spec, mac = self.specs[network], f"52:54:00:{self.specs[network].vni % 256:02x}:00:{number:02x}"
        port = PortConfig(
            id=PortId(f"{network}-{number}"),
            mac=mac,
            host=HostId(host),
            vtep=self.hosts[host].node.address,
            **{
                "server": ServerId(f"web-{number}"),
                "ip": f"10.77.0.{number}",
                "addresses": (made_of_mac(PREFIX, mac),),
                **other,
            },  # type: ignore[arg-type]
        )
        self.ports.setdefault(spec.id, []).append(port)
        return port

    @property
    def networks(self) -> tuple[NetworkConfig, ...]:
        vteps = tuple(host.node.address for host in self.hosts.values())
        return tuple(
            NetworkConfig(spec=self.specs[name], ports=tuple(ports), gateway_vtep="", vteps=vteps)
            for name, ports in self.ports.items()
        )

    async def reconcile(self, host: str = A, *, networks: bool = True) -> tuple[str, ...]:
        self.generation += 1
        config = HostConfig(
            host=HostId(host),
            generation=self.generation,
            release=None,
            networks=self.networks if networks else (),
            routers=self.routers if networks else (),
            security_groups=(SecurityGroupSpec(id=STRICT),),
        )
        return await self.hosts[host].call(lambda d: d.reconcile(NetworkDesired(config=config)))

    async def boot(self, port: PortConfig) -> Client:
        network = next(n for n in self.networks if port in n.ports)
        host = self.hosts[port.host]
        await host.call(lambda d: d.port_create(port, network, deliver=True))
        fd = host.supervisor.fds[f"tap.{port.id}"]
        client = await asyncio.to_thread(Client, port.id, port.mac, network.spec.mtu, fd)
        self.clients.append(client)
        return client

    def pid(self, unit: str, host: str = A) -> int:
        return self.hosts[host].supervisor.processes[unit].pid

    def log(self, unit: str, host: str = A) -> str:
        return (self.hosts[host].settings.state_dir / "log" / f"{unit}.log").read_text()

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for host in self.hosts.values():
            host.close()
        topology.destroy(self.lab)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    try:
        yield site
    finally:
        await asyncio.to_thread(site.close)


async def opened(site: Site, *ports: PortConfig) -> list[Client]:
    for host in site.hosts:
        await site.reconcile(host)
    return [await site.boot(port) for port in ports]


async def until(what: str, true: Callable[[], Awaitable[bool] | bool], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        found = true()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


async def test_a_server_of_each_ipv4_subnet_learns_all_about_itself(site: Site) -> None:
    first, far, second = (
        site.port("red", 10),
        site.port("red", 11, B),
        site.port("red", 12, ip="10.78.0.12"),
    )
    here, there, other = await opened(site, first, far, second)
    leases = [await asyncio.to_thread(c.lease, site.folder) for c in (here, there, other)]
    assert [lease["ip"] for lease in leases] == [first.ip, far.ip, second.ip]
    assert {(lease["mtu"], lease["mask"], lease["domain"]) for lease in leases} == {
        ("1450", "24", "red.internal")
    }
    assert [lease["router"] for lease in leases] == ["10.77.0.1", "10.77.0.1", "10.78.0.1"]
    for client, lease in zip((here, there, other), leases, strict=True):
        client.use(lease)
    for client in (here, there, other):
        assert client.ask("web-11", A_RECORD, lease["dns"]) == (0, [far.ip])
        assert client.ask("web-12.red.internal", AAAA, lease["dns"]) == (0, list(second.addresses))
        assert client.ask("10.0.77.10.in-addr.arpa", PTR, lease["dns"]) == (0, ["web-10.red.internal"])
        assert client.ask("nobody.red.internal", A_RECORD, lease["dns"]) == (NO_SUCH_NAME, [])
        assert client.ask("99.0.77.10.in-addr.arpa", PTR, lease["dns"]) == (NO_SUCH_NAME, [])
        assert client.ask("example.org", A_RECORD, lease["dns"]) == (REFUSED, []), "nobody else is asked"
    names = [c.get("/latest/meta-data/instance-id") for c in (here, there, other)]
    assert names == [(200, "web-10"), (200, "web-11"), (200, "web-12")]
    assert here.get("/latest/meta-data/local-ipv4") == (200, "10.77.0.10")
    assert here.get("/latest/user-data")[0] == 404
    assert json.loads(here.get("/nocloud/meta-data")[1])["local-hostname"] == "web-10"
    config = json.loads(here.get("/nocloud/network-config")[1])
    assert config["ethernets"]["nic0"]["addresses"] == ["10.77.0.10/24", f"{first.addresses[0]}/64"]
    for host, strangers in ((A, [far]), (B, [first, second])):
        assert not [p for p in strangers if p.mac in site.log("dnsmasq.red", host)], (
            "only the own host answers"
        )


async def test_ipv6_by_advertisement_and_by_dhcp(site: Site) -> None:
    port = site.port("red", 10)
    fixed = site.port("red", 13, addresses=("fd00:77::13",))
    client, told = await opened(site, port, fixed)
    await until("an address made of the MAC", lambda: client.ipv6().get(port.addresses[0]) == "global")
    assert set(client.ipv6()) == {port.addresses[0], link_local(port.mac)}
    assert client.run("cat", "/proc/sys/net/ipv6/conf/eth0/mtu").strip() == "1450"
    assert "default" not in client.run("ip", "-6", "route"), "the services are no router"
    assert client.ask("web-13", AAAA, RED_SERVICE) == (0, ["fd00:77::13"])
    assert client.get("/latest/meta-data/ipv6", "fe80::a9fe:a9fe%eth0") == (200, port.addresses[0])
    wish = struct.pack("!HHH", REQUESTED, 2, DNS_SERVERS)
    stateless = client.dhcpv6(INFORMATION_REQUEST, wish)
    assert socket.inet_ntop(socket.AF_INET6, stateless[DNS_SERVERS]) == RED_SERVICE
    await until("an address to ask from", lambda: told.ipv6().get(link_local(fixed.mac)) == "link")
    offered = told.dhcpv6(SOLICIT, struct.pack("!HHIII", IA_NA, 12, 1, 0, 0))
    address = dhcpv6_options(offered[IA_NA][12:])[IA_ADDRESS]
    assert socket.inet_ntop(socket.AF_INET6, address[:16]) == "fd00:77::13"
    assert "SOLICIT" in site.log("dnsmasq.red")
    assert "SOLICIT" not in site.log("dnsmasq.red", B), "only the own host answers"


async def test_networks_with_the_same_addresses_get_their_own_answers(site: Site) -> None:
    red, blue = site.port("red", 10), site.port("blue", 10, server=ServerId("db-10"))
    site.port("blue", 11, server=ServerId("db-11"))
    clients = await opened(site, red, blue)
    for client in clients:
        client.use(await asyncio.to_thread(client.lease, site.folder))
    assert [c.get("/latest/meta-data/hostname") for c in clients] == [(200, "web-10"), (200, "db-10")]
    assert [c.ask("db-11", A_RECORD, "10.77.0.2") for c in clients] == [(REFUSED, []), (0, ["10.77.0.11"])]
    foreign = [c.ask("db-10.blue.internal", A_RECORD, "10.77.0.2")[0] for c in clients]
    assert foreign == [REFUSED, 0]
    assert [c.get("/latest/network-config")[1].count("macaddress") for c in clients] == [1, 1]


async def test_tenants_may_use_the_addresses_of_hosts(site: Site) -> None:
    underlay = site.hosts[B].node.address
    spec = network_spec("blue", 200, cidr="10.99.0.0/24", gateway_ip="", dhcp_ip=underlay)
    site.specs["blue"] = spec
    port = site.port("blue", 11, ip=site.hosts[A].node.address, addresses=())
    (client,) = await opened(site, port)
    client.use(await asyncio.to_thread(client.lease, site.folder))
    assert client.ask("web-11", A_RECORD, underlay) == (0, [port.ip])
    site.hosts[A].command("busybox", "ping", "-c", "1", "-W", "2", underlay)
    with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
        client.within(lambda: socket.create_connection((port.ip.replace(".11", ".1"), 22), 0.3))


async def test_a_change_of_ports_restarts_nothing(site: Site) -> None:
    (client,) = await opened(site, site.port("red", 10))
    client.use(await asyncio.to_thread(client.lease, site.folder))
    units = {unit: site.pid(unit) for unit in ("dnsmasq.red", "metadata.red")}
    assert client.ask("web-11.red.internal", A_RECORD, "10.77.0.2")[0] == NO_SUCH_NAME
    late = site.port("red", 11)
    files = site.hosts[A].settings.run_dir / "dhcp"
    (files / "red.hosts").write_text(dhcp_hosts(site.networks[0], "30d"))
    (files / "red.names").write_text(dns_names(site.networks[0]))
    site.hosts[A].restart_agent()  # it died after writing them, before it could say so to anybody
    assert await site.reconcile() == ()
    other = await site.boot(late)
    lease = await asyncio.to_thread(other.lease, site.folder)
    other.use(lease)
    assert lease["ip"] == late.ip
    assert client.ask("web-11.red.internal", A_RECORD, "10.77.0.2") == (0, [late.ip])
    assert other.get("/latest/meta-data/instance-id") == (200, "web-11")
    assert await site.reconcile() == ()
    assert {unit: site.pid(unit) for unit in units} == units


async def answers(client: Client) -> bool:
    with contextlib.suppress(OSError):
        name = await asyncio.to_thread(client.ask, "web-10", A_RECORD, "10.77.0.2")
        return name[0] == 0 and (await asyncio.to_thread(client.get, "/latest"))[0] == 200
    return False


async def test_what_was_broken_is_put_right(site: Site) -> None:
    (client,) = await opened(site, site.port("red", 10))
    client.use(await asyncio.to_thread(client.lease, site.folder))
    await until("answers", lambda: answers(client))
    host = site.hosts[A]
    for unit in ("dnsmasq.red", "metadata.red"):
        host.supervisor.processes[unit].kill()
        host.supervisor.processes[unit].wait()
    assert len(await site.reconcile()) == 2, "both are named"
    await until("answers after programs were killed", lambda: answers(client))
    running = site.pid("dnsmasq.red")
    await host.supervisor.drop_fd("netns.red")
    host.restart_agent()
    assert await site.reconcile() == ()
    assert site.pid("dnsmasq.red") == running, "the namespace is found by what runs in it"
    host.command("ip", "link", "del", "sv100")
    await site.reconcile()
    await until("answers after the device was deleted", lambda: answers(client))
    host.command("ip", "-6", "neigh", "del", "fe80::a9fe:a9fe", "dev", "br100")
    assert [w for w in await site.reconcile() if "fe80::a9fe:a9fe" in w]
    assert await site.reconcile() == ()
    await site.reconcile(networks=False)
    assert await host.supervisor.units() == {}
    assert not [name for name in await host.supervisor.stored() if name.startswith("netns.")]
    assert not [name for name in host.links() if name.startswith("sv")]


async def test_a_network_too_large_for_the_underlay_is_refused_and_the_rest_is_served(site: Site) -> None:
    site.specs["blue"] = network_spec("blue", 200, mtu=1551)
    red, blue = site.port("red", 10), site.port("blue", 10, addresses=())
    with pytest.raises(Refused, match="1551") as refused:
        await site.reconcile()
    assert (refused.value.field, "1550" in refused.value.remedy) == ("mtu", True)
    client = await site.boot(red)
    assert (await asyncio.to_thread(client.lease, site.folder))["ip"] == red.ip
    with pytest.raises(Refused, match="1551"):
        await site.boot(blue)
    site.specs["blue"] = network_spec("blue", 200, mtu=1550)
    await site.reconcile()
    assert await site.reconcile() == ()


async def test_routers_are_advertised_and_withdrawn(site: Site) -> None:
    port = site.port("red", 10)
    interface = RouterInterface(subnet=RED.subnets[0].id, network=RED.id, ip="fd00:77::1")
    router = RouterSpec(id=RouterId("r"), number=ROUTER, interfaces=(interface,))
    site.routers = (RouterConfig(spec=router),)
    (client,) = await opened(site, port)
    by = link_local(router_mac(ROUTER))
    await until("a default route", lambda: f"default via {by}" in client.run("ip", "-6", "route"))
    site.routers = ()
    await site.reconcile()
    await until("no default route", lambda: "default" not in client.run("ip", "-6", "route"))


async def test_a_group_that_allows_nothing_does_not_keep_a_server_from_its_network(site: Site) -> None:
    closed, other = site.port("red", 10, security_groups=(STRICT,)), site.port("red", 11)
    client, open_ = await opened(site, closed, other)
    for one in (client, open_):
        one.use(await asyncio.to_thread(one.lease, site.folder))
    await until("an address made of the MAC", lambda: client.ipv6().get(closed.addresses[0]) == "global")
    assert client.ask("web-11", A_RECORD, "10.77.0.2") == (0, [other.ip])
    assert client.ask("web-11", AAAA, RED_SERVICE) == (0, list(other.addresses))
    assert client.get("/latest/meta-data/instance-id") == (200, "web-10")
    with pytest.raises(AssertionError):
        client.run("busybox", "ping", "-c", "1", "-W", "1", other.ip)


def received(client: Client, size: int) -> Callable[[], int]:
    """Listens for one datagram; the length of what came within a few seconds."""
    found: list[int] = []

    def listen(listener: socket.socket) -> None:
        with listener, contextlib.suppress(TimeoutError):
            found.append(len(listener.recv(size + 1)))

    listener = client.within(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    listener.settimeout(4)
    listener.bind(("::", 9000))
    thread = threading.Thread(target=listen, args=(listener,))
    thread.start()

    def result() -> int:
        thread.join()
        return sum(found)

    return result


def send_whole(client: Client, to: str, size: int) -> None:
    """One datagram that may not be cut into pieces."""

    def act() -> None:
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sending:
            if family == socket.AF_INET:
                sending.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: never fragment
            else:
                sending.setsockopt(socket.IPPROTO_IPV6, 62, 1)  # IPV6_DONTFRAG
            sending.sendto(bytes(size), (to, 9000))

    client.within(act)


async def test_jumbo_frames_pass_where_the_underlay_lets_them(site: Site) -> None:
    for node in (site.topology.switch, *site.topology.hosts):
        links_of = ["sw0", "p-host-1", "p-host-2"] if node is site.topology.switch else ["eth0"]
        for link in links_of:
            subprocess.run([*node.enter, "ip", "link", "set", link, "mtu", "9050"], check=True, timeout=5)
    site.specs["red"] = network_spec("red", 100, mtu=9000, subnets=(subnet("red", PREFIX),))
    near, far = site.port("red", 10), site.port("red", 11, B)
    clients = await opened(site, near, far)
    for client, port in zip(clients, (near, far), strict=True):
        lease = await asyncio.to_thread(client.lease, site.folder)
        assert lease["mtu"] == "9000"
        client.use(lease)
        await until("an address", lambda c=client, p=port: c.ipv6().get(p.addresses[0]) == "global")
    for to, size in ((far.ip, 9000 - 28), (far.addresses[0], 9000 - 48)):
        listening = received(clients[1], size)
        send_whole(clients[0], to, size)
        assert await asyncio.to_thread(listening) == size
    with pytest.raises(OSError, match="too long"):
        send_whole(clients[0], far.ip, 9000 - 27)


async def test_neighbours_of_ipv6_are_found_without_asking_other_hosts(site: Site) -> None:
    near, far = site.port("red", 10), site.port("red", 11, B)
    here, there = await opened(site, near, far)
    for client, port in ((here, near), (there, far)):
        await until("an address", lambda c=client, p=port: c.ipv6().get(p.addresses[0]) == "global")
    sniffer = there.within(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x86DD)))
    with sniffer:
        sniffer.setblocking(False)
        here.run("busybox", "ping6", "-c", "1", "-W", "2", far.addresses[0])
        frames: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(sniffer.recv(2000))
    kinds = [f[54] for f in frames if f[20] == 58 and f[6:12].hex(":") == near.mac]
    assert 128 in kinds, "the ping itself came"
    assert [f for f in frames if f[:2] == b"\x33\x33" and f[54] == 135 and f[6:12].hex(":") == near.mac] == []
    known = json.loads(here.run("ip", "-json", "-6", "neigh", "show", "to", far.addresses[0]))
    assert known[0]["lladdr"] == far.mac
