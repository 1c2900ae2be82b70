"""Disks of simulated servers: which copies their VMMs reach, and what a copy that is gone does to them.

a copy stops taking writes --> every VMM that reaches it beside others stands still --> reached without it
"""

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import HostId
from nahtlos.model.inventory import RunState
from nahtlos.physical.hypervisor.disks import disks_of
from nahtlos.physical.ports import DiskProblem, DiskTrouble
from nahtlos.physical.sim.guests import Vmm
from nahtlos.physical.sim.world import World


def change_disks(world: World, vmm: Vmm, server: ServerConfig) -> tuple[str, ...]:
    """Refused where a machine has no place, Unavailable while a copy does not answer."""
    disks_of(server)
    gone = copies_lost(world, server)
    if gone:
        raise Unavailable(f"nobody serves {gone[0].volume} at {gone[0].replica}", field="volume")
    if vmm.server == server:
        return ()
    before = {each.volume: each for each in vmm.server.all_volumes}
    after = {each.volume: each for each in server.all_volumes}
    world.disks.change(vmm, server)
    changed = [v for v in before.keys() | after.keys() if before.get(v) != after.get(v)]
    world.note(vmm.host, "disks", f"{vmm.id.unit} {sorted(changed)}")
    return tuple(f"{volume} changed" for volume in sorted(changed))


def copies_lost(world: World, server: ServerConfig) -> tuple[DiskProblem, ...]:
    return tuple(
        DiskProblem(
            volume=each.volume,
            trouble=DiskTrouble.REPLICA_LOST,
            replica=copy.host,
            text="nobody answers there",
        )
        for each in server.all_volumes
        if len(each.copies) > 1
        for copy in each.copies
        if not _answers(world, copy.host)
    )


def _answers(world: World, host: HostId) -> bool:
    here = world.hosts.get(host)
    return here is not None and here.powered and here.storage_up


def lose_copies(world: World, host: HostId) -> None:
    """Its storage does not answer any more: what writes to it and to others stands still."""
    world.hosts[host].storage_up = False
    for other in world.hosts.values():
        for vmm in other.vmms.values():
            lost = tuple(each for each in copies_lost(world, vmm.server) if each.replica == host)
            if lost and vmm.state is RunState.RUNNING:
                vmm.disk_problems = lost
                world.pause(vmm)
                other.disks_told.set()
