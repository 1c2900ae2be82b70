"""Volumes from the command line to agents' configurations and orders: the real API over a real orchestrator
and store, with scripted agents that carry out what they are ordered."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from click.testing import Result
from scripted_cloud import ScriptedCloud

from nahtlos.model.config import HostConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.storage import DiskLimits, StorageBackend
from nahtlos.ops.cli.volume_amounts import destination, duration, limits, mebibytes, octets
from nahtlos.wire.volumes import (
    BackupOrder,
    DeleteBackupOrder,
    RelocateOrder,
    RestoreOrder,
    RevertOrder,
    SnapshotOrder,
)

H1, H2, H3 = HostId("host-1"), HostId("host-2"), HostId("host-3")
Run = Callable[..., Awaitable[Result]]


def told(scripted: ScriptedCloud, host: HostId) -> HostConfig:
    config = scripted.agents[host].config
    assert config is not None
    return config


def orders(scripted: ScriptedCloud, kind: type[Any]) -> list[Any]:
    given = [order for agent in scripted.agents.values() for order in agent.volume_orders]
    return [order for order in given if isinstance(order, kind)]


def spec(result: Result) -> Any:
    return json.loads(result.stdout)["spec"]


async def test_a_volume_is_made_attached_enlarged_detached_and_deleted(
    run: Run, scripted: ScriptedCloud
) -> None:
    await run("server create web --host host-1")
    made = spec(await run("volume create data --size 1G --replicas 2 --server web --limit iops=500 --json"))
    assert made["host"] == H1, "near its server"
    (other,) = (replica["host"] for replica in made["replicas"])
    await run("volume attach data web")
    (server,) = told(scripted, H1).servers
    (attached,) = server.data_volumes
    assert attached.volume == "data" and attached.limits.iops == 500
    assert [copy.host for copy in attached.copies] == [H1, other], "all copies are reached"
    assert attached.export == "data.e2", "an attachment is by a new epoch"
    assert all(any(v.id == "data" for v in told(scripted, h).volumes) for h in (H1, HostId(other)))
    await run("volume set data --size 2G --limit iops=none --limit bytes=10M")
    (attached,) = told(scripted, H1).servers[0].data_volumes
    assert (attached.size_mib, attached.limits) == (2048, DiskLimits(bytes=10 << 20))
    await run("volume detach data")
    assert not told(scripted, H1).servers[0].data_volumes
    await run("volume delete data --yes")
    assert all(all(v.id != "data" for v in told(scripted, h).volumes) for h in (H1, H2, H3))


async def test_a_volume_goes_elsewhere_and_its_server_reaches_it_there(
    run: Run, scripted: ScriptedCloud
) -> None:
    await run("server create web --host host-1")
    await run("volume create data --size 64 --host host-1")
    await run("volume attach data web")
    moved = spec(await run("volume relocate data --to host-3 --bandwidth 50M --json"))
    assert (moved["host"], moved["epoch"]) == (H3, 3)
    (order,) = orders(scripted, RelocateOrder)
    assert (order.coordinator, order.target.host, order.bytes_per_second) == (H1, H3, 50 << 20)
    assert order.client is not None and order.client.server == "web"
    assert (order.source.export, order.target.export) == ("data.e2", "data.e3")
    (attached,) = told(scripted, H1).servers[0].data_volumes
    there = next(host for host in told(scripted, H1).hosts if host.id == H3)
    assert (attached.export, attached.address) == ("data.e3", there.address)
    assert not told(scripted, H1).pinned_volumes, "recorded, so nobody is told to leave it alone any more"
    assert [v.id for v in told(scripted, H3).volumes if v.id == "data"] == ["data"]


async def test_a_relocation_can_be_cancelled(run: Run, scripted: ScriptedCloud) -> None:
    scripted.agents[H1].hold_volume_tasks = True
    await run("volume create data --size 64 --host host-1")
    await run("volume relocate data --to host-2 --no-wait")
    await scripted.until(lambda: _begun(scripted, H1))
    shown = json.loads((await run("volume tasks --json")).stdout)
    assert shown[0]["progress"] == 0.5 and shown[0]["bytes_per_second"] > 0 and shown[0]["seconds_left"] > 0
    assert "50%" in (await run("volume list")).stdout
    refused = await run("volume delete data --yes", 2)
    assert "in use by" in refused.stderr
    after = json.loads((await run("volume cancel data --json")).stdout)
    assert after["spec"]["host"] == H1 and after["tasks"] == []
    assert json.loads((await run("volume tasks --json")).stdout) == []


async def _begun(scripted: ScriptedCloud, host: HostId) -> bool:
    return bool(scripted.agents[host].volume_orders)


async def test_what_fails_is_tried_again_and_told(run: Run, scripted: ScriptedCloud) -> None:
    scripted.agents[H1].fail_volume_tasks = 1
    await run("volume create data --size 64 --host host-1")
    moved = spec(await run("volume relocate data --to host-2 --json"))
    assert moved["host"] == H2
    assert len(orders(scripted, RelocateOrder)) == 2
    events = [event.text for event in await scripted.cloud.events(0, 500)]
    assert any("undone: the pool was full" in text for text in events)


async def test_snapshots_of_one_moment_clones_and_exports(run: Run, scripted: ScriptedCloud) -> None:
    for name in ("a", "b"):
        await run(f"volume create {name} --size 64 --host host-1")
    await run("snapshot create nightly --volume a --volume b")
    (order,) = orders(scripted, SnapshotOrder)
    assert order.group == "nightly" and [s.hosts for s in order.snapshots] == [(H1,), (H1,)]
    await scripted.until(lambda: _kept(scripted, ["nightly-a", "nightly-b"]))
    await run("snapshot clone nightly-a copy")
    assert next(v for v in told(scripted, H1).volumes if v.id == "copy").snapshot == "nightly-a"
    ticket = json.loads((await run("snapshot export nightly-a --for 15m --json")).stdout)
    assert ticket["export"]["uri"].startswith(f"nbds://{ticket['export']['id']}@10.99.0.")
    identity, _, key = ticket["credential"].partition(":")
    await scripted.until(lambda: _exported(scripted, identity, key))
    assert key not in (await run("snapshot show nightly-a")).stdout, "the key is shown once"
    await run("snapshot unexport nightly-a")
    refused = await run("snapshot delete nightly-a", 2)
    assert "volume copy" in refused.stderr
    await run("volume delete copy --yes")
    await run("snapshot delete nightly-a")
    assert await _kept(scripted, ["nightly-b"])


async def _kept(scripted: ScriptedCloud, names: list[str]) -> bool:
    return [snapshot.id for snapshot in told(scripted, H1).snapshots] == names


async def _exported(scripted: ScriptedCloud, identity: str, key: str) -> bool:
    return any(e.id == identity and e.key_hex == key for e in told(scripted, H1).snapshot_exports)


async def test_a_volume_becomes_again_what_it_was(run: Run, scripted: ScriptedCloud) -> None:
    await run("server create web --host host-1")
    await run("volume create data --size 64 --replicas 2 --host host-1")
    await run("snapshot create before --volume data")
    await run("volume attach data web")
    refused = await run("volume revert data before --yes", 2)
    assert "attached to web" in refused.stderr
    await run("volume detach data")
    await run("volume revert data before --yes")
    assert [order.snapshot for order in orders(scripted, RevertOrder)] == ["before"]
    shown = json.loads((await run("volume show data --json")).stdout)
    assert {copy["state"] for copy in shown["copies"]} == {"current"}, "the other copy was made like it"


async def test_a_volume_says_why_its_server_stands_still_and_what_to_do(
    run: Run, scripted: ScriptedCloud
) -> None:
    await run("server create web --host host-1")
    await run("volume create data --size 64 --host host-1 --server web")
    await run("volume attach data web")
    assert json.loads((await run("volume show data --json")).stdout)["trouble"] == ""
    agent = scripted.agents[H1]
    agent.disk_problems = ("data of web: the pool under it is full (free space in its pool)",)
    agent.changed()

    async def told_so() -> bool:
        view = await scripted.cloud.volumes.volume(VolumeId("data"))
        return view.trouble == agent.disk_problems[0]

    await scripted.until(told_so)
    shown = (await run("volume show data")).stdout
    assert "in trouble" in shown and "free space in its pool" in shown
    assert json.loads((await run("volume show web-disk --json")).stdout)["trouble"] == ""


async def test_backups_rest_on_each_other_and_become_volumes(run: Run, scripted: ScriptedCloud) -> None:
    await run("backup target set vault /srv/vault")
    await run("volume create data --size 64 --host host-2")
    refused = await run("backup create one --volume data --to vault --incremental", 2)
    assert "has no backup yet" in refused.stderr
    await run("backup create one --volume data --to vault")
    await run("backup create two --volume data --to vault --incremental")
    first, second = orders(scripted, BackupOrder)
    assert (first.backup.target, second.base.id, second.backup.host) == ("/srv/vault", "one", H2)
    assert "two" in (await run("backup delete one", 2)).stderr
    await run("backup restore two again")
    (order,) = orders(scripted, RestoreOrder)
    assert [b.id for b in order.chain] == ["one", "two"] and order.coordinator == H2
    assert (await run("volume show again")).stdout
    await run("backup delete two")
    (deleted,) = orders(scripted, DeleteBackupOrder)
    assert (deleted.backup.id, deleted.coordinator) == ("two", H2), "by who has its folder"
    assert [v["spec"]["id"] for v in json.loads((await run("backup list --json")).stdout)] == ["one"]


async def test_a_host_that_is_drained_gives_its_volumes_away(run: Run, scripted: ScriptedCloud) -> None:
    await run("server create web --host host-1")
    await run("volume create data --size 64 --replicas 2 --host host-1")
    await run("volume attach data web")
    await run("host drain host-1")
    await scripted.until(lambda: _keeps_nothing(scripted, H1))
    shown = json.loads((await run("volume show data --json")).stdout)
    hosts = [copy["host"] for copy in shown["copies"]]
    assert sorted(hosts) == [H2, H3], "never two copies on one host"
    kept = json.loads((await run("host show host-1 --json")).stdout)["kept"]
    assert kept["volumes"] == [] and kept["bytes_left"] == 0


async def _keeps_nothing(scripted: ScriptedCloud, host: HostId) -> bool:
    return not told(scripted, host).volumes and not told(scripted, host).servers


REFUSED = (
    ("volume create Data --size 1G", "name"),
    ("volume create data", "size_mib"),
    ("volume create data --size 1T --replicas 4", "copies"),
    ("volume create data --size 1G --image no", "image"),
    ("volume create data --size 1G --snapshot no", "snapshot"),
    ("volume create data --size 1G --backend ceph", "backend"),
    ("volume create data --size 1G --encrypted", "encrypted"),
    ("volume create data --size 1G --host edge-1", "host"),
    ("volume create data --size 1G --limit iops=5 --limit iops-read=5", "limits.iops"),
    ("volume create data --size 1G --limit iops-burst=5", "limits.iops_burst"),
    ("volume create disk --size 1G", "name"),
    ("volume set disk --size 1M", "size_mib"),
    ("volume set disk --replicas 9", "copies"),
    ("volume attach disk web", "volume"),
    ("volume attach web-disk other", "volume"),
    ("volume detach web-disk", "volume"),
    ("volume attach no web", "volume"),
    ("volume relocate disk --to host-1", "to"),
    ("volume relocate disk --to edge-1", "to"),
    ("volume relocate disk --copy host-3", "copy"),
    ("volume cancel disk", "volume"),
    ("volume delete disk --yes", "volume"),
    ("volume delete web-disk --yes", "volume"),
    ("volume revert disk no --yes", "snapshot"),
    ("snapshot create s --volume disk --volume disk", "volumes"),
    ("snapshot create s --volume no", "volumes"),
    ("snapshot delete no", "snapshot"),
    ("snapshot export no", "snapshot"),
    ("backup create b --volume disk --to nowhere", "target"),
    ("backup create b --volume disk --to /a/../b", "target"),
    ("backup create b --volume disk --to nbd://10.0.0.1/b", "target"),
    ("backup target set vault nbd://10.0.0.1/b", "target"),
    ("backup restore no x", "backup"),
    ("backup target delete no", "target"),
    ("image delete no", "image"),
    ("image import guest-1 /x --format raw", "name"),
    ("volume settings --parallel 0", "parallel"),
    ("volume settings --elsewhere 1s", "elsewhere_seconds"),
    ("server create new --volume disk", "volumes"),
)


async def test_what_cannot_be_granted_names_field_and_remedy(run: Run, scripted: ScriptedCloud) -> None:
    await run("server create web --host host-1")
    await run("server create other --host host-2")
    await run("volume create disk --size 64 --host host-1")
    await run("volume attach disk web")
    for line, field in REFUSED:
        error = json.loads((await run(f"{line} --json", 2)).stdout)["error"]
        assert error["field"] == field, (line, error)
        assert error["remedy"], (line, error)
    assert len(json.loads((await run("volume list --json")).stdout)) == 3, "nothing was half done"


SHOWN = (
    ("volume list", "blank"),
    ("volume show data", "500"),
    ("volume tasks", "nothing is under way"),
    ("volume settings", "operations at once"),
    ("snapshot list", "s1"),
    ("snapshot show s1", "host-1"),
    ("image list", "guest-1"),
    ("backup list", "b1"),
    ("backup show b1", "/srv/b"),
    ("backup target list", "vault"),
    ("host show host-1", "volumes"),
)


async def test_every_noun_is_shown(run: Run) -> None:
    await run("volume create data --size 64 --host host-1 --limit iops=500")
    await run("snapshot create s1 --volume data")
    await run("backup target set vault nbds://10.99.0.9:10809/vault")
    await run("backup target set open nbd://10.99.0.9/open --plain")
    await run("backup create b1 --volume data --to /srv/b")
    for line, text in SHOWN:
        assert text in (await run(line)).stdout, line
        json.loads((await run(f"{line} --json")).stdout)


async def test_settings_are_kept(run: Run, scripted: ScriptedCloud) -> None:
    await run(
        "volume settings --parallel 8 --rebuild 100M --elsewhere 20m --ceph-pool rbd --tenants iops=9000"
    )
    shown = json.loads((await run("volume settings --json")).stdout)
    assert (shown["parallel"], shown["elsewhere_seconds"], shown["ceph"]["pool"]) == (8, 1200.0, "rbd")
    await scripted.until(lambda: _has_budget(scripted))
    made = spec(await run("volume create big --size 1G --backend ceph --json"))
    assert made["backend"] == StorageBackend.CEPH
    await run("volume settings --ceph-pool none")
    assert json.loads((await run("volume settings --json")).stdout)["ceph"] is None


IN_CEPH = "volume create x --size 64 --backend ceph"
REFUSED_IN_CEPH = (
    (f"{IN_CEPH} --replicas 2", "copies", "ceph osd pool set rbd size 2"),
    (f"{IN_CEPH} --format qcow2", "format", "leave"),
    ("volume set big --replicas 3", "copies", "ceph osd pool set rbd size 3"),
    ("volume create x --snapshot here --backend ceph", "backend", "clone it"),
    ("volume create x --snapshot there --format qcow2", "format", "leave"),
    ("snapshot clone there x --replicas 2", "copies", "pool"),
    ("volume relocate big --to ceph", "to", "name a host"),
    ("volume rebuild big --copy host-1", "volume", "nothing"),
    ("volume scrub big --repair", "repair", "leave"),
    ("snapshot create both --volume big --volume small", "volumes", "two groups"),
)


async def test_what_is_in_ceph_is_asked_for_by_the_same_verbs(run: Run, scripted: ScriptedCloud) -> None:
    await run("volume settings --ceph-pool rbd")
    await run("volume create small --size 64")
    await run("volume create big --size 64 --backend ceph")
    await run("snapshot create here --volume small")
    await run("snapshot create there --volume big")
    for line, field, remedy in REFUSED_IN_CEPH:
        error = json.loads((await run(f"{line} --json", 2)).stdout)["error"]
        assert error["field"] == field and remedy in error["remedy"], (line, error)
    clone = spec(await run("snapshot clone there probe --json"))
    assert clone["backend"] == StorageBackend.CEPH, "a clone is where its snapshot is"
    await run("backup create one --volume big --to /srv/b")
    await run("backup restore one again")
    await run("backup restore one home --backend embedded --json")
    await run("backup create two --volume small --to /srv/b")
    await run("backup restore two moved --backend ceph")
    restored = [(order.volume.id, order.volume.backend) for order in orders(scripted, RestoreOrder)]
    assert restored == [("again", "ceph"), ("home", "embedded"), ("moved", "ceph")]
    await run("volume settings --ceph-pool none")
    error = json.loads((await run("backup restore two late --backend ceph --json", 2)).stdout)["error"]
    assert error["field"] == "backend" and "--ceph-pool" in error["remedy"]


async def _has_budget(scripted: ScriptedCloud) -> bool:
    return told(scripted, H1).disk_budget.tenants.iops == 9000


def test_amounts_as_people_type_them() -> None:
    assert (mebibytes("10G"), mebibytes("512"), mebibytes("1.5G")) == (10240, 512, 1536)
    assert (octets("50M", "x"), octets("none", "x")) == (50 << 20, 0)
    assert (duration("90", "x"), duration("15m", "x"), duration("2d", "x")) == (90, 900, 172800)
    assert limits(["iops=1000", "bytes-write=1M"]) == DiskLimits(iops=1000, bytes_write=1 << 20)
    assert limits(["none"], DiskLimits(iops=5)) == DiskLimits()
    assert destination("ceph") == (None, StorageBackend.CEPH)
    assert destination("host-1") == (HostId("host-1"), StorageBackend.EMBEDDED)
    for wrong in (lambda: mebibytes("1k"), lambda: octets("x", "x"), lambda: duration("1y", "x")):
        with pytest.raises(Refused) as refused:
            wrong()
        assert refused.value.remedy
    assert VolumeId("x")


async def test_places_for_data_volumes_are_decided_when_a_server_is_created(run: Run) -> None:
    refused = await run("server create web --host host-1 --data-places 9", 2)
    assert "data_places" in refused.stderr
    await run("server create web --host host-1 --data-places 3 --no-wait")
    for name in ("one", "two", "three", "four"):
        await run(f"volume create {name} --size 4 --host host-1")
    for name in ("one", "two", "three"):
        await run(f"volume attach {name} web")
    refused = await run("volume attach four web", 2)
    assert "--data-places" in refused.stderr
