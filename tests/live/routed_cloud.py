"""A cloud for tests of routers: two hosts, two edges on one outside segment, and servers that are namespaces.

Owns namespaces of one lab of its own (`nl-nlt-rt<n>-*`) and unnamed ones for servers. A server has a kernel's
whole network stack; a thread carries its frames to and from the tap that the driver made, as a VMM would.
"""

import asyncio
import itertools
import os
import select
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from network_namespaces import Host

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, LoadBalancerConfig, NetworkConfig, PortConfig, RouterConfig
from nahtlos.model.ids import FloatingIpId, HostId, NetworkId, PortId, ProjectId, RouterId, ServerId, SubnetId
from nahtlos.model.networking import (
    AddressPair,
    FloatingIpSpec,
    LoadBalancerSpec,
    NetworkSpec,
    Route,
    RouterGateway,
    RouterInterface,
    RouterSpec,
    SubnetSpec,
)
from nahtlos.model.nouns import HostRole
from nahtlos.physical.network import links, namespaces, tap
from nahtlos.physical.network.netlink import Netlink
from nahtlos.physical.network.routing import tables
from nahtlos.physical.network.routing.facts import Route as Way
from nahtlos.physical.ports import NetworkDesired

T = TypeVar("T")
A, B, EDGE, EDGE2, CLIENT = "host-1", "host-2", "edge-1", "edge-2", "203.0.113.10"


def network(name: str, vni: int, cidr: str, *, v6: str = "", project: str = "default") -> NetworkSpec:
    """Whose first subnet's gateway is .1, and ::1 of `v6`."""
    first = cidr.rsplit(".", 1)[0]
    id_ = NetworkId(name)
    ipv6 = (SubnetSpec(id=SubnetId(f"{name}-6"), network=id_, cidr=v6, gateway_ip=v6.split("/")[0] + "1"),)
    return NetworkSpec(
        id=id_,
        project=ProjectId(project),
        vni=vni,
        cidr=cidr,
        gateway_ip=f"{first}.1",
        gateway_mac="",
        gateway_host=HostId(""),
        dhcp_ip=f"{first}.2",
        subnets=ipv6 if v6 else (),
    )


def router(name: str, number: int, networks: Sequence[NetworkSpec], *routes: Route) -> RouterSpec:
    """Attached to all subnets of `networks`."""
    return RouterSpec(
        id=RouterId(name),
        number=number,
        interfaces=tuple(
            RouterInterface(subnet=s.id, network=n.id, ip=s.gateway_ip)
            for n in networks
            for s in n.all_subnets
        ),
        routes=routes,
    )


def gateway(spec: RouterSpec, host: str, address: str, *, snat: bool = True) -> RouterSpec:
    way = RouterGateway(host=HostId(host), address=address, snat=snat)
    return msgspec.structs.replace(spec, gateway=way)


def floating(address: str, server: "Server") -> FloatingIpSpec:
    return FloatingIpSpec(
        id=FloatingIpId(f"fip-{address}"), address=address, port=server.port, fixed_ip=server.addresses[0]
    )


