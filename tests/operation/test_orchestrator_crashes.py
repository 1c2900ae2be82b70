"""The orchestrator is killed, replaced, and raced against: nothing of it that matters is in memory."""

import asyncio
import random
from pathlib import Path

import pytest
from scripted_cloud import EDGE, NEW, Images, Killed, Releases, ScriptedCloud, Signatures, opened

from nahtlos.model.blueprint import CampaignState, HostIntent
from nahtlos.model.errors import Stale
from nahtlos.model.ids import HostId, ServerId
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.orchestrator import Orchestrator
from nahtlos.runtime.store.store import Store


async def ended(cloud: ScriptedCloud) -> bool:
    return (await cloud.cloud.campaign(None)).campaign.ended_at is not None


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_campaign_survives_kills_at_any_transaction(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    names = [ServerId(f"web-{n}") for n in range(1, 5)]
    async with opened(tmp_path / "runtime.sqlite") as cloud:
        await cloud.ready()
        await cloud.servers(*names)
        await cloud.cloud.start_upgrade(NEW, None)
        for _ in range(8):
            cloud.kill_after = chance.randint(1, 40)
            over = await _killed_or_over(cloud)
            if over:
                break
            await cloud.kill()
            assert all(len(cloud.copies(name)) == 1 for name in names)
            await cloud.start()
        await cloud.until(lambda: ended(cloud))
        await cloud.until(cloud.converged)
        view = await cloud.cloud.campaign(None)
        assert view.campaign.state is CampaignState.DONE
        assert (view.hosts_upgraded, view.moves_failed) == (3, 0)
        assert cloud.starts > 2
        begun = [o for a in cloud.agents.values() for o in a.begun]
        recorded = [o.id for o in view.operations if o.kind == "move"]
        assert sorted({*begun}) == sorted(recorded), "every move is recorded once, none was begun unknown"
        assert all(begun.count(o) == 2 for o in recorded), "each at two hosts, never twice at one"
        for agent in cloud.agents.values():
            assert agent.generations == sorted(set(agent.generations))
            assert agent.operations == {}, "everything that ended was acknowledged"
        assert {s.release for s in await cloud.cloud.servers()} == {NEW}


async def _killed_or_over(cloud: ScriptedCloud) -> bool:
    """Whether the campaign was over before the orchestrator was killed."""
    while not cloud.killed.is_set():
        try:
            async with asyncio.timeout(0.05):
                await cloud.killed.wait()
        except TimeoutError:
            pass
        try:
            if not cloud.killed.is_set() and await ended(cloud):
                return True
        except Killed:
            return False
    return False


async def test_what_was_asked_of_a_killed_orchestrator_is_done_by_the_next(tmp_path: Path) -> None:
    async with opened(tmp_path / "runtime.sqlite") as cloud:
        await cloud.ready()
        await cloud.servers("web-1")
        server = ServerId("web-1")
        source = (await cloud.cloud.server(server)).host
        destination = next(h for h in cloud.agents if h not in (source, EDGE))
        await cloud.cloud.move_server(server, destination)
        await cloud.kill()
        await cloud.start()

        async def moved() -> bool:
            return (await cloud.cloud.server(server)).host == destination and await cloud.converged()

        await cloud.until(moved)
        assert (await cloud.cloud.server(server)).epoch == 2


async def test_a_move_that_ended_without_an_orchestrator_is_recorded(tmp_path: Path) -> None:
    async with opened(tmp_path / "runtime.sqlite") as cloud:
        await cloud.ready()
        await cloud.servers("web-1")
        server = ServerId("web-1")
        source = (await cloud.cloud.server(server)).host
        assert source is not None
        agent = cloud.agents[source]
        agent.hold_moves = True
        await cloud.cloud.move_server(server, None)

        async def begun() -> bool:
            return bool(agent.begun)

        await cloud.until(begun)
        await cloud.kill()
        agent.end_move(agent.begun[0])
        await cloud.start()
        await cloud.until(cloud.converged)
        view = await cloud.cloud.server(server)
        assert (view.epoch, view.moving_to) == (2, None)
        assert agent.begun[0] in agent.forgotten


def second_orchestrator(store: Store, *, alone: bool) -> Orchestrator:
    return Orchestrator(
        store,
        holder="second",
        alone=alone,
        identity=Signatures(),
        releases=Releases(),
        images=Images(),
    )


async def test_a_second_orchestrator_stands_by_and_a_fenced_one_decides_nothing(tmp_path: Path) -> None:
    database = tmp_path / "runtime.sqlite"
    async with opened(database) as cloud:
        await cloud.ready()
        first = cloud.orchestrator.leader.epoch
        assert first is not None
        store = await Store.open(database)
        standby = second_orchestrator(store, alone=False)
        running = asyncio.create_task(standby.run())
        await asyncio.sleep(0.3)
        assert standby.leader.epoch is None, "the first one's lease runs"
        running.cancel()
        await asyncio.wait({running})

        usurper = second_orchestrator(store, alone=True)
        running = asyncio.create_task(usurper.run())

        async def deposed() -> bool:
            return usurper.leader.epoch == first + 1 and cloud.orchestrator.leader.epoch is None

        await cloud.until(deposed)
        await cloud.cloud.set_host_intent(HostId("host-1"), HostIntent.CORDONED)
        with pytest.raises(Stale):
            while True:  # until there is something to decide that the other has not decided yet
                await cloud.orchestrator.loop.pass_once(first)
                await cloud.cloud.create_server(ServerRequest(name=f"web-{len(await cloud.cloud.servers())}"))

        async def silent() -> bool:
            return not cloud.orchestrator.agents.connected

        await cloud.until(silent)
        running.cancel()
        await asyncio.wait({running})
        await store.close()


async def test_an_agent_refuses_an_orchestrator_it_knows_to_be_old(tmp_path: Path) -> None:
    async with opened(tmp_path / "runtime.sqlite") as cloud:
        await cloud.ready()
        agent = cloud.agents[HostId("host-1")]
        agent.epoch = 50
        for name in ("web-1", "web-2", "web-3"):
            await cloud.cloud.create_server(ServerRequest(name=name))

        async def parted() -> bool:
            return HostId("host-1") not in cloud.orchestrator.agents.connected

        await cloud.until(parted)


async def test_two_planners_race_and_one_blueprint_wins(tmp_path: Path) -> None:
    async with opened(tmp_path / "runtime.sqlite") as cloud:
        await cloud.ready()
        epoch = cloud.orchestrator.leader.epoch
        assert epoch is not None
        await cloud.servers("web-1")
        loop = cloud.orchestrator.loop
        await cloud.cloud.set_host_intent(HostId("host-1"), HostIntent.CORDONED)
        results = await asyncio.gather(*(loop.pass_once(epoch) for _ in range(4)), return_exceptions=True)
        assert all(not isinstance(r, BaseException) or isinstance(r, Stale) for r in results), results
        await cloud.until(cloud.converged)
