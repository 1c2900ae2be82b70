"""ctnetlink: the kernel's table of connections, read, written, deleted from and listened to.

Owns the wire format of `NFNL_SUBSYS_CTNETLINK` and its sockets. Entries are carried verbatim where that is
possible and made fit for another kernel where it is not (see `put`). Never decides which connections
matter to whom. Numbers are those of linux/netfilter/nfnetlink_conntrack.h.

Any dump walks the whole table of the kernel (10 to 16 ms even if it yields nothing), so what is in a hurry
listens to events instead.
"""

import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network.netlink import (
    ACK,
    CREATE,
    DUMP,
    NESTED,
    NETLINK_CAP_ACK,
    REQUEST,
    SOL_NETLINK,
    KernelRefused,
    attribute,
    attributes,
    messages,
    nested,
)

NETLINK_NETFILTER = 12
CT_NEW, CT_GET, CT_DELETE, CT_STATS = 0x100, 0x101, 0x102, 0x105

TUPLE_ORIG, TUPLE_REPLY, STATUS, PROTOINFO, NAT_SRC, TIMEOUT, MARK = 1, 2, 3, 4, 6, 7, 8
NAT_DST, ZONE, LABELS = 13, 18, 22
KEPT = frozenset({TUPLE_ORIG, TUPLE_REPLY, STATUS, PROTOINFO, TIMEOUT, MARK, LABELS})
"""What is carried of an entry. Helpers, expectations, counters and sequence adjustments are not."""

SEEN_REPLY, ASSURED, CONFIRMED = 0x2, 0x4, 0x8
SRC_NAT, DST_NAT = 0x10, 0x20
SETTABLE = SEEN_REPLY | ASSURED | CONFIRMED
BE_LIBERAL = 0x08
"""The window of a connection is not carried by ctnetlink, so the kernel must not judge by it afterwards."""

GROUPS = (1, 2, 3)
"""Multicast groups: new, update, destroy."""
SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_ATTACH_FILTER = 32, 33, 26
NETLINK_ADD_MEMBERSHIP = 1
EVENT_BUFFER = 16 << 20
REPLY_BUFFER = 4 << 20
BATCH = 200
DEADLINE = 5.0

Key = tuple[int, bytes]
"""Names an entry of a zone: address family, and the tuple of the direction in which it was opened."""


class Entry(msgspec.Struct, frozen=True):
    """One connection (or, in an event, what is said about it): raw attributes by number."""

    family: int
    values: dict[int, bytes]

    @property
    def key(self) -> Key:
        return self.family, self.values[TUPLE_ORIG]

    def after(self, later: "Entry") -> "Entry":
        """This entry, as a later event changed it: events tell only what is different."""
        return Entry(self.family, {**self.values, **later.values})


class Event(msgspec.Struct, frozen=True):
    entry: Entry
    destroyed: bool
    born: bool = False
    """The first that is said of this connection."""


class Rejected(msgspec.Struct, frozen=True):
    """A request that the kernel did not carry out."""

    index: int
    code: int


# --- reading -----------------------------------------------------------------------------------------


def decoded(body: bytes, zone: int) -> Entry | None:
    """An entry of `zone` from a message's body; None if it is of another."""
    found = attributes(body[4:])
    if int.from_bytes(found.get(ZONE, b""), "big") != zone or TUPLE_ORIG not in found:
        return None
    return Entry(body[0], {kind: value for kind, value in found.items() if kind in KEPT})


def addresses(entry: Entry) -> Iterator[bytes]:
    """Source and destination of both directions: four, if both are known."""
    for kind in (TUPLE_ORIG, TUPLE_REPLY):
        value = entry.values.get(kind)
        if value is not None:
            yield from attributes(attributes(value).get(1, b"")).values()


# --- composing ---------------------------------------------------------------------------------------


