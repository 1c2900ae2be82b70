"""The prober: a customer's eyes. It runs outside the system under test and knows nothing of it but the
addresses of servers and the operator API's socket.

    python -m nahtlos.lab.probe --plan FILE --out DIR

It owns DIR (`nahtlos.runtime.evidence.records` says what is in it). It never judges, and it never changes
the system: `subscribe` and GET are all it says beside the datagrams and lines it numbers.

One thread, one tick of 1 / pps seconds. In each tick every server is sent one datagram; then whatever
TCP has ready is taken; echoes are fetched only every few ticks, because the kernel has stamped their
arrival already. That keeps six servers at 250 datagrams a second below an eighth of a core.

    server:  WAITING --echo, HTTP, TCP answered--> MEASURED --SIGTERM, plan drops it--> DRAINING --> ENDED

The plan (JSON) is read again whenever the file changes:

    {"servers": [{"name": "web-1", "ip": "10.77.0.10", "start": 1790000000.0}], "udp_pps": 250,
     "tcp_interval": 0.05, "http_interval": 0.1, "api_socket": "/run/…/operator.sock"}

`start` is the wall-clock second at which the server was asked for; absent: when the probe read of it.
"""

import argparse
import errno
import gc
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from types import FrameType

import msgspec

from nahtlos.model.errors import Error, Refused
from nahtlos.model.nouns import Value
from nahtlos.runtime.evidence.records import (
    DRAIN_SECONDS,
    SUMMARY_NAME,
    ApiProbe,
    ProbeSummary,
    ServerProbe,
)

DATAGRAM = struct.Struct("<8sQI")
DATAGRAM_SIZE = 64
HEARTBEAT = struct.Struct("<QQQQQ")
TIMESPEC = struct.Struct("@qq")
SO_TIMESTAMPNS = 35
"""From asm-generic/socket.h; Python does not name it. Also the type of the control message."""

MAGIC = b"nahtlos1"
GREETING = 0xFFFFFFFF
"""The number of datagrams that only ask whether anybody is there."""

ECHO_PORT, BEAT_PORT, LINE_PORT, HTTP_PORT = 7, 9, 7000, 80
RECEIVE_BUFFER = 4 << 20
FETCH_SECONDS = 0.02
GREET_SECONDS = 0.25
STATUS_SECONDS = 1.0
API_SECONDS = 0.1
RESUBSCRIBE_SECONDS = 120.0
BEAT_SILENCE_SECONDS = 2.0
LINE_TIMEOUT_SECONDS = 20.0
REOPEN_SECONDS = 0.5
HTTP_DEADLINE_SECONDS = 5.0
API_PATHS = ("/v1/status", "/v1/servers")
API_ERRORS_KEPT = 100
SAFE_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]*$")


class PlannedServer(Value, frozen=True, kw_only=True):
    name: str
    ip: str
    start: float | None = None


class Plan(Value, frozen=True, kw_only=True):
    servers: tuple[PlannedServer, ...] = ()
    udp_pps: int = 250
    tcp_interval: float = 0.05
    http_interval: float = 0.1
    api_socket: str | None = None


def decode_plan(data: bytes) -> Plan:
    """The plan, or `Refused` naming the field that is wrong."""
    try:
        plan = msgspec.json.decode(data, type=Plan)
    except msgspec.DecodeError as error:
        raise Refused(f"not a probe plan: {error}", field="plan", remedy="see nahtlos.lab.probe") from error
    if not 1 <= plan.udp_pps <= 2000:
        raise Refused(f"{plan.udp_pps} datagrams a second", field="udp_pps", remedy="1 to 2000")
    for server in plan.servers:
        if not SAFE_NAME.match(server.name):
            raise Refused(f"'{server.name}' is no server's name", field="servers.name")
    return plan


# --- one thread's event loop -------------------------------------------------------------------------


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


def _reason(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "") or str(error)


# --- numbered datagrams ------------------------------------------------------------------------------


