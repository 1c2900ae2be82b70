"""How often the packet filter of a namespace has changed, as its kernel counts: one question, no process.

Tells whether rules are still those that were applied. Asked in the calling thread's namespace.
"""

import socket
import struct

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network.netlink import REQUEST, attributes

NETLINK_NETFILTER = 12
GET_GENERATION = 10 << 8 | 16
DEADLINE = 5.0


def of_rules() -> int:
    request = struct.pack("IHHII", 20, GET_GENERATION, REQUEST, 1, 0) + struct.pack("BBH", 0, 0, 0)
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
        ) as sock:
            sock.settimeout(DEADLINE)
            sock.bind((0, 0))
            sock.send(request)
            answer = sock.recv(4096)
    except OSError as error:
        raise Unavailable(f"nftables did not answer: {error}", field="network") from error
    value = attributes(answer[20:]).get(1)
    if value is None:
        raise Unavailable("this kernel has no nftables", field="network", remedy="load nf_tables")
    return int.from_bytes(value, "big")
