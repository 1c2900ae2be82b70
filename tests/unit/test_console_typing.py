"""What is typed into a VMM's console arrives whole though the guest takes 16 bytes at a time, and what it has
said keeps its offsets while its beginning is given up."""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nahtlos.model.errors import Unavailable
from nahtlos.physical.hypervisor.console import PIECE, bound, size_of, type_into


class Port:
    """As QEMU: reads what the guest has room for, forgets what is unread when the connection ends, and says
    things nobody listens to."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.heard = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while self.room > 0 and (data := await reader.read(min(PIECE, self.room))):
                self.heard += data
                self.room -= len(data)
                writer.write(b"x" * 1000)
                await asyncio.sleep(0.001)
            while self.room == 0 and not writer.is_closing():
                await asyncio.sleep(0.01)
        except OSError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def listening(port: Port, path: Path) -> AsyncGenerator[None]:
    # One byte of buffer: what the guest does not take stays in the socket, as with QEMU.
    server = await asyncio.start_unix_server(port.serve, str(path), limit=PIECE // 2)
    try:
        yield
    finally:
        port.room = -1
        server.close()


async def test_all_of_it_arrives(tmp_path: Path) -> None:
    port, text = Port(1 << 20), os.urandom(1000)
    async with listening(port, tmp_path / "c"):
        assert await type_into(tmp_path / "c", text, within=30.0, may=lambda: True) == 1000
        while len(port.heard) < 1000:
            await asyncio.sleep(0.01)
    assert port.heard == text


async def test_nothing_is_typed_into_a_guest_that_is_being_handed_over(tmp_path: Path) -> None:
    port = Port(1 << 20)
    pieces = iter((True, True, False))
    async with listening(port, tmp_path / "c"):
        typed = await type_into(tmp_path / "c", b"a" * 100, within=30.0, may=lambda: next(pieces))
        assert typed == 2 * PIECE


async def test_a_console_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await type_into(tmp_path / "none", b"a", within=1.0, may=lambda: True)


async def test_a_port_that_takes_nothing_is_given_up_and_nothing_counts_as_typed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "c"))
        deaf.listen()
        assert await type_into(tmp_path / "c", b"a" * 100, within=0.2, may=lambda: True) == 0


def test_the_beginning_is_given_up_and_offsets_stay(tmp_path: Path) -> None:
    log = tmp_path / "log"
    said = os.urandom(1 << 20)
    log.write_bytes(said)
    bound(log, 64 << 10)
    assert size_of(log) == 1 << 20
    with log.open("ab") as file:
        file.write(b"more")
    assert log.read_bytes()[-(64 << 10) - 4 :] == said[-(64 << 10) :] + b"more"
    assert log.stat().st_blocks * 512 < 128 << 10
    bound(log, 64 << 10)
    assert log.read_bytes().endswith(b"more")


def test_a_log_that_is_short_or_absent_stays_as_it_is(tmp_path: Path) -> None:
    assert size_of(tmp_path / "none") == 0
    bound(tmp_path / "none", 100)
    (tmp_path / "log").write_bytes(b"short")
    bound(tmp_path / "log", 100)
    assert (tmp_path / "log").read_bytes() == b"short"
