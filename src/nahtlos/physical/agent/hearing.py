"""When a guest that was resumed a moment ago is first heard again, by the frames it sends.

That is what a client's wait ends with, and the part of it that nobody can say beforehand: how long a process
that was never used takes to answer depends on how busy its host is. Only a guest that talks all the time is
believed: one that says little may have had nothing to say.
"""

import asyncio
from collections.abc import Awaitable, Callable

ANSWERED = "answered"
"""Under which an operation's times have it."""
WITHIN = 0.6
"""Seconds; the end of an operation waits for this."""
EVERY = 0.005
TALKATIVE = 50
"""Frames a second, over `PROVEN` seconds."""
PROVEN = 0.1
ANNOUNCED = (0.0, 0.05, 0.2, 0.45)
"""Seconds after its start at which a VMM that has received a server says so itself, by a frame each."""


async def first_heard(
    frames: Callable[[], Awaitable[int]], now: Callable[[], float], *, announced: bool
) -> float | None:
    """By the clock `now`; None if it was not heard, or says too little. `frames`: that it has sent so far;
    `announced`: its VMM says where it is, too."""
    loop = asyncio.get_running_loop()
    began, before = loop.time(), await frames()
    while (since := loop.time() - began) < WITHIN:
        own = sum(at <= since for at in ANNOUNCED) if announced else 0
        if (count := await frames()) > before + own:
            heard = now()
            await asyncio.sleep(PROVEN)
            return heard if await frames() - count >= TALKATIVE * PROVEN else None
        await asyncio.sleep(EVERY)
    return None
