"""The simulated physical layer of one host, as one incarnation of its agent holds it."""

from nahtlos.model.ids import HostId
from nahtlos.physical.ports import Drivers
from nahtlos.physical.sim.faults import Life
from nahtlos.physical.sim.hypervisor import SimHypervisor
from nahtlos.physical.sim.network import SimNetwork
from nahtlos.physical.sim.storage import SimStorage
from nahtlos.physical.sim.supervisor import SimSupervisor
from nahtlos.physical.sim.world import World


def drivers_of(world: World, host: HostId, life: Life) -> Drivers:
    here = world.hosts[host]
    return Drivers(
        supervisor=SimSupervisor(world, here, life),
        hypervisor=SimHypervisor(world, here, life),
        network=SimNetwork(world, here, life),
        storage=SimStorage(world, here, life),
    )
