"""The data path of the simulated data centre: taps, forwarding entries, gates, and the packets that show
whether they are right.

Owns the fate of every frame: delivered, waiting in a ring, or lost and why. Never decides where a path
should lead; the network driver does, on behalf of an agent.

Frames are counted lazily: a steady flow from outside (one frame every `INTERVAL`) is accounted for when
something on its path changes, as if each frame had been sent in its time. In addition every change is
preceded by one frame from every host that knows the port, sent in the last instant of the old state: a
state in which a frame would be lost is found in every run, not only in unlucky ones.

    frame -> FDB of the sender's host -> tunnel -> [gate] -> FDB there -> firewall -> tap -> ring -> guest

Before the tap of a port with security groups stands a firewall that is strict: a connection's first frame is
let in and remembered where it passes; what comes later is let in only where that is remembered. Every change
is therefore accompanied by a new connection, and by a frame of each that is still young, beside the one that
lasts. What cannot be had is told apart: a connection that was opened in the moment in which its server
leaves is known at the old host only until the server stops (`turned_away`).
"""

from collections import deque
from collections.abc import Callable

from nahtlos.model.ids import HostId, PortId
from nahtlos.physical.sim.firewalls import TURNED_AWAY, Connection, Firewalls
from nahtlos.physical.sim.taps import INTERVAL, TO_TUNNEL, YOUNG, Flow, Frame, Switchboard, Tap

MAX_HOPS = 8


