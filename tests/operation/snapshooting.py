"""A group of snapshots over two servers' volumes on two hosts, ordered at a third one, in the simulated world
with something going wrong. What was taken must be of one moment, or nothing may be left of it."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from crash_plays import BOUND_SECONDS, Play, Strike, moments
from relocating import VolumeConductor

from nahtlos.model.ids import HostId, OperationId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import Consistency, SnapshotSpec
from nahtlos.physical.sim.cloudlet import server_spec
from nahtlos.physical.sim.guests import Guest
from nahtlos.wire.volumes import SnapshotOrder

FIRST, SECOND, THIRD = HostId("host-1"), HostId("host-2"), HostId("host-3")
SERVERS = (ServerId("web-1"), ServerId("web-2"))
VOLUMES = (VolumeId("web-1-v"), VolumeId("web-2-v"))
PLACES = {VOLUMES[0]: FIRST, VOLUMES[1]: SECOND}


@dataclass
class Snapshooting(Play):
    """`moves`: the first server goes to host-1 meanwhile. `one_host`: both volumes are at the first host."""

    moves: float | None = None
    one_host: bool = False
    stop_seconds: float = 1.0
    consistency: Consistency = Consistency.CRASH
    freeze_seconds: float = 20.0
    silent: bool = False
    without_agent: bool = False
    """So is the guest of the first server."""

    def _conducted(self) -> VolumeConductor:
        conductor = VolumeConductor(self.cloudlet, storage_host=FIRST)
        if not self.one_host:
            conductor.homes[VOLUMES[1]] = (SECOND, 1)
        agents = self.consistency is not Consistency.CRASH
        for number, place in ((1, THIRD), (2, SECOND)):
            conductor.place(msgspec.structs.replace(server_spec(number), guest_agent=agents), place)
        return conductor

    async def _go(self) -> None:
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, VolumeConductor)
        await self._booted(*SERVERS)
        world.silent |= {SERVERS[0]} if self.silent else set()
        world.without_agent |= {SERVERS[0]} if self.without_agent else set()
        self.begin()
        order = SnapshotOrder(
            id=OperationId("op-group"),
            coordinator=FIRST,
            hosts=conductor.peers(),
            group="group",
            snapshots=tuple(
                SnapshotSpec(
                    id=SnapshotId(f"snap-{volume}"), volume=volume, group="group", hosts=(self._home(volume),)
                )
                for volume in VOLUMES
            ),
            clients=tuple(conductor.client(server) for server in SERVERS),
            stop_seconds=self.stop_seconds,
            consistency=self.consistency,
            freeze_seconds=self.freeze_seconds,
        )
        conductor.order(order)
        if self.moves is not None:
            self.later(self.moves, lambda: conductor.move(SERVERS[0], FIRST))
        await self._ends(order.id, FIRST)
        await world.until(self._settled, timeout=BOUND_SECONDS, what="every server to run")

    def _home(self, volume: VolumeId) -> HostId:
        return FIRST if self.one_host else PLACES[volume]

    def _settled(self) -> bool:
        conductor = self.conductor
        moved = all(conductor.over(order) is not None for order in conductor.orders.values())
        if any(g is not None and g.frozen for s in SERVERS for g in self._guests(s)):
            return False
        return moved and conductor.converged() and all(len(self.world.running(s)) == 1 for s in SERVERS)

    def _guests(self, server: ServerId) -> list[Guest | None]:
        return [vmm.guest for vmm in self.world.running(server)]

    @property
    def held(self) -> list[str]:
        """Snapshots that are said to be of frozen file systems."""
        return self.status.result.get("filesystem", "").split() if self.status else []

    def _judge(self) -> None:
        super()._judge()
        world = self.world
        taken = [s for host in world.hosts.values() for s in host.snapshots.values()]
        if self.status is None or self.status.state is OperationState.STUCK:
            return
        if self.status.state is OperationState.DONE:
            if len(taken) != len(VOLUMES):
                self.problems.append(f"only {[s.spec.id for s in taken]} were taken")
            elif torn := world.disks.torn(taken):
                self.problems.append(f"torn: {torn}")
            self.problems += [
                f"{s.spec.id} is said to be of frozen file systems, and is not"
                for s in taken
                if s.spec.id in self.held and not s.clean
            ]
            if self.consistency is Consistency.FILESYSTEM and len(self.held) != len(VOLUMES):
                self.problems.append(f"only {self.held} are of frozen file systems")
        elif taken:
            self.problems.append(f"{[s.spec.id for s in taken]} are left of a group that was given up")

    @property
    def longest_stop(self) -> float:
        return max(self.world.facts(server).longest_blackout for server in SERVERS)


def strikes(consistency: Consistency = Consistency.CRASH) -> Iterator[Strike]:
    return moments(Snapshooting(consistency=consistency))