class Server:
    """A namespace behind a tap. Its first gateway is its default route."""

    def __init__(self, name: str, number: int, spec: NetworkSpec, host: str, *addresses: str) -> None:
        self.name, self.network, self.host = name, spec, host
        self.allowed: tuple[str, ...] = ()
        self.addresses = addresses
        self.ip = addresses[0]
        self.port = PortId(f"{name}-port")
        self.mac = f"52:54:00:52:{number >> 8:02x}:{number & 0xFF:02x}"
        self.namespace = namespaces.create()
        self._fd = namespaces.within(self.namespace, lambda: tap.open_tap("eth0"))
        namespaces.within(self.namespace, self._settle)
        self._stop = threading.Event()
        self._pump: threading.Thread | None = None

    def _settle(self) -> None:
        for path in ("accept_dad", "accept_ra", "autoconf"):  # its addresses are those of its port, at once
            for scope in ("all", "eth0"):
                Path(f"/proc/sys/net/ipv6/conf/{scope}/{path}").write_text("0")
        with Netlink() as sock:
            sock.change([links.configure("eth0", mac=self.mac, mtu=self.network.mtu, up=True)])
            sock.change([links.configure("lo", up=True)])
            index = links.read_links(sock)["eth0"].index
            for subnet in self.network.all_subnets:
                own = [a for a in self.addresses if (":" in a) == (":" in subnet.cidr)]
                length = subnet.cidr.split("/")[1]
                sock.change([tables.address(index, f"{a}/{length}") for a in own])
                if own and subnet.gateway_ip:
                    everything = "::/0" if ":" in subnet.cidr else "0.0.0.0/0"
                    sock.change([tables.route(index, Way(everything, "eth0", subnet.gateway_ip))])

    @property
    def enter(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self.namespace}")

    def within(self, act: Callable[[], T]) -> T:
        return namespaces.within(self.namespace, act)

    def command(self, *argv: str, check: bool = True) -> str:
        done = subprocess.run([*self.enter, *argv], capture_output=True, text=True, timeout=20, check=False)
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def ping(self, ip: str, *more: str) -> str:
        """What is printed; nobody answering is no error here."""
        return self.command("ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", *more, ip, check=False)

    def answered(self, ip: str) -> bool:
        return " 3 received, 0% packet loss" in self.ping(ip)

    def plug(self, fd: int) -> None:
        self._pump = threading.Thread(target=self._carry, args=(fd,), name=self.name)
        self._pump.start()

    def _carry(self, fd: int) -> None:
        while not self._stop.is_set():
            for ready in select.select([fd, self._fd], [], [], 0.05)[0]:
                try:
                    os.write(self._fd if ready == fd else fd, os.read(ready, 1 << 17))
                except OSError:
                    continue  # the other end is down at this moment: as on a cable

    def close(self) -> None:
        self._stop.set()
        if self._pump is not None:
            self._pump.join(5)
        os.close(self._fd)
        os.close(self.namespace)


_NUMBERS = itertools.cycle(range(10))
"""One cloud may outlive another's test."""


def _without_ipv6() -> None:
    for scope in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")


