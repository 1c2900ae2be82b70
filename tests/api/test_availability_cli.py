"""What operators say about hosts that fail, from the command line to the store: the real API over a real
orchestrator, with scripted agents."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from click.testing import Result
from scripted_cloud import ScriptedCloud

Run = Callable[..., Awaitable[Result]]


async def told(run: Run, line: str) -> Any:
    return json.loads((await run(f"--json {line}")).stdout)


async def refused(run: Run, line: str, code: int = 2) -> Any:
    return json.loads((await run(f"--json {line}", code)).stdout)["error"]


def of(view: Any, host: str) -> Any:
    return next(each for each in view["hosts"] if each["host"] == host)


async def test_how_long_a_lease_lasts_is_shown_and_changed(run: Run) -> None:
    view = await told(run, "host leases")
    assert (view["lease_seconds"], view["lost_seconds"]) == (20.0, 10.0)
    assert {each["state"] for each in view["hosts"]} == {"up"}
    view = await told(run, "host leases --lease 12 --lost 6")
    assert (view["lease_seconds"], view["lost_seconds"]) == (12.0, 6.0)
    error = await refused(run, "host leases --lease 1")
    assert error["field"] == "lease_seconds" and error["remedy"]
    error = await refused(run, "host leases --lost 1")
    assert error["field"] == "lost_seconds" and error["remedy"]
    assert (await told(run, "host leases"))["lease_seconds"] == 12.0


async def test_how_a_host_is_switched_off_is_given_and_taken_back(run: Run, scripted: ScriptedCloud) -> None:
    view = await told(run, "host power host-1 -- /usr/local/bin/power-off --port 7")
    assert [of(view, host)["power"] for host in ("host-1", "host-2")] == [True, False]
    assert "power-off" not in (await run("host leases")).stdout, "it may hold a secret"
    error = await refused(run, "host power host-1 -- power-off")
    assert error["field"] == "command" and "/path/of/program" in error["remedy"]
    assert (await refused(run, "host power host-9 -- /bin/true"))["field"] == "host"
    assert of(await told(run, "host leases"), "host-1")["power"]
    assert not of(await told(run, "host power host-1"), "host-1")["power"]


async def test_nobody_vouches_for_a_host_that_is_connected(run: Run, scripted: ScriptedCloud) -> None:
    error = await refused(run, "host fence host-1")
    assert error["field"] == "host" and "host drain host-1" in error["remedy"]
    assert (await refused(run, "host fence host-9"))["field"] == "host"
    await scripted.hang_up()

    async def gone() -> bool:
        return not any(host.connected for host in await scripted.cloud.hosts())

    await scripted.until(gone)
    await run("host fence host-1")
    events = await scripted.cloud.events(0, 1000)
    assert [e.subject for e in events if e.kind == "host.fence"] == ["host-1"]
