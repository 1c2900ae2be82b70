"""What a supervisor and its keeper do about leases, in the simulated world: each ends what is leased when the
deadline passes, by its host's own clock, whatever has become of the agent and of the other one."""

from typing import TYPE_CHECKING

from nahtlos.model.errors import Refused
from nahtlos.physical.ports import VmmId
from nahtlos.physical.sim.clock import virtual_loop

if TYPE_CHECKING:
    from nahtlos.physical.sim.facts import SimHost
    from nahtlos.physical.sim.world import World

KEEPER_SECONDS = 1.0
"""Within which a keeper looks again."""


def clock_of(world: "World", host: "SimHost") -> float:
    return world.now() * host.clock_rate


def check_lease(world: "World", host: "SimHost", vmm: VmmId, *, leased: bool) -> None:
    if leased and host.lease is not None and clock_of(world, host) >= host.lease:
        raise Refused(f"{vmm.unit} runs only while this host has its lease", field="lease")


def arm(world: "World", host: "SimHost", deadline: float | None, leased: dict[str, bool]) -> None:
    for vmm in host.vmms.values():
        vmm.leased = leased.get(vmm.id.unit, vmm.leased)
    host.lease = deadline
    if deadline is None:
        return
    left = deadline - clock_of(world, host)
    if left <= 0:
        _end(world, host)
    else:
        virtual_loop().call_later(left / host.clock_rate, _passed, world, host, deadline)


def _passed(world: "World", host: "SimHost", deadline: float) -> None:
    if host.lease != deadline:
        return
    if host.supervisor_up:
        _end(world, host)
    elif host.keeper_up:
        virtual_loop().call_later(world.random.uniform(0.0, KEEPER_SECONDS), _passed_still, world, host)


def _passed_still(world: "World", host: "SimHost") -> None:
    if host.powered and host.lease is not None and clock_of(world, host) >= host.lease:
        _end(world, host)


def supervisor_back(world: "World", host: "SimHost") -> None:
    """It reads in its journal until when what runs may run, and sees to it that there is a keeper."""
    host.supervisor_up = host.keeper_up = True
    _passed_still(world, host)


def _end(world: "World", host: "SimHost") -> None:
    for vmm in tuple(host.vmms.values()):
        if vmm.leased and not vmm.ended:
            world.kill_vmm(vmm, f"the lease of {host.id} has run out")
