"""One orchestrator with scripted agents: joining, configurations, moves, campaigns, bad requests."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from scripted_cloud import EDGE, GUEST, NEW, OLD, ScriptedAgent, ScriptedCloud, opened

from nahtlos.model.blueprint import CampaignState, HostIntent, HostPhase
from nahtlos.model.errors import Conflict, Error, NotFound, Refused, Stale, Unavailable
from nahtlos.model.ids import HostId, OperationId, ReleaseId, ServerId
from nahtlos.model.inventory import OperationState, RunState
from nahtlos.model.nouns import HostRole, Size
from nahtlos.runtime.controllers.cloud import JoinRequest, ServerRequest
from nahtlos.wire.messages import Report
from nahtlos.wire.session import Session

H1, H2, H3 = HostId("host-1"), HostId("host-2"), HostId("host-3")
WEB = ServerId("web-1")


@pytest.fixture
async def cloud(tmp_path: Path) -> AsyncIterator[ScriptedCloud]:
    async with opened(tmp_path / "runtime.sqlite") as scripted:
        yield scripted


async def kinds(cloud: ScriptedCloud) -> list[str]:
    return [e.kind for e in await cloud.cloud.events(0, 1000)]


# --- joining and talking -----------------------------------------------------------------------------


async def test_hosts_join_are_verified_and_serve(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    hosts = {h.id: h for h in await cloud.cloud.hosts()}
    assert {h.phase for h in hosts.values()} == {HostPhase.SERVING}
    assert all(h.verified_release == h.release == OLD for h in hosts.values() if h.id != EDGE)
    assert hosts[EDGE].release is None
    edge = cloud.agents[EDGE].config
    assert edge is not None and [u.interface for u in edge.uplinks] == ["out0"]
    assert {"host.joined", "agent.connected", "verify.begun", "verify.ended", "host.phase"} <= set(
        await kinds(cloud)
    )
    whole = await cloud.cloud.host(H1)
    assert whole.inventory is not None and whole.inventory.host == H1


async def test_a_token_lets_one_host_join_once(cloud: ScriptedCloud) -> None:
    token = await cloud.cloud.create_join_token(H1, HostRole.COMPUTE, 60)
    good = JoinRequest(
        token=token, host=H1, role=HostRole.COMPUTE, address="10.99.0.11", peer_port=7444, csr_pem="request"
    )
    for wrong in (
        {"token": "guessed"},
        {"host": H2},
        {"role": HostRole.EDGE},
        {"address": "nowhere"},
        {"peer_port": 0},
        {"csr_pem": "nonsense"},
    ):
        with pytest.raises(Refused):
            await cloud.cloud.join(msgspec.structs.replace(good, **wrong))
    assert await cloud.cloud.hosts() == (), "nothing was half done"
    answer = await cloud.cloud.join(good)
    assert answer.certificate_pem == "certificate of host-1 at 10.99.0.11"
    with pytest.raises(Refused, match="token"):
        await cloud.cloud.join(good)


async def refusal_of(cloud: ScriptedCloud, agent: ScriptedAgent) -> BaseException:
    cloud.dial_in(agent.host)

    async def refused() -> bool:
        return agent.refusal is not None

    await cloud.until(refused)
    assert agent.refusal is not None
    return agent.refusal


async def test_an_agent_that_has_not_joined_is_refused(cloud: ScriptedCloud) -> None:
    assert "has not joined" in str(await refusal_of(cloud, cloud.agents[H1]))
    assert "agent.refused" in await kinds(cloud)


async def test_an_agent_cannot_speak_for_another_host(cloud: ScriptedCloud) -> None:
    await cloud.join(H2, 12)
    cloud.agents[H2].party = "host/host-1"
    assert "cannot speak for host-2" in str(await refusal_of(cloud, cloud.agents[H2]))


async def test_an_agent_of_another_protocol_is_refused(cloud: ScriptedCloud) -> None:
    await cloud.join(H1, 11)
    cloud.agents[H1].protocols = (7, 9)
    assert "no common protocol" in str(await refusal_of(cloud, cloud.agents[H1]))


async def test_an_agent_newer_than_its_orchestrator_is_taken_and_told_of(cloud: ScriptedCloud) -> None:
    """Refused it would count as lost, and its servers be started elsewhere."""
    await cloud.join(H1, 11)
    cloud.agents[H1].version = "9.9.9"
    cloud.dial_in(H1)

    async def told() -> bool:
        return "agent.newer" in await kinds(cloud)

    await cloud.until(told)
    (view,) = await cloud.cloud.hosts()
    assert view.connected
    (event,) = [e for e in await cloud.cloud.events(0, 1000) if e.kind == "agent.newer"]
    assert "9.9.9" in event.text and "orchestrators" in event.text and "before agents" in event.text


async def test_an_agent_that_obeyed_a_newer_orchestrator_is_refused(cloud: ScriptedCloud) -> None:
    await cloud.join(H1, 11)
    cloud.agents[H1].epoch = 99
    assert isinstance(await refusal_of(cloud, cloud.agents[H1]), Stale)


async def test_hello_comes_first_and_reports_are_of_ones_own_host(cloud: ScriptedCloud) -> None:
    await cloud.join(H1, 11)
    channel = await cloud.network.transport("host/host-1").dial(
        "10.99.0.1", 7443, expect="orchestrator", timeout=5.0
    )
    agent = cloud.agents[H1]
    session = Session(channel, agent._obey)
    reading = asyncio.create_task(session.run())
    with pytest.raises(Refused, match="before Hello"):
        await session.request(Report(inventory=agent.inventory()), timeout=5.0)
    await session.request(agent.hello(), timeout=5.0)
    with pytest.raises(Refused, match="cannot report for host-2"):
        await session.request(Report(inventory=cloud.agents[H2].inventory()), timeout=5.0)
    await session.close()
    reading.cancel()


async def test_a_lost_agent_is_noticed_and_comes_back(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    cloud.network.break_channels("orchestrator", "host/host-1")

    async def lost_and_back() -> bool:
        seen = await kinds(cloud)
        return "agent.lost" in seen and seen.count("agent.connected") == len(cloud.agents) + 1

    await cloud.until(lost_and_back)
    await cloud.until(cloud.converged)
    await cloud.agents[H1].tell("server.crashed")

    async def told() -> bool:
        return "server.crashed" in await kinds(cloud)

    await cloud.until(told)


async def test_events_can_be_followed(cloud: ScriptedCloud) -> None:
    seen: list[str] = []

    async def follow() -> None:
        async for event in cloud.cloud.follow(0):
            seen.append(event.kind)
            if event.kind == "host.token":
                return

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.05)
    await cloud.cloud.create_join_token(H1, HostRole.COMPUTE, 60)
    async with asyncio.timeout(5.0):
        await following
    assert seen[0] == "orchestrator.leads"


# --- servers -----------------------------------------------------------------------------------------


async def test_servers_are_placed_with_addresses_and_volumes_spread(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1", "web-2", "web-3")
    servers = await cloud.cloud.servers()
    assert [s.ip for s in servers] == ["10.77.0.10", "10.77.0.11", "10.77.0.12"]
    assert [s.mac for s in servers] == [f"52:54:00:4d:00:0{x}" for x in "abc"]
    assert {s.volume_host for s in servers} == {H1, H2, H3}
    assert {s.host for s in servers} == {H1, H2, H3}
    assert {s.release for s in servers} == {OLD}
    config = cloud.agents[servers[0].host or H1].config
    assert config is not None
    assert config.servers[0].spec.machine == "pc-q35-10.0", "newest both releases have"
    assert await cloud.cloud.console_read(WEB, 2) == (b"gin:", 6)


async def test_requests_that_cannot_be_granted_name_field_and_remedy(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1")
    ask = cloud.cloud
    cases = [
        (ask.create_server(ServerRequest(name="Web")), Refused, "name"),
        (ask.create_server(ServerRequest(name="web-1")), Conflict, "name"),
        (ask.create_server(ServerRequest(name="a", vcpus=0)), Refused, "vcpus"),
        (ask.create_server(ServerRequest(name="a", memory_mib=1)), Refused, "memory_mib"),
        (ask.create_server(ServerRequest(name="a", volume_mib=100)), Refused, "volume_mib"),
        (ask.create_server(ServerRequest(name="a", user_data="é" * 8193)), Refused, "user_data"),
        (ask.create_server(ServerRequest(name="a", image=type(GUEST)("no"))), NotFound, "image"),
        (ask.create_server(ServerRequest(name="a", host=HostId("host-9"))), NotFound, "host"),
        (ask.create_server(ServerRequest(name="a", host=EDGE)), Refused, "host"),
        (ask.create_server(ServerRequest(name="a", vcpus=8)), Conflict, "vcpus"),
        (ask.move_server(ServerId("web-9"), None), NotFound, "server"),
        (ask.move_server(WEB, HostId("host-9")), NotFound, "to"),
        (ask.move_server(WEB, EDGE), Refused, "to"),
        (ask.delete_server(ServerId("web-9")), NotFound, "server"),
        (ask.server(ServerId("web-9")), NotFound, "server"),
        (ask.host(HostId("host-9")), NotFound, "host"),
        (ask.set_host_intent(EDGE, HostIntent.DRAINED), Refused, "host"),
        (ask.release(ReleaseId("qemu-9")), NotFound, "release"),
        (ask.register_release(ReleaseId("qemu-9")), NotFound, "release"),
        (ask.plan_upgrade(ReleaseId("qemu-9"), None), NotFound, "release"),
        (ask.start_upgrade(ReleaseId("qemu-9"), None), NotFound, "release"),
        (ask.start_upgrade(NEW, (HostId("host-9"),)), NotFound, "hosts"),
        (ask.start_upgrade(OLD, None), Refused, "to"),
        (ask.campaign(None), NotFound, "campaign"),
        (ask.pause_upgrade(), Conflict, "campaign"),
        (ask.set_promised(Size(vcpus=13, memory_mib=1)), Refused, "promised"),
        (ask.create_join_token(HostId("Host"), HostRole.COMPUTE, 60), Refused, "host"),
        (ask.create_join_token(H1, HostRole.COMPUTE, 0), Refused, "ttl_seconds"),
    ]
    for request, kind, field in cases:
        with pytest.raises(Error) as refused:
            await request
        assert isinstance(refused.value, kind), refused.value
        assert refused.value.field == field, refused.value
        assert refused.value.remedy, refused.value
    assert [s.id for s in await ask.servers()] == ["web-1"], "nothing was half done"


async def test_a_host_without_room_says_what_is_missing_and_where_it_fits(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.cloud.create_server(ServerRequest(name="big", memory_mib=900, host=H1))
    with pytest.raises(Conflict) as refused:
        await cloud.cloud.create_server(ServerRequest(name="next", memory_mib=256, host=H1))
    assert "132 MiB" in refused.value.message
    assert "host-2" in refused.value.remedy


async def test_a_damaged_release_is_not_taken_up(cloud: ScriptedCloud) -> None:
    cloud.releases.damaged.add(NEW)
    for request in (cloud.cloud.register_release(NEW), cloud.cloud.start_upgrade(NEW, None)):
        with pytest.raises(Refused, match="differs from the manifest"):
            await request
    assert await cloud.cloud.releases() == ()


async def test_a_deleted_server_goes_with_its_volume_and_its_name_is_free(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1", "web-2")
    assert (await cloud.cloud.delete_server(WEB)).waits_for

    async def gone() -> bool:
        return [s.id for s in await cloud.cloud.servers()] == ["web-2"]

    await cloud.until(gone)
    assert cloud.copies(WEB) == []

    async def volume_gone() -> bool:
        return "volume.gone" in await kinds(cloud)

    await cloud.until(volume_gone)
    await cloud.servers("web-1")
    assert (await cloud.cloud.server(WEB)).ip == "10.77.0.10"


# --- moves -------------------------------------------------------------------------------------------


async def test_a_move_from_request_to_acknowledgement(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1")
    source = (await cloud.cloud.server(WEB)).host
    assert source is not None
    destination = next(h for h in (H1, H2, H3) if h != source)
    agent = cloud.agents[source]
    agent.hold_moves = True
    await cloud.cloud.move_server(WEB, destination)

    async def begun() -> bool:
        return bool(agent.begun)

    await cloud.until(begun)
    view = await cloud.cloud.server(WEB)
    assert (view.host, view.moving_to) == (source, destination)
    with pytest.raises(Conflict, match="is moving"):
        await cloud.cloud.move_server(WEB, destination)

    for late in cloud.agents.values():
        late.converges = False
    agent.end_move(agent.begun[0])

    async def passes_on() -> bool:
        return agent.config is not None and agent.config.reflect == ("web-1-eth0",)

    await cloud.until(passes_on)
    for late in cloud.agents.values():
        late.converges = True
        late.converge()

    async def over() -> bool:
        config = agent.config
        return config is not None and config.reflect == () and await cloud.converged()

    await cloud.until(over)
    view = await cloud.cloud.server(WEB)
    assert (view.host, view.epoch, view.moving_to, view.waits_for) == (destination, 2, None, "")
    assert cloud.copies(WEB) == [destination]
    assert all(agent.begun[0] in a.forgotten for a in (agent, cloud.agents[destination]))
    for a in cloud.agents.values():
        assert a.generations == sorted(set(a.generations)), "each generation once, rising"
    with pytest.raises(Refused, match="is on"):
        await cloud.cloud.move_server(WEB, destination)
    assert {"move.begun", "move.ended"} <= set(await kinds(cloud))


async def test_a_move_an_agent_will_not_begin_is_undone_and_tried_again(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1")
    source = (await cloud.cloud.server(WEB)).host
    destination = next(h for h in (H1, H2, H3) if h != source)
    cloud.agents[destination].refuse_moves = 1
    await cloud.cloud.move_server(WEB, destination)

    async def moved() -> bool:
        return (await cloud.cloud.server(WEB)).host == destination

    await cloud.until(moved)
    assert "operation.refused" in await kinds(cloud)
    assert cloud.agents[destination].begun == [OperationId("move-5")], "the second attempt has its own id"


async def test_an_undone_move_leaves_the_server_where_it_was(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1")
    source = (await cloud.cloud.server(WEB)).host
    assert source is not None
    agent = cloud.agents[source]
    agent.hold_moves = True
    await cloud.cloud.move_server(WEB, None)

    async def begun_twice() -> bool:
        running = [o for o, s in agent.operations.items() if s.state is OperationState.RUNNING]
        if running and len(agent.begun) == 1:
            agent.undo_move(running[0])
        return len(agent.begun) == 2

    await cloud.until(begun_twice)
    assert cloud.copies(WEB) == [source]
    agent.end_move(agent.begun[1])
    await cloud.until(cloud.converged)
    view = await cloud.cloud.server(WEB)
    assert (view.host, view.epoch) != (source, 1)


async def test_a_server_deleted_before_its_move_began_is_gone(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1")
    source = (await cloud.cloud.server(WEB)).host
    destination = next(h for h in (H1, H2, H3) if h != source)
    cloud.agents[destination].refuse_moves = 1
    await cloud.cloud.move_server(WEB, destination)
    await cloud.cloud.delete_server(WEB)

    async def gone() -> bool:
        return await cloud.cloud.servers() == () and await cloud.converged()

    await cloud.until(gone)
    assert cloud.copies(WEB) == []


# --- campaigns ---------------------------------------------------------------------------------------


async def ended(cloud: ScriptedCloud) -> bool:
    view = await cloud.cloud.campaign(None)
    return view.campaign.ended_at is not None


async def test_a_campaign_upgrades_every_host_under_running_servers(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1", "web-2", "web-3", "web-4")
    predicted = await cloud.cloud.plan_upgrade(NEW, None)
    assert predicted.blockers == ()
    begun = await cloud.cloud.start_upgrade(NEW, None)
    assert begun.campaign.state is CampaignState.RUNNING
    assert begun.campaign.from_releases == (OLD,)
    with pytest.raises(Conflict, match="campaign-1"):
        await cloud.cloud.start_upgrade(NEW, None)
    created = await cloud.cloud.create_server(ServerRequest(name="late"))
    assert created.id == "late"
    await cloud.until(lambda: ended(cloud))
    await cloud.until(cloud.all_run)

    view = await cloud.cloud.campaign(None)
    assert view.campaign.state is CampaignState.DONE
    assert (view.hosts_upgraded, view.hosts_total) == (3, 3)
    assert view.capacity_floor == 1.0
    moves = [o for o in view.operations if o.kind == "move"]
    assert len(moves) == view.moves_done and view.moves_failed == 0
    assert {o.release_after for o in moves} <= {OLD, NEW}
    assert all(o.release_before and o.times and o.campaign == "campaign-1" for o in moves)
    assert [o.subject for o in view.operations if o.kind == "verify"].count("host-1") == 1
    servers = await cloud.cloud.servers()
    assert len(servers) == 5
    assert {s.release for s in servers if s.id != "late"} == {NEW}
    for host in await cloud.cloud.hosts():
        assert host.phase is HostPhase.SERVING
        assert host.role is HostRole.EDGE or host.release == NEW
    again = await cloud.cloud.plan_upgrade(OLD, None)
    assert "measured" in again.basis


async def test_a_campaign_pauses_goes_on_and_is_cancelled(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1", "web-2", "web-3")
    for agent in cloud.agents.values():
        agent.hold_moves = True
    await cloud.cloud.start_upgrade(NEW, None)

    def running() -> list[tuple[ScriptedAgent, OperationId]]:
        return [
            (a, o.id)
            for a in cloud.agents.values()
            for o in a.operations.values()
            if o.state is OperationState.RUNNING and a.orders[o.id].source == a.host
        ]

    async def moves() -> bool:
        return bool(running())

    await cloud.until(moves)
    assert (await cloud.cloud.pause_upgrade()).campaign.state is CampaignState.PAUSED
    with pytest.raises(Conflict, match="is paused"):
        await cloud.cloud.pause_upgrade()
    assert (await cloud.cloud.resume_upgrade()).campaign.state is CampaignState.RUNNING
    cancelled = await cloud.cloud.cancel_upgrade()
    assert cancelled.campaign.state is CampaignState.CANCELLED
    assert cancelled.campaign.ended_at is None, "what has begun is ended in order"
    with pytest.raises(Conflict):
        await cloud.cloud.resume_upgrade()
    for agent, operation in running():
        agent.end_move(operation)
    await cloud.until(lambda: ended(cloud))
    await cloud.until(cloud.converged)
    assert {h.release for h in await cloud.cloud.hosts() if h.id != EDGE} == {OLD}
    assert {h.phase for h in await cloud.cloud.hosts()} == {HostPhase.SERVING}


async def test_a_drained_host_gives_its_servers_away(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1", "web-2", "web-3")
    await cloud.cloud.set_host_intent(H1, HostIntent.DRAINED)

    async def drained() -> bool:
        return (await cloud.cloud.host(H1)).phase is HostPhase.DRAINED

    await cloud.until(drained)
    assert (await cloud.cloud.host(H1)).servers == ()
    assert (await cloud.cloud.set_host_intent(H1, HostIntent.ACTIVE)).intent is HostIntent.ACTIVE
    await cloud.until(cloud.converged)


async def test_a_host_that_is_away_leaves_the_console_unavailable(cloud: ScriptedCloud) -> None:
    await cloud.ready()
    await cloud.servers("web-1")
    assert (await cloud.cloud.server(WEB)).state is RunState.RUNNING
    await cloud.kill()
    await cloud.hang_up()
    await cloud.start()
    with pytest.raises(Unavailable, match="not connected"):
        await cloud.cloud.console_read(WEB, 0)
    for host in cloud.agents:
        cloud.dial_in(host)
    await cloud.until(cloud.converged)
    assert await cloud.cloud.console_read(WEB, 0) == (b"login:", 6)
