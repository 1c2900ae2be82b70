"""The firewall of a host as tables: anti-spoofing of every tap, security groups of the ports that have any.

Pure: from configuration, local ports and moves to `firewall_tables.Table`s. Owns the layout of the tables
`nahtlos-firewall` (bridge and inet); what a group's rule means is in `firewall_rules`. Never acts.

    bridge prerouting   guard      frames from a tap: MAC, IP, ARP and ND sender are the port's own, and none
                                   answers DHCP or advertises a router
    before forwarding   classify   the state of the connection becomes a mark of the frame
    bridge forward      egress     by the tap it comes from: the port's groups
                        ingress    by the tap it goes to: the port's groups

What does not come from a tap is not looked at: the network's own devices (gateways, tunnels) are trusted.
Frames that the host itself sends to a tap do not pass `forward`: hosts with taps route nothing into networks.

Ports in the same groups share a chain per direction, that chain asks one chain per group, and a verdict map
leads from the tap to it. So a changed rule is one rewritten chain however many ports have it, and a port is a
handful of elements.

During a move (see handover) the source judges what comes in for the port until the move has ended, also what
it only passes on: by the destination's MAC, as such a frame leaves by the tunnel. What it lets in it marks,
in the tunnel's own header (DSCP), and the destination believes that mark: what is remembered of connections
may not have arrived there yet. The rest is passed on without the mark and judged by the destination, because
the server may have begun there what the source has never seen. So a frame is refused only by who knows all.
What local servers send is judged as ever.

With a peer of an older release the source drops what it does not let in, but for TCP segments of nothing
known, and the destination accepts all that comes for that MAC by the tunnel.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from ipaddress import ip_network

import msgspec

from nahtlos.model.config import HostConfig, PortConfig
from nahtlos.model.ids import SecurityGroupId
from nahtlos.model.networking import Direction, Family, SecurityGroupSpec
from nahtlos.physical.network import device_names
from nahtlos.physical.network.firewall import guard, rules
from nahtlos.physical.network.firewall.tables import (
    BRIDGE,
    INET,
    Chain,
    Elements,
    Table,
    digest,
    key,
    name_part,
)
from nahtlos.physical.network.parts import LocalPort
from nahtlos.physical.ports import MoveRole

ESTABLISHED, NEW, INVALID = 0x6E6C0001, 0x6E6C0002, 0x6E6C0004
"""Marks of frames. INVALID: of no connection that is known, and not the beginning of one."""
LET_IN, LET_IN_BIT = 0x6E6C0010, 0x10
"""The source of a move has let it in. At the destination the bit is beside what it knows itself."""
LET_IN_DSCP = 3
"""Of the tunnel's header: one of those that are for local use."""
TUNNEL_PORT = 4789
SERVICES = "sv*"
"""Devices of the networks' own services."""


class Tracking(StrEnum):
    """How bridged packets come to belong to connections."""

    BRIDGE = "nf_conntrack_bridge"
    NETFILTER = "br_netfilter"
    """The bridge hands its IP packets to the inet hooks on the way; they come back with the mark."""


class Moving(msgspec.Struct, frozen=True):
    """A port with groups that takes part in a move here."""

    port: PortConfig
    vni: int
    tap: str
    role: MoveRole
    marked: bool = False
    """The other host, too, knows the mark of what the source has let in."""


class Policy(msgspec.Struct, frozen=True):
    """What security groups say, as far as this host needs it."""

    groups: Mapping[SecurityGroupId, SecurityGroupSpec]
    members: rules.Membership


EMPTY = Policy({}, {})


def policy(config: HostConfig, ports: Iterable[PortConfig]) -> Policy:
    """Groups of `ports`, and members of those their rules name."""
    used = {group for port in ports for group in port.security_groups}
    groups = {group.id: group for group in config.security_groups if group.id in used}
    return Policy(groups, rules.membership(config, rules.remote_groups(groups.values())))


def is_stateful(port: PortConfig, held: Policy) -> bool:
    """A group nobody knows counts as stateful: it allows nothing."""
    groups = [held.groups.get(group) for group in port.security_groups]
    return any(group is None or group.stateful for group in groups)


# --- tables ------------------------------------------------------------------------------------------


