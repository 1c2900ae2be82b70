"""The runtime's database for runs in virtual time: without its thread.

What is handed to the thread is done in the loop's own as it is given, so a run is the same each time.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiosqlite.core
import pytest


class _AtOnce:
    """Stands for the queue to the database's thread: what is put in is done before `put_nowait` returns."""

    def put_nowait(self, item: tuple[asyncio.Future[Any] | None, Callable[[], Any]]) -> None:
        future, function = item
        try:
            result = function()
        except Exception as error:
            if future:
                aiosqlite.core.set_exception(future, error)
        else:
            if future:
                aiosqlite.core.set_result(future, result)


class _NoThread:
    daemon = True

    def __init__(self, **_: object) -> None:
        pass

    def start(self) -> None:
        pass


@contextmanager
def database_in_the_loop() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiosqlite.core, "SimpleQueue", _AtOnce)
        patch.setattr(aiosqlite.core, "Thread", _NoThread)
        yield
