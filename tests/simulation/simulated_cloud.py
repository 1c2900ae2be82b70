"""A whole cloud in virtual time: the real orchestrator over a real store, real agents over the simulated
physical layer, everything between them in memory, and a seed that decides what goes wrong.

Run it inside `quick_database.database_in_the_loop`.
"""

import asyncio
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

from crash_plays import memory

from nahtlos.model.blueprint import HostPhase
from nahtlos.model.errors import NotFound
from nahtlos.model.ids import HostId, ImageId, ReleaseId, ServerId
from nahtlos.model.nouns import Component, HostRole, HostSpec, Release, Size
from nahtlos.physical.ports import Crash
from nahtlos.physical.sim.agents import AgentProcess, Dress, LivingTransport, only_crashes
from nahtlos.physical.sim.clock import run_virtual, virtual_loop
from nahtlos.physical.sim.cloudlet import (
    FUNCTIONS,
    NEW,
    OLD,
    ORCHESTRATOR,
    host_specs,
    network_spec,
    settings_of,
)
from nahtlos.physical.sim.faults import Life, Troubles
from nahtlos.physical.sim.world import World
from nahtlos.runtime.controllers.bootstrap import bootstrap
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.orchestrator import Orchestrator
from nahtlos.runtime.settings import CloudSettings
from nahtlos.runtime.store import intent
from nahtlos.runtime.store.store import Store
from nahtlos.wire.memory import Faults, MemoryNetwork

T = TypeVar("T")
IMAGE = ImageId("guest-1")
MACHINES = ("pc-q35-9.2", "pc-q35-10.0")
DATABASE = "runtime.sqlite"
RESTART_SECONDS = (0.5, 3.0)


# --- what the orchestrator is surrounded by ---


class _Signatures:
    certificate_pem = "authority"

    def sign_host_csr(self, csr_pem: str, host: HostId, address: str) -> str:
        return f"certificate of {host} at {address}"


class _Releases:
    async def built(self) -> tuple[Release, ...]:
        return tuple(_release(r) for r in (OLD, NEW, FUNCTIONS))

    async def verified(self, release: ReleaseId) -> Release:
        if release not in (OLD, NEW, FUNCTIONS):
            raise NotFound(f"{release} is not built", field="release")
        return _release(release)


class _Images:
    async def images(self) -> dict[ImageId, int]:
        return {IMAGE: 128}


def _release(release: ReleaseId) -> Release:
    return Release(
        id=release,
        component=Component.NETWORK if release == FUNCTIONS else Component.HYPERVISOR,
        version=release.removeprefix("sim-"),
        suite="sim",
        digest="",
        machine_types=MACHINES,
    )


class OrchestratorProcess:
    """The orchestrator, again and again, over one database file."""

    def __init__(self, cloud: "SimulatedCloud", database: Path) -> None:
        self._cloud = cloud
        self._database = database
        self._life: Life | None = None
        self._transactions = 0
        self.service: CloudService | None = None
        self.starts = 0
        self.bugs: list[BaseException] = []

    def kill(self, cause: str) -> None:
        if self._life:
            self._life.end(cause)

    async def run(self) -> None:
        while True:
            await self._live()
            await asyncio.sleep(self._cloud.world.random.uniform(*RESTART_SECONDS))

    async def _live(self) -> None:
        life = self._life = Life("orchestrator")
        self.starts += 1
        self._cloud.world.note("", "orchestrator starts", str(self.starts))
        ended = asyncio.Event()
        life.on_end(ended.set)
        life.on_end(lambda: self._vanish(life))
        task = asyncio.get_running_loop().create_task(self._serve(life), name=f"orchestrator {self.starts}")
        watch = asyncio.get_running_loop().create_task(ended.wait())
        try:
            await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            life.end("stopped")
            task.cancel()
            watch.cancel()
            await asyncio.wait((task, watch))
            if not task.cancelled() and (error := task.exception()) and not only_crashes(error):
                self.bugs.append(error)

    def _vanish(self, life: Life) -> None:
        self.service = None
        self._cloud.world.note("", "orchestrator dies", "", life.cause)
        self._cloud.network.vanish("orchestrator")

    async def _serve(self, life: Life) -> None:
        closing = False

        @contextmanager
        def on_io() -> Iterator[None]:
            if closing:
                yield
                return
            self._crash_point("before", life)
            yield
            self._crash_point("after", life)

        store = await Store.open(self._database, clock=virtual_loop().wall, on_io=on_io)
        try:
            await bootstrap(store, self._cloud.settings)
            orchestrator = Orchestrator(
                store,
                holder=f"orchestrator-{self.starts}",
                alone=self._cloud.alone,
                identity=_Signatures(),
                releases=_Releases(),
                images=_Images(),
            )
            transport = LivingTransport(self._cloud.network.transport("orchestrator"), life)
            listener = await transport.listen(*ORCHESTRATOR, orchestrator.serve_agent)
            self.service = orchestrator.cloud
            try:
                await orchestrator.run()
            finally:
                await listener.close()
        finally:
            closing = True
            await store.close()

    def _crash_point(self, moment: str, life: Life) -> None:
        life.check()
        self._cloud.world.crash_point(HostId("orchestrator"), f"{moment} transaction", life)


