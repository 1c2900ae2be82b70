"""Requests and answers: deadlines, refusals, tolerance towards another release, errors of handlers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from nahtlos.model.errors import Conflict, Refused, Unavailable
from nahtlos.model.ids import OperationId, ServerId
from nahtlos.wire.memory import Faults, MemoryNetwork
from nahtlos.wire.messages import ConsoleData, ConsoleRead, Done, Envelope, Message, MoveQuery, Ping
from nahtlos.wire.session import Session, encode
from nahtlos.wire.transport import Channel, ChannelClosed

Answering = Callable[[Message, int], Awaitable[Message]]


async def done(_message: Message, _epoch: int) -> Message:
    return Done()


@asynccontextmanager
async def raw_channel(
    handler: Answering, on_bug: Callable[[BaseException], None] | None = None
) -> AsyncIterator[Channel]:
    """A bare channel to a party that answers with `handler`."""
    network = MemoryNetwork()

    async def serve(channel: Channel) -> None:
        await Session(channel, handler, on_bug=on_bug).run()

    listener = await network.transport("host/b").listen("b", 1, serve)
    channel = await network.transport("orchestrator").dial("b", 1, expect="host/b", timeout=1)
    yield channel
    await channel.close()
    await listener.close()
    assert network.failures == []


@asynccontextmanager
async def conversation(
    handler: Answering,
    *,
    epoch: int = 0,
    ours: Answering = done,
    on_bug: Callable[[BaseException], None] | None = None,
) -> AsyncIterator[Session]:
    async with raw_channel(handler, on_bug) as channel, asyncio.TaskGroup() as group:
        session = Session(channel, ours, epoch=epoch)
        group.create_task(session.run())
        yield session
        await session.close()


async def test_an_answer_comes_back_with_the_epoch_seen() -> None:
    seen: list[int] = []

    async def handler(message: Message, epoch: int) -> Message:
        assert isinstance(message, ConsoleRead)
        seen.append(epoch)
        return ConsoleData(data=b"login:", next_offset=message.offset + 6)

    async with conversation(handler, epoch=7) as session:
        answer = await session.request(ConsoleRead(server=ServerId("s"), offset=10), timeout=1)
    assert answer == ConsoleData(data=b"login:", next_offset=16)
    assert seen == [7]


async def test_slow_answers_do_not_hold_up_others() -> None:
    async def handler(message: Message, _epoch: int) -> Message:
        if isinstance(message, Ping):
            return Done()
        await asyncio.sleep(0.2)
        return ConsoleData(data=b"", next_offset=0)

    async with conversation(handler) as session, asyncio.TaskGroup() as group:
        slow = group.create_task(session.request(ConsoleRead(server=ServerId("s"), offset=0), timeout=2))
        assert await session.request(Ping(), timeout=1) == Done()
        assert not slow.done()


async def test_no_answer_within_the_deadline_is_unavailable() -> None:
    async def handler(_message: Message, _epoch: int) -> Message:
        await asyncio.sleep(0.2)
        return Done()

    async with conversation(handler) as session:
        with pytest.raises(Unavailable, match=r"did not answer Ping within 0\.05 s"):
            await session.request(Ping(), timeout=0.05)
        await asyncio.sleep(0.3)  # the late answer is dropped
        assert await session.request(Ping(), timeout=1) == Done()


async def test_a_broken_channel_makes_waiting_and_later_requests_unavailable() -> None:
    async def handler(_message: Message, _epoch: int) -> Message:
        await asyncio.sleep(0.3)
        return Done()

    async with conversation(handler) as session:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(_error_of(session.request(Ping(), timeout=5)))
            await asyncio.sleep(0.05)
            await session.channel.close()
        assert isinstance(waiting.result(), Unavailable)
        with pytest.raises(Unavailable, match="no connection"):
            await session.request(Ping(), timeout=1)
        with pytest.raises(Unavailable):
            await session.notify(Ping())


async def _error_of(awaitable: Awaitable[object]) -> Exception | None:
    try:
        await awaitable
    except Exception as error:
        return error
    return None


async def test_a_refusal_arrives_as_the_error_it_was() -> None:
    async def handler(_message: Message, _epoch: int) -> Message:
        raise Conflict("moves already", field="server", remedy="wait for the move")

    async with conversation(handler) as session:
        with pytest.raises(Conflict) as caught:
            await session.request(MoveQuery(id=OperationId("op-1")), timeout=1)
    assert (caught.value.message, caught.value.field, caught.value.remedy) == (
        "moves already",
        "server",
        "wait for the move",
    )


async def test_a_bug_in_a_handler_is_told_and_the_session_goes_on() -> None:
    bugs: list[BaseException] = []
    broken = True

    async def handler(_message: Message, _epoch: int) -> Message:
        if broken:
            raise ZeroDivisionError("oops")
        return Done()

    async with conversation(handler, on_bug=bugs.append) as session:
        with pytest.raises(Exception, match="ZeroDivisionError: oops"):
            await session.request(Ping(), timeout=1)
        broken = False
        assert await session.request(Ping(), timeout=1) == Done()
    assert [type(bug) for bug in bugs] == [ZeroDivisionError]


async def test_an_answer_that_cannot_be_sent_is_a_bug_of_the_handler() -> None:
    bugs: list[BaseException] = []

    async def handler(message: Message, _epoch: int) -> Message:
        return Done() if isinstance(message, Ping) else ConsoleData(data=object(), next_offset=0)  # type: ignore[arg-type]

    async with conversation(handler, on_bug=bugs.append) as session:
        with pytest.raises(Exception, match="TypeError"):
            await session.request(ConsoleRead(server=ServerId("s"), offset=0), timeout=1)
        assert await session.request(Ping(), timeout=1) == Done()
    assert [type(bug) for bug in bugs] == [TypeError]


async def test_both_sides_ask_over_one_channel() -> None:
    sessions: list[Session] = []
    network = MemoryNetwork()

    async def serve(channel: Channel) -> None:
        sessions.append(Session(channel, done))
        await sessions[0].run()

    listener = await network.transport("b").listen("b", 1, serve)
    async with asyncio.TaskGroup() as group:
        ours = Session(await network.transport("a").dial("b", 1, expect="b", timeout=1), done)
        group.create_task(ours.run())
        assert await ours.request(Ping(), timeout=1) == Done()
        assert await sessions[0].request(Ping(), timeout=1) == Done()
        await ours.close()
    await listener.close()


# --- another release at the other end ----------------------------------------------------------------


def enveloped(body: dict[str, object], number: int = 1) -> bytes:
    envelope = Envelope(id=number, reply_to=None, epoch=0, body=msgspec.Raw(msgspec.msgpack.encode(body)))
    return msgspec.msgpack.encode(envelope)


async def answer_to(frame: bytes) -> dict[str, object]:
    async with raw_channel(done) as channel:
        await channel.send(frame)
        envelope = msgspec.msgpack.decode(await channel.receive(), type=Envelope)
        assert envelope.reply_to == 1
        return msgspec.msgpack.decode(envelope.body)


async def test_an_unknown_message_is_refused() -> None:
    answer = await answer_to(enveloped({"type": "FutureCommand", "speed": 9}))
    assert answer["type"] == "Failure"
    assert isinstance(answer["error"], dict)
    assert answer["error"]["kind"] == Refused.kind
    assert answer["error"]["field"] == "message"


async def test_an_unknown_field_is_ignored() -> None:
    assert await answer_to(enveloped({"type": "Ping", "colour": "green"})) == {"type": "Done"}


async def test_an_unknown_field_of_the_envelope_is_ignored() -> None:
    body = msgspec.msgpack.encode({"type": "Ping"})
    frame = msgspec.msgpack.encode([1, None, 0, msgspec.Raw(body), "something later releases add"])
    assert await answer_to(frame) == {"type": "Done"}


@pytest.mark.parametrize("field", [{"type": "MoveQuery"}, {"type": "MoveQuery", "id": 5}])
async def test_a_message_with_missing_or_wrong_fields_is_refused(field: dict[str, object]) -> None:
    answer = await answer_to(enveloped(field))
    assert answer["type"] == "Failure"


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"not an envelope", msgspec.msgpack.encode([1])])
async def test_a_frame_that_is_no_envelope_ends_the_channel(frame: bytes) -> None:
    async with raw_channel(done) as channel:
        await channel.send(frame)
        with pytest.raises(ChannelClosed):
            await asyncio.wait_for(channel.receive(), 1)


async def test_an_answer_that_is_not_understood_fails_the_request_only() -> None:
    async with raw_channel(done) as to_them, asyncio.TaskGroup() as group:
        session = Session(_Answering(to_them, {"type": "FutureAnswer"}), done)
        group.create_task(session.run())
        with pytest.raises(Refused, match="not understood"):
            await session.request(Ping(), timeout=1)
        await session.close()


class _Answering:
    """A channel whose other end answers everything with `body`."""

    def __init__(self, channel: Channel, body: dict[str, object]) -> None:
        self._channel = channel
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()
        self._body = msgspec.Raw(msgspec.msgpack.encode(body))
        self.peer = channel.peer

    async def send(self, frame: bytes) -> None:
        asked = msgspec.msgpack.decode(frame, type=Envelope)
        answer = Envelope(id=1, reply_to=asked.id, epoch=0, body=self._body)
        await self._answers.put(msgspec.msgpack.encode(answer))

    async def receive(self) -> bytes:
        async with asyncio.TaskGroup() as group:
            closed = group.create_task(self._until_closed())
            answer = await self._answers.get()
            closed.cancel()
        if not answer:
            raise ChannelClosed
        return answer

    async def _until_closed(self) -> None:
        try:
            await self._channel.receive()
        except ChannelClosed:
            await self._answers.put(b"")

    async def close(self) -> None:
        await self._channel.close()


async def test_doubled_messages_and_answers_do_no_harm() -> None:
    network = MemoryNetwork(Faults(1, duplicate=1.0))
    handled: list[int] = []

    async def handler(_message: Message, _epoch: int) -> Message:
        handled.append(1)
        return Done()

    async def serve(channel: Channel) -> None:
        await Session(channel, handler).run()

    listener = await network.transport("b").listen("b", 1, serve)
    async with asyncio.TaskGroup() as group:
        session = Session(await network.transport("a").dial("b", 1, expect="b", timeout=1), done)
        group.create_task(session.run())
        for _ in range(5):
            assert await session.request(Ping(), timeout=1) == Done()
        await session.close()
    await listener.close()
    assert len(handled) == 10


def test_an_envelope_carries_number_reply_and_epoch() -> None:
    envelope = msgspec.msgpack.decode(encode(Ping(), number=4, reply_to=2, epoch=9), type=Envelope)
    assert (envelope.id, envelope.reply_to, envelope.epoch) == (4, 2, 9)
