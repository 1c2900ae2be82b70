"""What would happen to a packet, place by place: anti-spoofing, groups, the path, routers, translation, load
balancers, and the groups of who receives it. Pure: from what is wanted and where servers are, not from what
hosts have done; while hosts converge, the two may differ.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, NetworkId, PortId, RouterId
from nahtlos.model.networking import (
    Direction,
    FloatingIpSpec,
    LoadBalancerSpec,
    Member,
    NetworkSpec,
    PortSpec,
    ProviderLink,
    Route,
    RouterInterface,
    RouterSpec,
)
from nahtlos.model.topology import IpAddress, Topology, family_of, same_address, within
from nahtlos.runtime.controllers.addresses import checked_address
from nahtlos.runtime.controllers.network_requests import known_port
from nahtlos.runtime.controllers.networks import Fate, Outcome, Trace, TraceRequest, TraceStep
from nahtlos.runtime.controllers.security_requests import MAX_ICMP, MAX_PORT, checked_protocol
from nahtlos.runtime.controllers.trace_rules import Packet, anti_spoof, firewall

LAST_BROADCAST = "255.255.255.255"
Places = Mapping[PortId, HostId]


def trace(topology: Topology, places: Places, request: TraceRequest) -> Trace:
    """`places`: the host of each port whose server is somewhere."""
    port = known_port(topology, request.port)
    address = str(checked_address(request.address, "address"))
    protocol = checked_protocol(request.protocol, family_of(address))
    _check_number(protocol, request.number)
    own = _own_address(topology, port, address, request)
    walk = _Walk(topology, places)
    if own is None:
        steps = (
            TraceStep(
                where=f"port {port.id}",
                what=f"it has no address of {family_of(address)}",
                outcome=Outcome.DROPPED,
            ),
        )
        source, destination = ("", address) if request.direction is Direction.EGRESS else (address, "")
        return Trace(
            source=source,
            destination=destination,
            protocol=protocol,
            number=request.number,
            steps=steps,
            fate=Fate.DROPPED,
            reason=steps[0].what,
        )
    outward = request.direction is Direction.EGRESS
    packet = Packet(
        source=own if outward else address,
        destination=address if outward else own,
        protocol=protocol,
        number=request.number,
    )
    if outward:
        walk.send(port, packet)
    else:
        walk.come_from(address, port, packet)
    return Trace(
        source=packet.source,
        destination=packet.destination,
        protocol=packet.protocol,
        number=packet.number,
        steps=tuple(walk.steps),
        fate=walk.fate,
        reason=walk.reason,
    )


def _check_number(protocol: str, number: int | None) -> None:
    if number is None:
        return
    if protocol not in ("tcp", "udp", "icmp"):
        raise Refused(f"a port of protocol {protocol or 'any'}", field="number", remedy="leave it out")
    low, high = (0, MAX_ICMP) if protocol == "icmp" else (1, MAX_PORT)
    if not low <= number <= high:
        raise Refused(f"{number}", field="number", remedy=f"give {low} to {high}")


def _own_address(topology: Topology, port: PortSpec, other: str, request: TraceRequest) -> str | None:
    """The port's side: what was named, else its address in the subnet of `other`, else its first of that
    family."""
    if request.source:
        own = str(checked_address(request.source, "source"))
        if family_of(own) is not family_of(other):
            raise Refused(
                f"{own} and {other} are of different families", field="source", remedy="name another"
            )
        return own
    fitting = [a for a in port.all_addresses if family_of(a) is family_of(other)]
    subnet = topology.subnet_of(port.network, other)
    near = [a for a in fitting if subnet is not None and within(a, subnet.cidr)]
    return next(iter(near or fitting), None)


@dataclass
class _Walk:
    """Follows one packet. Each method is one place; it notes what happens there and hands on."""

    topology: Topology
    places: Places
    steps: list[TraceStep] = field(default_factory=list[TraceStep])
    fate: Fate = Fate.DROPPED
    reason: str = ""

    # --- noting ---

    def say(self, where: str, what: str, outcome: Outcome = Outcome.PASSES) -> None:
        self.steps.append(TraceStep(where=where, what=what, outcome=outcome))

    def end(self, fate: Fate, reason: str) -> None:
        self.fate, self.reason = fate, reason

    def drop(self, where: str, what: str) -> None:
        self.say(where, what, Outcome.DROPPED)
        self.end(Fate.DROPPED, f"{where}: {what}")

    def passed(self, step: TraceStep) -> bool:
        self.steps.append(step)
        if step.outcome is Outcome.DROPPED:
            self.end(Fate.DROPPED, f"{step.where}: {step.what}")
        return step.outcome is not Outcome.DROPPED

    # --- beginning ---

    def send(self, port: PortSpec, packet: Packet) -> None:
        """From a port."""
        if same_address(packet.destination, port.all_addresses):
            self.say(
                f"port {port.id}", f"{packet.destination} is its own address: it never leaves the server"
            )
            return self.end(Fate.DELIVERED, "within the server")
        host = self.places.get(port.id)
        if host is None:
            return self.drop(f"port {port.id}", "its server is on no host")
        if not self.passed(anti_spoof(port, packet.source)):
            return None
        network = self.topology.networks[port.network]
        if packet.destination == network.dhcp_ip:
            self.say(f"host {host}", f"{packet.destination} is answered here: DHCP and names")
            return self.end(Fate.DELIVERED, f"by {host} itself")
        if not self.passed(firewall(self.topology, port, Direction.EGRESS, packet)):
            return None
        return self.leave(network, host, packet)

    def come_from(self, address: str, port: PortSpec, packet: Packet) -> None:
        """To `port` from whatever has `address`: a port that reaches it, or the outside."""
        sender = self._sender(address, port, packet.destination)
        if sender is not None:
            self.say(f"port {sender.id}", f"{address} is its address: the packet begins there")
            return self.send(sender, packet)
        if self.topology.subnet_of(port.network, address) is not None:
            return self.drop(f"network {port.network}", f"nobody in it has {address}")
        return self._from_outside(port, packet)

    def _sender(self, address: str, port: PortSpec, own: str) -> PortSpec | None:
        """In the port's network, else in one that shares a router with it."""
        router = self._router_at(port.network, own)
        networks = [port.network, *(i.network for i in (router.interfaces if router else ()))]
        found = (self.topology.holder(network, address) for network in networks)
        return next((sender for sender in found if sender is not None), None)

    def _from_outside(self, port: PortSpec, packet: Packet) -> None:
        network = self.topology.networks[port.network]
        floating = self.topology.floating_of(port.id, packet.destination)
        if network.provider is not None:
            self.say(
                "outside", f"comes in by {_outside(network.provider)}, where the outside sees its server"
            )
            return self._receive(port, self.places.get(port.id, HostId("")), packet)
        if network.gateway_host and within(packet.destination, network.cidr):
            self.say(
                f"host {network.gateway_host}",
                f"comes in by {self._uplink(network)}, routed to {network.id} as it is",
            )
            return self.deliver(network, network.gateway_host, packet)
        if floating is not None:
            packet = msgspec.structs.replace(packet, destination=floating.address)
            return self._to_floating(floating, packet)
        return self.drop(
            "outside",
            f"nothing outside leads to {packet.destination}, which has no floating IP: only answers to what "
            "it began come back",
        )

    # --- a network ---

    def leave(self, network: NetworkSpec, host: HostId, packet: Packet) -> None:
        """From a machine of `network` at `host`: to a neighbour, or to its gateway."""
        destination = ipaddress.ip_address(packet.destination)
        if destination.is_multicast or self._is_broadcast(network, destination):
            self.say(f"network {network.id}", f"{destination} goes to every port of the network")
            return self.end(Fate.DELIVERED, f"to all of {network.id}")
        if self.topology.subnet_of(network.id, packet.destination) is not None:
            return self.deliver(network, host, packet)
        return self._to_gateway(network, host, packet)

    def _is_broadcast(self, network: NetworkSpec, address: IpAddress) -> bool:
        subnets = (ipaddress.ip_network(s.cidr) for s in network.all_subnets)
        return str(address) == LAST_BROADCAST or any(
            s.version == 4 and address == s.broadcast_address for s in subnets
        )

    def _to_gateway(self, network: NetworkSpec, host: HostId, packet: Packet) -> None:
        subnet = self.topology.subnet_of(network.id, packet.source)
        if subnet is None:
            return self.drop(
                f"network {network.id}", f"{packet.source} is in none of its subnets: it knows no gateway"
            )
        if not subnet.gateway_ip:
            return self.drop(f"subnet {subnet.id}", "has no gateway, so its servers have no way out of it")
        if network.gateway_host and subnet.id == network.id:
            self._carry(host, network.gateway_host, "the gateway")
            interface = self._uplink(network)
            self.say(
                f"host {network.gateway_host}", f"routes it from {network.id} out of {interface} as it is"
            )
            return self.end(Fate.LEAVES, f"by {interface} of {network.gateway_host}")
        if network.provider is not None:
            return self._leaves_by(network.provider, host, f"to the outside's router at {subnet.gateway_ip}")
        router = self.topology.router_of(subnet.id)
        if router is None:
            return self.drop(
                f"subnet {subnet.id}",
                f"nobody answers for its gateway {subnet.gateway_ip}: it is attached to no router",
            )
        return self.route(router, host, packet)

    def deliver(self, network: NetworkSpec, host: HostId, packet: Packet) -> None:
        """To whoever in `network` has the packet's destination; it is at `host`."""
        holder = self.topology.holder(network.id, packet.destination)
        if holder is not None:
            return self._receive(holder, host, packet)
        balancer = self.topology.balancer_at(network.id, packet.destination)
        if balancer is not None:
            return self._balance(balancer, host, packet)
        router = self._gateway_at(network, packet.destination)
        if router is not None:
            self.say(f"router {router.id}", f"{packet.destination} is its own address in {network.id}")
            return self.end(Fate.DELIVERED, f"to router {router.id}, which answers pings")
        if network.gateway_host and packet.destination == network.gateway_ip:
            self._carry(host, network.gateway_host, "the gateway")
            return self.end(Fate.DELIVERED, f"to the gateway at {network.gateway_host}")
        if packet.destination == network.dhcp_ip:
            self.say(
                f"network {network.id}", f"{packet.destination} is answered by hosts for their own servers"
            )
            return self.end(Fate.DELIVERED, "to the host")
        return self._nobody(network, host, packet)

    def _nobody(self, network: NetworkSpec, host: HostId, packet: Packet) -> None:
        """No port has the address as its own; one may have been allowed to answer for it."""
        address = ipaddress.ip_address(packet.destination)
        allowed = [
            p
            for p in self.topology.ports_of(network.id)
            if any(address in ipaddress.ip_network(pair.cidr) for pair in p.allowed_pairs)
        ]
        if not allowed and network.provider is not None:
            return self._leaves_by(network.provider, host, f"nobody in the cloud has {address}")
        if not allowed:
            return self.drop(f"network {network.id}", f"nobody has {address}: nobody answers for it")
        names = ", ".join(p.id for p in allowed)
        self.say(f"network {network.id}", f"{address} may be answered for by {names} (allowed pairs)")
        return self._receive(allowed[0], host, packet)

    def _receive(self, port: PortSpec, host: HostId, packet: Packet) -> None:
        there = self.places.get(port.id)
        if there is None:
            self.drop(f"port {port.id}", "its server is on no host")
            return
        provider = self.topology.networks[port.network].provider
        if provider is not None and host != there:
            self.say(
                f"host {host}", f"goes out of {_outside(provider)} to host {there}, where port {port.id} is"
            )
        else:
            self._carry(host, there, f"port {port.id}")
        if self.passed(firewall(self.topology, port, Direction.INGRESS, packet)):
            server = self.topology.servers.get(port.id, "")
            self.end(Fate.DELIVERED, f"to port {port.id} of {server} at {there}")

    def _leaves_by(self, provider: ProviderLink, host: HostId, why: str) -> None:
        self.say(f"host {host}", f"{why}: goes out of {_outside(provider)}")
        return self.end(Fate.LEAVES, f"by {_outside(provider)} of {host}")

    def _carry(self, here: HostId, there: HostId, to: str) -> None:
        if here == there:
            self.say(f"host {here}", f"{to} is on the same host")
        else:
            self.say(f"host {here}", f"goes through the tunnel to host {there}, where {to} is")

    # --- routers ---

    def _router_at(self, network: NetworkId, address: str) -> RouterSpec | None:
        subnet = self.topology.subnet_of(network, address)
        return self.topology.router_of(subnet.id) if subnet else None

    def _gateway_at(self, network: NetworkSpec, address: str) -> RouterSpec | None:
        router = self._router_at(network.id, address)
        own = any(i.network == network.id and i.ip == address for i in (router.interfaces if router else ()))
        return router if own else None

    def route(self, router: RouterSpec, host: HostId, packet: Packet) -> None:
        where = f"router {router.id} at {host}"
        interface = self._attached(router, packet.destination)
        if interface is not None:
            self.say(where, f"{packet.destination} is in {interface.subnet}, attached here")
            return self.deliver(self.topology.networks[interface.network], host, packet)
        route = _longest(router.routes, packet.destination)
        if route is not None:
            return self._by_route(router, where, route, host, packet)
        if router.gateway is None:
            return self.drop(where, f"has no route to {packet.destination} and no gateway")
        return self._out(router, host, packet)

    def _attached(self, router: RouterSpec, address: str) -> RouterInterface | None:
        subnets = self.topology.subnets()
        return next(
            (i for i in router.interfaces if i.subnet in subnets and within(address, subnets[i.subnet].cidr)),
            None,
        )

    def _by_route(self, router: RouterSpec, where: str, route: Route, host: HostId, packet: Packet) -> None:
        self.say(where, f"route {route.destination} by {route.next_hop}")
        interface = self._attached(router, route.next_hop)
        if interface is None:
            self.drop(where, f"{route.next_hop} is in no subnet attached here")
            return
        holder = self.topology.holder(interface.network, route.next_hop)
        if holder is None:
            self.drop(f"network {interface.network}", f"nobody has {route.next_hop}, the next hop")
            return
        self._receive(holder, host, packet)
        if self.fate is Fate.DELIVERED:
            self.end(Fate.DELIVERED, f"to port {holder.id}, the next hop to {packet.destination}")

    def _out(self, router: RouterSpec, host: HostId, packet: Packet) -> None:
        """By the router's gateway, translated there."""
        assert router.gateway is not None, "the caller has looked"
        gateway = router.gateway
        where = f"router {router.id} at {gateway.host}"
        self._carry(host, gateway.host, "the router's gateway")
        floating = self._floating_of(router.id, packet.source)
        if floating is not None:
            self.say(where, f"floating IP: {packet.source} becomes {floating.address}", Outcome.TRANSLATED)
            packet = msgspec.structs.replace(packet, source=floating.address)
        elif gateway.snat and family_of(gateway.address) is family_of(packet.source):
            self.say(where, f"SNAT: {packet.source} becomes {gateway.address}", Outcome.TRANSLATED)
            packet = msgspec.structs.replace(packet, source=gateway.address)
        else:
            self.say(where, f"not translated: leaves as {packet.source}")
        own = next((r for r in self.topology.routers.values() if _is_at(r, packet.destination)), None)
        if own is not None:
            self.say(where, f"{packet.destination} is the outside address of router {own.id}")
            return self.end(Fate.DELIVERED, f"to router {own.id}, which answers pings")
        back = self.topology.floating_at(packet.destination)
        if back is not None:
            return self._to_floating(back, packet)
        interface = self.topology.external_interface(gateway.host)
        if not interface:
            return self.drop(where, f"{gateway.host} has no interface to the outside")
        self.say(where, f"leaves by {interface}")
        return self.end(Fate.LEAVES, f"by {interface} of {gateway.host} as {packet.source}")

    def _floating_of(self, router: RouterId, source: str) -> FloatingIpSpec | None:
        return next(
            (
                f
                for f in self.topology.floating_ips.values()
                if f.router == router and f.port is not None and f.fixed_ip == source
            ),
            None,
        )

    def _to_floating(self, floating: FloatingIpSpec, packet: Packet) -> None:
        """From the outside, to the floating IP that is the packet's destination."""
        router = self.topology.routers.get(floating.router) if floating.router else None
        port = self.topology.ports.get(floating.port) if floating.port else None
        if router is None or router.gateway is None or port is None:
            return self.drop(f"floating IP {floating.id}", f"{floating.address} is assigned to no port")
        self.say(
            f"router {router.id} at {router.gateway.host}",
            f"floating IP {floating.id}: {floating.address} becomes {floating.fixed_ip}",
            Outcome.TRANSLATED,
        )
        packet = msgspec.structs.replace(packet, destination=floating.fixed_ip)
        return self.deliver(self.topology.networks[port.network], router.gateway.host, packet)

    # --- load balancers ---

    def _balance(self, balancer: LoadBalancerSpec, host: HostId, packet: Packet) -> None:
        where = f"load balancer {balancer.id} at {balancer.host}"
        self._carry(host, balancer.host, f"load balancer {balancer.id}")
        if packet.protocol == "icmp":
            self.say(where, "it answers pings itself")
            return self.end(Fate.DELIVERED, f"to load balancer {balancer.id}")
        if packet.protocol != "tcp" or packet.number != balancer.port:
            return self.drop(where, f"it balances TCP port {balancer.port} and nothing else")
        members = [m for m in balancer.members if not m.draining and m.weight]
        if not members:
            return self.drop(where, "it has no member that takes new connections")
        total = sum(m.weight for m in members)
        shares = ", ".join(f"{m.address}:{m.port} {m.weight / total:.0%}" for m in members)
        self.say(
            where, f"a new connection from {balancer.vip} to one of {shares}, if healthy", Outcome.TRANSLATED
        )
        return self._to_members(balancer, members)

    def _to_members(self, balancer: LoadBalancerSpec, members: list[Member]) -> None:
        """Every one is tried; it is delivered if one can take it."""
        taken: list[str] = []
        refused = ""
        for member in members:
            packet = Packet(
                source=balancer.vip, destination=member.address, protocol="tcp", number=member.port
            )
            self.deliver(self.topology.networks[balancer.network], balancer.host, packet)
            if self.fate is Fate.DELIVERED:
                taken.append(f"{member.address}:{member.port}")
            else:
                refused = self.reason
        if taken:
            left_out = len(members) - len(taken)
            rest = f"; {left_out} of {len(members)} members cannot be reached" if left_out else ""
            return self.end(Fate.DELIVERED, f"by {balancer.id} to {' or '.join(taken)}{rest}")
        return self.end(Fate.DROPPED, refused)

    def _uplink(self, network: NetworkSpec) -> str:
        return self.topology.uplinks.get(network.id, "") or "no interface"


def _outside(provider: ProviderLink) -> str:
    return f"{provider.interface}, VLAN {provider.vlan}" if provider.vlan else provider.interface


def _is_at(router: RouterSpec, address: str) -> bool:
    return router.gateway is not None and router.gateway.address == address


def _longest(routes: tuple[Route, ...], address: str) -> Route | None:
    """The most exact route to `address`."""
    fitting = [r for r in routes if within(address, r.destination)]
    return max(fitting, key=lambda r: ipaddress.ip_network(r.destination).prefixlen, default=None)
