"""Requests and answers over one channel.

Owns the numbering, the deadlines and the matching of answers. Never retries: who asks decides.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import msgspec

from nahtlos.model.errors import Error, ErrorRecord, Refused, Unavailable
from nahtlos.wire.messages import AnyMessage, Envelope, Failure, Message
from nahtlos.wire.transport import Channel, ChannelClosed

_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(Envelope)
_body = msgspec.msgpack.Decoder(AnyMessage)

Handler = Callable[[Message, int], Awaitable[Message]]
"""Answers a message; the second argument is the orchestrator epoch it was sent under. An `Error` raised
becomes a Failure; anything else too (kind `bug`), and the session goes on."""


def encode(body: Message, *, number: int, reply_to: int | None = None, epoch: int = 0) -> bytes:
    raw = msgspec.Raw(_encoder.encode(body))
    return _encoder.encode(Envelope(id=number, reply_to=reply_to, epoch=epoch, body=raw))


def decode_body(raw: msgspec.Raw) -> AnyMessage:
    """Raises Refused for a message this release does not know."""
    try:
        return _body.decode(raw)
    except msgspec.ValidationError as error:
        raise Refused(f"message not understood: {error}", field="message") from error


class Session:
    """One side of a conversation. `run` must be running for answers to arrive."""

    def __init__(
        self,
        channel: Channel,
        handler: Handler,
        *,
        epoch: int = 0,
        on_bug: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.channel = channel
        self.epoch = epoch
        self._handler = handler
        self._on_bug = on_bug
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._closed = False

    @property
    def peer(self) -> str:
        return self.channel.peer

    async def request(self, body: Message, *, timeout: float) -> Message:
        """The answer to `body`. Raises what the other side refused it with, or Unavailable after
        `timeout` seconds or when the channel breaks. It may have been carried out all the same."""
        if self._closed:
            raise Unavailable(f"no connection to {self.peer}")
        number = next(self._numbers)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout):
                await self._send(encode(body, number=number, epoch=self.epoch))
                answer = await future
        except TimeoutError as error:
            raise Unavailable(
                f"{self.peer} did not answer {type(body).__name__} within {timeout:g} s"
            ) from error
        except ChannelClosed as error:
            raise Unavailable(f"connection to {self.peer} broke") from error
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # looked at, even when sending broke first
        if isinstance(answer, Failure):
            raise answer.error.raised()
        return answer

    async def notify(self, body: Message) -> None:
        """Send without waiting for an answer (one comes, and is dropped). Raises Unavailable."""
        try:
            await self._send(encode(body, number=next(self._numbers), epoch=self.epoch))
        except ChannelClosed as error:
            raise Unavailable(f"connection to {self.peer} broke") from error

    async def _send(self, frame: bytes) -> None:
        await self.channel.send(frame)

    async def run(self) -> None:
        """Read until the channel breaks. Messages are handled side by side, answers matched as they come.
        A frame that is no envelope at all ends the channel: nothing after it could be trusted."""
        try:
            async with asyncio.TaskGroup() as handling:
                try:
                    while True:
                        self._accept(await self.channel.receive(), handling)
                except ChannelClosed:
                    self._close()
                except msgspec.DecodeError:
                    await self.close()
        finally:
            self._close()

    def _accept(self, frame: bytes, handling: asyncio.TaskGroup) -> None:
        envelope = _envelope.decode(frame)
        if envelope.reply_to is None:
            handling.create_task(self._handle(envelope))
            return
        future = self._waiting.get(envelope.reply_to)
        if future is not None and not future.done():
            try:
                future.set_result(decode_body(envelope.body))
            except Error as error:
                future.set_exception(error)

    async def _handle(self, envelope: Envelope) -> None:
        try:
            await self._reply(envelope, await self._answer(envelope))
        except ChannelClosed:
            self._close()

    async def _answer(self, envelope: Envelope) -> Message:
        try:
            return await self._handler(decode_body(envelope.body), envelope.epoch)
        except Error as error:
            return Failure(error=ErrorRecord.of(error))
        except Exception as error:
            return self._bug(error)

    async def _reply(self, envelope: Envelope, answer: Message) -> None:
        try:
            await self._send_answer(envelope, answer)
        except ChannelClosed:
            raise
        except Exception as error:  # an answer that cannot be encoded, or is too long, is the handler's bug
            await self._send_answer(envelope, self._bug(error))

    async def _send_answer(self, envelope: Envelope, answer: Message) -> None:
        await self._send(encode(answer, number=next(self._numbers), reply_to=envelope.id, epoch=self.epoch))

    def _bug(self, error: Exception) -> Failure:
        if self._on_bug:
            self._on_bug(error)
        return Failure(error=ErrorRecord.of(error))

    def _close(self) -> None:
        self._closed = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ChannelClosed(f"connection to {self.peer} broke"))

    async def close(self) -> None:
        self._close()
        await self.channel.close()
