"""The displays of an agent's servers that somebody looks at: connections to their VMMs, bytes asked for and
given.

In memory only: whoever looks opens another one when this agent was started again, or the server has moved.
"""

import asyncio
import itertools
from dataclasses import dataclass

from nahtlos.model.errors import Conflict, Error, NotFound, Refused
from nahtlos.model.ids import ServerId
from nahtlos.physical.agent.consoles.pace import Pace
from nahtlos.physical.agent.consoles.serial import owned
from nahtlos.physical.agent.context import Context
from nahtlos.physical.ports import DisplayLine, VmmId
from nahtlos.wire.displays import (
    DisplayClose,
    DisplayData,
    DisplayOpen,
    DisplayOpened,
    DisplayRead,
    DisplayWrite,
)
from nahtlos.wire.messages import Done, Message

OPEN_AT_MOST = 32
READ_AT_MOST = 256 << 10
WAIT_AT_MOST = 20.0
UNREAD_SECONDS = 30.0
LOOK_SECONDS = 5.0
RATE = 16 << 20
BURST = 8 << 20
"""Bytes a second, and at once, that all displays of a host may send."""

ForDisplay = DisplayOpen | DisplayRead | DisplayWrite | DisplayClose


@dataclass(eq=False)
class _Open:
    server: ServerId
    epoch: int
    line: DisplayLine
    read_at: float
    waiting: int = 0


class Displays:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._open: dict[str, _Open] = {}
        self._numbers = itertools.count(1)
        self._pace = Pace(RATE, BURST)

    async def run(self) -> None:
        """Until cancelled: closes what nobody reads."""
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                now = asyncio.get_running_loop().time()
                for name, each in tuple(self._open.items()):
                    if not each.waiting and now - each.read_at > UNREAD_SECONDS:
                        await self._close(name)
        finally:
            for name in tuple(self._open):
                await self._close(name)

    async def answer(self, body: ForDisplay) -> Message:
        match body:
            case DisplayOpen():
                return await self._begin(body.server)
            case DisplayRead():
                return await self._read(body)
            case DisplayWrite():
                await self._known(body.display).line.write(body.data)
            case DisplayClose():
                await self._close(body.display)
        return Done()

    async def _begin(self, server: ServerId) -> DisplayOpened:
        held = owned(self._context, server)
        if not held.server.spec.display:
            raise Refused(
                f"{server} has no display",
                field="server",
                remedy="its hardware cannot be changed: create a server with --display",
            )
        if len(self._open) >= OPEN_AT_MOST:
            raise Conflict(
                f"{len(self._open)} displays of {self._context.settings.host} are looked at",
                field="server",
                remedy="close one of them",
            )
        line = await self._context.drivers.hypervisor.display_open(VmmId(server, held.epoch))
        now = asyncio.get_running_loop().time()
        name = f"{int(self._context.now() * 1000):x}.{next(self._numbers)}"
        self._open[name] = _Open(server=server, epoch=held.epoch, line=line, read_at=now)
        return DisplayOpened(display=name)

    async def _read(self, body: DisplayRead) -> DisplayData:
        each, loop = self._known(body.display), asyncio.get_running_loop()
        each.waiting += 1
        try:
            async with asyncio.timeout(min(body.wait, WAIT_AT_MOST)):
                data = await each.line.read(max(1, min(body.limit, READ_AT_MOST)))
        except TimeoutError:
            return DisplayData(data=b"", ended=not self._here(each))
        finally:
            each.waiting -= 1
            each.read_at = loop.time()
        if not data:
            await self._close(body.display)
            return DisplayData(data=b"", ended=True)
        await asyncio.sleep(self._pace.take(len(data), loop.time()))
        return DisplayData(data=data)

    def _here(self, each: _Open) -> bool:
        """A VMM that has given its server away may still be there for a moment."""
        try:
            return owned(self._context, each.server).epoch == each.epoch
        except NotFound:
            return False

    def _known(self, display: str) -> _Open:
        if display not in self._open:
            raise NotFound(f"no display {display} is open here", field="display", remedy="open it again")
        return self._open[display]

    async def _close(self, display: str) -> None:
        each = self._open.pop(display, None)
        if each is not None:
            try:
                await each.line.close()
            except Error:
                return
