"""Two snapshots of a volume that go from one host to another while a server on a third one writes to the
volume, run in the simulated world with something going wrong. If they came, their source is told to let go.

The frame is that of `crash_plays`.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from crash_plays import BOUND_SECONDS, Play, Strike, moments
from relocating import CLIENT, HOME, PORT, SERVER, TARGET, VOLUME, VolumeConductor

from nahtlos.model.config import HostConfig, VolumeEndpoint
from nahtlos.model.ids import HostId, OperationId, SnapshotId
from nahtlos.model.inventory import OperationState, OperationStatus
from nahtlos.model.storage import SnapshotSpec
from nahtlos.physical.sim.cloudlet import server_spec
from nahtlos.physical.sim.volumes import Snapshot
from nahtlos.wire.volumes import MoveSnapshotsOrder

OPERATION = OperationId("op-snapshots")
SNAPSHOTS = {SnapshotId("old"): 3, SnapshotId("new"): 5}
"""How many writes each holds."""


class SnapshotConductor(VolumeConductor):
    """Has the volume left alone until it has heard of the end, and tells the source to let go then."""

    pinned = False

    def pin(self) -> None:
        self.pinned = True
        self._wake.set()

    def _content(self, host: HostId, last: HostConfig | None) -> HostConfig:
        content = super()._content(host, last)
        status = self.ended.get((OPERATION, TARGET))
        if status is None:
            return msgspec.structs.replace(content, pinned_volumes=(VOLUME,) if self.pinned else ())
        if host != HOME or status.state is not OperationState.DONE:
            return content
        return msgspec.structs.replace(content, removed_snapshots=tuple(SNAPSHOTS))


@dataclass
class SnapshotMoving(Play):
    bytes_per_second: int = 0
    gone: list[str] = field(default_factory=list[str])
    """Snapshots that were nowhere for a moment."""

    def _conducted(self) -> SnapshotConductor:
        conductor = SnapshotConductor(self.cloudlet, storage_host=HOME)
        conductor.place(server_spec(1), CLIENT)
        return conductor

    async def _go(self) -> None:
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, SnapshotConductor)
        await self._booted(SERVER)
        for name, writes in SNAPSHOTS.items():
            spec = SnapshotSpec(id=name, volume=VOLUME, size_mib=40)
            world.hosts[HOME].snapshots[name] = Snapshot(spec, writes)
        conductor.pin()
        await asyncio.sleep(0.1)
        await world.until(conductor.converged, timeout=60, what="everybody knows what is pinned")
        self.begin()
        at = self.cloudlet.spec(HOME)
        conductor.order(
            MoveSnapshotsOrder(
                id=OPERATION,
                coordinator=TARGET,
                hosts=conductor.peers(),
                volume=VOLUME,
                snapshots=tuple(SNAPSHOTS),
                source=VolumeEndpoint(host=HOME, address=at.address, port=PORT, export=""),
                bytes_per_second=self.bytes_per_second,
            )
        )
        await world.until(self._is_over, timeout=BOUND_SECONDS, what="the end")
        self.status = self._ended()
        await world.until(self._settled, timeout=BOUND_SECONDS, what="the source to let go")

    def _ended(self) -> OperationStatus | None:
        return self.conductor.ended.get((OPERATION, TARGET))

    def _is_over(self) -> bool:
        self._look()
        return self._ended() is not None

    def _look(self) -> None:
        """Each is somewhere, whole."""
        hosts = self.world.hosts.values()
        for name, writes in SNAPSHOTS.items():
            found = [host.snapshots[name].writes for host in hosts if name in host.snapshots]
            if set(found) != {writes}:
                self.gone.append(f"{name} holds {found} of {writes} writes at {self.world.now():.3f}")

    def _settled(self) -> bool:
        self._look()
        hosts = self.world.hosts
        if not all(host.powered and host.storage_up for host in hosts.values()):
            return False
        done = self.status is not None and self.status.state is OperationState.DONE
        return self.conductor.converged() and not (done and hosts[HOME].snapshots)

    def _judge(self) -> None:
        super()._judge()
        world = self.world
        self.problems += self.gone[:1]
        if self.status is None or self.status.state is OperationState.STUCK:
            return
        here, other = (TARGET, HOME) if self.status.state is OperationState.DONE else (HOME, TARGET)
        if world.hosts[here].snapshots.keys() != SNAPSHOTS.keys() or world.hosts[other].snapshots:
            places = {host.id: sorted(host.snapshots) for host in world.hosts.values()}
            self.problems.append(f"{self.status.state}, and they are at {places}")
        if not world.running(SERVER):
            self.problems.append("the server does not run")


def strikes() -> Iterator[Strike]:
    """Every moment of a clean run that is the operation's own, from the order to its end."""

    def own(strike: Strike) -> bool:
        journal = strike.driver == "ledger" and strike.verb in ("begin", "work", "end")
        moves = journal or "offer" in strike.verb or "fetch" in strike.verb
        return moves and strike.host in (HOME, TARGET)

    return moments(SnapshotMoving(), often=(), counts=own)
