"""Servers that are stopped, under the real orchestrator and agents in virtual time: they hold no room, a
drain takes them along by a decision alone, a campaign leaves them alone, they start where there is room."""

import asyncio
import random
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from crash_plays import memory
from quick_database import database_in_the_loop
from simulated_cloud import IMAGE, SimulatedCloud, killed_for_ever

from nahtlos.model.blueprint import HostIntent
from nahtlos.model.errors import Conflict
from nahtlos.model.ids import HostId, ServerId, SnapshotId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Size
from nahtlos.physical.sim.clock import run_virtual
from nahtlos.physical.sim.cloudlet import NEW
from nahtlos.runtime.controllers.cloud import ServerRequest, ServerView
from nahtlos.runtime.controllers.cloud_service import CloudService
from nahtlos.runtime.controllers.powers import StopRequest
from nahtlos.runtime.controllers.volumes import RevertRequest, SnapshotRequest

H1, H2 = HostId("host-1"), HostId("host-2")
WEB, DB = ServerId("web"), ServerId("db")
SOON = StopRequest(seconds=20)
Play = Callable[[SimulatedCloud], Awaitable[None]]


def played(play: Play, *, seed: int = 1, memory_mib: int = 512) -> SimulatedCloud:
    with database_in_the_loop(), tempfile.TemporaryDirectory(dir=memory()) as folder:
        cloud = SimulatedCloud(Path(folder), seed, capacity=Size(vcpus=4, memory_mib=memory_mib))
        run_virtual(cloud.run(play), seed=seed, limit_seconds=20_000)
    assert not cloud.world.violations, cloud.world.violations
    assert not cloud.problems
    for process in (*cloud.agents.values(), cloud.orchestrator):
        assert not process.bugs, process.bugs
    return cloud


async def created(cloud: SimulatedCloud, name: ServerId, host: HostId) -> None:
    request = ServerRequest(name=name, image=IMAGE, host=host, memory_mib=256)
    await cloud.ask(lambda s: s.create_server(request))
    await becomes(cloud, name, lambda view: view.state is RunState.RUNNING, "to boot")
    await cloud.world.until(lambda: cloud.up(name), timeout=60, what=f"{name} to answer")


async def becomes(
    cloud: SimulatedCloud, name: ServerId, holds: Callable[[ServerView], bool], what: str
) -> None:
    async def so(service: CloudService) -> bool:
        view = await service.server(name)
        return holds(view) and not view.power_pending

    await cloud.until(so, timeout=300, what=f"{name} {what}")


async def stop(cloud: SimulatedCloud, name: ServerId, request: StopRequest = SOON) -> None:
    cloud.world.stop_expected(name)
    await cloud.ask(lambda s: s.power.stop(name, request))
    await becomes(cloud, name, lambda view: view.state is RunState.STOPPED, "to stop")


def test_a_stopped_server_holds_no_room_and_starts_where_there_is_some() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await stop(cloud, WEB)
        await created(cloud, DB, H1)  # in the room that WEB had
        assert (await cloud.ask(lambda s: s.host(H1))).used.memory_mib == 256
        await cloud.ask(lambda s: s.power.start(WEB))
        await becomes(cloud, WEB, lambda v: v.state is RunState.RUNNING and v.host != H1, "to run elsewhere")
        assert cloud.world.facts(WEB).boots == 2

    played(play, memory_mib=256)


def test_a_drain_takes_stopped_servers_along_and_a_campaign_leaves_them() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await created(cloud, DB, H2)
        await stop(cloud, WEB)
        boots = cloud.world.facts(WEB).boots
        await cloud.ask(lambda s: s.set_host_intent(H1, HostIntent.DRAINED))
        await becomes(cloud, WEB, lambda view: view.host not in (None, H1), "to be kept elsewhere")
        assert cloud.world.facts(WEB).boots == boots
        await cloud.ask(lambda s: s.set_host_intent(H1, HostIntent.ACTIVE))
        place = (await cloud.ask(lambda s: s.server(WEB))).host
        await cloud.ask(lambda s: s.start_upgrade(NEW, None))

        async def over(service: CloudService) -> bool:
            return (await service.campaign(None)).campaign.ended_at is not None

        await cloud.until(over, timeout=1200, what="the campaign")
        view = await cloud.ask(lambda s: s.server(WEB))
        assert (view.state, view.host) == (RunState.STOPPED, place)
        moves = [o for o in (await cloud.ask(lambda s: s.campaign(None))).operations if o.kind == "move"]
        assert {move.subject for move in moves} <= {DB}
        await cloud.ask(lambda s: s.power.start(WEB))
        await becomes(cloud, WEB, lambda v: v.release == NEW and v.state is RunState.RUNNING, "to run by it")

    played(play, memory_mib=1024)


