"""One real orchestrator over a real store, with scripted agents on an in-memory network.

A scripted agent speaks the wire and keeps what it must across an orchestrator's death: its configuration,
its servers, its operations. It refuses stale epochs and generations as a real one does. Moves end when both
sides have begun, unless a test holds them.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
from checked_memory import not_believed

from nahtlos import __version__
from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Conflict, ErrorRecord, NotFound, Refused, Stale
from nahtlos.model.ids import HostId, ImageId, NetworkId, OperationId, ReleaseId, ServerId, VolumeId
from nahtlos.model.inventory import (
    ComputeStatus,
    HostInventory,
    OperationKind,
    OperationState,
    OperationStatus,
    RunState,
    ServerStatus,
    SnapshotStatus,
    VolumeStatus,
)
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import Component, HostRole, Release, Size
from nahtlos.model.storage import StorageBackend
from nahtlos.runtime.controllers.bootstrap import bootstrap
from nahtlos.runtime.controllers.cloud import JoinRequest, ServerRequest
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.orchestrator import Orchestrator
from nahtlos.runtime.controllers.volumes import FileView, ImageFileRequest, ImageRequest, ImageView
from nahtlos.runtime.settings import CloudSettings
from nahtlos.runtime.store.store import Store
from nahtlos.wire.memory import MemoryNetwork
from nahtlos.wire.messages import (
    Acknowledge,
    BeginMove,
    BeginVerify,
    CancelOperation,
    Configure,
    ConsoleData,
    ConsoleRead,
    Done,
    Event,
    Hello,
    Message,
    MoveOrder,
    Ping,
    Report,
)
from nahtlos.wire.session import Session
from nahtlos.wire.volumes import BeginVolumeTask, RebuildOrder, SetCopySpeed, VolumeTask

AGENTS = ("10.99.0.1", 7443)
OLD, NEW = ReleaseId("qemu-10.0.2-aaaaaaaaaaaa"), ReleaseId("qemu-11.1.3-bbbbbbbbbbbb")
GUEST = ImageId("guest-1")
EDGE = HostId("edge-1")
CLOUD = CloudSettings(
    networks=(
        NetworkSpec(
            id=NetworkId("tenant"),
            vni=100,
            cidr="10.77.0.0/24",
            gateway_ip="10.77.0.1",
            gateway_mac="02:00:00:4d:00:01",
            gateway_host=EDGE,
            dhcp_ip="10.77.0.2",
        ),
    ),
    uplinks={NetworkId("tenant"): "out0"},
    promised=Size(vcpus=8, memory_mib=2048),
)


class Killed(BaseException):
    """The orchestrator's process ends here."""


class Signatures:
    """Signs by name; the cryptography is tested elsewhere."""

    certificate_pem = "authority"

    def sign_host_csr(self, csr_pem: str, host: HostId, address: str) -> str:
        if csr_pem != "request":
            raise Refused("not a certificate signing request", field="csr_pem")
        return f"certificate of {host} at {address}"


class Releases:
    def __init__(self) -> None:
        self.releases = {
            OLD: release(OLD, "10.0.2", ("pc-q35-9.2", "pc-q35-10.0")),
            NEW: release(NEW, "11.1.3", ("pc-q35-9.2", "pc-q35-10.0", "pc-q35-11.1")),
        }
        self.damaged: set[ReleaseId] = set()

    async def built(self) -> tuple[Release, ...]:
        return tuple(self.releases.values())

    async def verified(self, release: ReleaseId) -> Release:
        if release not in self.releases:
            raise NotFound(f"release '{release}' is not built", field="release", remedy="build it")
        if release in self.damaged:
            raise Refused(
                "the file differs from the manifest", field="root/bin/qemu", remedy="build it again"
            )
        return self.releases[release]


class Images:
    def __init__(self) -> None:
        self.written: dict[str, FileView] = {}

    async def images(self) -> dict[ImageId, int]:
        return {GUEST: 150}

    def coming(self) -> tuple[ImageView, ...]:
        return ()

    async def take_in(self, request: ImageRequest) -> ImageView:
        return ImageView(id=ImageId(request.name), size_mib=1, volumes=(), progress=0.0)

    async def delete(self, image: ImageId) -> None:
        return None

    async def write_out(self, image: ImageId, request: ImageFileRequest) -> FileView:
        view = FileView(file=request.file, image=image, format=request.format)
        self.written[request.file] = msgspec.structs.replace(view, progress=1.0, bytes=7, sha256="5eed")
        return view

    def files(self) -> tuple[FileView, ...]:
        return tuple(self.written.values())


