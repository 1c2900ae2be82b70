"""Waiting until what was asked for has come about, with one line that says how it stands.

Asks the cloud again and again; a cloud that cannot be reached for a while (its orchestrator is being
replaced) is waited for as well. Ends with Unavailable at the deadline; what was asked for stays asked for.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from rich.text import Text

from nahtlos.model.errors import Unavailable
from nahtlos.ops.cli.command import Cli

POLL_SECONDS = 0.2

_T = TypeVar("_T")
Say = Callable[[str], None]


async def wait_until(
    cli: Cli,
    what: str,
    ask: Callable[[], Awaitable[_T]],
    done: Callable[[_T], bool],
    standing: Callable[[_T], str],
    *,
    deadline: float,
) -> _T:
    """The first answer that is `done`; meanwhile a line with `what` and `standing`."""
    began = time.monotonic()
    last = ""
    async with _progress(cli) as say:
        while True:
            try:
                answer = await ask()
                if done(answer):
                    return answer
                last = standing(answer)
            except Unavailable as error:
                last = str(error)
            waited = time.monotonic() - began
            if waited > deadline:
                raise Unavailable(
                    f"not within {deadline:g} s: {what}" + (f" ({last})" if last else ""),
                    field="deadline",
                    remedy="it goes on without this command; look again, or wait longer with --deadline",
                )
            say(f"{what}: {last or 'asked for'} ({waited:.0f} s)")
            await asyncio.sleep(POLL_SECONDS)


@asynccontextmanager
async def _progress(cli: Cli) -> AsyncGenerator[Say]:
    """A line that changes in place on a terminal; nothing elsewhere."""
    if cli.json or not cli.err.is_terminal:
        yield lambda _text: None
        return
    with cli.err.status("") as status:
        yield lambda text: status.update(Text(text))
