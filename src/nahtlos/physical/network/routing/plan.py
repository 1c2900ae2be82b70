"""Decides what routers, gateways and load balancers of a configuration need on this host.

Pure: (configuration, place) -> namespaces with their cables and facts, and entries on the driver's bridges.

    router-<n>     on every host. Per network a cable to its bridge; addresses and MAC are the same on all
                   hosts, so a server's frames are routed on its own. All servers are permanent neighbours,
                   nothing is ever resolved: an answer to the common address would reach the nearest router,
                   which need not be the one that asked. The bridge answers ARP and ND in its place.
    gateway-<n>    at the gateway host, and for a while at the former one, which answers nobody outside: the
                   place of what cannot be everywhere, with a MAC of its own and none of the common addresses.
                   Routers send what is for outside to its MAC, through the first of their networks (the
                   transit); it sends into each network directly. The host routes between it and the outside
                   interface, and answers ARP there for its address and the floating ones.
    balancer-<n>   at the load balancer's host: the virtual address with a MAC of its own.

    server - router-<n> of its host - transit network - gateway-<n> - host - outside

IPv6 is routed, between networks and to the outside (see `ipv6`); IPv4 is translated on its way out.
"""

from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network

import msgspec

from nahtlos.model.config import HostConfig, LoadBalancerConfig, NetworkConfig, RouterConfig
from nahtlos.model.ids import NetworkId, PortId, SubnetId
from nahtlos.model.networking import RouterGateway, RouterInterface, SubnetSpec
from nahtlos.physical.network.device_names import bridge_name, tunnel_name
from nahtlos.physical.network.items import Forward, Item, TunnelEntry
from nahtlos.physical.network.items import Neighbour as BridgeNeighbour
from nahtlos.physical.network.plan import Place
from nahtlos.physical.network.routing import ipv6, translation
from nahtlos.physical.network.routing.facts import (
    REACHABLE,
    Address,
    Cable,
    Entry,
    Fact,
    Link,
    Neighbour,
    Proxy,
    Route,
    Setting,
    Space,
)
from nahtlos.physical.network.routing.translation import OUTSIDE

INSIDE = "in"
"""A load balancer's interface."""
HOST_SIDE = "169.254.0.1"
"""What a gateway sends to is outside, and a router what is for its gateway: an address that is no one's."""
GATEWAY_SIDE = "169.254.0.2"
OUTSIDE_MTU = 1500


# --- names -------------------------------------------------------------------------------------------


def router_name(number: int) -> str:
    return f"router-{number}"


def gateway_name(number: int) -> str:
    return f"gateway-{number}"


def balancer_name(number: int) -> str:
    return f"balancer-{number}"


def inner_name(vni: int) -> str:
    """A network's interface in a router or gateway."""
    return f"n{vni}"


def _mac(kind: int, number: int) -> str:
    return f"02:6e:72:{kind:02x}:{number >> 8 & 0xFF:02x}:{number & 0xFF:02x}"


def router_mac(number: int) -> str:
    """The same on every host and in every network of the router."""
    return _mac(0, number)


def gateway_mac(number: int) -> str:
    """Of whichever host holds the gateway: a move changes one tunnel entry and no neighbour."""
    return _mac(1, number)


def balancer_mac(number: int) -> str:
    return _mac(4, number)


def link_local(mac: str) -> str:
    """What the kernel makes of a MAC for IPv6."""
    raw = bytes.fromhex(mac.replace(":", ""))
    packed = b"\xfe\x80" + bytes(6) + bytes((raw[0] ^ 2,)) + raw[1:3] + b"\xff\xfe" + raw[3:]
    return str(ip_address(packed))


# --- what a configuration says ------------------------------------------------------------------------


class Attached(msgspec.Struct, frozen=True):
    """An interface of a router whose network this host has."""

    interface: RouterInterface
    subnet: SubnetSpec
    network: NetworkConfig

    @property
    def vni(self) -> int:
        return self.network.spec.vni

    @property
    def cidr(self) -> str:
        """Its address with the subnet's length."""
        return f"{ip_address(self.interface.ip)}/{ip_network(self.subnet.cidr, strict=False).prefixlen}"