def release(name: ReleaseId, version: str, machines: tuple[str, ...]) -> Release:
    return Release(
        id=name,
        component=Component.HYPERVISOR,
        version=version,
        suite="trixie",
        digest="",
        machine_types=machines,
    )


class ScriptedAgent:
    """Survives the orchestrator; `hosts` are all agents, so that a move can end at both."""

    def __init__(self, network: MemoryNetwork, host: HostId, hosts: dict[HostId, "ScriptedAgent"]) -> None:
        self.host = host
        self.role = HostRole.EDGE if host == EDGE else HostRole.COMPUTE
        self.hosts = hosts
        self.party = f"host/{host}"
        self.protocols = (1, 1)
        self.version = __version__
        self.capabilities: tuple[str, ...] = ("move", "data-places", "rebuild-in-use", "snapshot-move")
        self.epoch = 0
        self.config: HostConfig | None = None
        self.converges = True
        self.generation = 0
        self.generations: list[int] = []
        self.owned: dict[ServerId, tuple[int, bool, ReleaseId | None]] = {}
        """Epoch, whether it is here, the release that runs it."""
        self.has: dict[ServerId, ComputeStatus] = {}
        """What servers have of this host, where that is not what they are to have."""
        self.operations: dict[OperationId, OperationStatus] = {}
        self.disk_problems: tuple[str, ...] = ()
        self.orders: dict[OperationId, MoveOrder] = {}
        self.begun: list[OperationId] = []
        self.forgotten: set[OperationId] = set()
        self.verified: ReleaseId | None = None
        self.refuse_moves = 0
        self.hold_moves = False
        self.hold_volume_tasks = False
        self.fail_volume_tasks = 0
        self.refuse_volume_tasks: ErrorRecord | None = None
        self.results: dict[type[VolumeTask], dict[str, str]] = {}
        """What comes of orders of a kind."""
        self.problems: dict[VolumeId, str] = {}
        self.speeds: list[tuple[OperationId, int]] = []
        self.volume_orders: list[VolumeTask] = []
        self.refusal: BaseException | None = None
        self._network = network
        self._changed = asyncio.Event()
        self._session: Session | None = None

    async def run(self) -> None:
        while True:
            try:
                await self._converse()
            except (Refused, Stale) as error:
                self.refusal = error
            except Exception:
                pass
            await asyncio.sleep(0.02)

    async def _converse(self) -> None:
        transport = self._network.transport(self.party)
        channel = await transport.dial(*AGENTS, expect="orchestrator", timeout=5.0)
        session = self._session = Session(channel, self._obey)
        reading = asyncio.create_task(session.run())
        try:
            welcome = await session.request(self.hello(), timeout=5.0)
            self._obey_epoch(welcome.orchestrator_epoch)  # type: ignore[attr-defined]
            while not reading.done():
                self._changed.clear()
                await session.notify(Report(inventory=self.inventory()))
                change = asyncio.create_task(self._changed.wait())
                await asyncio.wait({reading, change}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
        finally:
            reading.cancel()
            await session.close()

    def hello(self) -> Hello:
        return Hello(
            host=self.host,
            role=self.role,
            protocol_min=self.protocols[0],
            protocol_max=self.protocols[1],
            agent_version=self.version,
            capabilities=self.capabilities,
            boot_id="boot",
            orchestrator_epoch=self.epoch,
        )

    async def tell(self, kind: str) -> None:
        assert self._session is not None
        event = Event(host=self.host, at=1.0, kind=kind, subject=self.host, text="told")
        await self._session.request(event, timeout=5.0)

    def changed(self) -> None:
        self._changed.set()

    def _obey_epoch(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise Stale(f"epoch {self.epoch} commands here, not {epoch}")
        self.epoch = epoch

    async def _obey(self, body: Message, epoch: int) -> Message:
        self._obey_epoch(epoch)
        match body:
            case Configure():
                self._configure(body.config)
            case BeginMove():
                self._begin_move(body.order)
            case BeginVerify():
                self._begin_verify(body)
            case BeginVolumeTask():
                self._begin_volume_task(body.order)
            case CancelOperation():
                self.end_volume_task(body.id, OperationState.UNDONE)
            case SetCopySpeed():
                self.speeds.append((body.id, body.bytes_per_second))
            case Acknowledge():
                for operation in body.ids:
                    assert self.operations[operation].state is not OperationState.RUNNING
                    del self.operations[operation]
                    self.forgotten.add(operation)
            case ConsoleRead():
                return ConsoleData(data=b"login:"[body.offset :], next_offset=6)
            case Ping():
                pass
            case _:
                raise Refused(f"{type(body).__name__} is not for an agent")
        self.changed()
        return Done()

    def _configure(self, config: HostConfig) -> None:
        if self.config and config.generation < self.config.generation:
            raise Stale("older generation")
        if self.config and config.generation == self.config.generation:
            if config != self.config:
                raise Refused("same generation, other content")
            return
        self.config = config
        self.generations.append(config.generation)
        if self.converges:
            self.converge()

    def converge(self) -> None:
        config = self.config
        assert config is not None
        for server in config.servers:
            self.owned.setdefault(server.spec.id, (server.epoch, True, config.release))
        for removed in config.removed_servers:
            self.owned.pop(removed, None)
        self.generation = config.generation
        self.changed()

    def _begin_verify(self, order: BeginVerify) -> None:
        assert self.config is not None and order.release == self.config.release
        assert not any(here for _, here, _ in self.owned.values()), "a host is switched when it is empty"
        self.verified = order.release
        self.operations[order.id] = OperationStatus(
            id=order.id,
            kind=OperationKind.VERIFY,
            state=OperationState.DONE,
            step="done",
            times={"begin": 1.0, "done": 3.0},
        )

    # --- volumes ---

    def _begin_volume_task(self, order: VolumeTask) -> None:
        assert order.coordinator == self.host, "only its coordinator is told"
        assert self.config is not None
        for volume in order.volumes:
            assert volume in self.config.pinned_volumes, "who is to act on it leaves it alone first"
        if order.id in self.operations or order.id in self.forgotten:
            return
        self.begun.append(order.id)
        self.volume_orders.append(order)
        self.operations[order.id] = OperationStatus(
            id=order.id,
            kind=OperationKind.RELOCATE,
            state=OperationState.RUNNING,
            step="copy",
            volume=next(iter(order.volumes), None),
            progress=0.5,
            times={"copy": asyncio.get_running_loop().time() - 1.0},
        )
        if self.fail_volume_tasks:
            self.fail_volume_tasks -= 1
            error = ErrorRecord(kind="unavailable", message="the pool was full", remedy="free space")
            self.end_volume_task(order.id, OperationState.UNDONE, error)
        elif self.refuse_volume_tasks is not None:
            error, self.refuse_volume_tasks = self.refuse_volume_tasks, None
            self.end_volume_task(order.id, OperationState.UNDONE, error)
        elif not self.hold_volume_tasks:
            self.end_volume_task(order.id)

    def end_volume_task(
        self,
        operation: OperationId,
        state: OperationState = OperationState.DONE,
        error: ErrorRecord | None = None,
    ) -> None:
        before = self.operations[operation]
        order = next((each for each in self.volume_orders if each.id == operation), None)
        result = self.results.get(type(order), {}) if order and state is OperationState.DONE else {}
        if isinstance(order, RebuildOrder) and state is OperationState.DONE:
            self.hosts[order.target.host].problems.pop(order.volume.id, None)
        self.operations[operation] = msgspec.structs.replace(
            before, state=state, step="done", error=error, result=result
        )
        self.changed()

    # --- moves ---

    def _begin_move(self, order: MoveOrder) -> None:
        if order.id in self.operations or order.id in self.forgotten:
            return
        if self.refuse_moves:
            self.refuse_moves -= 1
            raise Conflict("busy with something else")
        if self.host == order.source:
            assert order.id in self.hosts[order.destination].operations, "destination first"
            assert self.owned[order.server.spec.id][:2] == (order.server.epoch, True)
        self.begun.append(order.id)
        self.orders[order.id] = order
        self._set(order, OperationState.RUNNING, "begin", {"begin": 10.0})
        if self.host == order.source and not self.hold_moves:
            self.end_move(order.id)

    def end_move(self, operation: OperationId) -> None:
        """At the source: hand over, at both ends."""
        order = self.orders[operation]
        destination, server = self.hosts[order.destination], order.server.spec.id
        assert destination.config is not None
        self.owned[server] = (order.epoch, False, None)
        destination.owned[server] = (order.epoch, True, destination.config.release)
        self._set(order, OperationState.DONE, "done", {"begin": 10.0, "stopped": 11.0, "done": 12.0})
        destination._set(order, OperationState.DONE, "done", {"running": 11.05, "done": 12.0})
        self.changed()
        destination.changed()

    def undo_move(self, operation: OperationId) -> None:
        order = self.orders[operation]
        error = ErrorRecord(kind="unavailable", message="link cut")
        for agent in (self, self.hosts[order.destination]):
            agent._set(order, OperationState.UNDONE, "done", {"begin": 10.0}, error)
            agent.changed()

    def _set(
        self,
        order: MoveOrder,
        state: OperationState,
        step: str,
        times: dict[str, float],
        error: ErrorRecord | None = None,
    ) -> None:
        self.operations[order.id] = OperationStatus(
            id=order.id,
            kind=OperationKind.MOVE,
            state=state,
            step=step,
            server=order.server.spec.id,
            epoch=order.epoch,
            times=times,
            error=error,
        )

    # --- what it says of itself ---

    def inventory(self) -> HostInventory:
        compute = self.role is HostRole.COMPUTE
        return HostInventory(
            host=self.host,
            role=self.role,
            boot_id="boot",
            agent_version=self.version,
            taken_at=asyncio.get_running_loop().time(),
            generation=self.generation,
            target_generation=self.config.generation if self.config else 0,
            capacity=Size(vcpus=4, memory_mib=1024) if compute else Size(),
            releases=(OLD, NEW) if compute else (),
            verified_release=self.verified,
            servers=tuple(self._server(s) for s, (_, here, _) in self.owned.items() if here),
            volumes=tuple(
                VolumeStatus(
                    id=v.id,
                    epoch=v.epoch,
                    served=True,
                    size_mib=v.size_mib,
                    problem=self.problems.get(v.id, ""),
                )
                for v in (self.config.volumes if self.config else ())
            ),
            snapshots=tuple(
                SnapshotStatus(
                    id=s.id, volume=s.volume, size_mib=s.size_mib, backend=self._backend_of(s.volume)
                )
                for s in (self.config.snapshots if self.config else ())
            ),
            operations=tuple(self.operations.values()),
            disk_problems=self.disk_problems,
        )

    def _backend_of(self, volume: VolumeId) -> StorageBackend:
        specs = self.config.volumes if self.config else ()
        return next((v.backend for v in specs if v.id == volume), StorageBackend.EMBEDDED)

    def _server(self, server: ServerId) -> ServerStatus:
        epoch, _, release = self.owned[server]
        return ServerStatus(
            id=server,
            epoch=epoch,
            state=RunState.RUNNING,
            release=release,
            size=Size(vcpus=1, memory_mib=256),
            compute=self.has.get(server) or self._given(server),
        )

    def _given(self, server: ServerId) -> ComputeStatus:
        """As it was told."""
        spec = next(
            (s.spec for s in (self.config.servers if self.config else ()) if s.spec.id == server), None
        )
        if spec is None or self.config is None or self.generation < self.config.generation:
            return ComputeStatus()
        return ComputeStatus(
            vcpus=spec.size.vcpus,
            memory_mib=spec.size.memory_mib,
            cpu=spec.cpu,
            took_ms={"vcpus": 21, "memory": 43, "cpu": 7},
        )


class ScriptedCloud:
    """Opens, kills and reopens the orchestrator; agents go on."""

    def __init__(self, database: Path, hosts: int = 3) -> None:
        self.database = database
        self.network = MemoryNetwork(on_failure=lambda _party, _error: None)
        self.releases = Releases()
        self.agents: dict[HostId, ScriptedAgent] = {}
        for name in (EDGE, *(HostId(f"host-{n + 1}") for n in range(hosts))):
            self.agents[name] = ScriptedAgent(self.network, name, self.agents)
        self.store: Store
        self.orchestrator: Orchestrator
        self.starts = 0
        self.kill_after: int | None = None
        self.killed = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._agents: list[asyncio.Task[None]] = []

    @property
    def cloud(self) -> CloudService:
        return self.orchestrator.cloud

    # --- the orchestrator ---

    @contextmanager
    def _on_io(self) -> Iterator[None]:
        if self.kill_after is not None:
            self.kill_after -= 1
            if self.kill_after < 0:
                self.killed.set()
                raise Killed
        yield

    async def start(self) -> None:
        self.starts += 1
        self.kill_after = None
        self.killed.clear()
        with not_believed():
            self.store = await Store.open(self.database, on_io=self._on_io)
        await bootstrap(self.store, CLOUD)
        self.orchestrator = Orchestrator(
            self.store,
            holder=f"process-{self.starts}",
            alone=True,
            identity=Signatures(),
            releases=self.releases,
            images=Images(),
        )
        await self.network.transport("orchestrator").listen(*AGENTS, self.orchestrator.serve_agent)
        self._running = asyncio.create_task(self.orchestrator.run())
        await self.until(self._leads)

    async def _leads(self) -> bool:
        return self.orchestrator.leader.epoch is not None

    async def kill(self) -> None:
        """As kill -9: nothing is written, nothing said."""
        self.network.vanish("orchestrator")
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
            if not self._running.cancelled():
                self._running.exception()
        self.kill_after = None
        await self.store.close()

    # --- agents ---

    async def join(self, host: HostId, number: int) -> None:
        agent = self.agents[host]
        token = await self.cloud.create_join_token(host, agent.role, 600)
        request = JoinRequest(
            token=token,
            host=host,
            role=agent.role,
            address=f"10.99.0.{number}",
            peer_port=7444,
            csr_pem="request",
        )
        await self.cloud.join(request)

    def dial_in(self, host: HostId) -> None:
        self._agents.append(asyncio.create_task(self.agents[host].run()))

    async def ready(self) -> None:
        """Everything joined, connected, verified under the old release and in service."""
        for release in (OLD, NEW):
            await self.cloud.register_release(release)
        for number, host in enumerate(self.agents):
            await self.join(host, 5 + number)
            self.dial_in(host)
        await self.until(self.converged)

    async def converged(self) -> bool:
        status = await self.cloud.status()
        hosts = await self.cloud.hosts()
        return (
            status.converged
            and len(hosts) == len(self.agents)
            and all(h.connected and h.generation == h.target_generation for h in hosts)
            and not any(agent.operations for agent in self.agents.values())
        )

    async def servers(self, *names: str) -> None:
        for name in names:
            await self.cloud.create_server(ServerRequest(name=name))
        await self.until(self.all_run)

    async def all_run(self) -> bool:
        return all(s.state is RunState.RUNNING for s in await self.cloud.servers())

    async def until(self, holds: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not await holds():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            status = await self.cloud.status()
            raise AssertionError(f"not in {seconds:g} s: {holds}; {msgspec.json.encode(status)!r}") from None

    def copies(self, server: ServerId) -> list[HostId]:
        """Hosts that run it."""
        return [h for h, a in self.agents.items() if a.owned.get(server, (0, False, None))[1]]

    async def hang_up(self) -> None:
        """Every agent goes, and keeps what it knows."""
        agents, self._agents = self._agents, []
        for task in agents:
            task.cancel()
        if agents:
            await asyncio.wait(agents)

    async def close(self) -> None:
        await self.hang_up()
        await self.kill()


@asynccontextmanager
async def opened(database: Path, hosts: int = 3) -> AsyncIterator[ScriptedCloud]:
    cloud = ScriptedCloud(database, hosts)
    await cloud.start()
    try:
        yield cloud
    finally:
        await cloud.close()