class Datagrams:
    """Numbered datagrams to the echo port, and when each came back.

    What is in memory for the whole run is one byte a datagram; times go to files every second."""

    def __init__(self, ip: str, token: int, out: Path, name: str) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        _large_buffer(self._sock)
        self._sock.setblocking(False)
        self._sock.connect((ip, ECHO_PORT))
        self._token = token
        self._out = bytearray(DATAGRAM_SIZE)
        self._in = bytearray(2048)
        self._seen = bytearray()
        self._highest = -1
        self._last_sent_ns = 0
        self._last_received_ns = 0
        self._judged_sent: deque[tuple[float, int]] = deque()
        self._sent_at: array[int] = array("q")
        self._received_at: array[int] = array("q")
        self._numbers: array[int] = array("I")
        self._files = tuple(
            (out / f"{name}.{kind}").open("wb") for kind in ("sent", "received", "received-number")
        )
        self.answered = False
        self.sent = 0
        self.received = 0
        self.duplicated = 0
        self.reordered = 0
        self.longest_gap_ns = 0
        self.longest_send_gap_ns = 0
        self.longest_answer_ns = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def greet(self) -> None:
        self._put(GREETING)

    def send(self) -> None:
        now = time.time_ns()
        if not self._put(self.sent):
            return
        if self._last_sent_ns and now - self._last_sent_ns > self.longest_send_gap_ns:
            self.longest_send_gap_ns = now - self._last_sent_ns
        self._last_sent_ns = now
        self._sent_at.append(now)
        self._seen.append(0)
        self.sent += 1

    def _put(self, number: int) -> bool:
        """False only if this machine had no room for it: then it was never sent, and its number is free.
        An error somebody else reported for an earlier datagram is taken off the socket and tried past."""
        DATAGRAM.pack_into(self._out, 0, MAGIC, self._token, number)
        for _ in range(3):
            try:
                self._sock.send(self._out)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return False
            else:
                return True
        return number != GREETING

    def fetch(self) -> None:
        """Take in every echo that waits."""
        receive = self._sock.recvmsg_into
        while True:
            try:
                size, control, _, _ = receive([self._in], 64)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue
            if size < DATAGRAM.size:
                continue
            magic, token, number = DATAGRAM.unpack_from(self._in)
            if magic != MAGIC or token != self._token:
                continue
            if number == GREETING:
                self.answered = True
            elif number < self.sent:
                self._arrived(number, _stamp(control))

    def _arrived(self, number: int, at: int) -> None:
        self._received_at.append(at)
        self._numbers.append(number)
        if number < self._highest:
            self.reordered += 1
        else:
            self._highest = number
        if self._seen[number]:
            self.duplicated += 1
        else:
            self._seen[number] = 1
            self.received += 1
        silence = at - self._last_received_ns
        if self._last_received_ns and silence > self.longest_gap_ns:
            self.longest_gap_ns = silence
        if silence > 0:
            self._last_received_ns = at
        unwritten = number - (self.sent - len(self._sent_at))
        if unwritten >= 0:
            self.longest_answer_ns = max(self.longest_answer_ns, at - self._sent_at[unwritten])

    def silence_ms(self) -> float:
        since = self._last_received_ns
        return max(0.0, (time.time_ns() - since) / 1e6) if since else 0.0

    def lost(self, *, final: bool) -> int:
        """Numbers out for longer than the drain; at the end, all that are out. Call once a second."""
        if final:
            return self._seen.count(0)
        now = time.monotonic()
        self._judged_sent.append((now, self.sent))
        while len(self._judged_sent) > 1 and self._judged_sent[1][0] <= now - DRAIN_SECONDS:
            self._judged_sent.popleft()
        at, sent = self._judged_sent[0]
        return self._seen.count(0, 0, sent) if at <= now - DRAIN_SECONDS else 0

    def flush(self) -> None:
        """`sent` first: a reader never finds an echo of something that was not sent."""
        for file, values in zip(self._files, (self._sent_at, self._received_at, self._numbers), strict=True):
            file.write(values.tobytes())
            file.flush()
            del values[:]

    def close(self) -> None:
        self.flush()
        for file in self._files:
            file.close()
        self._sock.close()


