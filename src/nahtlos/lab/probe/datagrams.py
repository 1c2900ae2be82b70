"""Numbered datagrams to a server's echo port, and when each came back.

Owns the three arrays of `runtime.evidence.records`. Never decides what is lost before the drain is over."""

import errno
import socket
import struct
import time
from array import array
from collections import deque
from pathlib import Path

from nahtlos.runtime.evidence.records import DRAIN_SECONDS

DATAGRAM = struct.Struct("<8sQI")
DATAGRAM_SIZE = 64
TIMESPEC = struct.Struct("@qq")
SO_TIMESTAMPNS = 35
"""From asm-generic/socket.h; Python does not name it. Also the type of the control message."""
SO_RCVBUFFORCE = 33

MAGIC = b"nahtlos1"
GREETING = 0xFFFFFFFF
"""The number of datagrams that only ask whether anybody is there."""
ECHO_PORT = 7
RECEIVE_BUFFER = 4 << 20


class Datagrams:
    """Numbered datagrams to the echo port, and when each came back.

    What is in memory for the whole run is one byte a datagram; times go to files every second."""

    def __init__(self, ip: str, token: int, out: Path, name: str) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        large_buffer(self._sock)
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


def large_buffer(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
