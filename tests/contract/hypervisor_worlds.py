"""Two hosts on which the plays about hypervisors and storage run: real ones (QEMU, storage daemons, taps in a
namespace), those with volumes in a Ceph cluster, and simulated ones (virtual time). Plays know only the
protocols of `physical.ports`."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from nahtlos.lab.ceph import missing_programs
from nahtlos.model.config import PortConfig, ServerConfig
from nahtlos.model.ids import HostId, ReleaseId, ServerId, VolumeId
from nahtlos.model.storage import StorageBackend, VolumeSpec
from nahtlos.physical.ports import Hypervisor, Storage, StorageDesired, VmmId
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import OLD, Cloudlet, Conductor, server_spec
from nahtlos.physical.sim.faults import Life
from nahtlos.physical.sim.host import drivers_of

LIVE = Path(__file__).parents[1] / "live"


class OneHost(Protocol):
    reads_bytes: bool
    """A digest is of what was written, whatever volume it was written to."""

    @property
    def name(self) -> HostId: ...
    @property
    def address(self) -> str: ...
    @property
    def hypervisor(self) -> Hypervisor: ...
    @property
    def storage(self) -> Storage: ...

    async def plug(self, server: ServerConfig) -> None:
        """Taps for the server's ports. Repeatable."""
        ...

    async def kill_vmm(self, vmm: VmmId) -> None:
        """kill -9, behind the driver's back."""
        ...

    async def stall_vmm(self, vmm: VmmId) -> None:
        """It takes no more of what is sent to it, and does not say so."""
        ...


class Hosts(Protocol):
    backend: StorageBackend
    first: OneHost
    second: OneHost
    release: ReleaseId

    def server(self) -> ServerConfig:
        """Its volume is to be served by the first host."""
        ...

    def volume(self, name: str, *, epoch: int = 1) -> VolumeSpec:
        """On the first host."""
        ...


Play = Callable[[Hosts], Awaitable[None]]
Stage = Callable[[Play], None]


# --- simulated ---


class _SimulatedHost:
    reads_bytes = False

    def __init__(self, cloudlet: Cloudlet, name: HostId) -> None:
        drivers = drivers_of(cloudlet.world, name, Life(name))
        self.name, self.address = name, cloudlet.spec(name).address
        self.hypervisor, self.storage = drivers.hypervisor, drivers.storage
        self._world = cloudlet.world

    async def plug(self, server: ServerConfig) -> None:
        for port in server.spec.ports:
            placed = PortConfig(
                id=port.id,
                server=server.spec.id,
                mac=port.mac,
                ip=port.ip,
                host=self.name,
                vtep=self.address,
            )
            self._world.add_tap(self._world.hosts[self.name], placed)

    async def kill_vmm(self, vmm: VmmId) -> None:
        self._world.kill_vmm(self._world.hosts[self.name].vmms[vmm], "test")

    async def stall_vmm(self, vmm: VmmId) -> None:
        (source,) = (v.host for v in self._world.vmms_of(vmm.server) if v.id != vmm)
        self._world.stall_link(source, self.name, on=True)


class _SimulatedHosts:
    backend = StorageBackend.EMBEDDED

    def __init__(self, folder: Path) -> None:
        cloudlet = Cloudlet.build(folder, hosts=2, seed=1)
        self.first: OneHost = _SimulatedHost(cloudlet, HostId("host-1"))
        self.second: OneHost = _SimulatedHost(cloudlet, HostId("host-2"))
        self.release = OLD
        self._conductor = Conductor(cloudlet, storage_host=HostId("host-1"))
        self._conductor.place(server_spec(1), HostId("host-1"))

    def server(self) -> ServerConfig:
        return self._conductor.server_config(ServerId("web-1"), 1)

    def volume(self, name: str, *, epoch: int = 1) -> VolumeSpec:
        return VolumeSpec(id=VolumeId(name), size_mib=160, image=None, host=HostId("host-1"), epoch=epoch)


def simulated(folder: Path) -> Stage:
    def run(play: Play) -> None:
        async def main() -> None:
            await play(_SimulatedHosts(folder))

        run_virtual(main(), seed=1, limit_seconds=3600)

    return run


# --- real ---


