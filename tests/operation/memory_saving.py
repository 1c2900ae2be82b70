"""A server's memory and its disk, of one moment, while it runs: it is on one host, its disk on a second, and
its memory is saved on a third, in the simulated world with something going wrong. Either what was saved
remembers exactly the writes that the disk's snapshot holds, or nothing is left; the server always runs on."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from moving import BOUND_SECONDS, POLLED, POLLS_STRUCK, Run, Strike, StruckFrame
from relocating import EDGE, VolumeConductor

from nahtlos.model.config import HostConfig, VolumeAttachment
from nahtlos.model.ids import HostId, OperationId, ServerId, SnapshotId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.server_snapshots import Taken
from nahtlos.model.storage import SnapshotSpec, VolumeSpec
from nahtlos.physical.sim.agents import AgentProcess
from nahtlos.physical.sim.cloudlet import Cloudlet, server_spec
from nahtlos.physical.sim.faults import Scripted
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
class MemorySaving(Run):
    """`moves`: the server goes to the disk's host meanwhile; `killed`: its VMM ends."""

    moves: float | None = None
    killed: float | None = None
    cancelled: float | None = None
    stop_seconds: float = 2.0

    async def _play(self, folder: Path) -> None:
        self.cloudlet = Cloudlet.build(
            folder, hosts=3, seed=self.seed, troubles=Scripted(self._when, self.seed), faults=self.faults
        )
        self.conductor = Conductor(self.cloudlet, storage_host=DISK_AT)
        for spec in self.cloudlet.specs:
            self.agents[spec.id] = AgentProcess(
                self.world, self.cloudlet.network, self.cloudlet.settings(spec.id)
            )
        if self.dirty_rate is not None:
            self.world.dirty_rates[SERVER] = self.dirty_rate
        self.conductor.place(server_spec(1), RUNS_AT)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self.conductor.run())]
            running += [tasks.create_task(a.run()) for a in self.agents.values()]
            try:
                await self._go()
            except TimeoutError as error:
                self.problems.append(str(error))
            finally:
                for task in running:
                    task.cancel()
        self._judge_memory()

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
        await world.until(
            lambda: world.facts(SERVER).up and conductor.converged() and MEMORY.id in served,
            timeout=60,
            what="boot",
        )
        self._since = {}
        if isinstance(self.faults, StruckFrame):
            self.faults.armed = True
        order = self.order()
        conductor.order(order)
        if self.moves is not None:
            self.later(self.moves, lambda: conductor.move(SERVER, DISK_AT))
        if self.killed is not None:
            self.later(self.killed, self._kill_vmm)
        key = (order.id, order.coordinator)
        await world.until(lambda: key in conductor.ended, timeout=BOUND_SECONDS, what="the end")
        self.status = conductor.ended[key]
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

    def _judge_memory(self) -> None:
        world = self.world
        self.problems += [f"{v.kind}: {v.subject}: {v.text} (at {v.at:.3f})" for v in world.violations]
        for host, agent in self.agents.items():
            self.problems += [f"bug in the agent of {host}: {b!r}" for b in agent.bugs]
        kept = list(world.hosts[DISK_AT].snapshots.values())
        if self.status is None or self.status.state is OperationState.STUCK:
            self.problems.append(f"not ended: {self.status}")
        elif self.status.state is not OperationState.DONE:
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
    clean = MemorySaving().play()
    assert not clean.problems, clean.problems
    seen: set[Strike] = set()
    for strike in clean.seen:
        often = strike.verb in OFTEN and strike.occurrence > POLLS_STRUCK
        other = strike.verb in BESIDE and strike.verb not in OFTEN
        if strike not in seen and not often and not other and strike.host != EDGE:
            seen.add(strike)
            yield strike