class Site(msgspec.Struct, frozen=True):
    """What a host is told, looked up by names."""

    place: Place
    networks: Mapping[NetworkId, NetworkConfig]
    balancers: tuple[LoadBalancerConfig, ...]
    routers: tuple[RouterConfig, ...]
    fixed: Mapping[PortId, str]
    """First address of each port."""

    def leads_out(self, router: RouterConfig) -> bool:
        """Whether the router's gateway is here; or was, and some host may not know that it has gone."""
        gateway = router.spec.gateway
        return gateway is not None and (gateway.host == self.place.host or router.passing)

    def attached(self, router: RouterConfig) -> tuple[Attached, ...]:
        """By VNI: the first one's network is the transit."""
        found = [a for i in router.spec.interfaces if (a := self._attached(i)) is not None]
        return tuple(sorted(found, key=lambda a: (a.vni, a.interface.subnet)))

    def _attached(self, interface: RouterInterface) -> Attached | None:
        network = self.networks.get(interface.network)
        subnet = _subnet(network, interface.subnet) if network else None
        return Attached(interface, subnet, network) if network and subnet else None

    def neighbours(self, network: NetworkConfig) -> dict[str, str]:
        """MAC of every address of a network that is known: servers, what they may send from alone, and
        load balancers."""
        found: dict[str, str] = {}
        claims: dict[str, set[str]] = {}
        for port in network.ports:
            found.update({str(ip_address(ip)): port.mac.lower() for ip in port.all_addresses})
            for pair in port.allowed_pairs:
                wanted = ip_network(pair.cidr, strict=False)
                if wanted.num_addresses == 1:
                    mac = (pair.mac or port.mac).lower()
                    claims.setdefault(str(wanted.network_address), set()).add(mac)
        for ip, macs in claims.items():
            if len(macs) == 1:  # of several, who has it at the moment is known to them alone
                found.setdefault(ip, *macs)
        for balancer in self.balancers:
            if balancer.spec.network == network.spec.id:
                found[str(ip_address(balancer.spec.vip))] = balancer_mac(balancer.spec.number)
        return found

    def translated(self, router: RouterConfig) -> dict[str, str]:
        """Floating address -> fixed address, of those that lead somewhere."""
        found: dict[str, str] = {}
        for floating in router.floating_ips:
            fixed = floating.fixed_ip or (self.fixed.get(floating.port, "") if floating.port else "")
            if fixed:
                found[str(ip_address(floating.address))] = str(ip_address(fixed))
        return found


def _subnet(network: NetworkConfig, wanted: SubnetId) -> SubnetSpec | None:
    return next((s for s in network.spec.all_subnets if s.id == wanted), None)


def site(config: HostConfig, place: Place) -> Site:
    return Site(
        place=place,
        networks={n.spec.id: n for n in config.networks},
        balancers=tuple(
            b for b in config.load_balancers if b.spec.network in {n.spec.id for n in config.networks}
        ),
        routers=config.routers,
        fixed={p.id: p.ip for n in config.networks for p in n.ports},
    )


def spaces(at: Site) -> tuple[Space, ...]:
    """Every namespace this host should have."""
    found: list[Space] = []
    for router in at.routers:
        if at.attached(router):
            found.append(router_space(router, at))
            if at.leads_out(router):
                found.append(gateway_space(router, at))
    found += [balancer_space(b, at) for b in at.balancers if b.spec.host == at.place.host]
    return tuple(found)


# --- routers -----------------------------------------------------------------------------------------


