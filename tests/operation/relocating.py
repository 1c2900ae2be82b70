"""One volume that goes from one host to another while a server on a third one writes to it, run in the
simulated world with something going wrong; if asked for, the server moves at the same time.

The frame is that of `crash_plays`.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
from crash_plays import BOUND_SECONDS, EDGE, POLLED, Play, Strike, moments

from nahtlos.model.config import HostConfig, ServerConfig, VolumeEndpoint
from nahtlos.model.errors import Error, Stale
from nahtlos.model.ids import HostId, OperationId, ServerId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.sim.cloudlet import Cloudlet, Conductor, server_spec
from nahtlos.physical.sim.volumes import hosts_with
from nahtlos.wire.messages import Acknowledge, BeginMove, Configure, Message, MoveOrder
from nahtlos.wire.session import Session
from nahtlos.wire.volumes import (
    BeginVolumeTask,
    PeerAddress,
    RelocateOrder,
    VolumeClient,
    VolumeTask,
)

HOME, CLIENT, TARGET = HostId("host-1"), HostId("host-2"), HostId("host-3")
SERVER = ServerId("web-1")
VOLUME = VolumeId("web-1-v")
PORT = 10809
OFTEN = (*POLLED, "relocate_progress")


class VolumeConductor(Conductor):
    """Also orders what volumes are to do, and tells where they are by what was reported of that."""

    def __init__(self, cloudlet: Cloudlet, *, storage_host: HostId) -> None:
        super().__init__(cloudlet, storage_host=storage_host)
        self.homes: dict[VolumeId, tuple[HostId, int]] = {}
        self.tasks: dict[OperationId, VolumeTask] = {}
        self.stale: list[MoveOrder] = []
        self.said: list[tuple[HostId, Message]] = []

    def home(self, volume: VolumeId) -> tuple[HostId, int]:
        return self.homes.get(volume, (self.storage_host, 1))

    def volume(self, volume: VolumeId) -> VolumeSpec:
        host, epoch = self.home(volume)
        return VolumeSpec(id=volume, size_mib=160, image=None, host=host, epoch=epoch)

    def endpoint(self, spec: VolumeSpec) -> VolumeEndpoint:
        at = self.cloudlet.spec(spec.host)
        return VolumeEndpoint(host=spec.host, address=at.address, port=PORT, export=spec.export)

    def peers(self) -> tuple[PeerAddress, ...]:
        return tuple(
            PeerAddress(host=s.id, address=s.address, peer_port=s.peer_port)
            for s in self.cloudlet.specs
            if s.id != EDGE
        )

    def order(self, task: VolumeTask) -> None:
        self.tasks[task.id] = task
        self._wake.set()

    def relocate(
        self, server: ServerId, to: HostId, *, bytes_per_second: int = 0, deadline: float = 600.0
    ) -> RelocateOrder:
        self.learn()
        _, epoch = self.places[server]
        config = self.server_config(server, epoch)
        now = self.volume(config.volume.volume)
        then = msgspec.structs.replace(now, host=to, epoch=now.epoch + 1)
        order = RelocateOrder(
            id=OperationId(f"op-{now.id}-{now.epoch}-{1 + len(self.tasks)}"),
            coordinator=now.host,
            hosts=self.peers(),
            volume=now,
            source=self.endpoint(now),
            destination=then,
            target=self.endpoint(then),
            client=self.client(server),
            bytes_per_second=bytes_per_second,
            deadline=deadline,
        )
        self.order(order)
        return order

    def client(self, server: ServerId) -> VolumeClient:
        place, epoch = self.places[server]
        at = next(peer for peer in self.peers() if peer.host == place)
        volumes = self.server_config(server, epoch).all_volumes
        return VolumeClient(server=server, at=at, attachments=volumes, epoch=epoch)

    def server_config(self, server: ServerId, epoch: int) -> ServerConfig:
        config = super().server_config(server, epoch)
        at = self.endpoint(self.volume(config.volume.volume))
        there = msgspec.structs.replace(config.volume, address=at.address, port=at.port, export=at.export)
        return msgspec.structs.replace(config, volume=there)

    def _content(self, host: HostId, last: HostConfig | None) -> HostConfig:
        volumes = (self.volume(spec.volume) for spec in self.servers.values())
        return msgspec.structs.replace(
            super()._content(host, last), volumes=tuple(v for v in volumes if v.host == host)
        )

    def learn(self) -> None:
        for task in self.tasks.values():
            ended = self.ended.get((task.id, task.coordinator))
            if isinstance(task, RelocateOrder) and ended and ended.state is OperationState.DONE:
                known = self.home(task.volume.id)
                if known[1] < task.destination.epoch:
                    self.homes[task.volume.id] = (task.destination.host, task.destination.epoch)

    async def _tell_all(self) -> None:
        self.learn()
        await super()._tell_all()

    def say(self, host: HostId, message: Message) -> None:
        """Beside what is told again and again."""
        self.said.append((host, message))
        self._wake.set()

    async def _tell(self, host: HostId, session: Session) -> None:
        try:
            await session.request(Configure(config=self._configs[host]), timeout=3.0)
            for task in self.tasks.values():
                if task.coordinator == host and not self._known_to(host, task):
                    await session.request(BeginVolumeTask(order=task), timeout=3.0)
            for said in [each for each in self.said if each[0] == host]:
                self.said.remove(said)
                await session.request(said[1], timeout=3.0)
            for order in self._to_begin(host):
                await self._begin_move(session, order)
            done = tuple(o for (o, h) in self.ended if h == host)
            if done:
                await session.request(Acknowledge(ids=done), timeout=3.0)
        except Error as error:
            self.problems.append(f"{host}: {error}")

    def _known_to(self, host: HostId, task: VolumeTask) -> bool:
        return (task.id, host) in self.ended or self._knows(host, task.id)

    async def _begin_move(self, session: Session, order: MoveOrder) -> None:
        try:
            await session.request(BeginMove(order=order), timeout=3.0)
        except Stale:  # made before a volume went elsewhere: planned anew
            del self.orders[order.id]
            self.stale.append(order)


@dataclass
class Relocating(Play):
    """`moves`: the server goes from host-2 to host-1 meanwhile, so many seconds after the order."""

    moves: float | None = None
    bytes_per_second: int = 0
    deadline: float = 600.0
    left: list[str] = field(default_factory=list[str])
    """Copies that nobody could be told to forget."""

    def _conducted(self) -> VolumeConductor:
        conductor = VolumeConductor(self.cloudlet, storage_host=HOME)
        conductor.place(server_spec(1), CLIENT)
        return conductor

    async def _go(self) -> None:
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, VolumeConductor)
        await self._booted(SERVER)
        self.begin()
        order = conductor.relocate(
            SERVER, TARGET, bytes_per_second=self.bytes_per_second, deadline=self.deadline
        )
        if self.moves is not None:
            self.later(self.moves, self._begin_move)
        await self._ends(order.id, order.coordinator)
        await world.until(self._settled, timeout=BOUND_SECONDS, what="convergence")
        before = world.disks.acknowledged[VOLUME]
        await asyncio.sleep(0.5)
        world.disks.touch(VOLUME)
        if world.disks.acknowledged[VOLUME] <= before:
            self.problems.append("the server's writes are not taken any more")

    def _begin_move(self) -> None:
        self.conductor.move(SERVER, HOME)

    def _settled(self) -> bool:
        conductor = self.conductor
        assert isinstance(conductor, VolumeConductor)
        conductor.learn()
        moved = all(conductor.over(order) is not None for order in conductor.orders.values())
        if not all(host.powered and host.storage_up for host in self.world.hosts.values()):
            return False
        return moved and conductor.converged() and len(self.world.running(SERVER)) == 1

    def _judge(self) -> None:
        super()._judge()
        world, conductor = self.world, self.conductor
        assert isinstance(conductor, VolumeConductor)
        if self.status is None:
            return
        home, epoch = (TARGET, 2) if self.status.state is OperationState.DONE else (HOME, 1)
        if conductor.home(VOLUME) != (home, epoch):
            self.problems.append(f"{self.status.state}, and it is told to be at {conductor.home(VOLUME)}")
        held = hosts_with(world, VOLUME)
        for host, copy in held.items():
            if host == home:
                continue
            if copy.received:
                self.left.append(host)
            else:
                self.problems.append(f"{host} has a copy, too ({'proxy' if copy.proxy else 'its own'})")
        if home not in held or held[home].proxy or held[home].received:
            self.problems.append(f"{home} does not have it as its own")
        for vmm in world.running(SERVER):
            if vmm.server.volume.export != f"{VOLUME}.e{epoch}":
                self.problems.append(f"{vmm.id.unit} reaches it as {vmm.server.volume.export}")


def strikes(*, moves: float | None = None) -> Iterator[Strike]:
    """Every moment of a clean run, from the order to its end."""
    return moments(Relocating(moves=moves), often=OFTEN)
