"""What a group of snapshots over several hosts costs: two servers on two hosts, which write and synchronize,
stand still for as long as all hosts take their parts. By the orchestrator and the agents of a lab."""

import asyncio
import contextlib
import sqlite3
import statistics
from pathlib import Path

import msgspec

from benchmarks.figures import Figures, Goal
from nahtlos.lab.datacentre import Datacentre, LabShape, opened, unique_name
from nahtlos.lab.outside import Outside
from nahtlos.lab.paths import BuildPaths
from nahtlos.model.blueprint import HostPhase, OperationRecord
from nahtlos.model.ids import HostId, ServerId, SnapshotId, VolumeId
from nahtlos.model.nouns import Size
from nahtlos.ops.client import OperatorClient
from nahtlos.runtime.controllers.cloud import ServerRequest
from nahtlos.runtime.controllers.snapshot_requests import SnapshotRequest
from nahtlos.runtime.releases import list_releases

SHAPE = LabShape(hosts=2, capacity=Size(vcpus=4, memory_mib=1024), promised=Size(vcpus=2, memory_mib=256))
PLACES = {ServerId("vm-1"): HostId("host-1"), ServerId("vm-2"): HostId("host-2")}
WRITES_PER_SECOND = 50
QUICK, LONG = 8, 40
UP_SECONDS = 120.0
TAKEN_SECONDS = 60.0
SHORT = Goal(at_most=20)
NONE = Goal(at_most=0)


async def measure(figures: Figures, *, long: bool) -> None:
    rounds = LONG if long else QUICK
    async with opened(unique_name("bench"), SHAPE) as datacentre, datacentre.client as client:
        assert datacentre.topology is not None
        outside = Outside(datacentre.topology.node("client").namespace)
        addresses = await _servers(client, outside)
        for number in range(rounds):
            await _group(client, f"group-{number}")
        stood = _stood_still(datacentre)
        statuses = [await outside.status(ip) for ip in addresses]
    if not stood:
        raise RuntimeError("no group says for how long its servers stood still")
    over = "servers stand still for a group over two hosts"
    figures.add(f"{over}, p50", statistics.median(stood), "ms", goal=SHORT, samples=len(stood))
    figures.add(f"{over}, all", max(stood), "ms", samples=len(stood))
    figures.add(f"{over}, errors of their disks", sum(s.disk.errors for s in statuses), "writes", goal=NONE)


async def _servers(client: OperatorClient, outside: Outside) -> list[str]:
    await client.register_release(list_releases(BuildPaths.default().releases)[-1].id)
    async with asyncio.timeout(UP_SECONDS):
        while not all(host.phase is HostPhase.SERVING for host in await client.hosts()):
            await asyncio.sleep(0.1)
    requests = [ServerRequest(name=name, memory_mib=128, host=host) for name, host in PLACES.items()]
    addresses = [(await client.create_server(request)).ip for request in requests]
    for ip in addresses:
        await outside.until_up(ip, timeout=UP_SECONDS)
        await outside.set_load(ip, disk_per_s=WRITES_PER_SECOND)
    return addresses


async def _group(client: OperatorClient, name: str) -> None:
    volumes = tuple(VolumeId(f"{server}-disk") for server in PLACES)
    names: set[SnapshotId] = set(
        await client.volumes.create_snapshots(SnapshotRequest(name=name, volumes=volumes))
    )
    async with asyncio.timeout(TAKEN_SECONDS):
        while not names <= {view.spec.id for view in await client.volumes.snapshots()}:
            await asyncio.sleep(0.2)


def _stood_still(datacentre: Datacentre) -> list[float]:
    """Milliseconds, from the first order to stand still to the last answer that a server goes on."""
    path: Path = datacentre.paths.node("ctl").state / "runtime.sqlite"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        rows = database.execute("select document from operations where kind = 'snapshot'").fetchall()
    results = [msgspec.json.decode(text, type=OperationRecord).result for (text,) in rows]
    return [float(result["stood_still_ms"]) for result in results if "stood_still_ms" in result]
