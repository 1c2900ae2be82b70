"""A guest is written out whole, memory and devices, and read in again: QEMU's own stream over a socket of
this host, so that every release can do it. Knows one VMM at a time and nothing of where the bytes are kept.

Of a guest that runs the stream goes round, over what was written since, and ends once it stands still: QEMU
is given no time for a switch of its own (`downtime-limit`), so it stops none that still writes.

Nothing of the memory is left out: the files it is mapped from end with the process.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.hypervisor import migration
from nahtlos.physical.hypervisor.vmm import Vmm

PIECE = 1 << 20
"""Bytes read or written at once."""
QUIET_SECONDS = 60.0
"""The longest that nothing comes, or nothing is taken."""
OPEN_WITHIN = 10.0
NO_TIME = 0
"""Milliseconds; a move sets its own."""
PLAIN = frozenset({"events"})
ENDED = ("completed", "failed", "cancelled")

Sink = Callable[[bytes], Awaitable[None]]


def _socket(vmm: Vmm, name: str) -> Path:
    return vmm.paths.stream.with_suffix(f".{name}")


async def save(vmm: Vmm, sink: Sink) -> None:
    """Everything goes to `sink`, in order. Refused if QEMU would not; what `sink` raises is raised."""
    path = _socket(vmm, "saving")
    path.unlink(missing_ok=True)
    taken: asyncio.Future[asyncio.StreamReader] = asyncio.get_running_loop().create_future()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        if not taken.done():
            taken.set_result(reader)

    server = await asyncio.start_unix_server(accept, str(path), limit=4 * PIECE)
    try:
        await migration.set_capabilities(vmm, PLAIN)
        await vmm.execute(
            "migrate-set-parameters",
            {"max-bandwidth": migration.UNLIMITED, "downtime-limit": NO_TIME, **migration.NO_TLS},
        )
        vmm.ready_whole = False
        vmm.stream_word = ""
        await vmm.execute("migrate", {"uri": f"unix:{path}"})
        async with asyncio.timeout(OPEN_WITHIN):
            reader = await taken
        await _drain(reader, sink)
        await _completed(vmm)
    except TimeoutError:
        raise Unavailable(f"{vmm.id.unit} sends nothing of its memory") from None
    finally:
        for writer in writers:
            writer.close()
        server.close()
        path.unlink(missing_ok=True)
        with suppress(Exception):
            await migration.cancel(vmm)


async def _drain(reader: asyncio.StreamReader, sink: Sink) -> None:
    while True:
        async with asyncio.timeout(QUIET_SECONDS):
            piece = await reader.read(PIECE)
        if not piece:
            return
        await sink(piece)


async def _completed(vmm: Vmm) -> None:
    """It has said by itself that all of it was sent: the end of a stream alone could be a broken one."""
    until = time.monotonic() + OPEN_WITHIN
    while True:
        answer = await vmm.execute("query-migrate")
        word = str(answer.get("status", ""))
        if word == "completed":
            return
        if word in ENDED:
            raise Refused(f"not all of {vmm.id.unit} was sent: {answer.get('error-desc') or word}")
        if time.monotonic() > until:
            raise Unavailable(f"{vmm.id.unit} does not say whether all of it was sent")
        await vmm.event_within(0.05)


async def load(vmm: Vmm, pieces: AsyncIterator[bytes]) -> None:
    """Into a VMM that waits (`inmigrate`). Whether it has arrived is asked of the VMM afterwards."""
    path = _socket(vmm, "loading")
    path.unlink(missing_ok=True)
    await migration.set_capabilities(vmm, PLAIN)
    await vmm.execute("migrate-set-parameters", dict(migration.NO_TLS))
    await vmm.execute("migrate-incoming", {"uri": f"unix:{path}"})
    try:
        async with asyncio.timeout(OPEN_WITHIN):
            _, writer = await asyncio.open_unix_connection(str(path))
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"{vmm.id.unit} does not take what was saved: {error}") from error
    try:
        async for piece in pieces:
            writer.write(piece)
            async with asyncio.timeout(QUIET_SECONDS):
                await writer.drain()
    except (OSError, TimeoutError) as error:
        raise Refused(f"{vmm.id.unit} does not take what was saved: {vmm.log_tail() or error}") from error
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        path.unlink(missing_ok=True)
