"""`physical.ports.Storage` over the simulated world. Volumes are on the host's disk: they survive all but
`remove`."""

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Refused
from nahtlos.model.ids import ReleaseId, SnapshotId, VolumeId
from nahtlos.model.inventory import PoolStatus, SnapshotStatus, VolumeStatus
from nahtlos.model.storage import CopyProgress, SnapshotSpec, VolumeSpec
from nahtlos.physical.ports import StorageDesired
from nahtlos.physical.sim.driver import SimDriver
from nahtlos.physical.sim.world import Volume


class SimStorage(SimDriver):
    name = "storage"

    async def reconcile(self, desired: StorageDesired) -> tuple[str, ...]:
        volumes = [v for v in desired.volumes if v.id not in desired.pinned]
        removed = [v for v in desired.removed if v not in desired.pinned]
        async with self.verb("reconcile"):
            held, found = self.host.volumes, list[str]()
            for spec in volumes:
                if spec.id not in held:
                    held[spec.id] = Volume(spec)
                    found.append(f"volume {spec.id}")
                elif held[spec.id].spec != spec:
                    held[spec.id].spec = spec
                    found.append(f"export of {spec.id}")
            for volume in removed:
                if held.pop(volume, None):
                    found.append(f"removed {volume}")
            if desired.release is not None and desired.release != self.host.storage_release:
                self.host.check_release(desired.release)
                self.world.replace_storage(self.host.id, desired.release)
            return tuple(found)

    async def release(self) -> ReleaseId | None:
        async with self.verb("release"):
            return self.host.storage_release

    async def observe(self) -> tuple[VolumeStatus, ...]:
        async with self.verb("observe"):
            return tuple(
                VolumeStatus(
                    id=v.spec.id, epoch=v.spec.epoch, served=self.host.storage_up, size_mib=v.spec.size_mib
                )
                for v in self.host.volumes.values()
            )

    async def pool(self) -> PoolStatus | None:
        return None

    async def snapshot(self, snapshots: tuple[SnapshotSpec, ...]) -> None:
        raise _lacking("snapshot")

    async def snapshots(self) -> tuple[SnapshotStatus, ...]:
        return ()

    async def revert(self, volume: VolumeSpec, snapshot: SnapshotId) -> None:
        raise _lacking("revert")

    async def relocate_start(
        self, volume: VolumeSpec, target: VolumeEndpoint, *, bytes_per_second: int
    ) -> None:
        raise _lacking("relocate_start")

    async def relocate_progress(self, volume: VolumeId) -> CopyProgress:
        raise _lacking("relocate_progress")

    async def relocate_complete(self, volume: VolumeId) -> None:
        raise _lacking("relocate_complete")

    async def relocate_cancel(self, volume: VolumeId) -> None:
        raise _lacking("relocate_cancel")

    async def relocate_finish(self, volume: VolumeId) -> None:
        raise _lacking("relocate_finish")

    async def receive(self, volume: VolumeSpec) -> None:
        raise _lacking("receive")

    async def digest(self, volume: VolumeId, offset: int, length: int) -> bytes:
        raise _lacking("digest")


def _lacking(verb: str) -> Refused:
    return Refused(f"the simulated storage has no {verb} yet", field="verb")
