"""An agent of an earlier release: what the others say to it arrives as that release would understand it. Of a
newer one: see `other_release` among the simulations."""

from collections.abc import Callable, Collection
from typing import Any

import msgspec

from nahtlos.physical.sim.agents import Dress
from nahtlos.wire.messages import Envelope
from nahtlos.wire.transport import Channel, Listener, OnChannel, Transport

UNKNOWN = "ThoughtOfTomorrow"
_envelope = msgspec.msgpack.Decoder(Envelope)


def before(*messages: str, fields: Collection[str] = ()) -> Dress:
    """An agent of a time at which there were none of these messages, nor any of `fields` in others."""

    def understood(body: dict[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in body.items() if name not in fields}
        return {**known, "type": UNKNOWN} if body["type"] in messages else known

    return lambda inner: _OlderTransport(inner, understood)


class _OlderTransport:
    def __init__(self, inner: Transport, understood: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._inner = inner
        self._understood = understood

    async def dial(self, address: str, port: int, *, expect: str, timeout: float) -> Channel:
        channel = await self._inner.dial(address, port, expect=expect, timeout=timeout)
        return _OlderChannel(channel, self._understood)

    async def listen(self, address: str, port: int, on_channel: OnChannel) -> Listener:
        async def on_older(channel: Channel) -> None:
            await on_channel(_OlderChannel(channel, self._understood))

        return await self._inner.listen(address, port, on_older)


class _OlderChannel:
    def __init__(self, inner: Channel, understood: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._inner = inner
        self._understood = understood

    @property
    def peer(self) -> str:
        return self._inner.peer

    async def send(self, frame: bytes) -> None:
        await self._inner.send(frame)

    async def receive(self) -> bytes:
        frame = await self._inner.receive()
        envelope = _envelope.decode(frame)
        body = msgspec.msgpack.decode(envelope.body)
        told = self._understood(body)
        if told == body:
            return frame
        raw = msgspec.Raw(msgspec.msgpack.encode(told))
        return msgspec.msgpack.encode(msgspec.structs.replace(envelope, body=raw))

    async def close(self) -> None:
        await self._inner.close()
