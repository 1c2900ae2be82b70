"""`physical.ports.Storage` over the simulated world. Volumes are on the host's disk: they survive all but
`remove`."""

from nahtlos.model.ids import VolumeId
from nahtlos.model.inventory import VolumeStatus
from nahtlos.model.nouns import VolumeSpec
from nahtlos.physical.sim.driver import SimDriver
from nahtlos.physical.sim.world import Volume


class SimStorage(SimDriver):
    name = "storage"

    async def reconcile(
        self, volumes: tuple[VolumeSpec, ...], removed: tuple[VolumeId, ...]
    ) -> tuple[str, ...]:
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
            return tuple(found)

    async def observe(self) -> tuple[VolumeStatus, ...]:
        async with self.verb("observe"):
            return tuple(
                VolumeStatus(
                    id=v.spec.id, epoch=v.spec.epoch, served=self.host.storage_up, size_mib=v.spec.size_mib
                )
                for v in self.host.volumes.values()
            )
