"""The real guest on the real network driver: what it makes of what its networks tell it."""

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from network_namespaces import missing_programs
from physical_host import Host, Place, release, server_on, volume_on
from test_addressing import Client, network_spec, subnet

from nahtlos.lab import topology
from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, ServerConfig
from nahtlos.model.ids import PortId, ServerId
from nahtlos.model.networking import PortSpec
from nahtlos.physical.network.native import NativeNetwork
from nahtlos.physical.network.services.addressing import made_of_mac
from nahtlos.physical.ports import NetworkDesired, StorageDesired, VmmId
from nahtlos.physical.supervisor.client import SupervisorClient

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
T = TypeVar("T")
RED = network_spec("red", 300, subnets=(subnet("red", "fd00:77::/64"),))
BLUE = network_spec(
    "blue",
    301,
    cidr="10.88.0.0/24",
    gateway_ip="",
    dhcp_ip="10.88.0.2",
    subnets=(subnet("blue", "fd00:88::/64"),),
)
RED_MAC, BLUE_MAC, CLIENT_MAC = (f"52:54:00:4d:00:{n:02x}" for n in (0x10, 0x11, 0x20))
MADE, FIXED = made_of_mac("fd00:77::/64", RED_MAC), "fd00:88::13"
BOOTS_WITHIN = 90.0
LINE = b"x" * 1400 + b"\n"


class Networked:
    """A host's network driver as its agent would hold it: on a thread inside the host's namespace."""

    def __init__(self, host: Host) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(host.place.namespace,))
        self._thread.start()
        self.supervisor = SupervisorClient(host.settings.supervisor_socket)
        self.driver = NativeNetwork(host.settings, self.supervisor)

    def _run(self, namespace: str) -> None:
        topology.enter_namespace(namespace)
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def call(self, act: Callable[[], Awaitable[T]]) -> T:
        async def inside() -> T:
            return await act()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(inside(), self._loop))

    async def close(self) -> None:
        async def let_go() -> None:
            self.driver.close()
            self.supervisor.close()

        await self.call(let_go)
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join, 10)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    place = Place("ga")
    try:
        yield place.host("guests")
    finally:
        await place.close()


def server_of(host: Host) -> ServerConfig:
    plain = server_on(host, "web")
    ports = (
        PortSpec(id=PortId("web-red"), network=RED.id, mac=RED_MAC, ip="10.77.0.16", addresses=(MADE,)),
        PortSpec(id=PortId("web-blue"), network=BLUE.id, mac=BLUE_MAC, ip="10.88.0.16", addresses=(FIXED,)),
    )
    return msgspec.structs.replace(plain, spec=msgspec.structs.replace(plain.spec, ports=ports))


def networks_of(host: Host, server: ServerConfig) -> tuple[NetworkConfig, ...]:
    """The server's two networks, and a client in each."""
    place = {"host": host.settings.host, "vtep": host.settings.address}
    found: list[NetworkConfig] = []
    for spec, port in zip((RED, BLUE), server.spec.ports, strict=True):
        own = PortConfig(
            id=port.id, server=server.spec.id, mac=port.mac, ip=port.ip, addresses=port.addresses, **place
        )
        asking = PortConfig(
            id=PortId(f"client-{spec.id}"),
            server=ServerId(f"client-{spec.id}"),
            mac=CLIENT_MAC,
            ip=port.ip.replace(".16", ".32"),
            addresses=(made_of_mac(spec.subnets[0].cidr, CLIENT_MAC),),
            **place,
        )
        vteps = (host.settings.address,)
        found.append(NetworkConfig(spec=spec, ports=(own, asking), gateway_vtep="", vteps=vteps))
    return tuple(found)


