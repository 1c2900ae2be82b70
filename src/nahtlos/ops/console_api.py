"""Consoles over WebSockets of the operator API: see `console_frames` for what is said on them.

Whoever reads slowly is sent no more than it takes: output is asked for from the server's host only when the
last has gone out. Who may call is found out before the connection is accepted, as for other verbs.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, WebSocket
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from nahtlos.model.errors import Error, ErrorRecord, Refused, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.ops.console_frames import (
    AGAIN,
    INPUT_BYTES,
    REFUSED,
    Failed,
    Input,
    Mode,
    Output,
    Typed,
    decode_input,
    encode,
)
from nahtlos.runtime.controllers.consoles import ConsolePlace, Consoles

_log = logging.getLogger("nahtlos.ops.console")


class _Over(Exception):
    """Ends a connection's tasks."""


class ConsoleRoutes:
    """`authenticate`: the name of the operator who is proven, None for nobody."""

    def __init__(
        self,
        consoles: Callable[[], Consoles],
        authenticate: Callable[[HTTPConnection], Awaitable[str | None]],
    ) -> None:
        self._consoles = consoles
        self._authenticate = authenticate

    def add(self, routes: APIRouter) -> None:
        @routes.websocket("/servers/{server}/console/stream")
        async def stream(  # pyright: ignore[reportUnusedFunction]
            socket: WebSocket,
            server: str,
            history: str = "",
            offset: Annotated[int, Query(ge=0)] = 0,
            session: str = "",
            write: bool = False,
            force: bool = False,
        ) -> None:
            name = await self._accepted(socket)
            if name is None:
                return
            if write:
                _log.info("%s types into %s: session %s", name, server, session or "without a name")
            place = ConsolePlace(history=history, offset=offset)
            serial = _Serial(socket, self._consoles(), ServerId(server), session)
            await _until_over(socket, serial.run(place, write=write, force=force))

        @routes.websocket("/servers/{server}/display")
        async def display(  # pyright: ignore[reportUnusedFunction]
            socket: WebSocket, server: str
        ) -> None:
            """RFB in binary messages, as the server's VMM speaks it: closed (1013) when the server has moved
            or was replaced, to be opened again. What is refused is said in a text message."""
            name = await self._accepted(socket)
            if name is None:
                return
            _log.info("%s looks at the display of %s", name, server)
            await _until_over(socket, _shown(socket, self._consoles(), ServerId(server)))

    async def _accepted(self, socket: WebSocket) -> str | None:
        name = await self._authenticate(socket)
        if name is None:
            await socket.close()  # before it is accepted: HTTP 403
            return None
        await socket.accept()
        return name


class _Serial:
    """One client at one serial console."""

    def __init__(self, socket: WebSocket, consoles: Consoles, server: ServerId, session: str) -> None:
        self._socket = socket
        self._consoles = consoles
        self._server = server
        self._session = session

    async def run(self, place: ConsolePlace, *, write: bool, force: bool) -> None:
        if write and not self._session:
            raise Refused("who types names its session", field="session", remedy="any text of its own")
        writer = write and self._consoles.claim(self._server, self._session, force=force)
        await self._send(Mode(writer=writer))
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._show(place))
                tasks.create_task(self._listen())
        finally:
            if writer:
                self._consoles.release(self._server, self._session)

    async def _show(self, place: ConsolePlace) -> None:
        async with contextlib.aclosing(self._consoles.follow(self._server, place)) as parts:
            async for part in parts:
                await self._send(
                    Output(history=part.history, offset=part.offset, data=part.data, dropped=part.dropped)
                )

    async def _listen(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise _Over
            asked = _input(message.get("bytes") or (message.get("text") or "").encode())
            await self._send(Typed(number=asked.number, error=await self._typed(asked.data)))

    async def _typed(self, data: bytes) -> ErrorRecord | None:
        try:
            await self._consoles.type(self._server, self._session, data)
        except Error as error:
            return ErrorRecord.of(error)
        return None

    async def _send(self, frame: msgspec.Struct) -> None:
        await self._socket.send_text(encode(frame).decode())


async def _shown(socket: WebSocket, consoles: Consoles, server: ServerId) -> None:
    display = await consoles.display(server)

    async def pictures() -> None:
        while data := await display.read():
            await socket.send_bytes(data)
        raise Unavailable("the display was closed", field="server", remedy="open it again")

    async def keys() -> None:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                raise _Over
            await display.write(message.get("bytes") or b"")

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(pictures())
            tasks.create_task(keys())
    finally:
        await display.close()


def _input(frame: bytes) -> Input:
    try:
        asked = decode_input(frame)
    except msgspec.DecodeError as error:
        raise Refused(f"not understood: {error}", field="input", remedy="see docs/consoles.md") from error
    if len(asked.data) > INPUT_BYTES:
        raise Refused(f"at most {INPUT_BYTES} bytes at once", field="data", remedy="type less at a time")
    return asked


async def _until_over(socket: WebSocket, work: Coroutine[Any, Any, None]) -> None:
    """`work`, until the client has gone; what is wrong is told to it, then the connection is closed."""
    try:
        try:
            await work
        except* (_Over, WebSocketDisconnect):
            pass
        except* Error as group:
            raise _first(group) from None
    except Error as error:
        code = AGAIN if isinstance(error, Unavailable) else REFUSED
        try:
            await socket.send_text(encode(Failed(error=ErrorRecord.of(error))).decode())
            await socket.close(code)
        except (RuntimeError, WebSocketDisconnect):
            return  # it has gone meanwhile


def _first(group: BaseExceptionGroup[Error]) -> Error:
    first = group.exceptions[0]
    return first if isinstance(first, Error) else _first(first)
