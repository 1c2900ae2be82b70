"""Volumes end to end, by the command line, with a real guest that writes to its disk all the time: a data
volume that is plugged in, a snapshot, a relocation, and a host that is drained of its volumes."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator

import pytest
from test_command_line import CommandLine

from nahtlos.lab.datacentre import unique_name
from nahtlos.lab.outside import GuestDisk, Outside
from nahtlos.lab.paths import LabPaths
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import CloudEvent

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(300),
]
UP_SECONDS = 90.0
WRITES_PER_SECOND = 100
SOON_SECONDS = 20.0


@pytest.fixture
def nahtlos() -> Iterator[CommandLine]:
    line = CommandLine(unique_name("vol"))
    try:
        yield line
    finally:
        assert line.run("lab", "down").returncode == 0


def until(what: str, so: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not so():
        assert time.monotonic() - began < SOON_SECONDS, what
        time.sleep(0.2)


def test_volumes_are_made_moved_and_drained_under_a_guest_that_writes(nahtlos: CommandLine) -> None:
    nahtlos.json("lab", "up", "--hosts", "3")
    web = nahtlos.json("server", "create", "web", "--memory-mib", "128", "--host", "host-1")
    outside = Outside(f"nl-{nahtlos.lab}-client")
    asyncio.run(outside.until_up(web["ip"], timeout=UP_SECONDS))
    asyncio.run(outside.set_load(web["ip"], disk_per_s=WRITES_PER_SECOND))

    def disk() -> GuestDisk:
        return asyncio.run(outside.status(web["ip"])).disk

    def writes_on() -> None:
        before = disk().acknowledged
        until("the guest writes", lambda: disk().acknowledged > before)
        assert disk().errors == 0

    def happened(kind: str, text: str) -> bool:
        async def events() -> tuple[CloudEvent, ...]:
            async with OperatorClient.unix(LabPaths(nahtlos.lab).operator_socket) as client:
                return await client.events(0, 1000)

        return any(event.kind == kind and text in event.text for event in asyncio.run(events()))

    made = nahtlos.json("volume", "create", "data", "--size", "64M", "--replicas", "2", "--server", "web")
    assert [copy["state"] for copy in made["copies"]] == ["current", "current"]
    attached = nahtlos.json("volume", "attach", "data", "web")
    assert attached["server"] == "web" and attached["settled"]
    until("its server's machine has it", lambda: happened("server.disk", "data attached"))
    writes_on()

    nahtlos.json("snapshot", "create", "both", "--volume", "web-disk", "--volume", "data")
    assert {s["spec"]["id"] for s in nahtlos.json("snapshot", "list")} == {"both-web-disk", "both-data"}
    writes_on()

    nahtlos.json("snapshot", "create", "then", "--server", "web", "--memory")
    then = asyncio.run(outside.status(web["ip"]))
    (kept,) = nahtlos.json("snapshot", "list", "--memory")
    assert kept["why_not"] == "" and 0 < kept["spec"]["pause_seconds"] < 2.0
    assert set(kept["spec"]["snapshots"]) == {"then-web-disk", "then-data"}
    time.sleep(5.0)
    later = asyncio.run(outside.status(web["ip"]))
    assert nahtlos.json("server", "revert", "web", "--snapshot", "then")["state"] == "running"
    asyncio.run(outside.until_up(web["ip"], timeout=SOON_SECONDS))
    back = asyncio.run(outside.status(web["ip"]))
    assert back.boot_id == then.boot_id
    assert back.disk.acknowledged < later.disk.acknowledged
    verified = json.loads(asyncio.run(outside.get(web["ip"], "/disk/verify", timeout=60.0)))
    assert verified["wrong"] == 0 and verified["checked"] == verified["acknowledged"]
    writes_on()
    assert nahtlos.refused("volume", "delete", "then-memory", "--yes")["field"] == "volume"
    nahtlos.json("snapshot", "delete", "then")
    assert {s["spec"]["id"] for s in nahtlos.json("snapshot", "list")} == {"both-web-disk", "both-data"}

    before = nahtlos.json("volume", "show", "web-disk")["spec"]["host"]
    to = next(host for host in ("host-2", "host-3") if host != before)
    moved = nahtlos.json("volume", "relocate", "web-disk", "--to", to)
    assert moved["spec"]["host"] == to and moved["settled"]
    writes_on()

    drained = nahtlos.json("host", "drain", to)
    assert drained["phase"] == "drained" and drained["kept"]["volumes"] == []
    shown = nahtlos.json("volume", "show", "data")
    hosts = [copy["host"] for copy in shown["copies"]]
    assert to not in hosts and len(set(hosts)) == 2
    writes_on()
    assert nahtlos.refused("volume", "delete", "data", "--yes")["field"] == "volume"
