"""Servers as the simulated world knows them: the guest in a VMM, the VMM, the stream between two VMMs.

Owns what a real QEMU would do when told, including what must never be asked of it. Never refuses a fatal
request for safety's sake: it does it, and the world writes down what was broken.

    VMM      STARTING -> RUNNING <-> PAUSED        INCOMING -(arrived)-> PAUSED        any -> CRASHED
    stream   ACTIVE -(source paused, rest sent)-> COMPLETED | FAILED | CANCELLED
             ACTIVE -(source paused, by post-copy)-> POST_COPY <-> CUT     POST_COPY -> COMPLETED
                                                     any -(source ended)-> FAILED
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nahtlos.model.config import ServerConfig
from nahtlos.model.ids import HostId, ReleaseId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import CpuShare, ServerSpec
from nahtlos.physical.ports import DiskProblem, MigrationPhase, MigrationProgress, Missing, VmmId
from nahtlos.physical.sim.taps import Tap

SHORTEST_PASS = 0.001
"""Seconds one pass over the dirty bitmap takes at least; a held source spins."""
THROTTLE_STEP, THROTTLE_MOST = 0.1, 0.8
"""Shares of its processors that a guest which may be slowed down loses with every pass, and at most."""
FINISH_SECONDS = 0.003
"""From the last byte to the destination's `completed`."""
NOTICE_SECONDS = 0.03
"""Until a source notices that its destination is gone."""
LINK_BYTES_PER_SECOND = 1 << 30
TOUCHED = 0.25
"""Share of its memory a guest has touched: the first pass sends that."""


@dataclass
class Guest:
    """A server's memory. A move copies it; whatever runs the older copy afterwards is a second server."""

    boot: int
    writes: dict[VolumeId, int] = field(default_factory=dict[VolumeId, int])
    """Writes to each volume that this memory knows of."""
    frozen: bool = False
    """Its agent was told to freeze its file systems: it writes nothing."""
    behind: float = 0.0
    """Seconds its clock has stood still."""

    def copied(self) -> "Guest":
        return replace(self, writes=dict(self.writes))


@dataclass(eq=False)
class Given:
    """What a VMM has of its host."""

    vcpus: int
    memory_mib: int
    cpu: CpuShare
    asked_mib: int = 0
    asked_at: float = 0.0
    held_at: float = 0.0
    """When its guest will have given back what was asked."""
    took_ms: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self.asked_mib = self.asked_mib or self.memory_mib

    def take_over(self, of: "Given") -> None:
        """The guest has what it had; the share is the new machine's own."""
        self.memory_mib, self.asked_mib, self.held_at = of.memory_mib, of.asked_mib, of.held_at
        self.asked_at = of.asked_at

    @classmethod
    def of(cls, spec: ServerSpec) -> "Given":
        """A machine that begins."""
        return cls(vcpus=spec.size.vcpus, memory_mib=spec.size.memory_mib, cpu=spec.cpu)


