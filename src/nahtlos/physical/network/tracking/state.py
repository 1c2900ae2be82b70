"""What a moving port's connections look like on their way to another host, and which are its own.

Pure. Owns the form in which they travel:

    b"NLCT" version flags     then msgpack, deflated if COMPRESSED: State
    records                   (what, family, attributes as ctnetlink writes them)

A destination refuses a version it does not know, and leaves out records and attributes it does not know.
Nothing of the sender's zone or machine is in it: the destination puts it into its own network's zone.
"""

import ipaddress
import socket
import struct
import zlib
from collections.abc import Iterable

import msgspec

from nahtlos.model.config import PortConfig
from nahtlos.model.errors import Refused
from nahtlos.physical.network.netlink import NESTED, attribute, attributes
from nahtlos.physical.network.tracking.conntrack import (
    KEPT,
    MARK,
    PROTOINFO,
    STATUS,
    TIMEOUT,
    TUPLE_ORIG,
    TUPLE_REPLY,
    Entry,
    Event,
    Key,
    addresses,
)

MAGIC = b"NLCT"
VERSION = 1
COMPRESSED = 0x1
WORTH_COMPRESSING = 1 << 15
LARGEST = 1 << 28
PUT, DELETE = 1, 2
SIZES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}


class Tracked(msgspec.Struct, frozen=True):
    """Which entries are a port's: those of `zone` in which one of its addresses occurs."""

    zone: int
    addresses: tuple[str, ...]
    prefixes: tuple[str, ...] = ()

    @classmethod
    def of(cls, port: PortConfig, zone: int) -> "Tracked":
        return cls(zone, port.all_addresses, tuple(pair.cidr for pair in port.allowed_pairs))


class Selector:
    """`Tracked`, made for asking often."""

    def __init__(self, tracked: Tracked) -> None:
        self.zone = tracked.zone
        self._single = frozenset(ipaddress.ip_address(a).packed for a in tracked.addresses if a)
        ranges = (ipaddress.ip_network(p, strict=False) for p in tracked.prefixes)
        self._ranges = tuple(
            (r.max_prefixlen, r.prefixlen, _top(r.network_address.packed, r)) for r in ranges
        )

    def covers(self, address: bytes) -> bool:
        if address in self._single:
            return True
        bits = 8 * len(address)
        return any(
            size == bits and int.from_bytes(address, "big") >> (size - length) == top
            for size, length, top in self._ranges
        )

    def concerns(self, entry: Entry) -> bool:
        return any(self.covers(address) for address in addresses(entry))

    def others(self, entry: Entry) -> set[bytes]:
        """Addresses in it that are not this port's."""
        return {address for address in addresses(entry) if not self.covers(address)}


def _top(packed: bytes, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> int:
    return int.from_bytes(packed, "big") >> (network.max_prefixlen - network.prefixlen)


# --- on the way --------------------------------------------------------------------------------------


class State(msgspec.Struct, frozen=True, kw_only=True):
    """`number` counts from 1 what was sent since `began`, so that what arrives twice or late is known."""

    began: int
    number: int
    whole: bool
    """All there is: what the destination holds of the port besides it is out of date."""
    records: tuple[tuple[int, int, bytes], ...] = ()


def encode(state: State) -> bytes:
    body, flags = msgspec.msgpack.encode(state), 0
    if len(body) >= WORTH_COMPRESSING:
        body, flags = zlib.compress(body, 1), COMPRESSED
    return MAGIC + struct.pack("BB", VERSION, flags) + body


def decode(data: bytes) -> State:
    """Refused if it is not of a version that this release reads."""
    if data[:4] != MAGIC or len(data) < 6 or data[4] != VERSION or data[5] & ~COMPRESSED:
        raise Refused(
            "what the firewall remembers was sent in a form that this host does not know",
            field="state",
            remedy="upgrade the older of the two hosts' agents, then move again",
        )
    try:
        body = data[6:]
        if data[5] & COMPRESSED:
            inflate = zlib.decompressobj()
            body = inflate.decompress(body, LARGEST)
            if inflate.unconsumed_tail:
                raise Refused(f"state of more than {LARGEST} bytes", field="state")
        return msgspec.msgpack.decode(body, type=State)
    except (zlib.error, msgspec.DecodeError) as error:
        raise Refused(f"what the firewall remembers arrived damaged: {error}", field="state") from error


def put_record(entry: Entry) -> tuple[int, int, bytes]:
    packed = (
        attribute(kind | NESTED if kind in (TUPLE_ORIG, TUPLE_REPLY, PROTOINFO) else kind, value)
        for kind, value in entry.values.items()
    )
    return PUT, entry.family, b"".join(packed)


def delete_record(entry: Entry) -> tuple[int, int, bytes]:
    """Both directions are told, so that the destination sees whose it is."""
    named = (kind for kind in (TUPLE_ORIG, TUPLE_REPLY) if kind in entry.values)
    return DELETE, entry.family, b"".join(attribute(k | NESTED, entry.values[k]) for k in named)


def entry_of(record: tuple[int, int, bytes]) -> Entry | None:
    """None if it cannot be one."""
    _, family, packed = record
    values = {kind: value for kind, value in attributes(packed).items() if kind in KEPT}
    found = Entry(family, values)
    return found if family in SIZES and _well_formed(found) else None


def _well_formed(entry: Entry) -> bool:
    values = entry.values
    directions = sum(kind in values for kind in (TUPLE_ORIG, TUPLE_REPLY))
    sizes = [len(address) for address in addresses(entry)]
    numbers = (values[kind] for kind in (STATUS, TIMEOUT, MARK) if kind in values)
    return (
        TUPLE_ORIG in values
        and sizes == [SIZES[entry.family]] * 2 * directions
        and all(len(number) == 4 for number in numbers)
    )


def is_complete(entry: Entry) -> bool:
    """It can be created, not only changed."""
    return all(kind in entry.values for kind in (TUPLE_REPLY, STATUS, TIMEOUT))


# --- changes -----------------------------------------------------------------------------------------


def summed_up(events: Iterable[Event]) -> list[tuple[int, int, bytes]]:
    """One record for what became of each connection, two where one ended and another of its name began."""
    ended: dict[Key, Entry] = {}
    held: dict[Key, Entry] = {}
    for event in events:
        key = event.entry.key
        if event.destroyed:
            held.pop(key, None)
            ended[key] = event.entry
        elif event.born or key not in held:
            held[key] = event.entry
        else:
            held[key] = held[key].after(event.entry)
    return [
        *(delete_record(entry) for entry in ended.values()),
        *(put_record(entry) for entry in held.values()),
    ]
