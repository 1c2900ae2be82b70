"""WebSockets to an orchestrator, by its unix socket or over TLS: the way of `client`'s requests."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.wire.tls import ORCHESTRATOR

Dial = Callable[[str], Awaitable[ClientConnection]]
"""By a path. Unavailable if no orchestrator answers; Refused if it knows no such caller, or no such path."""

OPEN_SECONDS = 5.0
MAX_MESSAGE = 1 << 20
PING_INTERVAL = 5.0
PING_TIMEOUT = 10.0

_quiet = logging.getLogger("nahtlos.ops.dialling")
_quiet.setLevel(logging.ERROR)
_OPTIONS: dict[str, Any] = {
    "compression": None,
    "user_agent_header": None,
    "max_size": MAX_MESSAGE,
    "max_queue": 4,
    "open_timeout": None,
    "ping_interval": PING_INTERVAL,
    "ping_timeout": PING_TIMEOUT,
    "close_timeout": 1.0,
    "logger": _quiet,
}


def dial_unix(path: Path) -> Dial:
    async def dial(where: str) -> ClientConnection:
        return await _opened(unix_connect(str(path), f"ws://{ORCHESTRATOR}{where}", **_OPTIONS), str(path))

    return dial


def dial_tls(url: str, context: ssl.SSLContext, headers: dict[str, str]) -> Dial:
    async def dial(where: str) -> ClientConnection:
        place = url.rstrip("/").replace("https://", "wss://", 1)
        opening = connect(
            f"{place}{where}",
            ssl=context,
            server_hostname=ORCHESTRATOR,
            additional_headers=headers,
            proxy=None,
            **_OPTIONS,
        )
        return await _opened(opening, url)

    return dial


async def _opened(opening: connect, where: str) -> ClientConnection:
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            return await opening
    except InvalidStatus as error:
        if error.response.status_code >= 500:
            raise Unavailable(f"{where} answers {error.response.status_code}") from error
        raise Refused(
            f"{where} does not let you to this console (HTTP {error.response.status_code})",
            field="authorization",
            remedy="use an operator's credential, and an orchestrator of this release",
        ) from error
    except PermissionError:
        raise
    except (OSError, InvalidHandshake, InvalidMessage, EOFError, ConnectionClosed, TimeoutError) as error:
        what = str(error) or type(error).__name__
        raise Unavailable(
            f"no orchestrator answers at {where}: {what}", remedy="check that it runs and where"
        ) from error
