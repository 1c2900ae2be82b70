"""Two hosts beside a Ceph cluster, and clients of its images that reach them as servers do."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
from ceph_host import ceph_storage, in_ceph
from physical_host import Host, Place, volume_on
from test_storage import Disk

from nahtlos.lab.ceph import CephCluster
from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Unavailable
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.agent.volumes.copying import Act, next_act
from nahtlos.physical.hypervisor.bundle import read_bundle
from nahtlos.physical.hypervisor.disks import rbd_connection
from nahtlos.physical.ports import Storage, StorageDesired, Unit
from nahtlos.physical.storage.ceph.doors import UNIT


class Site:
    """Two hosts beside the cluster."""

    def __init__(self, place: Place, ceph: CephCluster) -> None:
        self.ceph = ceph
        self.hosts = (place.host("host-1"), place.host("host-2"))
        self.storages = [ceph_storage(host, ceph) for host in self.hosts]
        self.host, self.other = self.hosts
        self.storage, self.beside = self.storages
        self.disks: list[Disk] = []

    def volume(self, name: str, *, size_mib: int = 64, epoch: int = 1) -> VolumeSpec:
        return in_ceph(volume_on(self.host, name, size_mib=size_mib, epoch=epoch, empty=True))

    async def have(self, *volumes: VolumeSpec) -> None:
        await self.storage.reconcile(StorageDesired(volumes=volumes))

    async def client(self, volume: str, *, version: str = "", image: str = "", name: str = "") -> Disk:
        """As a server has it: without the driver."""
        node = rbd_connection(self.storage.endpoint(image or volume), "volume")
        folders = sorted(self.host.settings.releases_dir.glob(f"qemu-{version}*"))
        bundle = read_bundle(folders[-1])
        name = name or f"client-{volume}-{version or 'any'}-{time.monotonic_ns() % 10_000}"
        door = self.host.settings.run_dir / f"{name}.nbd"
        await self.host.supervisor.start(
            Unit(
                name=name,
                argv=(
                    *bundle.storage_daemon(),
                    *("--blockdev", msgspec.json.encode(node).decode()),
                    *("--nbd-server", f"addr.type=unix,addr.path={door}"),
                    *("--export", "type=nbd,id=e,node-name=volume,name=volume,writable=on"),
                ),
                environment=bundle.environment,
                log=self.host.settings.state_dir / f"{name}.log",
            )
        )
        async with asyncio.timeout(20):
            while not door.is_socket():
                await asyncio.sleep(0.01)
        return self.disk(door)

    def disk(self, door: Path) -> Disk:
        self.disks.append(Disk(door))
        return self.disks[-1]

    async def until_gone(self, prefix: str) -> None:
        """Images under hidden names are swept by passes."""
        async with asyncio.timeout(20):
            while any(name.startswith(prefix) for name in self.images()):
                await self.have()
                await asyncio.sleep(0.05)

    async def until_closed(self, storage: Storage, volume: VolumeSpec) -> None:
        """It counts as a volume, and nothing is left for the gateway to serve once nobody comes any more."""
        await storage.reconcile(StorageDesired(volumes=(volume,)))
        async with asyncio.timeout(20):
            while UNIT in await self.host.supervisor.units():
                await storage.reconcile(StorageDesired(volumes=(volume,)))

    def images(self) -> list[str]:
        return self.ceph.run("rbd", "ls", "volumes").split()

    def endpoint(self, host: Host, volume: VolumeSpec, port: int) -> VolumeEndpoint:
        return VolumeEndpoint(
            host=host.settings.host, address=host.settings.address, port=port, export=volume.export
        )

    async def close(self) -> None:
        """Nothing is left of it in the cluster."""
        for disk in self.disks:
            disk.close()
        for storage in self.storages:
            held = tuple(status.id for status in await storage.observe())
            snapshots = tuple(status.id for status in await storage.snapshots())
            await storage.reconcile(StorageDesired(removed=held, removed_snapshots=snapshots))
            await storage.close()
        await self.host.place.close()


async def stop_clients(site: Site) -> None:
    for name in await site.host.supervisor.units():
        if name.startswith("client"):
            await site.host.supervisor.stop(name)


async def answered(act: Callable[[], Awaitable[None]]) -> None:
    """Again where a client that lives takes longer to answer the cluster than it may: machines are busy."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await act()
            except Unavailable:
                await asyncio.sleep(0.1)


async def relocate(storage: Storage, volume: VolumeSpec, target: VolumeEndpoint) -> None:
    """As the operation does it: a daemon that ends meanwhile is there again at once, and the copy begins anew
    once the cluster takes it for dead."""
    async with asyncio.timeout(60):
        while True:
            with suppress(Unavailable):
                phase = (await storage.relocate_progress(volume.id)).phase
                match next_act(phase):
                    case Act.FORWARD:
                        return
                    case Act.BEGIN:
                        await storage.relocate_start(volume, target, bytes_per_second=0)
                    case Act.COMPLETE:
                        await storage.relocate_complete(volume.id)
                    case Act.WAIT:
                        pass
            await asyncio.sleep(0.02)
