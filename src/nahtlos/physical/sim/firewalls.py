"""What the firewalls of the simulated hosts remember of connections, and whom they therefore let in.

Owns, per host and port (by MAC), the connections remembered there, and what was noted for a move since its
agent last asked. Strict: what is not remembered is not let in, unless it is the first of its connection.
Never touches a frame.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from nahtlos.model.ids import HostId

TURNED_AWAY = "turned away"
LEFT_BEHIND = "opened while its server left, and never carried after it"


@dataclass(eq=False)
class Connection:
    number: int
    origin: HostId
    accepted: bool = False
    """Some firewall has let its first frame in."""
    noted: bool = False
    """It was opened while changes were noted for a move..."""
    handed: bool = False
    """... and was given out to be carried before the path was switched."""


@dataclass(eq=False)
class Noted:
    """What a firewall has learned about a port since it was last asked."""

    opened: set[int] = field(default_factory=set[int])
    closed: set[int] = field(default_factory=set[int])


@dataclass(eq=False)
class _Memory:
    known: set[int] = field(default_factory=set[int])
    noted: Noted | None = None


class Firewalls:
    def __init__(self) -> None:
        self.guarded: set[str] = set()
        """MACs of ports with security groups."""
        self._connections: list[Connection] = []
        self._memories: dict[tuple[HostId, str], _Memory] = {}

    def _of(self, host: HostId, mac: str) -> _Memory:
        return self._memories.setdefault((host, mac), _Memory())

    # --- connections ---

    def begin(self, origin: HostId) -> Connection:
        self._connections.append(Connection(len(self._connections), origin))
        return self._connections[-1]

    def see_first(self, host: HostId, mac: str, connection: Connection) -> None:
        """The first frame of `connection` passes."""
        memory = self._of(host, mac)
        connection.accepted = True
        if connection.number not in memory.known:
            memory.known.add(connection.number)
            if memory.noted is not None:
                memory.noted.opened.add(connection.number)
                connection.noted = True

    def see_end(self, host: HostId, mac: str, connection: Connection) -> None:
        memory = self._of(host, mac)
        if connection.number in memory.known:
            memory.known.discard(connection.number)
            if memory.noted is not None:
                memory.noted.opened.discard(connection.number)
                memory.noted.closed.add(connection.number)

    def objection(self, host: HostId, mac: str, connection: Connection, *, runs: bool) -> str:
        """Why a frame is not let in at `host`; empty if it is. `runs`: the server runs there.

        TURNED_AWAY is what cannot be had: a connection that was opened in the moment in which its server
        left is known at the old host only, until the server has stopped and the rest is told."""
        if connection.number in self._of(host, mac).known:
            return ""
        if connection.noted and not connection.handed:
            return LEFT_BEHIND if runs else TURNED_AWAY
        return f"not remembered by the firewall of {host}"

    # --- moves ---

    def note_changes(self, host: HostId, mac: str) -> set[int]:
        """All that is remembered now; from here on, changes are noted."""
        memory = self._of(host, mac)
        memory.noted = Noted()
        return set(memory.known)

    def noted_changes(self, host: HostId, mac: str, *, switched: bool) -> Noted | None:
        """Since the last call, or since `note_changes`; None if none are noted."""
        memory = self._of(host, mac)
        if memory.noted is None:
            return None
        noted, memory.noted = memory.noted, Noted()
        if not switched:
            for number in noted.opened:
                self._connections[number].handed = True
        return noted

    def stop_noting(self, host: HostId, mac: str) -> None:
        self._of(host, mac).noted = None

    def take_up(
        self, host: HostId, mac: str, opened: Iterable[int], closed: Iterable[int], *, whole: bool
    ) -> None:
        """What another host's firewall remembers."""
        if whole:
            self.forget(host, mac)
        memory = self._of(host, mac)
        memory.known.difference_update(closed)
        memory.known.update(opened)

    def forget(self, host: HostId, mac: str) -> None:
        """The port is not here (any more). Connections with somebody here are remembered for their sake."""
        memory = self._of(host, mac)
        memory.noted = None
        memory.known = {n for n in memory.known if self._connections[n].origin == host}

    def lose_all(self, host: HostId) -> None:
        for held in [key for key in self._memories if key[0] == host]:
            del self._memories[held]

    def strangers(self, host: HostId, mac: str) -> frozenset[int]:
        """Connections of the port that `host` remembers and that are not with anybody there."""
        return frozenset(n for n in self._of(host, mac).known if self._connections[n].origin != host)
