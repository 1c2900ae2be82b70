"""rtnetlink: one socket, many requests in one send, replies decoded.

Owns the wire format of the requests this driver makes (links, bridge ports, forwarding entries,
neighbours, addresses) and one socket bound to the namespace of the thread that opened it. Flipping a
forwarding entry costs one `sendmsg` and one `recv`, about 0.1 ms: this is the critical path of a move.
Never decides anything, and knows no networks or servers.

A request is a value; composing is pure and tested without a kernel. Numbers are those of
linux/rtnetlink.h, if_link.h and neighbour.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Self

import msgspec

from nahtlos.model.errors import Unavailable

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE = 24
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

REQUEST, ACK, ECHO = 0x1, 0x4, 0x8
DUMP = 0x300
REPLACE, EXCL, CREATE, APPEND = 0x100, 0x200, 0x400, 0x800
NESTED = 0x8000

NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_SELF, NTF_MASTER, NTF_ROUTER = 0x02, 0x04, 0x80
AF_BRIDGE = 7
IFF_UP, IFF_PROMISC = 0x1, 0x100
NO_PREFIX_ROUTE, NO_DUPLICATE_DETECTION = 0x200, 0x02

SOL_NETLINK = 270
NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_STRICT = 10, 11, 12
ANY_MAC = "00:00:00:00:00:00"

BATCH = 200
"""Requests per send: their acknowledgements fit the receive buffer by far."""
DEADLINE = 5.0


class KernelRefused(Unavailable):
    """The kernel refused a request; `code` is the errno of the first one refused."""

    def __init__(self, what: str, code: int, detail: str = "") -> None:
        name = errno.errorcode.get(code, str(code))
        super().__init__(
            f"{what}: {os.strerror(code)} ({name}){': ' + detail if detail else ''}", field="network"
        )
        self.code = code


class Request(msgspec.Struct, frozen=True):
    """One change. `tolerated` are errors that mean "is so already"."""

    kind: int
    flags: int
    body: bytes
    what: str
    tolerated: frozenset[int] = frozenset()


# --- attributes --------------------------------------------------------------------------------------


def attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("HH", length, kind) + value + bytes(-length % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    return attribute(kind | NESTED, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("B", value))


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("I", value))


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_text(value: bytes) -> str:
    return value.hex(":")


def ipv4(value: str) -> bytes:
    return socket.inet_pton(socket.AF_INET, value)


def packed(ip: str) -> bytes:
    return socket.inet_pton(family_of(ip), ip)


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes of one message by number (flags of the number removed; the last of a kind wins)."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


# --- requests: forwarding entries, neighbours, addresses ---------------------------------------------


def _neighbour(
    family: int, device: int, state: int, flags: int, mac: str, destination: bytes | None
) -> bytes:
    body = struct.pack("BxxxiHBB", family, device, state, flags, 0)
    if mac:
        body += attribute(2, mac_bytes(mac))
    if destination is not None:
        body += attribute(1, destination)
    return body


def forward_to_port(device: int, mac: str) -> Request:
    """The bridge of port `device` sends frames for `mac` out of that port: the one entry that decides."""
    body = _neighbour(AF_BRIDGE, device, NUD_NOARP, NTF_MASTER, mac, None)
    return Request(RTM_NEWNEIGH, CREATE | REPLACE, body, f"forward {mac} to port {device}")


def remove_forward(device: int, mac: str) -> Request:
    body = _neighbour(AF_BRIDGE, device, NUD_NOARP, NTF_MASTER, mac, None)
    return Request(
        RTM_DELNEIGH, 0, body, f"remove {mac} from port {device}", frozenset({errno.ENOENT, errno.ENODEV})
    )


def tunnel_entry(device: int, mac: str, vtep: str) -> Request:
    """VXLAN device `device` sends frames for `mac` to tunnel end `vtep`. For ANY_MAC: to this one, too."""
    mode, tolerated = (APPEND, frozenset({errno.EEXIST})) if mac == ANY_MAC else (REPLACE, frozenset[int]())
    body = _neighbour(AF_BRIDGE, device, NUD_PERMANENT, NTF_SELF, mac, ipv4(vtep))
    return Request(RTM_NEWNEIGH, CREATE | mode, body, f"tunnel {mac} to {vtep}", tolerated)


def remove_tunnel_entry(device: int, mac: str, vtep: str) -> Request:
    body = _neighbour(AF_BRIDGE, device, NUD_PERMANENT, NTF_SELF, mac, ipv4(vtep))
    return Request(
        RTM_DELNEIGH, 0, body, f"remove tunnel {mac} to {vtep}", frozenset({errno.ENOENT, errno.ENODEV})
    )


def family_of(ip: str) -> int:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def neighbour(device: int, ip: str, mac: str, *, router: bool = False) -> Request:
    """A permanent ARP or neighbour-discovery entry. `router` (IPv6): it is said to route."""
    flags = NTF_ROUTER if router else 0
    body = _neighbour(family_of(ip), device, NUD_PERMANENT, flags, mac, packed(ip))
    return Request(RTM_NEWNEIGH, CREATE | REPLACE, body, f"neighbour {ip} at {mac}")


def remove_neighbour(device: int, ip: str) -> Request:
    body = _neighbour(family_of(ip), device, 0, 0, "", packed(ip))
    return Request(RTM_DELNEIGH, 0, body, f"remove neighbour {ip}", frozenset({errno.ENOENT, errno.ENODEV}))


def _address(device: int, address: str) -> bytes:
    ip, prefix = address.split("/")
    body = struct.pack("BBBBI", family_of(ip), int(prefix), 0, 0, device)
    return body + attribute(2, packed(ip)) + attribute(1, packed(ip))


def address(device: int, cidr: str, *, routed: bool = True) -> Request:
    """`routed`: the kernel sends what is for this subnet out of this device. An IPv6 address is there at
    once: nobody is asked whether it is taken, because it may be the same on every host."""
    flags = (0 if routed else NO_PREFIX_ROUTE) | (NO_DUPLICATE_DETECTION if ":" in cidr else 0)
    body = _address(device, cidr) + (u32(8, flags) if flags else b"")
    return Request(RTM_NEWADDR, CREATE | EXCL, body, f"address {cidr}", frozenset({errno.EEXIST}))


def remove_address(device: int, cidr: str) -> Request:
    return Request(
        RTM_DELADDR,
        0,
        _address(device, cidr),
        f"remove address {cidr}",
        frozenset({errno.EADDRNOTAVAIL, errno.ENODEV}),
    )


def link_route(device: int, subnet: str, source: str) -> Request:
    """What is for `subnet` (IPv4) is on the link of `device`, and asked for from `source`."""
    network, prefix = subnet.split("/")
    body = struct.pack("BBBBBBBBI", socket.AF_INET, int(prefix), 0, 0, 254, 4, 253, 1, 0)
    body += attribute(1, ipv4(network)) + u32(4, device) + attribute(7, ipv4(source))
    return Request(RTM_NEWROUTE, CREATE | REPLACE, body, f"route to {subnet}")


def default_route(gateway: str) -> Request:
    """By way of `gateway`, in the main table."""
    body = struct.pack("BBBBBBBBI", socket.AF_INET, 0, 0, 0, 254, 4, 0, 1, 0) + attribute(5, ipv4(gateway))
    return Request(RTM_NEWROUTE, CREATE | REPLACE, body, f"default route by {gateway}")


# --- the socket --------------------------------------------------------------------------------------


class Netlink:
    """One rtnetlink socket. Not to be used from two threads at once."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.bind((0, 0))
        self._socket.settimeout(DEADLINE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_STRICT):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._sequence = 0
        self.writes = 0
        """Requests sent that could change something."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def change(self, requests: Sequence[Request]) -> None:
        """All requests in order, each tried even if one before it failed. KernelRefused for the first
        that was refused with an error it does not tolerate."""
        refused: KernelRefused | None = None
        for start in range(0, len(requests), BATCH):
            failure = self._exchange(requests[start : start + BATCH])
            refused = refused or failure
        if refused is not None:
            raise refused

    def _exchange(self, requests: Sequence[Request]) -> KernelRefused | None:
        awaited: dict[int, Request] = {}
        out = bytearray()
        for request in requests:
            self._sequence += 1
            awaited[self._sequence] = request
            out += struct.pack(
                "IHHII",
                16 + len(request.body),
                request.kind,
                REQUEST | ACK | request.flags,
                self._sequence,
                0,
            )
            out += request.body + bytes(-len(request.body) % 4)
        self.writes += len(requests)
        self._send(bytes(out))
        refused: KernelRefused | None = None
        while awaited:
            for kind, sequence, flags, body in self._receive():
                request = awaited.get(sequence)
                if kind != 2 or request is None:  # NLMSG_ERROR, which is also the acknowledgement
                    continue
                del awaited[sequence]
                code = -struct.unpack_from("i", body)[0]
                if code and code not in request.tolerated and refused is None:
                    refused = KernelRefused(request.what, code, _explanation(flags, body))
        return refused

    def dump(self, kind: int, header: bytes) -> list[bytes]:
        """Bodies of every object of a kind (header and attributes)."""
        for _ in range(4):
            bodies = self._dump_once(kind, header)
            if bodies is not None:
                return bodies
        raise Unavailable("the kernel's tables change faster than they can be read", field="network")

    def _dump_once(self, kind: int, header: bytes) -> list[bytes] | None:
        self._sequence += 1
        sequence, interrupted = self._sequence, False
        self._send(struct.pack("IHHII", 16 + len(header), kind, REQUEST | DUMP, sequence, 0) + header)
        bodies: list[bytes] = []
        while True:
            for answer, answered, flags, body in self._receive():
                if answered != sequence:
                    continue
                interrupted = interrupted or bool(flags & 0x10)  # NLM_F_DUMP_INTR: changed meanwhile
                if answer == 3:  # NLMSG_DONE
                    return None if interrupted else bodies
                if answer == 2:
                    raise KernelRefused("read", -struct.unpack_from("i", body)[0])
                bodies.append(body)

    def query(self, kind: int, body: bytes) -> bytes | None:
        """Body of the one object asked for; None if the kernel knows none such. Some kinds are then not
        even refused, so an acknowledgement is asked for; it is skipped later if an answer came first. What
        traffic control is asked for it tells its listeners, and who asked only if that is asked for, too."""
        self._sequence += 1
        flags = REQUEST | ACK | ECHO
        self._send(struct.pack("IHHII", 16 + len(body), kind, flags, self._sequence, 0) + body)
        while True:
            for answer, sequence, _, found in self._receive():
                if sequence == self._sequence:
                    return None if answer == 2 else found

    def forwarding_of(self, bridge: int, mac: str) -> int | None:
        """The port (by index) that frames for `mac` leave `bridge` by."""
        body = struct.pack("BxxxiHBB", AF_BRIDGE, 0, 0, 0, 0)
        body += attribute(2, mac_bytes(mac)) + u32(9, bridge)
        found = self.query(RTM_GETNEIGH, body)
        return int(struct.unpack_from("BxxxiHBB", found)[1]) if found else None

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise Unavailable(f"rtnetlink: {error}", field="network") from error

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._socket.recv(1 << 18)
        except OSError as error:
            raise Unavailable(f"rtnetlink did not answer: {error}", field="network") from error
        return messages(data)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, sequence, flags and body of each message received."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = struct.unpack_from("IHHII", data, offset)
        yield kind, sequence, flags, data[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def _explanation(flags: int, body: bytes) -> str:
    """The kernel's own words about an error, where it gives any (extended acknowledgement)."""
    if not flags & 0x200:
        return ""
    offset = 20 if flags & 0x100 else 4 + struct.unpack_from("I", body, 4)[0]
    return attributes(body[offset:]).get(1, b"").rstrip(b"\0").decode(errors="replace")
