"""Serial consoles over the operator API's WebSocket, with real sockets: nothing lost or doubled over a broken
connection, one writer, and who may come at all."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import reachable_cloud

from nahtlos.model.errors import NotFound, Refused, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.console_frames import Failed, Mode, Output, decode_from_server
from nahtlos.ops.console_line import ConsoleLine
from nahtlos.runtime.controllers.consoles import ConsolePlace

SERVER = ServerId("web-1")


class Screen:
    def __init__(self, client: OperatorClient, **how: Any) -> None:
        self.seen = b""
        self.notes: list[str] = []
        self.line = ConsoleLine(client, SERVER, show=self._show, note=self.notes.append, **how)

    def _show(self, data: bytes) -> None:
        self.seen += data

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(60):
            while self.seen != text:
                await asyncio.sleep(0.01)

    async def until_noted(self, words: str) -> None:
        async with asyncio.timeout(60):
            while not any(words in note for note in self.notes):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def attached(screen: Screen) -> AsyncGenerator[Screen]:
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(screen.line.run())
        yield screen
        running.cancel()


async def test_output_goes_on_where_it_was_when_the_orchestrator_comes_back(
    cloud: Any, tmp_path: Path, pki: Path
) -> None:
    async with OperatorClient.unix(tmp_path / "operator.sock") as client:
        screen = Screen(client)
        async with attached(screen):
            for text in (b"login: ", b"login: while it was away\n"):
                async with reachable_cloud(cloud, tmp_path, pki):
                    await screen.until(text)
                cloud.console += b"while it was away\n"
    assert all("waiting" in note for note in screen.notes)


async def test_a_history_that_begins_anew_is_said(reachable: Any) -> None:
    async with reachable.unix() as client:
        screen = Screen(client, place=ConsolePlace(history="h-0", offset=4000))
        async with attached(screen):
            await screen.until(b"login: ")
    assert any("begins anew" in note for note in screen.notes)
    assert screen.line.place == ConsolePlace(history="h-1", offset=7)


async def test_one_types_and_the_other_is_told_and_may_take_over(reachable: Any) -> None:
    async with reachable.unix() as client:
        first, second, third = (Screen(client, write=True, force=n == 2) for n in range(3))
        async with attached(first):
            first.line.type(b"root\r")
            await first.until(b"login: root\r")
            async with attached(second):
                await second.until_noted("somebody else types")
                second.line.type(b"no")
                await second.until_noted("not typed")
                async with attached(third):
                    third.line.type(b"yes")
                    await first.until(b"login: root\ryes")
                    first.line.type(b"no")
                    await first.until_noted("not typed")
    assert reachable.cloud.console == b"login: root\ryes"


async def test_what_cannot_be_typed_is_said_and_what_follows_is_typed(reachable: Any) -> None:
    async with reachable.unix() as client:
        screen = Screen(client, write=True)
        async with attached(screen):
            await screen.until(b"login: ")
            reachable.cloud.type_error = Unavailable("its guest reads no further")
            screen.line.type(b"lost")
            await screen.until_noted("reads no further")
            reachable.cloud.type_error = None
            screen.line.type(b"kept")
            await screen.until(b"login: kept")


async def test_a_server_that_goes_ends_it(reachable: Any) -> None:
    async with reachable.unix() as client:
        screen = Screen(client)
        with pytest.raises(BaseExceptionGroup) as ended:
            async with attached(screen):
                await screen.until(b"login: ")
                del reachable.cloud.places[SERVER]
                await asyncio.sleep(60)
    assert ended.group_contains(NotFound)


async def test_over_tls_it_needs_an_operators_credential(reachable: Any) -> None:
    async with reachable.tls(token_file=reachable.token_file) as client:
        screen = Screen(client)
        async with attached(screen):
            await screen.until(b"login: ")
    async with reachable.tls() as client:
        with pytest.raises(Refused) as refused:
            await client.console_stream(SERVER)
        assert refused.value.field == "authorization"


async def test_nonsense_is_refused_with_field_and_remedy_and_the_connection_ends(reachable: Any) -> None:
    async with reachable.unix() as client:
        socket = await client.console_stream(SERVER, write=True, session="s")
        assert decode_from_server(await socket.recv()) == Mode(writer=True)
        first = decode_from_server(await socket.recv())
        assert isinstance(first, Output)
        await socket.send("{}")
        failed = decode_from_server(await socket.recv())
        assert isinstance(failed, Failed)
        assert (failed.error.field, failed.error.kind) == ("input", "refused")
        await socket.wait_closed()
        assert socket.close_code == 4000
        nameless = await client.console_stream(SERVER, write=True)
        failed = decode_from_server(await nameless.recv())
        assert isinstance(failed, Failed)
        assert failed.error.field == "session"
        await nameless.close()
