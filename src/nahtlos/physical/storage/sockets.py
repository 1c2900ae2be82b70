"""TCP connections of a daemon, reached from outside: bounded, cut, counted.

A daemon that waits for a host that is cut off would wait for as long as TCP does, and its clients with it.
Its sockets are duplicated (pidfd_getfd) and told how long to wait; one that has to give up now is shut down.
Accepted connections inherit all of it from their listening socket, so that one is told once.
"""

import os
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from nahtlos.physical.supervisor.processes import take_descriptor

_TCP_USER_TIMEOUT = 18


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long a connection waits for the other end."""

    unacknowledged_ms: int = 2000
    """What was sent and not acknowledged for this long ends the connection."""
    idle_seconds: int = 2
    """A silent one is asked after this."""
    probe_seconds: int = 1
    probes: int = 3


class Peer(msgspec.Struct, frozen=True, order=True):
    address: str
    port: int


def bound(sock: socket.socket, patience: Patience) -> None:
    """For a connection, or a listening socket and all it will accept."""
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, patience.unacknowledged_ms)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, patience.idle_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, patience.probe_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, patience.probes)


def bound_descriptor(fd: int, patience: Patience) -> None:
    """The same for a descriptor, which stays the caller's."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        bound(sock, patience)


def bound_connections(pid: int, peer: Peer, patience: Patience) -> int:
    """Connections of the process to `peer`; how many there were."""
    return _each(pid, peer, lambda sock: bound(sock, patience))


def cut_connections(pid: int, peer: Peer) -> int:
    """End them at once, whatever the process waits for; how many there were."""
    return _each(pid, peer, lambda sock: sock.shutdown(socket.SHUT_RDWR))


def socket_inodes(pid: int) -> frozenset[int]:
    """Of whatever kind they are; each names one connection until it is closed. None if it has ended."""
    return frozenset(inode for _, inode in _sockets(pid))


def cut_accepted(pid: int, inodes: Collection[int]) -> int:
    """End those of these connections that came to one of its listening sockets; how many there were."""
    connections = [(sock, os.fstat(sock.fileno()).st_ino) for sock in _connections(pid)]
    served = {_port(sock) for sock, _ in connections if _listens(sock)}
    count = 0
    for sock, inode in connections:
        with sock, suppress(OSError):  # it may end in between
            if inode in inodes and not _listens(sock) and _port(sock) in served:
                sock.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def peers(pid: int) -> tuple[Peer, ...]:
    """The other ends of all its TCP connections, each as often as there are connections."""
    found: list[Peer] = []
    for sock in _connections(pid):
        with sock, suppress(OSError):
            found.append(_peer(sock))
    return tuple(sorted(found))


def _each(pid: int, peer: Peer, act: Callable[[socket.socket], None]) -> int:
    count = 0
    for sock in _connections(pid):
        with sock, suppress(OSError):  # it may end in between
            if _peer(sock) == peer:
                act(sock)
                count += 1
    return count


def _connections(pid: int) -> Iterator[socket.socket]:
    """Duplicates, to be closed by who gets them. Nothing for a process that has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for number, _ in _sockets(pid):
            try:
                sock = socket.socket(fileno=take_descriptor(pidfd, number))
            except OSError:
                continue
            if sock.type == socket.SOCK_STREAM and sock.family in (socket.AF_INET, socket.AF_INET6):
                yield sock
            else:
                sock.close()
    finally:
        os.close(pidfd)


def _sockets(pid: int) -> list[tuple[int, int]]:
    """(descriptor, inode)"""
    found: list[tuple[int, int]] = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                kind, _, inode = str(path.readlink()).partition(":")
                if kind == "socket":
                    found.append((int(path.name), int(inode.strip("[]"))))
    return found


def _listens(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 0


def _port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def _peer(sock: socket.socket) -> Peer:
    address, port = sock.getpeername()[:2]
    return Peer(address, port)
