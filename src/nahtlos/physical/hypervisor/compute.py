"""What a VMM that runs is given: vCPUs, memory, a share of the processors; and what it has of them.

Decides nothing about what it should have. Asks the guest once for each change and waits a moment for it; a
guest that takes longer is looked at again by a later call, and asked again to let go of a vCPU. Nothing is
remembered that could be asked for: what is plugged is QEMU's to say, the share the kernel's. All that is
kept (in the VMM's record) is what was wanted last, and how long it took.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import PurePosixPath
from typing import cast

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Refused
from nahtlos.model.inventory import ComputeStatus
from nahtlos.model.nouns import CpuShare, ServerSpec
from nahtlos.model.version_pairs import COPIES_SINCE, CORRUPTS, UNPLUGS_SINCE
from nahtlos.physical.hypervisor.cgroups import DEFAULT, REMEDY, CpuGroup, group_name, usable
from nahtlos.physical.hypervisor.commandline import PLUGGED_MEMORY, check_hardware, vcpu_device
from nahtlos.physical.hypervisor.vmm import Asked, Vmm, VmmRecord
from nahtlos.physical.ports import Supervisor
from nahtlos.physical.settings import AgentSettings

HELD_WITHIN = 3.0
"""Seconds a guest is waited for by the call that asked it."""
LOOK_AGAIN = 0.02
PLUGGED_KEPT_SINCE = (8, 1)
"""Before it, a VMM that is to take a server over in place began by throwing away the plugged memory."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a VMM has now."""

    vcpus: int
    memory_mib: int
    """Which the guest has taken."""
    threads: tuple[int, ...] = ()
    """Of its vCPUs."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a vCPU can be."""

    socket: int
    driver: str
    device: str
    """Id of the vCPU that is there; empty if there is none, or one that stays."""
    taken: bool


def check_change(now: ServerSpec, wanted: ServerSpec) -> None:
    """Whether the machine that runs has a way to what is wanted."""
    for name in ("max_vcpus", "boot_memory_mib", "max_memory_mib"):
        if getattr(now, name) != getattr(wanted, name):
            raise Refused(
                f"{name} of {now.id} is {getattr(now, name)} for as long as it runs",
                field=name,
                remedy="it is part of its hardware: create a server that has it",
            )
    if not now.max_vcpus and wanted.size.vcpus != now.size.vcpus:
        raise Refused(
            f"{now.id} has {now.size.vcpus} vCPUs and no place to plug others",
            field="vcpus",
            remedy="create a server with max_vcpus",
        )
    if not now.max_memory_mib and wanted.size.memory_mib != now.size.memory_mib:
        raise Refused(
            f"{now.id} has {now.size.memory_mib} MiB and none that can be plugged",
            field="memory_mib",
            remedy="create a server with max_memory_mib",
        )
    if wanted.size.vcpus < 1 or (now.max_vcpus and wanted.size.vcpus > now.max_vcpus):
        raise Refused(
            f"{now.id} cannot have {wanted.size.vcpus} vCPUs",
            field="vcpus",
            remedy=f"from 1 to {max(now.max_vcpus, 1)}",
        )
    if now.max_memory_mib and not now.boot_memory_mib <= wanted.size.memory_mib <= now.max_memory_mib:
        raise Refused(
            f"{now.id} cannot have {wanted.size.memory_mib} MiB",
            field="memory_mib",
            remedy=f"from {now.boot_memory_mib} to {now.max_memory_mib}",
        )
    check_hardware(wanted)


def check_unplugs(server: ServerSpec, version: tuple[int, ...]) -> None:
    """Whether an emulating QEMU survives that a vCPU goes."""
    if version < UNPLUGS_SINCE:
        raise Refused(
            f"an emulating QEMU {_dotted(version)} does not let go of a vCPU of {server.id} safely",
            field="vcpus",
            remedy=f"replace its VMM by QEMU {_dotted(UNPLUGS_SINCE)} or newer first, or set --cpu-quota",
        )


def check_threads(server: ServerSpec, wanted: int, has: int, begun: int) -> None:
    """Whether an emulating QEMU that has begun `begun` threads of vCPUs can begin those it lacks: it has room
    for `max_vcpus` of them in its life, and ends by an assertion (`tcg_register_thread`) at the next."""
    most = server.max_vcpus - begun + has
    if wanted > most:
        raise Refused(
            f"the emulating process of {server.id} has begun {begun} of {server.max_vcpus} vCPUs "
            f"in its life: it can have {most} now, not {wanted}",
            field="vcpus",
            remedy="move the server or replace its VMM by another release: the new process begins anew",
        )


