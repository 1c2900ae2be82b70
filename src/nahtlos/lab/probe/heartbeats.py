"""What a guest says of itself fifty times a second, once it has been asked to."""

import socket
import struct

from nahtlos.lab.probe.datagrams import large_buffer

HEARTBEAT = struct.Struct("<QQQQQ")
BEAT_PORT = 9
RESUBSCRIBE_SECONDS = 120.0
BEAT_SILENCE_SECONDS = 2.0


class Heartbeats:
    """What the guest says of itself fifty times a second."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        large_buffer(self._sock)
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
