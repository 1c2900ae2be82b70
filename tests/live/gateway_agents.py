"""Real agents of the hosts of a `RoutedCloud`, and who gives them orders. Their networks are real.

The agents' loop is the test's; each verb of the network driver runs inside its host's namespace.
"""

import asyncio
from pathlib import Path
from typing import Any, cast

import msgspec
from network_namespaces import Host
from routed_cloud import RoutedCloud

from nahtlos.model.config import HostConfig
from nahtlos.model.ids import HostId, OperationId
from nahtlos.model.inventory import HostInventory, OperationState, OperationStatus
from nahtlos.model.nouns import HostSpec
from nahtlos.physical.agent.agent import Agent
from nahtlos.physical.ports import Drivers
from nahtlos.wire.gateways import BeginGateway, GatewayOrder
from nahtlos.wire.memory import MemoryNetwork
from nahtlos.wire.messages import (
    PROTOCOL_MAX,
    Acknowledge,
    Configure,
    Done,
    Hello,
    Message,
    Report,
    Welcome,
)
from nahtlos.wire.session import Session
from nahtlos.wire.transport import Channel

ORCHESTRATOR = ("10.99.0.1", 7443)
BOUND_SECONDS = 20.0


class Inside:
    """The network driver of a host, called in its namespace."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, verb: str) -> Any:
        async def call(*args: object, **more: object) -> Any:
            return await self._host.call(lambda driver: getattr(driver, verb)(*args, **more))

        return call


class Nothing:
    """A driver with nothing to do."""

    def __getattr__(self, verb: str) -> Any:
        async def call(*_: object, **__: object) -> Any:
            await asyncio.sleep(0.05)  # some verbs wait for something to happen
            if verb == "why_no_shares":
                return ""
            return None if verb in ("release", "pool") else ()

        return call


class AgentsOf:
    def __init__(self, cloud: RoutedCloud, folder: Path) -> None:
        self.cloud = cloud
        self.network = MemoryNetwork()
        self.reports: dict[str, HostInventory] = {}
        self.sessions: dict[str, Session] = {}
        self.configs: dict[str, HostConfig] = {}
        self.starts = 0
        self._folder = folder
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._listener: Any = None

    async def open(self) -> None:
        self._listener = await self.network.transport("orchestrator").listen(*ORCHESTRATOR, self._serve)
        for name in self.cloud.hosts:
            self.start(name)
        await self.until(lambda: len(self.sessions) == len(self.cloud.hosts), "all agents")

    def start(self, name: str) -> None:
        host = self.cloud.hosts[name]
        self.starts += 1
        drivers = Drivers(
            supervisor=cast("Any", host.supervisor),
            hypervisor=cast("Any", Nothing()),
            network=cast("Any", Inside(host)),
            storage=cast("Any", Nothing()),
        )
        agent = Agent(
            host.settings,
            drivers,
            self.network.transport(f"host/{name}"),
            self._folder / f"{name}.sqlite",
            boot_id="boot",
        )
        self._tasks[name] = asyncio.create_task(agent.run(), name=f"agent {name} {self.starts}")

    async def restart(self, name: str) -> None:
        """As kill -9 does; its driver is a new one, too."""
        self.sessions.pop(name, None)
        self._tasks[name].cancel()
        self.network.vanish(f"host/{name}")
        await asyncio.gather(self._tasks[name], return_exceptions=True)
        self.cloud.hosts[name].restart_agent()
        self.start(name)
        await self.until(lambda: name in self.sessions, f"the agent of {name}")

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._listener.close()

    async def _serve(self, channel: Channel) -> None:
        name = channel.peer.removeprefix("host/")

        async def answer(body: Message, _epoch: int) -> Message:
            if isinstance(body, Hello):
                self.sessions[name] = session
                return Welcome(protocol=PROTOCOL_MAX, orchestrator_epoch=1)
            if isinstance(body, Report):
                self.reports[name] = body.inventory
            return Done()

        session = Session(channel, answer, epoch=1)
        await session.run()

    # --- what an orchestrator does ---

    def spec(self, name: str) -> HostSpec:
        node = self.cloud.hosts[name].node
        assert node.role is not None
        return HostSpec(id=HostId(name), role=node.role, address=node.address, peer_port=7444)

    async def configure(self, name: str, config: HostConfig) -> None:
        hosts = tuple(self.spec(other) for other in self.cloud.hosts)
        self.configs[name] = msgspec.structs.replace(config, hosts=hosts)
        await self.sessions[name].request(Configure(config=self.configs[name]), timeout=10)

    async def converged(self, *names: str) -> None:
        def there() -> bool:
            return all(
                name in self.reports and self.reports[name].generation == self.configs[name].generation
                for name in names
            )

        await self.until(there, f"{', '.join(names)} as configured")

    async def begin(self, order: GatewayOrder) -> None:
        """At the destination, and once it says that it knows it, at the source."""
        destination, source = order.destination.host, order.source.host
        await self.sessions[destination].request(BeginGateway(order=order), timeout=10)
        await self.until(lambda: self.status(destination, order.id) is not None, "the destination")
        await self.sessions[source].request(BeginGateway(order=order), timeout=10)

    def status(self, name: str, operation: OperationId) -> OperationStatus | None:
        report = self.reports.get(name)
        return next((o for o in report.operations if o.id == operation), None) if report else None

    async def ended(self, name: str, operation: OperationId) -> OperationStatus:
        def over() -> bool:
            status = self.status(name, operation)
            return status is not None and status.state is not OperationState.RUNNING

        await self.until(over, f"{operation} on {name}")
        status = self.status(name, operation)
        assert status is not None
        return status

    async def acknowledge(self, operation: OperationId) -> None:
        for session in tuple(self.sessions.values()):
            await session.request(Acknowledge(ids=(operation,)), timeout=10)

    async def until(self, true: Any, what: str) -> None:
        try:
            async with asyncio.timeout(BOUND_SECONDS):
                while not true():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            said = {name: (r.problems, r.operations) for name, r in self.reports.items()}
            raise AssertionError(f"{what} did not come about: {said}") from None
