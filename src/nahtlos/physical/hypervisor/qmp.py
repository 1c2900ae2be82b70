"""A thin port over the `qemu.qmp` library: one connection, deadlines, our errors, events as a callback.

Traps it takes care of: QEMU serves one client per monitor and lets a second one hang, so connecting has
a deadline; a client object is of no use after a failed connect; when QEMU dies pending calls end with
several kinds of exception; a call that passed its deadline may have been carried out all the same.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from qemu.qmp import ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener

from nahtlos.model.errors import Refused, Unavailable

# What the library logs as errors it also raises, and whoever polls for a monitor expects them.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

CONNECT_WITHIN = 3.0
ANSWER_WITHIN = 5.0

OnEvent = Callable[[str, Mapping[str, object]], None]
Arguments = Mapping[str, object]
Answer = dict[str, object]


class Denied(Refused):
    """QEMU answered with an error; its words are the message."""

    kind = "refused"


class Gone(Unavailable):
    """No connection to the monitor: the process ended, does not listen yet, or serves another client."""

    kind = "unavailable"


class _Callback(EventListener):
    """Hands events over at once instead of queueing them."""

    def __init__(self, callback: OnEvent) -> None:
        super().__init__()
        self._callback = callback

    async def put(self, event: Message) -> None:
        self._callback(str(event["event"]), cast("Mapping[str, object]", event.get("data", {})))


class Qmp:
    """An open connection to one monitor. Made by `connect`; after `Gone` make a new one."""

    def __init__(self, client: QMPClient, path: Path) -> None:
        self._client = client
        self._path = path
        self.loop = asyncio.get_running_loop()

    @classmethod
    async def connect(
        cls, path: Path, on_event: OnEvent | None = None, *, within: float = CONNECT_WITHIN
    ) -> "Qmp":
        if not path.is_socket():
            raise Gone(f"the monitor {path} is not there (yet)")
        client = QMPClient(path.name)
        client.events.event_filter = lambda _: False  # it would keep every event for ever
        if on_event is not None:
            client.register_listener(_Callback(on_event))
        try:
            async with asyncio.timeout(within):
                await client.connect(str(path))
        except (QMPError, OSError, TimeoutError) as error:
            raise Gone(f"no answer from the monitor {path}: {error or 'timeout'}") from error
        return cls(client, path)

    @property
    def open(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    async def execute(
        self,
        command: str,
        arguments: Arguments | None = None,
        *,
        within: float = ANSWER_WITHIN,
        urgent: bool = False,
    ) -> Answer:
        """The answer if it is an object, else {"value": it}. `urgent`: out of band, also where QEMU itself
        waits for a page of its guest; it takes few commands so."""
        try:
            async with asyncio.timeout(within):
                answer = await self._client.execute(
                    command, dict(arguments) if arguments else None, oob=urgent
                )
        except ExecuteError as error:
            raise Denied(f"QEMU refuses {command}: {error}", field=command) from error
        except TimeoutError:
            raise Unavailable(f"QEMU did not answer {command} within {within:g} s ({self._path})") from None
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise Gone(f"the monitor {self._path} closed during {command}: {error}") from error
        return cast("Answer", answer) if isinstance(answer, dict) else {"value": answer}

    async def close(self) -> None:
        """Never raises: what went wrong with the connection was said by whoever used it."""
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(CONNECT_WITHIN):
                await self._client.disconnect()
