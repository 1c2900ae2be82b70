"""A server's memory and its disk, of one moment, while it runs: it is on one host, its disk on a second, and
its memory is saved on a third, in the simulated world with something going wrong. Either what was saved
remembers exactly the writes that the disk's snapshot holds, or nothing is left; the server always runs on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from crash_plays import BOUND_SECONDS, EDGE, POLLED, Play, Strike, moments
from relocating import VolumeConductor

from nahtlos.model.config import HostConfig, VolumeAttachment
from nahtlos.model.ids import HostId, OperationId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.server_snapshots import Taken
from nahtlos.model.storage import SnapshotSpec, VolumeSpec
from nahtlos.physical.sim.cloudlet import server_spec
from nahtlos.wire.volumes import MemoryTarget, SnapshotOrder

DISK_AT, RUNS_AT, MEMORY_AT = HostId("host-1"), HostId("host-2"), HostId("host-3")
SERVER, DISK = ServerId("web-1"), VolumeId("web-1-v")
MEMORY = VolumeSpec(id=VolumeId("then-memory"), size_mib=700, image=None, host=MEMORY_AT)
OFTEN = ("migrate_progress", "raw_write", "observe")
BESIDE = (*POLLED, "arm", "release", "releases", "reconcile")
"""Of agents at any time: no part of it."""


class Conductor(VolumeConductor):
    def _content(self, host: HostId, last: HostConfig | None) -> HostConfig:
        content = super()._content(host, last)
        kept = (MEMORY,) if host == MEMORY.host else ()
        return msgspec.structs.replace(content, volumes=(*content.volumes, *kept))


@dataclass
class MemorySaving(Play):
    """`moves`: the server goes to the disk's host meanwhile; `killed`: its VMM ends."""

    moves: float | None = None
    killed: float | None = None
    stop_seconds: float = 2.0
    dirty_rate: int | None = None
    """Bytes of memory a second the server touches."""

    def _conducted(self) -> VolumeConductor:
        if self.dirty_rate is not None:
            self.world.dirty_rates[SERVER] = self.dirty_rate
        conductor = Conductor(self.cloudlet, storage_host=DISK_AT)
        conductor.place(server_spec(1), RUNS_AT)
        return conductor

    def order(self) -> SnapshotOrder:
        conductor = self.conductor
        assert isinstance(conductor, VolumeConductor)
        at = conductor.endpoint(MEMORY)
        target = VolumeAttachment(
            volume=MEMORY.id,
            address=at.address,
            port=at.port,
            export=at.export,
            size_mib=MEMORY.size_mib,
        )
        return SnapshotOrder(
            id=OperationId("op-then"),
            coordinator=RUNS_AT,
            hosts=conductor.peers(),
            group="then",
            snapshots=(
                SnapshotSpec(id=SnapshotId("then-disk"), volume=DISK, group="then", hosts=(DISK_AT,)),
            ),
            clients=(conductor.client(SERVER),),
            stop_seconds=self.stop_seconds,
            memory=MemoryTarget(server=SERVER, attachment=target),
        )

    async def _go(self) -> None:
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, VolumeConductor)
        served = self.world.hosts[MEMORY_AT].volumes
        await self._booted(SERVER)
        await world.until(lambda: MEMORY.id in served, timeout=60, what="a place for its memory")
        self.begin()
        order = self.order()
        conductor.order(order)
        if self.moves is not None:
            self.later(self.moves, lambda: conductor.move(SERVER, DISK_AT))
        if self.killed is not None:
            self.later(self.killed, self._kill_vmm)
        await self._ends(order.id, order.coordinator)
        await world.until(self._settled, timeout=BOUND_SECONDS, what="the server to run")

    def _kill_vmm(self) -> None:
        for vmm in self.world.running(SERVER):
            self.world.kill_vmm(vmm, "killed")

    def _settled(self) -> bool:
        conductor = self.conductor
        over = all(conductor.over(order) is not None for order in conductor.orders.values())
        return over and conductor.converged() and len(self.world.running(SERVER)) == 1

    @property
    def taken(self) -> Taken | None:
        told = self.status.result.get("memory") if self.status is not None else None
        return msgspec.json.decode(told, type=Taken) if told else None

    def remembered(self) -> dict[str, Any]:
        """What a guest would go on from."""
        taken = self.taken
        assert taken is not None
        parts = self.world.raw[MEMORY.id]
        return msgspec.json.decode(parts[0][: taken.saved.bytes], type=dict[str, Any])

    def _judge(self) -> None:
        super()._judge()
        world = self.world
        kept = list(world.hosts[DISK_AT].snapshots.values())
        if self.status is None or self.status.state is OperationState.STUCK:
            return
        if self.status.state is not OperationState.DONE:
            self.problems += [f"{each.spec.id} is left of what was given up" for each in kept]
        elif self.taken is None or len(kept) != 1:
            self.problems.append(f"taken: {self.taken}, {len(kept)} snapshots")
        else:
            remembers = self.remembered()["writes"].get(DISK, 0)
            if remembers != kept[0].writes:
                self.problems.append(f"it remembers {remembers} writes, its disk holds {kept[0].writes}")

    @property
    def stood_still(self) -> float:
        return self.world.facts(SERVER).longest_blackout


def strikes() -> Iterator[Strike]:
    def counts(strike: Strike) -> bool:
        return strike.host != EDGE and (strike.verb in OFTEN or strike.verb not in BESIDE)

    return moments(MemorySaving(), often=OFTEN, counts=counts)
