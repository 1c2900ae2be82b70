"""A conversation with the agent in a guest, over the socket of its virtio port.

Owns the connection: made when first needed, kept (an agent whose port nobody holds open wakes up ten times a
second), and made anew after anything unexpected. Each connection begins with `guest-sync-delimited`: what an
earlier one had asked for and did not wait for is dropped. Believes nothing: the guest may send what it likes.
"""

import asyncio
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec

from nahtlos.model.errors import Refused, Unavailable

DELIMITER = b"\xff"
LONGEST_ANSWER = 1 << 20
FIELD = "guest_agent"


class GuestRefused(Refused):
    """The guest's agent answered with an error; its words are the message."""

    kind = "refused"


def command_line(command: str, arguments: Mapping[str, object] | None = None) -> bytes:
    body: dict[str, object] = {"execute": command}
    if arguments:
        body["arguments"] = dict(arguments)
    return msgspec.json.encode(body) + b"\n"


def returned(line: bytes) -> object:
    """What a line of the agent says. GuestRefused for its errors, Unavailable for what is no answer."""
    try:
        answer = msgspec.json.decode(line)
    except msgspec.DecodeError:
        answer = None
    if isinstance(answer, dict) and "return" in answer:
        return cast("dict[str, object]", answer)["return"]
    error = cast("dict[str, object]", answer).get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        said = str(cast("dict[str, object]", error).get("desc", ""))
        raise GuestRefused(f"the guest's agent: {plain(said)}", field=FIELD)
    raise Unavailable("the guest's agent answers something else than it was asked", field=FIELD)


def plain(text: str, longest: int = 200) -> str:
    """Fit for a terminal and a log, whatever the guest has put in."""
    return "".join(c if c.isprintable() else "?" for c in text[:longest])


class GuestChannel:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers = itertools.count(int.from_bytes(os.urandom(3), "little"))
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(self, command: str, arguments: Mapping[str, object] | None, *, within: float) -> object:
        """One at a time; the turn counts as waiting."""
        try:
            async with asyncio.timeout(within), self._turn:
                return await self._ask(command_line(command, arguments))
        except TimeoutError:
            raise Unavailable(
                f"the guest's agent did not answer {command} within {within:g} s", field=FIELD
            ) from None
        except (OSError, EOFError, ValueError) as error:  # ValueError: a line without end
            raise Unavailable(f"the channel to the guest's agent broke: {error}", field=FIELD) from error

    async def _ask(self, line: bytes) -> object:
        """Whatever else happens than an answer, the connection is not used any more."""
        try:
            reader, writer = await self._connected()
            writer.write(line)
            await writer.drain()
            answer = await reader.readline()
            if not answer.endswith(b"\n"):
                raise EOFError("closed")
            return returned(answer.lstrip(DELIMITER))
        except GuestRefused:
            raise
        except BaseException:
            self.close()
            raise

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._loop is not asyncio.get_running_loop():
            self.close()
        if self._streams is None or self._streams[1].is_closing() or self._streams[0].at_eof():
            self.close()
            self._loop = asyncio.get_running_loop()
            self._streams = await asyncio.open_unix_connection(str(self._path), limit=LONGEST_ANSWER)
            await self._synchronize(*self._streams)
        return self._streams

    async def _synchronize(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        writer.write(DELIMITER + command_line("guest-sync-delimited", {"id": number}))
        await writer.drain()
        while True:
            await reader.readuntil(DELIMITER)
            try:
                if returned((await reader.readline()).lstrip(DELIMITER)) == number:
                    return
            except (GuestRefused, Unavailable):
                continue  # of somebody who did not wait for it

    def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None and self._loop is not None and not self._loop.is_closed():
            streams[1].close()
