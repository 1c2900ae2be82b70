"""`make bench-control`: what a guest gets of a processor against what was asked, and how long a change takes.

A guest's work is what its workers count: each keeps one vCPU busy. For quotas it is compared with the same
guest's without a limit, before and after, on the same machine; for weights two guests are held to one
processor. Beside it stands the processor time of the vCPUs' threads, which says what the kernel did.
A change's time is the driver's own: from being told until it held. That of a quota is also seen from outside:
until the threads had been given no more than that for a twentieth second.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.figures import Figures, Goal
from benchmarks.storage_site import Host, Site
from nahtlos.model.config import ServerConfig, VolumeAttachment
from nahtlos.model.ids import ImageId, ServerId, VolumeId
from nahtlos.model.inventory import ComputeStatus
from nahtlos.model.nouns import CpuShare, ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.hypervisor.driver import QemuHypervisor
from nahtlos.physical.ports import StorageDesired, VmmId
from nahtlos.runtime.releases import list_images

QUOTAS = (10, 25, 50, 75, 100)
WEIGHTS = (100, 300)
SECONDS, LONG_SECONDS = 3.0, 10.0
BOOTS_WITHIN = 90.0
ANSWERS_WITHIN = 20.0
HOLDS_WITHIN = 10.0
SLICE = 0.05
KEYS = 8
PLACES = 24
"""For vCPUs: an emulating process begins no more threads of them in its life."""
WITHIN_A_TENTH = Goal(at_least=0.9, at_most=1.1)
FIFTH_SECOND = Goal(at_most=200)
STATUS = re.compile(rb"\{.*\}\s", re.DOTALL)
TICKS = os.sysconf("SC_CLK_TCK")


class Guest:
    """One server, its guest and the threads of its vCPUs."""

    def __init__(self, host: Host, hypervisor: QemuHypervisor, server: ServerConfig) -> None:
        self.host, self.hypervisor, self.server = host, hypervisor, server
        self.vmm = VmmId(server.spec.id, server.epoch)

    async def booted(self) -> None:
        async with asyncio.timeout(BOOTS_WITHIN):
            while b"boot " not in (await self.hypervisor.console(self.vmm, 0, 1 << 20))[0]:
                await asyncio.sleep(0.1)
        await self.set_load(0)

    async def _say(self, line: bytes, answer: re.Pattern[bytes]) -> bytes:
        _, offset = await self.hypervisor.console(self.vmm, 0, 1 << 22)
        async with asyncio.timeout(ANSWERS_WITHIN):
            await self._type(line + b"\n", offset)
            while True:
                data, _ = await self.hypervisor.console(self.vmm, offset, 1 << 20)
                if found := answer.search(data):
                    return found.group()
                await asyncio.sleep(0.01)

    async def _type(self, text: bytes, offset: int) -> None:
        """No faster than the guest echoes it: what its serial port has no room for is lost when the writer
        closes the line."""
        for at in range(0, len(text), KEYS):
            await self.hypervisor.console_write(self.vmm, text[at : at + KEYS])
            typed = text[: at + KEYS].rstrip()
            while typed not in (await self.hypervisor.console(self.vmm, offset, 1 << 20))[0]:
                await asyncio.sleep(0.01)

    async def set_load(self, workers: int) -> None:
        for setting in ("memory_mb_per_s=0", f"cpu_workers={workers}"):
            await self._say(f"set {setting}".encode(), re.compile(rb"done\s"))

    async def turns(self) -> tuple[float, int]:
        """By the guest's own clock, seconds, and the work its workers have done by then."""
        said: dict[str, Any] = json.loads(await self._say(b"status", STATUS))
        return said["uptime_ms"] / 1000, said["cpu"]["turns"]

    async def compute(self) -> ComputeStatus:
        return next(v.compute for v in await self.hypervisor.observe() if v.id == self.vmm)

    async def give(self, **fields: Any) -> dict[str, int]:
        """Until it holds; how long each change took."""
        size = {name: fields.pop(name) for name in ("vcpus", "memory_mib") if name in fields}
        spec = msgspec.structs.replace(self.server.spec, **fields)
        spec = msgspec.structs.replace(spec, size=msgspec.structs.replace(spec.size, **size))
        self.server = msgspec.structs.replace(self.server, spec=spec)
        await self.hypervisor.compute_reconcile(self.vmm, self.server)
        async with asyncio.timeout(HOLDS_WITHIN):
            while (compute := await self.compute()).waits_for:
                await asyncio.sleep(0.02)
        return compute.took_ms

    async def threads(self) -> tuple[int, ...]:
        pid = (await self.host.supervisor.units())[self.vmm.unit].pid
        assert pid is not None, f"{self.vmm.unit} has ended"
        named = ((task.name, (task / "comm").read_text()) for task in Path(f"/proc/{pid}/task").iterdir())
        return tuple(int(thread) for thread, name in named if name.startswith("CPU "))

    async def used(self) -> float:
        """Seconds of processor time of its vCPUs."""
        return sum(_nanoseconds(thread) for thread in await self.threads()) / 1e9


