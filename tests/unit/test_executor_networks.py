"""What of the virtual network each host is told: no more than it needs, always in the same order."""

from dataclasses import replace
from typing import Any

import msgspec
from virtual_network import (
    BLUE,
    EDGE,
    H1,
    H2,
    HOSTS,
    PLACES,
    TENANT,
    WEB,
    A,
    B,
    topology,
    with_group,
    with_port,
    with_router,
)

from nahtlos.model.blueprint import Blueprint, HostIntent, Policy
from nahtlos.model.config import HostConfig, UnderlayShares
from nahtlos.model.ids import BlueprintId, HostId, LoadBalancerId, SecurityGroupId, ServerId, VolumeId
from nahtlos.model.inventory import HostInventory, Inventory
from nahtlos.model.networking import Direction, SecurityRule
from nahtlos.model.nouns import Assignment, HostRole, HostSpec, ServerSpec, Size
from nahtlos.model.topology import Topology, Underlay
from nahtlos.runtime.controllers.bookkeeping import leaving_balancers
from nahtlos.runtime.executor.configs import next_config
from nahtlos.runtime.executor.world import World

EDGE2 = HostId("edge-2")
ALL = {**HOSTS, EDGE2: HostSpec(id=EDGE2, role=HostRole.EDGE, address="10.99.0.9", peer_port=7444)}


def world(found: Topology | None = None, places: dict[Any, HostId] = PLACES, **changes: Any) -> World:
    found = found or topology()
    servers = {
        found.servers[port.id]: ServerSpec(
            id=found.servers[port.id],
            size=Size(vcpus=1, memory_mib=64),
            volume=VolumeId("none"),
            ports=(port,),
            machine="pc-q35-10.0",
        )
        for port in found.ports.values()
    }
    policy = Policy(
        hosts=ALL,
        intents=dict.fromkeys(ALL, HostIntent.ACTIVE),
        servers=servers,
        networks=tuple(found.networks.values()),
    )
    owners = {found.servers[port]: host for port, host in places.items() if port in found.servers}
    blueprint = Blueprint(
        id=BlueprintId("bp-1"),
        parent=None,
        hosts={},
        servers={name: Assignment(server=name, host=host, epoch=1) for name, host in owners.items()},
    )
    empty = Inventory(hosts={}, connected=frozenset())
    plain = World(policy=policy, inventory=empty, blueprint=blueprint, configs={}, topology=found)
    return replace(plain, **changes)


def told(host: HostId, found: Topology | None = None) -> HostConfig:
    return next_config(world(found), host)


def names(config: HostConfig) -> list[str]:
    return [n.spec.id for n in config.networks]


def test_compute_hosts_take_part_everywhere_and_edges_where_they_lead_out() -> None:
    assert names(told(H1)) == ["alone", "blue", "green", "tenant"]
    assert names(told(EDGE)) == ["blue", "green", "tenant"]
    assert names(told(EDGE2)) == []
    vteps = {n.spec.id: n.vteps for n in told(H1).networks}
    assert vteps["alone"] == ("10.99.0.6", "10.99.0.7")
    assert vteps["blue"] == ("10.99.0.5", "10.99.0.6", "10.99.0.7")
    assert names(told(EDGE, with_router(topology(), gateway=None))) == ["tenant"]


def test_an_edge_that_carries_a_load_balancer_takes_part() -> None:
    found = topology()
    balancer = msgspec.structs.replace(found.balancers[LoadBalancerId("lb")], host=EDGE2)
    found = msgspec.structs.replace(found, balancers={balancer.id: balancer})
    assert names(told(EDGE2, found)) == ["blue"]
    assert [(b.spec.id, b.vtep) for b in told(H1, found).load_balancers] == [("lb", "10.99.0.9")]
    assert told(EDGE, found).load_balancers[0].vtep == "10.99.0.9"


def test_a_network_without_an_uplink_has_no_gateway_to_send_to() -> None:
    blue, tenant = (next(n for n in told(H1).networks if n.spec.id == name) for name in (BLUE, TENANT))
    assert (blue.gateway_vtep, tenant.gateway_vtep) == ("", "10.99.0.5")
    assert [u.network for u in told(EDGE).uplinks] == [TENANT]
    assert told(H1).uplinks == ()