def test_a_stopped_server_is_moved_by_its_owner_too_and_deleted() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await stop(cloud, WEB)
        await cloud.ask(lambda s: s.move_server(WEB, H2))
        await becomes(cloud, WEB, lambda view: view.host == H2, "to be kept there")
        with pytest.raises(Conflict, match="stopped"):
            await cloud.ask(lambda s: s.power.reboot(WEB, SOON))
        cloud.world.delete_expected(WEB)
        await cloud.ask(lambda s: s.delete_server(WEB))

        async def gone(service: CloudService) -> bool:
            return not await service.servers()

        await cloud.until(gone, timeout=120, what="its end")

    played(play)


def test_what_is_wanted_follows_a_guest_that_switches_itself_off() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        cloud.world.switch_off(cloud.world.running(WEB)[0])
        await becomes(cloud, WEB, lambda view: view.power.state == "off", "to be off")
        await cloud.ask(lambda s: s.set_host_intent(H1, HostIntent.DRAINED))
        await becomes(cloud, WEB, lambda view: view.host not in (None, H1), "to be kept elsewhere")
        assert cloud.world.facts(WEB).boots == 1

    played(play)


@pytest.mark.parametrize("seed", range(3))
def test_stopped_started_and_booted_anew_while_agents_and_the_orchestrator_die(seed: int) -> None:
    """Never two copies, never one that boots without having been asked to: the world looks at that."""
    chance = random.Random(seed)

    async def owner(cloud: SimulatedCloud) -> None:
        for _ in range(6):
            verb = chance.choice(("stop", "start", "reboot", "drain"))
            if verb == "drain":
                intent = chance.choice((HostIntent.DRAINED, HostIntent.ACTIVE))
                await cloud.ask(lambda s, i=intent: s.set_host_intent(H1, i))
                continue
            cloud.world.stop_expected(WEB)
            request = StopRequest(hard=chance.random() < 0.5, seconds=10)
            try:
                if verb == "start":
                    await cloud.ask(lambda s: s.power.start(WEB))
                elif verb == "stop":
                    await cloud.ask(lambda s, r=request: s.power.stop(WEB, r))
                else:
                    await cloud.ask(lambda s, r=request: s.power.reboot(WEB, r))
            except Conflict:
                pass
            await asyncio.sleep(chance.uniform(0.0, 15.0))

    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        async with asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(killed_for_ever(cloud, chance, (0.2, 6.0)))
            await owner(cloud)
            killing.cancel()
        await cloud.ask(lambda s: s.set_host_intent(H1, HostIntent.ACTIVE))
        cloud.world.stop_expected(WEB)
        await cloud.ask(lambda s: s.power.start(WEB))
        await becomes(cloud, WEB, lambda view: view.state is RunState.RUNNING, "to run in the end")
        await cloud.world.until(lambda: cloud.up(WEB), timeout=60, what="to answer")

    played(play, seed=seed)


async def suspend(cloud: SimulatedCloud, name: ServerId) -> None:
    await cloud.ask(lambda s: s.power.suspend(name))
    await becomes(cloud, name, lambda view: view.state is RunState.SUSPENDED, "to be suspended")