def tables(
    held: Policy,
    local: Iterable[LocalPort],
    moving: Iterable[Moving],
    tracking: Tracking,
) -> tuple[Table, ...]:
    """Everything that is needed for the ports with a tap here."""
    local, moving = tuple(local), tuple(moving)
    filtered = [p for p in local if p.port.security_groups]
    chains: dict[str, Chain] = dict(guard.CHAINS)
    sets = _guarded(local)
    if filtered:
        chains.update(JUDGING)
        if all(is_stateful(p, held) for p in (*(p.port for p in filtered), *(m.port for m in moving))):
            chains.update(FAST)
        chains.update(_profiles(held, filtered, moving))
        chains.update(_group_chains(held, filtered))
        sets.update(_verdicts(held, filtered, moving))
        sets.update(_member_sets(held))
    found = [Table(BRIDGE, chains, sets)]
    zones = zones_of(filtered, held)
    if not zones:
        return tuple(found)
    if tracking is Tracking.BRIDGE:
        chains.update(TRACKED_BY_BRIDGE)
        sets["zones"] = _zones(zones)
        return (*found, Table(INET, MARKED_TUNNELS, {}))
    return (*found, Table(INET, TRACKED_BY_INET, {"zones": _zones(zones), "bridges": _bridges(zones)}))


def is_too_fast(family: str, name: str, chain: Chain, written: str) -> bool:
    """`chain` asks each port, and what was `written` there (a digest) does not: a stateless port has come."""
    return (
        family == BRIDGE
        and name in FAST
        and chain.text == JUDGING[name].text
        and written == digest(FAST[name].text)
    )


def _guarded(local: Iterable[LocalPort]) -> dict[str, Elements]:
    items: dict[str, dict[str, str]] = {name: {} for name in guard.DECLARATIONS}
    for port in local:
        for name, keys in guard.elements(port).items():
            items[name].update(dict.fromkeys(keys, ""))
    return {name: Elements(guard.DECLARATIONS[name], found) for name, found in items.items()}


def zones_of(filtered: Iterable[LocalPort], held: Policy) -> dict[str, int]:
    """Bridges whose connections are to be remembered, and the zone in which."""
    vnis = {p.network.spec.vni for p in filtered if is_stateful(p.port, held)}
    return {device_names.bridge_name(vni): device_names.tracking_zone(vni) for vni in sorted(vnis)}


def _zones(zones: Mapping[str, int]) -> Elements:
    items = {name_part(bridge): str(zone) for bridge, zone in zones.items()}
    return Elements("typeof iifname : ct zone;", items, values=True)


def _bridges(zones: Mapping[str, int]) -> Elements:
    return Elements("type ifname;", {name_part(bridge): "" for bridge in zones})


# --- the state of connections ------------------------------------------------------------------------


def _classify(beside: int) -> tuple[str, ...]:
    return (
        f"ct state established,related meta mark set {ESTABLISHED | beside:#x} return",
        f"ct state new tcp flags & (fin | syn | rst | ack) != syn meta mark set {INVALID | beside:#x} return",
        f"ct state new meta mark set {NEW | beside:#x} return",
        f"ct state invalid meta mark set {INVALID | beside:#x}",
    )


_STATES = {
    "states": Chain((f"meta mark {LET_IN:#x} goto states_let_in", *_classify(0))),
    "states_let_in": Chain(_classify(LET_IN_BIT)),
}
_MARK_IN = f"udp dport {TUNNEL_PORT} ip dscp {LET_IN_DSCP:#x} meta mark set {LET_IN:#x}"
_MARK_OUT = f"udp dport {TUNNEL_PORT} meta mark {LET_IN:#x} ip dscp set {LET_IN_DSCP:#x}"
TRACKED_BY_INET = {
    "zone": Chain(
        (
            "ct zone set iifname map @zones return",
            _MARK_IN,
            # What the tunnels carry is tracked where it is judged; the tunnels themselves have no state.
            f"udp dport {TUNNEL_PORT} notrack",
        ),
        "type filter hook prerouting priority raw; policy accept;",
    ),
    "tunnels": Chain(
        (_MARK_OUT, f"udp dport {TUNNEL_PORT} notrack"),
        "type filter hook output priority raw; policy accept;",
    ),
    "classify": Chain(
        ("iifname @bridges goto states",), "type filter hook prerouting priority mangle; policy accept;"
    ),
    **_STATES,
}
MARKED_TUNNELS = {
    "marked": Chain((_MARK_IN,), "type filter hook prerouting priority raw; policy accept;"),
    "marks": Chain((_MARK_OUT,), "type filter hook output priority raw; policy accept;"),
}
TRACKED_BY_BRIDGE = {
    "zone": Chain(
        ("ct zone set meta ibrname map @zones",),
        "type filter hook prerouting priority -250; policy accept;",
    ),
    "classify": Chain(("goto states",), "type filter hook prerouting priority -150; policy accept;"),
    **_STATES,
}

# --- security groups ---------------------------------------------------------------------------------

