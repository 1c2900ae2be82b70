"""Whether security groups and their rules can be as they are asked for. Pure; every refusal names the field
and the remedy."""

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import SecurityGroupId, checked_name
from nahtlos.model.networking import Direction, Family, SecurityGroupSpec, SecurityRule, number_text
from nahtlos.model.topology import Topology, family_of
from nahtlos.runtime.controllers.addresses import checked_prefix
from nahtlos.runtime.controllers.network_requests import checked_project, in_use, same_project
from nahtlos.runtime.controllers.networks import SecurityGroupRequest
from nahtlos.runtime.controllers.requests import listed

MAX_RULES = 200
ICMP = "icmp"
WITH_PORTS = ("tcp", "udp")
NUMBERS = {"1": ICMP, "6": "tcp", "17": "udp", "58": ICMP}
"""Numbers of protocols that have a name here."""
MAX_PORT = 65535
MAX_ICMP = 255

OPEN_OUTWARD = tuple(SecurityRule(direction=Direction.EGRESS, family=family) for family in Family)
"""What a new group allows."""


def known_group(
    topology: Topology, group: SecurityGroupId, field: str = "security_group"
) -> SecurityGroupSpec:
    if group not in topology.groups:
        raise NotFound(
            f"no security group '{group}'", field=field, remedy=f"security groups: {listed(topology.groups)}"
        )
    return topology.groups[group]


def new_group(topology: Topology, request: SecurityGroupRequest) -> SecurityGroupSpec:
    name = SecurityGroupId(checked_name(request.name, "name"))
    if name in topology.groups:
        raise Conflict(f"a security group '{name}' exists", field="name", remedy="choose another name")
    group = SecurityGroupSpec(
        id=name, project=checked_project(request.project), rules=(), stateful=request.stateful
    )
    known = msgspec.structs.replace(topology, groups={**topology.groups, name: group})
    for rule in OPEN_OUTWARD if request.rules is None else request.rules:
        group = with_rule(known, group, rule)
    return group


def with_rule(topology: Topology, group: SecurityGroupSpec, asked: SecurityRule) -> SecurityGroupSpec:
    rule = checked_rule(topology, group, asked)
    if rule in group.rules:
        raise Conflict(f"{group.id} has that rule", field="rule", remedy="nothing is left to do")
    if len(group.rules) >= MAX_RULES:
        raise Refused(f"{group.id} has {MAX_RULES} rules", field="rule", remedy="use a second group")
    return msgspec.structs.replace(group, rules=(*group.rules, rule))


def without_rule(topology: Topology, group: SecurityGroupSpec, asked: SecurityRule) -> SecurityGroupSpec:
    rule = asked if asked in group.rules else checked_rule(topology, group, asked)
    if rule not in group.rules:
        raise NotFound(
            f"{group.id} has no such rule",
            field="rule",
            remedy=f"nahtlos security-group show {group.id} lists them",
        )
    return msgspec.structs.replace(group, rules=tuple(r for r in group.rules if r != rule))


def check_group_unused(topology: Topology, group: SecurityGroupId) -> None:
    known_group(topology, group)
    users = [f"port {port.id}" for port in topology.members(group)]
    users += [
        f"security group {other.id}"
        for other in topology.groups.values()
        if other.id != group and any(rule.remote_group == group for rule in other.rules)
    ]
    in_use(f"security group {group}", users, "security_group", "take it from these first")


# --- rules -------------------------------------------------------------------------------------------


def checked_rule(topology: Topology, group: SecurityGroupSpec, asked: SecurityRule) -> SecurityRule:
    """The rule in its one canonical form."""
    protocol = checked_protocol(asked.protocol, asked.family)
    low, high = _range(protocol, asked.port_min, asked.port_max)
    return SecurityRule(
        direction=asked.direction,
        family=asked.family,
        protocol=protocol,
        port_min=low,
        port_max=high,
        remote_cidr=_remote_cidr(asked),
        remote_group=_remote_group(topology, group, asked),
    )


