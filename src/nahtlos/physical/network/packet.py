"""Frames put into a device by hand: sacrificial ones, and those that were parked in a tap.

Owns AF_PACKET. Never decides what is sent.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import msgspec

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import tap
from nahtlos.physical.network.netlink import mac_bytes

SACRIFICE_TYPE = 0x88B5
"""An ethertype for local experiments: no guest listens to it."""
SOL_PACKET, PACKET_VNET_HDR, SO_MARK = 263, 15, 36
HEADER = 10
"""Bytes of virtio-net header that AF_PACKET expects, whatever the tap's size of it is."""
AGAIN_SECONDS, DEADLINE = 0.001, 1.0
BPF_PROG_LOAD, SOCKET_FILTER = 5, 1
SYS_BPF = {"x86_64": 321, "aarch64": 280}
QUEUE_BY_MARK = struct.pack("BBhiBBhi", 0x61, 0x10, 8, 0, 0x95, 0, 0, 0)
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
    program = _load(QUEUE_BY_MARK)
    try:
        tap.steer(fd, program)
        yield
    finally:
        tap.steer(fd, -1)
        os.close(program)


def _load(instructions: bytes) -> int:
    """A descriptor of a program in the kernel."""
    code, licence = ctypes.create_string_buffer(instructions), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "IIQQ", SOCKET_FILTER, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(licence)
    ).ljust(128, b"\0")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(SYS_BPF.get(platform.machine(), -1), BPF_PROG_LOAD, buffer, len(attributes))
    if fd < 0:
        raise Unavailable(
            f"this kernel loads no steering program: {os.strerror(ctypes.get_errno())}",
            field="queues",
            remedy="give the server's ports one queue each, or allow the agent bpf()",
        )
    return fd


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