@dataclass(eq=False)
class Vmm:
    id: VmmId
    host: HostId
    server: ServerConfig
    release: ReleaseId
    state: RunState
    pid: int
    taps: list[Tap]
    dirty_rate: int
    """Bytes a second the guest dirties."""
    given: Given
    in_place: bool = False
    """It receives a server of its own host, whose memory it shares."""
    leased: bool = False
    """Its supervisor ends it when the host's lease runs out."""
    guest: Guest | None = None
    """None while a destination has not received it."""
    uri: str | None = None
    migrated: bool = False
    sent: bool = False
    has_run: bool = False
    refused: str = ""
    """Why nothing will ever arrive in it."""
    stream: "Stream | None" = None
    """The newest one it sends (source)."""
    follows: "Stream | None" = None
    """The one by which memory follows, or was to, that it ran without."""
    arrival: asyncio.Event = field(default_factory=asyncio.Event)
    """Something was decided about what arrives: it came, or it never will."""
    saved: bool = False
    """What it remembers was written out, whole."""
    disk_problems: tuple[DiskProblem, ...] = ()
    """Why its disks have stopped it."""

    @property
    def running(self) -> bool:
        return self.state is RunState.RUNNING

    @property
    def receiving(self) -> bool:
        return not self.has_run

    @property
    def ended(self) -> bool:
        return self.state is RunState.CRASHED

    @property
    def missing(self) -> Missing:
        if self.follows is None or self.follows.phase is MigrationPhase.COMPLETED:
            return Missing.NOTHING
        return Missing.COMING if self.follows.phase is MigrationPhase.POST_COPY else Missing.CUT

    @property
    def waits_for_a_page(self) -> bool:
        """It has not run, and the memory that takes does not come."""
        if self.follows is None or self.missing is Missing.NOTHING or self.state is not RunState.PAUSED:
            return False
        return self.missing is Missing.CUT or self.follows.stalled

    @property
    def memory_bytes(self) -> int:
        return self.server.spec.size.memory_mib << 20


