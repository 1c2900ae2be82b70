"""What the newer release of the mixed runs says is really new: this release reads it, or refuses it."""

import asyncio

import msgspec
import pytest
from other_release import VERSION, dressed, newer

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId
from nahtlos.model.nouns import HostRole
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.wire.memory import MemoryNetwork
from nahtlos.wire.messages import Done, Hello, Message, Ping
from nahtlos.wire.session import Session, decode_body
from nahtlos.wire.transport import Channel

HELLO = Hello(
    host=HostId("host-1"),
    role=HostRole.COMPUTE,
    protocol_min=1,
    protocol_max=1,
    agent_version="1",
    capabilities=(),
    boot_id="b",
    orchestrator_epoch=0,
)


def test_unknown_fields_are_ignored() -> None:
    body = msgspec.msgpack.decode(msgspec.msgpack.encode(HELLO))
    told = decode_body(msgspec.Raw(msgspec.msgpack.encode(dressed(body))))
    assert isinstance(told, Hello)
    assert (told.protocol_max, told.agent_version) == (2, VERSION)


def test_unknown_messages_are_refused_and_the_conversation_goes_on() -> None:
    heard: list[Message] = []

    async def main() -> None:
        network = MemoryNetwork()

        async def serve(channel: Channel) -> None:
            async def answer(body: Message, _epoch: int) -> Message:
                heard.append(body)
                return Done()

            await Session(channel, answer).run()

        await network.transport("orchestrator").listen("10.99.0.1", 7443, serve)
        transport = newer(network.transport("host/host-1"))
        channel = await transport.dial("10.99.0.1", 7443, expect="orchestrator", timeout=1.0)

        async def nothing(body: Message, _epoch: int) -> Message:
            raise AssertionError(body)

        session = Session(channel, nothing)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.run())
            for _ in range(40):
                await session.request(Ping(), timeout=1.0)
            await session.close()

    run_virtual(main(), seed=1, limit_seconds=60)
    assert heard == [Ping()] * 40


def test_a_message_of_tomorrow_is_refused() -> None:
    with pytest.raises(Refused, match="not understood"):
        decode_body(msgspec.Raw(msgspec.msgpack.encode({"type": "ThoughtOfTomorrow"})))
