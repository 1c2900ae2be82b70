"""Connections move with their port: what this host's firewall remembers of it is carried to the next.

Owns, for ports with security groups only: the listeners of moves that leave this host, what was loaded for
moves that come, one sysctl, and a file that says which entries are whose (`connections.json`: gone after a
restart of the host, like the entries). Never decides what may pass.

    source         begin: listen, then dump all       changes: what was heard since; all again if some was
                                                      lost or this agent was started meanwhile
    destination    load: put, delete; `whole` also removes what the source does not have

A port that is gone from here (moved away, moved back, deleted) leaves nothing remembered, except
connections to a port that is here: those are that port's, too. This is also what becomes of an abandoned
move's entries at its destination.
"""

import asyncio
import errno
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import PortId
from nahtlos.physical.network.device_names import tracking_zone
from nahtlos.physical.network.parts import LocalPort, Part
from nahtlos.physical.network.tracking import conntrack
from nahtlos.physical.network.tracking.conntrack import Entry, Listener, Rejected, Table
from nahtlos.physical.network.tracking.state import (
    DELETE,
    PUT,
    Selector,
    State,
    Tracked,
    decode,
    encode,
    entry_of,
    is_complete,
    put_record,
    summed_up,
)
from nahtlos.physical.ports import MoveRole

EVENTS = Path("/proc/sys/net/netfilter/nf_conntrack_events")
HOLD_SECONDS = 300
"""An entry that was loaded is remembered at least so long without a packet: its own kernel, which sees the
packets, tells when it has ended, but not when it was used."""
AT_ONCE = 32
"""Records loaded without another thread: about 2 ms."""
FULL = frozenset({errno.ENOMEM, errno.ENOSPC, errno.ENOBUFS})

T = TypeVar("T")


class Note(msgspec.Struct, frozen=True):
    """What a later process of this agent must know of a port in a move."""

    role: MoveRole
    tracked: Tracked


class Notes(msgspec.Struct):
    moving: dict[PortId, Note] = {}
    gone: dict[PortId, Tracked] = {}
    """Left this host before it was known which other ports are here: still to be forgotten."""


class _Departure:
    """One port that leaves: its listener, and how often something was sent."""

    def __init__(self, tracked: Tracked, buffer: int) -> None:
        self.selector = Selector(tracked)
        self.began = time.time_ns()
        self.number = 0
        self.listener = Listener(tracked.zone, buffer)

    def state(self, records: Iterable[tuple[int, int, bytes]], *, whole: bool) -> bytes:
        self.number += 1
        return encode(State(began=self.began, number=self.number, whole=whole, records=tuple(records)))


