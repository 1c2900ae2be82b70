"""Security groups as packet-filter rules and as a judgement: what a group allows.

Pure. Owns what a rule means, in both forms: lines of an nftables chain for packets, and `allowed` for
connections that are remembered already. A rule that cannot be meant (a prefix of the other family, ports of
a protocol that has none, a range that ends before it begins) allows nothing. Never knows ports, taps or
hosts.
"""

import functools
import hashlib
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import (
    IPv4Network,
    IPv6Network,
    collapse_addresses,
    ip_address,
    ip_network,
)

import msgspec

from nahtlos.model.config import HostConfig, PortConfig
from nahtlos.model.ids import SecurityGroupId
from nahtlos.model.networking import Direction, Family, SecurityGroupSpec, SecurityRule

REMEMBERED = 1 << 15
"""Addresses that are not read again: some thousand ports' worth."""
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
NAMED = {"tcp": TCP, "udp": UDP, "icmp": ICMP}
WITH_PORTS = {TCP, UDP, 33, 132, 136}
"""Also DCCP, SCTP and UDP-Lite."""
WIDTH = {Family.IPV4: 32, Family.IPV6: 128}
WORD = {Family.IPV4: "ip", Family.IPV6: "ip6"}


class Members(msgspec.Struct, frozen=True):
    """Addresses of all ports in a group, of one family: single ones, and prefixes they may send from."""

    addresses: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()

    def holds(self, address: str) -> bool:
        if address in self.addresses:
            return True
        found = ip_address(address)
        return any(found in ip_network(prefix) for prefix in self.prefixes)


NOBODY = Members()
Membership = Mapping[tuple[SecurityGroupId, Family], Members]


def membership(config: HostConfig, wanted: frozenset[SecurityGroupId]) -> Membership:
    """Members of the `wanted` groups among all ports of the host's networks, wherever they are."""
    found: dict[SecurityGroupId, list[str]] = {group: [] for group in wanted}
    for network in config.networks:
        for port in network.ports:
            for group in port.security_groups:
                if group in found:
                    found[group] += sources(port)
    return {(group, f): _members(cidrs, f) for group, cidrs in found.items() for f in Family}


def sources(port: PortConfig) -> list[str]:
    """Addresses and prefixes that a port may send from."""
    return [*(a for a in port.all_addresses if a), *(pair.cidr for pair in port.allowed_pairs)]


def _members(cidrs: Iterable[str], family: Family) -> Members:
    own = [cidr for cidr in cidrs if family_of(cidr) is family]
    found = {cidr: single(cidr) for cidr in own}
    wide = [cidr for cidr, address in found.items() if address is None]
    return Members(frozenset(address for address in found.values() if address is not None), collapsed(wide))


def collapsed(cidrs: Iterable[str]) -> tuple[str, ...]:
    """The same addresses in as few prefixes as possible, none within another: as interval sets want it."""
    networks = [ip_network(cidr, strict=False) for cidr in cidrs]
    four = [n for n in networks if n.version == 4]
    six = [n for n in networks if n.version == 6]
    return tuple(str(n) for n in (*collapse_addresses(four), *collapse_addresses(six)))


@functools.lru_cache(maxsize=REMEMBERED)
def single(cidr: str) -> str | None:
    """The one address that is meant, as the kernel writes it; None for a prefix of several."""
    address, slash, length = cidr.partition("/")
    if slash and length != ("128" if ":" in address else "32"):
        return None
    return canonical(address)


