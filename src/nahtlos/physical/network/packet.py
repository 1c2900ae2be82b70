"""Frames put into a device by hand: sacrificial ones, and those that were parked in a tap.

Owns AF_PACKET. Never decides what is sent.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import msgspec

from nahtlos.physical.network import bpf, tap
from nahtlos.physical.network.netlink import mac_bytes

SACRIFICE_TYPE = 0x88B5
"""An ethertype for local experiments: no guest listens to it."""
SOL_PACKET, PACKET_VNET_HDR, SO_MARK = 263, 15, 36
HEADER = 10
"""Bytes of virtio-net header that AF_PACKET expects, whatever the tap's size of it is."""
AGAIN_SECONDS, DEADLINE = 0.001, 1.0
QUEUE_BY_MARK = bpf.load_word(0, 1, 8) + bpf.leave()
"""r0 = mark of the frame; exit"""


class Returned(msgspec.Struct, frozen=True):
    sent: int = 0
    refused: int = 0
    """Frames the device would not take, and `why` the last of them."""
    why: str = ""

    def __add__(self, other: "Returned") -> "Returned":
        return Returned(self.sent + other.sent, self.refused + other.refused, other.why or self.why)


def _open(device: str) -> socket.socket:
    sending = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    sending.bind((device, 0))
    sending.settimeout(DEADLINE)
    return sending


def send(device: str, frames: Iterable[bytes]) -> None:
    """Whole Ethernet frames, out of `device`. OSError if it takes one not."""
    with _open(device) as sending:
        for frame in frames:
            sending.send(frame)


# --- the sacrifice -----------------------------------------------------------------------------------


def sacrifice(device: str, mac: str, queues: list[int]) -> None:
    """One frame for `mac` into each queue of the tap `device` that is in use: what a waiting VMM may swallow
    without loss."""
    frame = mac_bytes(mac) + b"\x02\0\0\0\0\xee" + struct.pack(">H", SACRIFICE_TYPE) + bytes(50)
    used = [fd for fd in queues if tap.in_use(fd)]
    with _open(device) as sending:
        if len(used) < 2:
            sending.send(frame)
            return
        with _steered(used[0]):
            for number in range(len(used)):
                sending.setsockopt(socket.SOL_SOCKET, SO_MARK, number)
                sending.send(frame)


@contextmanager
def _steered(fd: int) -> Generator[None]:
    """Meanwhile the mark of a frame says which queue it goes to."""
    remedy = "give the server's ports one queue each, or allow the agent bpf()"
    program = bpf.load(bpf.SOCKET_FILTER, QUEUE_BY_MARK, "chooses a queue", field="queues", remedy=remedy)
    try:
        tap.steer(fd, program)
        yield
    finally:
        tap.steer(fd, -1)
        os.close(program)


# --- parked frames -----------------------------------------------------------------------------------


def send_again(device: str, frames: Iterable[memoryview], tap_header: int, mac: str) -> Returned:
    """Frames as read from the tap of `mac`, out of `device`, checksums and segments still to be completed by
    who takes them.

    Flooded ones are addressed to `mac` alone, as a bridge does for a port with `mcast_to_unicast`: everyone
    else has had theirs.
    """
    target = mac_bytes(mac)
    sent, refused, why = 0, 0, ""
    with _open(device) as sending:
        sending.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        for frame in frames:
            body = frame[tap_header:]
            if _is_sacrifice(body):
                continue
            try:
                _send(sending, addressed(frame[:HEADER], body, target))
                sent += 1
            except OSError as error:
                refused, why = refused + 1, f"{len(body)} bytes: {error.strerror or error}"
    return Returned(sent, refused, why)


def addressed(header: memoryview, body: memoryview, target: bytes) -> list[bytes | memoryview]:
    """The parts of a frame as AF_PACKET takes it; to `target` if it was for many."""
    return [header, target, body[6:]] if body[0] & 1 else [header, body]


def _send(sending: socket.socket, parts: list[bytes | memoryview]) -> None:
    """A queue on the way that is full at the moment is waited for."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            sending.sendmsg(parts)
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN) or time.monotonic() >= deadline:
                raise
            time.sleep(AGAIN_SECONDS)
        else:
            return


def _is_sacrifice(frame: bytes | memoryview) -> bool:
    return bytes(frame[12:14]) == struct.pack(">H", SACRIFICE_TYPE)