def _nanoseconds(thread: int) -> int:
    return int(Path(f"/proc/{thread}/schedstat").read_text().split()[0])


class Got:
    """Of one guest over some seconds: work a second, processors' time a second."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self.work = self.processors = 0.0

    async def begin(self) -> None:
        self._turns = (await self._guest.turns())[1]
        self._used, self._at = await self._guest.used(), time.monotonic()

    async def end(self) -> None:
        turns = (await self._guest.turns())[1]
        seconds = time.monotonic() - self._at
        self.work = (turns - self._turns) / seconds
        self.processors = (await self._guest.used() - self._used) / seconds


async def measured(seconds: float, *guests: Guest) -> list[Got]:
    got = [Got(guest) for guest in guests]
    for each in got:
        await each.begin()
    await asyncio.sleep(seconds)
    for each in got:
        await each.end()
    return got


async def quotas(guest: Guest, seconds: float, figures: Figures) -> None:
    """Each between two measurements of the same guest without a limit."""
    await guest.set_load(1)
    (before,) = await measured(seconds, guest)
    for quota in QUOTAS:
        await guest.give(cpu=CpuShare(quota=quota))
        (got,) = await measured(seconds, guest)
        await guest.give(cpu=CpuShare())
        (after,) = await measured(seconds, guest)
        full, processor = (before.work + after.work) / 2, (before.processors + after.processors) / 2
        figures.add(f"quota {quota}%: processor time of the vCPU", got.processors * 100, "%", baseline=quota)
        figures.add(
            f"quota {quota}%: guest's work of that without a limit, by what was asked",
            got.work / full * processor / (quota / 100),
            "ratio",
            goal=WITHIN_A_TENTH,
        )
        before = after
    await guest.set_load(0)


async def weights(first: Guest, second: Guest, seconds: float, figures: Figures) -> None:
    """Both on one processor."""
    guests = {100: first, 300: second}
    for weight, guest in guests.items():
        await guest.give(cpu=CpuShare(weight=weight))
        for thread in await guest.threads():
            os.sched_setaffinity(thread, {0})
        await guest.set_load(1)
    light, heavy = await measured(seconds, first, second)
    for guest in guests.values():
        await guest.set_load(0)
        await guest.give(cpu=CpuShare())
        for thread in await guest.threads():
            os.sched_setaffinity(thread, os.sched_getaffinity(0))
    asked = WEIGHTS[1] / WEIGHTS[0]
    figures.add("weights 100:300: processor time", heavy.processors / light.processors, "x", baseline=asked)
    figures.add(
        "weights 100:300: guest's work",
        heavy.work / light.work,
        "x",
        baseline=asked,
        goal=msgspec.structs.replace(WITHIN_A_TENTH, of_ratio=True),
    )


async def changes(guest: Guest, times: int, figures: Figures) -> None:
    took: dict[str, list[float]] = {}
    seen: list[float] = []
    await guest.set_load(1)
    for number in range(times):
        seen.append(await _until_slower(guest, 25))
        took.setdefault("quota set", []).append((await guest.compute()).took_ms["cpu"])
        await guest.give(cpu=CpuShare())
        for name, size in (("1 to 3 vCPUs", 3), ("3 to 1 vCPUs", 1)):
            took.setdefault(name, []).append((await guest.give(vcpus=size))["vcpus"])
        for name, mib in (("256 to 512 MiB", 512), ("512 to 256 MiB", 256)):
            took.setdefault(name, []).append((await guest.give(memory_mib=mib))["memory"])
        print(f"changes {number + 1} of {times}", file=sys.stderr)
    await guest.set_load(0)
    median = statistics.median(seen)
    figures.add("quota held, seen from outside", median, "ms", goal=FIFTH_SECOND, samples=len(seen))
    for name, values in took.items():
        figures.add(name, statistics.median(values), "ms", samples=len(values))
        figures.add(f"{name}, longest", max(values), "ms", samples=len(values))


async def _until_slower(guest: Guest, quota: int) -> float:
    """Milliseconds until the beginning of the first twentieth second in which it got no more than its quota
    and a half."""
    changing = asyncio.create_task(guest.give(cpu=CpuShare(quota=quota)))
    began = time.monotonic()
    used, at = await guest.used(), began
    while time.monotonic() - began < HOLDS_WITHIN:
        await asyncio.sleep(SLICE)
        now_used, now = await guest.used(), time.monotonic()
        if (now_used - used) / (now - at) <= quota * 1.5 / 100:
            await changing
            return (at - began) * 1000
        used, at = now_used, now
    raise TimeoutError(f"a quota of {quota}% does not hold")


async def started(host: Host, hypervisor: QemuHypervisor, name: str, image: ImageId) -> Guest:
    volume = VolumeId(f"{name}-root")
    spec = VolumeSpec(id=volume, size_mib=192, image=image, host=host.settings.host, epoch=1)
    await host.storage.reconcile(StorageDesired(volumes=(spec,)))
    server = ServerConfig(
        spec=ServerSpec(
            id=ServerId(name),
            size=Size(vcpus=1, memory_mib=256),
            volume=volume,
            ports=(),
            machine="pc-q35-10.0",
            max_vcpus=PLACES,
            boot_memory_mib=256,
            max_memory_mib=1024,
        ),
        epoch=1,
        volume=VolumeAttachment(
            volume=volume,
            address=host.settings.address,
            port=host.settings.nbd_port,
            export=f"{volume}.e1",
        ),
    )
    await hypervisor.start(server, host.site.bundle("10.0").release)
    guest = Guest(host, hypervisor, server)
    await guest.booted()
    return guest


async def run(long: bool) -> Figures:
    figures, seconds = Figures(), LONG_SECONDS if long else SECONDS
    async with Site(hosts=1) as site:
        (host,) = site.hosts
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nlt-control-") as ram:
            settings = msgspec.structs.replace(host.settings, ram_dir=Path(ram))
            hypervisor = QemuHypervisor(settings, host.supervisor)
            image = list_images(site.build.images)[-1].id
            guests: list[Guest] = []
            try:
                guests.append(await started(host, hypervisor, "first", image))
                guests.append(await started(host, hypervisor, "second", image))
                await quotas(guests[0], seconds, figures)
                await weights(guests[0], guests[1], seconds, figures)
                await changes(guests[0], 10 if long else 3, figures)
            finally:
                for guest in guests:
                    await hypervisor.kill(guest.vmm)
                await hypervisor.close()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="What a guest gets of what was asked for it, and when.")
    parser.add_argument("--long", action="store_true", help="longer measurements, more changes")
    arguments = parser.parse_args()
    return asyncio.run(run(arguments.long)).finish("control", "Live control")


if __name__ == "__main__":
    sys.exit(main())