def waits_for(seen: Seen, wanted: ServerSpec, answers: Mapping[str, int]) -> str:
    """Why it is not yet as wanted, in words; empty if it is."""
    words: list[str] = []
    if seen.vcpus > wanted.size.vcpus:
        refused = any(answers.get(f"vcpu{n}") for n in range(wanted.size.vcpus, seen.vcpus))
        count = seen.vcpus - wanted.size.vcpus
        words.append(f"the guest to let go of {count} vCPUs" + (", which it refuses" if refused else ""))
    elif seen.vcpus < wanted.size.vcpus:
        words.append(f"{wanted.size.vcpus - seen.vcpus} vCPUs to be plugged")
    more = wanted.size.memory_mib - seen.memory_mib
    if more:
        words.append(f"the guest to {'take' if more > 0 else 'give back'} {abs(more)} MiB")
    return " and ".join(words)


def places_of(answer: object) -> tuple[Place, ...]:
    """Of `query-hotpluggable-cpus`, in the order of their sockets."""
    found: list[Place] = []
    for entry in cast("list[dict[str, object]]", answer):
        properties = cast("dict[str, int]", entry["props"])
        path = PurePosixPath(str(entry.get("qom-path", "")))
        found.append(
            Place(
                socket=properties.get("socket-id", 0),
                driver=str(entry["type"]),
                device=path.name if path.parent.name == "peripheral" else "",
                taken="qom-path" in entry,
            )
        )
    return tuple(sorted(found, key=lambda place: place.socket))


