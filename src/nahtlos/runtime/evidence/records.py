"""What the probes write down and how it is read back: the only source of a report's figures.

A probe's folder holds `probe.json` (counts, rewritten every second and final after a drain) and, for each
server, three arrays of native integers without headers:

    <server>.sent             i64: CLOCK_REALTIME ns at which datagram n left, n = 0, 1, 2 ...
    <server>.received         i64: CLOCK_REALTIME ns at which the kernel took an echo in, in order of arrival
    <server>.received-number  u32: the number that echo carried

A probe may be killed between any two writes: arrays are cut to what is complete on both sides.
This module counts and reads; it never decides whether a promise was kept.
"""

import bisect
from array import array
from pathlib import Path

import msgspec

from nahtlos.model.values import Value

SUMMARY_NAME = "probe.json"
DRAIN_SECONDS = 3.0
"""A datagram is lost only if it has not come back this long after the last one was sent."""


class ServerProbe(Value, frozen=True, kw_only=True):
    """Counts of one server, seen from outside. Milliseconds and wall-clock seconds."""

    name: str
    ip: str
    asked_at: float
    """When it was asked for (the plan's `start`), or when the probe first heard of it."""
    answered_at: float | None = None
    """First answer on every service; nothing is counted before."""
    ended_at: float | None = None

    packets_sent: int = 0
    packets_received: int = 0
    """Distinct numbers that came back."""
    packets_lost: int = 0
    """While the probe runs: those out for longer than the drain."""
    packets_duplicated: int = 0
    packets_reordered: int = 0
    longest_gap_ms: float = 0.0
    longest_send_gap_ms: float = 0.0
    """Longest time in which the probe itself sent nothing: a gap is no more exact than this."""
    silence_ms: float = 0.0
    """Since the last echo, now."""
    longest_answer_ms: float = 0.0

    tcp_lines: int = 0
    tcp_sessions: int = 0
    tcp_sessions_broken: int = 0
    tcp_longest_stall_ms: float = 0.0
    tcp_error: str = ""
    """The last one."""

    http_requests: int = 0
    http_failures: int = 0
    http_slowest_ms: float = 0.0
    http_error: str = ""

    heartbeats: int = 0
    heartbeats_lost: int = 0
    guest_longest_gap_ms: float = 0.0
    """Longest time between two ticks on the guest's own clock."""
    reboots: int = 0
    boots: tuple[str, ...] = ()
    """Boot ids in the order seen."""

    disk_acknowledged: int = 0
    """Blocks the guest last said were on the disk."""
    disk_errors: int = 0
    memory_pages_verified: int = 0
    """Between the first and the last look at it."""
    memory_errors: int = 0
    status_samples: int = 0


class ApiProbe(Value, frozen=True, kw_only=True):
    """The operator API, asked all the time."""

    requests: int = 0
    errors: int = 0
    slowest_ms: float = 0.0
    error: str = ""
    """The last one."""
    errors_at: tuple[float, ...] = ()
    """Wall-clock seconds of the first hundred."""


class ProbeSummary(Value, frozen=True, kw_only=True):
    state: str
    """`running`, `draining`, `final`"""
    started_at: float
    updated_at: float
    packets_per_second: int
    scheduling: str
    """How the probe made sure that it runs when it must: `real-time`, `nice -10`, `normal`."""
    cpu_share: float = 0.0
    """Of one core, all told."""
    servers: tuple[ServerProbe, ...] = ()
    api: ApiProbe | None = None


class DiskCheck(Value, frozen=True, kw_only=True):
    """Blocks the guest acknowledged, looked for in the volume itself."""

    server: str
    acknowledged: int
    found: int
    lost: int
    """Acknowledged, but missing or older than acknowledged."""
    wrong: int
    """There, but not what was written."""
    first_bad: int | None = None


class Arrivals(msgspec.Struct, frozen=True):
    """Datagrams of one server. `received_at` is in order of arrival and may step back by the little that
    two cores disagree."""

    sent_at: "array[int]"
    received_at: "array[int]"
    numbers: "array[int]"

    @classmethod
    def empty(cls) -> "Arrivals":
        return cls(array("q"), array("q"), array("I"))

    def sorted_times(self) -> list[float]:
        """Arrival times in seconds, rising."""
        return sorted(t / 1e9 for t in self.received_at)


class Counted(Value, frozen=True, kw_only=True):
    sent: int
    received: int
    lost: int
    duplicated: int
    reordered: int


class ProbeRecords(msgspec.Struct, frozen=True):
    summary: ProbeSummary
    arrivals: dict[str, Arrivals]


def count(arrivals: Arrivals, *, complete: bool) -> Counted:
    """Exact counts. If the probe was cut off (`complete` false), datagrams younger than the drain at
    its last sign of life are left out: whether they came back is not known."""
    sent = _judged(arrivals, complete=complete)
    seen = bytearray(sent)
    duplicated = reordered = 0
    highest = -1
    for number in arrivals.numbers:
        if number < highest:
            reordered += 1
        highest = max(highest, number)
        if number >= sent:
            continue
        if seen[number]:
            duplicated += 1
        seen[number] = 1
    received = seen.count(1)
    return Counted(
        sent=sent, received=received, lost=sent - received, duplicated=duplicated, reordered=reordered
    )


def lost_at(arrivals: Arrivals, *, complete: bool) -> list[float]:
    """When each lost datagram had been sent, in seconds."""
    back = set(arrivals.numbers)
    judged = _judged(arrivals, complete=complete)
    if len(back) >= len(arrivals.sent_at):
        return []
    return [arrivals.sent_at[n] / 1e9 for n in range(judged) if n not in back]


def _judged(arrivals: Arrivals, *, complete: bool) -> int:
    """How many datagrams, from the first on, can be said to be back or lost."""
    sent = len(arrivals.sent_at)
    if complete or not sent:
        return sent
    last = max(arrivals.sent_at[-1], max(arrivals.received_at, default=0))
    return bisect.bisect_right(arrivals.sent_at, last - int(DRAIN_SECONDS * 1e9))


def read_probe(folder: Path) -> ProbeRecords:
    """What a probe left in `folder`, whether it ended in order or not."""
    summary = msgspec.json.decode((folder / SUMMARY_NAME).read_bytes(), type=ProbeSummary)
    return ProbeRecords(summary, {s.name: _read_arrivals(folder, s.name) for s in summary.servers})


def _read_arrivals(folder: Path, name: str) -> Arrivals:
    sent = _read_array(folder / f"{name}.sent", "q")
    received = _read_array(folder / f"{name}.received", "q")
    numbers = _read_array(folder / f"{name}.received-number", "I")
    whole = min(len(received), len(numbers))
    return Arrivals(sent, received[:whole], numbers[:whole])


def _read_array(path: Path, code: str) -> "array[int]":
    values: array[int] = array(code)
    data = path.read_bytes() if path.exists() else b""
    values.frombytes(data[: len(data) - len(data) % values.itemsize])
    return values