class ConnectionTracking(Part):
    name = "connection tracking"

    def __init__(self, run_dir: Path, *, event_buffer: int = conntrack.EVENT_BUFFER) -> None:
        self._path = run_dir / "connections.json"
        self._buffer = event_buffer
        self._held: Notes | None = None
        self._missing: str | None = None
        self._departures: dict[PortId, _Departure] = {}
        self._loaded: dict[PortId, tuple[int, int]] = {}
        """When the sender began, and the number of what was loaded last."""
        self._loading = asyncio.Lock()
        self._local: dict[PortId, LocalPort] = {}
        """Complete once `_surveyed`."""
        self._surveyed = False

    def close(self) -> None:
        for departure in self._departures.values():
            departure.listener.close()
        self._departures.clear()

    # --- what there is -------------------------------------------------------------------------------

    def missing(self) -> str:
        """Why connections cannot be carried on this kernel; empty if they can."""
        if self._missing is None:
            try:
                with Table() as table:
                    table.count()
                there = EVENTS.exists()
                self._missing = "" if there else "this kernel tells no events (CONFIG_NF_CONNTRACK_EVENTS)"
            except Unavailable as error:
                self._missing = f"ctnetlink (load the module nf_conntrack_netlink; {error.message})"
        return self._missing

    async def capabilities(self) -> dict[str, str]:
        missing = self.missing()
        used = "used: entries of ports with security groups are carried by ctnetlink when they move"
        return {self.name: f"missing: {missing}" if missing else used}

    async def init(self) -> None:
        self._turn_events_on()

    def _turn_events_on(self) -> bool:
        """False if they were. By the kernel's default (2, on demand) entries that are older than the first
        listener tell nothing."""
        if self.missing() or EVENTS.read_text().strip() == "1":
            return False
        EVENTS.write_text("1\n")
        return True

    async def reconcile(self, config: HostConfig, local: Mapping[PortId, LocalPort]) -> tuple[str, ...]:
        self._local = dict(local)
        self._surveyed = True
        words: list[str] = []
        if any(place.port.security_groups for place in local.values()) and self._turn_events_on():
            words.append("sysctl net.netfilter.nf_conntrack_events was different: put right")
        for port, tracked in tuple(self._notes.gone.items()):
            if port not in local:
                await self._forget(port, tracked)
            self._notes.gone.pop(port, None)
            self._save()
        return tuple(words)

    # --- ports ---------------------------------------------------------------------------------------

    async def port_created(self, port: LocalPort) -> None:
        self._local[port.port.id] = port
        if self._notes.gone.pop(port.port.id, None) is not None:
            self._save()

    async def port_deleted(self, port: PortId, tap: str) -> None:
        self._end_departure(port)
        self._loaded.pop(port, None)
        here = self._local.pop(port, None)
        note = self._notes.moving.pop(port, None)
        if note is not None:
            tracked = note.tracked
        elif here is not None and here.port.security_groups:
            tracked = _tracked(here)
        else:
            return
        if self._surveyed:
            await self._forget(port, tracked)
        else:
            self._notes.gone[port] = tracked
        self._save()

    async def _forget(self, port: PortId, tracked: Tracked) -> None:
        """Entries that are only of `port`."""
        if not self.missing():
            selector, neighbours = Selector(tracked), self._neighbours(port, tracked.zone)
            await _apart(lambda table: _remove_all(table, selector, neighbours))

    def _neighbours(self, port: PortId, zone: int) -> Selector:
        """Other ports here: a connection between one of them and `port` is theirs, too."""
        others = (t for p, t in ((p, _tracked(place)) for p, place in self._local.items()) if p != port)
        return Selector(Tracked(zone, tuple(a for t in others if t.zone == zone for a in t.addresses)))

    # --- moves ---------------------------------------------------------------------------------------

    async def move_prepared(self, port: LocalPort, role: MoveRole, *, marked: bool = False) -> None:
        if port.port.security_groups:
            self._notes.gone.pop(port.port.id, None)
            self._notes.moving[port.port.id] = Note(role, _tracked(port))
            self._save()
        else:
            self._end_move(port.port.id)

    async def move_settled(self, port: LocalPort, role: MoveRole) -> None:
        if role is MoveRole.DESTINATION:  # at the source its tap goes next, and all that is remembered
            self._end_move(port.port.id)

    async def move_reverted(self, port: LocalPort, role: MoveRole) -> None:
        if role is MoveRole.SOURCE:  # at the destination its tap goes next
            self._end_move(port.port.id)

    def _end_move(self, port: PortId) -> None:
        self._end_departure(port)
        self._loaded.pop(port, None)
        if self._notes.moving.pop(port, None) is not None:
            self._save()

    def _end_departure(self, port: PortId) -> None:
        departure = self._departures.pop(port, None)
        if departure is not None:
            departure.listener.close()

    async def begin(self, port: PortId) -> bytes:
        """`ports.Network.move_state_begin`"""
        self._end_departure(port)
        note = self._notes.moving.get(port)
        if note is None or note.role is not MoveRole.SOURCE or self.missing():
            return b""
        self._turn_events_on()
        self._departures[port] = _Departure(note.tracked, self._buffer)
        return await self._whole(port)

    async def changes(self, port: PortId) -> bytes:
        """`ports.Network.move_state_changes`. If nothing was lost, nothing here waits for anything."""
        departure = self._departures.get(port)
        if departure is None:
            return await self.begin(port)
        events = departure.listener.read()
        if events is None:
            return await self._whole(port)
        own = [event for event in events if departure.selector.concerns(event.entry)]
        return departure.state(summed_up(own), whole=False) if own else b""

    async def _whole(self, port: PortId) -> bytes:
        departure = self._departures[port]

        def read(table: Table) -> bytes:
            entries = table.dump(departure.selector.zone, departure.selector.concerns)
            return departure.state((put_record(entry) for entry in entries), whole=True)

        try:
            return await _apart(read)
        except BaseException:
            self._end_departure(port)  # what comes next must be whole, too
            raise

    async def load(self, port: PortId, state: bytes) -> tuple[str, ...]:
        """`ports.Network.move_state_load`"""
        note = self._notes.moving.get(port)
        if note is None or note.role is not MoveRole.DESTINATION:
            raise Refused(
                f"no move of port {port} to this host was prepared, or the port has no security groups here",
                field="port",
                remedy="wait until both hosts hold the same configuration, then move again",
            )
        if self.missing():
            raise Refused(
                f"connections of port {port} cannot be taken up: {self.missing()}",
                field="destination",
                remedy="move the server to another host, or see `nahtlos doctor` there",
            )
        told = decode(state)
        async with self._loading:
            began, number = self._loaded.get(port, (0, 0))
            if began == told.began and told.number <= number:
                return ()
            if began == told.began and told.number > number + 1 and not told.whole:
                raise Refused(
                    f"changes to port {port} before number {told.number} are missing", field="state"
                )
            load = _Load(Selector(note.tracked), self._neighbours(port, note.tracked.zone), told)
            if told.whole or len(told.records) > AT_ONCE:
                rejected = await _apart(load.carry_out)
            else:
                with Table() as table:
                    rejected = load.carry_out(table)
            words = problems_with(rejected, port, len(told.records))
            self._loaded[port] = (told.began, told.number)
        return words

    # --- notes ---------------------------------------------------------------------------------------

    @property
    def _notes(self) -> Notes:
        if self._held is None:
            try:
                self._held = msgspec.json.decode(self._path.read_bytes(), type=Notes)
            except (OSError, msgspec.DecodeError):
                self._held = Notes()
        return self._held

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self._notes, order="deterministic"))
        new.replace(self._path)


