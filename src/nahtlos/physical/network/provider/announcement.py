"""What tells a network outside where a server is now: frames that come from its MAC.

Pure. Switches learn from the sender's MAC, and neighbours that had the address with another MAC from the
content.
"""

import socket
import struct
from collections.abc import Iterator

from nahtlos.model.config import PortConfig
from nahtlos.physical.network.netlink import mac_bytes

BROADCAST, ALL_NODES_MAC, ALL_NODES = b"\xff" * 6, bytes.fromhex("333300000001"), "ff02::1"
ICMPV6, ADVERTISEMENT, OVERRIDE, TARGET_LINK = 58, 136, 0x20000000, 2


def frames(port: PortConfig) -> Iterator[bytes]:
    """A gratuitous ARP for each IPv4 address, an unsolicited neighbour advertisement for each IPv6 one."""
    mac = mac_bytes(port.mac)
    for address in port.all_addresses:
        if ":" in address:
            yield _advertisement(mac, socket.inet_pton(socket.AF_INET6, address))
        elif address:
            yield _arp(mac, socket.inet_pton(socket.AF_INET, address))


def _arp(mac: bytes, ip: bytes) -> bytes:
    head = BROADCAST + mac + struct.pack("!H", 0x0806)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + ip + bytes(6) + ip
    return (head + body).ljust(60, b"\0")


def _advertisement(mac: bytes, ip: bytes) -> bytes:
    target = socket.inet_pton(socket.AF_INET6, ALL_NODES)
    body = struct.pack("!BBHI", ADVERTISEMENT, 0, 0, OVERRIDE) + ip + struct.pack("BB", TARGET_LINK, 1) + mac
    pseudo = ip + target + struct.pack("!II", len(body), ICMPV6)
    body = body[:2] + struct.pack("!H", _checksum(pseudo + body)) + body[4:]
    head = ALL_NODES_MAC + mac + struct.pack("!H", 0x86DD)
    return head + struct.pack("!IHBB", 6 << 28, len(body), ICMPV6, 255) + ip + target + body


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
