"""A memory of the store that is not believed: whatever it knows is read again, and must be the same."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from nahtlos.runtime.store import remembered

T = TypeVar("T")


class CheckedMemory(remembered.Memory):
    async def answer(self, key: remembered.Key, read: Callable[[], Awaitable[T]]) -> T:
        known = await super().answer(key, read)
        fresh = await read()
        if known != fresh:
            raise AssertionError(f"{key} was remembered as {known!r} and is {fresh!r}")
        return known


def check_what_is_remembered() -> None:
    remembered.Memory = CheckedMemory
