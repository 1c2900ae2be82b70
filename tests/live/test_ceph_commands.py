"""Volumes in Ceph end to end, by the command line: a real guest writes to its disk all the time while that
goes into a pool, is snapshotted, backed up, moved with its server, and comes back."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_command_line import CommandLine

from nahtlos.lab.ceph import POOL, USER, CephCluster, missing_programs
from nahtlos.lab.datacentre import unique_name
from nahtlos.lab.disk_check import check_volume
from nahtlos.lab.outside import GuestDisk, Outside
from nahtlos.lab.paths import LabPaths
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
LIMITED_PER_SECOND = 10
LIMITED_SECONDS = 3.0
DISK = "web-disk"


class Guest:
    """A server of the lab's, whose guest writes numbered blocks to its disk, each with its checksum."""

    def __init__(self, nahtlos: CommandLine, ip: str) -> None:
        self.nahtlos, self.ip = nahtlos, ip
        self.outside = Outside(f"nl-{nahtlos.lab}-client")

    def write(self, per_second: int) -> None:
        asyncio.run(self.outside.set_load(self.ip, disk_per_s=per_second))

    def disk(self) -> GuestDisk:
        return asyncio.run(self.outside.status(self.ip)).disk

    @contextmanager
    def writing_on(self) -> Generator[None]:
        """It writes meanwhile and afterwards, and all that was ever acknowledged is read back."""
        before = self.disk().acknowledged
        yield
        after = self.disk().acknowledged
        assert after > before
        until("the guest writes", lambda: self.disk().acknowledged > after)
        assert self.disk().errors == 0
        read = json.loads(asyncio.run(self.outside.get(self.ip, "/disk/verify", timeout=60.0)))
        assert (read["wrong"], read["checked"]) == (0, read["acknowledged"])
        assert read["checked"] >= after


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
    made = nahtlos.json("volume", "create", "data", "--size", "32M", "--backend", "ceph")
    assert (made["spec"]["backend"], made["settled"]) == ("ceph", True)
    guest = Guest(nahtlos, web["ip"])
    asyncio.run(guest.outside.until_up(guest.ip, timeout=UP_SECONDS))
    guest.write(WRITES_PER_SECOND)

    nahtlos.json("volume", "attach", "data", "web")
    with guest.writing_on():
        there = nahtlos.json("volume", "relocate", DISK, "--to", "ceph")
    assert (there["spec"]["backend"], there["settled"]) == ("ceph", True)
    with guest.writing_on():
        nahtlos.json("snapshot", "create", "both", "--volume", DISK, "--volume", "data")
        grown = nahtlos.json("volume", "set", "data", "--size", "48M")
    assert (grown["spec"]["size_mib"], grown["settled"]) == (48, True)
    with guest.writing_on():
        _backed_up(nahtlos, str(tmp_path / "vault"))
    with guest.writing_on():
        assert nahtlos.json("server", "move", "web", "--to", "host-2")["host"] == "host-2"
    _is_limited(guest)

    nahtlos.json("volume", "detach", "data")
    nahtlos.json("volume", "revert", "data", "both-data")
    with guest.writing_on():
        back = nahtlos.json("volume", "relocate", DISK, "--to", "host-1")
    assert (back["spec"]["backend"], back["spec"]["host"]) == ("embedded", "host-1")
    guest.write(0)
    file = LabPaths(nahtlos.lab).node("host-1").state / "volumes" / f"{DISK}.raw"
    found = check_volume(file, guest.disk().acknowledged, "web")
    assert (found.lost, found.wrong) == (0, 0), found


def _backed_up(nahtlos: CommandLine, folder: str) -> None:
    """Whole, then what changed, and out of both a volume in the pool."""
    to = ("--volume", DISK, "--to", folder)
    whole = nahtlos.json("backup", "create", "monday", *to)
    changed = nahtlos.json("backup", "create", "tuesday", *to, "--incremental")
    assert changed["spec"]["base"] == "monday"
    assert 0 < changed["spec"]["stored_bytes"] < whole["spec"]["stored_bytes"]
    assert nahtlos.json("backup", "restore", "tuesday", "again")["spec"]["backend"] == "ceph"


def _is_limited(guest: Guest) -> None:
    """Where it runs now, and slower than it would write."""
    guest.nahtlos.json("volume", "set", DISK, "--limit", f"iops={LIMITED_PER_SECOND}")
    before, began = guest.disk().acknowledged, time.monotonic()
    time.sleep(LIMITED_SECONDS)
    written = guest.disk().acknowledged - before
    assert 0 < written <= (time.monotonic() - began + 1) * LIMITED_PER_SECOND
    guest.nahtlos.json("volume", "set", DISK, "--limit", "none")


def until(what: str, so: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not so():
        assert time.monotonic() - began < SOON_SECONDS, what
        time.sleep(0.2)