def test_a_suspended_server_goes_on_at_another_host_with_what_it_remembers() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await suspend(cloud, WEB)
        assert not cloud.world.vmms_of(WEB)
        with pytest.raises(Conflict, match="suspended"):
            await cloud.ask(lambda s: s.power.start(WEB))
        await cloud.ask(lambda s: s.set_host_intent(H1, HostIntent.DRAINED))
        await becomes(cloud, WEB, lambda view: view.host not in (None, H1), "to be kept elsewhere")
        await cloud.ask(lambda s: s.power.resume(WEB))
        await becomes(cloud, WEB, lambda view: view.state is RunState.RUNNING, "to go on")
        assert cloud.world.facts(WEB).boots == 1
        (vmm,) = cloud.world.running(WEB)
        assert vmm.host != H1

        async def forgotten(service: CloudService) -> bool:
            return all("memory" not in view.spec.id for view in await service.volumes.volumes())

        await cloud.until(forgotten, timeout=120, what="the end of what was saved")

    played(play)


def test_what_was_saved_can_be_given_up() -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        await suspend(cloud, WEB)
        with pytest.raises(Conflict, match="lose what was saved"):
            await cloud.ask(lambda s: s.power.stop(WEB, SOON))
        await stop(cloud, WEB, StopRequest(hard=True))
        cloud.world.facts(WEB).gone = True  # its memory was given up
        await cloud.ask(lambda s: s.power.start(WEB))
        await becomes(cloud, WEB, lambda view: view.state is RunState.RUNNING, "to boot")
        assert cloud.world.facts(WEB).boots == 2

    played(play)


@pytest.mark.parametrize("seed", range(2))
def test_suspended_and_resumed_while_agents_and_the_orchestrator_die(seed: int) -> None:
    """It boots once and never again, whatever dies: the world looks at that, and at what it reads."""
    chance = random.Random(seed)

    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        for intent in (HostIntent.DRAINED, HostIntent.ACTIVE):
            async with asyncio.TaskGroup() as tasks:
                killing = tasks.create_task(killed_for_ever(cloud, chance, (0.1, 4.0)))
                await cloud.ask(lambda s: s.power.suspend(WEB))
                await asyncio.sleep(chance.uniform(5.0, 40.0))
                killing.cancel()
            await becomes(cloud, WEB, lambda view: view.state is RunState.SUSPENDED, "to be suspended")
            await cloud.ask(lambda s, i=intent: s.set_host_intent(H1, i))
            async with asyncio.TaskGroup() as tasks:
                killing = tasks.create_task(killed_for_ever(cloud, chance, (0.1, 4.0)))
                await cloud.ask(lambda s: s.power.resume(WEB))
                await asyncio.sleep(chance.uniform(5.0, 40.0))
                killing.cancel()
            await becomes(cloud, WEB, lambda view: view.state is RunState.RUNNING, "to go on")
        assert cloud.world.facts(WEB).boots == 1

    played(play, seed=seed)


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_is_stopped_for_a_revert_of_its_disk_and_started_again(killed: bool) -> None:
    async def play(cloud: SimulatedCloud) -> None:
        await cloud.ready()
        await created(cloud, WEB, H1)
        disk = (await cloud.ask(lambda s: s.server(WEB))).limits
        (name,) = disk
        request = SnapshotRequest(name="then", volumes=(name,))
        await cloud.ask(lambda s: s.volumes.create_snapshots(request))

        async def kept(service: CloudService) -> bool:
            return bool(await service.volumes.snapshots())

        await cloud.until(kept, timeout=60, what="a snapshot")
        with pytest.raises(Conflict, match="change under itself"):
            await cloud.ask(
                lambda s: s.volumes.revert_volume(name, RevertRequest(snapshot=SnapshotId("then")))
            )
        cloud.world.stop_expected(WEB)
        asked = RevertRequest(snapshot=SnapshotId("then"), stop=True)
        await cloud.ask(lambda s: s.volumes.revert_volume(name, asked))
        if killed:
            await asyncio.sleep(1.0)
            cloud.agents[H1].kill("in the middle")
            cloud.orchestrator.kill("in the middle")
        await becomes(cloud, WEB, lambda v: v.state is RunState.RUNNING and v.power.boot > 0, "to run again")
        assert cloud.world.facts(WEB).boots == 2
        reverts = [step for step in cloud.world.trace if step.what == "storage.revert"]
        boots = [step.at for step in cloud.world.trace if step.what == "runs"]
        assert reverts
        assert boots[-1] > max(step.at for step in reverts)

    played(play)
