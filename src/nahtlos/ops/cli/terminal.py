"""A server's serial console on the operator's terminal, both ways, until Ctrl-] is typed.

Owns the terminal's mode while it is attached and puts it back whatever happens.
"""

import asyncio
import contextlib
import os
import termios
import tty
from collections.abc import Generator

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.ops.client import OperatorClient

LEAVE = b"\x1d"
"""Ctrl-], as telnet has it."""
POLL_SECONDS = 0.1
READ_BYTES = 4096


async def attach(client: OperatorClient, server: ServerId, offset: int, fd_in: int, fd_out: int) -> None:
    """Returns when Ctrl-] was typed. Refused if `fd_in` is no terminal or there is no such server; an
    orchestrator that is away is waited for."""
    if not os.isatty(fd_in):
        raise Refused("standard input is no terminal", field="interactive", remedy="use --follow or --send")
    typed: asyncio.Queue[bytes | None] = asyncio.Queue()
    with _raw(fd_in), _typing(fd_in, typed):
        async with asyncio.TaskGroup() as group:
            shows = group.create_task(_show(client, server, offset, fd_out))
            await _type(client, server, typed)
            shows.cancel()


async def _show(client: OperatorClient, server: ServerId, offset: int, fd_out: int) -> None:
    while True:
        with contextlib.suppress(Unavailable):
            data, offset = await client.console_read(server, offset)
            _write(fd_out, data)
        await asyncio.sleep(POLL_SECONDS)


async def _type(client: OperatorClient, server: ServerId, typed: asyncio.Queue[bytes | None]) -> None:
    while (keys := await typed.get()) is not None:
        before, leave, _ = keys.partition(LEAVE)
        if before:
            # What could not be delivered is not typed again: it might be typed twice.
            with contextlib.suppress(Unavailable):
                await client.console_write(server, before)
        if leave:
            return


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _raw(fd: int) -> Generator[None]:
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _typing(fd: int, into: asyncio.Queue[bytes | None]) -> Generator[None]:
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            keys = os.read(fd, READ_BYTES)
        except OSError:  # the terminal is gone
            keys = b""
        into.put_nowait(keys or None)
        if not keys:
            loop.remove_reader(fd)

    loop.add_reader(fd, read)
    try:
        yield
    finally:
        loop.remove_reader(fd)
