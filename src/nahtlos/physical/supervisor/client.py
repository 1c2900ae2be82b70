"""`physical.ports.Supervisor` over the supervisor's socket.

Connects when first used and again whenever the connection is lost; until its deadline a call that was
lost with a connection is repeated, which every call of the protocol allows. Owns no state.
"""

import asyncio
import socket
from pathlib import Path

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.physical.ports import Unit, UnitStatus
from nahtlos.physical.supervisor.leases import boot_clock
from nahtlos.physical.supervisor.protocol import (
    Arm,
    Call,
    DropFd,
    FetchFd,
    ListenTcp,
    ListenUnix,
    ListStored,
    ListUnits,
    Reply,
    Request,
    Start,
    Stop,
    StoreFd,
    close_all,
    receive_packet,
    reply_decoder,
    send_packet,
)

DEADLINE = 10.0
RETRY = 0.05
Answer = tuple[Reply, list[int]]


class _Lost(Exception):
    """The connection ended; what was asked may or may not have been done."""


class _Connection:
    """One connection, used by one event loop. No task: the loop calls `_receive` when bytes are there."""

    def __init__(self, path: Path) -> None:
        self.loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.setblocking(False)
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise _Lost(str(error)) from error
        self.loop.add_reader(self._socket, self._receive)

    @property
    def open(self) -> bool:
        return self._socket.fileno() >= 0

    async def ask(self, call: Call, fds: tuple[int, ...]) -> Answer:
        self._number += 1
        number = self._number
        answer: asyncio.Future[Answer] = self.loop.create_future()
        self._waiting[number] = answer
        try:
            try:
                send_packet(self._socket, Request(id=number, call=call), fds)
            except OSError as error:
                self.close()
                raise _Lost(str(error)) from error
            return await answer
        finally:
            self._waiting.pop(number, None)

    def _receive(self) -> None:
        try:
            data, fds = receive_packet(self._socket)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self.close()
            return
        reply = reply_decoder.decode(data)
        waiting = self._waiting.get(reply.id)
        if waiting is None or waiting.done():
            close_all(fds)  # whoever asked has given up
        else:
            waiting.set_result((reply, fds))

    def close(self) -> None:
        if not self.open:
            return
        if not self.loop.is_closed():
            self.loop.remove_reader(self._socket)
        self._socket.close()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_Lost("the supervisor closed the connection"))


class SupervisorClient:
    def __init__(self, socket: Path) -> None:
        self._path = socket
        self._connection: _Connection | None = None

    def close(self) -> None:
        """Optional; also what ends a connection of an event loop that is gone."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def start(self, unit: Unit) -> UnitStatus:
        reply, _ = await self._ask(Start(unit))
        return reply.units[unit.name]

    async def stop(self, name: str, *, grace: float = 5.0) -> None:
        await self._ask(Stop(name, grace), deadline=grace + 2 * DEADLINE)

    async def units(self) -> dict[str, UnitStatus]:
        reply, _ = await self._ask(ListUnits())
        return reply.units

    async def arm(self, deadline: float | None, leased: dict[str, bool]) -> None:
        await self._ask(Arm(deadline, leased))

    def clock(self) -> float:
        return boot_clock()

    async def listen_tcp(self, name: str, address: str, port: int) -> int:
        reply, _ = await self._ask(ListenTcp(name, address, port))
        return reply.port

    async def listen_unix(self, name: str, path: Path, *, mode: int) -> None:
        await self._ask(ListenUnix(name, path, mode))

    async def store_fd(self, name: str, fd: int) -> None:
        await self._ask(StoreFd(name), (fd,))

    async def fetch_fd(self, name: str) -> int | None:
        _, fds = await self._ask(FetchFd(name))
        return fds[0] if fds else None

    async def drop_fd(self, name: str) -> None:
        await self._ask(DropFd(name))

    async def stored(self) -> frozenset[str]:
        reply, _ = await self._ask(ListStored())
        return frozenset(reply.names)

    async def _ask(self, call: Call, fds: tuple[int, ...] = (), deadline: float = DEADLINE) -> Answer:
        try:
            async with asyncio.timeout(deadline):
                reply, received = await self._until_answered(call, fds)
        except TimeoutError:
            raise Unavailable(
                f"the supervisor at {self._path} did not answer within {deadline:g} s",
                remedy="see that its process runs",
            ) from None
        if reply.error is not None:
            close_all(received)
            raise reply.error.raised()
        if isinstance(call, FetchFd) or not received:
            return reply, received
        close_all(received)
        raise Refused("the supervisor sent a descriptor that was not asked for")

    async def _until_answered(self, call: Call, fds: tuple[int, ...]) -> Answer:
        while True:
            try:
                return await self._connected().ask(call, fds)
            except _Lost:
                await asyncio.sleep(RETRY)

    def _connected(self) -> _Connection:
        connection = self._connection
        if connection is None or not connection.open or connection.loop is not asyncio.get_running_loop():
            self.close()
            connection = self._connection = _Connection(self._path)
        return connection
