"""A router's way out for IPv6: routed, not translated. The outside knows the way to its subnets by the host
of the gateway.

Pure. Between router, gateway and host it goes by link-local addresses, which nobody has to choose:

    router: ::/0 to the gateway's, in the transit network
    gateway: ::/0 to the host's, each subnet in its network
    host: each subnet to the gateway's
"""

from collections.abc import Iterable

from nahtlos.physical.network import plan
from nahtlos.physical.network.plan import link_local
from nahtlos.physical.network.routing.facts import Address, Cable, Fact, Neighbour, Route, Setting
from nahtlos.physical.network.routing.translation import OUTSIDE


def in_router(transit: str, gateway_mac: str) -> Iterable[Fact]:
    gateway = link_local(gateway_mac)
    yield Neighbour(transit, gateway, gateway_mac)
    yield Route("::/0", transit, gateway)


def in_gateway(subnets: Iterable[tuple[str, str]], mac: str, host: Cable) -> Iterable[Fact]:
    """`subnets`: prefix and interface of each. Errors are told from the link-local addresses."""
    for cidr, interface in subnets:
        yield Route(cidr, interface)
        yield Address(interface, f"{link_local(mac)}/64")
    yield Address(OUTSIDE, f"{link_local(host.mac)}/64")
    yield Neighbour(OUTSIDE, link_local(host.outer_mac), host.outer_mac)
    yield Route("::/0", OUTSIDE, link_local(host.outer_mac))


def at_host(cidrs: Iterable[str], interface: str, host: Cable, *, forced: bool) -> Iterable[Fact]:
    yield Setting(f"net/ipv6/conf/{host.outer}/disable_ipv6", "0")
    yield Neighbour(host.outer, link_local(host.mac), host.mac)
    for cidr in cidrs:
        yield Route(cidr, host.outer, link_local(host.mac))
    devices = (host.outer, interface) if interface else (host.outer,)
    for setting in plan.forwarding_ipv6(devices, forced=forced):
        yield Setting(setting.path, setting.value)


def instead(facts: Iterable[Fact], others: Iterable[Fact]) -> frozenset[Fact]:
    """`facts`, and `others` in place of those of the same key."""
    others = frozenset(others)
    keys = {fact.key for fact in others}
    return frozenset(fact for fact in facts if fact.key not in keys) | others
