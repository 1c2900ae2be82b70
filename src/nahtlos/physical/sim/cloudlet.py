"""A small cloud that is told what to do step by step, without an orchestrator's plans: hosts, one network,
servers where a test says.

Owns the numbered configurations, as the executor would derive them from a blueprint: a server's place is
where its highest epoch was last reported, and a former host passes frames on until every host has converged.
Never decides that anything moves.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from nahtlos.model.config import HostConfig, NetworkConfig, PortConfig, ServerConfig, VolumeAttachment
from nahtlos.model.errors import Error
from nahtlos.model.ids import (
    HostId,
    NetworkId,
    OperationId,
    PortId,
    ReleaseId,
    SecurityGroupId,
    ServerId,
    VolumeId,
)
from nahtlos.model.inventory import HostInventory, OperationState, OperationStatus, RunState
from nahtlos.model.networking import Direction, NetworkSpec, PortSpec, SecurityGroupSpec, SecurityRule
from nahtlos.model.nouns import HostRole, HostSpec, ServerSpec, Size
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.settings import AgentSettings
from nahtlos.physical.sim.faults import Life, Troubles
from nahtlos.physical.sim.world import World
from nahtlos.wire.memory import Faults, MemoryNetwork
from nahtlos.wire.messages import (
    PROTOCOL_MAX,
    Acknowledge,
    BeginMove,
    BeginReplace,
    Configure,
    Done,
    Hello,
    Message,
    MoveOrder,
    ReplaceOrder,
    Report,
    Welcome,
)
from nahtlos.wire.session import Session
from nahtlos.wire.transport import Channel, Listener

OLD = ReleaseId("sim-1")
NEW = ReleaseId("sim-2")
FUNCTIONS = ReleaseId("sim-network-1")
"""A release of network functions."""
EDGE = HostId("edge-1")
NETWORK = NetworkId("tenant")
ORCHESTRATOR = ("10.99.0.1", 7443)
PEER_PORT = 7444
TOLD_EVERY = 1.0
"""Seconds between two attempts to tell the agents what they should know."""
MEMORY_MIB = 64
PRECOPY_DEADLINE = 6.0


def host_specs(count: int, edges: int = 1) -> tuple[HostSpec, ...]:
    """Edge hosts first: `edge-1` and so on, then `host-1` and so on."""
    edge = (
        HostSpec(id=HostId(f"edge-{i}"), role=HostRole.EDGE, address=f"10.99.0.{4 + i}", peer_port=PEER_PORT)
        for i in range(1, edges + 1)
    )
    hosts = (
        HostSpec(
            id=HostId(f"host-{i}"), role=HostRole.COMPUTE, address=f"10.99.0.{10 + i}", peer_port=PEER_PORT
        )
        for i in range(1, count + 1)
    )
    return (*edge, *hosts)


def network_spec() -> NetworkSpec:
    return NetworkSpec(
        id=NETWORK,
        vni=100,
        cidr="10.77.0.0/24",
        gateway_ip="10.77.0.1",
        gateway_mac="52:54:00:4d:00:01",
        gateway_host=EDGE,
        dhcp_ip="10.77.0.2",
    )


GROUP = SecurityGroupSpec(
    id=SecurityGroupId("web"),
    rules=(SecurityRule(direction=Direction.INGRESS), SecurityRule(direction=Direction.EGRESS)),
)


def server_spec(number: int, memory_mib: int = MEMORY_MIB, *, guarded: bool = False) -> ServerSpec:
    """`web-<number>` with one port and one volume. `guarded`: by a firewall that remembers."""
    port = PortSpec(
        id=PortId(f"web-{number}-p"),
        network=NETWORK,
        mac=f"52:54:00:4d:00:{9 + number:02x}",
        ip=f"10.77.0.{9 + number}",
        security_groups=(GROUP.id,) if guarded else (),
    )
    return ServerSpec(
        id=ServerId(f"web-{number}"),
        size=Size(vcpus=1, memory_mib=memory_mib),
        volume=VolumeId(f"web-{number}-v"),
        ports=(port,),
        machine="pc-q35-10.0",
    )


def settings_of(world: World, spec: HostSpec, capacity: Size) -> AgentSettings:
    state = world.state_dir / spec.id
    return AgentSettings(
        host=spec.id,
        role=spec.role,
        address=spec.address,
        peer_port=spec.peer_port,
        orchestrator_address=ORCHESTRATOR[0],
        orchestrator_port=ORCHESTRATOR[1],
        state_dir=state,
        run_dir=state,
        ram_dir=state,
        releases_dir=state,
        images_dir=state,
        cache_dir=state,
        pki_dir=state,
        supervisor_socket=state / "supervisor.sock",
        capacity=capacity,
    )


@dataclass
class Cloudlet:
    """World, network and hosts of one run."""

    world: World
    network: MemoryNetwork
    specs: tuple[HostSpec, ...]
    capacity: Size = field(default_factory=lambda: Size(vcpus=8, memory_mib=4096))

    @classmethod
    def build(
        cls,
        folder: Path,
        *,
        hosts: int,
        seed: int,
        troubles: Troubles | None = None,
        faults: Faults | None = None,
    ) -> "Cloudlet":
        world = World(seed=seed, troubles=troubles, state_dir=folder)
        network = MemoryNetwork(faults or Faults(seed, delay=(0.0001, 0.0008)), on_failure=_ignore)
        cloudlet = cls(world=world, network=network, specs=host_specs(hosts))
        for spec in cloudlet.specs:
            releases = (OLD, NEW, FUNCTIONS)
            world.add_host(
                spec.id, spec.address, role=spec.role, capacity=cloudlet.capacity, releases=releases
            )
        return cloudlet

    def spec(self, host: HostId) -> HostSpec:
        return next(s for s in self.specs if s.id == host)

    def settings(self, host: HostId) -> AgentSettings:
        return settings_of(self.world, self.spec(host), self.capacity)


class Conductor:
    """Stands in for the orchestrator: tells each agent its configuration and the moves it was given, again
    and again, and follows what they report."""

    def __init__(self, cloudlet: Cloudlet, *, storage_host: HostId) -> None:
        self.cloudlet = cloudlet
        self.storage_host = storage_host
        self.servers: dict[ServerId, ServerSpec] = {}
        self.places: dict[ServerId, tuple[HostId, int]] = {}
        """Host and epoch."""
        self.orders: dict[OperationId, MoveOrder] = {}
        self.replacements: dict[OperationId, ReplaceOrder] = {}
        self.ended: dict[tuple[OperationId, HostId], OperationStatus] = {}
        self.reports: dict[HostId, HostInventory] = {}
        self.epoch = 1
        self.problems: list[str] = []
        self._configs: dict[HostId, HostConfig] = {}
        self._sessions: dict[HostId, Session] = {}
        self._wake = asyncio.Event()
        self._life = Life("orchestrator")

    # --- intent ---

    def place(self, spec: ServerSpec, host: HostId) -> None:
        self.servers[spec.id] = spec
        self.places[spec.id] = (host, 1)
        self._wake.set()

    def move(
        self,
        server: ServerId,
        to: HostId,
        number: int = 1,
        *,
        bandwidth: int = 4 << 30,
        boost: int = 0,
        deadline: float = PRECOPY_DEADLINE,
        post_copy: bool = False,
        compressed: bool = False,
    ) -> MoveOrder:
        source, epoch = self.places[server]
        here, there = self.cloudlet.spec(source), self.cloudlet.spec(to)
        order = MoveOrder(
            id=OperationId(f"op-{server}-{epoch}-{number}"),
            server=self.server_config(server, epoch),
            ports=self._ports(server, source),
            source=source,
            destination=to,
            source_address=here.address,
            destination_address=there.address,
            destination_peer_port=there.peer_port,
            precopy_deadline=deadline,
            bandwidth=bandwidth,
            boost=boost,
            post_copy=post_copy,
            compressed=compressed,
        )
        self.orders[order.id] = order
        self._wake.set()
        return order

    def replace(self, server: ServerId, release: ReleaseId, number: int = 1) -> ReplaceOrder:
        host, epoch = self.places[server]
        order = ReplaceOrder(
            id=OperationId(f"op-{server}-{epoch}-in-place-{number}"),
            host=host,
            server=self.server_config(server, epoch),
            ports=self._ports(server, host),
            release=release,
        )
        self.replacements[order.id] = order
        self._wake.set()
        return order

    def replaced(self, order: ReplaceOrder) -> OperationStatus | None:
        """How it ended."""
        return self.ended.get((order.id, order.host))

    def over(self, order: MoveOrder) -> OperationStatus | None:
        """How it ended at its source, once it has ended on both hosts."""
        at_source = self.ended.get((order.id, order.source))
        return at_source if (order.id, order.destination) in self.ended else None

    def converged(self) -> bool:
        """Every host has reported the newest configuration back, and nothing is passed on any more."""
        return all(
            host in self.reports
            and self.reports[host].generation == config.generation
            and not config.reflect
            and config == self._config(host)
            for host, config in self._configs.items()
        ) and len(self._configs) == len(self.cloudlet.specs)

    # --- process ---

    def kill(self) -> None:
        self._life.end("killed")

    async def run(self) -> None:
        """Until cancelled; a killed one comes back after a moment with the next epoch and what it had
        decided, but without its connections."""
        while True:
            self._life = Life(f"orchestrator {self.epoch}")
            self.cloudlet.world.note("", "orchestrator starts", str(self.epoch))
            self._life.on_end(lambda: self.cloudlet.network.vanish("orchestrator"))
            listener = await self._listen()
            try:
                while self._life.alive:
                    await self._tell_all()
                    self._wake.clear()
                    await self._pause()
            finally:
                await listener.close()
                self._sessions.clear()
            await asyncio.sleep(1.0)
            self.epoch += 1

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(TOLD_EVERY):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _listen(self) -> Listener:
        transport = self.cloudlet.network.transport("orchestrator")
        return await transport.listen(*ORCHESTRATOR, self._serve)

    async def _serve(self, channel: Channel) -> None:
        host = HostId(channel.peer.removeprefix("host/"))

        async def answer(body: Message, _epoch: int) -> Message:
            match body:
                case Hello():
                    self._sessions[host] = session
                    self._wake.set()
                    return Welcome(
                        protocol=min(body.protocol_max, PROTOCOL_MAX), orchestrator_epoch=self.epoch
                    )
                case Report():
                    self._take(body.inventory)
                case _:
                    pass
            return Done()

        session = Session(channel, answer, epoch=self.epoch)
        await session.run()
        if self._sessions.get(host) is session:
            del self._sessions[host]

    def _take(self, report: HostInventory) -> None:
        self.reports[report.host] = report
        for server in report.servers:
            known = self.places.get(server.id)
            if known and server.epoch > known[1] and server.state is not RunState.INCOMING:
                self.places[server.id] = (report.host, server.epoch)
                self._wake.set()
        for operation in report.operations:
            if operation.state is not OperationState.RUNNING:
                self.ended[operation.id, report.host] = operation
                self._wake.set()

    async def _tell_all(self) -> None:
        for spec in self.cloudlet.specs:
            wanted = self._config(spec.id)
            self._configs[spec.id] = wanted
        async with asyncio.TaskGroup() as tasks:
            for host, session in tuple(self._sessions.items()):
                tasks.create_task(self._tell(host, session))

    async def _tell(self, host: HostId, session: Session) -> None:
        try:
            await session.request(Configure(config=self._configs[host]), timeout=3.0)
            for order in self._to_begin(host):
                await session.request(BeginMove(order=order), timeout=3.0)
            for replacement in self.replacements.values():
                if replacement.host == host and self.replaced(replacement) is None:
                    await session.request(BeginReplace(order=replacement), timeout=3.0)
            done = tuple(o for (o, h) in self.ended if h == host)
            if done:
                await session.request(Acknowledge(ids=done), timeout=3.0)
        except Error as error:
            self.problems.append(f"{host}: {error}")

    def _to_begin(self, host: HostId) -> list[MoveOrder]:
        """The destination first; the source once the destination has reported it."""
        found: list[MoveOrder] = []
        for order in self.orders.values():
            if (order.id, host) in self.ended or self._knows(host, order.id):
                continue
            other = order.destination if host == order.source else order.source
            ended_there = (order.id, other) in self.ended
            begun_there = self._knows(other, order.id) or ended_there
            if (host == order.destination and not ended_there) or (host == order.source and begun_there):
                found.append(order)
        return found

    def _knows(self, host: HostId, operation: OperationId) -> bool:
        report = self.reports.get(host)
        return report is not None and any(o.id == operation for o in report.operations)

    # --- configurations ---

    def server_config(self, server: ServerId, epoch: int) -> ServerConfig:
        spec = self.servers[server]
        at = self.cloudlet.spec(self.storage_host)
        volume = VolumeAttachment(
            volume=spec.volume, address=at.address, port=10809, export=f"{spec.volume}.e1"
        )
        return ServerConfig(spec=spec, epoch=epoch, volume=volume)

    def _ports(self, server: ServerId, host: HostId) -> tuple[PortConfig, ...]:
        vtep = self.cloudlet.spec(host).address
        return tuple(
            PortConfig(
                id=p.id,
                server=server,
                mac=p.mac,
                ip=p.ip,
                host=host,
                vtep=vtep,
                security_groups=p.security_groups,
            )
            for p in self.servers[server].ports
        )

    def network_config(self) -> NetworkConfig:
        ports = tuple(p for server, (host, _) in self.places.items() for p in self._ports(server, host))
        return NetworkConfig(
            spec=network_spec(),
            ports=ports,
            gateway_vtep=self.cloudlet.spec(EDGE).address,
            vteps=tuple(s.address for s in self.cloudlet.specs),
        )

    def _config(self, host: HostId) -> HostConfig:
        last = self._configs.get(host)
        wanted = self._content(host, last)
        if last is None:
            return msgspec.structs.replace(wanted, generation=1)
        same = msgspec.structs.replace(wanted, generation=last.generation)
        return last if same == last else msgspec.structs.replace(wanted, generation=last.generation + 1)

    def _content(self, host: HostId, last: HostConfig | None) -> HostConfig:
        compute = self.cloudlet.spec(host).role is HostRole.COMPUTE
        return HostConfig(
            host=host,
            generation=0,
            release=OLD if compute else None,
            networks=(self.network_config(),),
            servers=tuple(
                self.server_config(server, epoch)
                for server, (place, epoch) in self.places.items()
                if place == host
            ),
            volumes=tuple(
                VolumeSpec(id=spec.volume, size_mib=160, image=None, host=host)
                for spec in self.servers.values()
                if host == self.storage_host
            ),
            reflect=self._reflect(host, last),
            security_groups=(GROUP,) if self._guards() else (),
            hosts=self.cloudlet.specs,
        )

    def _guards(self) -> bool:
        return any(port.security_groups for spec in self.servers.values() for port in spec.ports)

    def _reflect(self, host: HostId, last: HostConfig | None) -> tuple[PortId, ...]:
        if last is None:
            return ()
        now = placed(self.network_config())
        were_here = {p for p, place in placed(last.networks[0]).items() if place == host} | set(last.reflect)
        return tuple(sorted(p for p in were_here if now[p] != host and not self._all_know(p, now[p], host)))

    def _all_know(self, port: PortId, place: HostId, except_for: HostId) -> bool:
        return all(
            placed(config.networks[0]).get(port) == place
            and host in self.reports
            and self.reports[host].generation >= config.generation
            for host, config in self._configs.items()
            if host != except_for
        )


def _ignore(_party: str, _error: BaseException) -> None:
    """A connection that ended badly is nothing special here; its two parties must cope."""


def placed(network: NetworkConfig) -> Mapping[PortId, HostId]:
    return {port.id: port.host for port in network.ports}
