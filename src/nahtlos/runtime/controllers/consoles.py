"""What operators can do with servers' consoles: follow what they say from any offset, type, look at a
display.

What a server has said is kept by the host that runs it and goes with it. Whoever follows it says how far it
has read; so neither a restarted orchestrator nor a restarted client loses or doubles anything.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from nahtlos.model.ids import ServerId
from nahtlos.model.values import Value


class ConsolePlace(Value, frozen=True, kw_only=True):
    """How far somebody has read."""

    history: str = ""
    """Empty: of whichever there is, from `offset`, or from the oldest that is kept."""
    offset: int = 0


class ConsoleOutput(Value, frozen=True, kw_only=True):
    history: str
    offset: int
    """Of the first byte of `data`."""
    data: bytes
    dropped: int | None = 0
    """Bytes between what was read before and `data` that are not kept any more; None if nobody knows how
    many, because the history begins anew."""

    @property
    def end(self) -> ConsolePlace:
        return ConsolePlace(history=self.history, offset=self.offset + len(self.data))


class Display(Protocol):
    """One connection to a server's display: the bytes of RFB 3.8, as its VMM speaks it."""

    async def read(self) -> bytes:
        """What came, at once when something does. Empty once the VMM has closed: the server has moved, was
        replaced, or does not run."""
        ...

    async def write(self, data: bytes) -> None: ...

    async def close(self) -> None: ...


class Consoles(Protocol):
    async def log(self, server: ServerId) -> ConsoleOutput:
        """All that is kept of what it has said. Unavailable while its host does not answer."""
        ...

    def follow(self, server: ServerId, place: ConsolePlace) -> AsyncGenerator[ConsoleOutput]:
        """What it says from `place` on, for as long as it exists: over moves, replacements, lost agents.
        NotFound when it is deleted; Refused if its host's agent cannot count over moves."""
        ...

    def claim(self, server: ServerId, session: str, *, force: bool) -> bool:
        """Whether `session` is the one that may type, from now on. One at a time; `force` takes it over."""
        ...

    def release(self, server: ServerId, session: str) -> None: ...

    async def type(self, server: ServerId, session: str, data: bytes) -> None:
        """Returns when the guest's serial port has taken all of it. Conflict if another session may type,
        Unavailable if it does not take it: what was taken until then is in the message."""
        ...

    async def display(self, server: ServerId) -> Display:
        """Refused if it has none, or its host's agent is too old to show one. Unavailable while it is not to
        be reached."""
        ...
