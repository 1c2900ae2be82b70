"""Volumes end to end, by the command line, with a real guest that writes to its disk all the time: a data
volume that is plugged in, snapshots, one of which goes elsewhere, more and fewer copies, one whose host loses
its power, a relocation, and a host that is drained of its volumes. In the end every copy holds all that the
guest was told is written, and all are the same."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host_power import power_off, power_on
from lab_commands import LabCommands, lab_commands

from nahtlos.lab.disk_check import check_volume
from nahtlos.lab.outside import GuestDisk, Outside
from nahtlos.lab.paths import LabPaths
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import CloudEvent

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(600),
    # Supervisors are meant to outlive whoever started them.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
UP_SECONDS = 90.0
WRITES_PER_SECOND = 100
SOON_SECONDS = 30.0
MIB, BLOCK = 1 << 20, 4096
DISK = "web-disk"


class Play:
    """`web` on host-1, which writes."""

    def __init__(self, nahtlos: LabCommands, folder: Path) -> None:
        self.nahtlos = nahtlos
        self.folder = folder
        nahtlos.json("lab", "up", "--hosts", "3")
        self.ip = nahtlos.json("server", "create", "web", "--memory-mib", "128", "--host", "host-1")["ip"]
        self.outside = Outside(f"nl-{nahtlos.lab}-client")
        asyncio.run(self.outside.until_up(self.ip, timeout=UP_SECONDS))
        asyncio.run(self.outside.set_load(self.ip, disk_per_s=WRITES_PER_SECOND))

    def disk(self) -> GuestDisk:
        return asyncio.run(self.outside.status(self.ip)).disk

    def writes_on(self) -> None:
        before = self.disk().acknowledged
        until("the guest writes", lambda: self.disk().acknowledged > before)
        assert self.disk().errors == 0

    def events(self, kind: str) -> list[CloudEvent]:
        async def ask() -> tuple[CloudEvent, ...]:
            async with OperatorClient.unix(LabPaths(self.nahtlos.lab).operator_socket) as client:
                return await client.events(0, 1000)

        return [event for event in asyncio.run(ask()) if event.kind == kind]

    def happened(self, kind: str, text: str) -> bool:
        return any(text in event.text for event in self.events(kind))

    def states(self) -> list[str]:
        """Of the system disk's copies."""
        return sorted(copy["state"] for copy in self.nahtlos.json("volume", "show", DISK)["copies"])

    def copies(self, *states: str) -> list[str]:
        """Hosts of the system disk's copies, whose states are these."""
        shown = self.nahtlos.json("volume", "show", DISK)["copies"]
        assert sorted(copy["state"] for copy in shown) == sorted(states), shown
        return [copy["host"] for copy in shown]


@pytest.fixture
def nahtlos(tmp_path: Path) -> Iterator[LabCommands]:
    with lab_commands("vol", tmp_path) as line:
        yield line