JUDGING = {
    # Names and metadata of the network itself are for every server, whatever its groups say (see services).
    "egress": Chain(
        (f'oifname "{SERVICES}" accept', "iifname vmap @egress"),
        "type filter hook forward priority 10; policy accept;",
    ),
    "ingress": Chain(
        (
            f'iifname "{SERVICES}" accept',
            f"meta mark & {LET_IN_BIT:#x} != 0 jump let_in",
            "iifname . oifname . ether daddr @arriving accept",
            "oifname vmap @ingress",
            "oifname . ether daddr vmap @passed_on",
        ),
        "type filter hook forward priority 20; policy accept;",
    ),
    # Whoever else is sent such a frame judges it as any other.
    "let_in": Chain(
        (
            "iifname . oifname . ether daddr @arriving_marked accept",
            f"meta mark set meta mark and {~LET_IN_BIT & 0xFFFFFFFF:#x}",
        )
    ),
    # What the network itself asks and answers; who may answer is the guard's business.
    "egress_rest": Chain(
        (
            "meta protocol arp accept",
            "icmpv6 type { 131, 132, 133, 135, 136, 143 } accept",
            "udp sport 68 udp dport 67 meta protocol ip accept",
            "udp sport 546 udp dport 547 meta protocol ip6 accept",
            "counter drop",
        )
    ),
    "ingress_rest": Chain(
        (
            "meta protocol arp accept",
            "icmpv6 type { 130, 134, 135, 136 } accept",
            "udp sport 67 udp dport 68 meta protocol ip accept",
            "udp sport 547 udp dport 546 meta protocol ip6 accept",
            "counter drop",
        )
    ),
}
_KNOWN = f"meta mark {ESTABLISHED:#x}"
FAST = {
    # Where all that are judged are stateful, what belongs to a known connection is let in by each of them: it
    # is not asked which. What is only passed on is to be marked.
    "egress": Chain((f"{_KNOWN} accept", *JUDGING["egress"].rules), JUDGING["egress"].base),
    "ingress": Chain(
        (
            f"{_KNOWN} oifname . ether daddr vmap @passed_on",
            f"{_KNOWN} accept",
            *JUDGING["ingress"].rules,
        ),
        JUDGING["ingress"].base,
    ),
}
_FRAGMENTS = ("ip frag-off & 0x1fff != 0 accept", "frag frag-off != 0 accept")
"""Later fragments show no ports; without the first one nobody can do anything with them."""
PASSED_ON, PASSED_ON_MARKED = "passed_on", "passed_on_marked"


def profile_chain(port: PortConfig, what: str) -> str:
    """Shared by all ports in the same groups; `what` is a direction or one of PASSED_ON."""
    return f"ports_{_profile(port.security_groups)}_{what}"


@functools.lru_cache(maxsize=rules.REMEMBERED)
def _profile(groups: tuple[SecurityGroupId, ...]) -> str:
    return rules.digest(*sorted(set(groups)))


def _profiles(
    held: Policy, filtered: Iterable[LocalPort], moving: Iterable[Moving]
) -> Iterator[tuple[str, Chain]]:
    for port in {profile_chain(p.port, ""): p.port for p in filtered}.values():
        for direction in Direction:
            yield profile_chain(port, direction), Chain(_profile_lines(held, port, direction))
    for port in (m.port for m in moving if m.role is MoveRole.SOURCE):
        lines = _profile_lines(held, port, Direction.INGRESS)
        lenient = f"meta mark {INVALID:#x} accept"
        yield profile_chain(port, PASSED_ON), Chain((*lines[:-1], lenient, lines[-1]))
        if is_stateful(port, held):
            yield profile_chain(port, PASSED_ON_MARKED), Chain(_marked_lines(port))


def _profile_lines(held: Policy, port: PortConfig, direction: Direction) -> tuple[str, ...]:
    asked = [rules.group_chain(group, direction) for group in sorted(set(port.security_groups))]
    rest = f"goto {direction}_rest"
    if not is_stateful(port, held):
        return (*_FRAGMENTS, *(f"jump {name}" for name in asked), rest)
    new = (f"meta mark {NEW:#x} jump {name}" for name in asked)
    return (f"meta mark {ESTABLISHED:#x} accept", *new, rest)


def _marked_lines(port: PortConfig) -> tuple[str, ...]:
    """Nothing is dropped here."""
    asked = [rules.group_chain(group, Direction.INGRESS) for group in sorted(set(port.security_groups))]
    return (
        f"meta mark {ESTABLISHED:#x} meta mark set {LET_IN:#x} accept",
        f"meta mark != {NEW:#x} accept",
        f"meta mark set {LET_IN:#x}",
        *(f"jump {name}" for name in asked),
        f"meta mark set {NEW:#x} accept",
    )


def _group_chains(held: Policy, filtered: Iterable[LocalPort]) -> Iterator[tuple[str, Chain]]:
    for group in sorted({g for p in filtered for g in p.port.security_groups}):
        for direction in Direction:
            lines = rules.group_lines(held.groups.get(group), direction, held.members)
            yield rules.group_chain(group, direction), Chain(lines)


