"""Chains as the kernel holds them, by fingerprint: read directly, without a process and without elements.

Owns the wire format of nftables' chains and rules as far as reading them. nft fetches every element of every
set before it lists one chain; this does not, so a table with thousands of elements costs about a millisecond.
Counters are left out. Numbers are those of linux/netfilter/nf_tables.h.
"""

import hashlib
import socket
import struct
from collections.abc import Iterator

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network.netlink import DUMP, REQUEST, attribute, attributes

NETLINK_NETFILTER = 12
GET_CHAIN, GET_RULE, GET_GENERATION, NEW_GENERATION = 0xA04, 0xA07, 0xA10, 0xA0F
CHAIN_TABLE, CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE = 1, 3, 4, 5, 7
RULE_TABLE, RULE_CHAIN, RULE_EXPRESSIONS = 1, 2, 4
EXPRESSION_NAME, EXPRESSION_DATA = 1, 2
FAMILIES = {"inet": 1, "netdev": 5, "bridge": 7}
CHANGING = (b"counter", b"quota", b"last")
"""Expressions whose data changes with every packet."""
INTERRUPTED, DONE, ERROR = 0x10, 3, 2
ATTEMPTS = 4
DEADLINE = 5.0


class Changed(Exception):
    """The tables were changed while they were read."""


def generation() -> int:
    """Number of the last transaction in this namespace, whoever made it. Every one raises it by one."""
    with _open() as asking:
        for kind, _, body in _ask(asking, GET_GENERATION, 0, REQUEST, b""):
            if kind == NEW_GENERATION:
                return int.from_bytes(attributes(body[4:])[1], "big")
    raise Unavailable("this kernel has no nftables", field="network", remedy="load the module nf_tables")


def fingerprints(family: str, table: str) -> dict[str, str]:
    """Of every chain of a table; empty if there is no such table."""
    for _ in range(ATTEMPTS):
        try:
            return _read(FAMILIES[family], table)
        except Changed:
            continue
    raise Unavailable("packet filter rules change faster than they can be read", field="network")


def _read(family: int, table: str) -> dict[str, str]:
    found: dict[str, list[bytes]] = {}
    name = table.encode() + b"\0"
    with _open() as asking:
        for body in _dump(asking, GET_CHAIN, family, attribute(CHAIN_TABLE, name)):
            values = attributes(body[4:])
            if values.get(CHAIN_TABLE) == name:
                shape = (values.get(kind, b"") for kind in (CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE))
                found[_text(values[CHAIN_NAME])] = [b"\xff".join(shape)]
        for body in _dump(asking, GET_RULE, family, attribute(RULE_TABLE, name)):
            values = attributes(body[4:])
            chain = found.get(_text(values.get(RULE_CHAIN, b"")))
            if values.get(RULE_TABLE) == name and chain is not None:
                chain.append(b"\xff".join(_expressions(values.get(RULE_EXPRESSIONS, b""))))
    return {chain: hashlib.sha256(b"\xfe".join(held)).hexdigest()[:16] for chain, held in found.items()}


def _expressions(data: bytes) -> Iterator[bytes]:
    offset = 0
    while offset + 4 <= len(data):
        length = struct.unpack_from("H", data, offset)[0]
        values = attributes(data[offset + 4 : offset + length])
        name = values.get(EXPRESSION_NAME, b"").rstrip(b"\0")
        yield name + (b"" if name in CHANGING else values.get(EXPRESSION_DATA, b""))
        offset += max(4, (length + 3) & ~3)


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _open() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    made.settimeout(DEADLINE)
    return made


def _dump(asking: socket.socket, kind: int, family: int, body: bytes) -> Iterator[bytes]:
    for answer, flags, found in _ask(asking, kind, family, REQUEST | DUMP, body):
        if flags & INTERRUPTED:
            raise Changed
        if answer == ERROR:
            return  # no such table
        yield found


def _ask(
    asking: socket.socket, kind: int, family: int, flags: int, body: bytes
) -> Iterator[tuple[int, int, bytes]]:
    """Kind, flags and body of each message of the answer."""
    try:
        asking.send(struct.pack("IHHIIBBH", 20 + len(body), kind, flags, 1, 0, family, 0, 0) + body)
        while True:
            data, offset = asking.recv(1 << 18), 0
            while offset + 16 <= len(data):
                length, answer, marks = struct.unpack_from("IHH", data, offset)
                if answer == DONE:
                    return
                yield answer, marks, data[offset + 16 : offset + length]
                offset += (length + 3) & ~3
            if flags & DUMP != DUMP:
                return
    except OSError as error:
        raise Unavailable(f"nftables did not answer: {error}", field="network") from error
