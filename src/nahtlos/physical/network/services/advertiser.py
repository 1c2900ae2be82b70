"""Router advertisements in the name of a network's anycast routers.

A router is in a namespace of its own on every host and says nothing by itself; this tells the servers of one
network and host that it is there: with its MAC and link-local address, without prefixes, which are told with
the network's addresses. Sends when a server asks, when the routers change (one that is gone: for 0 seconds),
and now and then. Owns one packet socket. Of Python's own library only.
"""

import socket
import struct
import time

from nahtlos.physical.network.services.metadata_pages import Record

EVERY_SECONDS = 200.0
LIFETIME = 1800
ETH_P_IPV6 = 0x86DD
ICMPV6, SOLICITATION, ADVERTISEMENT = 58, 133, 134
ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
ALL_NODES_MAC = bytes.fromhex("333300000001")


def advertisement(mac: str, address: str, mtu: int, lifetime: int) -> bytes:
    """The whole frame: from router `mac` with link-local `address` to all servers."""
    raw, source = bytes.fromhex(mac.replace(":", "")), socket.inet_pton(socket.AF_INET6, address)
    body = struct.pack("!BBHBBHII", ADVERTISEMENT, 0, 0, 64, 0, lifetime, 0, 0)
    body += struct.pack("!BB6s", 1, 1, raw) + struct.pack("!BBHI", 5, 1, 0, mtu)
    pseudo = source + ALL_NODES + struct.pack("!II", len(body), ICMPV6)
    body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    header = struct.pack("!IHBB", 0x60000000, len(body), ICMPV6, 255) + source + ALL_NODES
    return ALL_NODES_MAC + raw + struct.pack("!H", ETH_P_IPV6) + header + body


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Advertiser:
    def __init__(self, interface: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IPV6))
        self.socket.bind((interface, ETH_P_IPV6))
        self.socket.setblocking(False)
        self._told: dict[str, Record] = {}
        self._due = 0.0

    def heard(self) -> None:
        """Frames have come: if one of them asks for routers, they are advertised again."""
        try:
            while True:
                frame = self.socket.recv(128)
                if len(frame) > 54 and frame[20] == ICMPV6 and frame[54] == SOLICITATION:
                    self._due = 0.0
        except BlockingIOError:
            pass

    def advertise(self, routers: list[Record]) -> None:
        """`routers` with `mac`, `address`, `mtu`, if it is time to."""
        now = {router["mac"]: router for router in routers}
        gone = [router for mac, router in self._told.items() if mac not in now]
        changed, self._told = now != self._told, now
        for router in gone:
            self._send(router, 0)
        if changed or time.monotonic() >= self._due:
            for router in now.values():
                self._send(router, LIFETIME)
            self._due = time.monotonic() + EVERY_SECONDS

    def _send(self, router: Record, lifetime: int) -> None:
        self.socket.send(advertisement(router["mac"], router["address"], router["mtu"], lifetime))
