"""What is believed of an agent in a guest, and how its host finds back into a conversation."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.agent.guests.keeper import has_to_be_set
from nahtlos.physical.hypervisor.guest_channel import GuestChannel, command_line, plain, returned

Heard = list[dict[str, object]]
Answering = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]


async def says(writer: asyncio.StreamWriter, body: dict[str, object], *, first: bytes = b"") -> None:
    writer.write(first + json.dumps(body).encode() + b"\n")
    await writer.drain()


@asynccontextmanager
async def serving(path: Path, answer: Answering, heard: Heard) -> AsyncGenerator[None]:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := (await reader.readline()).lstrip(b"\xff"):
            body = json.loads(line)
            heard.append(body)
            if body["execute"] == "guest-sync-delimited":
                await says(writer, {"return": 7})  # of somebody before
                await says(writer, {"return": body["arguments"]["id"]}, first=b"\xff")
            else:
                await answer(body, writer)
        writer.close()
        await writer.wait_closed()
        ended.release()

    connections, ended = 0, asyncio.Semaphore(0)

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await client(reader, writer)

    server = await asyncio.start_unix_server(counted, str(path))
    try:
        yield
        for _ in range(connections):
            await ended.acquire()
    finally:
        server.close()


async def pong(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
    await says(writer, {"return": {"pong": body["execute"]}})


async def silence(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
    return None


async def nonsense(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
    writer.write(b"{{{\n")
    await writer.drain()


async def test_one_connection_is_kept_and_begins_with_a_sync(tmp_path: Path) -> None:
    heard: Heard = []
    async with serving(tmp_path / "agent", pong, heard):
        channel = GuestChannel(tmp_path / "agent")
        for _ in range(2):
            assert await channel.ask("guest-ping", None, within=5) == {"pong": "guest-ping"}
        channel.close()
    assert [each["execute"] for each in heard] == ["guest-sync-delimited", "guest-ping", "guest-ping"]


async def test_after_silence_it_begins_anew(tmp_path: Path) -> None:
    heard: Heard = []
    async with serving(tmp_path / "agent", silence, heard):
        channel = GuestChannel(tmp_path / "agent")
        for _ in range(2):
            with pytest.raises(Unavailable, match="did not answer guest-ping"):
                await channel.ask("guest-ping", None, within=0.05)
        channel.close()
    assert [each["execute"] for each in heard] == ["guest-sync-delimited", "guest-ping"] * 2


async def test_nonsense_ends_the_connection(tmp_path: Path) -> None:
    heard: Heard = []
    async with serving(tmp_path / "agent", nonsense, heard):
        channel = GuestChannel(tmp_path / "agent")
        for _ in range(2):
            with pytest.raises(Unavailable, match="something else"):
                await channel.ask("guest-info", None, within=5)
        channel.close()
    assert len(heard) == 4


async def test_no_socket_is_no_bug(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="broke"):
        await GuestChannel(tmp_path / "absent").ask("guest-ping", None, within=1)


def test_lines() -> None:
    assert command_line("guest-set-time", {"time": 5}) == (
        b'{"execute":"guest-set-time","arguments":{"time":5}}\n'
    )
    assert returned(b'{"return": 3}') == 3
    with pytest.raises(Refused, match="off"):
        returned(b'{"error": {"class": "GenericError", "desc": "off"}}')
    for line in (b"", b"[]", b'{"x": 1}', b"\x00"):
        with pytest.raises(Unavailable):
            returned(line)
    assert plain("a\x1b[31mb\nc") == "a?[31mb?c"


@pytest.mark.parametrize(
    ("behind", "before", "expected"),
    [
        pytest.param(0.9, None, False, id="a short pause"),
        pytest.param(1.2, None, True, id="a long pause, at the first look"),
        pytest.param(3600.0, 3599.5, False, id="its own business"),
        pytest.param(3602.0, 3600.0, True, id="has fallen further behind"),
        pytest.param(-5.0, None, False, id="ahead"),
        pytest.param(0.5, -5.0, False, id="was ahead, is not by now"),
    ],
)
def test_when_a_clock_is_set(behind: float, before: float | None, expected: bool) -> None:
    assert has_to_be_set(behind, before) is expected
