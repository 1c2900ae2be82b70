"""What can be true of a namespace with a router, gateway or load balancer in it, and of its cables.

Pure: values, and the difference between those wanted and those found. A `Space` is a namespace with all
that belongs to it; a `Cable` is a veth pair between it and the host. `rank` is the order in which facts are
made true; they are removed the other way round.
"""

from collections.abc import Iterable
from typing import ClassVar

import msgspec

from nahtlos.physical.network.links import Flood

QUIET = Flood(suppress=True)
"""Of a bridge port behind which one known MAC is: it gets what is for that MAC, and the bridge answers ARP
and neighbour discovery in its place."""
REACHABLE = Flood(multicast=True, broadcast=True)
"""Of one that resolves addresses by itself."""


class Cable(msgspec.Struct, frozen=True, kw_only=True):
    outer: str
    """Its end on the host."""
    inner: str
    mac: str
    mtu: int
    bridge: str = ""
    """Of the host, which `outer` is a port of; without one, the host routes."""
    outer_mac: str = ""
    """"": as it happens to be."""
    flood: Flood = QUIET
    forward: bool = True
    """The bridge sends frames for `mac` here."""


class Link(msgspec.Struct, frozen=True):
    """A device that is up."""

    device: str
    mac: str
    mtu: int

    rank: ClassVar[int] = 1

    @property
    def key(self) -> tuple[str, ...]:
        return ("link", self.device)

    def __str__(self) -> str:
        return f"device {self.device}"


class Setting(msgspec.Struct, frozen=True):
    """A sysctl below /proc/sys."""

    path: str
    value: str

    rank: ClassVar[int] = 0

    @property
    def key(self) -> tuple[str, ...]:
        return ("setting", self.path)

    def __str__(self) -> str:
        return f"sysctl {self.path.replace('/', '.')} = {self.value}"


class Address(msgspec.Struct, frozen=True):
    device: str
    cidr: str

    rank: ClassVar[int] = 2

    @property
    def key(self) -> tuple[str, ...]:
        return ("address", self.device, self.cidr)

    def __str__(self) -> str:
        return f"address {self.cidr} on {self.device}"


class Neighbour(msgspec.Struct, frozen=True):
    device: str
    ip: str
    mac: str

    rank: ClassVar[int] = 3

    @property
    def key(self) -> tuple[str, ...]:
        return ("neighbour", self.device, self.ip)

    def __str__(self) -> str:
        return f"neighbour {self.ip} at {self.mac} on {self.device}"


class Route(msgspec.Struct, frozen=True):
    destination: str
    device: str
    via: str = ""
    """"": on the device itself."""

    rank: ClassVar[int] = 4

    @property
    def key(self) -> tuple[str, ...]:
        return ("route", self.destination)

    def __str__(self) -> str:
        way = f"by {self.via} on {self.device}" if self.via else f"on {self.device}"
        return f"route to {self.destination} {way}"


class Entry(msgspec.Struct, frozen=True):
    """The bridge of port `device` sends frames for `mac` to it."""

    device: str
    mac: str

    rank: ClassVar[int] = 5

    @property
    def key(self) -> tuple[str, ...]:
        return ("entry", self.device, self.mac)

    def __str__(self) -> str:
        return f"forwarding of {self.mac} to {self.device}"


class Proxy(msgspec.Struct, frozen=True):
    """The host answers ARP for `ip` on `device`."""

    device: str
    ip: str

    rank: ClassVar[int] = 6

    @property
    def key(self) -> tuple[str, ...]:
        return ("proxy", self.device, self.ip)

    def __str__(self) -> str:
        return f"answering for {self.ip} on {self.device}"


Fact = Link | Setting | Address | Neighbour | Route | Entry | Proxy


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace and all that belongs to it."""

    name: str
    cables: tuple[Cable, ...]
    inside: frozenset[Fact]
    outside: frozenset[Fact] = frozenset()
    """On the host, because of it."""
    rules: str = ""
    """Packet filter inside, as nft reads it; the same text is the same filter."""


class Change(msgspec.Struct, frozen=True):
    fact: Fact
    remove: bool = False
    known: bool = False
    """Something of the same key was there."""

    def __str__(self) -> str:
        if self.remove:
            return f"{self.fact} was not asked for: removed"
        return f"{self.fact} was {'different' if self.known else 'missing'}: put right"


def changes(wanted: Iterable[Fact], found: Iterable[Fact]) -> tuple[Change, ...]:
    """In the order in which to make them. Devices and sysctls are never removed by being left out: the
    former go with their cable, the latter with their device."""
    wanted, found = frozenset(wanted), frozenset(found)
    keys, there = {f.key for f in wanted}, {f.key for f in found}
    put = [Change(f, known=f.key in there) for f in wanted - found]
    gone = [Change(f, remove=True) for f in found if f.key not in keys and not isinstance(f, Link | Setting)]
    put.sort(key=lambda c: (c.fact.rank, c.fact.key))
    gone.sort(key=lambda c: (-c.fact.rank, c.fact.key))
    return (*gone, *put)
