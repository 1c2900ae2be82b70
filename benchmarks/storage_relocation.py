"""A volume that goes to another host: how fast beside `nbdcopy` of the same bytes between the same daemons
over the same TLS. The steps are those of the agents: receive, copy, complete, pivot, finish.
"""

import asyncio
import subprocess
import time

import msgspec

from benchmarks.figures import Figures
from benchmarks.storage_site import Disk, Host, Site, remote
from nahtlos.model.errors import Unavailable
from nahtlos.model.storage import CopyPhase, VolumeSpec

QUICK_MIB, LONG_MIB = 256, 1024
COPY_WITHIN = 120.0


def at(volume: VolumeSpec, host: Host) -> VolumeSpec:
    return msgspec.structs.replace(volume, host=host.settings.host, epoch=volume.epoch + 1)


async def copied(source: Host, target: Host, volume: VolumeSpec) -> VolumeSpec:
    """Until both sides hold the same. Unavailable if the copy broke off: it may begin anew."""
    there = at(volume, target)
    await target.storage.receive(there)
    await source.storage.relocate_start(volume, target.endpoint(there), bytes_per_second=0)
    async with asyncio.timeout(COPY_WITHIN):
        while (progress := await source.storage.relocate_progress(volume.id)).phase is not CopyPhase.READY:
            if progress.phase in (CopyPhase.FAILED, CopyPhase.NONE):
                raise Unavailable(progress.error or "nothing copies any more")
            await asyncio.sleep(0.005)
    return there


async def relocated(source: Host, target: Host, volume: VolumeSpec, disk: Disk) -> VolumeSpec:
    """May be called again after any of its steps was interrupted."""
    there = at(volume, target)
    if disk.reaches != target.endpoint(there):
        if (await source.storage.relocate_progress(volume.id)).phase is not CopyPhase.DONE:
            await copied(source, target, volume)
            await source.storage.relocate_complete(volume.id)
        await disk.lead_to(target.endpoint(there))
    await source.storage.relocate_finish(volume.id)
    await target.have(there)
    return there


async def measure(figures: Figures, *, long: bool) -> None:
    mib, turns = (LONG_MIB, 6) if long else (QUICK_MIB, 3)
    ours: list[float] = []
    bare: list[float] = []
    async with Site(2) as site:
        here, there = site.hosts
        volume = here.volume("goes", size_mib=mib)
        blank = there.volume("copied", size_mib=mib)
        await here.have(volume)
        async with Disk(here, "goes", (remote(here.endpoint(volume)),)) as disk:
            await disk.load("seqwrite", seconds=mib / 100, block=1 << 20, depth=4)
        for _ in range(turns):
            await there.have(blank)
            began = time.monotonic()
            await asyncio.to_thread(_nbdcopy, site, here, volume, there, blank)
            bare.append(time.monotonic() - began)
            await there.forget(blank)
            began = time.monotonic()
            arriving = await copied(here, there, volume)
            ours.append(time.monotonic() - began)
            await here.storage.relocate_cancel(volume.id)
            await there.forget(arriving)
    rate, baseline = mib * 1.048576 / min(ours), mib * 1.048576 / min(bare)
    figures.add("relocation, to nbdcopy", rate, "MB/s", baseline=baseline, samples=turns)


def _nbdcopy(site: Site, here: Host, volume: VolumeSpec, there: Host, blank: VolumeSpec) -> None:
    uris = [
        f"nbds://{end.address}:{end.port}/{end.export}?tls-certificates={host.settings.pki_dir}"
        for host, end in ((here, here.endpoint(volume)), (there, there.endpoint(blank)))
    ]
    inside = ("nsenter", f"--net=/run/netns/{site.namespace}")
    subprocess.run((*inside, "nbdcopy", "--allocated", *uris), check=True, timeout=COPY_WITHIN)
