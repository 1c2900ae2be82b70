"""Gratuitous ARP: neighbours outside learn at once which host answers for an address now.

Owns AF_PACKET for it. Never decides for what.
"""

import socket
import struct
from collections.abc import Iterable

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network.netlink import ipv4, mac_bytes

REQUEST, ANSWER = 1, 2
BROADCAST = b"\xff" * 6


def frames(mac: str, ips: Iterable[str]) -> list[bytes]:
    """A request and an answer each: some neighbours believe only one of the two."""
    sender = mac_bytes(mac)
    return [_frame(sender, ipv4(ip), operation) for ip in ips for operation in (REQUEST, ANSWER)]


def _frame(sender: bytes, ip: bytes, operation: int) -> bytes:
    target = bytes(6) if operation == REQUEST else BROADCAST
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + sender + ip + target + ip
    return BROADCAST + sender + b"\x08\x06" + body + bytes(18)


def announce(device: str, mac: str, ips: Iterable[str]) -> None:
    try:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sending:
            sending.bind((device, 0))
            for frame in frames(mac, ips):
                sending.send(frame)
    except OSError as error:
        raise Unavailable(f"cannot announce addresses on {device}: {error}", field="gateway") from error