class RoutedCloud:
    def __init__(self, folder: Path) -> None:
        self.lab = f"nlt-r{os.getpid() % 1000}{next(_NUMBERS)}"
        self.topology = topology.create(self.lab, 2)
        nodes = [node for node in self.topology.nodes if node.role is not None]
        nodes.append(self._second_edge())
        self.hosts = {node.name: Host(node, folder) for node in nodes}
        self.networks: list[NetworkSpec] = []
        self.routers: list[RouterSpec] = []
        self.floating: list[FloatingIpSpec] = []
        self.balancers: list[LoadBalancerSpec] = []
        self.servers: list[Server] = []
        self.generation = 0

    def _second_edge(self) -> topology.Node:
        """Beside the first: on the underlay, and on the segment outside."""
        node = topology.Node(
            name=EDGE2,
            namespace=topology.namespace_of(self.lab, EDGE2),
            address="10.99.0.6",
            role=HostRole.EDGE,
        )
        switch, client = self.topology.switch.namespace, self.topology.client.namespace
        subprocess.run(["ip", "netns", "add", node.namespace], check=True, timeout=10)
        topology.within(node.namespace, _without_ipv6)
        batch = [
            f"link add p-edge2 netns {switch} index 900 type veth peer name eth0 netns {node.namespace}",
            f"-n {switch} link set p-edge2 mtu 1600",
            f"-n {switch} link set p-edge2 master sw0 up",
            f"-n {node.namespace} link set eth0 mtu 1600 up",
            f"-n {node.namespace} addr add {node.address}/24 dev eth0",
            f"link add eth1 netns {client} index 901 type veth peer name out0 netns {node.namespace}",
            f"-n {node.namespace} link set out0 up",
            f"-n {node.namespace} addr add 203.0.113.2/24 dev out0",
            f"-n {client} addr flush dev eth0",
            f"-n {client} link add lan type bridge forward_delay 0",
            f"-n {client} link set eth0 master lan",
            f"-n {client} link set eth1 master lan up",
            f"-n {client} link set lan up",
            f"-n {client} addr add {CLIENT}/24 dev lan",
        ]
        for line in batch:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True, timeout=10)
        return node

    def server(self, name: str, spec: NetworkSpec, host: str, *addresses: str) -> Server:
        server = Server(name, len(self.servers) + 1, spec, host, *addresses)
        self.servers.append(server)
        return server

    # --- configuration -------------------------------------------------------------------------------

    def port(self, server: Server) -> PortConfig:
        return PortConfig(
            id=server.port,
            server=ServerId(server.name),
            mac=server.mac,
            ip=server.addresses[0],
            addresses=server.addresses[1:],
            allowed_pairs=tuple(AddressPair(cidr=cidr) for cidr in server.allowed),
            host=HostId(server.host),
            vtep=self.hosts[server.host].node.address,
        )

    def network(self, spec: NetworkSpec) -> NetworkConfig:
        return NetworkConfig(
            spec=spec,
            ports=tuple(self.port(s) for s in self.servers if s.network.id == spec.id),
            gateway_vtep="",
            vteps=tuple(h.node.address for h in self.hosts.values()),
        )

    def config(self, host: str) -> HostConfig:
        self.generation += 1
        return HostConfig(
            host=HostId(host),
            generation=self.generation,
            release=None,
            networks=tuple(map(self.network, self.networks)),
            routers=tuple(self._router(spec, host) for spec in self.routers),
            load_balancers=tuple(
                LoadBalancerConfig(spec=b, vtep=self.hosts[b.host].node.address) for b in self.balancers
            ),
        )

    def _router(self, spec: RouterSpec, host: str) -> RouterConfig:
        way = spec.gateway
        return RouterConfig(
            spec=spec,
            gateway_vtep=self.hosts[way.host].node.address if way else "",
            interface="out0" if way and way.host == host else "",
            floating_ips=tuple(self.floating) if way else (),
        )

    async def reconcile(self, host: str) -> tuple[str, ...]:
        desired = NetworkDesired(config=self.config(host))
        return await self.hosts[host].call(lambda d: d.reconcile(desired))

    async def reconcile_all(self) -> dict[str, tuple[str, ...]]:
        return {name: await self.reconcile(name) for name in self.hosts}

    async def open(self) -> None:
        """Everything as configured, servers running; a second pass finds nothing."""
        await self.reconcile_all()
        for server in self.servers:
            if server._pump is None:
                await self.boot(server)
        found = await self.reconcile_all()
        assert not any(found.values()), found

    async def boot(self, server: Server) -> None:
        host, port, spec = self.hosts[server.host], self.port(server), self.network(server.network)
        await host.call(lambda d: d.port_create(port, spec, deliver=True))
        server.plug(host.supervisor.fds[f"tap.{server.port}"])

    # --- looking and breaking ------------------------------------------------------------------------

    def path(self, host: str, space: str) -> Path:
        return self.hosts[host].driver.routing.namespace(space)

    def command(self, host: str, space: str, *argv: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path(host, space)}", *argv],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout

    def outside(self, *argv: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self.topology.client.enter, *argv], capture_output=True, text=True, timeout=20, check=False
        )
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout + done.stderr

    async def clear(self) -> None:
        """Nothing is configured any more, anywhere."""
        empty = {name: HostConfig(host=HostId(name), generation=10**6, release=None) for name in self.hosts}
        for name, host in self.hosts.items():
            await host.call(lambda d, n=name: d.reconcile(NetworkDesired(config=empty[n])))

    async def close(self) -> None:
        for server in self.servers:
            server.close()
        for host in self.hosts.values():
            await asyncio.to_thread(host.close)
        topology.destroy(self.lab)
