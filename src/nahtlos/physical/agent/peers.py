"""The source's line to the destination of one move: dialled when needed, dialled again when it broke."""

import asyncio
from typing import TypeVar

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.agent.context import Context
from nahtlos.wire.messages import PROTOCOL_MAX, PROTOCOL_MIN, Message, MoveOrder, PeerHello, Welcome
from nahtlos.wire.session import Session

DIAL_SECONDS = 3.0

A = TypeVar("A", bound=Message)


class Peer:
    def __init__(self, context: Context, order: MoveOrder) -> None:
        self._context = context
        self._order = order
        self._session: Session | None = None
        self._reading: asyncio.Task[None] | None = None

    async def ask(self, body: Message, answer: type[A], timeout: float) -> A:
        """Raises Unavailable when the destination cannot be reached or does not answer in time."""
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
        order = self._order
        channel = await self._context.transport.dial(
            order.destination_address,
            order.destination_peer_port,
            expect=f"host/{order.destination}",
            timeout=DIAL_SECONDS,
        )
        session = Session(channel, _refuse)
        self._session = session
        self._reading = asyncio.create_task(session.run(), name=f"peer {order.destination}")
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
    raise Refused(f"{type(body).__name__} is not for the source of a move", field="message")