def physical() -> Stage:
    """Needs root, the built releases and the guest image."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    sys.path.insert(0, str(LIVE))
    try:
        import inside_place
        import physical_host
    finally:
        sys.path.remove(str(LIVE))
    if not any(physical_host.RELEASES.glob("qemu-*")) or not any(physical_host.IMAGES.glob("guest-*.raw")):
        pytest.skip("no release or no guest image is built")

    class PhysicalHost:
        reads_bytes = True

        def __init__(self, host: physical_host.Host) -> None:
            self._host = host
            self.name, self.address = host.settings.host, host.settings.address
            self.hypervisor, self.storage = host.hypervisor, host.storage
            self._plugged: set[str] = set()

        async def plug(self, server: ServerConfig) -> None:
            if server.spec.id not in self._plugged:
                self._plugged.add(server.spec.id)
                await self._host.plug(server)

        async def kill_vmm(self, vmm: VmmId) -> None:
            os.kill(await self._host.pid(vmm.unit), signal.SIGKILL)
            await self._host.until_ended(vmm.unit)

        async def stall_vmm(self, vmm: VmmId) -> None:
            os.kill(await self._host.pid(vmm.unit), signal.SIGSTOP)

    class PhysicalHosts:
        backend = StorageBackend.EMBEDDED

        def __init__(self, place: physical_host.Place) -> None:
            self._one = place.host("host-1")
            self.first: OneHost = PhysicalHost(self._one)
            self.second: OneHost = PhysicalHost(place.host("host-2"))
            self.release = physical_host.release("10.0")

        def server(self) -> ServerConfig:
            return physical_host.server_on(self._one, "web-1")

        def volume(self, name: str, *, epoch: int = 1) -> VolumeSpec:
            return physical_host.volume_on(self._one, name, epoch=epoch)

    def run(play: Play) -> None:

        async def main() -> None:
            place = physical_host.Place("contract")
            try:
                with inside_place.inside(place):
                    await play(PhysicalHosts(place))
            finally:
                await place.close()

        asyncio.run(main())

    return run


# --- real, with Ceph ---


@contextmanager
def ceph_world() -> Iterator[Stage]:
    """One cluster for many plays; each of them must name its volumes otherwise than those before."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if missing_programs():
        pytest.skip(f"{', '.join(missing_programs())} are not installed")
    sys.path.insert(0, str(LIVE))
    try:
        import ceph_host
        import physical_host
    finally:
        sys.path.remove(str(LIVE))
    if not any(physical_host.RELEASES.glob("qemu-*")):
        pytest.skip("no release is built")
    with ceph_host.cluster("contract-ceph") as (namespace, cluster):

        class CephHost:
            reads_bytes = True

            def __init__(self, host: physical_host.Host) -> None:
                self._host = host
                self.name, self.address = host.settings.host, host.settings.address
                self.hypervisor = host.hypervisor
                self.real = ceph_host.ceph_storage(host, cluster)
                self.storage: Storage = self.real

            async def plug(self, server: ServerConfig) -> None:
                await self._host.plug(server)

            async def kill_vmm(self, vmm: VmmId) -> None:
                os.kill(await self._host.pid(vmm.unit), signal.SIGKILL)
                await self._host.until_ended(vmm.unit)

            async def stall_vmm(self, vmm: VmmId) -> None:
                os.kill(await self._host.pid(vmm.unit), signal.SIGSTOP)

        class CephHosts:
            backend = StorageBackend.CEPH

            def __init__(self, place: physical_host.Place) -> None:
                self._one = place.host("host-1")
                self.made = [CephHost(self._one), CephHost(place.host("host-2"))]
                self.first: OneHost = self.made[0]
                self.second: OneHost = self.made[1]
                self.release = physical_host.release("10.0")

            def server(self) -> ServerConfig:
                server = physical_host.server_on(self._one, "web-1")
                rbd = self.made[0].real.endpoint(server.volume.volume)
                volume = msgspec.structs.replace(server.volume, rbd=rbd)
                return msgspec.structs.replace(server, volume=volume)

            def volume(self, name: str, *, epoch: int = 1) -> VolumeSpec:
                return ceph_host.in_ceph(physical_host.volume_on(self._one, name, epoch=epoch))

        def run(play: Play) -> None:
            async def main() -> None:
                place = physical_host.Place("contract", namespace=namespace)
                hosts = CephHosts(place)
                try:
                    await play(hosts)
                finally:
                    for host in hosts.made:
                        held = tuple(v.id for v in await host.storage.observe())
                        taken = tuple(s.id for s in await host.storage.snapshots())
                        await host.storage.reconcile(StorageDesired(removed=held, removed_snapshots=taken))
                        await host.real.close()
                    await place.close()

            with ceph_host.inside(namespace):
                asyncio.run(main())

        yield run


WORLDS = [
    pytest.param("simulated", id="simulated"),
    pytest.param("physical", id="physical", marks=[pytest.mark.live, pytest.mark.timeout(240)]),
]


STORAGE_WORLDS = [
    *WORLDS,
    pytest.param("ceph", id="ceph", marks=[pytest.mark.live, pytest.mark.timeout(240)]),
]


def stage_of(kind: str, folder: Path) -> Stage:
    return simulated(folder) if kind == "simulated" else physical()