VERDICTS: Mapping[str, str] = {
    "egress": "type ifname : verdict;",
    "ingress": "type ifname : verdict;",
    "passed_on": "type ifname . ether_addr : verdict;",
}
ARRIVING = "type ifname . ifname . ether_addr;"
ARRIVING_SETS = ("arriving", "arriving_marked")


def _verdicts(
    held: Policy, filtered: Iterable[LocalPort], moving: Iterable[Moving]
) -> Iterator[tuple[str, Elements]]:
    found: dict[str, dict[str, str]] = {name: {} for name in (*VERDICTS, *ARRIVING_SETS)}
    for port in filtered:
        for name, items in port_verdicts(port).items():
            found[name].update(items)
    for move in moving:
        for name, items in move_elements(move, marked=_is_marked(held, move)).items():
            found[name].update(items)
    for name, declaration in VERDICTS.items():
        yield name, Elements(declaration, found[name], values=True)
    for name in ARRIVING_SETS:
        yield name, Elements(ARRIVING, found[name])


def _is_marked(held: Policy, move: Moving) -> bool:
    """Frames for a port without any stateful group have no state to be marked by: both hosts judge them."""
    return move.marked and (move.role is MoveRole.DESTINATION or is_stateful(move.port, held))


def port_verdicts(local: LocalPort) -> dict[str, dict[str, str]]:
    if not local.port.security_groups:
        return {}
    tap = name_part(local.tap)
    return {d.value: {tap: f"goto {profile_chain(local.port, d)}"} for d in Direction}


def move_elements(move: Moving, *, marked: bool) -> dict[str, dict[str, str]]:
    """What is different for a port while it moves."""
    mac = move.port.mac.lower()
    tunnel, gate = device_names.tunnel_name(move.vni), device_names.gate_port_name(move.vni)
    if move.role is MoveRole.SOURCE:
        chain = profile_chain(move.port, PASSED_ON_MARKED if marked else PASSED_ON)
        return {"passed_on": {key(name_part(tunnel), mac): f"goto {chain}"}}
    return {
        "arriving_marked" if marked else "arriving": {
            key(name_part(i), name_part(move.tap), mac): "" for i in (tunnel, gate)
        }
    }


def _member_sets(held: Policy) -> Iterator[tuple[str, Elements]]:
    for (group, family), members in held.members.items():
        kind = "ipv4_addr" if family is Family.IPV4 else "ipv6_addr"
        items = {rules.canonical(a): "" for a in members.addresses}
        yield rules.member_set(group, family), Elements(f"type {kind};", items)
        if members.prefixes:
            name = rules.member_set(group, family, prefixes=True)
            prefixes = {_prefix_text(p): "" for p in members.prefixes}
            yield name, Elements(f"type {kind}; flags interval;", prefixes)


def _prefix_text(prefix: str) -> str:
    network = ip_network(prefix)
    return f"{rules.canonical(str(network.network_address))}/{network.prefixlen}"


# --- connections -------------------------------------------------------------------------------------


class Judge:
    """Whether connections that are remembered would be allowed today, for the ports of this host."""

    def __init__(self, held: Policy, filtered: Iterable[LocalPort]) -> None:
        self._policy = held
        self._single: dict[tuple[int, str], list[PortConfig]] = {}
        self._wide: dict[int, list[tuple[str, PortConfig]]] = {}
        for port in filtered:
            zone = device_names.tracking_zone(port.network.spec.vni)
            for cidr in (*rules.sources(port.port), *guard.link_locals(port.port)):
                address = rules.single(cidr)
                if address is not None:
                    self._single.setdefault((zone, address), []).append(port.port)
                else:
                    self._wide.setdefault(zone, []).append((cidr, port.port))

    def allows(self, flow: rules.Flow) -> bool:
        """True as well if neither end is a filtered port here: others judge it."""
        return self._may(flow, Direction.EGRESS) and self._may(flow, Direction.INGRESS)

    def _may(self, flow: rules.Flow, direction: Direction) -> bool:
        own = flow.source if direction is Direction.EGRESS else flow.destination
        ports = self._ports(flow.zone, own)
        return not ports or any(self._lets(port, flow, direction) for port in ports)

    def _ports(self, zone: int, address: str) -> list[PortConfig]:
        found = self._single.get((zone, address))
        if found:
            return found
        wide = self._wide.get(zone, ())
        return [port for cidr, port in wide if rules.Members(prefixes=(cidr,)).holds(address)]

    def _lets(self, port: PortConfig, flow: rules.Flow, direction: Direction) -> bool:
        groups = [self._policy.groups.get(group) for group in port.security_groups]
        return rules.allowed(flow, groups, direction, self._policy.members) or _is_dhcp(flow)


def _is_dhcp(flow: rules.Flow) -> bool:
    return flow.protocol == rules.UDP and flow.port in (67, 68, 546, 547)
