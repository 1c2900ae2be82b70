"""What a stream of this host has sent and its destination has not confirmed: it waits in the socket, or in
the queues of whatever is between. A hypervisor counts it as sent. Asks the kernel (sock_diag), changes
nothing."""

import ipaddress
import socket
import struct
from collections.abc import Iterator

SOCK_DIAG = 4
"""Protocol of netlink."""
BY_FAMILY = 20
DONE, ERROR = 3, 2
REQUEST_DUMP = 0x301
ESTABLISHED = 1 << 1
HEADER = struct.Struct("=IHHII")
QUESTION = struct.Struct("=BBBBI")
"""Family, protocol, extensions, padding, states; a socket's identity follows."""
IDENTITY = struct.Struct(">HH16s16s12s")
QUEUES_AT = 4 + IDENTITY.size + 4
"""Of an answer: after family and state, identity and timer come the bytes to be read and to be confirmed."""
RECEIVE = 1 << 16
WITHIN = 0.2


def unconfirmed(uri: str) -> int:
    """Bytes, of all connections to `uri` (`tcp:ADDRESS:PORT`); 0 of one that is no TCP. Raises OSError."""
    kind, _, rest = uri.partition(":")
    address, _, port = rest.rpartition(":")
    if kind != "tcp" or not port.isdecimal():
        return 0
    there = ipaddress.ip_address(address.strip("[]"))
    family = socket.AF_INET if there.version == 4 else socket.AF_INET6
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, SOCK_DIAG) as asked:
        asked.settimeout(WITHIN)
        asked.send(question(family, int(port)))
        return sum(_answers(asked, there.packed))


def question(family: int, port: int) -> bytes:
    """All established TCP connections to `port` of any host."""
    body = QUESTION.pack(family, socket.IPPROTO_TCP, 0, 0, ESTABLISHED)
    body += IDENTITY.pack(0, port, bytes(16), bytes(16), bytes(12))
    return HEADER.pack(HEADER.size + len(body), BY_FAMILY, REQUEST_DUMP, 1, 0) + body


def _answers(asked: socket.socket, address: bytes) -> Iterator[int]:
    while True:
        data = asked.recv(RECEIVE)
        while len(data) >= HEADER.size:
            size, kind, *_ = HEADER.unpack_from(data)
            if kind == ERROR:
                code = -struct.unpack_from("=i", data, HEADER.size)[0]
                raise OSError(code, "sock_diag")
            if kind == DONE:
                return
            yield confirmed_less(data[HEADER.size : size], address)
            data = data[(size + 3) & ~3 :]


def confirmed_less(body: bytes, address: bytes) -> int:
    """Of one answer: bytes that are not confirmed, 0 if it is of another destination."""
    _, _, _, destination, _ = IDENTITY.unpack_from(body, 4)
    waiting = struct.unpack_from("=II", body, QUEUES_AT)[1]
    return waiting if destination.startswith(address) else 0
