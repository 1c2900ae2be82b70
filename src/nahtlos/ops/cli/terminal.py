"""A server's serial console on the operator's terminal, both ways, until Ctrl-] is typed.

Owns the terminal's mode while it is attached and puts it back whatever happens.
"""

import asyncio
import contextlib
import os
import termios
import tty
from collections.abc import Generator

from nahtlos.model.errors import Error, Refused
from nahtlos.model.ids import ServerId
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.console_line import ConsoleLine

LEAVE = b"\x1d"
"""Ctrl-], as telnet has it."""
READ_BYTES = 4096
LEAVE_SECONDS = 2.0
"""That what was typed before is granted to arrive."""


async def attach(
    client: OperatorClient,
    server: ServerId,
    fd_in: int,
    fd_out: int,
    *,
    write: bool = True,
    force: bool = False,
) -> None:
    """Returns when Ctrl-] was typed. Refused if `fd_in` is no terminal or there is no such server; an
    orchestrator that is away is waited for."""
    if not os.isatty(fd_in):
        raise Refused("standard input is no terminal", field="interactive", remedy="use --follow or --send")
    typed: asyncio.Queue[bytes | None] = asyncio.Queue()
    line = ConsoleLine(
        client,
        server,
        write=write,
        force=force,
        show=lambda data: _write(fd_out, data),
        note=lambda text: _write(fd_out, f"\r\n[{text}]\r\n".encode()),
    )
    with _raw(fd_in), _typing(fd_in, typed):
        try:
            async with asyncio.TaskGroup() as group:
                shows = group.create_task(line.run())
                await _type(line, typed)
                shows.cancel()
        except* Error as errors:
            raise errors.exceptions[0] from None


async def _type(line: ConsoleLine, typed: asyncio.Queue[bytes | None]) -> None:
    while (keys := await typed.get()) is not None:
        before, leave, _ = keys.partition(LEAVE)
        if before:
            line.type(before)
        if leave:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_SECONDS):
                    await line.drained()
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
