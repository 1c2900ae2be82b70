"""The baselines of `benchmarks.in_place`: one guest on one host, by bare QEMU commands.

Floor: one QEMU process is stopped and continues 10 ms later: no replacement can be shorter than what this
costs beside those 10 ms. Local copy: what a careful person would do without shared memory: a second process
of the other release beside the first and a pre-copy between them over a unix socket, with two channels
(multifd), 4 GiB/s and a downtime limit of 1 ms, QEMU's own switchover and announcement. Both use a learning
bridge and a raw file as disk.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

from benchmarks.bare import BANDWIDTH, GUEST_IP, BareGuest, BareLab, Relent, set_capabilities
from benchmarks.client_gaps import Side
from nahtlos.lab.outside import Outside
from nahtlos.physical.hypervisor.bundle import Bundle, read_bundle

STILL_SECONDS = 0.01
CHANNELS = 2
COPY_DOWNTIME_MS = 1
COPY_RELENT: Relent = ((25.0, 300), (45.0, 2000))
"""The first pass over 8 GB alone takes ten seconds here."""
UP_SECONDS = 60.0


class LocalGuest(BareGuest):
    """Stays on host `a`; each copy gives it the other release, the first time the newer one."""

    def __init__(self, lab: BareLab, image: Path, memory_mib: int, releases: tuple[Path, Path]) -> None:
        super().__init__(lab, image, memory_mib, releases)
        self._work = lab.work
        self._runs, self._next = (read_bundle(path) for path in releases)

    async def hold(self) -> None:
        assert self._qmp is not None, "not booted"
        await self._qmp.execute("stop")
        await asyncio.sleep(STILL_SECONDS)
        await self._qmp.execute("cont")

    async def copy(self) -> None:
        assert self._qmp is not None, "not booted"
        process, qmp = await self._start("a", self._next, incoming=True)
        for side in (self._qmp, qmp):
            await set_capabilities(side, frozenset({"events", "return-path", "multifd"}))
            await side.execute("migrate-set-parameters", {"multifd-channels": CHANNELS})
        await self._qmp.execute(
            "migrate-set-parameters", {"max-bandwidth": BANDWIDTH, "downtime-limit": COPY_DOWNTIME_MS}
        )
        uri = f"unix:{self._work / f'{self._number}.stream'}"
        await qmp.execute("migrate-incoming", {"uri": uri})
        await self._qmp.execute("migrate", {"uri": uri})
        await self._until_arrived(qmp, COPY_RELENT)
        await self._take_up(process, qmp)
        self._turn()

    def _turn(self) -> None:
        runs: Bundle = self._runs
        self._runs, self._next = self._next, runs


@contextlib.asynccontextmanager
async def baselines(
    name: str, releases: tuple[Path, Path], image: Path, memory_mib: int, work: Path
) -> AsyncGenerator[tuple[Side, Side]]:
    """The floor and the local copy of one guest that has `memory_mib`."""
    lab = BareLab(name, work)
    lab.open()
    try:
        guest = LocalGuest(lab, image, memory_mib, releases)
        try:
            await guest.boot()
            outside = Outside(lab.namespace("client"))
            await outside.until_up(GUEST_IP, timeout=UP_SECONDS)

            def side(kind: str, act: Callable[[], Awaitable[None]]) -> Side:
                return Side(kind, GUEST_IP, outside, lab.namespace("client"), act)

            yield side("floor", guest.hold), side("copy", guest.copy)
        finally:
            await guest.close()
    finally:
        lab.close()
