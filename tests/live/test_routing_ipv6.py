"""The way out of routers by IPv6, on real namespaces and real packets: routed, not translated."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from network_namespaces import missing_programs
from routed_cloud import EDGE, EDGE2, A, B, RoutedCloud, gateway, network, router

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(bool(missing_programs()), reason=missing_programs()),
]
RED = network("red", 101, "10.1.0.0/24", v6="fd01::/64")
BLUE = network("blue", 102, "10.2.0.0/24", v6="fd02::/64")
CLIENT6 = "fd00:203::10"
EDGES = {EDGE: "fd00:203::1", EDGE2: "fd00:203::2"}


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[RoutedCloud]:
    cloud = RoutedCloud(tmp_path)
    try:
        # Ready at once: who is still looking for duplicates of its own address asks nobody for another's.
        cloud.outside("sysctl", "-qw", "net.ipv6.conf.lan.accept_dad=0", "net.ipv6.conf.lan.disable_ipv6=0")
        cloud.outside("ip", "addr", "add", f"{CLIENT6}/64", "dev", "lan", "nodad")
        for edge, address in EDGES.items():
            ready = ("net.ipv6.conf.out0.accept_dad=0", "net.ipv6.conf.out0.disable_ipv6=0")
            cloud.hosts[edge].command("sysctl", "-qw", *ready)
            cloud.hosts[edge].command("ip", "addr", "add", f"{address}/64", "dev", "out0", "nodad")
        yield cloud
    finally:
        await cloud.close()


async def routed(cloud: RoutedCloud) -> None:
    cloud.networks = [RED, BLUE]
    cloud.routers = [gateway(router("main", 7, [RED, BLUE]), EDGE, "203.0.113.100")]
    cloud.server("red-1", RED, A, "10.1.0.10", "fd01::10")
    cloud.server("blue-1", BLUE, B, "10.2.0.10", "fd02::10")
    await cloud.open()


def lead(cloud: RoutedCloud, edge: str) -> None:
    """What the outside's router is told by people: the subnets are behind that edge host."""
    for subnet in ("fd01::/64", "fd02::/64"):
        cloud.outside("ip", "-6", "route", "replace", subnet, "via", EDGES[edge])


async def test_the_outside_and_servers_reach_each_other_untranslated(cloud: RoutedCloud) -> None:
    await routed(cloud)
    lead(cloud, EDGE)
    for server in cloud.servers:
        assert server.answered(CLIENT6)
        assert " 3 received" in cloud.outside("ping", "-n", "-c", "3", "-i", "0.05", server.addresses[1])
        assert server.answered("203.0.113.10"), "and IPv4 as before"
    traced = cloud.servers[0].command("ping", "-n", "-c", "1", "-t", "2", CLIENT6, check=False)
    assert "Time exceeded" in traced, "who is on the way says so"


async def test_it_leads_out_at_another_host_when_the_gateway_is_there(cloud: RoutedCloud) -> None:
    await routed(cloud)
    cloud.routers = [gateway(router("main", 7, [RED, BLUE]), EDGE2, "203.0.113.100")]
    await cloud.reconcile_all()
    lead(cloud, EDGE2)
    assert all([await asyncio.to_thread(server.answered, CLIENT6) for server in cloud.servers])
    assert not any((await cloud.reconcile_all()).values())
    left = cloud.hosts[EDGE].command("ip", "-6", "route")
    assert "fd01::" not in left


async def test_a_router_without_a_gateway_leads_nowhere(cloud: RoutedCloud) -> None:
    await routed(cloud)
    cloud.routers = [router("main", 7, [RED, BLUE])]
    await cloud.reconcile_all()
    lead(cloud, EDGE)
    red, blue = cloud.servers
    assert not red.answered(CLIENT6)
    assert red.answered(blue.addresses[1])