class ComputeCare:
    def __init__(self, settings: AgentSettings, supervisor: Supervisor) -> None:
        self._settings = settings
        self._supervisor = supervisor

    # --- before and after ---------------------------------------------------------------------------

    def check_start(self, record: VmmRecord, version: tuple[int, ...]) -> None:
        """Everything that can be wrong, before a VMM is started."""
        spec = record.server.spec
        check_hardware(spec)
        self._check_share(spec.cpu)
        if not spec.max_memory_mib:
            return
        if record.in_place and version < PLUGGED_KEPT_SINCE:
            raise Refused(
                f"{record.release} would lose the plugged memory of {spec.id}",
                field="release",
                remedy="choose a newer release, or move the server",
            )
        if not record.in_place:
            self._check_room(spec, spec.size.memory_mib)

    async def begin(self, vmm: Vmm) -> None:
        """Of a VMM that answers and whose guest may not have run yet: its share holds from then on."""
        record = vmm.record
        if record is not None:
            await self._share(vmm, record.server.spec.cpu)

    async def ended(self, vmm: Vmm) -> None:
        group = self._group(vmm)
        if group is not None:
            await asyncio.to_thread(group.remove)

    # --- what it has --------------------------------------------------------------------------------

    async def status(self, vmm: Vmm) -> ComputeStatus:
        record = vmm.record
        if record is None:
            return ComputeStatus()
        spec = record.server.spec
        group = self._group(vmm)
        seen = await look(vmm, threads=group is not None and (group.needed or spec.cpu != DEFAULT))
        share = group.observe(seen.threads, spec.cpu) if group and seen.threads else DEFAULT
        waits = waits_for(seen, spec, vmm.os_answers)
        if not waits:
            self._note_held(vmm, seen)
        if share != spec.cpu:
            waits = " and ".join(part for part in (waits, "its share of the processors to be set") if part)
        return ComputeStatus(
            vcpus=seen.vcpus,
            memory_mib=seen.memory_mib,
            cpu=share,
            waits_for=waits,
            took_ms=(vmm.record or record).took_ms,
        )

    # --- what it is given ---------------------------------------------------------------------------

    async def reconcile(self, vmm: Vmm, server: ServerConfig) -> tuple[str, ...]:
        record = vmm.record
        assert record is not None, f"{vmm.id.unit} has no record"
        began, own, wanted = time.monotonic(), record.server.spec, server.spec
        check_change(own, wanted)
        self._check_share(wanted.cpu)
        seen = await look(vmm)
        begun = record.vcpus_begun or seen.vcpus
        if wanted.size.vcpus != seen.vcpus and not await _accelerated(vmm):
            await _check_emulated(vmm, wanted.size.vcpus, seen.vcpus, begun)
        begun += max(0, wanted.size.vcpus - seen.vcpus)
        if wanted.size.memory_mib > max(own.size.memory_mib, seen.memory_mib):
            self._check_room(own, wanted.size.memory_mib - max(own.size.memory_mib, seen.memory_mib))
        now = msgspec.structs.replace(own, size=wanted.size, cpu=wanted.cpu)
        config = msgspec.structs.replace(record.server, spec=now)
        vmm.write_record(msgspec.structs.replace(record, server=config, vcpus_begun=begun))
        texts: list[str] = []
        if await self._share(vmm, now.cpu):
            self._note_took(vmm, "cpu", began)
            texts.append(_share_in_words(now.cpu))
        asked = [await act(vmm, seen, now, began) for act in (_ask_for_vcpus, _ask_for_memory)]
        if any(asked):
            await self._until_held(vmm)
            await self._share(vmm, now.cpu)  # of vCPUs that are new
        return (*texts, *(text for text in asked if text))

    async def _until_held(self, vmm: Vmm) -> None:
        """Or until the guest has had its moment."""
        until = time.monotonic() + HELD_WITHIN
        while vmm.asked and time.monotonic() < until:
            self._note_held(vmm, await look(vmm))
            if vmm.asked:
                await vmm.event_within(LOOK_AGAIN)

    def _note_held(self, vmm: Vmm, seen: Seen) -> None:
        """A guest says of new vCPUs that it uses them; of those it began with it says nothing."""
        for what, amount in (("vcpus", seen.vcpus), ("memory", seen.memory_mib)):
            asked = vmm.asked.get(what)
            if asked is None or asked.amount != amount:
                continue
            if all(vmm.os_answers.get(device) == 0 for device in asked.devices):
                self._note_took(vmm, what, vmm.asked.pop(what).since)

    def _note_took(self, vmm: Vmm, what: str, since: float) -> None:
        record = vmm.record
        if record is not None:
            took = {**record.took_ms, what: max(1, round((time.monotonic() - since) * 1000))}
            vmm.write_record(msgspec.structs.replace(record, took_ms=took))

    # --- the share ----------------------------------------------------------------------------------

    def _group(self, vmm: Vmm) -> CpuGroup | None:
        hierarchy = usable()
        name = group_name(self._settings.run_dir, vmm.id.unit)
        return CpuGroup(hierarchy, name) if hierarchy else None

    def _check_share(self, share: CpuShare) -> None:
        if share.quota < 0 or not 1 <= share.weight <= 10_000:
            raise Refused(
                f"a share of {share.quota}% by weight {share.weight} cannot be",
                field="cpu",
                remedy="a quota of 0 (none) or more, a weight from 1 to 10000",
            )
        if share != DEFAULT and usable() is None:
            raise Refused(
                f"{self._settings.host} has no control groups to share its processors by",
                field="cpu",
                remedy=REMEDY,
            )

    async def _share(self, vmm: Vmm, share: CpuShare) -> bool:
        group = self._group(vmm)
        unit = (await self._supervisor.units()).get(vmm.id.unit)
        if group is None or unit is None or unit.pid is None:
            return False
        if share == DEFAULT and not group.needed:
            return False
        threads = (await look(vmm, threads=True)).threads
        try:
            return await asyncio.to_thread(group.apply, unit.pid, threads, share)
        except Refused:
            if share == DEFAULT:
                return False  # nothing was asked for
            raise

    # --- room ---------------------------------------------------------------------------------------

    def _check_room(self, server: ServerSpec, mib: int) -> None:
        folder = self._settings.ram_dir
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize >> 20
        if mib > free:
            raise Refused(
                f"{self._settings.host} has {free} MiB left in {folder}, and {server.id} needs {mib} MiB",
                field="memory_mib",
                remedy=f"ask for {free} MiB more at most, or move the server to a host that has more",
            )


async def look(vmm: Vmm, *, threads: bool = False) -> Seen:
    """Without asking where the machine has no way to change."""
    record = vmm.record
    assert record is not None, f"{vmm.id.unit} has no record"
    spec = record.server.spec
    vcpus, memory = spec.size.vcpus, spec.size.memory_mib
    numbers: tuple[int, ...] = ()
    if spec.max_vcpus or threads:
        cpus = cast("list[dict[str, object]]", (await vmm.execute("query-cpus-fast"))["value"])
        numbers = tuple(int(str(cpu["thread-id"])) for cpu in cpus)
        vcpus = len(numbers)
    if spec.max_memory_mib:
        memory = spec.boot_memory_mib + (await _number(vmm, "size") >> 20)
    return Seen(vcpus=vcpus, memory_mib=memory, threads=numbers)