def router_space(router: RouterConfig, at: Site) -> Space:
    attached, number = at.attached(router), router.spec.number
    mac = router_mac(number)
    networks = {a.vni: a.network for a in attached}
    inside: set[Fact] = {*_routing_settings()}
    for vni, network in networks.items():
        inside.update(_inner(vni, network, mac, at))
        inside.add(Address(inner_name(vni), f"{link_local(mac)}/64"))
    inside.update(Address(inner_name(a.vni), a.cidr) for a in attached)
    if router.spec.gateway is not None:
        transit = inner_name(attached[0].vni)
        inside.add(Neighbour(transit, GATEWAY_SIDE, gateway_mac(number)))
        inside.add(Route("0.0.0.0/0", transit, GATEWAY_SIDE))
        if _ipv6(attached):
            inside.update(ipv6.in_router(transit, gateway_mac(number)))
    inside = _with_routes(inside, _static_routes(router, attached))
    cables = tuple(_cable("r", number, vni, network, mac) for vni, network in networks.items())
    return Space(
        name=router_name(number), cables=cables, inside=frozenset(inside), outside=_forwarded(cables)
    )


def _inner(vni: int, network: NetworkConfig, mac: str, at: Site) -> Iterable[Fact]:
    """A network's interface, and who is there: known, never asked for."""
    name = inner_name(vni)
    yield Link(name, mac, network.spec.mtu)
    for family in ("ipv4", "ipv6"):
        yield Setting(f"net/{family}/neigh/{name}/mcast_solicit", "0")
        yield Setting(f"net/{family}/neigh/{name}/ucast_solicit", "0")
    for ip, neighbour in at.neighbours(network).items():
        yield Neighbour(name, ip, neighbour)


def _routing_settings() -> Iterable[Fact]:
    """Of a whole namespace. Devices are born with the defaults."""
    for scope in ("all", "default"):
        yield Setting(f"net/ipv4/conf/{scope}/forwarding", "1")
        yield Setting(f"net/ipv4/conf/{scope}/rp_filter", "0")
        yield Setting(f"net/ipv4/conf/{scope}/send_redirects", "0")
        yield Setting(f"net/ipv4/conf/{scope}/accept_redirects", "0")
        yield Setting(f"net/ipv6/conf/{scope}/disable_ipv6", "0")
        yield Setting(f"net/ipv6/conf/{scope}/forwarding", "1")
        yield Setting(f"net/ipv6/conf/{scope}/accept_ra", "0")
        yield Setting(f"net/ipv6/conf/{scope}/accept_dad", "0")
    yield Setting("net/ipv6/conf/default/addr_gen_mode", "1")


def _static_routes(router: RouterConfig, attached: Iterable[Attached]) -> Iterable[Route]:
    """Those whose next hop is in a subnet of this router; the others have no way there."""
    attached = tuple(attached)
    for wanted in router.spec.routes:
        hop = ip_address(wanted.next_hop)
        for a in attached:
            if hop in ip_network(a.subnet.cidr, strict=False):
                destination = str(ip_network(wanted.destination, strict=False))
                yield Route(destination, inner_name(a.vni), str(hop))
                break


def _with_routes(facts: Iterable[Fact], routes: Iterable[Route]) -> set[Fact]:
    """A route that was asked for takes the place of one to the same destination."""
    routes = tuple(routes)
    keys = {route.key for route in routes}
    return {*(f for f in facts if f.key not in keys), *routes}


def _cable(kind: str, number: int, vni: int, network: NetworkConfig, mac: str) -> Cable:
    return Cable(
        outer=f"{kind}{number}-{vni}",
        inner=inner_name(vni),
        mac=mac,
        mtu=network.spec.mtu,
        bridge=bridge_name(vni),
    )


def _forwarded(cables: Iterable[Cable]) -> frozenset[Fact]:
    facts: set[Fact] = set()
    for cable in cables:
        facts.add(Setting(f"net/ipv6/conf/{cable.outer}/disable_ipv6", "1"))
        if cable.bridge and cable.forward:
            facts.add(Entry(cable.outer, cable.mac))
    return frozenset(facts)


# --- gateways ----------------------------------------------------------------------------------------


