"""A volume that gets a second copy while a server on a third host writes to it, and then loses it again, run
in the simulated world with something going wrong.

    its rebuild is ordered --ended--> recorded, both written to --the copy's host loses power--> recorded,
    goes on

The frame is that of `crash_plays`. The record is as short as it can be: which copies are current, by
which epochs, and how often one was lost.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from crash_plays import BOUND_SECONDS, Play, Strike, moments
from relocating import CLIENT, HOME, OFTEN, SERVER, TARGET, VOLUME, Relocating, VolumeConductor

from nahtlos.model.config import HostConfig, ServerConfig, VolumeEndpoint
from nahtlos.model.ids import HostId, OperationId, PortId, ServerId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import Replica, ReplicaState, VolumeSpec
from nahtlos.physical.agent.volumes.replicas import reached_by_copies
from nahtlos.physical.sim.cloudlet import Cloudlet, server_spec
from nahtlos.physical.sim.volumes import hosts_with
from nahtlos.wire.messages import Hello, Message, Report, Welcome
from nahtlos.wire.session import Session
from nahtlos.wire.transport import Channel
from nahtlos.wire.volumes import RebuildOrder, ReplicaLost, ReplicasRecorded

COPY_EPOCH = 2
"""By which the copy that comes first is served."""


class ReplicaConductor(VolumeConductor):
    """Also keeps the record of copies."""

    def __init__(self, cloudlet: Cloudlet, *, storage_host: HostId) -> None:
        super().__init__(cloudlet, storage_host=storage_host)
        self.current: list[HostId] = [HOME]
        self.losses = 0
        self.copy_epoch = COPY_EPOCH
        self.pinned = False
        self.removed: tuple[ServerId, ...] = ()
        self.applied: set[OperationId] = set()

    def volume(self, volume: VolumeId) -> VolumeSpec:
        state = ReplicaState.CURRENT if TARGET in self.current else ReplicaState.STALE
        replica = Replica(host=TARGET, state=state, epoch=self.copy_epoch)
        return VolumeSpec(id=volume, size_mib=160, image=None, host=HOME, epoch=1, replicas=(replica,))

    def copy(self, volume: VolumeId, host: HostId) -> VolumeEndpoint:
        at, epoch = self.cloudlet.spec(host), 1 if host == HOME else self.copy_epoch
        return VolumeEndpoint(host=host, address=at.address, port=10809, export=f"{volume}.e{epoch}")

    def server_config(self, server: ServerId, epoch: int) -> ServerConfig:
        config = super().server_config(server, epoch)
        copies = tuple(self.copy(config.volume.volume, host) for host in self.current)
        return msgspec.structs.replace(config, volume=reached_by_copies(config.volume, copies))

    def _content(self, host: HostId, last: HostConfig | None) -> HostConfig:
        specs = [self.volume(spec.volume) for spec in self.servers.values()]
        return msgspec.structs.replace(
            super()._content(host, last),
            volumes=tuple(spec.at(host) for spec in specs if host in self.current),
            pinned_volumes=tuple(spec.id for spec in specs) if self.pinned else (),
            removed_servers=self.removed,
        )

    def _reflect(self, host: HostId, last: HostConfig | None) -> tuple[PortId, ...]:
        return () if self.removed else super()._reflect(host, last)

    def remove(self, server: ServerId) -> None:
        """Its volume stays."""
        self.removed = (*self.removed, server)
        del self.places[server]
        self._wake.set()

    def pin(self) -> None:
        self.pinned = True
        self._wake.set()

    def rebuild(self, server: ServerId) -> RebuildOrder:
        volume = self.servers[server].volume
        order = RebuildOrder(
            id=OperationId(f"op-{volume}-rebuild-{self.copy_epoch}"),
            coordinator=HOME,
            hosts=self.peers(),
            volume=self.volume(volume),
            source=self.copy(volume, HOME),
            target=self.copy(volume, TARGET),
            client=self.client(server),
        )
        self.order(order)
        return order

    def give_up_copy(self) -> None:
        """An operator wants it made anew. Its server has not heard of that when the rebuild is planned, and
        the configuration that says so leaves the volume alone by then."""
        self.current.remove(TARGET)
        self.copy_epoch += 1
        self.pin()

    def learn(self) -> None:
        self._learn()

    def _learn(self) -> None:
        for task in self.tasks.values():
            ended = self.ended.get((task.id, task.coordinator))
            if ended is None or task.id in self.applied:
                continue
            self.applied.add(task.id)
            self.pinned = False
            if ended.state is OperationState.DONE and self.losses == 0:
                self.current.append(TARGET)

    def _lose(self, body: ReplicaLost) -> Message:
        self.losses += body.lost == TARGET
        if body.lost in self.current and len(self.current) > 1:
            self.current.remove(body.lost)
        self._wake.set()
        return ReplicasRecorded(attachment=self.server_config(body.server, body.epoch).volume)

    async def _serve(self, channel: Channel) -> None:
        host = HostId(channel.peer.removeprefix("host/"))

        async def answer(body: Message, _epoch: int) -> Message:
            match body:
                case Hello():
                    self._sessions[host] = session
                    self._wake.set()
                    return Welcome(protocol=body.protocol_max, orchestrator_epoch=self.epoch)
                case Report():
                    self._take(body.inventory)
                case ReplicaLost():
                    return self._lose(body)
                case _:
                    pass
            return Welcome(protocol=1)

        session = Session(channel, answer, epoch=self.epoch)
        await session.run()
        if self._sessions.get(host) is session:
            del self._sessions[host]


@dataclass
class Replicating(Relocating):
    """`loses`: the copy's host loses power once it is current. `ends`: the server's VMM is killed instead.
    `removed`: the server is removed while it writes; with `ends`, at the moment its VMM is killed."""

    loses: bool = True
    ends: bool = False
    removed: bool = False
    steps: bool = False
    """Its copies are waited for to be in step."""
    anew: bool = False
    """The copy is made anew by an operator's wish, while its server writes to it."""

    def _conducted(self) -> ReplicaConductor:
        conductor = ReplicaConductor(self.cloudlet, storage_host=HOME)
        conductor.place(server_spec(1), CLIENT)
        return conductor

    async def _go(self) -> None:
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, ReplicaConductor)
        await self._booted(SERVER)
        conductor.pin()
        await asyncio.sleep(0.1)
        await world.until(conductor.converged, timeout=60, what="everybody knows what is pinned")
        self.begin()
        order = conductor.rebuild(SERVER)
        bound = BOUND_SECONDS
        await self._ends(order.id, order.coordinator)
        await world.until(self._quiet, timeout=bound, what="convergence")
        await self._writes_on()
        if self.anew and TARGET in conductor.current:
            await self._make_anew()
        if self.steps:
            held = hosts_with(world, VOLUME)
            await world.until(lambda: bool(held[HOME].in_step), timeout=bound, what="a step")
            await world.until(
                lambda: held[TARGET].in_step == held[HOME].in_step, timeout=bound, what="the same step"
            )
        if self.ends:
            (vmm,) = world.running(SERVER)
            world.kill_vmm(vmm, "killed")
        if self.removed:
            await self._remove()
        elif self.ends:
            await world.until(lambda: len(world.running(SERVER)) == 1, timeout=bound, what="a new start")
            await world.until(conductor.converged, timeout=bound, what="convergence")
            await self._writes_on()
        elif self.loses and TARGET in conductor.current:
            world.power_off(TARGET)
            self.agents[TARGET].held_down = True
            self.later(0, lambda: self.agents[TARGET].kill("power"))
            await self._writes_on()
            if TARGET in conductor.current:
                self.problems.append("a copy that is gone is recorded as current")

    async def _make_anew(self) -> None:
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, ReplicaConductor)
        conductor.give_up_copy()
        await world.until(conductor.converged, timeout=BOUND_SECONDS, what="the copy's being stale is known")
        order = conductor.rebuild(SERVER)
        await self._ends(order.id, order.coordinator)
        await world.until(self._quiet, timeout=BOUND_SECONDS, what="convergence")
        await self._writes_on()

    async def _remove(self) -> None:
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, ReplicaConductor)
        world.facts(SERVER).deleted = True
        conductor.remove(SERVER)
        await world.until(
            lambda: conductor.converged() and not world.hosts[CLIENT].vmms,
            timeout=BOUND_SECONDS,
            what="removal",
        )
        held = hosts_with(world, VOLUME)
        if len(conductor.current) > 1 and any(held[host].in_doubt for host in conductor.current):
            self.problems.append("several copies count that may differ")

    def _quiet(self) -> bool:
        conductor = self.conductor
        assert isinstance(conductor, ReplicaConductor)
        return bool(conductor.applied) and conductor.converged() and len(self.world.running(SERVER)) == 1

    async def _writes_on(self) -> None:
        disks = self.world.disks
        before = disks.acknowledged[VOLUME]

        def more() -> bool:
            disks.touch(VOLUME)
            return disks.acknowledged[VOLUME] > before + 2

        await self.world.until(more, timeout=BOUND_SECONDS, what="further writes")

    def _judge(self) -> None:
        Play._judge(self)
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, ReplicaConductor)
        held = hosts_with(world, VOLUME)
        for host in conductor.current:
            if host not in held or held[host].writes != world.disks.acknowledged[VOLUME]:
                self.problems.append(f"the current copy on {host} lacks writes")
        for vmm in world.running(SERVER):
            reached = {each.host for each in vmm.server.volume.copies}
            wanted = set(conductor.current) if len(conductor.current) > 1 else set[HostId]()
            if reached != wanted:
                self.problems.append(f"{vmm.id.unit} reaches {reached}, recorded are {wanted}")


def strikes(clean: Replicating | None = None) -> Iterator[Strike]:
    """Every moment of a clean run."""
    return moments(clean or Replicating(), often=OFTEN)
