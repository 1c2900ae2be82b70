"""The one thread: what is due in a tick is sent, what has come is taken, and every second it is written."""

import os
import select
import struct
import sys
import time
from pathlib import Path

import msgspec

from nahtlos.lab.probe.exchanges import ApiWatch
from nahtlos.lab.probe.loop import Every, Loop
from nahtlos.lab.probe.plan import decode_plan, paces
from nahtlos.lab.probe.subject import Stage, Subject
from nahtlos.model.errors import Error
from nahtlos.runtime.evidence.records import SUMMARY_NAME, ProbeSummary

FETCH_SECONDS = 0.02
GREET_SECONDS = 0.25
STATUS_SECONDS = 1.0
API_SECONDS = 0.1


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
        before, self._plan_seen, self._plan = self._plan, seen, plan
        if paces(plan) != paces(before):
            self._grid()
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
