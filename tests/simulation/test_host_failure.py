"""Whole simulated clouds in which a host fails: what shall be restarted is, and never runs twice."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crash_plays import memory
from quick_database import database_in_the_loop
from simulated_cloud import SimulatedCloud

from nahtlos.model.availability import OnHostFailure
from nahtlos.model.blueprint import HostIntent, HostPhase
from nahtlos.model.errors import Conflict
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.nouns import Size
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import OLD
from nahtlos.physical.sim.faults import Act, Call, Moment, Scripted
from nahtlos.runtime.controllers.availability import AvailabilityChange
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.cloud_service import CloudService

WEB = ServerId("web-1")
H1, H2 = HostId("host-1"), HostId("host-2")
EDGE = HostId("edge-1")
ORCHESTRATOR = "orchestrator"


@contextmanager
def cloud_of(seed: int = 1, **changes: object) -> Iterator[SimulatedCloud]:
    with database_in_the_loop(), tempfile.TemporaryDirectory(dir=memory()) as folder:
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


@pytest.mark.parametrize("policy", [OnHostFailure.LEAVE, OnHostFailure.EVACUATE_ONLY])
def test_what_is_not_to_be_restarted_waits_for_its_host_and_goes_on_there(policy: OnHostFailure) -> None:
    async def scene(cloud: SimulatedCloud) -> None:
        await with_server(cloud, policy)
        kill(cloud, H1)
        await asyncio.sleep(300.0)
        assert place_of(cloud) == set()
        back(cloud, H1)
        await settled(cloud)
        assert place_of(cloud) == {H1}
        assert cloud.world.facts(WEB).boots == 2

    with cloud_of() as cloud:
        play(cloud, scene)


@pytest.mark.parametrize("policy", list(OnHostFailure))
def test_what_is_to_be_left_stays_when_its_host_is_emptied_and_all_else_goes(policy: OnHostFailure) -> None:
    async def scene(cloud: SimulatedCloud) -> None:
        await with_server(cloud, policy)
        await cloud.ask(lambda service: service.set_host_intent(H1, HostIntent.DRAINED))
        if policy is OnHostFailure.LEAVE:
            await cloud.until(_says_that_it_is_left, timeout=60, what="word of the server that stays")
            await asyncio.sleep(120.0)
            assert place_of(cloud) == {H1}
        else:
            await cloud.until(_is_elsewhere(cloud), timeout=120, what="the server to be elsewhere")
        assert cloud.world.facts(WEB).boots == 1

    with cloud_of() as cloud:
        play(cloud, scene)


async def _says_that_it_is_left(service: CloudService) -> bool:
    waiting = (await service.status()).waiting
    return any(each.subject == WEB and "left where it is" in each.reason for each in waiting)


def _is_elsewhere(cloud: SimulatedCloud) -> Callable[[CloudService], Awaitable[bool]]:
    async def elsewhere(_: CloudService) -> bool:
        return bool(place_of(cloud)) and H1 not in place_of(cloud)

    return elsewhere


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


def test_hosts_that_come_back_one_by_one_after_the_orchestrator_was_away_are_not_taken_for_lost() -> None:
    async def scene(cloud: SimulatedCloud) -> None:
        await with_server(cloud)
        for host in cloud.agents:
            cloud.network.partition(f"host/{host}", ORCHESTRATOR)
        await asyncio.sleep(60)
        for host in reversed(cloud.agents):
            cloud.network.heal(f"host/{host}", ORCHESTRATOR)
            await asyncio.sleep(2)
        await settled(cloud)
        told = await cloud.ask(lambda s: s.events(0, 1000))
        assert not [event for event in told if event.kind in ("host.lost", "host.back")]

    with cloud_of() as cloud:
        play(cloud, scene)


# --- in the middle of a move -------------------------------------------------------------------------


class PowerCut(Scripted):
    """`host` loses its power when it is about to do `verb`, or has just done it, once."""

    def __init__(self, host: HostId, verb: str, moment: Moment) -> None:
        super().__init__(self._when)
        self._at = (host, verb, moment)
        self.armed: SimulatedCloud | None = None
        self.struck_at: float | None = None

    def _when(self, call: Call, moment: Moment) -> Act:
        cloud = self.armed
        if cloud is None or self.struck_at is not None or (call.host, call.verb, moment) != self._at:
            return Act.PASS
        self.struck_at = cloud.world.now()
        cloud.world.power_off(call.host)
        return Act.CRASH


async def struck_in_a_move(cloud: SimulatedCloud, cut_: PowerCut) -> None:
    """Its server was on its way from the first host to the second when one of them lost its power."""
    await with_server(cloud)
    cut_.armed = cloud
    await cloud.ask(lambda s: s.move_server(WEB, H2))
    await cloud.world.until(lambda: cut_.struck_at is not None, timeout=60, what="the move to come to it")


@pytest.mark.parametrize("moment", list(Moment))
def test_a_source_that_fails_in_the_pre_copy_loses_its_server_to_a_restart(moment: Moment) -> None:
    strike = PowerCut(H1, "migrate_start", moment)

    async def scene(cloud: SimulatedCloud) -> None:
        await struck_in_a_move(cloud, strike)
        boots = cloud.world.facts(WEB).boots
        await until_up(cloud)
        assert place_of(cloud) != {H1}
        assert cloud.world.facts(WEB).boots == boots + 1
        back(cloud, H1)
        await settled(cloud)
        assert place_of(cloud) != {H1}

    with cloud_of(troubles=strike) as cloud:
        play(cloud, scene)


@pytest.mark.parametrize("moment", list(Moment))
def test_a_destination_that_fails_in_the_commit_window_is_waited_for(moment: Moment) -> None:
    """The source has handed over and cannot know whether the server ran there: nobody starts it meanwhile."""
    strike = PowerCut(H2, "resume", moment)

    async def scene(cloud: SimulatedCloud) -> None:
        await struck_in_a_move(cloud, strike)
        await asyncio.sleep(60)
        assert not cloud.world.running(WEB)
        view = await cloud.ask(lambda s: s.server(WEB))
        assert view.waits_for, view
        back(cloud, H2)
        await settled(cloud)

    with cloud_of(troubles=strike) as cloud:
        play(cloud, scene)


# --- who comes first, and hosts that are vouched for -------------------------------------------------


def test_of_two_that_are_restarted_the_more_urgent_gets_the_room() -> None:
    slight, urgent = ServerId("web-1"), ServerId("web-2")

    async def scene(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        for name, host, priority in (
            (slight, "host-1", 0),
            (urgent, "host-1", 10),
            (ServerId("web-3"), "host-2", 0),
            (ServerId("web-4"), "host-2", 0),
            (ServerId("web-5"), "host-3", 0),
        ):
            request = ServerRequest(
                name=name,
                copies=2,
                host=HostId(host),
                on_host_failure=OnHostFailure.RESTART,
                restart_priority=priority,
            )
            await cloud.ask(lambda s, request=request: s.create_server(request))
            await cloud.world.until(lambda name=name: cloud.up(name), timeout=120, what=f"{name} to be up")
        await cloud.until(_under_lease, timeout=60, what="the servers to run under a lease")
        kill(cloud, H1)
        await cloud.world.until(lambda: cloud.up(urgent), timeout=120, what="the urgent one to be up")
        await asyncio.sleep(60)
        assert not cloud.up(slight)
        view = await cloud.ask(lambda s: s.server(slight))
        assert f"{slight} is not restarted" in view.waits_for, view
        back(cloud, H1)
        await cloud.world.until(lambda: cloud.up(slight), timeout=300, what="the other one to be up")
        assert {v.host for v in cloud.world.running(slight)} == {H1}

    with cloud_of(capacity=Size(vcpus=8, memory_mib=512)) as cloud:
        play(cloud, scene)


def test_an_operator_who_vouches_for_a_host_need_not_wait_for_its_lease() -> None:
    async def scene(cloud: SimulatedCloud) -> None:
        await cloud.ask(lambda s: s.availability.change(AvailabilityChange(lease_seconds=600.0)))
        await with_server(cloud)
        with pytest.raises(Conflict, match="connected"):
            await cloud.ask(lambda s: s.availability.fence(H1))
        kill(cloud, H1)
        await asyncio.sleep(60)
        assert not cloud.up(WEB)
        await cloud.ask(lambda s: s.availability.fence(H1))
        await until_up(cloud)
        view = await cloud.ask(lambda s: s.availability.view())
        assert "an operator vouches" in next(h for h in view.hosts if h.host == H1).why
        assert place_of(cloud) != {H1}
        back(cloud, H1)
        await settled(cloud)

    with cloud_of() as cloud:
        play(cloud, scene)


def test_with_two_hosts_only_power_tells_that_one_has_failed() -> None:
    async def both(service: CloudService) -> bool:
        serving = {v.id for v in await service.hosts() if v.connected and v.phase is HostPhase.SERVING}
        return serving == {H1, H2}

    async def scene(cloud: SimulatedCloud) -> None:
        await cloud.ask(lambda s: s.register_release(OLD))
        await cloud.until(both, timeout=60, what="both hosts to serve")
        request = ServerRequest(name=WEB, copies=2, host=H1, on_host_failure=OnHostFailure.RESTART)
        await cloud.ask(lambda s: s.create_server(request))
        await until_up(cloud)
        await asyncio.sleep(10)
        kill(cloud, H1)
        await asyncio.sleep(40)
        assert not cloud.up(WEB)
        waiting = (await cloud.ask(lambda s: s.status())).waiting
        assert [w.remedy for w in waiting if w.subject == H1 and "host fence" in w.remedy]
        await cloud.ask(lambda s: s.availability.fence(H1))
        await until_up(cloud)
        back(cloud, H1)

        async def is_back(service: CloudService) -> bool:
            return next(h for h in (await service.availability.view()).hosts if h.host == H1).state == "up"

        await cloud.until(is_back, timeout=60, what="the host to be back")
        assert cloud.up(WEB) and place_of(cloud) == {H2}

    with cloud_of(hosts=2, edges=0) as cloud:
        play(cloud, scene)
