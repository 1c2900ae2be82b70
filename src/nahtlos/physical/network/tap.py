"""Taps: a server's end of a network, as a descriptor.

Owns opening them and looking into their ring through a duplicate. A tap has carrier only while a
descriptor is open, and lives only as long: the supervisor's store keeps one. Never reads from a ring
unless told to drain it.
"""

import fcntl
import os
import select
import struct
from pathlib import Path

from nahtlos.model.errors import Unavailable

DEVICE = Path("/dev/net/tun")
TUNSETIFF, TUNGETHEADER = 0x400454CA, 0x800454D7
TAP, NO_PI, HEADER = 0x0002, 0x1000, 0x4000
"""HEADER: each frame carries a virtio-net header, so checksums and segments stay the guest's business."""

QUEUE = 10000
"""Frames the ring holds while a server is not running. At least packets/s x blackout x 3."""
LONGEST_FRAME = 1 << 17


def open_tap(name: str) -> int:
    """A new single-queue tap; the caller owns the descriptor."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(
            f"cannot open {DEVICE}: {error.strerror}", field="network", remedy="load the tun module"
        ) from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP | NO_PI | HEADER))
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"cannot make tap {name}: {error.strerror}", field="network") from error
    return fd


def has_frames(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))


def header_size(fd: int) -> int:
    """Bytes of virtio-net header before each frame: 10, or what the VMM has chosen (12)."""
    return int(struct.unpack("i", fcntl.ioctl(fd, TUNGETHEADER, struct.pack("i", 0)))[0])


def drain(fd: int, limit: int = QUEUE) -> list[bytes]:
    """Takes every frame out of the ring, header included, oldest first."""
    frames: list[bytes] = []
    while len(frames) < limit and has_frames(fd):
        try:
            frames.append(os.read(fd, LONGEST_FRAME))
        except (BlockingIOError, OSError):
            break
    return frames
