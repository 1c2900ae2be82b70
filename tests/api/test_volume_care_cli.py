"""Volumes examined, mended, paced and written out, from the command line to agents' orders and back; and what
came of operations."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from click.testing import Result
from scripted_cloud import ScriptedCloud

from nahtlos.model.config import HostConfig
from nahtlos.model.errors import ErrorRecord
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.wire.volumes import (
    DeleteBackupOrder,
    RebuildOrder,
    RelocateOrder,
    ScrubOrder,
    SnapshotFileOrder,
)

H1, H2, H3 = HostId("host-1"), HostId("host-2"), HostId("host-3")
DATA = VolumeId("data")
Run = Callable[..., Awaitable[Result]]
CLEAN = {"copies": "2", "compared_bytes": str(64 << 20), "differences": "0", "ranges": "", "wrong": ""}
WRONG = {**CLEAN, "differences": "1", "ranges": f"0+1048576 on {H2}", "wrong": H2}
MARK = "1 ranges differ from the other copies"


def orders(scripted: ScriptedCloud, kind: type[Any]) -> list[Any]:
    given = [order for agent in scripted.agents.values() for order in agent.volume_orders]
    return [order for order in given if isinstance(order, kind)]


def told(scripted: ScriptedCloud, host: HostId) -> HostConfig:
    config = scripted.agents[host].config
    assert config is not None
    return config


def shown(result: Result) -> Any:
    return json.loads(result.stdout)


async def two_copies(run: Run, scripted: ScriptedCloud) -> None:
    await run("host cordon host-3")
    await run("volume create data --size 64 --replicas 2 --host host-1")
    await run("host activate host-3")


async def test_copies_are_compared_and_the_result_is_kept(run: Run, scripted: ScriptedCloud) -> None:
    await two_copies(run, scripted)
    scripted.agents[H1].results[ScrubOrder] = CLEAN
    ended = shown(await run("volume scrub data --bandwidth 100M --json"))
    (order,) = orders(scripted, ScrubOrder)
    assert (order.coordinator, order.volume.current, order.bytes_per_second) == (H1, (H1, H2), 100 << 20)
    assert (ended["record"]["kind"], ended["record"]["result"]) == ("scrub", CLEAN)
    assert "nothing differs" in (await run("volume show data")).stdout
    assert "64 MiB of 2 copies" in (await run("operation list --of data --kind scrub")).stdout
    assert "nothing differs" in (await run(f"operation show {ended['record']['id']}")).stdout
    events = [event.text for event in await scripted.cloud.events(0, 500)]
    assert any("all is as it should be" in text for text in events)


async def test_a_copy_that_differs_is_told_with_its_remedy_and_rebuilt(
    run: Run, scripted: ScriptedCloud
) -> None:
    await two_copies(run, scripted)
    scripted.agents[H1].results[ScrubOrder] = WRONG
    scripted.agents[H2].problems[DATA] = MARK
    found = await run("volume scrub data", 1)
    assert f"0+1048576 on {H2}" in found.stdout
    view = await run("volume show data")
    assert "in trouble" in view.stdout and "nahtlos volume rebuild data --copy host-2" in view.stdout
    rebuilt = shown(await run("volume rebuild data --json"))
    (order,) = orders(scripted, RebuildOrder)
    assert (order.source.host, order.target.host) == (H1, H2)
    assert {copy["state"] for copy in rebuilt["copies"]} == {"current"}
    assert all(not copy["problem"] for copy in rebuilt["copies"])


async def test_a_scrub_may_repair_what_it_finds(run: Run, scripted: ScriptedCloud) -> None:
    await two_copies(run, scripted)
    scripted.agents[H1].results[ScrubOrder] = WRONG
    scripted.agents[H2].problems[DATA] = MARK
    await run("volume scrub data --repair")
    assert [order.target.host for order in orders(scripted, RebuildOrder)] == [H2]
    assert shown(await run("volume show data --json"))["settled"]


async def test_a_copy_is_made_anew_under_the_server_that_has_it_open(
    run: Run, scripted: ScriptedCloud
) -> None:
    await two_copies(run, scripted)
    await run("server create web --host host-1")
    await run("volume attach data web")
    rebuilt = shown(await run("volume rebuild data --copy host-2 --json"))
    assert {copy["state"] for copy in rebuilt["copies"]} == {"current"}
    scripted.agents[H1].results[ScrubOrder] = WRONG
    await run("volume scrub data --repair")
    made = orders(scripted, RebuildOrder)
    assert [order.target.host for order in made] == [H2, H2]
    for order in made:
        assert order.client is not None
        (attachment,) = order.client.attachments
        assert not attachment.copies, "its server is led to the only current one before anything else"


async def test_a_relocation_is_made_slower_while_it_runs(run: Run, scripted: ScriptedCloud) -> None:
    agent = scripted.agents[H1]
    agent.hold_volume_tasks = True
    await run("volume create data --size 64 --host host-1")
    await run("volume relocate data --to host-2 --bandwidth 50M --no-wait")
    await scripted.until(lambda: _told_of(scripted, 50 << 20))
    await run("volume set-speed data 5M")
    await scripted.until(lambda: _told_of(scripted, 5 << 20))
    (order,) = orders(scripted, RelocateOrder)
    assert agent.speeds == [(order.id, 50 << 20), (order.id, 5 << 20)], "each once"
    agent.end_volume_task(order.id)
    await scripted.until(lambda: _none_runs(scripted))
    assert shown(await run("volume relocate data --to host-3 --json"))["spec"]["host"] == H3


async def _none_runs(scripted: ScriptedCloud) -> bool:
    return not await scripted.cloud.volumes.tasks()


async def _told_of(scripted: ScriptedCloud, speed: int) -> bool:
    return any(rate == speed for _, rate in scripted.agents[H1].speeds)


async def test_the_pace_of_rebuilds_holds_for_those_that_run(run: Run, scripted: ScriptedCloud) -> None:
    await two_copies(run, scripted)
    scripted.agents[H1].hold_volume_tasks = True
    await run("volume rebuild data --copy host-2 --no-wait")
    await scripted.until(lambda: _told_of(scripted, 0))
    refused = await run("volume set-speed data 5M", 2)
    assert "volume settings --rebuild" in refused.stderr
    await run("volume settings --rebuild 5M")
    await scripted.until(lambda: _told_of(scripted, 5 << 20))


async def test_a_snapshot_becomes_a_file(run: Run, scripted: ScriptedCloud) -> None:
    await run("volume create data --size 64 --host host-1")
    await run("snapshot create then --volume data")
    written = {"host": H1, "file": "/srv/then.qcow2", "bytes": "9", "sha256": "5eed"}
    scripted.agents[H1].results[SnapshotFileOrder] = written
    ended = shown(await run("image export --snapshot then /srv/then.qcow2 --json"))
    (order,) = orders(scripted, SnapshotFileOrder)
    assert (order.coordinator, order.snapshot, order.file, order.format) == (
        H1,
        "then",
        "/srv/then.qcow2",
        "qcow2",
    )
    assert ended["record"]["result"] == written
    there = ErrorRecord(kind="conflict", message="it is there", field="file", remedy="choose another name")
    scripted.agents[H1].refuse_volume_tasks = there
    error = shown(await run("image export --snapshot then /srv/then.qcow2 --json", 2))["error"]
    assert (error["field"], error["remedy"]) == ("file", "choose another name")
    assert len(orders(scripted, SnapshotFileOrder)) == 2, "it is not tried again"
    assert shown(await run("volume tasks --json")) == []


async def test_an_image_becomes_a_file(run: Run) -> None:
    view = shown(await run("image export guest-1 /srv/guest.raw --format raw --json"))
    assert (view["image"], view["format"], view["sha256"]) == ("guest-1", "raw", "5eed")


async def test_copies_go_to_other_failure_domains(run: Run, scripted: ScriptedCloud) -> None:
    for host, rack in ((H1, "rack-a"), (H2, "rack-a"), (H3, "rack-b")):
        view = shown(await run(f"host set {host} --domain {rack} --json"))
        assert view["domain"] == rack
    made = shown(await run("volume create data --size 64 --replicas 2 --host host-1 --json"))
    assert [copy["host"] for copy in made["copies"]] == [H1, H3]
    assert "rack-b" in (await run("host list")).stdout
    assert "rack-a" in (await run("host show host-2")).stdout
    await run("host set host-3 --domain rack-a")
    await run("host set host-2 --domain none")
    made = shown(await run("volume create more --size 64 --replicas 2 --host host-1 --json"))
    assert [copy["host"] for copy in made["copies"]] == [H1, H2]


async def test_a_backup_goes_with_its_files_or_without(run: Run, scripted: ScriptedCloud) -> None:
    await run("volume create data --size 64 --host host-2")
    for name in ("one", "two"):
        await run(f"backup create {name} --volume data --to /srv/{name}")
    scripted.agents[H2].hold_volume_tasks = True
    await run("backup delete one --no-wait")
    await scripted.until(lambda: _any(scripted, DeleteBackupOrder))
    assert "being deleted" in (await run("backup list")).stdout
    assert "being deleted" in (await run("backup restore one again", 2)).stderr
    assert "being deleted" in (await run("backup delete one", 2)).stderr
    scripted.agents[H2].hold_volume_tasks = False
    scripted.agents[H2].end_volume_task(orders(scripted, DeleteBackupOrder)[0].id)
    await scripted.until(lambda: _gone(run, "one"))
    scripted.agents[H2].refuse_volume_tasks = ErrorRecord(
        kind="conflict", message="/srv/two holds another backup", remedy="--keep-files"
    )
    refused = await run("backup delete two", 2)
    assert "another backup" in refused.stderr and "--keep-files" in refused.stderr
    kept = shown(await run("backup delete two --keep-files --json"))
    assert kept["files_kept"] and shown(await run("backup list --json")) == []


async def _any(scripted: ScriptedCloud, kind: type[Any]) -> bool:
    return bool(orders(scripted, kind))


async def _gone(run: Run, backup: str) -> bool:
    return all(view["spec"]["id"] != backup for view in shown(await run("backup list --json")))


async def test_operations_of_all_kinds_are_listed(run: Run, scripted: ScriptedCloud) -> None:
    await run("server create web --host host-1")
    await run("server move web --to host-2")
    for name in ("a", "b"):
        await run(f"volume create {name} --size 64 --host host-1")
    await run("snapshot create both --volume a --volume b")
    kinds = {view["record"]["kind"] for view in shown(await run("operation list --json"))}
    assert {"move", "snapshot", "verify"} <= kinds
    for of in ("a", "b"):
        (only,) = shown(await run(f"operation list --of {of} --json"))
        assert only["record"]["subject"] == "a, b" and only["ended_at"] >= only["begun_at"]
    assert len(shown(await run("operation list --limit 1 --json"))) == 1
    assert OperationState.DONE in (await run("operation list --of web")).stdout


REFUSED = (
    ("volume scrub no", "volume"),
    ("volume scrub disk --repair", "repair"),
    ("volume rebuild disk", "copy"),
    ("volume rebuild disk --copy host-1", "copy"),
    ("volume rebuild disk --copy host-3", "copy"),
    ("volume set-speed disk 5M", "volume"),
    ("volume set-speed disk fast", "bandwidth"),
    ("volume revert web-disk s2 --yes", "volume"),
    ("volume revert disk s1 --yes", "volume"),
    ("image export no /srv/x", "image"),
    ("image export guest-1 x", "file"),
    ("image export guest-1", "file"),
    ("image export guest-1 /srv/x --host host-1", "host"),
    ("image export --snapshot no /srv/x", "snapshot"),
    ("image export --snapshot s1 /srv/../x", "file"),
    ("image export --snapshot s1 /srv/x --host host-3", "host"),
    ("host set host-1", "domain"),
    ("host set host-1 --domain Rack_1", "domain"),
    ("host set no --domain rack", "host"),
    ("backup delete no", "backup"),
    ("operation show no", "operation"),
    ("operation list --limit 100000", "limit"),
)


async def test_what_cannot_be_granted_names_field_and_remedy(run: Run, scripted: ScriptedCloud) -> None:
    await run("server create web --host host-1")
    await run("volume create disk --size 64 --host host-1")
    await run("volume attach disk web")
    await run("snapshot create s1 --volume disk")
    await run("snapshot create s2 --volume web-disk")
    for line, field in REFUSED:
        error = shown(await run(f"{line} --json", 2))["error"]
        assert error["field"] == field, (line, error)
        assert error["remedy"], (line, error)
    stop = (await run("volume revert disk s1 --yes", 2)).stderr
    assert "nahtlos volume revert disk s1 --stop" in stop
    assert "nahtlos snapshot clone s2" in (await run("volume revert web-disk s2 --yes", 2)).stderr
    assert shown(await run("volume tasks --json")) == [], "nothing was half done"


async def test_who_has_a_volume_is_shown(run: Run, scripted: ScriptedCloud) -> None:
    await run("server create web --host host-1")
    await run("volume create data --size 64 --host host-2")
    await run("volume attach data web")
    assert "web on host-1" in (await run("volume show data")).stdout
    view = shown(await run("volume show data --json"))
    assert (view["server_host"], view["copies"][0]["clients"]) == (H1, -1)
    assert [v.id for v in told(scripted, H2).volumes] == ["data"]


async def test_what_cannot_be_made_is_given_up_at_once_and_told(run: Run, scripted: ScriptedCloud) -> None:
    """A place that is none stays none. What may come right is tried again."""
    await run("volume create data --size 64 --host host-1")
    agent = scripted.agents[H1]
    agent.refuse_volume_tasks = ErrorRecord(
        kind="refused", message="the export is too small", field="target", remedy="make it larger"
    )
    refused = shown(await run("backup create b1 --volume data --to nbds://10.0.0.1/small --json", 2))["error"]
    assert "given up: the export is too small" in refused["message"]
    assert (refused["field"], refused["remedy"]) == ("target", "make it larger")
    agent.fail_volume_tasks = 1
    await run("backup create b1 --volume data --to /srv/b")
    agent.refuse_volume_tasks = ErrorRecord(
        kind="refused", message="its data are damaged", field="chain", remedy="restore another one"
    )
    refused = shown(await run("backup restore b1 again --json", 2))["error"]
    assert "its data are damaged" in refused["message"] and refused["remedy"] == "restore another one"
    agent.hold_volume_tasks = True
    await run("backup restore b1 again --no-wait")
    assert shown(await run("volume tasks --json"))[0]["makes"] == ["again"]