def put(entry: Entry, zone: int, at_least: int, *, plain: bool = False) -> bytes:
    """The body of a request that makes this kernel hold `entry`, whether or not it has one like it.

    `at_least`: seconds for which it is remembered without a packet, even if its own kernel would by now have
    forgotten it sooner. `plain`: without address translation and labels, which cannot be changed in what is
    there already."""
    values = entry.values
    translated = bool(_number(values.get(STATUS, b"")) & (SRC_NAT | DST_NAT))
    translated = translated and TUPLE_REPLY in values and not plain
    out = [struct.pack("BBH", entry.family, 0, 0), attribute(TUPLE_ORIG | NESTED, values[TUPLE_ORIG])]
    if TUPLE_REPLY in values:
        reply = _inverse(values[TUPLE_ORIG], values[TUPLE_REPLY]) if translated else values[TUPLE_REPLY]
        out.append(attribute(TUPLE_REPLY | NESTED, reply))
    out.append(attribute(ZONE, struct.pack("!H", zone)))
    if STATUS in values:
        status = _number(values[STATUS]) & SETTABLE | CONFIRMED
        out.append(attribute(STATUS, struct.pack("!I", status)))
    if TIMEOUT in values:
        out.append(attribute(TIMEOUT, struct.pack("!I", max(_number(values[TIMEOUT]), at_least))))
    if PROTOINFO in values:
        out.append(attribute(PROTOINFO | NESTED, _liberal(values[PROTOINFO])))
    if MARK in values:
        out.append(attribute(MARK, values[MARK]))
    if LABELS in values and not plain:
        out.append(attribute(LABELS, values[LABELS]))
    if translated:
        out += _translation(values)
    return b"".join(out)


def remove(key: Key, zone: int) -> bytes:
    """The body of a request that deletes what has `key`."""
    family, tuple_ = key
    body = struct.pack("BBH", family, 0, 0) + attribute(TUPLE_ORIG | NESTED, tuple_)
    return body + attribute(ZONE, struct.pack("!H", zone))


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _liberal(protocol: bytes) -> bytes:
    """TCP's part with both flag masks set, so that the flags are taken, and the window not judged by."""
    out: list[bytes] = []
    for kind, value in attributes(protocol).items():
        if kind != 1:  # not TCP: verbatim
            out.append(attribute(kind | NESTED, value))
            continue
        inner = attributes(value)
        for flags in (4, 5):
            held = inner.get(flags, b"\0\0")
            inner[flags] = bytes((held[0] | BE_LIBERAL, 0xFF))
        out.append(nested(1, *(attribute(k, v) for k, v in inner.items())))
    return b"".join(out)


def _inverse(original: bytes, reply: bytes) -> bytes:
    """The answer's tuple as it was before addresses were translated: the kernel translates it again."""
    there, back = attributes(original), attributes(reply)
    ends = list(attributes(there.get(1, b"")).items())
    swapped = nested(1, *(attribute(kind, ends[1 - n][1]) for n, (kind, _) in enumerate(ends)))
    ports = attributes(there.get(2, b""))
    if 2 not in ports or 3 not in ports:
        return swapped + attribute(2 | NESTED, back.get(2, b""))
    ports[2], ports[3] = ports[3], ports[2]
    return swapped + nested(2, *(attribute(k, v) for k, v in ports.items()))


def _translation(values: dict[int, bytes]) -> Iterator[bytes]:
    """What the answer's tuple shows of translated ends: its destination is the source as others see it."""
    status, back = _number(values[STATUS]), attributes(values[TUPLE_REPLY])
    ends, ports = list(attributes(back.get(1, b"")).values()), attributes(back.get(2, b""))
    for bit, kind, end, port in ((SRC_NAT, NAT_SRC, 1, 3), (DST_NAT, NAT_DST, 0, 2)):
        if status & bit:
            lowest, highest = (1, 2) if len(ends[end]) == 4 else (4, 5)
            span = [attribute(lowest, ends[end]), attribute(highest, ends[end])]
            if port in ports:
                span.append(nested(3, attribute(1, ports[port]), attribute(2, ports[port])))
            yield nested(kind, *span)


# --- sockets -----------------------------------------------------------------------------------------


def _open(buffer: int) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    try:
        made.bind((0, 0))
        try:
            made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
        except PermissionError:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    except BaseException:
        made.close()
        raise
    return made


