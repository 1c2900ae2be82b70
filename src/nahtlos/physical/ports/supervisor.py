"""What an agent asks of who keeps its daemons, and their descriptors, while it is away."""

from pathlib import Path
from typing import Protocol

import msgspec


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon that outlives the agent."""

    name: str
    argv: tuple[str, ...]
    """`{fd:NAME}` in an argument becomes the number at which the stored fd NAME is inherited."""
    environment: dict[str, str] = {}
    fds: tuple[str, ...] = ()
    """Names of stored fds to inherit."""
    log: Path
    restart: bool = False
    """Start it again when it ends other than by `stop`."""
    nice: int = 0
    """Scheduling priority: what keeps others alive (agent, orchestrator) is below 0, so that busy guests
    cannot starve it."""
    leased: bool = False
    """It is started, and runs, only until the deadline of `Supervisor.arm`."""


class UnitStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    pid: int | None
    """None once it has ended; an ended unit stays listed until `forget`."""
    exit_code: int | None = None
    restarts: int = 0


class Supervisor(Protocol):
    """Owns daemons, listening sockets and tap descriptors of one host."""

    async def start(self, unit: Unit) -> UnitStatus:
        """Starting a unit that runs already changes nothing."""
        ...

    async def stop(self, name: str, *, grace: float = 5.0) -> None:
        """SIGTERM, after `grace` seconds SIGKILL (at once if 0); returns when it has ended. Forgets it."""
        ...

    async def units(self) -> dict[str, UnitStatus]: ...

    async def arm(self, deadline: float | None, leased: dict[str, bool]) -> None:
        """At `deadline` (by `clock`) leased units are killed, and from then on none is started until it is
        armed anew. None: there is no deadline until the host is started again. Before it was armed the
        deadline counts as past. `leased` says of units by name whether they need it from here on; what it
        does not name stays as it is."""
        ...

    def clock(self) -> float:
        """The host's clock since boot, in seconds, which counts on while it sleeps."""
        ...

    async def listen_tcp(self, name: str, address: str, port: int) -> int:
        """Hold a listening socket under `name`; returns its port (0 asks for any). Repeatable."""
        ...

    async def listen_unix(self, name: str, path: Path, *, mode: int) -> None: ...

    async def store_fd(self, name: str, fd: int) -> None:
        """Keep a duplicate of `fd` under `name`, replacing what was there."""
        ...

    async def fetch_fd(self, name: str) -> int | None:
        """A duplicate that the caller must close; None if there is none."""
        ...

    async def drop_fd(self, name: str) -> None: ...

    async def stored(self) -> frozenset[str]: ...
