"""How much memory a server's VMMs use, beyond what the guest was given.

Counted: what is theirs alone and their share of files they map (programs, libraries), as the kernel divides
it among all who map it; their page tables; the RAM files as far as they are filled, each once however many
processes map it. So a second copy of a guest's memory shows wherever it lies: as a file or in a process.
Looking at 8 GB takes the kernel tenths of a second, so replacements that are looked at are not timed.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path

from nahtlos.physical.supervisor.client import SupervisorClient

EVERY_SECONDS = 0.02
BLOCK = 512
PROC = Path("/proc")
_COUNTED = re.compile(r"^(?:Pss_Anon|Pss_File|VmPTE):\s+(\d+) kB", re.MULTILINE)


def used_bytes(pids: Iterable[int], ram: Path, proc: Path = PROC) -> int:
    return sum(_own(proc / str(pid)) for pid in pids) + _filled(ram)


def _own(process: Path) -> int:
    """0 of one that has ended."""
    try:
        text = (process / "smaps_rollup").read_text() + (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(kib) << 10 for kib in _COUNTED.findall(text))


def _filled(ram: Path) -> int:
    """Names of one file count once."""
    blocks: dict[int, int] = {}
    for path in ram.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            blocks[found.st_ino] = found.st_blocks
    return sum(blocks.values()) * BLOCK


class Memory:
    """Of the VMMs of one host."""

    def __init__(self, supervisor: Path, ram: Path) -> None:
        self._supervisor = SupervisorClient(supervisor)
        self._ram = ram
        self.peak = 0
        self.samples = 0
        self.beside = 0
        """Samples in which more than one VMM ran."""

    def close(self) -> None:
        self._supervisor.close()

    async def now(self) -> int:
        units = await self._supervisor.units()
        pids = [u.pid for name, u in units.items() if name.startswith("vmm.") and u.pid is not None]
        used = await asyncio.to_thread(used_bytes, pids, self._ram)
        self.samples += 1
        self.beside += len(pids) > 1
        self.peak = max(self.peak, used)
        return used

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncGenerator[None]:
        """`peak`, `samples` and `beside` are of this time."""
        self.peak = self.samples = self.beside = 0
        ended = asyncio.Event()

        async def look() -> None:
            while not ended.is_set():
                await self.now()
                await asyncio.sleep(EVERY_SECONDS)

        async with asyncio.TaskGroup() as group:
            group.create_task(look())
            try:
                yield
            finally:
                ended.set()