class Table:
    """One socket for requests, bound to the namespace of the thread that opened it. Not to be used from two
    threads at once. Raises Unavailable if the kernel does not answer within DEADLINE."""

    def __init__(self) -> None:
        try:
            self._socket = _open(REPLY_BUFFER)
        except OSError as error:
            raise Unavailable(f"ctnetlink: {error}", field="network") from error
        self._socket.settimeout(DEADLINE)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def count(self) -> int:
        """Entries in the namespace. KernelRefused if this kernel has no ctnetlink."""
        self._sequence += 1
        self._send(struct.pack("IHHIIBBH", 20, CT_STATS, REQUEST, self._sequence, 0, 0, 0, 0))
        while True:
            for kind, sequence, _, body in self._receive():
                if sequence == self._sequence:
                    if kind == 2:
                        raise KernelRefused("connection tracking", -struct.unpack_from("i", body)[0])
                    return _number(attributes(body[4:]).get(1, b""))

    def dump(self, zone: int, wanted: Callable[[Entry], bool]) -> list[Entry]:
        """Entries of `zone` that are wanted. Those that change meanwhile may be missing or there twice: who
        must know exactly listens to events from before the dump on."""
        self._sequence += 1
        body = struct.pack("BBH", 0, 0, 0) + attribute(ZONE, struct.pack("!H", zone))
        self._send(struct.pack("IHHII", 16 + len(body), CT_GET, REQUEST | DUMP, self._sequence, 0) + body)
        found: list[Entry] = []
        while True:
            for kind, sequence, _, answer in self._receive():
                if sequence != self._sequence:
                    continue
                if kind == 3:  # NLMSG_DONE
                    return found
                if kind == 2:
                    raise KernelRefused("read connections", -struct.unpack_from("i", answer)[0])
                entry = decoded(answer, zone)
                if entry is not None and wanted(entry):
                    found.append(entry)

    def put(self, bodies: Sequence[bytes]) -> list[Rejected]:
        return self._change(CT_NEW, CREATE, bodies)

    def delete(self, bodies: Sequence[bytes]) -> list[Rejected]:
        """What is not there is fine."""
        rejected = self._change(CT_DELETE, 0, bodies)
        return [r for r in rejected if r.code != errno.ENOENT]

    def _change(self, kind: int, flags: int, bodies: Sequence[bytes]) -> list[Rejected]:
        """Each is tried, whatever became of those before it."""
        rejected: list[Rejected] = []
        for start in range(0, len(bodies), BATCH):
            part = bodies[start : start + BATCH]
            first = self._sequence + 1
            self._sequence += len(part)
            self._send(
                b"".join(
                    struct.pack("IHHII", 16 + len(b), kind, REQUEST | ACK | flags, first + n, 0) + b
                    for n, b in enumerate(part)
                )
            )
            rejected += (Rejected(start + n, code) for n, code in self._acknowledged(first, len(part)))
        return rejected

    def _acknowledged(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        missing = set(range(first, first + count))
        while missing:
            for kind, sequence, _, body in self._receive():
                if kind == 2 and sequence in missing:
                    missing.discard(sequence)
                    code = -struct.unpack_from("i", body)[0]
                    if code:
                        yield sequence - first, code

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise Unavailable(f"ctnetlink: {error}", field="network") from error

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._socket.recv(1 << 18)
        except OSError as error:
            raise Unavailable(f"ctnetlink did not answer: {error}", field="network") from error
        return messages(data)


class Listener:
    """Hears of every change to entries of one zone from its creation on. What it has not read yet waits in
    the kernel, bounded by `buffer` bytes."""

    def __init__(self, zone: int, buffer: int = EVENT_BUFFER) -> None:
        self._zone = zone
        try:
            self._socket = _open(buffer)
        except OSError as error:
            raise Unavailable(f"ctnetlink: {error}", field="network") from error
        self._socket.setblocking(False)
        _attach_filter(self._socket, zone)
        for group in GROUPS:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def close(self) -> None:
        self._socket.close()

    def read(self) -> list[Event] | None:
        """What has happened since the last call, without waiting. None if some of it was lost: then
        everything before this call is to be looked at anew."""
        events: list[Event] = []
        complete = True
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return events if complete else None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise Unavailable(f"ctnetlink events: {error}", field="network") from error
                complete = False
                continue
            if complete:
                events += self._events(data)

    def _events(self, data: bytes) -> Iterable[Event]:
        for kind, _, flags, body in messages(data):
            entry = decoded(body, self._zone) if kind in (CT_NEW, CT_DELETE) else None
            if entry is not None:
                born = bool(flags & CREATE)
                yield Event(entry, destroyed=kind == CT_DELETE, born=born)


def _attach_filter(listening: socket.socket, zone: int) -> None:
    """Lets the kernel leave out what is of other zones, so that busy neighbours do not fill the buffer."""
    body = 20  # attributes begin after the netlink and the netfilter header
    program = (
        (0x00, 0, 0, body),  # A = body
        (0x01, 0, 0, ZONE),  # X = ZONE
        (0x20, 0, 0, 0xFFFFF000 + 12),  # A = offset of that attribute, or 0
        (0x15, 4, 0, 0),  # none: leave it out
        (0x07, 0, 0, 0),  # X = A
        (0x48, 0, 0, 4),  # A = its value
        (0x15, 0, 1, zone),
        (0x06, 0, 0, 0xFFFFFFFF),  # keep
        (0x06, 0, 0, 0),  # leave out
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    listening.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code))
    )
