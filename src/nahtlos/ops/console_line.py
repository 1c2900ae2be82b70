"""A client's end of a serial console: connects again whenever the connection breaks, and goes on where it
was.

    connected --broken, Unavailable--> waiting --> connected      connected --Refused--> over

Owns how far was shown and what was typed and not sent. Shows nothing twice and leaves nothing out without
saying so. Of what was sent and not answered when the connection broke nobody knows whether the guest got it:
it is not sent again, and that is said.
"""

import asyncio
import secrets
from collections.abc import Callable

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from nahtlos.model.errors import Error, Unavailable
from nahtlos.model.ids import ServerId
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.console_frames import (
    INPUT_BYTES,
    Failed,
    FromServer,
    Input,
    Mode,
    Output,
    Typed,
    decode_from_server,
    encode,
)
from nahtlos.runtime.controllers.consoles import ConsolePlace

AGAIN_SECONDS = 0.2
AGAIN_AT_MOST = 2.0
LOOK_SECONDS = 0.02
PENDING_BYTES = 64 << 10
"""That may wait to be sent."""


class ConsoleLine:
    """`show` gets what the server says, in order; `note` remarks in words."""

    def __init__(
        self,
        client: OperatorClient,
        server: ServerId,
        *,
        place: ConsolePlace | None = None,
        write: bool = False,
        force: bool = False,
        show: Callable[[bytes], None],
        note: Callable[[str], None],
    ) -> None:
        self._client = client
        self._server = server
        self.place = place or ConsolePlace()
        self.writer = False
        self._write = write
        self._force = force
        self._session = secrets.token_hex(8)
        self._show = show
        self._note = note
        self._pending = bytearray()
        self._typed = asyncio.Event()
        self._number = 0
        self._answered: asyncio.Future[Typed] | None = None

    def type(self, data: bytes) -> None:
        if len(self._pending) + len(data) > PENDING_BYTES:
            self._note("what was typed last is left out: the server takes no more")
            return
        self._pending += data
        self._typed.set()

    async def drained(self) -> None:
        """Everything typed was answered."""
        while self._pending or self._answered is not None:
            await asyncio.sleep(LOOK_SECONDS)

    async def run(self) -> None:
        """Until cancelled. Raises what the orchestrator refuses: NotFound once the server is gone."""
        pause = AGAIN_SECONDS
        while True:
            before = self.place
            try:
                await self._connected()
            except Unavailable as error:
                if pause == AGAIN_SECONDS:
                    self._note(f"waiting: {error.message}")
            pause = AGAIN_SECONDS if self.place != before else min(AGAIN_AT_MOST, pause * 2)
            await asyncio.sleep(pause)

    async def _connected(self) -> None:
        socket = await self._client.console_stream(
            self._server,
            history=self.place.history,
            offset=self.place.offset,
            write=self._write,
            force=self._force,
            session=self._session,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(socket))
                tasks.create_task(self._send(socket))
        except* Error as group:
            raise _first(group) from None
        except* ConnectionClosed:
            pass
        finally:
            self._force = False  # taken over once; whoever takes it back later is not fought
            if self._answered is not None:
                self._answered = None
                self._note("the connection broke: what was typed last may not have arrived")
            await socket.close()

    async def _receive(self, socket: ClientConnection) -> None:
        while True:
            self._take(decode_from_server(await socket.recv(decode=False)))

    def _take(self, frame: FromServer) -> None:
        match frame:
            case Output():
                self._take_output(frame)
            case Mode():
                self.writer = frame.writer
                if self._write and not frame.writer:
                    self._note("somebody else types here: you only read (--force takes it over)")
            case Typed():
                if self._answered is not None and not self._answered.done():
                    self._answered.set_result(frame)
            case Failed():
                raise frame.error.raised()

    def _take_output(self, frame: Output) -> None:
        if frame.dropped is None:
            self._note("what was said before could not come along: this begins anew")
        elif frame.dropped:
            self._note(f"{frame.dropped} bytes are not kept any more")
        self.place = ConsolePlace(history=frame.history, offset=frame.offset + len(frame.data))
        self._show(frame.data)

    async def _send(self, socket: ClientConnection) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._pending:
                self._typed.clear()
                await self._typed.wait()
            data = bytes(self._pending[:INPUT_BYTES])
            self._number += 1
            self._answered = loop.create_future()
            del self._pending[: len(data)]
            await socket.send(encode(Input(number=self._number, data=data)).decode())
            answer = await self._answered
            self._answered = None
            if answer.error is not None:
                self._note(f"not typed: {answer.error.message}")


def _first(group: BaseExceptionGroup[Error]) -> Error:
    first = group.exceptions[0]
    return first if isinstance(first, Error) else _first(first)
