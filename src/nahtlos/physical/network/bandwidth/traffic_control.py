"""Traffic control: requests for qdiscs, classes and filters, and what the kernel says about them.

Owns the part of the rtnetlink format that `tc` speaks (linux/pkt_sched.h, pkt_cls.h). Composing is pure.
Never decides who gets which rate (see `shaping`, `shares`) and keeps nothing between calls.

Rates are bytes per second of whole frames, Ethernet header included, as the kernel counts them.
"""

import errno
import socket
import struct
from collections.abc import Iterable, Sequence

import msgspec

from nahtlos.physical.network.links import NO_QUEUE
from nahtlos.physical.network.netlink import (
    CREATE,
    EXCL,
    REPLACE,
    Netlink,
    Request,
    attribute,
    attributes,
    nested,
    text,
    u32,
)

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTCLASS, RTM_DELTCLASS, RTM_GETTCLASS = 40, 41, 42
RTM_NEWTFILTER, RTM_GETTFILTER = 44, 46

ROOT, INGRESS = 0xFFFFFFFF, 0xFFFFFFF1
INGRESS_HANDLE = 0xFFFF0000
OURS = 0x6E61
"""Major number of every root qdisc of this driver ("na"); those the kernel gives devices have 0."""
HANDLE = OURS << 16
ONLY, QUANTUM = 1, 10_000
"""The class of a bucket. It has nobody to take turns with."""
UNLIMITED, ENDLESS_BURST = 4_000_000_000, 1 << 20

KIND, OPTIONS, STATS, INGRESS_BLOCK = 1, 2, 7, 13
STATS_QUEUE = 3
HTB_PARMS, HTB_INIT, HTB_RATE64, HTB_CEIL64 = 1, 2, 6, 7
U32_CLASSID, U32_SELECTOR, U32_ACTIONS = 1, 5, 7
ACTION_KIND, ACTION_OPTIONS = 1, 2
MIRRED_PARMS = 2
TERMINAL, STOLEN, REDIRECT = 1, 4, 1

HEADER = "BxxxiIII"
"""struct tcmsg: family, device, handle, parent, info"""
TICK = 64
"""Nanoseconds in which the kernel takes and tells bursts."""
ETHERNET = 1
ANY_PROTOCOL, ARP = 0x0003, 0x0806
GONE = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})
"""Nothing of the kind is there (which of them it says depends on what is there instead)."""


class Bucket(msgspec.Struct, frozen=True):
    """A token bucket and the queue before it: an HTB of one class, whose tokens may be owed. (A `tbf` holds a
    frame that is longer than its burst for ever, if it was queued before the burst became so short.)"""

    rate: int
    burst: int
    limit: int
    """Bytes that may wait."""

    def like(self, other: "Bucket | None") -> bool:
        """Equal as far as the kernel can tell: it keeps the burst as a time."""
        if other is None or (self.rate, self.limit) != (other.rate, other.limit):
            return False
        return abs(self.burst - other.burst) <= 2 + self.burst // 500 + self.rate * TICK // 1_000_000_000


class Qdisc(msgspec.Struct, frozen=True):
    index: int
    kind: str
    handle: int
    parent: int
    limit: int = 0
    """Of a `bfifo`."""
    default: int = 0
    """Of an `htb`: minor number of the class for what is not classified."""
    waiting: int = 0
    """Bytes."""

    @property
    def put(self) -> bool:
        """To keep frames there: neither what the kernel gives a device by itself nor what keeps nothing."""
        return self.handle != 0 and self.kind != NO_QUEUE

    @property
    def ours(self) -> bool:
        return self.handle == HANDLE

    @property
    def is_bucket(self) -> bool:
        return self.ours and self.kind == "htb" and self.default == ONLY


class Class(msgspec.Struct, frozen=True):
    """A class of an `htb`: `rate` is guaranteed, `ceiling` what it may borrow up to."""

    handle: int
    parent: int
    rate: int
    ceiling: int
    burst: int
    ceiling_burst: int
    priority: int
    quantum: int

    def like(self, other: "Class | None") -> bool:
        if other is None:
            return False
        mine = msgspec.structs.replace(self, burst=0, ceiling_burst=0)
        its = msgspec.structs.replace(other, burst=0, ceiling_burst=0)
        return (
            mine == its
            and Bucket(self.rate, self.burst, 0).like(Bucket(other.rate, other.burst, 0))
            and Bucket(self.ceiling, self.ceiling_burst, 0).like(
                Bucket(other.ceiling, other.ceiling_burst, 0)
            )
        )


