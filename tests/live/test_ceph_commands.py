"""Volumes in Ceph end to end, by the command line: a real guest writes to its disk all the time while that
goes into a pool, is snapshotted, backed up, moved with its server, and comes back."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_command_line import CommandLine

from nahtlos.lab.ceph import POOL, USER, CephCluster, missing_programs
from nahtlos.lab.datacentre import unique_name
from nahtlos.lab.outside import GuestDisk, Outside
from nahtlos.lab.topology import CONTROL, describe, namespace_of

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(bool(missing_programs()), reason="Ceph is not installed"),
    pytest.mark.timeout(300),
]
UP_SECONDS = 90.0
WRITES_PER_SECOND = 50
SOON_SECONDS = 20.0


@pytest.fixture
def nahtlos(tmp_path: Path) -> Iterator[CommandLine]:
    """A lab of two hosts, and beside its orchestrator a cluster."""
    line, conf = CommandLine(unique_name("cv")), tmp_path / "ceph.conf"
    try:
        line.json("lab", "up", "--hosts", "2", "--ceph-conf", str(conf))
        at = describe(line.lab, 2).node(CONTROL).address
        with CephCluster(namespace_of(line.lab, CONTROL), address=at) as cluster:
            conf.symlink_to(cluster.configuration)
            yield line
    finally:
        assert line.run("lab", "down").returncode == 0


def test_volumes_live_in_a_pool_under_a_guest_that_writes(nahtlos: CommandLine, tmp_path: Path) -> None:
    assert nahtlos.refused("volume", "create", "data", "--size", "32M", "--backend", "ceph")["field"]
    pool = ("--ceph-pool", POOL, "--ceph-user", USER, "--ceph-conf", str(tmp_path / "ceph.conf"))
    nahtlos.json("volume", "settings", *pool)
    web = nahtlos.json("server", "create", "web", "--memory-mib", "128", "--host", "host-1")
    in_ceph = ("volume", "create", "data", "--size", "32M", "--backend", "ceph")
    refused = nahtlos.refused(*in_ceph, "--replicas", "2")
    assert refused["field"] == "copies" and f"pool set {POOL} size 2" in refused["remedy"]
    assert nahtlos.refused(*in_ceph, "--format", "qcow2")["field"] == "format"
    made = nahtlos.json(*in_ceph)
    assert (made["spec"]["backend"], made["settled"]) == ("ceph", True)

    outside = Outside(f"nl-{nahtlos.lab}-client")
    asyncio.run(outside.until_up(web["ip"], timeout=UP_SECONDS))
    asyncio.run(outside.set_load(web["ip"], disk_per_s=WRITES_PER_SECOND))

    def disk() -> GuestDisk:
        return asyncio.run(outside.status(web["ip"])).disk

    def writes_on() -> None:
        before = disk().acknowledged
        until("the guest writes", lambda: disk().acknowledged > before)
        assert disk().errors == 0

    nahtlos.json("volume", "attach", "data", "web")
    moved = nahtlos.json("volume", "relocate", "web-disk", "--to", "ceph")
    assert (moved["spec"]["backend"], moved["settled"]) == ("ceph", True)
    writes_on()

    nahtlos.json("snapshot", "create", "both", "--volume", "web-disk", "--volume", "data")
    address = nahtlos.json("snapshot", "export", "both-data", "--for", "10m")
    assert "nbds://" in str(address)
    grown = nahtlos.json("volume", "set", "data", "--size", "48M", "--limit", "iops=500")
    assert (grown["spec"]["size_mib"], grown["settled"]) == (48, True)
    writes_on()

    folder = str(tmp_path / "vault")
    whole = nahtlos.json("backup", "create", "monday", "--volume", "web-disk", "--to", folder)
    writes_on()
    changed = nahtlos.json(
        *("backup", "create", "tuesday", "--volume", "web-disk", "--to", folder, "--incremental")
    )
    assert changed["spec"]["base"] == "monday"
    assert 0 < changed["spec"]["stored_bytes"] < whole["spec"]["stored_bytes"]
    home = nahtlos.json("backup", "restore", "tuesday", "home", "--backend", "embedded")
    again = nahtlos.json("backup", "restore", "tuesday", "again")
    assert [each["spec"]["backend"] for each in (home, again)] == ["embedded", "ceph"]

    assert nahtlos.json("server", "move", "web", "--to", "host-2")["host"] == "host-2"
    writes_on()
    assert nahtlos.refused("volume", "revert", "data", "both-data")["field"] == "volume"
    nahtlos.json("volume", "detach", "data")
    nahtlos.json("volume", "revert", "data", "both-data")
    clone = nahtlos.json("snapshot", "clone", "both-data", "probe")
    assert clone["spec"]["backend"] == "ceph"
    back = nahtlos.json("volume", "relocate", "web-disk", "--to", "host-1")
    assert (back["spec"]["backend"], back["spec"]["host"]) == ("embedded", "host-1")
    writes_on()


def until(what: str, so: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not so():
        assert time.monotonic() - began < SOON_SECONDS, what
        time.sleep(0.2)
