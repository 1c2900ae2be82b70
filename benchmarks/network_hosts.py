"""Hosts for the network's measures: a namespace each, and in it the real driver as its agent would hold it.

Owns the namespaces of one lab of its own and where its servers are. A supervisor is stood in for by a table
of descriptors and plain children, because nothing here outlives the run; there is no agent and no VMM.
"""

import asyncio
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, Uplink
from nahtlos.model.ids import HostId, NetworkId, PortId, SecurityGroupId, ServerId, SubnetId
from nahtlos.model.networking import NetworkSpec, SecurityGroupSpec, SubnetSpec
from nahtlos.model.nouns import HostRole, Size
from nahtlos.physical.network.native import NativeNetwork
from nahtlos.physical.ports import MoveRole, NetworkDesired, Unit, UnitStatus
from nahtlos.physical.settings import AgentSettings

T = TypeVar("T")
EDGE = "edge-1"
GATEWAY_IP, GATEWAY_MAC = "10.64.0.1", "02:00:00:4d:00:01"
CALL_SECONDS = 120.0

TENANT = NetworkSpec(
    id=NetworkId("tenant"),
    vni=100,
    cidr="10.64.0.0/16",
    gateway_ip=GATEWAY_IP,
    gateway_mac=GATEWAY_MAC,
    gateway_host=HostId(EDGE),
    dhcp_ip="10.64.0.2",
    subnets=(
        SubnetSpec(
            id=SubnetId("tenant-v6"),
            network=NetworkId("tenant"),
            cidr="fd00:64::/64",
            gateway_ip="fd00:64::1",
            dhcp=False,
        ),
    ),
)


OUTSIDE6 = {EDGE: "fd00:203::1", topology.CLIENT: "fd00:203::10"}


def outside_by_ipv6(cables: topology.Topology) -> None:
    """The lab's outside has IPv6, too: the client reaches everything by the edge."""
    for name, device in ((EDGE, "out0"), (topology.CLIENT, "eth0")):
        enter = cables.node(name).enter
        run(*enter, "sysctl", "-qw", f"net.ipv6.conf.{device}.disable_ipv6=0")
        run(*enter, "ip", "addr", "add", f"{OUTSIDE6[name]}/64", "dev", device, "nodad")
    run(*cables.client.enter, "ip", "-6", "route", "replace", "default", "via", OUTSIDE6[EDGE])


def missing_programs() -> str:
    """Why nothing of this can run here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    wanted = ("nft", "ip", "bridge", "dnsmasq", "nsenter")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return " ".join(f"{p} is not installed" for p in wanted if shutil.which(p, path=path) is None)


class Descriptors:
    """What the driver asks of a supervisor: descriptors by name, and units as plain children."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}
        self._units: dict[str, subprocess.Popen[bytes]] = {}

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
        if unit.name not in self._units:
            argv = list(unit.argv)
            for name in unit.fds:
                argv = [argument.replace(f"{{fd:{name}}}", str(self.fds[name])) for argument in argv]
            with unit.log.open("ab") as log:
                self._units[unit.name] = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **unit.environment},
                    stdout=log,
                    stderr=log,
                    pass_fds=[self.fds[name] for name in unit.fds],
                )
        return UnitStatus(name=unit.name, pid=self._units[unit.name].pid)

    async def stop(self, name: str, *, grace: float = 5.0) -> None:
        unit = self._units.pop(name, None)
        if unit is not None:
            unit.kill()
            unit.wait()

    async def units(self) -> dict[str, UnitStatus]:
        return {
            name: UnitStatus(name=name, pid=None if unit.poll() is not None else unit.pid)
            for name, unit in self._units.items()
        }

    async def listen_tcp(self, name: str, address: str, port: int) -> int:
        raise NotImplementedError("no listening sockets here")

    async def listen_unix(self, name: str, path: Path, *, mode: int) -> None:
        raise NotImplementedError("no listening sockets here")

    async def close(self) -> None:
        for name in list(self._units):
            await self.stop(name)
        for name in list(self.fds):
            await self.drop_fd(name)


class Host:
    """A thread with an event loop inside a host's namespace, and the driver."""

    def __init__(self, node: topology.Node, folder: Path) -> None:
        assert node.role is not None, f"{node.name} is no host"
        self.node, self.name = node, node.name
        self.supervisor = Descriptors()
        self.settings = _settings(node, node.role, folder / node.name)
        self.settings.run_dir.mkdir(parents=True)
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=node.name, daemon=True)
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
            async with asyncio.timeout(CALL_SECONDS):
                return await act(self.driver)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(inside(), self._loop))

    def command(self, *argv: str, text: str | None = None) -> str:
        return run(*self.node.enter, *argv, text=text)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.supervisor.close(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self.driver.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)


def _settings(node: topology.Node, role: HostRole, folder: Path) -> AgentSettings:
    folders = ("state_dir", "run_dir", "ram_dir", "releases_dir", "images_dir", "cache_dir", "pki_dir")
    return AgentSettings(
        host=HostId(node.name),
        role=role,
        address=node.address,
        peer_port=7444,
        orchestrator_address="10.99.0.1",
        orchestrator_port=7443,
        capacity=Size(),
        supervisor_socket=folder / "unused.sock",
        **{name: folder / name for name in folders},
    )


def run(*argv: str, text: str | None = None, seconds: float = 120.0) -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()[:400]}")
    return done.stdout


