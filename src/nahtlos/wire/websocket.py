"""The transport between machines: WebSocket frames over mutual TLS.

Owns sockets, deadlines and the mapping of everything that can break to ChannelClosed (an open channel) or
Unavailable (a channel that did not come about). A peer that falls silent is noticed by pings within
`PING_INTERVAL + PING_TIMEOUT` seconds. Never reconnects: who dialled decides.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.wire.tls import client_context, party_of, server_context
from nahtlos.wire.transport import Channel, ChannelClosed, OnChannel

MAX_FRAME = 16 << 20
"""Bytes; both sides refuse longer frames."""
PING_INTERVAL = 5.0
PING_TIMEOUT = 10.0
SEND_TIMEOUT = 20.0
"""Seconds a peer may leave our frames unread before it counts as gone."""
HANDSHAKE_TIMEOUT = 10.0
CLOSE_TIMEOUT = 1.0
POLICY_VIOLATION = 1008

_log = logging.getLogger("nahtlos.wire")
# The library tells of every connection and every broken one; that is ours to say.
_quiet = logging.getLogger("nahtlos.wire.library")
_quiet.setLevel(logging.ERROR)


class WebSocketChannel:
    """One open connection with a proven peer."""

    def __init__(self, connection: Connection, peer: str) -> None:
        self._connection = connection
        self._peer = peer
        self._stuck = False

    @property
    def peer(self) -> str:
        return self._peer

    async def send(self, frame: bytes) -> None:
        if len(frame) > MAX_FRAME:
            raise Refused(
                f"frame of {len(frame)} bytes, at most {MAX_FRAME}", field="message", remedy="send less"
            )
        if self._stuck:
            raise ChannelClosed(f"connection to {self._peer} was given up")
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                await self._connection.send(frame)
        except ConnectionClosed as error:
            raise self._closed(error) from error
        except TimeoutError as error:
            # Part of the frame may be out: nothing can be sent after it.
            self._stuck = True
            self._connection.transport.abort()
            raise self._closed(error) from error

    async def receive(self) -> bytes:
        try:
            return await self._connection.recv(decode=False)
        except ConnectionClosed as error:
            raise self._closed(error) from error

    async def close(self) -> None:
        await self._connection.close()

    def _closed(self, error: Exception) -> ChannelClosed:
        return ChannelClosed(f"connection to {self._peer}: {error or type(error).__name__}")


class WebSocketListener:
    def __init__(self, server: Server, serving: dict[asyncio.Task[object], None]) -> None:
        self._server = server
        self._serving = serving
        self.port = int(next(iter(server.sockets)).getsockname()[1])
        """Of use when any was asked for."""

    async def close(self) -> None:
        """Stop listening and close every channel that was accepted here. Whoever serves one and does not
        end with it is cancelled."""
        self._server.close()
        if self._serving:
            _, lingering = await asyncio.wait(tuple(self._serving), timeout=CLOSE_TIMEOUT)
            for task in lingering:
                task.cancel()
        await self._server.wait_closed()


class WebSocketTransport:
    """Speaks as the party whose certificate is in `pki_dir`."""

    def __init__(self, pki_dir: Path) -> None:
        self._client = client_context(pki_dir)
        self._server = server_context(pki_dir)

    async def dial(self, address: str, port: int, *, expect: str, timeout: float) -> Channel:
        where = f"{address}:{port}"
        try:
            async with asyncio.timeout(timeout):
                connection = await connect(
                    f"wss://{_host(address)}:{port}/",
                    ssl=self._client,
                    ssl_shutdown_timeout=CLOSE_TIMEOUT,
                    proxy=None,
                    compression=None,
                    user_agent_header=None,
                    max_size=MAX_FRAME,
                    open_timeout=None,
                    ping_interval=PING_INTERVAL,
                    ping_timeout=PING_TIMEOUT,
                    close_timeout=CLOSE_TIMEOUT,
                    logger=_quiet,
                )
        except TimeoutError as error:
            raise Unavailable(f"{expect} at {where} did not answer within {timeout:g} s") from error
        except (OSError, InvalidHandshake, InvalidMessage, EOFError, ConnectionClosed) as error:
            raise Unavailable(f"{expect} at {where} cannot be reached: {error}") from error
        peer = _peer_of(connection)
        if peer is None or peer != expect:
            await connection.close(POLICY_VIOLATION)
            raise Unavailable(
                f"{where} proved to be {peer or 'nobody known'}, not {expect}",
                field="address",
                remedy="check which host has this address",
            )
        _no_delay(connection)
        return WebSocketChannel(connection, peer)

    async def listen(
        self, address: str, port: int, on_channel: OnChannel, *, sock: socket.socket | None = None
    ) -> WebSocketListener:
        """Listen at (address, port), or on `sock`, a listening socket that was inherited.
        Unavailable if the address is taken."""

        serving: dict[asyncio.Task[object], None] = {}

        async def accepted(connection: ServerConnection) -> None:
            peer = _peer_of(connection)
            if peer is None:
                await connection.close(POLICY_VIOLATION, "certificate names no party")
                return
            _no_delay(connection)
            task = asyncio.current_task()
            assert task is not None
            serving[task] = None
            try:
                await on_channel(WebSocketChannel(connection, peer))
            except Exception:
                _log.exception("channel from %s", peer)
            except asyncio.CancelledError:
                connection.transport.abort()
                raise
            finally:
                del serving[task]

        place: dict[str, object] = {"host": address, "port": port} if sock is None else {"sock": sock}
        try:
            server = await serve(
                accepted,
                **place,  # pyright: ignore[reportArgumentType]
                ssl=self._server,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
                ssl_shutdown_timeout=CLOSE_TIMEOUT,
                compression=None,
                server_header=None,
                max_size=MAX_FRAME,
                open_timeout=HANDSHAKE_TIMEOUT,
                ping_interval=PING_INTERVAL,
                ping_timeout=PING_TIMEOUT,
                close_timeout=CLOSE_TIMEOUT,
                logger=_quiet,
            )
        except OSError as error:
            raise Unavailable(f"cannot listen at {address}:{port}: {error}", field="port") from error
        return WebSocketListener(server, serving)


def _peer_of(connection: Connection) -> str | None:
    tls: ssl.SSLObject | None = connection.transport.get_extra_info("ssl_object")
    return party_of(tls.getpeercert()) if tls else None


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _no_delay(connection: Connection) -> None:
    """Answers are small and waited for; and a peer that vanished must not hold frames for minutes."""
    raw: socket.socket = connection.transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed by the other side already: the first use will say so
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_TIMEOUT * 1000))