def test_groups_that_ports_are_in_and_those_their_rules_name() -> None:
    used, named, idle = (SecurityGroupId(n) for n in ("used", "named", "idle"))
    rule = SecurityRule(direction=Direction.INGRESS, remote_group=named)
    found = with_group(with_group(with_group(topology(), idle), named), used, rules=(rule,))
    found = with_port(found, A, security_groups=(used, SecurityGroupId("gone")))
    assert [g.id for g in told(H2, found).security_groups] == ["named", "used"]
    assert [g.id for g in told(EDGE, found).security_groups] == ["named", "used"], "it has part in blue"
    assert told(EDGE2, found).security_groups == ()
    assert WEB not in [g.id for g in told(H2, found).security_groups]


def test_a_router_is_told_with_its_way_out_and_the_rest_to_that_host_alone() -> None:
    (here,), (edge,) = told(H1).routers, told(EDGE).routers
    assert (here.gateway_vtep, here.interface, here.floating_ips) == ("10.99.0.5", "", ())
    assert (edge.gateway_vtep, edge.interface) == ("10.99.0.5", "out0")
    assert [f.id for f in edge.floating_ips] == ["front"]
    assert told(EDGE2).routers == ()
    without = with_router(topology(), gateway=None)
    assert told(H1, without).routers[0].gateway_vtep == ""


def test_a_floating_ip_of_a_server_that_is_gone_is_not_told() -> None:
    found = topology()
    seen = world(found)
    gone = msgspec.structs.replace(
        seen.policy, servers={n: s for n, s in seen.policy.servers.items() if n != ServerId("b")}
    )
    config = next_config(replace(seen, policy=gone), EDGE)
    assert config.routers[0].floating_ips == ()
    assert B in found.ports


def test_the_order_depends_on_names_alone() -> None:
    found = topology()
    turned = msgspec.structs.replace(
        found,
        networks=dict(reversed(found.networks.items())),
        ports=dict(reversed(found.ports.items())),
        routers=dict(reversed(found.routers.items())),
        floating_ips=dict(reversed(found.floating_ips.items())),
    )
    for host in ALL:
        first = next_config(world(found), host)
        again = world(turned, configs={host: first})
        assert next_config(again, host) is first, "nothing changed: the same generation"


def test_what_a_host_need_not_know_changes_nothing_for_it() -> None:
    found = topology()
    first = next_config(world(found), EDGE2)
    changed = with_group(with_port(found, A, security_groups=(WEB,)), rules=())
    assert next_config(world(changed, configs={EDGE2: first}), EDGE2) is first
    before = next_config(world(found), H1)
    after = next_config(world(changed, configs={H1: before}), H1)
    assert after.generation == before.generation + 1


def test_shares_of_the_underlay() -> None:
    assert told(H1).underlay is None
    shares = UnderlayShares(bits_per_second=10**9)
    assert told(H1, topology(underlay=Underlay(mtu=9000, shares=shares))).underlay == shares


def test_a_host_without_part_in_a_network_is_not_waited_for_after_a_move() -> None:
    """Else the former host would pass frames on for ever."""
    before = world()
    configs = {host: next_config(before, host) for host in ALL}
    moved = world(places={**PLACES, A: H2}, configs=configs)
    after = {host: next_config(moved, host) for host in ALL}
    assert after[H1].reflect == (A,)

    def seen(host: HostId, generation: int) -> HostInventory:
        return HostInventory(
            host=host,
            role=ALL[host].role,
            boot_id="b",
            agent_version="1",
            taken_at=0.0,
            generation=generation,
            target_generation=generation,
            capacity=Size(),
        )

    reported = {host: seen(host, config.generation) for host, config in after.items()}
    known = Inventory(hosts=reported, connected=frozenset(reported))
    settled = replace(world(places={**PLACES, A: H2}, configs=after), inventory=known)
    assert next_config(settled, H1).reflect == ()
    reported = {**reported, EDGE2: seen(EDGE2, after[EDGE2].generation - 1)}
    behind = replace(settled, inventory=msgspec.structs.replace(known, hosts=reported))
    assert next_config(behind, H1).reflect == (A,), "it may have had part in the network before"


def test_a_load_balancer_leaves_a_host_that_is_drained() -> None:
    found = topology()
    balancer = msgspec.structs.replace(found.balancers[LoadBalancerId("lb")], host=H1)
    found = msgspec.structs.replace(found, balancers={balancer.id: balancer})
    seen = world(found)
    connected = Inventory(hosts={}, connected=frozenset({H1, H2, EDGE}))
    drained = msgspec.structs.replace(seen.policy, intents={H1: HostIntent.DRAINED})
    assert leaving_balancers(replace(seen, inventory=connected)) == ()
    (moved,) = leaving_balancers(replace(seen, policy=drained, inventory=connected))
    assert moved == msgspec.structs.replace(balancer, host=H2)
    assert leaving_balancers(replace(seen, policy=drained)) == (), "nobody is there to carry it"
