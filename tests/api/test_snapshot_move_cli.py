"""Snapshots that are brought to other hosts while their volumes are used, from the command line to agents'
orders and back; and what is refused while agents are of an older release."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from click.testing import Result
from scripted_cloud import ScriptedAgent, ScriptedCloud

from nahtlos.model.ids import HostId
from nahtlos.model.inventory import OperationState
from nahtlos.wire.volumes import MoveSnapshotsOrder

H1, H2, H3 = HostId("host-1"), HostId("host-2"), HostId("host-3")
Run = Callable[..., Awaitable[Result]]


def orders(scripted: ScriptedCloud) -> list[MoveSnapshotsOrder]:
    given = [order for agent in scripted.agents.values() for order in agent.volume_orders]
    return [order for order in given if isinstance(order, MoveSnapshotsOrder)]


def spec(result: Result) -> Any:
    return json.loads(result.stdout)["spec"]


async def test_a_snapshot_goes_to_another_host_while_its_volume_is_used(
    run: Run, scripted: ScriptedCloud
) -> None:
    await run("server create web --host host-1")
    await run("volume create data --size 64 --host host-1")
    await run("volume attach data web")
    await run("snapshot create then --volume data")
    ticket = json.loads((await run("snapshot export then --json")).stdout)
    moved = spec(await run("snapshot move then --to host-3 --bandwidth 50M --json"))
    assert moved["hosts"] == [H3]
    (order,) = orders(scripted)
    assert (order.coordinator, order.source.host, order.snapshots) == (H3, H1, ("then",))
    assert order.bytes_per_second == 50 << 20
    assert json.loads((await run("volume show data --json")).stdout)["server"] == "web"
    (export,) = json.loads((await run("snapshot show then --json")).stdout)["exports"]
    address = scripted.agents[H3]
    assert (export["id"], address.host) == (ticket["export"]["id"], H3) and ":10900/then" in export["uri"]
    assert "host-3" in (await run("snapshot list")).stdout
    assert spec(await run("snapshot move then --json"))["hosts"] == [H1], "back to its volume, if left open"
    await run("volume detach data")
    await run("snapshot move then --to host-2")
    refused = json.loads((await run("volume revert data then --yes --json", 2)).stdout)["error"]
    assert refused["remedy"] == "nahtlos snapshot move then --to host-1 first"
    await run("snapshot move then --to host-1")
    await run("volume revert data then --yes")
    scripted.agents[H2].fail_volume_tasks = 1
    assert spec(await run("snapshot move then --to host-2 --json"))["hosts"] == [H2], "at the second attempt"


async def test_a_snapshot_on_its_way_is_neither_cloned_nor_deleted_and_can_be_called_back(
    run: Run, scripted: ScriptedCloud
) -> None:
    await run("volume create data --size 64 --host host-1")
    await run("snapshot create then --volume data")
    agent = scripted.agents[H2]
    agent.hold_volume_tasks = True
    await run("snapshot move then --to host-2 --no-wait")
    await scripted.until(lambda: _begun(agent))
    for line in ("snapshot clone then copy", "snapshot delete then", "snapshot move then --to host-3"):
        error = json.loads((await run(f"{line} --json", 2)).stdout)["error"]
        assert error["remedy"].startswith("wait until"), (line, error)
    await run("volume set-speed data 5M")
    (order,) = orders(scripted)
    await scripted.until(lambda: _told(agent, (order.id, 5 << 20)))
    await run("volume cancel data --no-wait")
    agent.end_volume_task(order.id, OperationState.UNDONE)
    await scripted.until(lambda: _idle(scripted))
    assert spec(await run("snapshot show then --json"))["hosts"] == [H1]


async def _begun(agent: ScriptedAgent) -> bool:
    return bool(agent.volume_orders)


async def _told(agent: ScriptedAgent, speed: tuple[str, int]) -> bool:
    return speed in agent.speeds


async def _idle(scripted: ScriptedCloud) -> bool:
    return not await scripted.cloud.volumes.tasks()


async def test_which_snapshots_stay_where_they_are(run: Run, scripted: ScriptedCloud) -> None:
    await run("volume create data --size 64 --replicas 2 --host host-1")
    await run("snapshot create then --volume data")
    at, other = spec(await run("snapshot show then --json"))["hosts"]
    third = next(host for host in (H1, H2, H3) if host not in (at, other))
    await run("snapshot clone then copy")
    clone = spec(await run("volume show copy --json"))["host"]
    free = next(host for host in (at, other) if host != clone)
    await run("snapshot create of-copy --volume copy")
    refused = {
        "snapshot move then": "copy",
        f"snapshot move then --copy {third}": "copy",
        f"snapshot move then --copy {free} --to {clone}": "to",
        f"snapshot move then --copy {free} --to edge-1": "to",
        f"snapshot move then --copy {free} --to nowhere": "to",
        f"snapshot move then --copy {clone} --to {third}": "snapshot",
        "snapshot move of-copy": "snapshot",
        "snapshot move no": "snapshot",
    }
    for line, field in refused.items():
        error = json.loads((await run(f"{line} --json", 2)).stdout)["error"]
        assert error["field"] == field and error["remedy"], (line, error)
    moved = spec(await run(f"snapshot move then --copy {free} --json"))
    assert set(moved["hosts"]) == {clone, third}, "where nothing rests on it"


async def test_what_agents_of_an_older_release_would_not_understand_is_refused(
    run: Run, scripted: ScriptedCloud
) -> None:
    await run("host cordon host-3")
    await run("volume create data --size 64 --replicas 2 --host host-1")
    await run("server create web --host host-1")
    await run("volume attach data web")
    await run("snapshot create then --volume data")
    await run("host activate host-3")
    await scripted.hang_up()
    for host, agent in scripted.agents.items():
        agent.capabilities = ("move",)
        scripted.dial_in(host)
    await scripted.until(lambda: _older(scripted))
    refused = {
        "volume rebuild data --copy host-2": ("volume", "nahtlos server stop web"),
        "volume scrub data --repair": ("volume", "nahtlos server stop web"),
        "snapshot move then --copy host-2 --to host-3": ("snapshot", "upgrade them first"),
        "server create other --data-places 3": ("data_places", "upgrade them first"),
    }
    for line, (field, remedy) in refused.items():
        error = json.loads((await run(f"{line} --json", 2)).stdout)["error"]
        assert error["field"] == field and remedy in error["remedy"], (line, error)
    assert await _idle(scripted), "nothing was half done"
    await run("volume detach data")
    await run("volume rebuild data --copy host-2")


async def _older(scripted: ScriptedCloud) -> bool:
    hosts = [HostId(f"host-{number}") for number in (1, 2, 3)]
    return await scripted.converged() and set(
        scripted.orchestrator.agents.lacking("rebuild-in-use", hosts)
    ) == set(hosts)
