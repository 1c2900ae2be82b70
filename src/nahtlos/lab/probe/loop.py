"""Readiness of TCP sockets, what is due when, and errors by their names."""

import errno
import select
import socket
from collections.abc import Callable


class Loop:
    """Readiness of TCP sockets: a callback for each, called with the event mask."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}

    def watch(self, sock: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        fd = sock.fileno()
        if fd in self._ready:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._ready[fd] = ready

    def close(self, sock: socket.socket) -> None:
        fd = sock.fileno()
        if self._ready.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        sock.close()

    def turn(self) -> None:
        for fd, events in self._epoll.poll(0):
            ready = self._ready.get(fd)
            if ready is not None:
                ready(events)


def reason_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "") or str(error)


class Every:
    """Due at most once per `seconds`; what was missed is not made up for."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._next = 0.0

    def due(self, now: float) -> bool:
        if now < self._next:
            return False
        self._next = max(self._next + self.seconds, now + self.seconds / 2)
        return True
