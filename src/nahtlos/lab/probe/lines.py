"""One long TCP session that exchanges numbered lines."""

import errno
import select
import socket
import time
from collections import deque

from nahtlos.lab.probe.loop import Loop, reason_of

LINE_PORT = 7000
LINE_TIMEOUT_SECONDS = 20.0
REOPEN_SECONDS = 0.5


class LineSession:
    """A session that sends a numbered line every now and then and expects exactly these lines back.
    Broken: reset, end of file, other data, or an answer that takes longer than the timeout.
    It is then opened again."""

    def __init__(self, loop: Loop, ip: str) -> None:
        self._loop = loop
        self._ip = ip
        self._sock: socket.socket | None = None
        self._connected = False
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._received = bytearray()
        self._unsent = b""
        self._opened_at = 0.0
        self._reopen_at = 0.0
        self._number = 0
        self.counted = False
        self.lines = 0
        self.sessions = 0
        self.broken = 0
        self.longest_stall = 0.0
        self.error = ""

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def unanswered(self) -> int:
        return len(self._waiting)

    def tick(self, now: float, *, reopen: bool, say: bool) -> None:
        """Call once per interval: opens it (again), checks the timeout, says the next line."""
        if self._sock is None:
            if now >= self._reopen_at and reopen:
                self._open(now)
            return
        since = self._waiting[0][0] if self._waiting else (now if self._connected else self._opened_at)
        if now - since > LINE_TIMEOUT_SECONDS:
            self._break(f"no answer for {LINE_TIMEOUT_SECONDS:.0f} s", now)
        elif self._connected and say:
            self._say(now)

    def _open(self, now: float) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock, self._connected, self._opened_at = sock, False, now
        outcome = sock.connect_ex((self._ip, LINE_PORT))
        if outcome not in (0, errno.EINPROGRESS):
            self._break(errno.errorcode.get(outcome, str(outcome)), now)
            return
        self._loop.watch(sock, select.EPOLLOUT, self._ready)

    def _ready(self, events: int) -> None:
        sock, now = self._sock, time.monotonic()
        if sock is None:
            return
        try:
            if not self._connected:
                self._opened(sock, now)
            elif events & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
                self._take(sock.recv(65536), now)
            if events & select.EPOLLOUT and self._sock is not None:
                self._push()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(reason_of(error), now)

    def _opened(self, sock: socket.socket, now: float) -> None:
        outcome = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if outcome:
            self._break(errno.errorcode.get(outcome, str(outcome)), now)
            return
        self._connected = True
        self.sessions += 1
        self._loop.watch(sock, select.EPOLLIN, self._ready)

    def _say(self, now: float) -> None:
        line = b"line %010d of a session that never ends\n" % self._number
        self._number += 1
        self._waiting.append((now, line))
        self._unsent += line
        try:
            self._push()
        except OSError as error:
            self._break(reason_of(error), now)

    def _push(self) -> None:
        if self._sock is None:
            return
        try:
            sent = self._sock.send(self._unsent) if self._unsent else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        self._unsent = self._unsent[sent:]
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._unsent else 0)
        if sent == 0 or self._unsent:
            self._loop.watch(self._sock, wanted, self._ready)

    def _take(self, data: bytes, now: float) -> None:
        if not data:
            self._break("the server closed it", now)
            return
        self._received += data
        while self._waiting:
            at, line = self._waiting[0]
            got = bytes(self._received[: len(line)])
            if got != line[: len(got)]:
                self._break("other data than was sent came back", now)
                return
            if len(got) < len(line):
                return
            del self._received[: len(line)]
            self._waiting.popleft()
            if self.counted:
                self.lines += 1
                self.longest_stall = max(self.longest_stall, now - at)
        if self._received:
            self._break("more came back than was sent", now)

    def _break(self, reason: str, now: float) -> None:
        if self.counted:
            self.broken += 1
            self.error = reason
            if self._waiting:
                self.longest_stall = max(self.longest_stall, now - self._waiting[0][0])
        self.close()
        self._reopen_at = now + REOPEN_SECONDS

    def give_up(self) -> None:
        """The drain is over: lines still without an answer break the session."""
        if self._waiting:
            self._break("lines without an answer at the end", time.monotonic())
        self.close()

    def close(self) -> None:
        if self._sock is not None:
            self._loop.close(self._sock)
        self._sock, self._connected = None, False
        self._waiting.clear()
        self._received.clear()
        self._unsent = b""
