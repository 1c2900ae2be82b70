"""What of the virtual network one host is told. Pure, and in an order that depends on nothing but names."""

from collections.abc import Iterable

import msgspec

from nahtlos.model.blueprint import GatewayPlace
from nahtlos.model.config import (
    LoadBalancerConfig,
    NetworkConfig,
    RouterConfig,
    Uplink,
)
from nahtlos.model.ids import HostId, SecurityGroupId
from nahtlos.model.networking import FloatingIpSpec, RouterSpec, SecurityGroupSpec
from nahtlos.runtime.executor.world import World, touches


def network_configs(world: World, host: HostId) -> tuple[NetworkConfig, ...]:
    spec = world.policy.hosts[host]
    return tuple(config for config in world.networks if world.takes_part(spec, config.spec))


def uplinks(world: World, host: HostId) -> tuple[Uplink, ...]:
    known = world.topology.uplinks
    return tuple(
        Uplink(network=spec.id, interface=known[spec.id])
        for spec in sorted(world.policy.networks, key=lambda network: network.id)
        if spec.gateway_host == host and spec.id in known
    )


# --- groups, routers, load balancers -----------------------------------------------------------------


def security_groups(world: World, networks: Iterable[NetworkConfig]) -> tuple[SecurityGroupSpec, ...]:
    """Those that ports of `networks` are in, and those that their rules name."""
    known = world.topology.groups
    used = {group for n in networks for port in n.ports for group in port.security_groups if group in known}
    named: set[SecurityGroupId] = {
        rule.remote_group
        for group in used
        for rule in known[group].rules
        if rule.remote_group is not None and rule.remote_group in known
    }
    return tuple(known[group] for group in sorted(used | named))


def routers(world: World, host: HostId, networks: Iterable[NetworkConfig]) -> tuple[RouterConfig, ...]:
    """Those that route between `networks`. What only the host with the way out needs is told to it alone."""
    here = {network.spec.id for network in networks}
    known = sorted(world.topology.routers.items())
    return tuple(
        _router(world, host, spec)
        for _, spec in known
        if host in world.gateways.hosts(spec) or any(touches(spec, network) for network in here)
    )


def _router(world: World, host: HostId, router: RouterSpec) -> RouterConfig:
    place = world.gateways.place(router)
    at = world.policy.hosts.get(place.host) if place else None
    passes = world.gateways.passes(host, router)
    leads_out = passes or (at is not None and at.id == host)
    return RouterConfig(
        spec=_placed(router, place),
        gateway_vtep=at.address if at else "",
        interface=world.topology.external_interface(host) if leads_out else "",
        floating_ips=floating_ips(world, router) if leads_out else (),
        gateway_epoch=place.epoch if place else 0,
        passing=passes,
        settled=passes and world.gateways.settled(host, router),
    )


def _placed(router: RouterSpec, place: GatewayPlace | None) -> RouterSpec:
    """With its way out where it is, which may not be where it is asked for."""
    if router.gateway is None or place is None or router.gateway.host == place.host:
        return router
    gateway = msgspec.structs.replace(router.gateway, host=place.host)
    return msgspec.structs.replace(router, gateway=gateway)


def floating_ips(world: World, router: RouterSpec) -> tuple[FloatingIpSpec, ...]:
    """That lead to a port that is there: a server may have been deleted by who knows no floating IPs."""
    ports = {port.id for spec in world.policy.servers.values() for port in spec.ports}
    known = sorted(world.topology.floating_ips.items())
    return tuple(f for _, f in known if f.router == router.id and f.port in ports)


def load_balancers(world: World, networks: Iterable[NetworkConfig]) -> tuple[LoadBalancerConfig, ...]:
    here = {network.spec.id for network in networks}
    hosts = world.policy.hosts
    return tuple(
        LoadBalancerConfig(spec=spec, vtep=hosts[spec.host].address)
        for _, spec in sorted(world.topology.balancers.items())
        if spec.network in here and spec.host in hosts
    )
