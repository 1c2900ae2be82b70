"""An operation's line to another agent: dialled when needed, dialled again when it broke."""

import asyncio
from typing import TypeVar

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.agent.context import Context
from nahtlos.wire.messages import PROTOCOL_MAX, PROTOCOL_MIN, Message, PeerHello, Welcome
from nahtlos.wire.session import Session
from nahtlos.wire.volumes import PeerAddress

DIAL_SECONDS = 3.0

A = TypeVar("A", bound=Message)


class Peer:
    def __init__(self, context: Context, at: PeerAddress) -> None:
        self._context = context
        self._at = at
        self._session: Session | None = None
        self._reading: asyncio.Task[None] | None = None

    async def ask(self, body: Message, answer: type[A], timeout: float) -> A:
        """Raises Unavailable when the other agent cannot be reached or does not answer in time."""
        session = await self._connected()
        try:
            got = await session.request(body, timeout=timeout)
        except Unavailable:
            await self.close()
            raise
        if not isinstance(got, answer):
            raise Refused(f"{session.peer} answered {type(got).__name__}, not {answer.__name__}")
        return got

    async def tell(self, body: Message, timeout: float) -> None:
        await self.ask(body, Message, timeout)

    async def close(self) -> None:
        session, reading = self._session, self._reading
        self._session = self._reading = None
        if session:
            await session.close()
        if reading:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _connected(self) -> Session:
        if self._session is not None and self._reading is not None and not self._reading.done():
            return self._session
        await self.close()
        channel = await self._context.transport.dial(
            self._at.address, self._at.peer_port, expect=f"host/{self._at.host}", timeout=DIAL_SECONDS
        )
        session = Session(channel, _refuse)
        self._session = session
        self._reading = asyncio.create_task(session.run(), name=f"peer {self._at.host}")
        hello = PeerHello(
            host=self._context.settings.host, protocol_min=PROTOCOL_MIN, protocol_max=PROTOCOL_MAX
        )
        try:
            welcome = await session.request(hello, timeout=DIAL_SECONDS)
        except BaseException:
            await self.close()
            raise
        assert isinstance(welcome, Welcome), welcome
        return session


async def _refuse(body: Message, epoch: int) -> Message:
    raise Refused(f"{type(body).__name__} is not for who leads an operation", field="message")
