"""A data centre on one machine: hosts as network namespaces, with real daemons in them.

Opens it the way a real one is set up: the orchestrator's node first, then every host joins by a one-time
token and its supervisor starts its agent. Owns processes and folders of one lab; what it does to the
cloud it does through the operator API. Can be closed at any moment, also by a later process
(`lab.cleanup`).
"""

import asyncio
import os
import secrets
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from nahtlos.lab.cleanup import LabLock, cleanup
from nahtlos.lab.paths import LAB_VARIABLE, BuildPaths, LabPaths, NodePaths
from nahtlos.lab.topology import Node, Topology, create
from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import HostId, NetworkId
from nahtlos.model.networking import NetworkSpec
from nahtlos.model.nouns import HostRole, Size
from nahtlos.ops.client import OperatorClient
from nahtlos.physical import settings as agent_settings
from nahtlos.physical.ports import Unit
from nahtlos.physical.settings import AgentSettings, CephSettings
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.physical.supervisor.launch import launch_supervisor
from nahtlos.runtime import settings as orchestrator_settings
from nahtlos.runtime.identity import CertificateAuthority
from nahtlos.runtime.releases import list_releases
from nahtlos.runtime.settings import CloudSettings, OrchestratorSettings
from nahtlos.wire.credentials import write_file

AGENTS_PORT = 7443
PEER_PORT = 7444
API_PORT = 8443
READY_SECONDS = 60.0
JOIN_SECONDS = 60.0
TOKEN_SECONDS = 600
CONTROL_NICE = -10

TENANT = NetworkId("tenant")

Say = Callable[[str], None]


def promisable(hosts: int, capacity: Size) -> Size:
    """What customers can be promised while any one host may be empty."""
    spare = max(hosts - 1, 1)
    return Size(vcpus=capacity.vcpus * spare, memory_mib=capacity.memory_mib * spare)


class LabShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a lab is opened with."""

    hosts: int = 3
    capacity: Size = Size(vcpus=4, memory_mib=1024)
    """Of every host, for servers."""
    promised: Size = Size(vcpus=8, memory_mib=2048)
    parallel_moves: int = 1
    parallel_moves_per_host: int = 4
    ceph: CephSettings | None = None
    """Every host's way to a cluster, which may come later."""


