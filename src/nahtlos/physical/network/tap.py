"""Taps: a server's end of a network, as descriptors, one per queue.

Owns opening them and looking into their rings through duplicates. A tap has carrier only while a
descriptor is open, and lives only as long: the supervisor's store keeps one per queue. Never reads from a
ring unless told to.
"""

import ctypes
import fcntl
import os
import select
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from nahtlos.model.errors import Unavailable
from nahtlos.physical.network import bpf

DEVICE = Path("/dev/net/tun")
TUNSETIFF, TUNGETIFF, TUNGETHEADER = 0x400454CA, 0x800454D2, 0x800454D7
TUNATTACHFILTER, TUNDETACHFILTER, TUNSETFILTEREBPF = 0x401054D5, 0x401054D6, 0x800454E1
TUNSETSTEERING, TUNSETQUEUE = 0x800454E0, 0x400454D9
TAP, NO_PI, HEADER, MANY_QUEUES, ATTACHED, DETACHED = 0x0002, 0x1000, 0x4000, 0x0100, 0x0200, 0x0400
"""HEADER: each frame carries a virtio-net header, so checksums and segments stay the guest's business.
DETACHED: the VMM does not use this queue now; the kernel puts nothing into it."""

QUEUE = 10000
"""Frames a ring holds while a server is not running. At least packets/s x blackout x 3."""
LONGEST_FRAME = 1 << 17


def open_tap(name: str, *, many_queues: bool = False) -> int:
    """A new tap, or another queue of one that was made for many; the caller owns the descriptor."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(
            f"cannot open {DEVICE}: {error.strerror}", field="network", remedy="load the tun module"
        ) from error
    flags = TAP | NO_PI | HEADER | (MANY_QUEUES if many_queues else 0)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"cannot make tap {name}: {error.strerror}", field="network") from error
    return fd


def is_attached(fd: int) -> bool:
    """It is a queue of some device: not, once that was deleted."""
    try:
        fcntl.ioctl(fd, TUNGETIFF, bytes(40))
    except OSError:
        return False
    return True


def join(fd: int, name: str) -> None:
    """A descriptor whose device was deleted becomes another queue of the tap `name`, which was made for many.
    Whoever else holds the descriptor has that queue with it."""
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP | NO_PI | HEADER | MANY_QUEUES))
    except OSError as error:
        raise Unavailable(f"tap {name} takes no further queue: {error.strerror}", field="network") from error


def use(fd: int, *, on: bool) -> None:
    """Whether the kernel puts frames into this queue. What is in it is thrown away when it ceases to; whoever
    holds it may send by it all the same."""
    if in_use(fd) != on:
        fcntl.ioctl(fd, TUNSETQUEUE, struct.pack("16xH22x", ATTACHED if on else DETACHED))


def refuse_own(fd: int, mac: bytes, *, queues: int = 1) -> None:
    """What the port itself sent is never put into its ring. While a server moves, its last broadcasts from
    the old host reach the new one: a guest that hears its own neighbour solicitation thinks that its
    address is taken. Repeatable; holds for every queue, and as long as the tap lives.

    An older kind of filter is kept as an address in this process's memory: a VMM that takes a further queue
    into use has it read from its own, is refused, and ends itself. It serves taps of one queue, on kernels
    that load no program."""
    high, low = struct.unpack(">IH", mac)
    try:
        program = bpf.load(bpf.SOCKET_FILTER, _not_from(high, low), "refuses frames", field="queues")
    except Unavailable:
        if queues > 1:
            raise
        _attach_filter(fd, high, low)
        return
    try:
        fcntl.ioctl(fd, TUNSETFILTEREBPF, struct.pack("i", program))
        fcntl.ioctl(fd, TUNDETACHFILTER, bytes(16))
    finally:
        os.close(program)


def _not_from(high: int, low: int) -> bytes:
    return b"".join(
        (
            bpf.copy(6, 1),
            bpf.load_frame(4, 6),
            bpf.skip_unless_same(high, 4),
            bpf.load_frame(2, 10),
            bpf.skip_unless_same(low, 2),
            bpf.put(0, 0),
            bpf.leave(),
            bpf.put(0, -1),  # all of it
            bpf.leave(),
        )
    )


def _attach_filter(fd: int, high: int, low: int) -> None:
    program = b"".join(
        struct.pack("HBBI", *line)
        for line in (
            (0x20, 0, 0, 6),  # the first four bytes of the sender's address
            (0x15, 0, 3, high),
            (0x28, 0, 0, 10),  # the last two
            (0x15, 0, 1, low),
            (0x06, 0, 0, 0),  # drop
            (0x06, 0, 0, 0xFFFFFFFF),  # all of it
        )
    )
    lines = ctypes.create_string_buffer(program)
    fcntl.ioctl(fd, TUNATTACHFILTER, struct.pack("H6xQ", len(program) // 8, ctypes.addressof(lines)))


def has_frames(fds: Iterable[int]) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll(0))


def header_size(fd: int) -> int:
    """Bytes of virtio-net header before each frame: 10, or what the VMM has chosen (12)."""
    return int(struct.unpack("i", fcntl.ioctl(fd, TUNGETHEADER, struct.pack("i", 0)))[0])


def in_use(fd: int) -> bool:
    """The kernel puts frames into this queue."""
    answer = fcntl.ioctl(fd, TUNGETIFF, bytes(40))
    return not struct.unpack_from("H", answer, 16)[0] & DETACHED


def takes_queues(fd: int) -> bool:
    """It was made for more than one."""
    answer = fcntl.ioctl(fd, TUNGETIFF, bytes(40))
    return bool(struct.unpack_from("H", answer, 16)[0] & MANY_QUEUES)


def steer(fd: int, program: int) -> None:
    """The queue for each frame is chosen by the loaded program `program`; -1: as the kernel does it."""
    fcntl.ioctl(fd, TUNSETSTEERING, struct.pack("i", program))


def frames(fd: int, limit: int = QUEUE) -> Iterator[memoryview]:
    """Takes every frame out of a ring, header included, oldest first. Each is valid until the next: a ring
    can hold more bytes than this process should."""
    buffer = bytearray(LONGEST_FRAME)
    view = memoryview(buffer)
    for _ in range(limit):
        try:
            length = os.readv(fd, [buffer])
        except OSError:  # nothing is left, or the queue is not in use
            return
        yield view[:length]


def empty(fds: Iterable[int]) -> int:
    """Throws away what the rings hold. Returns how many frames that were."""
    return sum(1 for fd in fds for _ in frames(fd))