async def _number(vmm: Vmm, name: str) -> int:
    """Bytes, of the memory that is plugged."""
    named = {"path": f"/machine/peripheral/{PLUGGED_MEMORY}", "property": name}
    return int(str((await vmm.execute("qom-get", named))["value"]))


Ask = Callable[[Vmm, Seen, ServerSpec, float], Awaitable[str]]


async def _ask_for_vcpus(vmm: Vmm, seen: Seen, wanted: ServerSpec, began: float) -> str:
    """In words what was asked; empty if nothing had to be."""
    count = wanted.size.vcpus
    if seen.vcpus == count:
        vmm.asked.pop("vcpus", None)
        return ""
    answer = await vmm.execute("query-hotpluggable-cpus")
    places = places_of(answer["value"])
    before = vmm.asked.get("vcpus")
    new: list[str] = []
    if seen.vcpus < count:
        for place in [place for place in places if not place.taken][: count - seen.vcpus]:
            device = vcpu_device(place.driver, place.socket)
            new.append(str(device["id"]))
            vmm.os_answers.pop(new[-1], None)
            await vmm.execute("device_add", device)
    else:
        for place in [place for place in reversed(places) if place.device][: seen.vcpus - count]:
            vmm.os_answers.pop(place.device, None)
            await vmm.execute("device_del", {"id": place.device})
    if before is not None and before.amount == count and not new:
        return ""  # asked for before
    vmm.asked["vcpus"] = Asked(amount=count, since=began, devices=tuple(new))
    return f"{seen.vcpus} to {count} vCPUs"


async def _ask_for_memory(vmm: Vmm, seen: Seen, wanted: ServerSpec, began: float) -> str:
    if not wanted.max_memory_mib:
        return ""
    plugged = wanted.size.memory_mib - wanted.boot_memory_mib << 20
    if await _number(vmm, "requested-size") == plugged:
        return ""  # asked for before
    path = f"/machine/peripheral/{PLUGGED_MEMORY}"
    await vmm.execute("qom-set", {"path": path, "property": "requested-size", "value": plugged})
    vmm.asked["memory"] = Asked(amount=wanted.size.memory_mib, since=began)
    return f"{seen.memory_mib} to {wanted.size.memory_mib} MiB"


async def check_copied(vmm: Vmm) -> None:
    """Before the memory of a server that runs is copied. An emulating QEMU follows the writes to a machine's
    first piece of memory alone: another one, copied while it is written, ends QEMU if it is larger (seen with
    10.0 and 11.1) and cannot be trusted if it is not. What stays on its host shares its memory and is not
    concerned, nor is KVM."""
    record = vmm.record
    if record is None or await _accelerated(vmm):
        return
    version = await _version(vmm)
    if version < COPIES_SINCE:
        raise Refused(
            f"{vmm.id.server} runs under an emulating QEMU {_dotted(version)}: {CORRUPTS}",
            field="server",
            remedy="replace its VMM in place by a newer release, or run it under KVM",
        )
    if record.server.spec.max_memory_mib:
        raise Refused(
            f"{vmm.id.server} has places for memory, which an emulating QEMU cannot copy while it runs",
            field="server",
            remedy="replace its VMM in place, or run it under KVM",
        )


async def _accelerated(vmm: Vmm) -> bool:
    return bool((await vmm.execute("query-kvm"))["enabled"])


async def _check_emulated(vmm: Vmm, wanted: int, has: int, begun: int) -> None:
    """By what the process says of itself."""
    record = vmm.record
    assert record is not None, f"{vmm.id.unit} has no record"
    if wanted > has:
        check_threads(record.server.spec, wanted, has, begun)
    else:
        check_unplugs(record.server.spec, await _version(vmm))


async def _version(vmm: Vmm) -> tuple[int, int]:
    """Major and minor, as the process says itself."""
    numbers = cast("dict[str, int]", (await vmm.execute("query-version"))["qemu"])
    return numbers["major"], numbers["minor"]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _share_in_words(share: CpuShare) -> str:
    quota = f"at most {share.quota}% of a processor" if share.quota else "no limit of processor time"
    return f"{quota}, weight {share.weight}"