class Filter(msgspec.Struct, frozen=True):
    """One entry of a `u32` filter: where what matches goes."""

    protocol: int
    to_class: int = 0
    to_device: int = 0
    keys: int = 0
    """How many words of the frame are looked at."""
    first: tuple[int, int] = (0, 0)
    """Mask and value of the first."""


# --- requests ----------------------------------------------------------------------------------------


def _header(index: int, handle: int, parent: int, info: int = 0) -> bytes:
    return struct.pack(HEADER, 0, index, handle, parent, info)


def _ratespec(rate: int) -> bytes:
    return struct.pack("BBHhHI", 0, ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))


def _ticks(burst: int, rate: int) -> int:
    return min(0xFFFFFFFF, burst * 1_000_000_000 // max(1, rate) // TICK)


def put_bucket(index: int, bucket: Bucket, what: str) -> list[Request]:
    """At the root, in the place of what is there. Its queue comes before its rate, so that nothing waits in
    the one that the kernel gives it meanwhile."""
    return [put_htb(index, ONLY, what), *lift(index, what), *change_bucket(index, bucket, what)]


def change_bucket(index: int, bucket: Bucket, what: str) -> list[Request]:
    """The one that is there: what waits in it goes on waiting, at the new rate."""
    queue = put_queue(index, (OURS + ONLY) << 16, HANDLE | ONLY, bucket.limit, what)
    return [queue, put_class(index, _only_class(bucket.rate, bucket.burst), what)]


def lift(index: int, what: str) -> list[Request]:
    """As good as no limit, for a queue that is to become empty."""
    return [put_class(index, _only_class(UNLIMITED, ENDLESS_BURST), what)]


def _only_class(rate: int, burst: int) -> "Class":
    return Class(HANDLE | ONLY, ROOT, rate, rate, burst, burst, 0, QUANTUM)


def remove_root(index: int, what: str) -> Request:
    return Request(RTM_DELQDISC, 0, _header(index, 0, ROOT), f"remove the limit of {what}", GONE)


def remove_ingress(index: int, what: str) -> Request:
    return Request(RTM_DELQDISC, 0, _header(index, 0, INGRESS), f"stop redirecting {what}", GONE)


def put_ingress(index: int, what: str) -> Request:
    body = _header(index, INGRESS_HANDLE, INGRESS) + text(KIND, "ingress")
    return Request(RTM_NEWQDISC, CREATE, body, f"redirect {what}", frozenset({errno.EEXIST}))


def _filter(index: int, parent: int, protocol: int, *options: bytes) -> bytes:
    info = 1 << 16 | socket.htons(protocol)
    everything = struct.pack("BBBxHHhhIIIii", TERMINAL, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    body = _header(index, 0, parent, info) + text(KIND, "u32")
    return body + nested(OPTIONS, attribute(U32_SELECTOR, everything), *options)


def redirect(index: int, target: int, what: str) -> Request:
    """Every frame that comes in by device `index` leaves by `target`, an ifb, which lets it come in again."""
    parms = struct.pack("IIiiiiI", 0, 0, STOLEN, 0, 0, REDIRECT, target)
    action = nested(1, text(ACTION_KIND, "mirred"), nested(ACTION_OPTIONS, attribute(MIRRED_PARMS, parms)))
    body = _filter(index, INGRESS_HANDLE, ANY_PROTOCOL, nested(U32_ACTIONS, action))
    return Request(RTM_NEWTFILTER, CREATE | EXCL, body, f"redirect {what}")


def put_htb(index: int, default: int, what: str) -> Request:
    """At the root, in the place of what is there; what is not classified goes to `default`."""
    init = struct.pack("IIIII", 3, 10, default, 0, 0)
    body = _header(index, HANDLE, ROOT) + text(KIND, "htb") + nested(OPTIONS, attribute(HTB_INIT, init))
    return Request(RTM_NEWQDISC, CREATE | REPLACE, body, f"divide {what}")


def put_class(index: int, wanted: Class, what: str) -> Request:
    """Made, or changed while frames wait in it."""
    parms = _ratespec(wanted.rate) + _ratespec(wanted.ceiling)
    parms += struct.pack(
        "IIIII",
        _ticks(wanted.burst, wanted.rate),
        _ticks(wanted.ceiling_burst, wanted.ceiling),
        wanted.quantum,
        0,
        wanted.priority,
    )
    options = [attribute(HTB_PARMS, parms)]
    for kind, value in ((HTB_RATE64, wanted.rate), (HTB_CEIL64, wanted.ceiling)):
        if value > 0xFFFFFFFF:
            options.append(attribute(kind, struct.pack("Q", value)))
    body = _header(index, wanted.handle, wanted.parent) + text(KIND, "htb") + nested(OPTIONS, *options)
    return Request(RTM_NEWTCLASS, CREATE, body, f"share of {what}")


def put_queue(index: int, handle: int, parent: int, limit: int, what: str) -> Request:
    """A plain queue of `limit` bytes, made or changed."""
    body = _header(index, handle, parent) + text(KIND, "bfifo") + attribute(OPTIONS, struct.pack("I", limit))
    return Request(RTM_NEWQDISC, CREATE, body, f"queue of {what}")


def classify(index: int, protocol: int, to_class: int, what: str) -> Request:
    """Frames of `protocol` that say nothing themselves belong to a class."""
    body = _filter(index, HANDLE, protocol, u32(U32_CLASSID, to_class))
    return Request(RTM_NEWTFILTER, CREATE | EXCL, body, f"classify {what}")


def probe(kind: str, index: int) -> Request:
    """A qdisc no kernel accepts: refused with ENOENT by one that does not know its kind."""
    body = _header(index, 0, ROOT) + text(KIND, kind) + u32(INGRESS_BLOCK, 0)
    return Request(RTM_NEWQDISC, CREATE | EXCL, body, f"qdisc {kind}")


def probe_filter(kind: str, index: int) -> Request:
    """A filter without anything to decide by, on an ingress qdisc: ENOENT from a kernel without its kind."""
    body = _header(index, 0, INGRESS_HANDLE, 2 << 16 | socket.htons(ANY_PROTOCOL)) + text(KIND, kind)
    return Request(RTM_NEWTFILTER, CREATE | EXCL, body, f"filter {kind}")


def probe_action(kind: str, index: int) -> Request:
    """The same for an action."""
    action = nested(U32_ACTIONS, nested(1, text(ACTION_KIND, kind)))
    body = _filter(index, INGRESS_HANDLE, ANY_PROTOCOL, action)
    return Request(RTM_NEWTFILTER, CREATE | EXCL, body, f"action {kind}")


# --- what is there -----------------------------------------------------------------------------------


def read_qdiscs(netlink: Netlink) -> tuple[Qdisc, ...]:
    """Of every device of the namespace."""
    return tuple(_qdisc(body) for body in netlink.dump(RTM_GETQDISC, _header(0, 0, 0)))


def read_root(netlink: Netlink, index: int) -> Qdisc | None:
    """None: what the kernel gives a device without being asked may not be told."""
    body = netlink.query(RTM_GETQDISC, _header(index, 0, ROOT))
    return _qdisc(body) if body else None


def read_only_queue(netlink: Netlink, index: int) -> Qdisc | None:
    """That of a bucket."""
    body = netlink.query(RTM_GETQDISC, _header(index, 0, HANDLE | ONLY))
    return _qdisc(body) if body else None


def read_ingress(netlink: Netlink, index: int) -> Qdisc | None:
    body = netlink.query(RTM_GETQDISC, _header(index, 0, INGRESS))
    return _qdisc(body) if body else None


def read_classes(netlink: Netlink, index: int) -> tuple[Class, ...]:
    bodies = netlink.dump(RTM_GETTCLASS, _header(index, 0, 0))
    return tuple(found for found in map(class_of, bodies) if found is not None)


def read_bucket(netlink: Netlink, root: Qdisc, queues: Iterable[Qdisc]) -> Bucket | None:
    """What is at `root` and has one of `queues`; None if it is anything else."""
    if not root.is_bucket:
        return None
    queue = next((q for q in queues if q.kind == "bfifo"), None)
    classes = read_classes(netlink, root.index)
    if len(classes) != 1 or queue is None:
        return None
    found = classes[0]
    plain = _only_class(found.rate, found.burst)
    return Bucket(found.rate, found.burst, queue.limit) if plain.like(found) else None


def read_filters(netlink: Netlink, index: int, parent: int) -> tuple[Filter, ...]:
    """The entries, without the tables that hold them. A filter of another kind counts as one that leads
    nowhere."""
    bodies = netlink.dump(RTM_GETTFILTER, _header(index, 0, parent))
    return tuple(found for found in map(filter_of, bodies) if found is not None)


def _qdisc(body: bytes) -> Qdisc:
    _, index, handle, parent, _ = struct.unpack_from(HEADER, body)
    values = attributes(body[20:])
    kind, options = _string(values.get(KIND)), values.get(OPTIONS, b"")
    queue = attributes(values.get(STATS, b"")).get(STATS_QUEUE, b"")
    return Qdisc(
        index=index,
        kind=kind,
        handle=handle,
        parent=parent,
        limit=_number(options[:4]) if kind == "bfifo" else 0,
        default=_number(attributes(options).get(HTB_INIT, b"")[8:12]) if kind == "htb" else 0,
        waiting=_number(queue[4:8]),
    )


def _bytes(ticks: int, rate: int) -> int:
    return round(ticks * TICK * rate / 1_000_000_000)


def class_of(body: bytes) -> Class | None:
    _, _, handle, parent, _ = struct.unpack_from(HEADER, body)
    values = attributes(body[20:])
    options = attributes(values.get(OPTIONS, b""))
    parms = options.get(HTB_PARMS, b"")
    if _string(values.get(KIND)) != "htb" or len(parms) < 44:
        return None
    buffer, ceiling_buffer, quantum, _, priority = struct.unpack_from("IIIII", parms, 24)
    rate = _number(options.get(HTB_RATE64)) or _number(parms[8:12])
    ceiling = _number(options.get(HTB_CEIL64)) or _number(parms[20:24])
    return Class(
        handle=handle,
        parent=ROOT if parent == 0 else parent,
        rate=rate,
        ceiling=ceiling,
        burst=_bytes(buffer, rate),
        ceiling_burst=_bytes(ceiling_buffer, ceiling),
        priority=priority,
        quantum=quantum,
    )


def filter_of(body: bytes) -> Filter | None:
    _, _, handle, _, info = struct.unpack_from(HEADER, body)
    values = attributes(body[20:])
    protocol = socket.ntohs(info & 0xFFFF)
    if _string(values.get(KIND)) != "u32":
        return Filter(protocol) if handle else None
    options = attributes(values.get(OPTIONS, b""))
    selector = options.get(U32_SELECTOR)
    if selector is None or len(selector) < 16:
        return None
    mask, value = struct.unpack_from(">II", selector, 16) if len(selector) >= 24 else (0, 0)
    return Filter(
        protocol=protocol,
        to_class=_number(options.get(U32_CLASSID)),
        to_device=_redirected(options.get(U32_ACTIONS, b"")),
        keys=selector[2],
        first=(mask, value),
    )


def _redirected(actions: bytes) -> int:
    """Device that the only action, a redirection, leads to; 0 if there is another action or none."""
    listed = list(attributes(actions).values())
    if len(listed) != 1:
        return 0
    action = attributes(listed[0])
    parms = attributes(action.get(ACTION_OPTIONS, b"")).get(MIRRED_PARMS, b"")
    if _string(action.get(ACTION_KIND)) != "mirred" or len(parms) < 28:
        return 0
    _, _, verdict, _, _, mode, target = struct.unpack_from("IIiiiiI", parms)
    return target if (verdict, mode) == (STOLEN, REDIRECT) else 0


def matches_everything(found: Filter) -> bool:
    return found.keys == 1 and found.first == (0, 0)


def roots(found: Iterable[Qdisc]) -> dict[int, Qdisc]:
    """Root qdiscs that somebody has put there, by device."""
    return {q.index: q for q in found if q.parent == ROOT and q.put}


def only_queues(found: Iterable[Qdisc]) -> dict[int, tuple[Qdisc, ...]]:
    """Queues of buckets, by device."""
    return {q.index: (q,) for q in found if q.parent == HANDLE | ONLY}


def ingresses(found: Iterable[Qdisc]) -> frozenset[int]:
    return frozenset(q.index for q in found if q.parent == INGRESS)


def waiting(netlink: Netlink, indexes: Sequence[int]) -> int:
    """Bytes that wait at the roots of these devices."""
    found = (read_root(netlink, index) for index in indexes)
    return sum(qdisc.waiting for qdisc in found if qdisc is not None)


def _string(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "little")
