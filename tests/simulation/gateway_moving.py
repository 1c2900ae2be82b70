"""One move of a router's way out between two edge hosts, in a whole simulated cloud, with something going
wrong.

Meanwhile a server opens connections to the outside, one every few milliseconds, by whichever place its host
sends to; and somebody outside looks who answers. In the end the new place must know every connection, and it
must never have been that nobody answers.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crash_plays import POLLED, POLLS_STRUCK, Strike, memory
from quick_database import database_in_the_loop
from simulated_cloud import SimulatedCloud

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.ids import HostId, NetworkId, RouterId, SubnetId
from nahtlos.model.inventory import OperationState
from nahtlos.model.networking import RouterGateway
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.facts import SimGateway
from nahtlos.physical.sim.faults import Act, Call, Moment, Scripted
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.networks import NetworkRequest, RouterChange, RouterRequest
from nahtlos.wire.memory import Faults

SOURCE, DESTINATION, SENDER = HostId("edge-2"), HostId("edge-1"), HostId("host-1")
"""The first edge host has an uplink by the settings: it cannot be drained."""
ROUTER, NETWORK = RouterId("wan"), NetworkId("blue")
ADDRESS = "203.0.113.2"
BOUND_SECONDS = 200.0
EVERY_SECONDS = 0.004


@dataclass
class GatewayRun:
    """`at` is struck with `act`, or `does` happens there."""

    at: Strike | None = None
    act: Act = Act.PASS
    does: Callable[["GatewayRun"], None] | None = None
    by_drain: bool = False
    faults: Faults | None = None
    seed: int = 1
    struck: bool = False
    seen: list[Strike] = field(default_factory=list[Strike])
    problems: list[str] = field(default_factory=list[str])
    opened: int = 0

    def __post_init__(self) -> None:
        self._since: dict[tuple[str, str, str], int] | None = None
        self.cloud: SimulatedCloud

    def gateways(self) -> dict[HostId, SimGateway]:
        hosts = ((host, self.cloud.world.hosts[host]) for host in (SOURCE, DESTINATION))
        return {host: gateway for host, here in hosts for gateway in here.gateways.values()}

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, act)

    def _when(self, call: Call, moment: Moment) -> Act:
        if self._since is None or call.host not in (SOURCE, DESTINATION):
            return Act.PASS
        key = (call.host, call.driver, call.verb)
        first = self._since.setdefault(key, call.occurrence)
        strike = Strike(call.host, call.driver, call.verb, call.occurrence - first + 1, moment)
        self.seen.append(strike)
        if strike != self.at or self.struck:
            return Act.PASS
        self.struck = True
        self.cloud.world.note("", "STRIKE", str(strike))
        if self.does:
            self.does(self)
        return self.act

    # --- the play ---

    def play(self) -> "GatewayRun":
        with database_in_the_loop(), tempfile.TemporaryDirectory(dir=memory()) as folder:
            troubles = Scripted(self._when, self.seed)
            self.cloud = SimulatedCloud(
                Path(folder), self.seed, edges=2, troubles=troubles, faults=self.faults
            )
            run_virtual(self._play(), seed=self.seed, limit_seconds=10_000)
        return self

    async def _play(self) -> None:
        try:
            await self.cloud.run(self._move)
        except BaseExceptionGroup as group:
            self.problems += [repr(error) for error in group.exceptions]
        for host, agent in self.cloud.agents.items():
            self.problems += [f"bug in the agent of {host}: {bug!r}" for bug in agent.bugs]
        self.problems += [f"bug in the orchestrator: {bug!r}" for bug in self.cloud.orchestrator.bugs]

    async def _move(self, cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await cloud.ask(_create)
        await cloud.until(self._begun, timeout=60, what="a way out")
        async with asyncio.TaskGroup() as tasks:
            around = [tasks.create_task(self._open_connections()), tasks.create_task(self._look())]
            await asyncio.sleep(0.2)
            self._since = {}
            await cloud.ask(_drain if self.by_drain else _ask_for_the_other)
            await cloud.until(self._arrived, timeout=BOUND_SECONDS, what="the way out at its new place")
            await asyncio.sleep(0.5)
            for task in around:
                task.cancel()
        await cloud.until(self._forgotten, timeout=BOUND_SECONDS, what="the old place to be gone")
        held = self.gateways()
        missing = set(range(self.opened)) - held[DESTINATION].connections
        if missing:
            self.problems.append(f"connections {sorted(missing)[:9]} of {self.opened} are not known")

    async def _begun(self, service: CloudService) -> bool:
        """Hosts have converged before they are told of it, too."""
        here = self.gateways().get(SOURCE)
        led = bool(self.cloud.world.hosts[SENDER].leads_to)
        return here is not None and here.answers and led and await _converged(service)

    async def _arrived(self, service: CloudService) -> bool:
        held = self.gateways()
        there = held.get(DESTINATION)
        return there is not None and there.answers and await _converged(service)

    async def _forgotten(self, service: CloudService) -> bool:
        return set(self.gateways()) == {DESTINATION} and await _converged(service) and await _idle(service)

    async def _open_connections(self) -> None:
        world = self.cloud.world
        by_address = {spec.address: spec.id for spec in self.cloud.specs}
        while True:
            place = by_address.get(next(iter(world.hosts[SENDER].leads_to.values()), ""))
            held = self.gateways().get(place) if place else None
            if held is None or not (held.answers or held.passes):
                self.problems.append(f"connection {self.opened} was sent to {place}, which leads nowhere")
            else:
                held.connections.add(self.opened)
            self.opened += 1
            await asyncio.sleep(EVERY_SECONDS)

    async def _look(self) -> None:
        while True:
            if not any(gateway.answers for gateway in self.gateways().values()):
                self.problems.append(f"nobody answers outside at {self.cloud.world.now():.3f}")
            await asyncio.sleep(EVERY_SECONDS)


async def _create(service: CloudService) -> None:
    networks = service.networks
    await networks.create_network(NetworkRequest(name=NETWORK, cidr="10.5.0.0/24"))
    await networks.create_router(RouterRequest(name=ROUTER, subnets=(SubnetId(NETWORK),)))
    await networks.change_router(ROUTER, RouterChange(gateway=RouterGateway(host=SOURCE, address=ADDRESS)))


async def _ask_for_the_other(service: CloudService) -> None:
    gateway = RouterGateway(host=DESTINATION, address=ADDRESS)
    await service.networks.change_router(ROUTER, RouterChange(gateway=gateway))


async def _drain(service: CloudService) -> None:
    await service.set_host_intent(SOURCE, HostIntent.DRAINED)


async def _converged(service: CloudService) -> bool:
    views = [await service.host(v.id) for v in await service.hosts()]
    return all(
        v.connected
        and v.generation == v.target_generation
        and v.inventory is not None
        and not v.inventory.problems
        for v in views
    )


async def _idle(service: CloudService) -> bool:
    views = [await service.host(v.id) for v in await service.hosts()]
    operations = [o for v in views if v.inventory is not None for o in v.inventory.operations]
    return all(o.state is not OperationState.RUNNING for o in operations)


def strikes() -> Iterator[Strike]:
    """Every moment at the two hosts in a clean run, from the request to the end."""
    clean = GatewayRun().play()
    assert not clean.problems, clean.problems
    seen: set[Strike] = set()
    for strike in clean.seen:
        often = strike.verb in (*POLLED, "gateway_state_export", "gateway_state_import")
        if strike not in seen and not (often and strike.occurrence > POLLS_STRUCK):
            seen.add(strike)
            yield strike
