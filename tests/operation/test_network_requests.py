"""What is asked of the virtual network reaches the agents' configurations: one real orchestrator over a real
store, with scripted agents."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from scripted_cloud import EDGE, ScriptedCloud, opened

from nahtlos.model.config import HostConfig, NetworkConfig, UnderlayShares
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import (
    FloatingIpId,
    HostId,
    LoadBalancerId,
    NetworkId,
    PortId,
    ProjectId,
    RouterId,
    SecurityGroupId,
    ServerId,
    SubnetId,
)
from nahtlos.model.inventory import RunState
from nahtlos.model.networking import (
    Direction,
    Family,
    Member,
    PortBandwidth,
    Rate,
    Route,
    RouterGateway,
    SecurityRule,
)
from nahtlos.model.topology import Underlay
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.networks import (
    Assignment,
    Fate,
    FloatingIpRequest,
    LoadBalancerChange,
    LoadBalancerRequest,
    MemberName,
    NetworkChange,
    NetworkRequest,
    Networks,
    PortChange,
    PortRequest,
    RouterChange,
    RouterRequest,
    SecurityGroupRequest,
    SubnetChange,
    SubnetRequest,
    TraceRequest,
)

H1, H2, H3 = HostId("host-1"), HostId("host-2"), HostId("host-3")
BLUE, GREEN, WEB, WAN = NetworkId("blue"), NetworkId("green"), SecurityGroupId("web"), RouterId("wan")
SSH = SecurityRule(direction=Direction.INGRESS, protocol="tcp", port_min=22, port_max=22)


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[ScriptedCloud]:
    async with opened(tmp_path / "runtime.sqlite") as scripted:
        await scripted.ready()
        yield scripted


def nets(cloud: ScriptedCloud) -> Networks:
    return cloud.cloud.networks


async def settled(cloud: ScriptedCloud) -> None:
    async def all_told() -> bool:
        return not (await nets(cloud).settling()).hosts

    await cloud.until(all_told)


def told(cloud: ScriptedCloud, host: HostId) -> HostConfig:
    config = cloud.agents[host].config
    assert config is not None
    return config


def part(cloud: ScriptedCloud, host: HostId, network: NetworkId) -> NetworkConfig | None:
    return next((n for n in told(cloud, host).networks if n.spec.id == network), None)


async def two_networks(cloud: ScriptedCloud) -> None:
    """`blue` and `green` with a server each, joined by the router `wan`, whose gateway is at the edge."""
    for name, cidr in ((BLUE, "10.1.0.0/24"), (GREEN, "10.2.0.0/24")):
        await nets(cloud).create_network(NetworkRequest(name=name, cidr=cidr))
        await cloud.cloud.create_server(
            ServerRequest(name=f"{name}-1", networks=(PortRequest(network=name),))
        )
    await cloud.until(cloud.all_run)
    await nets(cloud).create_router(RouterRequest(name=WAN, subnets=(SubnetId(BLUE), SubnetId(GREEN))))
    gateway = RouterGateway(host=EDGE, address="203.0.113.2")
    await nets(cloud).change_router(WAN, RouterChange(gateway=gateway))
    await settled(cloud)


async def test_a_network_is_made_told_and_gone(cloud: ScriptedCloud) -> None:
    view = await nets(cloud).create_network(NetworkRequest(name="blue", cidr="10.1.0.0/24", mtu=1400))
    assert (view.mtu, view.dhcp_ip, view.gateway_host) == (1400, "10.1.0.2", None)
    assert [s.spec.gateway_ip for s in view.subnets] == ["10.1.0.1"]
    six = SubnetRequest(name="blue6", network=BLUE, cidr="2001:db8:1::/64", dns=("2001:db8::53",))
    await nets(cloud).create_subnet(six)
    await settled(cloud)
    for host in (H1, H2, H3):
        config = part(cloud, host, BLUE)
        assert config is not None
        assert [s.cidr for s in config.spec.all_subnets] == ["10.1.0.0/24", "2001:db8:1::/64"]
        assert config.vteps == tuple(f"10.99.0.{6 + n}" for n in range(3)), "the edge has no part in it"
    assert part(cloud, EDGE, BLUE) is None
    assert part(cloud, EDGE, NetworkId("tenant")) is not None

    changed = await nets(cloud).change_network(BLUE, NetworkChange(mtu=1300))
    assert changed.mtu == 1300
    await nets(cloud).change_subnet(SubnetId("blue6"), SubnetChange(dhcp=False, dns=()))
    assert not (await nets(cloud).subnet(SubnetId("blue6"))).spec.dhcp
    with pytest.raises(Conflict, match="first subnet"):
        await nets(cloud).delete_subnet(SubnetId("blue"))
    await nets(cloud).delete_subnet(SubnetId("blue6"))
    await nets(cloud).delete_network(BLUE)
    await settled(cloud)
    assert all(part(cloud, host, BLUE) is None for host in cloud.agents)
    with pytest.raises(NotFound):
        await nets(cloud).network(BLUE)


async def test_numbers_are_given_once_and_again_after_deletion(cloud: ScriptedCloud) -> None:
    first = await nets(cloud).create_network(NetworkRequest(name="a", cidr="10.1.0.0/24"))
    second = await nets(cloud).create_network(NetworkRequest(name="b", cidr="10.1.0.0/24"))
    assert first.vni != second.vni, "different projects or not: the same addresses are no conflict"
    await nets(cloud).delete_network(first.id)
    third = await nets(cloud).create_network(NetworkRequest(name="c", cidr="10.1.0.0/24"))
    assert third.vni == first.vni


async def test_a_server_has_ports_in_several_networks(cloud: ScriptedCloud) -> None:
    for name, cidr in ((BLUE, "10.1.0.0/24"), (GREEN, "10.2.0.0/24")):
        await nets(cloud).create_network(NetworkRequest(name=name, cidr=cidr))
    await nets(cloud).create_subnet(SubnetRequest(name="blue6", network=BLUE, cidr="2001:db8:1::/64"))
    await nets(cloud).create_security_group(SecurityGroupRequest(name=WEB))
    asked = (
        PortRequest(network=BLUE, ip="10.1.0.77", addresses=("10.1.0.78",), security_groups=(WEB,)),
        PortRequest(network=GREEN, bandwidth=PortBandwidth(ingress=Rate(bits_per_second=10**7)), queues=2),
    )
    view = await cloud.cloud.create_server(ServerRequest(name="both", networks=asked))
    assert view.ports == ("both-eth0", "both-eth1")
    await cloud.until(cloud.all_run)
    await settled(cloud)
    blue, green = part(cloud, H2, BLUE), part(cloud, H2, GREEN)
    assert blue is not None and green is not None
    mine = blue.ports[0]
    assert mine.all_addresses == ("10.1.0.77", "10.1.0.78", "2001:db8:1:0:5054:ff:fe4d:4d")
    assert (mine.mac, mine.security_groups) == ("52:54:00:4d:00:4d", (WEB,))
    assert green.ports[0].ip == "10.2.0.10"
    assert green.ports[0].bandwidth.ingress == Rate(bits_per_second=10**7)
    assert green.ports[0].queues == 2
    with pytest.raises(Conflict, match=r"port both-eth0 has 10\.1\.0\.78"):
        taken = (PortRequest(network=BLUE, ip="10.1.0.78"),)
        await cloud.cloud.create_server(ServerRequest(name="late", networks=taken))
    with pytest.raises(Conflict, match="used by port both-eth0"):
        await nets(cloud).delete_network(BLUE)
    await cloud.cloud.delete_server(ServerId("both"))

    async def gone() -> bool:
        return not (await nets(cloud).ports())

    await cloud.until(gone)
    await nets(cloud).create_load_balancer(
        LoadBalancerRequest(name="lb", network=BLUE, port=80, vip="10.1.0.78")
    )


async def test_a_server_without_a_wish_gets_the_network_with_an_uplink(cloud: ScriptedCloud) -> None:
    await nets(cloud).create_network(NetworkRequest(name="a-first", cidr="10.1.0.0/24"))
    await cloud.servers("web-1")
    assert (await nets(cloud).port(PortId("web-1-eth0"))).network == "tenant"
    with pytest.raises(Conflict, match="project other has no network"):
        await cloud.cloud.create_server(ServerRequest(name="alien", project=ProjectId("other")))
    with pytest.raises(Refused, match="belongs to project default"):
        alien = (PortRequest(network=NetworkId("tenant")),)
        await cloud.cloud.create_server(
            ServerRequest(name="alien", project=ProjectId("other"), networks=alien)
        )


async def test_a_group_and_a_bandwidth_reach_every_host(cloud: ScriptedCloud) -> None:
    await cloud.servers("web-1", "web-2")
    other = SecurityGroupId("clients")
    await nets(cloud).create_security_group(SecurityGroupRequest(name=other))
    await nets(cloud).create_security_group(SecurityGroupRequest(name=WEB))
    assert told(cloud, H1).security_groups == (), "nothing is in it: hosts need not know"
    port = PortId("web-1-eth0")
    change = PortChange(security_groups=(WEB,), ingress=Rate(bits_per_second=50_000_000))
    view = await nets(cloud).change_port(port, change)
    assert (view.security_groups, view.bandwidth.egress) == ((WEB,), None)
    allowed = SecurityRule(direction=Direction.INGRESS, protocol="TCP", port_min=80, remote_group=other)
    await nets(cloud).add_rule(WEB, allowed)
    await settled(cloud)
    for host in (H1, H2, H3, EDGE):
        config = told(cloud, host)
        assert [g.id for g in config.security_groups] == [other, WEB], "the one its rule names, too"
        rule = config.security_groups[1].rules[-1]
        assert (rule.protocol, rule.port_min, rule.port_max) == ("tcp", 80, 80)
        tenant = part(cloud, host, NetworkId("tenant"))
        assert tenant is not None
        here = next(p for p in tenant.ports if p.id == port)
        assert here.bandwidth.ingress == Rate(bits_per_second=50_000_000)
    generations = {host: len(agent.generations) for host, agent in cloud.agents.items()}
    await nets(cloud).change_port(port, change)
    await settled(cloud)
    assert generations == {host: len(agent.generations) for host, agent in cloud.agents.items()}, (
        "nothing changed, so nobody is told"
    )
    for group in (WEB, other):
        with pytest.raises(Conflict, match="is used by"):
            await nets(cloud).delete_security_group(group)
    await nets(cloud).change_port(port, PortChange(security_groups=(), ingress=None))
    await nets(cloud).delete_security_group(WEB)
    await nets(cloud).delete_security_group(other)
    await settled(cloud)
    assert told(cloud, H1).security_groups == ()


async def test_a_changed_port_is_the_same_after_a_move_and_a_restart(cloud: ScriptedCloud) -> None:
    await cloud.servers("web-1")
    await nets(cloud).create_security_group(SecurityGroupRequest(name=WEB))
    await nets(cloud).change_port(PortId("web-1-eth0"), PortChange(security_groups=(WEB,)))
    before = (await cloud.cloud.server(ServerId("web-1"))).host
    await cloud.cloud.move_server(ServerId("web-1"), None)

    async def moved() -> bool:
        view = await cloud.cloud.server(ServerId("web-1"))
        return view.host != before and view.state is RunState.RUNNING

    await cloud.until(moved)
    await cloud.kill()
    await cloud.start()
    await cloud.until(cloud.converged)
    view = await nets(cloud).port(PortId("web-1-eth0"))
    assert (view.security_groups, view.host != before) == ((WEB,), True)
    tenant = part(cloud, H3, NetworkId("tenant"))
    assert tenant is not None
    assert tenant.ports[0].security_groups == (WEB,)


async def test_subnets_of_a_network_in_the_settings_outlive_a_restart(cloud: ScriptedCloud) -> None:
    tenant = NetworkId("tenant")
    await nets(cloud).create_subnet(SubnetRequest(name="six", network=tenant, cidr="2001:db8:7::/64"))
    await cloud.kill()
    await cloud.start()
    assert [s.spec.id for s in (await nets(cloud).network(tenant)).subnets] == ["tenant", "six"]
    for refused in (
        nets(cloud).delete_network(tenant),
        nets(cloud).change_network(tenant, NetworkChange(mtu=1400)),
    ):
        with pytest.raises(Conflict, match="settings"):
            await refused


async def test_a_router_reaches_the_hosts_that_need_it(cloud: ScriptedCloud) -> None:
    await two_networks(cloud)
    for host in (H1, H2, H3, EDGE):
        (router,) = told(cloud, host).routers
        assert router.gateway_vtep == "10.99.0.5"
        assert router.interface == ("out0" if host == EDGE else "")
        assert part(cloud, host, BLUE) is not None, "the edge takes part where it is the way out"
    vteps = {n.spec.id: n.vteps for n in told(cloud, H1).networks}
    assert "10.99.0.5" in vteps[BLUE]
    route = Route(destination="192.168.7.0/24", next_hop="10.1.0.10")
    await nets(cloud).change_router(WAN, RouterChange(add_routes=(route,)))
    with pytest.raises(Conflict, match=r"blue in wan is used by route 192\.168\.7\.0/24"):
        await nets(cloud).change_router(WAN, RouterChange(detach=(SubnetId(BLUE),)))
    with pytest.raises(Conflict, match="router wan"):
        await nets(cloud).delete_network(BLUE)
    away = RouterChange(remove_routes=(route,), gateway=None, detach=(SubnetId(BLUE), SubnetId(GREEN)))
    await nets(cloud).change_router(WAN, away)
    await nets(cloud).delete_router(WAN)
    await settled(cloud)
    assert all(told(cloud, host).routers == () for host in cloud.agents)
    assert part(cloud, EDGE, BLUE) is None


async def test_a_floating_ip_is_told_to_its_gateway_alone_and_ends_with_its_server(
    cloud: ScriptedCloud,
) -> None:
    await two_networks(cloud)
    fip = FloatingIpId("front")
    await nets(cloud).create_floating_ip(FloatingIpRequest(name=fip, address="203.0.113.10"))
    made = await nets(cloud).assign_floating_ip(fip, Assignment(port=PortId("blue-1-eth0")))
    assert (made.fixed_ip, made.router) == ("10.1.0.10", WAN)
    await settled(cloud)
    assert [f.address for f in told(cloud, EDGE).routers[0].floating_ips] == ["203.0.113.10"]
    assert told(cloud, H1).routers[0].floating_ips == ()
    for refused in (
        nets(cloud).delete_floating_ip(fip),
        nets(cloud).change_router(WAN, RouterChange(gateway=None)),
        nets(cloud).change_router(WAN, RouterChange(detach=(SubnetId(BLUE),))),
        nets(cloud).create_floating_ip(FloatingIpRequest(name="again", address="203.0.113.10")),
        nets(cloud).create_floating_ip(FloatingIpRequest(name="again", address="203.0.113.2")),
        nets(cloud).create_floating_ip(
            FloatingIpRequest(name="again", address="203.0.113.11", port=PortId("blue-1-eth0"))
        ),
    ):
        with pytest.raises(Conflict):
            await refused
    await cloud.cloud.delete_server(ServerId("blue-1"))
    await settled(cloud)
    assert told(cloud, EDGE).routers[0].floating_ips == ()
    left = await nets(cloud).floating_ip(fip)
    assert (left.port, left.router, left.address) == (None, None, "203.0.113.10")
    await nets(cloud).delete_floating_ip(fip)


async def test_a_load_balancer_and_its_members(cloud: ScriptedCloud) -> None:
    await two_networks(cloud)
    request = LoadBalancerRequest(
        name="lb", network=BLUE, port=80, members=(Member(address="10.1.0.10", port=8080),)
    )
    made = await nets(cloud).create_load_balancer(request)
    assert (made.vip, made.host) == ("10.1.0.11", H1)
    router = await nets(cloud).router(WAN)
    assert made.number != router.number, "numbers name devices of both"
    name = LoadBalancerId("lb")
    draining = Member(address="10.1.0.10", port=8080, weight=5, draining=True)
    change = LoadBalancerChange(put_members=(draining, Member(address="10.1.0.12", port=80)), host=H2)
    await nets(cloud).change_load_balancer(name, change)
    await settled(cloud)
    for host in (H1, H3, EDGE):
        (config,) = told(cloud, host).load_balancers
        assert config.vtep == "10.99.0.7"
        assert config.spec.members == (draining, Member(address="10.1.0.12", port=80))
    gone = LoadBalancerChange(remove_members=(MemberName(address="10.1.0.12", port=80),))
    assert (await nets(cloud).change_load_balancer(name, gone)).members == (draining,)
    with pytest.raises(Conflict, match="load balancer lb"):
        await nets(cloud).delete_network(BLUE)
    await nets(cloud).delete_load_balancer(name)
    await settled(cloud)
    assert told(cloud, H1).load_balancers == ()


async def test_shares_of_the_underlay_reach_every_host(cloud: ScriptedCloud) -> None:
    assert told(cloud, H1).underlay is None
    shares = UnderlayShares(bits_per_second=10**9, control=10, moves=20, tenants=70)
    await nets(cloud).set_underlay(Underlay(mtu=1600, shares=shares))
    await settled(cloud)
    assert all(told(cloud, host).underlay == shares for host in cloud.agents)
    with pytest.raises(Refused, match="1600 leave 1550"):
        await nets(cloud).create_network(NetworkRequest(name="big", cidr="10.9.0.0/24", mtu=1551))
    with pytest.raises(Conflict, match="used by tenant"):
        await nets(cloud).set_underlay(Underlay(mtu=1500))


async def test_a_host_that_is_away_is_named_and_not_waited_for(cloud: ScriptedCloud) -> None:
    await cloud.hang_up()

    async def nobody() -> bool:
        return not any(h.connected for h in await cloud.cloud.hosts())

    await cloud.until(nobody)
    await nets(cloud).create_network(NetworkRequest(name="blue", cidr="10.1.0.0/24"))
    behind = await nets(cloud).settling()
    assert behind.hosts == behind.away == (H1, H2, H3), "the edge need not know of it"


async def test_a_trace_knows_where_servers_are(cloud: ScriptedCloud) -> None:
    await two_networks(cloud)
    await nets(cloud).create_security_group(SecurityGroupRequest(name=WEB))
    await nets(cloud).change_port(PortId("green-1-eth0"), PortChange(security_groups=(WEB,)))
    asked = TraceRequest(port=PortId("blue-1-eth0"), address="10.2.0.10", protocol="tcp", number=22)
    assert (await nets(cloud).trace(asked)).fate is Fate.DROPPED
    await nets(cloud).add_rule(WEB, SSH)
    found = await nets(cloud).trace(asked)
    assert found.fate is Fate.DELIVERED
    green = await nets(cloud).port(PortId("green-1-eth0"))
    assert found.reason == f"to port green-1-eth0 of green-1 at {green.host}"
    await nets(cloud).remove_rule(WEB, msgspec.structs.replace(SSH, family=Family.IPV4))
    assert (await nets(cloud).trace(asked)).fate is Fate.DROPPED


async def test_everything_outlives_the_orchestrator(cloud: ScriptedCloud) -> None:
    await two_networks(cloud)
    await nets(cloud).create_floating_ip(FloatingIpRequest(name="front", address="203.0.113.10"))
    await nets(cloud).create_load_balancer(LoadBalancerRequest(name="lb", network=BLUE, port=80))
    await nets(cloud).create_security_group(SecurityGroupRequest(name=WEB, stateful=False))
    await settled(cloud)
    looks = ("networks", "subnets", "ports", "security_groups", "routers", "floating_ips", "load_balancers")
    before = [await getattr(nets(cloud), look)() for look in looks]
    generations = {host: len(agent.generations) for host, agent in cloud.agents.items()}
    await cloud.kill()
    await cloud.start()
    await cloud.until(cloud.converged)
    assert [await getattr(nets(cloud), look)() for look in looks] == before
    assert generations == {host: len(agent.generations) for host, agent in cloud.agents.items()}
