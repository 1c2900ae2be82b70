"""Server groups and pins from the command line to where servers are placed: the real API over a real
orchestrator and store, with scripted agents."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from click.testing import Result
from scripted_cloud import ScriptedCloud

from nahtlos.model.ids import HostId, ServerId
from nahtlos.runtime.controllers.cloud import ServerChange

Run = Callable[..., Awaitable[Result]]


async def told(run: Run, line: str) -> Any:
    return json.loads((await run(f"{line} --json")).stdout)


async def refused(run: Run, line: str) -> Any:
    return json.loads((await run(f"{line} --json", 2)).stdout)["error"]


async def test_a_group_from_its_creation_to_its_end(run: Run, scripted: ScriptedCloud) -> None:
    made = await told(run, "server-group create web --policy anti-affinity")
    assert (made["id"], made["policy"], made["members"]) == ("web", "anti-affinity", {})
    for name in ("a", "b", "c"):
        view = await told(run, f"server create {name} --group web")
        assert view["group"] == "web"
    shown = await told(run, "server-group show web")
    assert sorted(shown["members"].values()) == ["host-1", "host-2", "host-3"]
    assert shown["violation"] == ""
    error = await refused(run, "server create d --group web")
    assert error["field"] == "group"
    assert "web (anti-affinity)" in error["message"] and "add or activate a host" in error["remedy"]
    error = await refused(run, "server move a --to host-2")
    assert "of web (anti-affinity)" in error["message"]
    error = await refused(run, "server-group delete web")
    assert "a, b, c are in web" in error["message"]
    for name in ("a", "b", "c"):
        await run(f"server delete {name} -y")
    assert "deleted" in (await run("server-group delete web")).stdout
    assert await told(run, "server-group list") == []


async def test_what_is_no_group_is_refused(run: Run, scripted: ScriptedCloud) -> None:
    await run("server-group create pair --policy affinity --project other")
    error = await refused(run, "server-group create pair --policy affinity")
    assert error["field"] == "name"
    error = await refused(run, "server create a --group pear")
    assert (error["field"], error["remedy"]) == ("group", "server groups: pair")
    error = await refused(run, "server create a --group pair")
    assert "pair is a group of project other" in error["message"]
    assert "Invalid value" in (await run("server-group create x --policy apart", 2)).stderr
    assert not await scripted.cloud.servers()


async def test_soft_groups_show_how_they_are_not_as_asked(run: Run, scripted: ScriptedCloud) -> None:
    await run("server-group create near --policy soft-affinity")
    for number in (1, 2):
        await run(f"server create vm{number} --group near --host host-{number}")
    assert "its members are on host-1, host-2" in (await run("server-group show near")).stdout
    assert "no: its members" in " ".join((await run("server-group list")).stdout.split())


async def test_a_server_is_pinned_to_where_it_is_and_let_go(run: Run, scripted: ScriptedCloud) -> None:
    view = await told(run, "server create db --pin host-2")
    assert (view["host"], view["pin"]) == ("host-2", "host-2")
    error = await refused(run, "server move db")
    assert "db is pinned to host-2" in error["message"] and "--unpin" in error["remedy"]
    assert (await told(run, "server set db --unpin"))["server"]["pin"] is None
    error = await refused(run, "server set db --pin host-3")
    assert (error["field"], error["remedy"]) == ("pin", "move it first: nahtlos server move db --to host-3")
    error = await refused(run, "server create x --host host-1 --pin host-2")
    assert error["field"] == "pin"
    error = await refused(run, "server create x --pin edge-1")
    assert "runs no servers" in error["message"]
    error = await refused(run, "server set db --pin host-2 --unpin")
    assert error["field"] == "pin"
    changed = await scripted.cloud.change_server(ServerId("db"), ServerChange(pin=HostId("host-2")))
    assert changed.pin == "host-2"
    assert "host-2" in (await run("server show db")).stdout


async def test_a_drain_waits_for_what_rules_leave_no_place_and_says_so(
    run: Run, scripted: ScriptedCloud
) -> None:
    await run("server-group create web --policy anti-affinity")
    for name in ("a", "b", "c"):
        await run(f"server create {name} --group web")
    await run("host drain host-1 --no-wait")
    (waiting,) = await _waits(scripted)
    assert "no host is left for" in waiting.reason and waiting.remedy


async def _waits(scripted: ScriptedCloud) -> list[Any]:
    for _ in range(50):
        if found := [w for w in (await scripted.cloud.status()).waiting if w.subject in "abc"]:
            return found
        await asyncio.sleep(0.1)
    return []


async def test_the_reserve_from_its_setting_to_what_it_refuses(run: Run, scripted: ScriptedCloud) -> None:
    assert "none" in (await run("reserve")).stdout
    made = await told(run, "reserve 1")
    assert (made["hosts"], made["kept"]) == (1, True)
    for count in ("3", "99"):
        error = await refused(run, f"reserve {count}")
        assert (error["field"], error["remedy"]) == ("hosts", "give 0 to 2")
    view = await scripted.cloud.host(HostId("host-1"))
    big = view.capacity.memory_mib * 3 // 4
    await run(f"server create a --memory-mib {big} --host host-1")
    await run(f"server create b --memory-mib {big} --host host-2")
    error = await refused(run, f"server create c --memory-mib {view.capacity.memory_mib // 2}")
    assert "the reserve of 1 would be broken" in error["message"] and "reserve N" in error["remedy"]
    error = await refused(run, "host cordon host-3")
    assert "without host-3 the reserve of 1 would be broken" in error["message"]
    error = await refused(run, "reserve 2")
    assert f"needs {2 * big} MiB" in error["message"]
    assert "1 of 3 hosts may fail: kept" in " ".join((await run("host list")).stdout.split())
    plan = json.loads((await run("host drain host-3 --dry-run --json", 2)).stdout)
    assert "would be broken" in plan["reserve"]
    assert "Refused" in (await run("host drain host-3 --dry-run", 2)).stdout
    assert (await told(run, "reserve 0"))["hosts"] == 0
    free = await told(run, "host drain host-1 --dry-run")
    assert [move["server"] for move in free["moves"]] == ["a"]
    assert (await scripted.cloud.host(HostId("host-1"))).intent == "active"


async def test_how_many_moves_run_at_once_is_asked_and_set(run: Run, scripted: ScriptedCloud) -> None:
    assert (await told(run, "moves"))["at_once"] == 1
    made = await told(run, "moves --at-once 8 --per-host 3")
    assert (made["at_once"], made["per_host"], made["bytes_per_second"]) == (8, 3, 0)
    await told(run, "moves --per-host 2")
    shown = (await run("moves")).stdout
    assert "8" in shown and "2" in shown and "not divided" in shown
    for asked, field in (("--at-once 0", "at_once"), ("--per-host 65", "per_host")):
        error = await refused(run, f"moves {asked}")
        assert error["field"] == field and "give 1 to 64" in error["remedy"]
    assert (await told(run, "moves"))["per_host"] == 2
