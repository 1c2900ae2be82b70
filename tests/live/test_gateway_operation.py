"""The place of outbound translation moves by its two agents, under connections that are counted; also
while one of them is killed."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from gateway_agents import AgentsOf
from network_namespaces import missing_programs
from routed_cloud import CLIENT, EDGE, EDGE2, A, B, RoutedCloud, gateway, network, router
from test_routing import TCP, Echo, Stream, exchange

from nahtlos.model.config import HostConfig, RouterConfig
from nahtlos.model.ids import HostId, OperationId
from nahtlos.model.inventory import OperationState
from nahtlos.wire.gateways import GatewayOrder
from nahtlos.wire.volumes import PeerAddress

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
RED, BLUE = network("red", 101, "10.1.0.0/24"), network("blue", 102, "10.2.0.0/24")
SNAT, NUMBER = "203.0.113.100", 7


class Site:
    def __init__(self, folder: Path) -> None:
        self.cloud = RoutedCloud(folder)
        self.cloud.networks = [RED, BLUE]
        self.red = self.cloud.server("red-1", RED, A, "10.1.0.10")
        self.agents = AgentsOf(self.cloud, folder)
        self.epoch, self.place = 1, EDGE

    def config(self, name: str, *, former: str = "", settled: bool = False) -> HostConfig:
        self.cloud.routers = [gateway(router("main", NUMBER, [RED, BLUE]), self.place, SNAT)]
        config = self.cloud.config(name)
        (told,) = config.routers
        passing = name == former
        interface = "out0" if passing else told.interface
        told = msgspec.structs.replace(
            told, gateway_epoch=self.epoch, passing=passing, settled=settled, interface=interface
        )
        return msgspec.structs.replace(config, routers=(told,))

    async def tell(self, *names: str, former: str = "", settled: bool = False) -> None:
        for name in names:
            await self.agents.configure(name, self.config(name, former=former, settled=settled))
        await self.agents.converged(*names)

    def order(self, number: int, to: str) -> GatewayOrder:
        spec = gateway(router("main", NUMBER, [RED, BLUE]), to, SNAT)
        address = self.cloud.hosts[to].node.address
        new = RouterConfig(spec=spec, gateway_vtep=address, interface="out0", gateway_epoch=self.epoch + 1)
        return GatewayOrder(
            id=OperationId(f"gateway-{number}"),
            router=new,
            source=self.address(self.place),
            destination=self.address(to),
        )

    def address(self, name: str) -> PeerAddress:
        spec = self.agents.spec(name)
        return PeerAddress(host=HostId(name), address=spec.address, peer_port=spec.peer_port)

    async def move(self, number: int, to: str, *, killed: str = "") -> None:
        """As an orchestrator does: order, other hosts told once it is done, then the old place let go."""
        source, order = self.place, self.order(number, to)
        await self.agents.begin(order)
        if killed:
            await self.agents.restart(killed)
        assert (await self.agents.ended(to, order.id)).state is OperationState.DONE
        self.place, self.epoch = to, order.epoch
        await self.tell(to, source, A, B, former=source)
        await self.tell(source, former=source, settled=True)
        assert (await self.agents.ended(source, order.id)).state is OperationState.DONE
        await self.agents.acknowledge(order.id)
        await self.tell(source)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    try:
        await site.agents.open()
        await site.tell(A, B, EDGE, EDGE2)
        await site.cloud.boot(site.red)
        await site.tell(A, B)
        yield site
    finally:
        await site.agents.close()
        await site.cloud.close()


@pytest.mark.parametrize("killed", ["", EDGE, EDGE2])
async def test_agents_move_the_way_out_under_connections(site: Site, killed: str) -> None:
    outside = Echo(None, site.cloud, CLIENT)
    stream = Stream(site.red, CLIENT)
    try:
        lost = await moved_under(site, stream, killed)
        print(
            f"{stream.sent} datagrams, {len(lost)} lost; {stream.lines} lines, longest {stream.longest:.3f} s"
        )
        assert stream.sent > 300 and stream.lines > 50
        assert stream.failed == ""
        assert lost == []
        assert stream.longest < 1.0, "nothing had to be sent again and again"
        assert set(outside.seen) == {SNAT}
        proxied = site.cloud.hosts[EDGE if killed else EDGE2].command("ip", "neigh", "show", "proxy")
        assert SNAT not in proxied, "the old place answers nobody"
    finally:
        stream.stop()
        outside.close()


async def moved_under(site: Site, stream: Stream, killed: str) -> list[int]:
    """There, and back unless an agent is killed meanwhile; numbers of datagrams that nobody answered."""
    idle = site.red.within(lambda: socket.create_connection((CLIENT, 7), timeout=2.0))
    with idle:
        await asyncio.sleep(0.3)
        await site.move(1, EDGE2, killed=killed)
        assert not site.cloud.path(EDGE, f"gateway-{NUMBER}").exists()
        assert await asyncio.to_thread(exchange, site.red, site.cloud, CLIENT, TCP) == CLIENT
        if not killed:
            await site.move(2, EDGE)
            assert not site.cloud.path(EDGE2, f"gateway-{NUMBER}").exists()
        await asyncio.sleep(0.2)
        idle.sendall(b"still")
        assert await asyncio.to_thread(idle.recv, 10) == b"still"
    return await asyncio.to_thread(stream.stop)