def canonical(address: str) -> str:
    """As the kernel writes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, address))
    except OSError as error:
        raise ValueError(f"'{address}' is no address") from error


def family_of(cidr: str) -> Family:
    return Family.IPV6 if ":" in cidr else Family.IPV4


def remote_groups(groups: Iterable[SecurityGroupSpec]) -> frozenset[SecurityGroupId]:
    return frozenset(r.remote_group for g in groups for r in g.rules if r.remote_group is not None)


# --- names -------------------------------------------------------------------------------------------


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def group_chain(group: SecurityGroupId, direction: Direction) -> str:
    return f"group_{digest(group)}_{direction}"


def member_set(group: SecurityGroupId, family: Family, *, prefixes: bool = False) -> str:
    return f"{'prefixes' if prefixes else 'members'}_{digest(group)}_{family}"


# --- as lines of a chain -----------------------------------------------------------------------------


def group_lines(
    group: SecurityGroupSpec | None, direction: Direction, members: Membership
) -> tuple[str, ...]:
    """What the group accepts; anything else returns to the chain that asked."""
    rules = group.rules if group is not None else ()
    lines = [line for rule in rules if rule.direction is direction for line in rule_lines(rule, members)]
    return tuple(dict.fromkeys(lines))


def rule_lines(rule: SecurityRule, members: Membership) -> tuple[str, ...]:
    """None: allows nothing. Several: each of them allows."""
    what = _what(rule)
    if what is None:
        return ()
    return tuple(" ".join(filter(None, (where, what, "accept"))) for where in _where(rule, members))


def _where(rule: SecurityRule, members: Membership) -> Sequence[str]:
    """The other side, in every way it can be named."""
    word = WORD[rule.family]
    end = f"{word} {'saddr' if rule.direction is Direction.INGRESS else 'daddr'}"
    of_family = f"meta protocol {word}"
    if rule.remote_group is not None:
        names = [member_set(rule.remote_group, rule.family)]
        if members.get((rule.remote_group, rule.family), NOBODY).prefixes:
            names.append(member_set(rule.remote_group, rule.family, prefixes=True))
        return [f"{of_family} {end} @{name}" for name in names]
    if not rule.remote_cidr:
        return [of_family]
    network = _prefix(rule)
    if network is None:
        return []
    return [f"{of_family} {end} {network}" if network.prefixlen else of_family]


def _prefix(rule: SecurityRule) -> IPv4Network | IPv6Network | None:
    try:
        network = ip_network(rule.remote_cidr, strict=False)
    except ValueError:
        return None
    return network if WIDTH[rule.family] == network.max_prefixlen else None


def protocol_number(rule: SecurityRule) -> int | None:
    """None: no protocol there is. -1: any."""
    if not rule.protocol:
        return -1
    number = NAMED.get(rule.protocol)
    if number is None:
        number = int(rule.protocol) if rule.protocol.isdecimal() and int(rule.protocol) < 256 else None
    return ICMPV6 if number == ICMP and rule.family is Family.IPV6 else number


def _what(rule: SecurityRule) -> str | None:
    number = protocol_number(rule)
    if number is None:
        return None
    low, high = rule.port_min, rule.port_max
    if number in (ICMP, ICMPV6):
        return _icmp(number, low, high)
    if low is None and high is None:
        return "" if number < 0 else f"meta l4proto {number}"
    first, last = low or 0, 65535 if high is None else high
    if number not in WITH_PORTS or not 0 <= first <= last <= 65535:
        return None
    return f"meta l4proto {number} th dport {first if first == last else f'{first}-{last}'}"


def _icmp(number: int, kind: int | None, code: int | None) -> str | None:
    word = "icmp" if number == ICMP else "icmpv6"
    if kind is None:
        return f"meta l4proto {number}"
    if not 0 <= kind <= 255 or not 0 <= (code or 0) <= 255:
        return None
    return f"{word} type {kind}" + ("" if code is None else f" {word} code {code}")


# --- as a judgement ----------------------------------------------------------------------------------


class Flow(msgspec.Struct, frozen=True):
    """A connection as it was opened. For ICMP `port` is the type, and `code` the code."""

    zone: int
    source: str
    destination: str
    protocol: int
    port: int = 0
    code: int = 0

    @property
    def family(self) -> Family:
        return family_of(self.source)


def allowed(
    flow: Flow, groups: Iterable[SecurityGroupSpec | None], direction: Direction, members: Membership
) -> bool:
    """Whether a port in `groups` may open it (egress) or be reached by it (ingress)."""
    remote = flow.source if direction is Direction.INGRESS else flow.destination
    return any(
        _allows(rule, flow, remote, members)
        for group in groups
        if group is not None
        for rule in group.rules
        if rule.direction is direction
    )


def _allows(rule: SecurityRule, flow: Flow, remote: str, members: Membership) -> bool:
    if rule.family is not flow.family or not _means(rule, flow):
        return False
    if rule.remote_group is not None:
        return members.get((rule.remote_group, rule.family), NOBODY).holds(remote)
    if not rule.remote_cidr:
        return True
    network = _prefix(rule)
    return network is not None and ip_address(remote) in network


def _means(rule: SecurityRule, flow: Flow) -> bool:
    number = protocol_number(rule)
    low, high = rule.port_min, rule.port_max
    if number is None or number not in (-1, flow.protocol):
        return False
    if number in (ICMP, ICMPV6):
        return low is None or (low == flow.port and high in (None, flow.code))
    if low is None and high is None:
        return True
    return number in WITH_PORTS and (low or 0) <= flow.port <= (65535 if high is None else high)