def gateway_space(router: RouterConfig, at: Site) -> Space:
    gateway = router.spec.gateway
    assert gateway is not None
    attached, number = at.attached(router), router.spec.number
    networks = {a.vni: a.network for a in attached}
    mac, near, far = gateway_mac(number), _mac(2, number), _mac(3, number)
    inside: set[Fact] = {*_routing_settings(), Link(OUTSIDE, near, OUTSIDE_MTU)}
    for vni, network in networks.items():
        inside.update(_inner(vni, network, mac, at))
    for a in attached:
        if ":" not in a.subnet.cidr:
            inside.add(Route(str(ip_network(a.subnet.cidr, strict=False)), inner_name(a.vni)))
    inside.add(Setting("net/netfilter/nf_conntrack_tcp_loose", "0"))
    # While its place moves, each of the two sees one direction of a connection: windows cannot be judged.
    inside.add(Setting("net/netfilter/nf_conntrack_tcp_be_liberal", "1"))
    inside.add(Address(OUTSIDE, f"{ip_address(gateway.address)}/32"))
    inside.add(Neighbour(OUTSIDE, HOST_SIDE, far))
    inside.add(Route("0.0.0.0/0", OUTSIDE, HOST_SIDE))
    host = Cable(outer=f"o{number}", inner=OUTSIDE, mac=near, mtu=OUTSIDE_MTU, outer_mac=far)
    six = _ipv6(attached)
    if six:
        inside.update(ipv6.in_gateway(six, mac, host))
    inside = _with_routes(
        inside, (r for r in _static_routes(router, attached) if six or ":" not in r.destination)
    )
    cables = (*(_cable("g", number, vni, network, mac) for vni, network in networks.items()), host)
    floating = at.translated(router)
    outside = _forwarded(cables) | _outside(gateway, _answering(router), host, floating)
    if six:
        cidrs = [cidr for cidr, _ in six]
        forced = at.place.forced
        outside = ipv6.instead(outside, ipv6.at_host(cidrs, router.interface, host, forced=forced))
    return Space(
        name=gateway_name(number),
        cables=cables,
        inside=frozenset(inside),
        outside=outside,
        rules=translation.rules(gateway, floating),
    )


def _answering(router: RouterConfig) -> str:
    """The interface at which this host answers for the gateway's addresses; empty: at none."""
    return "" if router.passing else router.interface


def _ipv6(attached: Iterable[Attached]) -> list[tuple[str, str]]:
    """Prefix and interface of each IPv6 subnet."""
    return [(_prefix(a), inner_name(a.vni)) for a in attached if ":" in a.subnet.cidr]


def _prefix(attached: Attached) -> str:
    return str(ip_network(attached.subnet.cidr, strict=False))


def _outside(
    gateway: RouterGateway, interface: str, cable: Cable, floating: Iterable[str]
) -> frozenset[Fact]:
    """The host's part: it routes to and from the gateway, and answers for its addresses."""
    address = str(ip_address(gateway.address))
    facts: set[Fact] = {
        Neighbour(cable.outer, address, cable.mac),
        Setting(f"net/ipv4/conf/{cable.outer}/forwarding", "1"),
        Setting(f"net/ipv4/conf/{cable.outer}/rp_filter", "0"),
    }
    for ip in (address, *floating):
        facts.add(Route(f"{ip}/32", cable.outer, "" if ip == address else address))
    if interface:
        facts.update(Proxy(interface, ip) for ip in (address, *floating))
        facts.add(Setting(f"net/ipv4/conf/{interface}/forwarding", "1"))
        facts.add(Setting(f"net/ipv4/neigh/{interface}/proxy_delay", "0"))
    return frozenset(facts)


# --- load balancers ----------------------------------------------------------------------------------


