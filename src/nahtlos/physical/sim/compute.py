"""What simulated servers have of their host, and guests that are slow to give it back or never do."""

import msgspec

from nahtlos.model.config import ServerConfig
from nahtlos.model.inventory import ComputeStatus
from nahtlos.physical.hypervisor.compute import Seen, check_change, waits_for
from nahtlos.physical.sim.guests import Vmm
from nahtlos.physical.sim.world import World

PLUG_MS, UNPLUG_MS, MEMORY_MS, SHARE_MS = 80, 120, 100, 2


def change_compute(world: World, vmm: Vmm, server: ServerConfig) -> tuple[str, ...]:
    """As far as the guest does it at once."""
    check_change(vmm.server.spec, server.spec)
    before, wanted = vmm.given, server.spec
    spec = msgspec.structs.replace(vmm.server.spec, size=wanted.size, cpu=wanted.cpu)
    vmm.server = msgspec.structs.replace(vmm.server, spec=spec)
    texts: list[str] = []
    if before.cpu != wanted.cpu:
        before.cpu = wanted.cpu
        before.took_ms["cpu"] = SHARE_MS
        texts.append(f"share {wanted.cpu.quota}/{wanted.cpu.weight}")
    if before.vcpus != wanted.size.vcpus:
        texts.extend(_vcpus(world, vmm, wanted.size.vcpus))
    if before.asked_mib != wanted.size.memory_mib:
        texts.append(_memory(world, vmm, wanted.size.memory_mib))
    if texts:
        world.note(vmm.host, "compute", f"{vmm.id.unit} {texts}")
    return tuple(texts)


def _vcpus(world: World, vmm: Vmm, count: int) -> tuple[str, ...]:
    given = vmm.given
    if count < given.vcpus and vmm.id.server in world.clinging:
        return ()
    text = f"{given.vcpus} to {count} vCPUs"
    given.took_ms["vcpus"] = PLUG_MS if count > given.vcpus else UNPLUG_MS
    given.vcpus = count
    return (text,)


def _memory(world: World, vmm: Vmm, mib: int) -> str:
    given = vmm.given
    text = f"{given.memory_mib} to {mib} MiB"
    delay = world.slow_memory.get(vmm.id.server, 0.0) if mib < given.memory_mib else 0.0
    given.asked_mib, given.asked_at, given.held_at = mib, world.now(), world.now() + delay + MEMORY_MS / 1000
    if not delay:
        given.memory_mib = mib
        given.took_ms["memory"] = MEMORY_MS
    return text


def compute_of(world: World, vmm: Vmm) -> ComputeStatus:
    given = vmm.given
    if given.memory_mib != given.asked_mib and world.now() >= given.held_at:
        given.memory_mib = given.asked_mib
        given.took_ms["memory"] = round((given.held_at - given.asked_at) * 1000)
    seen = Seen(vcpus=given.vcpus, memory_mib=given.memory_mib)
    return ComputeStatus(
        vcpus=given.vcpus,
        memory_mib=given.memory_mib,
        cpu=given.cpu,
        waits_for=waits_for(seen, vmm.server.spec, {}),
        took_ms=dict(given.took_ms),
    )