class Stream:
    """Pre-copy from `source` to `destination` (None: to somebody who writes it down), in virtual time. With
    switchover-ack withheld it goes round until the source is paused; the rest is sent then, and it ends."""

    def __init__(
        self,
        source: Vmm,
        destination: Vmm | None,
        rate: int,
        now: Callable[[], float],
        done: Callable[["Stream"], None],
    ) -> None:
        self.source = source
        self.destination = destination
        self.phase = MigrationPhase.ACTIVE
        self.error = ""
        self.rate = _bounded(rate)
        self.may_slow_down = False
        self.may_post_copy = False
        self.post_copy = False
        self.flowed_at = now()
        """When the last byte came of what follows."""
        self._slows_down = False
        self._throttle = 0.0
        self.stalled = False
        self.broken = False
        self.taken: tuple[bytes, ...] = ()
        """What somebody who writes it down has got."""
        self._now = now
        self._done = done
        self._at = now()
        self._touched = 0.0 if destination and destination.in_place else source.memory_bytes * TOUCHED
        self._remaining = self._touched
        self._transferred = 0.0
        self._passes = 1
        self._pass_seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def hosts(self) -> frozenset[HostId]:
        there = self.destination or self.source
        return frozenset((self.source.host, there.host))

    @property
    def followed(self) -> bool:
        """The server is at the destination, and its memory follows by this."""
        return self.destination is not None and self.destination.follows is self

    @property
    def without_destination(self) -> bool:
        """The VMM it went to has ended, or there never was one."""
        return self.destination is None or self.destination.ended

    def progress(self) -> MigrationProgress:
        self.advance()
        return MigrationProgress(
            phase=self.phase,
            remaining=int(self._remaining),
            total=self.source.memory_bytes,
            transferred=int(self._transferred),
            passes=self._passes,
            error=self.error,
        )

    def advance(self) -> None:
        """Let the stream flow up to now."""
        now = self._now()
        seconds, self._at = now - self._at, now
        if self.stalled or self.broken or not self.open or self.phase is MigrationPhase.CUT:
            return
        self.flowed_at = now
        while seconds > 0 and self.source.running:
            takes = max(self._remaining / self.rate, SHORTEST_PASS - self._pass_seconds)
            self._send(min(seconds, takes))
            if seconds >= takes:
                self._next_pass()
            seconds -= takes
        if seconds > 0:
            self._send(seconds)

    def _send(self, seconds: float) -> None:
        sent = min(self._remaining, seconds * self.rate)
        self._transferred += sent
        self._remaining -= sent
        self._pass_seconds += seconds

    def _next_pass(self) -> None:
        rate = self.source.dirty_rate * (1 - self._throttle)
        self._remaining = min(self._pass_seconds * rate, self._touched)
        if self._slows_down:
            self._throttle = min(self._throttle + THROTTLE_STEP, THROTTLE_MOST)
        self._passes += 1
        self._pass_seconds = 0.0

    @property
    def open(self) -> bool:
        return self.phase in (MigrationPhase.ACTIVE, MigrationPhase.POST_COPY, MigrationPhase.CUT)

    def source_paused(self) -> None:
        """The CPUs stand still: once the rest is sent, it is complete. By post-copy the destination may run
        before that."""
        self._stop_timer()
        self.advance()
        flows = self.phase in (MigrationPhase.ACTIVE, MigrationPhase.POST_COPY)
        if not flows or self.broken or self.stalled or self.source.running:
            return
        loop, seconds = asyncio.get_running_loop(), self._remaining / self.rate
        if self.post_copy and self._remaining and self.phase is MigrationPhase.ACTIVE:
            self._timer = loop.call_later(FINISH_SECONDS, self._hand_over)
        else:
            self._timer = loop.call_later(seconds + FINISH_SECONDS, self._complete)

    def _hand_over(self) -> None:
        if self.phase is MigrationPhase.ACTIVE and not self.source.running and not self.broken:
            self.phase = MigrationPhase.POST_COPY
            self._done(self)
            self.source_paused()

    def cut(self) -> None:
        """In post-copy nothing is lost by that, for a while."""
        self._stop_timer()
        self.advance()
        self.phase = MigrationPhase.CUT

    def recover(self) -> None:
        self.phase, self.broken, self._at = MigrationPhase.POST_COPY, False, self._now()
        self.source_paused()

    def pace(self, rate: int) -> None:
        self.advance()
        self.rate = _bounded(rate)
        self.source_paused()

    def slow_down(self) -> None:
        self.advance()
        self._slows_down = self.may_slow_down

    def source_runs(self) -> None:
        self._stop_timer()
        self.advance()

    def stall(self, *, on: bool) -> None:
        self.advance()
        self.stalled = on
        self.source_paused()

    def destination_gone(self) -> None:
        self.breaks("the destination closed the connection")

    def breaks(self, why: str) -> None:
        """Its source notices that a moment later."""
        if self.open:
            self.advance()
            self.broken = True
            self._stop_timer()
            self._timer = asyncio.get_running_loop().call_later(NOTICE_SECONDS, self.fail, why)

    def fail(self, why: str) -> None:
        if self.phase is MigrationPhase.ACTIVE:
            self._end(MigrationPhase.FAILED, why)
        elif self.open:
            self.cut()

    def source_ended(self) -> None:
        self._end(MigrationPhase.FAILED, "the source ended")

    def cancel(self) -> None:
        if self.phase is MigrationPhase.ACTIVE:
            self._end(MigrationPhase.CANCELLED, "")

    def _end(self, phase: MigrationPhase, why: str) -> None:
        if self.open:
            self.advance()
            self._stop_timer()
            self.phase, self.error = phase, why
            self._done(self)

    def _complete(self) -> None:
        flows = self.phase in (MigrationPhase.ACTIVE, MigrationPhase.POST_COPY)
        if flows and not self.source.running and not self.broken:
            self._transferred += self._remaining
            self._remaining = 0.0
            self.phase = MigrationPhase.COMPLETED
            self._done(self)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def why_not_loaded(source: Vmm, destination: Vmm) -> str:
    """What a destination refuses as soon as the stream begins; empty if it loads."""
    old, new = source.server.spec, destination.server.spec
    if old.machine != new.machine:
        return f"machine type received is {old.machine}, local is {new.machine}"
    sizes = [spec.boot_memory_mib or spec.size.memory_mib for spec in (old, new)]
    return "" if sizes[0] == sizes[1] else f"size mismatch: {sizes[0]} MiB received, {sizes[1]} local"


def _bounded(rate: int) -> float:
    return float(max(1, min(rate, LINK_BYTES_PER_SECOND)))