def until(what: str | Callable[[], str], so: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not so():
        assert time.monotonic() - began < SOON_SECONDS, what if isinstance(what, str) else what()
        time.sleep(0.2)


def test_volumes_are_made_moved_and_drained_under_a_guest_that_writes(
    nahtlos: LabCommands, tmp_path: Path
) -> None:
    play = Play(nahtlos, tmp_path)
    made = nahtlos.json("volume", "create", "data", "--size", "64M", "--replicas", "2", "--server", "web")
    assert [copy["state"] for copy in made["copies"]] == ["current", "current"]
    attached = nahtlos.json("volume", "attach", "data", "web")
    assert attached["server"] == "web" and attached["settled"]
    until("its server's machine has it", lambda: play.happened("server.disk", "data attached"))
    play.writes_on()

    nahtlos.json("snapshot", "create", "both", "--volume", DISK, "--volume", "data")
    assert {s["spec"]["id"] for s in nahtlos.json("snapshot", "list")} == {"both-web-disk", "both-data"}
    play.writes_on()
    _a_snapshot_goes_elsewhere(play)
    _copies_come_and_go(play)
    _its_memory_is_kept_and_comes_back(play)
    before = nahtlos.json("volume", "show", DISK)["spec"]["host"]
    to = next(
        host for host in ("host-1", "host-2", "host-3") if host not in play.copies("current", "current")
    )
    moved = nahtlos.json("volume", "relocate", DISK, "--to", to)
    assert moved["spec"]["host"] == to != before and moved["settled"]
    play.writes_on()
    _all_copies_hold_all(play)

    drained = nahtlos.json("host", "drain", to)
    assert drained["phase"] == "drained" and drained["kept"]["volumes"] == []
    shown = nahtlos.json("volume", "show", "data")
    hosts = [copy["host"] for copy in shown["copies"]]
    assert to not in hosts and len(set(hosts)) == 2
    assert nahtlos.refused("volume", "delete", "data", "--yes")["field"] == "volume"


def _a_snapshot_goes_elsewhere(play: Play) -> None:
    """While its volume, which stays, is written."""
    nahtlos = play.nahtlos
    (here,) = nahtlos.json("snapshot", "show", "both-web-disk")["spec"]["hosts"]
    held = nahtlos.checksum("both-web-disk", play.folder / "before.raw")
    to = next(host for host in ("host-2", "host-3") if host != here)
    moved = nahtlos.json("snapshot", "move", "both-web-disk", "--to", to)
    assert moved["spec"]["hosts"] == [to]
    assert nahtlos.json("volume", "show", DISK)["spec"]["host"] == here
    assert nahtlos.checksum("both-web-disk", play.folder / "after.raw", to) == held
    play.writes_on()


def _its_memory_is_kept_and_comes_back(play: Play) -> None:
    """A snapshot of the whole server: reverted to, it goes on where it was, on the disks of that moment."""
    nahtlos = play.nahtlos
    nahtlos.json("snapshot", "create", "then", "--server", "web", "--memory")
    then = asyncio.run(play.outside.status(play.ip))
    (kept,) = nahtlos.json("snapshot", "list", "--memory")
    assert kept["why_not"] == "" and 0 < kept["spec"]["pause_seconds"] < 2.0
    assert set(kept["spec"]["snapshots"]) == {"then-web-disk", "then-data"}
    time.sleep(5.0)
    later = asyncio.run(play.outside.status(play.ip))
    assert nahtlos.json("server", "revert", "web", "--snapshot", "then")["state"] == "running"
    asyncio.run(play.outside.until_up(play.ip, timeout=SOON_SECONDS))
    back = asyncio.run(play.outside.status(play.ip))
    assert back.boot_id == then.boot_id
    assert back.disk.acknowledged < later.disk.acknowledged
    verified = json.loads(asyncio.run(play.outside.get(play.ip, "/disk/verify", timeout=60.0)))
    assert verified["wrong"] == 0 and verified["checked"] == verified["acknowledged"]
    play.writes_on()
    assert nahtlos.refused("volume", "delete", "then-memory", "--yes")["field"] == "volume"
    nahtlos.json("snapshot", "delete", "then")
    assert {s["spec"]["id"] for s in nahtlos.json("snapshot", "list")} == {"both-web-disk", "both-data"}


def _copies_come_and_go(play: Play) -> None:
    """One, two, three, of which one's host loses its power and comes back, and two."""
    nahtlos = play.nahtlos
    nahtlos.json("volume", "set", DISK, "--replicas", "2")
    play.copies("current", "current")
    play.writes_on()
    nahtlos.json("volume", "set", DISK, "--replicas", "3")
    hosts = play.copies("current", "current", "current")
    play.writes_on()
    _power_fails(play, next(host for host in hosts if host != "host-1"))
    _a_copy_is_damaged(play, next(host for host in hosts if host != "host-1"))
    nahtlos.json("volume", "set", DISK, "--replicas", "2")
    play.copies("current", "current")
    play.writes_on()


def _power_fails(play: Play, host: str) -> None:
    """Nobody is asked for anything: the copy comes back by what was written meanwhile."""
    records = LabPaths(play.nahtlos.lab).node(host).state / "volumes"
    until(
        lambda: f"all copies to be in step; {[event.text for event in play.events('volume.not-in-step')]}",
        lambda: any('"in_step":"3-' in file.read_text() for file in records.glob(f"{DISK}*.json")),
    )
    before = len(play.events("volume.rebuild"))
    power_off(play.nahtlos.lab, host)
    until("its copy to be recorded as stale", lambda: _state(play, host) == "stale")
    play.writes_on()
    power_on(play.nahtlos.lab, host)
    until("its copy to be current again", lambda: _state(play, host) == "current")
    told = [event for event in play.events("volume.rebuild")[before:] if DISK in event.subject]
    assert not [event for event in told if "everything is copied" in event.text], told
    (took,) = [event for event in told if "took" in event.text]
    size = play.nahtlos.json("volume", "show", DISK)["spec"]["size_mib"] * MIB
    assert 0 < int(took.data["bytes"]) < size / 4, took
    print(f"{host} came back: {took.text} of {size / MIB:.0f}")
    until("all of it is settled", lambda: play.nahtlos.json("volume", "show", DISK)["settled"])
    play.writes_on()


def _a_copy_is_damaged(play: Play, host: str) -> None:
    """On its disk, behind its daemon's back: a scrub of three finds it, and has it made anew, all of it."""
    nahtlos = play.nahtlos
    asyncio.run(play.outside.set_load(play.ip, disk_per_s=0))
    file, offset, wrong = _damage(LabPaths(nahtlos.lab).node(host).state / "volumes")
    found = nahtlos.run("--json", "volume", "scrub", DISK)
    assert found.returncode == 1, found.stdout + found.stderr
    result = json.loads(found.stdout)["record"]["result"]
    assert (result["differences"], result["wrong"]) == ("1", host)
    nahtlos.run("--json", "volume", "scrub", DISK, "--repair")
    until("its copy to be made anew", lambda: play.states() == ["current"] * 3)
    until("all of it is settled", lambda: nahtlos.json("volume", "show", DISK)["settled"])
    assert nahtlos.json("volume", "scrub", DISK)["record"]["result"]["differences"] == "0"
    assert not file.exists() or _block(file, offset) != wrong
    asyncio.run(play.outside.set_load(play.ip, disk_per_s=WRITES_PER_SECOND))
    play.writes_on()


def _block(file: Path, offset: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(BLOCK)


def _damage(volumes: Path) -> tuple[Path, int, bytes]:
    """A block of the copy there that is not blank: its file, where it is, and what it holds now."""
    files = [file for file in volumes.glob(f"{DISK}*") if file.suffix in (".raw", ".qcow2")]
    file = max(files, key=lambda file: file.stat().st_blocks)
    offset = next(at for at in range(8 * MIB, file.stat().st_size, BLOCK) if any(_block(file, at)))
    wrong = bytes(byte ^ 0xFF for byte in _block(file, offset))
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(wrong)
        opened.flush()
        os.fsync(opened.fileno())
    return file, offset, wrong


def _state(play: Play, host: str) -> str:
    shown = play.nahtlos.json("volume", "show", DISK)["copies"]
    return next(copy["state"] for copy in shown if copy["host"] == host)


def _all_copies_hold_all(play: Play) -> None:
    """Every write that was acknowledged, and the same bytes."""
    asyncio.run(play.outside.set_load(play.ip, disk_per_s=0))
    nahtlos, status = play.nahtlos, play.disk()
    assert (status.errors, status.acknowledged > WRITES_PER_SECOND) == (0, True)
    hosts = play.copies("current", "current")
    nahtlos.json("snapshot", "create", "end", "--volume", DISK)
    found: set[str] = set()
    for host in hosts:
        file = play.folder / f"end-{host}.raw"
        found.add(nahtlos.checksum("end", file, host))
        disk = check_volume(file, play.disk().acknowledged, "web")
        assert (disk.lost, disk.wrong) == (0, 0), disk
    assert len(found) == 1, "copies differ"
    assert nahtlos.json("volume", "scrub", DISK)["record"]["result"]["differences"] == "0"
