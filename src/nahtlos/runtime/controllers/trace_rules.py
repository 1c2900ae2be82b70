"""Whether a packet is one its port may send, and which rule of which security group lets it through. Pure."""

import ipaddress

from nahtlos.model.ids import SecurityGroupId
from nahtlos.model.networking import Direction, PortSpec, SecurityGroupSpec, SecurityRule, number_text
from nahtlos.model.topology import Topology, family_of, same_address
from nahtlos.model.values import Value
from nahtlos.runtime.controllers.networks import Outcome, TraceStep
from nahtlos.runtime.controllers.security_requests import rule_text


class Packet(Value, frozen=True, kw_only=True):
    """One that begins a connection. `number`: destination port, for ICMP the type; None: not said."""

    source: str
    destination: str
    protocol: str
    number: int | None = None

    def __str__(self) -> str:
        number = f" {self.number}" if self.number is not None else ""
        return f"{self.protocol or 'any'}{number} {self.source} → {self.destination}"


def anti_spoof(port: PortSpec, source: str) -> TraceStep:
    """A port sends from its own addresses and MAC, and from what its allowed pairs name."""
    where = f"port {port.id}"
    if same_address(source, port.all_addresses):
        return TraceStep(where=where, what=f"anti-spoofing: {source} is the port's own address")
    for pair in port.allowed_pairs:
        if ipaddress.ip_address(source) in ipaddress.ip_network(pair.cidr):
            mac = f" from {pair.mac}" if pair.mac else ""
            return TraceStep(
                where=where, what=f"anti-spoofing: allowed pair {pair.cidr}{mac} covers {source}"
            )
    own = ", ".join((*port.all_addresses, *(p.cidr for p in port.allowed_pairs)))
    return TraceStep(where=where, what=f"anti-spoofing: {source} is none of {own}", outcome=Outcome.DROPPED)


def firewall(topology: Topology, port: PortSpec, direction: Direction, packet: Packet) -> TraceStep:
    """All rules are looked at, group by group, until one allows the packet."""
    where = f"port {port.id}"
    if not port.security_groups:
        return TraceStep(where=where, what=f"{direction}: the port is in no security group: open")
    checked: list[str] = []
    for name in port.security_groups:
        group = topology.groups.get(name)
        if group is None:
            checked.append(f"{name}: there is no such group")
            continue
        for number, rule in enumerate(group.rules, 1):
            reason = mismatch(topology, rule, direction, packet)
            checked.append(f"{name} {number}: {rule_text(rule)}: {reason or 'allows it'}")
            if not reason:
                return TraceStep(
                    where=where,
                    what=f"{direction}: rule {number} of {name} allows it; {_answers(group)}",
                    checked=tuple(checked),
                )
    groups = ", ".join(port.security_groups)
    return TraceStep(
        where=where,
        what=f"{direction}: no rule of {groups} allows it",
        outcome=Outcome.DROPPED,
        checked=tuple(checked),
    )


def _answers(group: SecurityGroupSpec) -> str:
    return "answers pass" if group.stateful else "answers need a rule of their own"


def mismatch(topology: Topology, rule: SecurityRule, direction: Direction, packet: Packet) -> str:
    """Why `rule` does not apply to `packet`; empty if it does."""
    if rule.direction is not direction:
        return f"is for {rule.direction}"
    if rule.family is not family_of(packet.destination):
        return f"is for {rule.family}"
    if rule.protocol and rule.protocol != packet.protocol:
        return f"is for {rule.protocol}"
    if rule.port_min is not None and (reason := _number_mismatch(rule, packet)):
        return reason
    other = packet.source if direction is Direction.INGRESS else packet.destination
    if rule.remote_cidr and ipaddress.ip_address(other) not in ipaddress.ip_network(rule.remote_cidr):
        return f"{other} is not in {rule.remote_cidr}"
    if rule.remote_group is not None and not _is_member(topology, rule.remote_group, other):
        return f"{other} is in no port of {rule.remote_group}"
    return ""


def _number_mismatch(rule: SecurityRule, packet: Packet) -> str:
    assert rule.port_min is not None, "the caller has looked"
    icmp = rule.protocol == "icmp"
    what = "type" if icmp else "port"
    if packet.number is None:
        return f"is for {what} {number_text(rule)}, and none is given"
    high = rule.port_min if icmp or rule.port_max is None else rule.port_max
    return "" if rule.port_min <= packet.number <= high else f"is for {what} {number_text(rule)}"


def _is_member(topology: Topology, group: SecurityGroupId, address: str) -> bool:
    return any(same_address(address, port.all_addresses) for port in topology.members(group))
