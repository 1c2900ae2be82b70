"""What carries frames: the port that the WebSocket transport and the in-memory one both serve.

A channel is an authenticated, ordered, reliable-or-broken stream of frames between two named parties.
Lost, late and doubled frames exist only in the simulated transport, where tests ask for them.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol


class ChannelClosed(ConnectionError):
    """The channel broke or was closed; nothing further will arrive."""


class Channel(Protocol):
    @property
    def peer(self) -> str:
        """Who the other side proved to be: `host/<id>`, `orchestrator` or `operator/<name>`."""
        ...

    async def send(self, frame: bytes) -> None:
        """Raises ChannelClosed."""
        ...

    async def receive(self) -> bytes:
        """The next frame. Raises ChannelClosed."""
        ...

    async def close(self) -> None: ...


class Listener(Protocol):
    async def close(self) -> None: ...


OnChannel = Callable[[Channel], Awaitable[None]]
"""Called for every accepted channel; the channel is closed when it returns."""


class Transport(Protocol):
    async def dial(self, address: str, port: int, *, expect: str, timeout: float) -> Channel:
        """A channel to the party that listens there; Unavailable if there is none within `timeout`
        seconds or if it does not prove to be `expect`."""
        ...

    async def listen(self, address: str, port: int, on_channel: OnChannel) -> Listener: ...
