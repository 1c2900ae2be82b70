"""Frames put into a device by hand: the sacrificial one, and those that were parked in a tap.

Owns AF_PACKET. Never decides what is sent.
"""

import socket
import struct
from collections.abc import Iterable

from nahtlos.physical.network.netlink import mac_bytes

SACRIFICE_TYPE = 0x88B5
"""An ethertype for local experiments: no guest listens to it."""
SOL_PACKET, PACKET_VNET_HDR = 263, 15
HEADER = 10
"""Bytes of virtio-net header that AF_PACKET expects, whatever the tap's size of it is."""


def _open(device: str) -> socket.socket:
    sending = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    sending.bind((device, 0))
    sending.settimeout(1.0)
    return sending


def sacrifice(device: str, mac: str) -> None:
    """One frame for `mac` into the tap `device`: what a waiting VMM may swallow without loss."""
    frame = mac_bytes(mac) + b"\x02\0\0\0\0\xee" + struct.pack(">H", SACRIFICE_TYPE) + bytes(50)
    with _open(device) as sending:
        sending.send(frame)


def send_again(device: str, frames: Iterable[bytes], tap_header: int) -> int:
    """Frames as read from a tap, out of `device`, checksums and segments still to be completed by who
    takes them. Returns how many."""
    sent = 0
    with _open(device) as sending:
        sending.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        for frame in frames:
            if not _is_sacrifice(frame[tap_header:]):
                sending.send(frame[:HEADER] + frame[tap_header:])
                sent += 1
    return sent


def _is_sacrifice(frame: bytes) -> bool:
    return frame[12:14] == struct.pack(">H", SACRIFICE_TYPE)
