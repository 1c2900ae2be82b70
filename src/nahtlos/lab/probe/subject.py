"""One server under observation: its stages, and what its answers add up to."""

import select
import time
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path

import msgspec

from nahtlos.lab.probe.datagrams import Datagrams
from nahtlos.lab.probe.exchanges import DEADLINE_SECONDS, Exchange, Exchanges
from nahtlos.lab.probe.heartbeats import Heartbeats
from nahtlos.lab.probe.lines import LineSession
from nahtlos.lab.probe.loop import Loop
from nahtlos.lab.probe.plan import PlannedServer
from nahtlos.model.values import Value
from nahtlos.runtime.evidence.records import DRAIN_SECONDS, ServerProbe

HTTP_PORT = 80


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
        self._http = Exchanges(DEADLINE_SECONDS)
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
        self._pages_seen: int | None = None
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
        self.lines.tick(now, reopen=True, say=False)
        if not self._http_answered:
            self._get("/", self._greeted)
        if self.datagrams.answered and self._http_answered and self.lines.connected:
            self.stage = Stage.MEASURED
            self.lines.counted = True
            self._answered_at = time.time()

    def say_line(self, now: float) -> None:
        if self.stage in (Stage.MEASURED, Stage.DRAINING):
            measured = self.stage is Stage.MEASURED
            self.lines.tick(now, reopen=measured, say=measured)

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
        self._count_pages(said.memory.verified_pages)
        self._memory_errors = max(self._memory_errors, said.memory.errors)
        self._disk_errors = max(self._disk_errors, said.disk.errors)
        self._disk_acknowledged = max(self._disk_acknowledged, said.disk.acknowledged)

    def _count_pages(self, counter: int) -> None:
        """What was verified since the first look; the guest's counter may begin anew."""
        if self._pages_seen is not None and counter > self._pages_seen:
            self._pages += counter - self._pages_seen
        self._pages_seen = counter

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
            memory_pages_verified=self._pages,
            memory_errors=max(beats.memory_errors, self._memory_errors),
            status_samples=self._status_samples,
        )