def balancer_space(balancer: LoadBalancerConfig, at: Site) -> Space:
    spec = balancer.spec
    network, mac, vip = at.networks[spec.network], balancer_mac(spec.number), ip_address(spec.vip)
    subnet = next((s for s in network.spec.all_subnets if vip in ip_network(s.cidr, strict=False)), None)
    length = ip_network(subnet.cidr, strict=False).prefixlen if subnet else vip.max_prefixlen
    inside: set[Fact] = {Link(INSIDE, mac, network.spec.mtu), Address(INSIDE, f"{vip}/{length}")}
    inside.add(Setting("net/ipv6/conf/all/disable_ipv6", "0"))
    inside.add(Setting("net/ipv6/conf/default/addr_gen_mode", "1"))
    inside.add(Address(INSIDE, f"{link_local(mac)}/64"))
    inside.update(
        Neighbour(INSIDE, ip, mac_) for ip, mac_ in at.neighbours(network).items() if ip != str(vip)
    )
    gateway = _gateway_of(subnet, network, at) if subnet else None
    if gateway is not None:
        inside.add(Neighbour(INSIDE, *gateway))
        inside.add(Route("::/0" if vip.version == 6 else "0.0.0.0/0", INSIDE, gateway[0]))
    cable = Cable(
        outer=f"l{spec.number}",
        inner=INSIDE,
        mac=mac,
        mtu=network.spec.mtu,
        bridge=bridge_name(network.spec.vni),
        flood=REACHABLE,
    )
    name = balancer_name(spec.number)
    return Space(name=name, cables=(cable,), inside=frozenset(inside), outside=_forwarded((cable,)))


def _gateway_of(subnet: SubnetSpec, network: NetworkConfig, at: Site) -> tuple[str, str] | None:
    """Address and MAC of the way out of a subnet: its router's, or the network's own."""
    for router in at.routers:
        for interface in router.spec.interfaces:
            if interface.subnet == subnet.id:
                return str(ip_address(interface.ip)), router_mac(router.spec.number)
    if network.spec.gateway_mac and subnet.gateway_ip and network.spec.gateway_ip == subnet.gateway_ip:
        return str(ip_address(subnet.gateway_ip)), network.spec.gateway_mac.lower()
    return None


# --- entries on the driver's bridges ------------------------------------------------------------------


def bridge_items(at: Site) -> frozenset[Item]:
    """How frames find routers, gateways and load balancers, wherever those are."""
    items: set[Item] = set()
    for router in at.routers:
        items.update(_router_items(router, at))
    for balancer in at.balancers:
        items.update(_balancer_items(balancer, at))
    return frozenset(items)


def _router_items(router: RouterConfig, at: Site) -> Iterable[Item]:
    attached, mac = at.attached(router), router_mac(router.spec.number)
    for a in attached:
        bridge = bridge_name(a.vni)
        ipv6 = ":" in a.interface.ip
        yield BridgeNeighbour(bridge, str(ip_address(a.interface.ip)), mac, router=ipv6)
        if ipv6:
            yield BridgeNeighbour(bridge, link_local(mac), mac, router=True)
        # Every host has its own: should that be missing, frames for it come back instead of reaching others.
        yield TunnelEntry(tunnel_name(a.vni), mac, at.place.address)
    gateway = router.spec.gateway
    if attached and gateway is not None and not at.leads_out(router) and router.gateway_vtep:
        yield from _elsewhere(attached[0].vni, gateway_mac(router.spec.number), router.gateway_vtep)


def _balancer_items(balancer: LoadBalancerConfig, at: Site) -> Iterable[Item]:
    vni, mac = at.networks[balancer.spec.network].spec.vni, balancer_mac(balancer.spec.number)
    yield BridgeNeighbour(bridge_name(vni), str(ip_address(balancer.spec.vip)), mac)
    if balancer.spec.host != at.place.host:
        yield from _elsewhere(vni, mac, balancer.vtep)


def _elsewhere(vni: int, mac: str, vtep: str) -> Iterable[Item]:
    yield TunnelEntry(tunnel_name(vni), mac, vtep)
    yield Forward(bridge_name(vni), mac, tunnel_name(vni))
