"""Real moves by post-copy: a server that writes 400 MB/s over a link of 16 MiB/s, which no pre-copy carries.

About a minute, with one boot of a guest, and another one after the last act. First nothing goes wrong; then
the source's host is cut off and both agents are killed while memory follows; then the source's VMM is killed,
with which the server is lost and started again. Never do two copies of it run.
"""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
import pytest
from faults import Monitor, Monitors, until

from nahtlos.lab.datacentre import Datacentre, LabShape, opened, unique_name
from nahtlos.lab.outside import GuestStatus, Outside
from nahtlos.lab.paths import BuildPaths
from nahtlos.lab.topology import set_link
from nahtlos.model.blueprint import HostPhase, OperationRecord
from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.nouns import Size
from nahtlos.model.prediction import Means
from nahtlos.ops.client import OperatorClient
from nahtlos.physical.hypervisor.userfault import why_no_userfault
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.runtime.controllers.cloud import ServerChange, ServerRequest
from nahtlos.runtime.releases import list_releases

pytestmark = [
    pytest.mark.live,
    pytest.mark.asyncio,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(bool(why_no_userfault()), reason="needs userfaultfd"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
SHAPE = LabShape(hosts=2, capacity=Size(vcpus=4, memory_mib=1024), promised=Size(vcpus=1, memory_mib=256))
SERVER = ServerId("busy")
LINK = 16 << 20
"""Bytes a second. What follows the server takes four seconds at least: a fault finds it on its way."""
DIRTIED_MIB, RATE = 64, 400
UP_SECONDS, MOVE_SECONDS = 90.0, 90.0
CUT_SECONDS = 7.0


class Stage:
    def __init__(self, datacentre: Datacentre, client: OperatorClient, monitors: Monitors) -> None:
        assert datacentre.topology is not None
        self.client, self.monitors = client, monitors
        self.ip = ""
        self._datacentre, self._topology = datacentre, datacentre.topology
        self._outside = Outside(datacentre.topology.node("client").namespace)

    async def begin(self) -> None:
        for host in ("host-1", "host-2"):
            shaped = f"rate {LINK * 8}bit burst 512kb latency 50ms"
            command = f"tc -n {self._topology.switch.namespace} qdisc add dev p-{host} root tbf {shaped}"
            subprocess.run(command.split(), check=True, timeout=20, capture_output=True)
        await self.client.register_release(list_releases(BuildPaths.default().releases)[-1].id)
        await until("both hosts to serve", self._serve, UP_SECONDS)
        request = ServerRequest(name=SERVER, memory_mib=256, host=HostId("host-1"))
        self.ip = (await self.client.create_server(request)).ip
        await self._outside.until_up(self.ip, timeout=UP_SECONDS)
        await self.write_fast()
        await self.client.change_server(SERVER, ServerChange(allow_post_copy=True))
        assert (await self.client.server(SERVER)).allow_post_copy

    async def _serve(self) -> bool:
        return all(host.phase is HostPhase.SERVING for host in await self.client.hosts())

    async def write_fast(self) -> None:
        await self._outside.set_load(self.ip, memory_mib=DIRTIED_MIB, memory_mb_per_s=RATE)

    async def answers(self) -> GuestStatus:
        await self._outside.until_up(self.ip, timeout=UP_SECONDS)
        return await self._outside.status(self.ip)

    async def is_lost(self) -> bool:
        told = [event for event in await self.client.events(0, 1000) if event.kind == "server.lost"]
        return any("gone before all of its memory" in event.text for event in told)

    async def has_booted_since(self, boot: str) -> bool:
        try:
            return (await self._outside.status(self.ip)).boot_id != boot
        except Unavailable:
            return False

    def cut_off(self, host: str, *, on: bool) -> None:
        set_link(self._topology, host, up=not on)

    async def kill(self, node: str, unit: str) -> None:
        supervisor = SupervisorClient(self._datacentre.paths.node(node).supervisor)
        try:
            status = (await supervisor.units())[unit]
        finally:
            supervisor.close()
        assert status.pid is not None, f"{unit} does not run on {node}"
        os.kill(status.pid, signal.SIGKILL)

    async def carried(self, during: Callable[[Monitor, Monitor], Awaitable[None]]) -> OperationRecord:
        """Moved to the other host; `during` is called with the monitors of both VMMs as it runs there."""
        before = await self.client.server(SERVER)
        assert before.host is not None
        there = HostId("host-2" if before.host == "host-1" else "host-1")
        old = next(m for m in self.monitors.all if m.alive and m.epoch == before.epoch)
        await self.client.move_server(SERVER, there)
        new = await self.monitors.until(
            "its handover", lambda m: m.host == there and m.epoch == before.epoch + 1 and m.runs, MOVE_SECONDS
        )
        await during(old, new)

        async def arrived() -> bool:
            view = await self.client.server(SERVER)
            return view.host == there and view.moving_to is None and not self._unended()

        await until("the end of the move", arrived, MOVE_SECONDS)
        return self._records()[-1]

    def _unended(self) -> bool:
        return any(record.state == "running" for record in self._records())

    def _records(self) -> list[OperationRecord]:
        path = self._datacentre.paths.node("ctl").state / "runtime.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            rows = database.execute(
                "select document from operations where kind = 'move' order by rowid"
            ).fetchall()
        return [msgspec.json.decode(text, type=OperationRecord) for (text,) in rows]


@contextlib.asynccontextmanager
async def stage() -> AsyncGenerator[Stage]:
    async with opened(unique_name("pcp"), SHAPE) as datacentre, datacentre.client as client:
        monitors = Monitors(datacentre.paths.run)
        watching = asyncio.create_task(monitors.watch())
        try:
            found = Stage(datacentre, client, monitors)
            await found.begin()
            yield found
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def test_what_no_pre_copy_carries_is_handed_over_and_its_memory_follows() -> None:
    async with stage() as play:
        boot = (await play.answers()).boot_id

        async def undisturbed(old: Monitor, new: Monitor) -> None:
            assert not old.runs

        record = await play.carried(undisturbed)
        assert record.state == "done"
        assert record.result["means"] == Means.POST_COPY
        after = await play.answers()
        assert (after.boot_id, after.memory.errors) == (boot, 0)

        async def cut_and_killed(old: Monitor, new: Monitor) -> None:
            play.cut_off(old.host, on=True)
            for host in (old.host, new.host):
                await play.kill(host, "agent")
            await asyncio.sleep(CUT_SECONDS)
            assert old.alive and not old.runs
            assert new.alive
            play.cut_off(old.host, on=False)

        record = await play.carried(cut_and_killed)
        assert record.state == "done"
        after = await play.answers()
        assert (after.boot_id, after.memory.errors) == (boot, 0)

        async def source_lost(old: Monitor, new: Monitor) -> None:
            play.cut_off(old.host, on=True)
            await play.kill(old.host, f"vmm.{SERVER}.{old.epoch}")
            play.cut_off(old.host, on=False)

        record = await play.carried(source_lost)
        assert record.state == "done"
        await until("the word that it is lost", play.is_lost, UP_SECONDS)
        await until("its boot", lambda: play.has_booted_since(boot), UP_SECONDS)
        assert not play.monitors.overlaps(SERVER)
