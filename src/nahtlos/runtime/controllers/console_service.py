"""`Consoles` over the agents' connections. Keeps nothing but who may type: every answer comes from the host
that runs the server, which is found anew when it is not there any more."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable

from nahtlos.model.errors import Conflict, Error, NotFound, Refused, Unavailable
from nahtlos.model.ids import HostId, ServerId
from nahtlos.runtime.controllers.agents import Agents
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.consoles import ConsoleOutput, ConsolePlace, Display
from nahtlos.wire.displays import (
    DisplayClose,
    DisplayData,
    DisplayOpen,
    DisplayOpened,
    DisplayRead,
    DisplayWrite,
)
from nahtlos.wire.messages import ConsoleData, ConsoleRead, ConsoleTaken, ConsoleWrite

WAIT_SECONDS = 10.0
ANSWER_SECONDS = 5.0
AGAIN_SECONDS = 0.1
"""Until a server that is not where it was is looked for again."""
LOG_SECONDS = 5.0
"""That a server which is just beginning, or moving, is waited for when only its log is asked for."""
TYPE_SECONDS = 10.0
"""That a server which is moved, or does not take what is typed, is waited for."""
LIMIT = 64 << 10
PIECE = 1024
DISPLAY_LIMIT = 128 << 10
FOLLOWERS = 64
"""Of one server."""


class ConsoleService:
    def __init__(self, agents: Agents, server_of: Callable[[ServerId], Awaitable[ServerView]]) -> None:
        self._agents = agents
        self._server_of = server_of
        self._writers: dict[ServerId, str] = {}
        self._followers: dict[ServerId, int] = {}

    # --- what it says --------------------------------------------------------------------------------

    async def log(self, server: ServerId) -> ConsoleOutput:
        until = asyncio.get_running_loop().time() + LOG_SECONDS
        parts = [await self._read_where_it_is(server, ConsolePlace(), until)]
        while len(parts[-1].data) > 0:
            last = parts[-1]
            part = await self._read_where_it_is(server, last.end, until)
            if part.history != last.history or part.offset != last.end.offset:
                break
            parts.append(part)
        data = b"".join(part.data for part in parts)
        return ConsoleOutput(history=parts[0].history, offset=parts[0].offset, data=data)

    async def follow(self, server: ServerId, place: ConsolePlace) -> AsyncGenerator[ConsoleOutput]:
        if self._followers.get(server, 0) >= FOLLOWERS:
            raise Conflict(f"{server} is followed by {FOLLOWERS}", field="server", remedy="end one of them")
        self._followers[server] = self._followers.get(server, 0) + 1
        try:
            host = await self._host_at_last(server)
            while True:
                try:
                    part = await self._read(host, server, place, WAIT_SECONDS)
                except Unavailable:
                    await asyncio.sleep(AGAIN_SECONDS)
                    host = await self._host_at_last(server, not_at=host)
                    continue
                _check_counts(part, host)
                if part.data or part.end != place:
                    place = part.end
                    yield part
        finally:
            self._followers[server] -= 1
            if not self._followers[server]:
                del self._followers[server]

    async def _read_where_it_is(self, server: ServerId, place: ConsolePlace, until: float) -> ConsoleOutput:
        """A server that is just beginning or moving is looked for again; Unavailable if it is not found."""
        while True:
            try:
                return await self._read(await self._host(server), server, place, 0.0)
            except Unavailable:
                if asyncio.get_running_loop().time() > until:
                    raise
            await asyncio.sleep(AGAIN_SECONDS)

    async def _read(self, host: HostId, server: ServerId, place: ConsolePlace, wait: float) -> ConsoleOutput:
        body = ConsoleRead(server=server, offset=place.offset, history=place.history, limit=LIMIT, wait=wait)
        try:
            answer = await self._agents.request(host, body, timeout=wait + ANSWER_SECONDS)
        except NotFound as error:  # it is not there yet, or not any more
            raise Unavailable(error.message, field="server", remedy="try again") from error
        if not isinstance(answer, ConsoleData):
            raise Unavailable(f"{host} gave no console data")
        offset = answer.next_offset - len(answer.data)
        return ConsoleOutput(
            history=answer.history,
            offset=offset,
            data=answer.data,
            dropped=_dropped(place, answer.history, offset),
        )

    # --- what is typed -------------------------------------------------------------------------------

    def claim(self, server: ServerId, session: str, *, force: bool) -> bool:
        if force or self._writers.get(server, session) == session:
            self._writers[server] = session
        return self._writers[server] == session

    def release(self, server: ServerId, session: str) -> None:
        if self._writers.get(server) == session:
            del self._writers[server]

    async def type(self, server: ServerId, session: str, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        until, taken = loop.time() + TYPE_SECONDS, 0
        while taken < len(data):
            if self._writers.get(server) != session:
                raise Conflict(
                    "another session types into this console",
                    field="session",
                    remedy="ask to type again, by force if need be",
                )
            count = await self._type(server, data[taken : taken + PIECE], until)
            taken += count
            if count:
                until = loop.time() + TYPE_SECONDS
            elif loop.time() > until:
                raise Unavailable(
                    f"{server} took {taken} of {len(data)} bytes",
                    field="data",
                    remedy="its guest reads its serial port no further",
                )
            else:
                await asyncio.sleep(AGAIN_SECONDS)

    async def _type(self, server: ServerId, piece: bytes, until: float) -> int:
        """Bytes taken. An agent that says nothing in time may have typed them: then they are not typed again,
        and Unavailable says so."""
        host = await self._host(server)
        try:
            body = ConsoleWrite(server=server, data=piece, counted=True)
            answer = await self._agents.request(host, body, timeout=TYPE_SECONDS)
        except NotFound:  # it is not there: nothing was typed
            return 0
        return answer.taken if isinstance(answer, ConsoleTaken) else len(piece)

    # --- what it shows -------------------------------------------------------------------------------

    async def display(self, server: ServerId) -> Display:
        host = await self._host(server)
        try:
            opened = await self._agents.request(host, DisplayOpen(server=server), timeout=ANSWER_SECONDS)
        except NotFound as error:  # it has just moved
            raise Unavailable(error.message, field="server", remedy="try again") from error
        except Refused as error:
            if error.field != "message":
                raise
            raise Refused(
                f"the agent of {host} is of an older release and shows no displays",
                field="host",
                remedy=f"upgrade the agent of {host}, or move {server} to a host whose agent is newer",
            ) from error
        if not isinstance(opened, DisplayOpened):
            raise Unavailable(f"{host} opened no display")
        return AgentDisplay(self._agents, host, opened.display)

    # --- where it is ---------------------------------------------------------------------------------

    async def _host(self, server: ServerId) -> HostId:
        view = await self._server_of(server)
        if view.host is None:
            raise Unavailable(f"{server} is nowhere yet", field="server", remedy="wait until it runs")
        return view.host

    async def _host_at_last(self, server: ServerId, *, not_at: HostId | None = None) -> HostId:
        """Waits for a server that is nowhere. One that has just left is asked for where it goes to: that host
        knows before it has reported it."""
        while True:
            view = await self._server_of(server)
            if view.moving_to is not None and view.host == not_at:
                return view.moving_to
            if view.host is not None:
                return view.host
            await asyncio.sleep(AGAIN_SECONDS)


class AgentDisplay:
    """`Display`, by questions to the agent of its host."""

    def __init__(self, agents: Agents, host: HostId, display: str) -> None:
        self._agents = agents
        self._host = host
        self._display = display

    async def read(self) -> bytes:
        ask = DisplayRead(display=self._display, wait=WAIT_SECONDS, limit=DISPLAY_LIMIT)
        while True:
            try:
                answer = await self._agents.request(self._host, ask, timeout=WAIT_SECONDS + ANSWER_SECONDS)
            except (NotFound, Unavailable):
                return b""
            if not isinstance(answer, DisplayData) or answer.ended:
                return b""
            if answer.data:
                return answer.data

    async def write(self, data: bytes) -> None:
        body = DisplayWrite(display=self._display, data=data)
        await self._agents.request(self._host, body, timeout=ANSWER_SECONDS)

    async def close(self) -> None:
        with contextlib.suppress(Error):
            await self._agents.request(
                self._host, DisplayClose(display=self._display), timeout=ANSWER_SECONDS
            )


def _dropped(place: ConsolePlace, history: str, offset: int) -> int | None:
    if place.history not in ("", history):
        return None
    return max(0, offset - place.offset) if place.history else 0


def _check_counts(part: ConsoleOutput, host: HostId) -> None:
    if not part.history:
        raise Refused(
            f"the agent of {host} is of an older release, whose consoles cannot be followed over moves",
            field="host",
            remedy=f"upgrade the agent of {host}; until then `server console --log` shows what is there",
        )