class _Load:
    """What a destination does with one `State`."""

    def __init__(self, selector: Selector, neighbours: Selector, state: State) -> None:
        self._selector = selector
        self._neighbours = neighbours
        self._state = state
        self._zone = selector.zone

    def carry_out(self, table: Table) -> list[Rejected]:
        """Returns what could not be put, with the kernel's reason."""
        puts, ends = self._own(PUT), self._own(DELETE)
        if self._state.whole:
            there = {entry.key for entry in puts}
            held = table.dump(self._zone, self._selector.concerns)
            ends += [e for e in held if e.key not in there and not self._shared(e)]
        table.delete([conntrack.remove(e.key, self._zone) for e in ends if not self._shared(e)])
        return self._put(table, puts)

    def _own(self, what: int) -> list[Entry]:
        """None of other ports: a peer's agent is believed about the port that moves."""
        entries = (entry_of(record) for record in self._state.records if record[0] == what)
        return [e for e in entries if e is not None and self._selector.concerns(e)]

    def _shared(self, entry: Entry) -> bool:
        return any(self._neighbours.covers(other) for other in self._selector.others(entry))

    def _put(self, table: Table, entries: Sequence[Entry]) -> list[Rejected]:
        rejected = table.put([conntrack.put(e, self._zone, HOLD_SECONDS) for e in entries])
        if not rejected:
            return rejected
        return [left for r in rejected for left in self._again(table, entries[r.index], r)]

    def _again(self, table: Table, entry: Entry, rejected: Rejected) -> list[Rejected]:
        """What is there already may differ in ways that cannot be changed: of a connection that only this
        port has, the source knows better. One without its translation is better than none."""
        if rejected.code == errno.EBUSY and is_complete(entry) and not self._shared(entry):
            table.delete([conntrack.remove(entry.key, self._zone)])
            body = conntrack.put(entry, self._zone, HOLD_SECONDS)
        elif rejected.code in (errno.EOPNOTSUPP, errno.ENOSPC):
            body = conntrack.put(entry, self._zone, HOLD_SECONDS, plain=True)
        else:
            return [rejected]
        return [Rejected(rejected.index, again.code) for again in table.put([body])]


def _tracked(place: LocalPort) -> Tracked:
    return Tracked.of(place.port, tracking_zone(place.network.spec.vni))


async def _apart(act: Callable[[Table], T]) -> T:
    """In another thread, by a socket that was opened in this one's namespace."""
    table = Table()

    def run() -> T:
        with table:
            return act(table)

    return await asyncio.to_thread(run)


def _remove_all(table: Table, selector: Selector, neighbours: Selector) -> None:
    def is_gone(entry: Entry) -> bool:
        return selector.concerns(entry) and not any(map(neighbours.covers, selector.others(entry)))

    entries = table.dump(selector.zone, is_gone)
    table.delete([conntrack.remove(entry.key, selector.zone) for entry in entries])


def problems_with(rejected: Sequence[Rejected], port: PortId, among: int) -> tuple[str, ...]:
    """In words. Unavailable if the table is full: then others would follow."""
    full = sum(r.code in FULL for r in rejected)
    if full:
        raise Unavailable(
            f"{full} connections of port {port} do not fit into this host's table",
            field="destination",
            remedy="raise net.netfilter.nf_conntrack_max there",
        )
    counted = Counter(errno.errorcode.get(r.code, str(r.code)) for r in rejected)
    reasons = ", ".join(f"{name}: {count}" for name, count in sorted(counted.items()))
    text = f"{len(rejected)} of {among} remembered connections of {port} could not be taken up ({reasons})"
    return (text,) if rejected else ()
