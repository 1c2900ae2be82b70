"""Where the operator API listens: a unix socket for root alone, and TLS for operators elsewhere.

Finds out what a connection proves (the user at the other end of the unix socket, the party in a verified
client certificate) and hands it to the API as `request.state.presented`. Never decides who is an operator.
"""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.runtime.identity import Presented
from nahtlos.wire.tls import party_of, server_context

BACKLOG = 128
KEEP_ALIVE = 30
SHUTDOWN_TIMEOUT = 1
"""Seconds that running requests, and event streams, are granted when the listener closes."""
START_TIMEOUT = 10.0
MAX_SOCKET_PATH = 107
MAX_WEBSOCKET_MESSAGE = 256 << 10
PING_INTERVAL = 10.0
PING_TIMEOUT = 20.0
"""A client at a console that is silent for so long is gone."""

_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


class TlsPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where to listen for operators elsewhere, as whom."""

    address: str
    port: int
    pki_dir: Path


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    tls_port: int | None


@asynccontextmanager
async def serving(
    app: FastAPI,
    *,
    unix_socket: Path | socket.socket | None = None,
    tls: TlsPlace | socket.socket | None = None,
    pki_dir: Path | None = None,
) -> AsyncGenerator[Listening]:
    """Serve `app` while the context is open. A socket instead of a place is an inherited listening one
    (over TLS it needs `pki_dir`). Unavailable if a place is taken."""
    sockets: list[tuple[socket.socket, ssl.SSLContext | None]] = []
    try:
        if unix_socket is not None:
            own = listen_unix(unix_socket) if isinstance(unix_socket, Path) else unix_socket
            sockets.append((own, None))
        if tls is not None:
            folder = tls.pki_dir if isinstance(tls, TlsPlace) else pki_dir
            assert folder is not None, "TLS needs a pki folder"
            context = server_context(folder, clients=ssl.CERT_OPTIONAL)
            sockets.append((listen_tcp(tls) if isinstance(tls, TlsPlace) else tls, context))
        tls_port = next((s.getsockname()[1] for s, context in sockets if context), None)
        async with asyncio.TaskGroup() as group:
            servers = [_Server(app, context) for _, context in sockets]
            running = [
                group.create_task(server.serve([listening]))
                for server, (listening, _) in zip(servers, sockets, strict=True)
            ]
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    await asyncio.gather(*(server.listens.wait() for server in servers))
                yield Listening(tls_port=tls_port)
            finally:
                for server in servers:
                    server.stop()
                # Here, as the group would cancel them when this task is: requests are to be ended in order.
                if running:
                    await asyncio.wait(running, timeout=SHUTDOWN_TIMEOUT + 1)
    finally:
        for listening, _ in sockets:
            listening.close()


def listen_unix(path: Path) -> socket.socket:
    """A listening socket that only root may connect to. What an earlier process left there goes."""
    if len(str(path)) > MAX_SOCKET_PATH:
        raise Refused(f"{path} is longer than {MAX_SOCKET_PATH} bytes", field="unix_socket")
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Made unreachable before it listens: between bind and chmod nobody can connect yet.
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise Unavailable(f"cannot listen at {path}: {error}", field="unix_socket") from error
    listening.setblocking(False)
    return listening


def listen_tcp(place: TlsPlace) -> socket.socket:
    try:
        listening = socket.create_server((place.address, place.port), backlog=BACKLOG)
    except OSError as error:
        raise Unavailable(f"cannot listen at {place.address}:{place.port}: {error}", field="port") from error
    listening.setblocking(False)
    return listening


class _Server(uvicorn.Server):
    """uvicorn inside a program that has its own signal handlers and its own sockets."""

    def __init__(self, app: FastAPI, tls: ssl.SSLContext | None) -> None:
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="websockets-sansio",
            ws_max_size=MAX_WEBSOCKET_MESSAGE,
            ws_ping_interval=PING_INTERVAL,
            ws_ping_timeout=PING_TIMEOUT,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
        config.load()
        config.ssl = tls
        super().__init__(config)
        self.listens = asyncio.Event()
        self._stops = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stops.set()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        # Not `super().serve`, which would take SIGINT and SIGTERM from the program it runs in.
        await self._serve(sockets)

    async def main_loop(self) -> None:
        # Not the library's, which wakes up ten times a second to see whether it shall stop.
        await self._stops.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()


class _Connection(H11Protocol):
    """Notes what a connection proves when it is made; every request on it carries that."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state: dict[str, Any] = {**self.app_state, "presented": _proven(transport)}


def _proven(transport: asyncio.Transport) -> Presented:
    tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    if tls is not None:
        return Presented(party=party_of(tls.getpeercert()))
    return Presented(peer_uid=_peer_uid(transport.get_extra_info("socket")))


def _peer_uid(connection: socket.socket) -> int | None:
    """The user at the other end, from the kernel; None where it cannot say."""
    if connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return _PEER_CREDENTIALS.unpack(credentials)[1]