def checked_protocol(asked: str, family: Family) -> str:
    protocol = asked.lower()
    if protocol in ("", "any"):
        return ""
    if protocol in ("icmpv6", "ipv6-icmp"):
        if family is not Family.IPV6:
            raise Refused("ICMPv6 in a rule for IPv4", field="protocol", remedy="give the family ipv6")
        return ICMP
    if protocol in ("tcp", "udp", ICMP):
        return protocol
    if not (protocol.isascii() and protocol.isdigit() and int(protocol) <= 255):
        raise Refused(
            f"'{asked}' is no protocol", field="protocol", remedy="give tcp, udp, icmp, any, or 0 to 255"
        )
    number = str(int(protocol))
    if (number, family) in (("1", Family.IPV6), ("58", Family.IPV4)):
        return number  # ICMP of the other family: an ordinary number here
    return NUMBERS.get(number, number)


def _range(protocol: str, low: int | None, high: int | None) -> tuple[int | None, int | None]:
    if protocol == ICMP:
        return _icmp_range(low, high)
    if low is None and high is None:
        return None, None
    if protocol not in WITH_PORTS:
        raise Refused(
            f"ports of {'any protocol' if not protocol else f'protocol {protocol}'}",
            field="port_min",
            remedy="give the protocol tcp or udp, or leave the ports out",
        )
    low, high = (low if low is not None else high), (high if high is not None else low)
    assert low is not None and high is not None, "at least one is given"
    for field, port in (("port_min", low), ("port_max", high)):
        if not 1 <= port <= MAX_PORT:
            raise Refused(f"{port} is no port", field=field, remedy=f"give 1 to {MAX_PORT}")
    if low > high:
        raise Refused(f"ports {low} to {high} are none", field="port_min", remedy=f"give {high} to {low}")
    return low, high


def _icmp_range(kind: int | None, code: int | None) -> tuple[int | None, int | None]:
    if kind is None and code is not None:
        raise Refused("an ICMP code without a type", field="port_min", remedy="give the type, too")
    for field, value in (("port_min", kind), ("port_max", code)):
        if value is not None and not 0 <= value <= MAX_ICMP:
            raise Refused(f"{value} is no ICMP type or code", field=field, remedy=f"give 0 to {MAX_ICMP}")
    return kind, code


def _remote_cidr(asked: SecurityRule) -> str:
    if not asked.remote_cidr:
        return ""
    if asked.remote_group is not None:
        raise Refused(
            "both a prefix and a group as the other side", field="remote_group", remedy="make two rules"
        )
    cidr = checked_prefix(asked.remote_cidr, "remote_cidr")
    if family_of(str(cidr)) is not asked.family:
        raise Refused(
            f"{cidr} in a rule for {asked.family}",
            field="remote_cidr",
            remedy=f"give the family {family_of(str(cidr))}",
        )
    return "" if cidr.prefixlen == 0 else str(cidr)


def _remote_group(
    topology: Topology, group: SecurityGroupSpec, asked: SecurityRule
) -> SecurityGroupId | None:
    if asked.remote_group is None or asked.remote_group == group.id:
        return asked.remote_group
    other = known_group(topology, asked.remote_group, "remote_group")
    same_project(group.project, other.project, f"security group {other.id}", "remote_group")
    return other.id


# --- in words ----------------------------------------------------------------------------------------


def rule_text(rule: SecurityRule) -> str:
    """`ingress ipv4 tcp 80-81 from 10.0.0.0/8`"""
    side = "from" if rule.direction is Direction.INGRESS else "to"
    other = f"group {rule.remote_group}" if rule.remote_group is not None else rule.remote_cidr or "anywhere"
    parts = (rule.direction, rule.family, rule.protocol or "any", number_text(rule), side, other)
    return " ".join(part for part in parts if part)