def _stamp(control: list[tuple[int, int, bytes]]) -> int:
    """The kernel's time of arrival; ours if it gave none."""
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
            seconds, nanoseconds = TIMESPEC.unpack_from(data)
            return seconds * 1_000_000_000 + nanoseconds
    return time.time_ns()


def _large_buffer(sock: socket.socket) -> None:
    so_rcvbufforce = 33
    try:
        sock.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, RECEIVE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


# --- heartbeats --------------------------------------------------------------------------------------


class Heartbeats:
    """What the guest says of itself a hundred times a second."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        _large_buffer(self._sock)
        self._sock.setblocking(False)
        self._sock.bind(("0.0.0.0", 0))
        self._in = bytearray(512)
        self._subscribed_at = 0.0
        self._heard_at = 0.0
        self._number: int | None = None
        self._clock = 0
        self._boot: int | None = None
        self.boots: list[int] = []
        self.heard = 0
        self.lost = 0
        self.longest_gap_ns = 0
        self.disk_acknowledged = 0
        self.memory_errors = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def keep_subscribed(self, now: float) -> None:
        """Again in good time, and whenever it has gone quiet (a guest that booted anew knows nobody)."""
        quiet = now - max(self._heard_at, self._subscribed_at) > BEAT_SILENCE_SECONDS
        if quiet or now - self._subscribed_at > RESUBSCRIBE_SECONDS:
            self._subscribed_at = now
            try:
                self._sock.sendto(b"subscribe", (self._ip, BEAT_PORT))
            except OSError:
                return

    def fetch(self, now: float, *, counted: bool) -> None:
        while True:
            try:
                size, sender = self._sock.recvfrom_into(self._in)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                continue
            if size < HEARTBEAT.size or sender[0] != self._ip:
                continue
            self._heard_at = now
            if counted:
                number, clock, boot, acknowledged, errors = HEARTBEAT.unpack_from(self._in)
                self._beat(number, clock, boot, acknowledged, errors)

    def _beat(self, number: int, clock: int, boot: int, acknowledged: int, errors: int) -> None:
        self.heard += 1
        if boot != self._boot:
            self.boots.append(boot)
        elif self._number is not None and number > self._number:
            self.lost += number - self._number - 1
            if number == self._number + 1:
                self.longest_gap_ns = max(self.longest_gap_ns, clock - self._clock)
        self._number, self._clock, self._boot = number, clock, boot
        self.disk_acknowledged = max(self.disk_acknowledged, acknowledged)
        self.memory_errors = max(self.memory_errors, errors)

    def close(self) -> None:
        self._sock.close()


# --- one long TCP session ----------------------------------------------------------------------------


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

    def tick(self, now: float, *, say: bool) -> None:
        """Call once per interval: opens, checks the timeout, says the next line."""
        if self._sock is None:
            if now >= self._reopen_at and say:
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
            self._break(_reason(error), now)

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
            self._break(_reason(error), now)

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


# --- HTTP --------------------------------------------------------------------------------------------


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
            self._end(0, b"", _reason(error))

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


# --- a server ----------------------------------------------------------------------------------------


class Stage(Enum):
    WAITING = auto()
    MEASURED = auto()
    DRAINING = auto()
    ENDED = auto()


class Subject:
    """One server under observation."""

    def __init__(self, loop: Loop, planned: PlannedServer, token: int, out: Path, bulk: select.epoll) -> None:
        self._loop = loop
        self._bulk = bulk
        self._planned = planned
        self.stage = Stage.WAITING
        self.datagrams = Datagrams(planned.ip, token, out, planned.name)
        self.beats = Heartbeats(planned.ip)
        self.lines = LineSession(loop, planned.ip)
        self._http = Exchanges(HTTP_DEADLINE_SECONDS)
        self._asked_at = planned.start if planned.start is not None else time.time()
        self._answered_at: float | None = None
        self._ended_at: float | None = None
        self._drain_until = 0.0
        self._http_answered = False
        self._http_requests = 0
        self._http_failures = 0
        self._http_slowest = 0.0
        self._http_error = ""
        self._boots: list[str] = []
        self._pages_first: int | None = None
        self._pages = 0
        self._status_samples = 0
        self._memory_errors = 0
        self._disk_errors = 0
        self._disk_acknowledged = 0
        bulk.register(self.datagrams.fileno(), select.EPOLLIN)
        bulk.register(self.beats.fileno(), select.EPOLLIN)

    # what the ticks do

    def greet(self, now: float) -> None:
        """WAITING: ask whether anybody is there; measure once all three services have answered."""
        self.datagrams.greet()
        self.lines.tick(now, say=True)
        if not self._http_answered:
            self._get("/", self._greeted)
        if self.datagrams.answered and self._http_answered and self.lines.connected:
            self.stage = Stage.MEASURED
            self.lines.counted = True
            self._answered_at = time.time()

    def say_line(self, now: float) -> None:
        if self.stage in (Stage.MEASURED, Stage.DRAINING):
            self.lines.tick(now, say=self.stage is Stage.MEASURED)

    def get_page(self) -> None:
        if self.stage is Stage.MEASURED:
            self._get("/", self._page)

    def get_status(self) -> None:
        if self.stage is Stage.MEASURED:
            self._get("/status", self._status)

    def _get(self, path: str, done: Callable[[Exchange, int, bytes, str], None]) -> None:
        self._http.add(Exchange(self._loop, (self._planned.ip, HTTP_PORT), path, done))

    def expire(self, now: float) -> None:
        self._http.tick(now)
        if self.stage in (Stage.WAITING, Stage.MEASURED):
            self.beats.keep_subscribed(now)

    def drain(self, now: float) -> None:
        if self.stage is Stage.WAITING:
            self._end()
        elif self.stage is Stage.MEASURED:
            self.stage = Stage.DRAINING
            self._drain_until = now + DRAIN_SECONDS

    def finish_drain(self, now: float) -> None:
        """The drain lasts its time, and until every request has its answer or has passed its deadline."""
        if self.stage is Stage.DRAINING and now >= self._drain_until and self._http.idle():
            self.lines.give_up()
            self._end()

    def _end(self) -> None:
        self.datagrams.fetch()
        self.lines.close()
        for channel in (self.datagrams, self.beats):
            self._bulk.unregister(channel.fileno())
            channel.close()
        self._ended_at = time.time()
        self.stage = Stage.ENDED

    # what the answers say

    def _greeted(self, exchange: Exchange, status: int, body: bytes, error: str) -> None:
        self._http_answered = self._http_answered or (status == 200 and body.startswith(b"ok"))

    def _page(self, exchange: Exchange, status: int, body: bytes, error: str) -> None:
        self._http_requests += 1
        self._http_slowest = max(self._http_slowest, time.monotonic() - exchange.began_at)
        if status != 200 or not body.startswith(b"ok "):
            self._http_failed(error or f"status {status}, {body[:40]!r}")
            return
        self._booted(body[3:].strip().decode(errors="replace"))

    def _status(self, exchange: Exchange, status: int, body: bytes, error: str) -> None:
        """A status that cannot be had is no failure of its own: the page beside it would tell."""
        if status != 200:
            return
        try:
            said = msgspec.json.decode(body, type=GuestStatus)
        except msgspec.DecodeError:
            return
        self._booted(said.boot_id)
        self._status_samples += 1
        self._pages_first = said.memory.verified_pages if self._pages_first is None else self._pages_first
        self._pages = said.memory.verified_pages
        self._memory_errors = max(self._memory_errors, said.memory.errors)
        self._disk_errors = max(self._disk_errors, said.disk.errors)
        self._disk_acknowledged = max(self._disk_acknowledged, said.disk.acknowledged)

    def _http_failed(self, error: str) -> None:
        self._http_failures += 1
        self._http_error = error

    def _booted(self, boot_id: str) -> None:
        if boot_id and boot_id not in self._boots:
            self._boots.append(boot_id)

    def summary(self) -> ServerProbe:
        d, beats, lines = self.datagrams, self.beats, self.lines
        reboots = max(len(self._boots), len(beats.boots), 1) - 1
        return ServerProbe(
            name=self._planned.name,
            ip=self._planned.ip,
            asked_at=self._asked_at,
            answered_at=self._answered_at,
            ended_at=self._ended_at,
            packets_sent=d.sent,
            packets_received=d.received,
            packets_lost=d.lost(final=self.stage is Stage.ENDED),
            packets_duplicated=d.duplicated,
            packets_reordered=d.reordered,
            longest_gap_ms=round(d.longest_gap_ns / 1e6, 3),
            longest_send_gap_ms=round(d.longest_send_gap_ns / 1e6, 3),
            silence_ms=round(d.silence_ms(), 3) if self.stage is Stage.MEASURED else 0.0,
            longest_answer_ms=round(d.longest_answer_ns / 1e6, 3),
            tcp_lines=lines.lines,
            tcp_sessions=lines.sessions,
            tcp_sessions_broken=lines.broken,
            tcp_longest_stall_ms=round(lines.longest_stall * 1e3, 3),
            tcp_error=lines.error,
            http_requests=self._http_requests,
            http_failures=self._http_failures,
            http_slowest_ms=round(self._http_slowest * 1e3, 3),
            http_error=self._http_error,
            heartbeats=beats.heard,
            heartbeats_lost=beats.lost,
            guest_longest_gap_ms=round(beats.longest_gap_ns / 1e6, 3),
            reboots=reboots,
            boots=tuple(self._boots),
            disk_acknowledged=max(beats.disk_acknowledged, self._disk_acknowledged),
            disk_errors=self._disk_errors,
            memory_pages_verified=max(0, self._pages - (self._pages_first or 0)),
            memory_errors=max(beats.memory_errors, self._memory_errors),
            status_samples=self._status_samples,
        )


class GuestMemory(Value, frozen=True, kw_only=True):
    verified_pages: int = 0
    errors: int = 0


class GuestDisk(Value, frozen=True, kw_only=True):
    acknowledged: int = 0
    errors: int = 0


class GuestStatus(Value, frozen=True, kw_only=True):
    """The part of the guest's /status that is looked at."""

    boot_id: str
    memory: GuestMemory
    disk: GuestDisk


