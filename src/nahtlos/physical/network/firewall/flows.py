"""Connections that are remembered and no rule allows any more: found and forgotten.

Owns the pass over the kernel's table of connections after something was withdrawn, and the judgement of
whether something was. A connection that is forgotten is cut: what comes next of it belongs to nothing known.
Never decides what is allowed (see `firewall.Judge`).
"""

import hashlib
import socket
from collections.abc import Callable, Mapping

import msgspec

from nahtlos.model.config import PortConfig
from nahtlos.model.ids import PortId, SecurityGroupId
from nahtlos.model.networking import Family, SecurityRule
from nahtlos.physical.network.firewall.layout import Judge, Policy
from nahtlos.physical.network.firewall.rules import Flow, Members, sources
from nahtlos.physical.network.netlink import attributes
from nahtlos.physical.network.tracking import conntrack
from nahtlos.physical.network.tracking.conntrack import DST_NAT, SRC_NAT, STATUS, TUPLE_ORIG, Entry

SOURCES, DESTINATIONS = (1, 3), (2, 4)
DESTINATION_PORT, ICMP_TYPES, ICMP_CODES = 3, (5, 8), (6, 9)


class Standing(msgspec.Struct, frozen=True):
    """What connections are judged by, in a form that can be compared and kept. `ports` are those with a state
    here: zone, what they may send from, groups."""

    rules: Mapping[SecurityGroupId, frozenset[SecurityRule]]
    members: Mapping[tuple[SecurityGroupId, Family], Members]
    ports: Mapping[PortId, tuple[int, frozenset[str], frozenset[SecurityGroupId]]]

    @classmethod
    def of(cls, policy: Policy, ports: Mapping[PortId, tuple[PortConfig, int]]) -> "Standing":
        return cls(
            {group: frozenset(spec.rules) for group, spec in policy.groups.items()},
            policy.members,
            {
                id_: (zone, frozenset(sources(port)), frozenset(port.security_groups))
                for id_, (port, zone) in ports.items()
            },
        )

    def digest(self) -> str:
        """The same for equal standings, also of another process."""
        rules = sorted((group, sorted(map(repr, found))) for group, found in self.rules.items())
        members = sorted(
            (group, family.value, sorted(m.addresses), m.prefixes)
            for (group, family), m in self.members.items()
        )
        ports = sorted((p, zone, sorted(own), sorted(of)) for p, (zone, own, of) in self.ports.items())
        return hashlib.sha256(msgspec.json.encode((rules, members, ports))).hexdigest()


def narrowed(before: Standing | None, now: Standing) -> frozenset[int]:
    """Zones in which something that was allowed may not be any more. All of them if it is not known what was
    allowed before."""
    if before is None:
        return frozenset(zone for zone, _, _ in now.ports.values())
    smaller = _narrowed_groups(before, now)
    found: set[int] = set()
    for id_, (zone, own, groups) in now.ports.items():
        there = before.ports.get(id_)
        if there is None or there[:2] != (zone, own) or not there[2] <= groups or groups & smaller:
            found.add(zone)
    return frozenset(found)


def _narrowed_groups(before: Standing, now: Standing) -> frozenset[SecurityGroupId]:
    fewer = {
        group
        for (group, family), members in before.members.items()
        if not _within(members, now.members.get((group, family)))
    }
    return frozenset(
        group
        for group, rules in now.rules.items()
        if not before.rules.get(group, frozenset()) <= rules or any(r.remote_group in fewer for r in rules)
    )


def _within(before: Members, now: Members | None) -> bool:
    return now is not None and before.addresses <= now.addresses and set(before.prefixes) <= set(now.prefixes)


def flow_of(entry: Entry, zone: int) -> Flow | None:
    """None if it says too little, or its addresses are translated: then they are nobody's here."""
    status = int.from_bytes(entry.values.get(STATUS, b""), "big")
    if status & (SRC_NAT | DST_NAT):
        return None
    both = attributes(entry.values[TUPLE_ORIG])
    ends, protocol = attributes(both.get(1, b"")), attributes(both.get(2, b""))
    source = next((ends[k] for k in SOURCES if k in ends), None)
    destination = next((ends[k] for k in DESTINATIONS if k in ends), None)
    if source is None or destination is None or 1 not in protocol:
        return None
    return Flow(
        zone,
        _text(source),
        _text(destination),
        protocol[1][0],
        _first(protocol, (DESTINATION_PORT, *ICMP_TYPES)),
        _first(protocol, ICMP_CODES),
    )


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _first(values: dict[int, bytes], kinds: tuple[int, ...]) -> int:
    return next((int.from_bytes(values[k], "big") for k in kinds if k in values), 0)


def cut(zones: frozenset[int], judge: Callable[[], Judge]) -> int:
    """Forgets every connection of `zones` that is not allowed; how many. `judge` is made if there is anything
    to be judged. Blocks: for a thread of its own."""
    total = 0
    with conntrack.Table() as table:
        if not zones or table.count() == 0:
            return 0
        allows = judge().allows
        for zone in sorted(zones):
            gone = table.dump(zone, lambda entry, zone=zone: _is_refused(entry, zone, allows))
            table.delete([conntrack.remove(entry.key, zone) for entry in gone])
            total += len(gone)
    return total


def _is_refused(entry: Entry, zone: int, allows: Callable[[Flow], bool]) -> bool:
    flow = flow_of(entry, zone)
    return flow is not None and not allows(flow)
