"""HTTP GETs, each on a new connection, with one deadline for all; and the operator API, asked that way."""

import errno
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from nahtlos.lab.probe.loop import Loop, reason_of
from nahtlos.runtime.evidence.records import ApiProbe

DEADLINE_SECONDS = 5.0
API_PATHS = ("/v1/status", "/v1/servers")
API_ERRORS_KEPT = 100


class Exchange:
    """One GET on a new connection. Ends once, by `done(seconds, status, body, error)`."""

    def __init__(
        self,
        loop: Loop,
        address: tuple[str, int] | str,
        path: str,
        done: Callable[["Exchange", int, bytes, str], None],
    ) -> None:
        self._loop = loop
        self._done = done
        self._received = b""
        self._ended = False
        self.path = path
        self.began_at = time.monotonic()
        host = address[0] if isinstance(address, tuple) else "nahtlos"
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._connect(address)

    def _connect(self, address: tuple[str, int] | str) -> None:
        try:
            outcome = self._sock.connect_ex(address)
        except OSError as error:
            outcome = error.errno or errno.EIO
        if outcome in (0, errno.EINPROGRESS):
            self._loop.watch(self._sock, select.EPOLLOUT, self._ready)
        else:
            self._end(0, b"", errno.errorcode.get(outcome, str(outcome)))

    def _ready(self, events: int) -> None:
        try:
            if self._request:
                self._open()
            elif events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._take(self._sock.recv(65536))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(0, b"", reason_of(error))

    def _open(self) -> None:
        outcome = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if outcome:
            self._end(0, b"", errno.errorcode.get(outcome, str(outcome)))
            return
        self._sock.send(self._request)
        self._request = b""
        self._loop.watch(self._sock, select.EPOLLIN, self._ready)

    def _take(self, data: bytes) -> None:
        self._received += data
        answer = parse_answer(self._received, ended=not data)
        if answer is not None:
            self._end(*answer)

    def expire(self, deadline: float) -> None:
        self._end(0, b"", f"no answer within {deadline:g} s")

    def _end(self, status: int, body: bytes, error: str) -> None:
        if self._ended:
            return
        self._ended = True
        self._loop.close(self._sock)
        self._done(self, status, body, error)

    @property
    def ended(self) -> bool:
        return self._ended


def parse_answer(received: bytes, *, ended: bool) -> tuple[int, bytes, str] | None:
    """(status, body, error) once an answer is whole (or can never be); None while more may come."""
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return (0, b"", "closed before an answer") if ended else None
    lines = head.split(b"\r\n")
    parts = lines[0].split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        return 0, b"", "not an HTTP answer"
    length = _content_length(lines[1:])
    if length is None:
        return (int(parts[1]), body, "") if ended else None
    if len(body) >= length:
        return int(parts[1]), body[:length], ""
    return (0, b"", "closed in the middle of an answer") if ended else None


def _content_length(headers: list[bytes]) -> int | None:
    for header in headers:
        name, _, value = header.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value)
    return None


class Exchanges:
    """Exchanges under way, oldest first, with one deadline for all."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._under_way: deque[Exchange] = deque()

    def add(self, exchange: Exchange) -> None:
        if not exchange.ended:
            self._under_way.append(exchange)

    def tick(self, now: float) -> None:
        queue = self._under_way
        while queue and (queue[0].ended or now - queue[0].began_at > self._deadline):
            queue.popleft().expire(self._deadline)

    def idle(self) -> bool:
        return all(e.ended for e in self._under_way)


class ApiWatch:
    """Asks the operator API, each path in turn, on a new connection each time. Counted from its first
    answer on; whatever is no answer with 200 is an error."""

    def __init__(self, loop: Loop, path: str) -> None:
        self._loop = loop
        self._address = path
        self._exchanges = Exchanges(DEADLINE_SECONDS)
        self._turn = 0
        self._answered = False
        self._requests = 0
        self._errors = 0
        self._slowest = 0.0
        self._error = ""
        self._errors_at: list[float] = []

    def ask(self) -> None:
        self._turn += 1
        path = API_PATHS[self._turn % len(API_PATHS)]
        self._exchanges.add(Exchange(self._loop, self._address, path, self._done))

    def expire(self, now: float) -> None:
        self._exchanges.tick(now)

    def idle(self) -> bool:
        return self._exchanges.idle()

    def _done(self, exchange: Exchange, status: int, body: bytes, error: str) -> None:
        self._answered = self._answered or status == 200
        if not self._answered:
            return
        self._requests += 1
        self._slowest = max(self._slowest, time.monotonic() - exchange.began_at)
        if status == 200:
            return
        self._errors += 1
        self._error = f"{exchange.path}: {error or f'status {status}'}"
        if len(self._errors_at) < API_ERRORS_KEPT:
            self._errors_at.append(round(time.time(), 3))

    def summary(self) -> ApiProbe:
        return ApiProbe(
            requests=self._requests,
            errors=self._errors,
            slowest_ms=round(self._slowest * 1e3, 3),
            error=self._error,
            errors_at=tuple(self._errors_at),
        )
