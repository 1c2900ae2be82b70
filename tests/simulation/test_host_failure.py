"""Whole simulated clouds in which a host fails: what shall be restarted is, and never runs twice."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from quick_database import database_in_the_loop
from simulated_cloud import DATABASE, SimulatedCloud, memory

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.ids import HostId, ServerId
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.cloud_service import CloudService

WEB = ServerId("web-1")
H1 = HostId("host-1")
EDGE = HostId("edge-1")
ORCHESTRATOR = "orchestrator"


@contextmanager
def cloud_of(seed: int = 1, **changes: object) -> Iterator[SimulatedCloud]:
    with database_in_the_loop(DATABASE), tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield SimulatedCloud(Path(folder), seed, **changes)  # type: ignore[arg-type]


def play(cloud: SimulatedCloud, scene: Callable[[SimulatedCloud], Awaitable[None]]) -> None:
    run_virtual(cloud.run(scene), seed=cloud.seed, limit_seconds=3000)
    assert not cloud.world.violations
    assert not cloud.problems
    bugs = [bug for agent in cloud.agents.values() for bug in agent.bugs] + cloud.orchestrator.bugs
    assert not bugs


async def with_server(cloud: SimulatedCloud, policy: OnHostFailure = OnHostFailure.RESTART) -> None:
    await cloud.ready()
    request = ServerRequest(name=WEB, copies=2, host=H1, on_host_failure=policy)
    await cloud.ask(lambda s: s.create_server(request))
    await until_up(cloud)
    if policy is OnHostFailure.RESTART:
        await cloud.until(_under_lease, timeout=60, what="the server to run under a lease")


async def until_up(cloud: SimulatedCloud) -> None:
    async def up(_: CloudService) -> bool:
        return cloud.up(WEB)

    await cloud.until(up, timeout=120, what="the server to be up")


async def _under_lease(service: CloudService) -> bool:
    view = await service.host(H1)
    seen = view.inventory
    standing = seen.standing if seen else None
    return (
        standing is not None
        and standing.held
        and standing.terms is not None
        and any(s.under_lease for s in seen.servers if seen)
    )


def cut(cloud: SimulatedCloud, host: HostId, *, on: bool = True) -> None:
    act = cloud.network.partition if on else cloud.network.heal
    for other in (*(f"host/{h}" for h in cloud.agents if h != host), ORCHESTRATOR):
        act(f"host/{host}", other)


def kill(cloud: SimulatedCloud, host: HostId) -> None:
    cloud.world.power_off(host)
    cloud.agents[host].kill("no power")


def back(cloud: SimulatedCloud, host: HostId) -> None:
    cloud.world.power_on(host)


def place_of(cloud: SimulatedCloud) -> set[HostId]:
    return {vmm.host for vmm in cloud.world.running(WEB)}


async def settled(cloud: SimulatedCloud) -> None:
    async def all_well(service: CloudService) -> bool:
        status = await service.status()
        return status.converged and cloud.up(WEB)

    await cloud.until(all_well, timeout=300, what="everything to come right")


def test_a_server_of_a_host_that_failed_is_restarted_elsewhere_and_not_run_twice() -> None:
    async def scene(cloud: SimulatedCloud) -> None:
        await with_server(cloud)
        kill(cloud, H1)
        at = cloud.world.now()
        await until_up(cloud)
        assert place_of(cloud) != {H1}
        assert cloud.world.now() - at < 60
        back(cloud, H1)
        await settled(cloud)
        assert place_of(cloud) != {H1}

    with cloud_of() as cloud:
        play(cloud, scene)


def test_a_host_that_is_cut_off_ends_the_server_before_it_is_restarted_elsewhere() -> None:
    async def scene(cloud: SimulatedCloud) -> None:
        await with_server(cloud)
        cut(cloud, H1)
        async with asyncio.timeout(120):
            while not cloud.up(WEB) or place_of(cloud) == {H1}:
                await asyncio.sleep(0.1)
        assert len(cloud.world.running(WEB)) == 1
        cut(cloud, H1, on=False)
        await settled(cloud)
        assert place_of(cloud) != {H1}

    with cloud_of() as cloud:
        play(cloud, scene)


def test_a_host_that_only_the_orchestrator_does_not_see_runs_on() -> None:
    async def scene(cloud: SimulatedCloud) -> None:
        await with_server(cloud)
        boots = cloud.world.facts(WEB).boots
        cloud.network.partition(f"host/{H1}", ORCHESTRATOR)
        await asyncio.sleep(90)
        view = await cloud.ask(lambda s: s.availability.view())
        assert next(h for h in view.hosts if h.host == H1).state == "cut off"
        assert (place_of(cloud), cloud.world.facts(WEB).boots) == ({H1}, boots)

    with cloud_of() as cloud:
        play(cloud, scene)
