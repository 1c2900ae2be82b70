"""What frames of the simulated network are, where they wait, and what became of them."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nahtlos.model.ids import HostId, PortId
from nahtlos.physical.sim.firewalls import Connection

INTERVAL = 0.01
"""Seconds between two frames of the flow from outside."""
RING = 10_000
"""Frames a tap's ring holds (txqueuelen)."""
YOUNG = 4
"""Connections that were opened by the last changes and still send."""


class Attached(Protocol):
    """What a tap sees of the VMM that holds it."""

    @property
    def running(self) -> bool: ...

    @property
    def receiving(self) -> bool:
        """It has not run its guest yet; a frame it takes is spoiled."""
        ...


@dataclass(eq=False)
class Flow:
    """Numbered frames from one place to one port."""

    mac: str
    origin: HostId
    steady: bool
    """Sent all the time, not only around changes."""
    next_at: float
    connection: Connection
    """The one that lasts."""
    sent: int = 0
    delivered: int = 0
    reordered: int = 0
    lost: dict[str, int] = field(default_factory=dict[str, int])
    """By reason."""
    lost_first: tuple[float, str] | None = None
    turned_away: int = 0
    """Frames of connections that the new host could not know yet, while nothing ran there. Not lost by a
    mistake: their senders send them again."""
    last_seq: int = 0
    last_at: float = 0.0
    longest_gap: float = 0.0

    def arrived(self, seq: int, at: float, count: int = 1) -> None:
        self.delivered += count
        if seq < self.last_seq:
            self.reordered += 1
        self.last_seq = max(self.last_seq, seq + count - 1)
        if self.delivered > count:
            self.longest_gap = max(self.longest_gap, at - self.last_at)
        self.last_at = max(self.last_at, at)

    def lose(self, why: str, at: float, count: int = 1) -> None:
        self.lost[why] = self.lost.get(why, 0) + count
        if self.lost_first is None:
            self.lost_first = (at, why)


@dataclass(frozen=True)
class Frame:
    flow: Flow | None
    """None: the dummy nobody misses."""
    seq: int
    at: float
    """When it came to the tap."""
    connection: Connection | None = None
    opens: bool = False
    """The first of its connection."""

    def lose(self, why: str, at: float) -> None:
        if self.flow:
            self.flow.lose(why, at)


@dataclass(eq=False)
class Tap:
    port: PortId
    mac: str
    host: HostId
    delay: float
    """Seconds a running guest takes to fetch a frame from the ring."""
    ring: deque[Frame] = field(default_factory=deque[Frame])
    vmm: Attached | None = None
    swallowed: Frame | None = None
    """A VMM that does not run takes one frame and keeps it."""
    spoiled: bool = False
    running_since: float = 0.0
    dropped: int = 0
    received: int = 0
    sent: int = 0
    """Answers to what it was handed."""

    @property
    def held(self) -> tuple[Frame, ...]:
        return (*((self.swallowed,) if self.swallowed else ()), *self.ring)

    def put(self, frame: Frame) -> None:
        self.received += 1
        if len(self.ring) >= RING:
            self.dropped += 1
            frame.lose("ring full", frame.at)
            return
        self.ring.append(frame)
        self.absorb()

    def absorb(self) -> None:
        if self.vmm and not self.vmm.running and self.swallowed is None and self.ring:
            self.swallowed = self.ring.popleft()
            self.spoiled = self.vmm.receiving

    def drain(self, now: float) -> None:
        """Hand the guest what it has had time to fetch."""
        if not (self.vmm and self.vmm.running):
            return
        while self.ring and max(self.ring[0].at, self.running_since) + self.delay <= now:
            frame = self.ring.popleft()
            self.sent += 1
            if frame.flow:
                frame.flow.arrived(frame.seq, max(frame.at, self.running_since) + self.delay)

    def runs(self, now: float) -> None:
        """The guest was let run: what its VMM holds reaches it, unless it was spoiled on arrival."""
        self.running_since = now
        if self.swallowed and self.swallowed.flow:
            if self.spoiled:
                self.swallowed.flow.lose("spoiled by a VMM that was receiving", now)
            else:
                self.swallowed.flow.arrived(self.swallowed.seq, now)
        self.swallowed = None
        self.spoiled = False

    def detached(self, now: float) -> None:
        """The VMM ended; the ring stays with the tap."""
        if self.swallowed:
            self.swallowed.lose("held by a VMM that ended", now)
        self.vmm, self.swallowed, self.spoiled = None, None, False

    def discard(self, why: str, now: float) -> None:
        for frame in self.ring:
            frame.lose(why, now)
        self.ring.clear()


TO_TUNNEL = "tunnel"


@dataclass(eq=False)
class Switchboard:
    """One host's forwarding state. `entries[mac]` is a port's id, or TO_TUNNEL."""

    host: HostId
    address: str
    up: bool = True
    entries: dict[str, str] = field(default_factory=dict[str, str])
    tunnels: dict[str, str] = field(default_factory=dict[str, str])
    """Where the tunnel device sends frames for a MAC."""
    gates: set[str] = field(default_factory=set[str])
    """MACs whose frames may come in by the tunnel and leave by it again."""
    taps: dict[PortId, Tap] = field(default_factory=dict[PortId, Tap])
    spares: dict[PortId, Tap] = field(default_factory=dict[PortId, Tap])
    """Queues of the next VMM of a port, or of the one before: no frame comes to them."""
    switched: set[PortId] = field(default_factory=set[PortId])
    """Ports whose `taps` entry is the next VMM's already."""

    @property
    def rings(self) -> "tuple[Tap, ...]":
        return (*self.taps.values(), *self.spares.values())


def lost(flows: Iterable[Flow]) -> int:
    return sum(sum(f.lost.values()) for f in flows)


def waiting(boards: Mapping[HostId, Switchboard], mac: str) -> int:
    """Frames for `mac` in rings."""
    return sum(len(t.ring) for b in boards.values() for t in b.rings if t.mac == mac)
