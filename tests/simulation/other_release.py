"""An agent of a newer release, as the others hear it: it offers protocols they do not know, its messages
have fields they have never seen, and now and then it says something they cannot understand.

Its side of the wire is this release's, dressed up between the agent and the network.
"""

import itertools
from typing import Any

import msgspec

from nahtlos.wire.messages import Envelope
from nahtlos.wire.transport import Channel, Listener, OnChannel, Transport

VERSION = "9.9.9"
CHATTER_EVERY = 15
"""Frames between two messages that nobody else understands."""
FIRST_NUMBER = 1 << 40
"""Numbers of its own messages, out of the way of the agent's."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_envelope = msgspec.msgpack.Decoder(Envelope)


def newer(transport: Transport) -> Transport:
    return _NewerTransport(transport)


def dressed(body: dict[str, Any]) -> dict[str, Any]:
    """What this release would send, as the newer one would have sent it."""
    told = {**body, "field_of_tomorrow": {"deep": [1, 2.5, None, "x"]}}
    if body.get("type") in ("Hello", "PeerHello"):
        told["protocol_max"] = body["protocol_max"] + 1
    if body.get("type") == "Hello":
        told |= {"agent_version": VERSION, "capabilities": [*body["capabilities"], "tomorrow"]}
    if body.get("type") == "Report":
        told["inventory"] = {**body["inventory"], "agent_version": VERSION, "field_of_tomorrow": True}
    return told


class _NewerTransport:
    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    async def dial(self, address: str, port: int, *, expect: str, timeout: float) -> Channel:
        return _NewerChannel(await self._inner.dial(address, port, expect=expect, timeout=timeout))

    async def listen(self, address: str, port: int, on_channel: OnChannel) -> Listener:
        async def on_dressed(channel: Channel) -> None:
            await on_channel(_NewerChannel(channel))

        return await self._inner.listen(address, port, on_dressed)


class _NewerChannel:
    def __init__(self, inner: Channel) -> None:
        self._inner = inner
        self._sent = 0
        self._numbers = itertools.count(FIRST_NUMBER)

    @property
    def peer(self) -> str:
        return self._inner.peer

    async def send(self, frame: bytes) -> None:
        envelope = _envelope.decode(frame)
        body = msgspec.Raw(_encode(dressed(_decode(envelope.body))))
        await self._inner.send(_encode(msgspec.structs.replace(envelope, body=body)))
        self._sent += 1
        if self._sent % CHATTER_EVERY == 0:
            chatter = msgspec.Raw(_encode({"type": "ThoughtOfTomorrow", "text": "hm"}))
            await self._inner.send(
                _encode(Envelope(id=next(self._numbers), reply_to=None, epoch=envelope.epoch, body=chatter))
            )

    async def receive(self) -> bytes:
        return await self._inner.receive()

    async def close(self) -> None:
        await self._inner.close()
