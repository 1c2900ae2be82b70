"""A server's display for any VNC viewer on this machine: a port or a unix socket of its own, for one viewer.

    viewer --RFB, password--> here --WebSocket--> orchestrator --> agent --> VMM

The viewer's connection stays for as long as the viewer wants; the other one is made again whenever it ends:
the server moved or was replaced, its agent or the orchestrator was restarted. `rfb_splice` is what makes
one picture of it. A port of 127.0.0.1 is open to every user of this machine, so it asks for a password that
is made for this one viewer; a unix socket is for its owner alone.
"""

import asyncio
import os
import secrets
import string
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.console_frames import Failed, decode_from_server
from nahtlos.ops.rfb_handshakes import CHALLENGE_BYTES, PASSWORD_BYTES, WithViewer
from nahtlos.ops.rfb_splice import Splice

ADDRESS = "127.0.0.1"
READ_BYTES = 64 << 10
AGAIN_SECONDS = 0.1
AGAIN_AT_MOST = 2.0
HANDSHAKE_SECONDS = 20.0
WRONG_PASSWORDS = 5
WRONG_SECONDS = 1.0


def new_password() -> str:
    letters = string.ascii_letters + string.digits
    return "".join(secrets.choice(letters) for _ in range(PASSWORD_BYTES))


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    """Where the viewer is to connect to."""

    port: int = 0
    path: str = ""
    password: str = ""
    """Empty: none is asked for."""


class _Gone(Exception):
    """The viewer has left."""


class _Stale(Exception):
    """The connection to the display is to be replaced."""


class Gateway:
    """`note` remarks in words. One viewer at a time; `served` is set once one that was let in has left."""

    def __init__(
        self, client: OperatorClient, server: ServerId, password: str | None, note: Callable[[str], None]
    ) -> None:
        self._client = client
        self._server = server
        self._password = password
        self._note = note
        self._taken = False
        self._wrong = 0
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when a viewer has left; failed when none can be served."""

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._taken or self.over.done():
            writer.close()
            return
        self._taken = True
        try:
            await self._serve(reader, writer)
        except _Gone:
            pass
        except Error as error:
            self._end(error)
        except Exception as error:
            self._end(Unavailable(f"the viewer cannot be served: {error!r}", field="viewer"))
        finally:
            self._taken = False
            writer.close()

    def _end(self, error: Error | None) -> None:
        if self.over.done():
            return
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun = await self._let_in(reader, writer)
        self._note("a viewer is connected")
        viewer = _Viewer(self._client, self._server, reader, writer, self._note)
        try:
            await viewer.run(begun)
        finally:
            self._note("the viewer has left")
        self._end(None)

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """What the viewer has said after its handshake."""
        handshake = WithViewer(self._password, secrets.token_bytes(CHALLENGE_BYTES))
        writer.write(handshake.begin)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                while not handshake.done and not handshake.refused:
                    data = await reader.read(READ_BYTES)
                    if not data:
                        raise _Gone
                    writer.write(handshake.feed(data))
                    await writer.drain()
        except (TimeoutError, OSError):
            raise _Gone from None
        except Refused as error:
            self._note(error.message)
            raise _Gone from None
        if handshake.refused:
            await self._count_wrong()
        return handshake.rest

    async def _count_wrong(self) -> None:
        self._wrong += 1
        self._note("a viewer gave a wrong password")
        if self._wrong >= WRONG_PASSWORDS:
            raise Refused(
                f"{WRONG_PASSWORDS} wrong passwords", field="password", remedy="run the command again"
            )
        await asyncio.sleep(WRONG_SECONDS)
        raise _Gone


class _Viewer:
    """One viewer that was let in, and the displays it is shown one after another."""

    def __init__(
        self,
        client: OperatorClient,
        server: ServerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        note: Callable[[str], None],
    ) -> None:
        self._client = client
        self._server = server
        self._reader = reader
        self._writer = writer
        self._note = note
        self._splice = Splice()
        self._was_ready = False
        self._changed = asyncio.Event()
        """There is something for the display, or it is stale."""

    async def run(self, begun: bytes) -> None:
        """Returns when the viewer has left. Refused if there is no display, or none for this viewer."""
        self._splice.from_viewer(begun)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._listen())
                tasks.create_task(self._displays())
        except* _Gone:
            pass
        except* Error as errors:
            raise errors.exceptions[0] from None

    async def _listen(self) -> None:
        while True:
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError:
                data = b""
            if not data:
                raise _Gone
            self._splice.from_viewer(data)
            self._changed.set()
            await self._flush()

    async def _flush(self) -> None:
        data = bytes(self._splice.to_viewer)
        self._splice.to_viewer.clear()
        if self._splice.ended:
            raise Refused(self._splice.ended, field="viewer", remedy="connect it again")
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            raise _Gone from None

    async def _displays(self) -> None:
        pause = AGAIN_SECONDS
        while True:
            try:
                was_ready = await self._display()
            except Unavailable as error:
                self._note(f"waiting: {error.message}")
                was_ready = False
            self._splice.display_lost()
            pause = AGAIN_SECONDS if was_ready else min(AGAIN_AT_MOST, pause * 2)
            await asyncio.sleep(pause)

    async def _display(self) -> bool:
        """One connection to the display, until it ends. Whether it was one."""
        socket = await self._client.display_stream(self._server)
        self._splice.display_opened()
        self._was_ready = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(socket))
                tasks.create_task(self._send(socket))
        except* (ConnectionClosed, _Stale):
            pass
        except* Error as errors:
            raise errors.exceptions[0] from None
        finally:
            await socket.close()
        return self._was_ready

    async def _receive(self, socket: ClientConnection) -> None:
        while True:
            data = await socket.recv()
            if isinstance(data, str):
                _raise_failure(data)
                continue
            self._splice.from_display(data)
            self._was_ready = self._was_ready or self._splice.ready
            self._changed.set()
            await self._flush()

    async def _send(self, socket: ClientConnection) -> None:
        while not self._splice.stale:
            data = bytes(self._splice.to_display)
            self._splice.to_display.clear()
            if data:
                await socket.send(data)
            else:
                self._changed.clear()
                await self._changed.wait()
        raise _Stale


def _raise_failure(text: str) -> None:
    failed = decode_from_server(text)
    if isinstance(failed, Failed):
        raise failed.error.raised()


@asynccontextmanager
async def listening(
    gateway: Gateway, *, path: Path | None, port: int, password: str | None
) -> AsyncGenerator[Listening]:
    """Unavailable if the place is taken."""
    where = f"{ADDRESS}:{port}" if path is None else str(path)
    mask = os.umask(0o177)
    try:
        if path is None:
            server = await asyncio.start_server(gateway.accept, ADDRESS, port)
        else:
            server = await asyncio.start_unix_server(gateway.accept, str(path))
    except OSError as error:
        raise Unavailable(f"cannot listen at {where}: {error}", field="port") from error
    finally:
        os.umask(mask)
    try:
        yield Listening(
            port=0 if path else server.sockets[0].getsockname()[1],
            path=str(path or ""),
            password=password or "",
        )
    finally:
        server.close()
        if path is not None:
            path.unlink(missing_ok=True)
