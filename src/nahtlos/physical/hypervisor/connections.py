"""TCP connections of other processes of this host, and the doors they lead to: how long a dead peer may keep
them waiting, whether a peer has left a request unanswered, how to end one from outside.

A VMM has no time-out of its own for a volume's daemon that hangs or cannot be reached any more. Its sockets
are borrowed for a moment (pidfd_getfd) and given options, which stay. Needs root.
"""

import asyncio
import ctypes
import os
import socket
import struct
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

PIDFD_GETFD = 438
CUT_OFF_MS = 1800
"""What was sent is not acknowledged by the peer's kernel for so long: the connection ends."""
KEEPALIVE = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 2}
GREETING = b"NBDMAGICIHAVEOPT"
_LAST_SENT, _LAST_RECEIVED = 9, 11
"""Places in `struct tcp_info`, in words behind its first 8 bytes; milliseconds."""

Address = tuple[str, int]


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """A connection over which nothing has come for a while."""

    address: Address
    seconds: float
    """Since something was sent."""
    unanswered: bool
    """Certainly a request. The kernel counts in ticks: what was sent within the tick of the last answer may
    be one, or not."""


def bound(pid: int, addresses: Iterable[Address]) -> int:
    """Bound the time for which a dead or cut-off peer keeps a connection waiting. Returns how many there
    are."""
    count = 0
    for held, _ in _connected(pid, frozenset(addresses)):
        held.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, CUT_OFF_MS)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            held.setsockopt(socket.IPPROTO_TCP, option, value)
        count += 1
    return count


def silences(pid: int, addresses: Iterable[Address]) -> tuple[Silence, ...]:
    """Connections over which nothing was received after the last that was sent. NBD answers every request and
    says nothing else."""
    found: list[Silence] = []
    for held, address in _connected(pid, frozenset(addresses)):
        words = struct.unpack_from("=12I", held.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 8)
        sent, received = words[_LAST_SENT], words[_LAST_RECEIVED]
        if sent <= received:
            found.append(Silence(address=address, seconds=sent / 1000, unanswered=sent < received))
    return tuple(found)


def ends(pid: int, addresses: Iterable[Address]) -> frozenset[Address]:
    """Where its connections begin: each new one elsewhere than the one before."""
    return frozenset(
        (str(own[0]), int(own[1]))
        for held, _ in _connected(pid, frozenset(addresses))
        if (own := held.getsockname())
    )


def end(pid: int, address: Address) -> int:
    """Both sides see an end at once. Returns how many there were."""
    count = 0
    for held, _ in _connected(pid, frozenset({address})):
        held.shutdown(socket.SHUT_RDWR)
        count += 1
    return count


def _connected(pid: int, addresses: frozenset[Address]) -> Iterator[tuple[socket.socket, Address]]:
    for held in _sockets(pid):
        try:
            if held.family not in (socket.AF_INET, socket.AF_INET6) or held.type != socket.SOCK_STREAM:
                continue
            peer = held.getpeername()
            address = (str(peer[0]).removeprefix("::ffff:"), int(peer[1]))
            if address in addresses:
                yield held, address
        except OSError:
            continue  # not connected, or not any more


def _sockets(pid: int) -> Iterator[socket.socket]:
    libc = ctypes.CDLL(None, use_errno=True)
    with _process(pid) as process:
        for number in _descriptors(pid):
            borrowed = libc.syscall(PIDFD_GETFD, process, number, 0)
            if borrowed < 0:
                continue  # closed meanwhile
            with socket.socket(fileno=borrowed) as held:
                yield held


@contextmanager
def _process(pid: int) -> Generator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _descriptors(pid: int) -> tuple[int, ...]:
    folder = Path(f"/proc/{pid}/fd")
    found: list[int] = []
    for each in folder.iterdir():
        try:
            if str(each.readlink()).startswith("socket:"):
                found.append(int(each.name))
        except OSError:
            continue
    return tuple(found)


async def answers(address: Address, *, connect_within: float, greet_within: float) -> bool:
    """Whether an NBD server greets there. A daemon that is being started again has its connections wait for
    it, so who can be connected to has longer."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(connect_within):
            reader, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(greet_within):
            return await reader.readexactly(len(GREETING)) == GREETING
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False
    finally:
        if writer is not None:
            writer.close()