class Datacentre:
    """One open lab. Use `opened` or `open`/`close`."""

    def __init__(self, name: str, shape: LabShape, build: BuildPaths, *, lasting: bool = False) -> None:
        """`lasting`: the lab stays when the process that opened it ends; otherwise the next one that opens
        a lab of this name takes it for left over."""
        self.paths = LabPaths(name)
        self.shape = shape
        self.build = build
        self.topology: Topology | None = None
        self._environment = {LAB_VARIABLE: name}
        self._lock = LabLock(name)
        self._lasting = lasting

    @property
    def client(self) -> OperatorClient:
        """The operator API over the root-only socket; close it after use."""
        return OperatorClient.unix(self.paths.operator_socket)

    async def open(self, say: Say = lambda _: None) -> None:
        """Everything up and every host connected. Conflict if a lab of this name is open already; what
        an interrupted one left behind is removed first."""
        if os.geteuid() != 0:
            raise Refused("a lab makes network namespaces", field="user", remedy="run it as root")
        self._check_built()
        self._lock.acquire()
        try:
            await asyncio.to_thread(cleanup, self.paths.name)
            say("network namespaces and links")
            self.topology = await asyncio.to_thread(create, self.paths.name, self.shape.hosts)
            say("orchestrator")
            await self._open_orchestrator(self.topology)
            say("hosts join")
            await self._open_hosts(self.topology)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends every process of this lab and removes what it made."""
        try:
            await asyncio.to_thread(cleanup, self.paths.name)
        finally:
            self._lock.release()

    def _check_built(self) -> None:
        if not list_releases(self.build.releases):
            raise Refused(
                f"no hypervisor release in {self.build.releases}",
                field="releases",
                remedy="build them: make releases",
            )
        if not any(self.build.images.glob("guest-*.raw")):
            raise Refused(
                f"no guest image in {self.build.images}", field="images", remedy="build it: make image"
            )

    # --- orchestrator ---

    async def _open_orchestrator(self, topology: Topology) -> None:
        node = topology.node("ctl")
        paths = self._folders(node)
        authority = CertificateAuthority.open(paths.state / "ca", self.paths.name)
        authority.issue_orchestrator(node.address).write(paths.pki)
        settings = OrchestratorSettings(
            state_dir=paths.state,
            releases_dir=self.build.releases,
            images_dir=self.build.images,
            pki_dir=paths.pki,
            ca_dir=paths.state / "ca",
            cloud=self._cloud(topology),
        )
        write_file(paths.settings, orchestrator_settings.encode_settings(settings), mode=0o600)
        supervisor = await self._supervise(node, paths)
        try:
            await supervisor.listen_tcp("agents", node.address, AGENTS_PORT)
            await supervisor.listen_tcp("api", node.address, API_PORT)
            await supervisor.listen_unix("operator", self.paths.operator_socket, mode=0o600)
            await supervisor.start(
                Unit(
                    name="orchestrator",
                    argv=(
                        *_python("nahtlos.entry.orchestrator"),
                        *("--settings", str(paths.settings)),
                        *("--fd-agents", "{fd:agents}", "--fd-api", "{fd:api}"),
                        *("--fd-operator", "{fd:operator}"),
                    ),
                    fds=("agents", "api", "operator"),
                    log=paths.state / "orchestrator.log",
                    restart=True,
                    nice=CONTROL_NICE,
                )
            )
        finally:
            supervisor.close()
        await self._until("the orchestrator to answer", self._answers)

    def _cloud(self, topology: Topology) -> CloudSettings:
        network = NetworkSpec(
            id=TENANT,
            vni=100,
            cidr="10.77.0.0/24",
            gateway_ip="10.77.0.1",
            gateway_mac="02:00:00:4d:00:01",
            gateway_host=HostId("edge-1"),
            dhcp_ip="10.77.0.2",
        )
        return CloudSettings(
            networks=(network,),
            uplinks={TENANT: "out0"},
            promised=self.shape.promised,
            parallel_moves=self.shape.parallel_moves,
            parallel_moves_per_host=self.shape.parallel_moves_per_host,
        )

    async def _answers(self) -> bool:
        async with self.client as client:
            return (await client.status()).leader

    # --- hosts ---

    async def _open_hosts(self, topology: Topology) -> None:
        nodes = [n for n in topology.nodes if n.role is not None]
        async with asyncio.TaskGroup() as opening:
            for node in nodes:
                opening.create_task(self._open_host(topology, node))
        await self._until("every host to connect", self._all_connected)

    async def _open_host(self, topology: Topology, node: Node) -> None:
        paths = self._folders(node)
        settings = self._agent_settings(topology, node, paths)
        write_file(paths.settings, agent_settings.encode_settings(settings), mode=0o600)
        supervisor = await self._supervise(node, paths)
        try:
            await self._join(topology, node, paths)
            await supervisor.listen_tcp("peer", node.address, PEER_PORT)
            await supervisor.start(
                Unit(
                    name="agent",
                    argv=(
                        *_python("nahtlos.entry.agent"),
                        *("run", "--settings", str(paths.settings), "--fd-peer", "{fd:peer}"),
                    ),
                    fds=("peer",),
                    log=paths.state / "agent.log",
                    restart=True,
                    nice=CONTROL_NICE,
                )
            )
        finally:
            supervisor.close()

    def _agent_settings(self, topology: Topology, node: Node, paths: NodePaths) -> AgentSettings:
        assert node.role is not None, node
        return AgentSettings(
            host=HostId(node.name),
            role=node.role,
            address=node.address,
            peer_port=PEER_PORT,
            orchestrator_address=topology.node("ctl").address,
            orchestrator_port=AGENTS_PORT,
            state_dir=paths.state,
            run_dir=paths.run,
            ram_dir=paths.ram,
            releases_dir=self.build.releases,
            images_dir=self.build.images,
            cache_dir=self.build.cache,
            pki_dir=paths.pki,
            supervisor_socket=paths.supervisor,
            capacity=self.shape.capacity if node.role is HostRole.COMPUTE else Size(),
            ceph=self.shape.ceph,
        )

    async def _join(self, topology: Topology, node: Node, paths: NodePaths) -> None:
        """As an operator of a real host would: the token in a file, the request made in the host."""
        assert node.role is not None, node
        async with self.client as client:
            token = await client.create_join_token(HostId(node.name), node.role, TOKEN_SECONDS)
        token_file = paths.state / "join-token"
        write_file(token_file, token.encode(), mode=0o600)
        url = f"https://{topology.node('ctl').address}:{API_PORT}"
        process = await asyncio.create_subprocess_exec(
            "nsenter",
            f"--net=/run/netns/{node.namespace}",
            *_python("nahtlos.entry.agent"),
            *("join", "--settings", str(paths.settings), "--url", url),
            *("--ca", str(self.paths.node("ctl").pki / "ca.pem"), "--token-file", str(token_file)),
            env={**os.environ, **self._environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
            token_file.unlink(missing_ok=True)
        if process.returncode:
            raise Unavailable(f"{node.name} could not join: {output.decode(errors='replace')[-2000:]}")

    async def _all_connected(self) -> bool:
        assert self.topology is not None
        wanted = {n.name for n in self.topology.nodes if n.role is not None}
        async with self.client as client:
            hosts = await client.hosts()
        ready = {
            h.id for h in hosts if h.connected and h.generation > 0 and h.generation == h.target_generation
        }
        return wanted <= ready

    # --- processes ---

    def _folders(self, node: Node) -> NodePaths:
        paths = self.paths.node(node.name)
        for folder in (paths.run, paths.state, paths.ram):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return paths

    async def _supervise(self, node: Node, paths: NodePaths) -> SupervisorClient:
        await asyncio.to_thread(
            launch_supervisor,
            paths.supervisor,
            paths.state / "supervisor",
            namespace=node.namespace,
            environment=self._environment,
            inherit=(self._lock.fileno(),) if self._lasting else (),
        )
        return SupervisorClient(paths.supervisor)

    async def _until(self, what: str, ready: Callable[[], Awaitable[bool]]) -> None:
        last: Exception | None = None
        try:
            async with asyncio.timeout(READY_SECONDS):
                while True:
                    try:
                        if await ready():
                            return
                    except Unavailable as error:
                        last = error
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise Unavailable(
                f"waited {READY_SECONDS:g} s for {what}" + (f": {last}" if last else ""),
                remedy=f"see the logs in {self.paths.state}",
            ) from None


@asynccontextmanager
async def opened(
    name: str, shape: LabShape | None = None, build: BuildPaths | None = None
) -> AsyncGenerator[Datacentre]:
    """A lab for the time of the context."""
    datacentre = Datacentre(name, shape or LabShape(), build or BuildPaths.default())
    await datacentre.open()
    try:
        yield datacentre
    finally:
        await datacentre.close()


def unique_name(prefix: str) -> str:
    """A name no other lab has, for tests that stand beside a demo."""
    return f"{prefix}-{secrets.token_hex(2)}"


def _python(module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module)
