"""What a supervisor does about leases, in the simulated world: ends what is leased when the deadline passes,
by its host's own clock, whatever has become of the agent."""

from typing import TYPE_CHECKING

from nahtlos.model.errors import Refused
from nahtlos.physical.ports import VmmId
from nahtlos.physical.sim.clock import virtual_loop

if TYPE_CHECKING:
    from nahtlos.physical.sim.facts import SimHost
    from nahtlos.physical.sim.world import World


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
    if host.lease == deadline:
        _end(world, host)


def _end(world: "World", host: "SimHost") -> None:
    for vmm in tuple(host.vmms.values()):
        if vmm.leased and not vmm.ended:
            world.kill_vmm(vmm, f"the lease of {host.id} has run out")
