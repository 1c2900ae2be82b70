"""Answers the supervisor's socket. Thin: every call goes to the table of units or the descriptor store.

One event loop, no threads. A client that does not read its answers is disconnected; it asks again.
"""

import asyncio
import fcntl
import logging
import os
import resource
import socket
from pathlib import Path

from nahtlos.model.errors import Conflict, Error, ErrorRecord
from nahtlos.physical.supervisor.descriptors import DescriptorStore
from nahtlos.physical.supervisor.journal import Journal
from nahtlos.physical.supervisor.keeper import KeeperProcess
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
    request_decoder,
    send_packet,
)
from nahtlos.physical.supervisor.units import UnitTable, lock_path

BUFFER = 1 << 20
log = logging.getLogger(__name__)


class SupervisorServer:
    def __init__(self, path: Path, state_dir: Path) -> None:
        journal = Journal(state_dir)
        self._path = path
        self._store = DescriptorStore(journal)
        self._units = UnitTable(journal, self._store, str(state_dir.resolve()))
        self._keeper = KeeperProcess(state_dir)

    async def serve(self) -> None:
        """Adopt what runs, then answer until cancelled. Units run on when it ends."""
        self._units.adopt()
        self._store.recover(self._units.holders())
        self._units.resume()
        loop = asyncio.get_running_loop()
        with _listening(self._path) as listener:
            async with asyncio.TaskGroup() as clients:
                while True:
                    sock, _ = await loop.sock_accept(listener)
                    clients.create_task(self._client(sock))

    async def _client(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        loop = asyncio.get_running_loop()
        with sock:
            async with asyncio.TaskGroup() as calls:
                while True:
                    await _readable(loop, sock)
                    try:
                        data, fds = receive_packet(sock)
                    except BlockingIOError:
                        continue
                    except OSError:
                        break
                    if not data:
                        break
                    calls.create_task(self._answer(sock, data, fds))

    async def _answer(self, sock: socket.socket, data: bytes, fds: list[int]) -> None:
        try:
            request = request_decoder.decode(data)
            reply, answered = await self._reply(request, fds)
            send_packet(sock, reply, answered)
        except (OSError, ValueError) as error:
            log.warning("client disconnected: %s", error)
            if sock.fileno() >= 0:
                sock.shutdown(socket.SHUT_RDWR)
        finally:
            close_all(fds)

    async def _reply(self, request: Request, fds: list[int]) -> tuple[Reply, tuple[int, ...]]:
        try:
            return await self._call(request.id, request.call, fds)
        except Error as error:
            return Reply(id=request.id, error=ErrorRecord.of(error)), ()
        except OSError as error:
            log.exception("call %s failed", type(request.call).__name__)
            return Reply(id=request.id, error=ErrorRecord(kind="unavailable", message=str(error))), ()

    async def _call(self, number: int, call: Call, fds: list[int]) -> tuple[Reply, tuple[int, ...]]:
        match call:
            case Start(unit):
                status = await self._units.start(unit)
                return Reply(id=number, units={status.name: status}), ()
            case Stop(name, grace):
                await self._units.stop(name, grace)
            case Arm(deadline, leased):
                if deadline is not None:
                    await self._keeper.ensure()
                self._units.arm(deadline, leased)
            case ListUnits():
                return Reply(id=number, units=self._units.statuses()), ()
            case ListenTcp(name, address, port):
                return Reply(id=number, port=self._store.listen_tcp(name, address, port)), ()
            case ListenUnix(name, path, mode):
                self._store.listen_unix(name, path, mode)
            case StoreFd(name):
                if len(fds) != 1:
                    raise Conflict("one descriptor must come with it", field="fd")
                self._store.put(name, fds[0])
            case FetchFd(name):
                fd = self._store.get(name)
                return Reply(id=number), () if fd is None else (fd,)
            case DropFd(name):
                self._store.drop(name)
            case ListStored():
                return Reply(id=number, names=self._store.names()), ()
        return Reply(id=number), ()


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """asyncio cannot receive descriptors: wait here, receive with recvmsg."""
    ready = loop.create_future()
    loop.add_reader(sock, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _listening(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def run_supervisor(path: Path, state_dir: Path) -> None:
    """Serve until the process is ended. Conflict if another supervisor serves `state_dir`."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with lock_path(state_dir).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"a supervisor serves {state_dir} already", field="state") from None
        asyncio.run(SupervisorServer(path.resolve(), state_dir).serve())