def server_port(number: int, groups: Iterable[SecurityGroupId] = ()) -> PortConfig:
    """Of server `number` (from 1), not placed yet: one IPv4 and one IPv6 address."""
    high, low = divmod(number + 9, 250)
    return PortConfig(
        id=PortId(f"server-{number}-port"),
        server=ServerId(f"server-{number}"),
        mac=f"52:54:00:4d:{high:02x}:{low:02x}",
        ip=f"10.64.{high + 1}.{low + 1}",
        addresses=(f"fd00:64::{number:x}:1",),
        security_groups=tuple(groups),
        host=HostId(""),
        vtep="",
    )


class World:
    """Hosts for servers, an edge, a client outside: all of them real as far as the kernel goes."""

    def __init__(self, hosts: int, *, spec: NetworkSpec = TENANT, name: str = "") -> None:
        self.lab = name or f"nlt-m{os.getpid() % 10000}"
        self.spec = spec
        # As on a real host, what a driver keeps until the next boot is in memory.
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="nlt-network-", dir=memory if memory.is_dir() else None))
        topology.destroy(self.lab)
        self.topology = topology.create(self.lab, hosts)
        outside_by_ipv6(self.topology)
        nodes = [node for node in self.topology.nodes if node.role is not None]
        self.hosts = {node.name: Host(node, self._folder) for node in nodes}
        self.groups: tuple[SecurityGroupSpec, ...] = ()
        self.reflect: dict[str, set[PortId]] = {name: set() for name in self.hosts}
        self._ports: dict[PortId, PortConfig] = {}
        self._generation = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.close()
        topology.destroy(self.lab)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def compute(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.settings.role is HostRole.COMPUTE]

    # --- what the orchestrator would say ---------------------------------------------------------------

    def place(self, port: PortConfig, host: str) -> PortConfig:
        placed = msgspec.structs.replace(port, host=HostId(host), vtep=self.hosts[host].node.address)
        self._ports[port.id] = placed
        return placed

    def members(self, group: SecurityGroupId) -> int:
        """Puts every port into `group`; returns how many there are."""
        for id_, port in self._ports.items():
            self._ports[id_] = msgspec.structs.replace(port, security_groups=(group,))
        return len(self._ports)

    def remove(self, port: PortId) -> None:
        del self._ports[port]

    def port(self, port: PortId) -> PortConfig:
        return self._ports[port]

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(
            spec=self.spec,
            ports=tuple(self._ports.values()),
            gateway_vtep=self.hosts[EDGE].node.address,
            vteps=tuple(host.node.address for host in self.hosts.values()),
        )

    def config(self, host: str) -> HostConfig:
        self._generation += 1
        edge = self.hosts[host].settings.role is HostRole.EDGE
        return HostConfig(
            host=HostId(host),
            generation=self._generation,
            release=None,
            networks=(self.network,),
            uplinks=(Uplink(network=self.spec.id, interface="out0"),) if edge else (),
            reflect=tuple(sorted(self.reflect[host])),
            security_groups=self.groups,
        )

    async def init(self) -> None:
        for host in self.hosts.values():
            await host.call(lambda d: d.host_init())
        await self.reconcile()

    async def reconcile(self, *pinned: PortId) -> dict[str, tuple[str, ...]]:
        """All hosts at once, as their agents would."""
        names = list(self.hosts)
        found = await asyncio.gather(*(self.reconcile_host(name, *pinned) for name in names))
        return dict(zip(names, found, strict=True))

    async def reconcile_host(self, name: str, *pinned: PortId) -> tuple[str, ...]:
        desired = NetworkDesired(config=self.config(name), pinned=frozenset(pinned))
        return await self.hosts[name].call(lambda d: d.reconcile(desired))

    # --- verbs -------------------------------------------------------------------------------------------

    async def create(self, port: PortId, host: str, *, deliver: bool) -> int:
        """Its tap at `host`; returns the stored descriptor, which stays the host's."""
        config, network = self.port(port), self.network
        await self.hosts[host].call(lambda d: d.port_create(config, network, deliver=deliver))
        return self.hosts[host].supervisor.fds[f"tap.{port}"]

    async def prepare(self, port: PortId, source: str, destination: str) -> None:
        config, network = self.port(port), self.network
        for here, there, role in (
            (destination, source, MoveRole.DESTINATION),
            (source, destination, MoveRole.SOURCE),
        ):
            vtep = self.hosts[there].node.address
            await self.hosts[here].call(_prepare(config, network, role, vtep))

    async def switch(self, port: PortId, source: str, destination: str) -> None:
        config, network = self.port(port), self.network
        await self.hosts[destination].call(
            lambda d: d.move_switch(config, network, MoveRole.DESTINATION),
        )
        await self.hosts[source].call(lambda d: d.move_switch(config, network, MoveRole.SOURCE))

    async def settle(self, port: PortId, source: str, destination: str) -> None:
        """Both ends, and what the orchestrator knows: the port is elsewhere, its old host reflects."""
        config, network = self.port(port), self.network
        await self.hosts[destination].call(
            lambda d: d.move_settle(config, network, MoveRole.DESTINATION),
        )
        await self.hosts[source].call(lambda d: d.move_settle(config, network, MoveRole.SOURCE))
        self.place(config, destination)
        self.reflect[source].add(port)
        self.reflect[destination].discard(port)


def _prepare(
    config: PortConfig, network: NetworkConfig, role: MoveRole, vtep: str
) -> Callable[[NativeNetwork], Awaitable[None]]:
    return lambda d: d.move_prepare(config, network, role, vtep)
