"""How exactly a disk keeps its limits, and how soon it keeps others.

The limits are those of the throttle group in the server's block layer, as the hypervisor driver sets them.
The first second is left out: it may use what a pause before it has saved up.
"""

import asyncio

from benchmarks.figures import Figures, Goal
from benchmarks.storage_io import blank_file, file_nodes
from benchmarks.storage_site import Disk, Host, Load, Running, Site, remote
from nahtlos.model.storage import DiskLimits
from nahtlos.physical.hypervisor.disks import throttle_limits

EXACT = Goal(at_least=0.97, at_most=1.03, of_ratio=True)
SOON = Goal(at_most=100)
SECOND = 100
"""Bins of a load in one second."""
IOPS, MEGABYTES = (100, 1000, 10_000), (10, 100)
LARGE = 64 << 10
ROOM = 1.3
"""So much more than a limit a disk must be able to do, for the limit to be what is measured."""
WINDOW = 5
"""Bins over which a rate is looked at after a change."""


async def measure(figures: Figures, *, long: bool) -> None:
    seconds = 20.0 if long else 4.0
    async with Site(1) as site:
        host, beyond = site.hosts[0], list[int]()
        volume = host.volume("limited", size_mib=64)
        await host.have(volume)
        async with Disk(host, "limited", (remote(host.endpoint(volume)),)) as disk:
            await disk.load("seqwrite", seconds=1.0, block=1 << 20, depth=4)
            free = (await disk.load("randread", seconds=1.0, depth=16)).rate
            for iops in IOPS:
                if free > iops * ROOM:
                    await _limited(figures, disk, iops, seconds, f"{iops} IOPS")
                else:
                    beyond.append(iops)
            for megabytes in MEGABYTES:
                await limit(disk, DiskLimits(bytes=megabytes * 1_000_000))
                load = await disk.load("seqread", seconds=seconds, block=LARGE, depth=4)
                _report(figures, f"{megabytes} MB/s", steady(load) * LARGE / 1e6, megabytes, "MB/s")
            await limit(disk, DiskLimits())
            for before, after in ((1000, 200), (200, 2000)):
                took = await _changed(disk, before, after)
                figures.add(f"from {before} to {after} IOPS in", took, "ms", goal=SOON)
        await _on_a_file(figures, host, beyond, seconds)


async def _limited(figures: Figures, disk: Disk, iops: int, seconds: float, what: str) -> None:
    await limit(disk, DiskLimits(iops=iops))
    load = await disk.load("randread", seconds=seconds, depth=16)
    _report(figures, what, steady(load), iops, "IOPS")


async def _on_a_file(figures: Figures, host: Host, limits: list[int], seconds: float) -> None:
    """What this machine cannot do over the network: the limit is the same filter's, the disk a local file."""
    async with Disk(host, "local", file_nodes(blank_file(host.site, "local"))) as disk:
        await disk.load("seqwrite", seconds=1.0, block=1 << 20, depth=4)
        for iops in limits:
            await _limited(figures, disk, iops, seconds, f"{iops} IOPS, of a local file")


def _report(figures: Figures, what: str, got: float, wanted: float, unit: str) -> None:
    figures.add(f"limited to {what}, after the first second", got, unit, baseline=wanted, goal=EXACT)


def steady(load: Load) -> float:
    """Per second, without the first and the last, unfinished one."""
    bins = load.bins[SECOND : len(load.bins) // SECOND * SECOND]
    return sum(bins) * SECOND / len(bins)


async def _changed(disk: Disk, before: int, after: int) -> float:
    """Milliseconds from asking for `after` until completions come at its rate (within a fifth)."""
    await limit(disk, DiskLimits(iops=before))
    running = Running(disk, "randread", seconds=3.0, depth=16)
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(1.5)
    asked = asyncio.get_running_loop().time() - began
    await limit(disk, DiskLimits(iops=after))
    load = await running.ended()
    first = int(asked * SECOND)
    for begin in range(first, len(load.bins) - WINDOW):
        rate = sum(load.bins[begin : begin + WINDOW]) * SECOND / WINDOW
        if abs(rate - after) <= after / 5:
            return (begin - first) * 1000 / SECOND
    return float("inf")


async def limit(disk: Disk, limits: DiskLimits) -> None:
    assert disk.qmp is not None
    await disk.qmp.execute(
        "qom-set", {"path": "/objects/limits", "property": "limits", "value": throttle_limits(limits)}
    )
