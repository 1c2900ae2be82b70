"""The guest of `benchmarks.in_place`: given memory to fill and to change and blocks to write, it answers for
all of them. Which host or process runs it is no business of this module."""

import asyncio
import time

import msgspec

from nahtlos.lab.outside import GuestStatus, Outside
from nahtlos.model.errors import Unavailable

DIRTY_MB_PER_S, WRITES_PER_S = 40, 50
CHECKED_MB_PER_S = 2000
"""The guest looks at its memory as fast as it can."""
KERNEL_MIB = 192
"""Of a server's memory, what is its kernel's and not touched by the checker; and for page tables:"""
TABLES_SHARE = 16
CHECKED_SECONDS, DISK_SECONDS = 300.0, 120.0
PAGES_PER_MIB = 256


class Verify(msgspec.Struct, frozen=True, kw_only=True):
    checked: int
    wrong: int
    acknowledged: int


def memory_of(touched: int) -> int:
    """MiB a server needs for its guest to touch so many."""
    return touched + KERNEL_MIB + touched // TABLES_SHARE


class Guest:
    """Touches so many MiB, and answers for them."""

    def __init__(self, outside: Outside, ip: str, touched: int) -> None:
        self._outside = outside
        self._ip = ip
        self._touched = touched
        self._boot = ""

    async def fill(self) -> None:
        """Every page is written and found right once; then it is loaded."""
        status = await self._outside.set_load(
            self._ip, memory_mib=self._touched, memory_mb_per_s=CHECKED_MB_PER_S
        )
        self._boot = status.boot_id
        await self._until_verified(0)
        await self.load()

    async def load(self) -> None:
        await self._outside.set_load(self._ip, memory_mb_per_s=DIRTY_MB_PER_S, disk_per_s=WRITES_PER_S)

    async def check(self) -> tuple[int, int]:
        """Pages and blocks found right since now: all there are. RuntimeError if one is wrong."""
        before = await self._outside.set_load(self._ip, memory_mb_per_s=CHECKED_MB_PER_S)
        answer = await self._outside.get(self._ip, "/disk/verify", timeout=DISK_SECONDS)
        disk = msgspec.json.decode(answer, type=Verify)
        if disk.wrong or disk.checked < before.disk.acknowledged or not disk.checked:
            raise RuntimeError(
                f"of {before.disk.acknowledged} blocks {disk.checked} read, {disk.wrong} wrong"
            )
        after = await self._until_verified(before.memory.verified_pages)
        await self.load()
        return after.memory.verified_pages - before.memory.verified_pages, disk.checked

    async def _until_verified(self, since: int) -> GuestStatus:
        until = time.monotonic() + CHECKED_SECONDS
        while True:
            try:
                status = await self._outside.status(self._ip)
            except (
                Unavailable
            ):  # it is busy looking; a guest that does not come back is found by the deadline
                if time.monotonic() > until:
                    raise
                continue
            if status.boot_id != self._boot:
                raise RuntimeError("the guest has booted again")
            if status.memory.errors or status.disk.errors:
                raise RuntimeError(f"{status.memory.errors} pages, {status.disk.errors} blocks are wrong")
            if status.memory.verified_pages - since >= self._touched * PAGES_PER_MIB:
                return status
            if time.monotonic() > until:
                raise RuntimeError(f"{self._touched} MiB were not verified within {CHECKED_SECONDS:g} s")
            await asyncio.sleep(0.2)