class Paths:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.boards: dict[HostId, Switchboard] = {}
        self._by_address: dict[str, Switchboard] = {}
        self.flows: dict[tuple[str, HostId], Flow] = {}
        self._steady: dict[str, Flow] = {}
        self.firewalls = Firewalls()
        self._young: dict[str, deque[Connection]] = {}
        self._ending: dict[str, list[Connection]] = {}

    def add(self, board: Switchboard) -> None:
        self.boards[board.host] = board
        self._by_address[board.address] = board

    def open_flow(self, mac: str, origin: HostId) -> None:
        """The server answers: from now on frames for it are sent from `origin`, and all are counted."""
        if mac not in self._steady:
            connection = self.firewalls.begin(origin)
            flow = Flow(mac=mac, origin=origin, steady=True, next_at=self._now(), connection=connection)
            self._steady[mac] = flow
            self.flows[mac, origin] = flow

    def close_flow(self, mac: str) -> None:
        """Nobody sends any more."""
        self.touch(mac)
        self._steady.pop(mac, None)

    # --- change ---

    def touch(self, mac: str, *, probe: bool = True) -> None:
        """Account for everything sent so far. Call before any change on the path to `mac`."""
        flow = self._steady.get(mac)
        if flow is None:
            return
        now = self._now()
        self._catch_up(flow, now)
        if probe:
            for board in self.boards.values():
                if mac in board.entries:
                    probing = self._flow(mac, board.host)
                    self._send(probing, probing.connection, now)
            if mac in self.firewalls.guarded:
                self._exercise(flow, now)
        for board in self.boards.values():
            for tap in board.rings:
                if tap.mac == mac:
                    tap.drain(now)

    def _exercise(self, flow: Flow, now: float) -> None:
        """Young connections go on, one is opened, the oldest ends."""
        young = self._young.setdefault(flow.mac, deque())
        young.append(self.firewalls.begin(flow.origin))
        for connection in young:
            self._send(flow, connection, now)
        if len(young) > YOUNG:
            self._ending.setdefault(flow.mac, []).append(young.popleft())
        self._end_idle(flow)

    def _end_idle(self, flow: Flow) -> None:
        """A connection's end is seen where frames pass now, once none of its own waits anywhere."""
        waiting = {id(f.connection) for b in self.boards.values() for t in b.rings for f in t.held}
        place, passed = self._route(self.boards[flow.origin], flow.mac, tunnelled=False)
        for connection in tuple(self._ending.get(flow.mac, ())):
            if id(connection) not in waiting and isinstance(place, Tap):
                self._ending[flow.mac].remove(connection)
                for host in (*passed, place.host):
                    self.firewalls.see_end(host, flow.mac, connection)

    def touch_all(self) -> None:
        for mac in tuple(self._steady):
            self.touch(mac)

    def lead(self, host: HostId, mac: str, to: str | None) -> None:
        """Set a host's one entry for `mac`; None removes it."""
        entries = self.boards[host].entries
        if entries.get(mac) != to:
            self.touch(mac)
            if to is None:
                del entries[mac]
            else:
                entries[mac] = to

    def tunnel(self, host: HostId, mac: str, address: str) -> None:
        board = self.boards[host]
        if board.tunnels.get(mac) != address:
            self.touch(mac)
            board.tunnels[mac] = address

    def gate(self, host: HostId, mac: str, *, on: bool) -> None:
        gates = self.boards[host].gates
        if (mac in gates) != on:
            self.touch(mac)
            (gates.add if on else gates.discard)(mac)

    def add_tap(self, tap: Tap) -> None:
        self.touch(tap.mac)
        self.boards[tap.host].taps[tap.port] = tap

    def remove_tap(self, host: HostId, port: PortId) -> None:
        self.remove_spare(host, port)
        tap = self.boards[host].taps.get(port)
        if tap:
            self.touch(tap.mac)
            now = self._now()
            tap.discard("in the ring of a tap that was deleted", now)
            tap.detached(now)
            del self.boards[host].taps[port]
            if self.boards[host].entries.get(tap.mac) == port:
                del self.boards[host].entries[tap.mac]

    def add_spare(self, tap: Tap) -> None:
        self.boards[tap.host].spares[tap.port] = tap

    def swap(self, host: HostId, port: PortId) -> None:
        """Frames go to the other VMM's queues."""
        board = self.boards[host]
        self.touch(board.taps[port].mac)
        board.taps[port], board.spares[port] = board.spares[port], board.taps[port]

    def deliver_again(self, host: HostId, port: PortId) -> int:
        """What the spare's ring has kept goes to the tap's; returns the number of frames."""
        board = self.boards[host]
        spare, tap = board.spares[port], board.taps[port]
        self.touch(tap.mac)
        kept = tuple(spare.ring)
        spare.ring.clear()
        for frame in kept:
            tap.put(frame)
        return len(kept)

    def remove_spare(self, host: HostId, port: PortId) -> None:
        self.boards[host].switched.discard(port)
        spare = self.boards[host].spares.pop(port, None)
        if spare is not None:
            self.touch(spare.mac)
            spare.discard("in a queue of a VMM that was replaced", self._now())
            spare.detached(self._now())

    def reinject(self, tap: Tap) -> int:
        """Send the frames parked in `tap` through the tunnel; returns their number."""
        self.touch(tap.mac)
        now = self._now()
        frames = [*([tap.swallowed] if tap.swallowed and not tap.spoiled else []), *tap.ring]
        tap.ring.clear()
        board = self.boards[tap.host]
        target = self._by_address.get(board.tunnels.get(tap.mac, ""))
        for frame in frames:
            if frame.flow and frame.connection:
                route = self._route(target, tap.mac, tunnelled=True)
                self._place(frame.flow, frame.seq, now, frame.connection, route, opens=frame.opens)
        return len(frames)

    def power(self, host: HostId, *, on: bool) -> None:
        self.touch_all()
        board = self.boards[host]
        now = self._now()
        if not on:
            for tap in board.rings:
                tap.discard("host lost power", now)
                tap.detached(now)
            board.taps.clear()
            board.spares.clear()
            board.switched.clear()
            board.entries.clear()
            board.tunnels.clear()
            board.gates.clear()
            self.firewalls.lose_all(host)
        board.up = on

    # --- frames ---

    def _flow(self, mac: str, origin: HostId) -> Flow:
        flow = self.flows.get((mac, origin))
        if flow is None:
            connection = self.firewalls.begin(origin)
            flow = Flow(mac=mac, origin=origin, steady=False, next_at=0.0, connection=connection)
            self.flows[mac, origin] = flow
        return flow

    def _catch_up(self, flow: Flow, now: float) -> None:
        """All frames of the steady flow that were due before `now`, under the state that held so far."""
        count = int((now - flow.next_at) / INTERVAL) + 1 if now >= flow.next_at else 0
        if count <= 0:
            return
        place, passed = self._route(self.boards[flow.origin], flow.mac, tunnelled=False)
        known = flow.connection.accepted
        admitted = self._admitted(flow.mac, flow.connection, place, passed, opens=not known)
        if isinstance(admitted, Tap):
            count = self._deliver_old(flow, admitted, count, now)
        elif count > 1:
            self._fail(flow, admitted, flow.next_at, count - 1)
            self._skip(flow, count - 1)
            count = 1
        for _ in range(count):
            at = flow.next_at
            flow.next_at += INTERVAL
            flow.sent += 1
            self._place(flow, flow.sent, at, flow.connection, (place, passed), opens=not known)
            known = flow.connection.accepted

    def _deliver_old(self, flow: Flow, tap: Tap, count: int, now: float) -> int:
        """Frames a running guest has long fetched, in one go; returns how many are left to look at."""
        tap.drain(now)
        fetched = int((now - tap.delay - flow.next_at) / INTERVAL)
        if tap.ring or fetched <= 1 or not (tap.vmm and tap.vmm.running):
            return count
        tap.received += fetched
        tap.sent += fetched
        flow.arrived(flow.sent + 1, flow.next_at + tap.delay, 1)
        if fetched > 1:
            flow.arrived(flow.sent + 2, flow.next_at + INTERVAL + tap.delay, fetched - 1)
            flow.last_at = flow.next_at + (fetched - 1) * INTERVAL + tap.delay
        self._skip(flow, fetched)
        return count - fetched

    def _skip(self, flow: Flow, count: int) -> None:
        flow.sent += count
        flow.next_at += count * INTERVAL

    def _send(self, flow: Flow, connection: Connection, now: float) -> None:
        flow.sent += 1
        route = self._route(self.boards[flow.origin], flow.mac, tunnelled=False)
        self._place(flow, flow.sent, now, connection, route, opens=not connection.accepted)

    def _place(
        self,
        flow: Flow,
        seq: int,
        at: float,
        connection: Connection,
        route: "tuple[Tap | str, tuple[HostId, ...]]",
        *,
        opens: bool,
    ) -> None:
        place = self._admitted(flow.mac, connection, *route, opens=opens)
        if isinstance(place, Tap):
            place.put(Frame(flow, seq, at, connection, opens))
        else:
            self._fail(flow, place, at)

    def _admitted(
        self,
        mac: str,
        connection: Connection,
        place: "Tap | str",
        passed: tuple[HostId, ...],
        *,
        opens: bool,
    ) -> "Tap | str":
        """The tap, if the firewall lets the frame in; or what becomes of it."""
        if not isinstance(place, Tap) or mac not in self.firewalls.guarded:
            return place
        if opens:
            for host in (*passed, place.host):
                self.firewalls.see_first(host, mac, connection)
        runs = place.vmm is not None and place.vmm.running
        return self.firewalls.objection(place.host, mac, connection, runs=runs) or place

    def _fail(self, flow: Flow, why: str, at: float, count: int = 1) -> None:
        if why == TURNED_AWAY:
            flow.turned_away += count
        else:
            flow.lose(why, at, count)

    def _route(
        self, start: Switchboard | None, mac: str, *, tunnelled: bool
    ) -> "tuple[Tap | str, tuple[HostId, ...]]":
        """The tap a frame comes to, or why it comes nowhere; and hosts with a tap of this port that pass it
        on: their firewall sees it as well."""
        board, passed = start, ()
        for _ in range(MAX_HOPS):
            if board is None:
                return "tunnel to an address nobody has", passed
            if not board.up:
                return f"{board.host} has no power", passed
            entry = board.entries.get(mac)
            if entry is None:
                return f"no entry at {board.host}", passed
            if entry != TO_TUNNEL:
                return board.taps.get(PortId(entry)) or f"no tap at {board.host}", passed
            if tunnelled and mac not in board.gates:
                return f"came to {board.host} by the tunnel and may not leave by it", passed
            if any(tap.mac == mac for tap in board.taps.values()):
                passed = (*passed, board.host)
            board = self._by_address.get(board.tunnels.get(mac, ""))
            tunnelled = True
        return "went round in a circle", passed
