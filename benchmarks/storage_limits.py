"""How exactly a disk keeps its limits, and how soon it keeps others.

The limits are those of the throttle group in the server's block layer, as the hypervisor driver sets them.
The first second is left out: it may use what a pause before it has saved up.
"""

import asyncio

from benchmarks.figures import Figures, Goal
from benchmarks.storage_io import blank_file, file_nodes
from benchmarks.storage_site import Disk, Host, Load, Running, Site, remote
from nahtlos.lab.ceph import POOL, USER, CephCluster, missing_programs
from nahtlos.model.config import RbdEndpoint
from nahtlos.model.storage import DiskLimits
from nahtlos.physical.hypervisor.disks import rbd_connection, throttle_limits

EXACT = Goal(at_least=0.97, at_most=1.03, of_ratio=True)
SOON = Goal(at_most=100)
SECOND = 100
"""Bins of a load in one second."""
IOPS = tuple(DiskLimits(iops=each) for each in (100, 1000, 10_000))
BYTES = tuple(DiskLimits(bytes=each * 1_000_000) for each in (10, 100))
LARGE = 64 << 10
ROOM = 1.3
"""So much more than a limit a disk must be able to do, for the limit to be what is measured."""
WINDOW = 5
"""Bins over which a rate is looked at after a change."""


async def measure(figures: Figures, *, long: bool) -> None:
    seconds = 20.0 if long else 4.0
    async with Site(1) as site:
        host = site.hosts[0]
        volume = host.volume("limited", size_mib=64)
        await host.have(volume)
        async with Disk(host, "limited", (remote(host.endpoint(volume)),)) as disk:
            beyond = await _kept(figures, disk, seconds)
            for before, after in ((1000, 200), (200, 2000)):
                took = await _changed(disk, before, after)
                figures.add(f"from {before} to {after} IOPS in", took, "ms", goal=SOON)
        await _on_a_file(figures, host, beyond, seconds)
        if not missing_programs():
            await _on_ceph(figures, host, seconds)


async def _kept(figures: Figures, disk: Disk, seconds: float, of: str = "") -> list[DiskLimits]:
    """Those it cannot do without limits are left out, and returned; what it can do is among the figures."""
    beyond = list[DiskLimits]()
    await disk.load("seqwrite", seconds=1.0, block=1 << 20, depth=4)
    many = (await disk.load("randread", seconds=1.0, depth=16)).rate
    much = (await disk.load("seqread", seconds=1.0, block=LARGE, depth=4)).rate * LARGE
    figures.add(f"without limits{of}, random reads", many, "IOPS")
    figures.add(f"without limits{of}, sequential reads", much / 1e6, "MB/s")
    for limits in (*IOPS, *BYTES):
        if many > limits.iops * ROOM and much > limits.bytes * ROOM:
            await _limited(figures, disk, limits, seconds, of)
        else:
            beyond.append(limits)
    await limit(disk, DiskLimits())
    return beyond


async def _limited(figures: Figures, disk: Disk, limits: DiskLimits, seconds: float, of: str) -> None:
    await limit(disk, limits)
    if limits.iops:
        load = await disk.load("randread", seconds=seconds, depth=16)
        got, wanted, unit = steady(load), limits.iops, "IOPS"
    else:
        load = await disk.load("seqread", seconds=seconds, block=LARGE, depth=4)
        got, wanted, unit = steady(load) * LARGE / 1e6, limits.bytes / 1e6, "MB/s"
    what = f"limited to {wanted:g} {unit}{of}, after the first second"
    figures.add(what, got, unit, baseline=wanted, goal=EXACT)


async def _on_a_file(figures: Figures, host: Host, limits: list[DiskLimits], seconds: float) -> None:
    """What this machine cannot do over the network: the limit is the same filter's, the disk a local file."""
    async with Disk(host, "local", file_nodes(blank_file(host.site, "local"))) as disk:
        await disk.load("seqwrite", seconds=1.0, block=1 << 20, depth=4)
        for each in limits:
            await _limited(figures, disk, each, seconds, ", of a local file")


async def _on_ceph(figures: Figures, host: Host, seconds: float) -> None:
    """An image of a cluster of two daemons, in memory."""
    with CephCluster(host.site.namespace) as ceph:
        ceph.run("rbd", "create", f"{POOL}/limited", "--size", "64")
        image = RbdEndpoint(pool=POOL, image="limited", user=USER, configuration=str(ceph.configuration))
        async with Disk(host, "image", (rbd_connection(image, "volume"),)) as disk:
            await _kept(figures, disk, seconds, ", of an image of Ceph's")


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