@dataclass
class SimulatedCloud:
    """`dress` gives an agent another way of speaking; `alone` says whether the orchestrator knows itself
    to be the only one (else it waits for the lease of the one killed before it)."""

    folder: Path
    seed: int
    hosts: int = 3
    edges: int = 1
    capacity: Size = field(default_factory=lambda: Size(vcpus=8, memory_mib=2048))
    promised: Size = field(default_factory=Size)
    parallel_moves: int = 1
    troubles: Troubles | None = None
    faults: Faults | None = None
    dress: Callable[[HostId], Dress | None] = lambda _: None
    alone: bool = True

    def __post_init__(self) -> None:
        self.world = World(seed=self.seed, troubles=self.troubles, state_dir=self.folder)
        self.network = MemoryNetwork(
            self.faults or Faults(self.seed, delay=(0.0001, 0.0008)), on_failure=self._failed
        )
        self.specs: tuple[HostSpec, ...] = host_specs(self.hosts, self.edges)
        self.problems: list[str] = []
        self.settings = CloudSettings(
            networks=(network_spec(),),
            promised=self.promised,
            parallel_moves=self.parallel_moves,
            external={spec.id: "out0" for spec in self.specs if spec.role is HostRole.EDGE},
        )
        for spec in self.specs:
            self.world.add_host(
                spec.id, spec.address, role=spec.role, capacity=self.capacity, releases=(OLD, NEW, FUNCTIONS)
            )
        database = self.folder / DATABASE
        shutil.copyfile(_template(self.edges), database)
        self.orchestrator = OrchestratorProcess(self, database)
        self.agents = {
            spec.id: AgentProcess(
                self.world,
                self.network,
                settings_of(self.world, spec, self.capacity),
                dress=self.dress(spec.id),
            )
            for spec in self.specs
        }

    def _failed(self, party: str, error: BaseException) -> None:
        if not only_crashes(error):
            self.problems.append(f"serving a connection of {party} ended with {error!r}")

    @property
    def compute(self) -> tuple[HostId, ...]:
        return tuple(s.id for s in self.specs if s.role is HostRole.COMPUTE)

    async def run(self, play: Callable[["SimulatedCloud"], Awaitable[None]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self.orchestrator.run())]
            running += [tasks.create_task(a.run()) for a in self.agents.values()]
            try:
                await play(self)
            finally:
                for task in running:
                    task.cancel()

    async def ask(self, call: Callable[[CloudService], Awaitable[T]], *, timeout: float = 300.0) -> T:
        """Ask the orchestrator, and again whenever it is not there."""
        async with asyncio.timeout(timeout):
            while True:
                service = self.orchestrator.service
                if service is not None:
                    try:
                        return await call(service)
                    except Crash:
                        pass
                await asyncio.sleep(0.2)

    async def until(
        self, condition: Callable[[CloudService], Awaitable[bool]], *, timeout: float, what: str
    ) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not await self.ask(condition):
                    await asyncio.sleep(0.25)
        except TimeoutError as error:
            raise TimeoutError(f"{what} did not come about within {timeout:g} virtual seconds") from error

    async def ready(self) -> None:
        async def there(service: CloudService) -> bool:
            views = await service.hosts()
            return all(
                v.connected
                and v.generation
                and v.generation == v.target_generation
                and ((v.phase is HostPhase.SERVING and v.accelerator is not None) or v.role is HostRole.EDGE)
                for v in views
            )

        await self.ask(lambda s: s.register_release(OLD))
        await self.until(there, timeout=60, what="all hosts to be connected and converged")

    def up(self, server: ServerId) -> bool:
        return self.world.facts(server).up and len(self.world.running(server)) == 1


async def killed_for_ever(cloud: SimulatedCloud, chance: random.Random, pause: tuple[float, float]) -> None:
    """Until cancelled: an agent or the orchestrator, each after between so many seconds."""
    while True:
        await asyncio.sleep(chance.uniform(*pause))
        victim = chance.choice((*cloud.agents, None))
        (cloud.orchestrator if victim is None else cloud.agents[victim]).kill("now and then")


@cache
def _template(edges: int) -> Path:
    """A database of today's schema in which the hosts have joined."""
    folder = Path(tempfile.mkdtemp(prefix="nahtlos-sim-", dir=memory()))

    async def make() -> None:
        store = await Store.open(folder / DATABASE, clock=virtual_loop().wall)
        async with store.writing() as tx:
            for spec in host_specs(3, edges):
                await intent.put_host(tx, spec, 0.0)
        await store.close()

    run_virtual(make(), seed=0, limit_seconds=60)
    return folder / DATABASE
