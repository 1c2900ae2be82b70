"""A memory of the store that is not believed: of what it knows every fifth answer is read again, and must be
the same. (All of them would cost the tests more than what is tested.)"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from nahtlos.runtime.store import remembered

T = TypeVar("T")
EVERY = 5


class CheckedMemory(remembered.Memory):
    asked = 0

    async def answer(self, key: remembered.Key, read: Callable[[], Awaitable[T]]) -> T:
        known = await super().answer(key, read)
        self.asked += 1
        if self.asked % EVERY:
            return known
        fresh = await read()
        if known != fresh:
            raise AssertionError(f"{key} was remembered as {known!r} and is {fresh!r}")
        return known


@contextmanager
def not_believed() -> Iterator[None]:
    """Stores that are opened meanwhile have such a memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "Memory", CheckedMemory)
        yield