# --- the operator API --------------------------------------------------------------------------------


class ApiWatch:
    """Asks the operator API, each path in turn, on a new connection each time. Counted from its first
    answer on; whatever is no answer with 200 is an error."""

    def __init__(self, loop: Loop, path: str) -> None:
        self._loop = loop
        self._address = path
        self._exchanges = Exchanges(HTTP_DEADLINE_SECONDS)
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


# --- the whole ---------------------------------------------------------------------------------------


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


class Prober:
    def __init__(self, plan_path: Path, out: Path) -> None:
        self._plan_path = plan_path
        self._out = out
        self._plan = decode_plan(plan_path.read_bytes())
        self._plan_seen: tuple[int, int, int] = (0, 0, 0)
        self._token = int.from_bytes(os.urandom(8), "little")
        self._loop = Loop()
        self._bulk = select.epoll()
        self._subjects: dict[str, Subject] = {}
        self._api: ApiWatch | None = None
        self._started_at = time.time()
        self._scheduling = _run_when_due()
        self._stopping = False
        self._clock = (out / "clock").open("wb")
        self._grid()

    def stop(self) -> None:
        self._stopping = True

    def run(self) -> None:
        """Until `stop`, then through the drain."""
        state = "running"
        next_tick = time.monotonic()
        while True:
            now = time.monotonic()
            if state == "running":
                self._measure(now)
            if self._stopping and state == "running":
                state = "draining"
                for subject in self._subjects.values():
                    subject.drain(now)
            self._listen(now)
            if self._every_second.due(now):
                self._write(state)
            if state == "draining" and self._ended():
                break
            next_tick = max(next_tick + self._tick, time.monotonic())
            time.sleep(max(0.0, next_tick - time.monotonic()))
        self._write("final")

    def _grid(self) -> None:
        self._tick = 1.0 / self._plan.udp_pps
        self._fetch = Every(FETCH_SECONDS)
        self._greet = Every(GREET_SECONDS)
        self._line = Every(self._plan.tcp_interval)
        self._page = Every(self._plan.http_interval)
        self._status = Every(STATUS_SECONDS)
        self._ask = Every(API_SECONDS)
        self._expire = Every(0.1)
        self._reread = Every(0.2)
        self._every_second = Every(1.0)

    def _measure(self, now: float) -> None:
        subjects = self._subjects.values()
        for subject in subjects:
            if subject.stage is Stage.MEASURED:
                subject.datagrams.send()
        if self._reread.due(now):
            self._follow_plan(now)
        if self._page.due(now):
            for subject in subjects:
                subject.get_page()
        if self._status.due(now):
            for subject in subjects:
                subject.get_status()
        if self._api is not None and self._ask.due(now):
            self._api.ask()
        if self._greet.due(now):
            for subject in subjects:
                if subject.stage is Stage.WAITING:
                    subject.greet(now)

    def _listen(self, now: float) -> None:
        self._loop.turn()
        subjects = self._subjects.values()
        if self._line.due(now):
            for subject in subjects:
                subject.say_line(now)
        if self._fetch.due(now) and self._bulk.poll(0):
            for subject in subjects:
                if subject.stage is not Stage.ENDED:
                    subject.datagrams.fetch()
                    subject.beats.fetch(now, counted=subject.stage is not Stage.WAITING)
        if self._expire.due(now):
            for subject in subjects:
                subject.expire(now)
                subject.finish_drain(now)
            if self._api is not None:
                self._api.expire(now)

    def _ended(self) -> bool:
        quiet = self._api is None or self._api.idle()
        return quiet and all(s.stage is Stage.ENDED for s in self._subjects.values())

    def _follow_plan(self, now: float) -> None:
        """A plan that cannot be read changes nothing: the last good one stays."""
        try:
            found = self._plan_path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen == self._plan_seen:
                return
            plan = decode_plan(self._plan_path.read_bytes())
        except (OSError, Error) as error:
            print(f"plan not taken up: {error}", file=sys.stderr, flush=True)
            return
        self._plan_seen, self._plan = seen, plan
        wanted = {s.name: s for s in plan.servers}
        for name, subject in self._subjects.items():
            if name not in wanted:
                subject.drain(now)
        for name, planned in wanted.items():
            if name not in self._subjects:
                self._subjects[name] = Subject(self._loop, planned, self._token, self._out, self._bulk)
        if plan.api_socket and self._api is None:
            self._api = ApiWatch(self._loop, plan.api_socket)

    def _write(self, state: str) -> None:
        for subject in self._subjects.values():
            if subject.stage is not Stage.ENDED:
                subject.datagrams.flush()
        self._clock.write(struct.pack("<qq", time.monotonic_ns(), time.time_ns()))
        self._clock.flush()
        now = time.time()
        spent = time.process_time() / max(1e-9, now - self._started_at)
        summary = ProbeSummary(
            state=state,
            started_at=self._started_at,
            updated_at=now,
            packets_per_second=self._plan.udp_pps,
            scheduling=self._scheduling,
            cpu_share=round(spent, 4),
            servers=tuple(s.summary() for s in self._subjects.values()),
            api=self._api.summary() if self._api is not None else None,
        )
        path = self._out / SUMMARY_NAME
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(summary))
        partial.replace(path)


def _run_when_due() -> str:
    """A probe that waits for a core measures the core. Ask for the best that is allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, -10)
        except OSError:
            return "normal"
        return "nice -10"
    return "real-time"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nahtlos.lab.probe", description="Measure servers from outside.")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        prober = Prober(options.plan, out)
    except (OSError, Error) as error:
        print(json.dumps({"error": str(error)}), file=sys.stderr)
        return 2

    def stop(number: int, frame: FrameType | None) -> None:
        prober.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    gc.freeze()
    gc.disable()
    prober.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