def echoed(address: str, port: int, kind: socket.SocketKind, words: bytes) -> bytes:
    """What comes back, as long as what was sent, or one datagram."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as asking:
        asking.settimeout(2)
        asking.connect((address, port))
        asking.sendall(words)
        back = asking.recv(2000)
        while kind == socket.SOCK_STREAM and len(back) < len(words):
            back += asking.recv(2000)
        return back


async def console_says(host: Host, vmm: VmmId, text: str) -> None:
    async with asyncio.timeout(BOOTS_WITHIN):
        while text not in (await host.hypervisor.console(vmm, 0, 1 << 20))[0].decode(errors="replace"):
            await asyncio.sleep(0.05)


async def test_the_guest_answers_by_ipv6_made_of_its_mac_and_by_a_fixed_one(
    host: Host, tmp_path: Path
) -> None:
    server = server_of(host)
    networks = networks_of(host, server)
    config = HostConfig(host=host.settings.host, generation=1, release=None, networks=networks)
    networked = Networked(host)
    clients: list[Client] = []
    try:
        await networked.call(lambda: networked.driver.reconcile(NetworkDesired(config=config)))
        for network in networks:
            for port in network.ports:
                await networked.call(
                    lambda p=port, n=network: networked.driver.port_create(p, n, deliver=True)
                )
        await networked.call(lambda: networked.driver.reconcile(NetworkDesired(config=config)))
        await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "web-root"),)))
        await host.hypervisor.start(server, release("10.0"))
        for network in networks:
            fd = await host.supervisor.fetch_fd(f"tap.client-{network.spec.id}")
            assert fd is not None
            clients.append(await asyncio.to_thread(Client, f"g-{network.spec.id}", CLIENT_MAC, 1500, fd))
            os.close(fd)
        vmm = VmmId(server.spec.id, server.epoch)
        await console_says(host, vmm, "NAHTLOS-READY 10.77.0.16")
        await console_says(host, vmm, "address 10.88.0.16 on eth1")
        await console_says(host, vmm, f"address {FIXED} by DHCPv6")
        for client, address, plain in zip(clients, (MADE, FIXED), ("10.77.0.16", "10.88.0.16"), strict=True):
            client.use(await asyncio.to_thread(client.lease, tmp_path))
            await until_answered(client, address)
            for asked in (address, plain):
                assert client.within(lambda a=asked: echoed(a, 7, socket.SOCK_DGRAM, b"hello")) == b"hello"
                assert client.within(lambda a=asked: echoed(a, 7000, socket.SOCK_STREAM, LINE)) == LINE
                beat = client.within(lambda a=asked: echoed(a, 9, socket.SOCK_DGRAM, b"subscribe"))
                assert len(beat) == 40
                page = client.get("/status", asked)
                assert "boot_id" in json.loads(page[1])
    finally:
        for client in clients:
            client.close()
        await networked.close()


async def test_services_outlive_a_killed_supervisor(host: Host) -> None:
    config = HostConfig(
        host=host.settings.host, generation=1, release=None, networks=networks_of(host, server_of(host))
    )
    networked = Networked(host)
    try:
        await networked.call(lambda: networked.driver.reconcile(NetworkDesired(config=config)))
        running = {name: unit.pid for name, unit in (await host.supervisor.units()).items()}
        assert set(running) == {
            f"{kind}.{network}" for kind in ("dnsmasq", "metadata") for network in ("red", "blue")
        }
        await host.restart_supervisor()
        assert {"netns.red", "netns.blue"} <= await host.supervisor.stored()
        assert await networked.call(lambda: networked.driver.reconcile(NetworkDesired(config=config))) == ()
        assert {name: unit.pid for name, unit in (await host.supervisor.units()).items()} == running
    finally:
        await networked.close()


async def until_answered(client: Client, address: str) -> None:
    """Both ends make sure that nobody else has their addresses first: a second each."""
    for _ in range(20):
        try:
            client.within(lambda: echoed(address, 7, socket.SOCK_DGRAM, b"anybody"))
        except OSError:
            await asyncio.sleep(0.3)
        else:
            return
    raise AssertionError(f"{address} does not answer")
