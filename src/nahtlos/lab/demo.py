"""The demo: a data centre of three hosts, six servers under traffic, and their hypervisor upgraded.

    python -m nahtlos.lab.demo [--name demo] [--hosts 3] [--servers 6] [--out build/demo] [--keep]

Exit code 0 if every promise was kept, 1 if one was broken, 2 or 3 if the demo could not be held.
What it leaves in `--out`: report.json, report.html, evidence.json, probe/, logs/.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from nahtlos import __version__
from nahtlos.lab.datacentre import Datacentre, LabShape, promisable
from nahtlos.lab.disk_check import check_volume
from nahtlos.lab.outside import Outside
from nahtlos.lab.paths import LAB_VARIABLE, BuildPaths
from nahtlos.lab.processors import spare
from nahtlos.model.blueprint import CampaignState, HostPhase
from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import HostRole, Release, Size
from nahtlos.ops.client import OperatorClient
from nahtlos.ops.watch import watch
from nahtlos.runtime.controllers.cloud import CampaignView, ServerRequest, ServerView
from nahtlos.runtime.evidence.html import render_html
from nahtlos.runtime.evidence.machine import observe_machine
from nahtlos.runtime.evidence.records import SUMMARY_NAME, DiskCheck
from nahtlos.runtime.evidence.report import collect, encode, save_evidence, write_whole
from nahtlos.runtime.evidence.report_contents import Evidence, Report
from nahtlos.runtime.evidence.text import render_text

SERVER_SIZE = Size(vcpus=1, memory_mib=256)
MEMORY_MIB, MEMORY_MB_PER_S = 32, 4.0
UP_SECONDS = 90.0
CAMPAIGN_SECONDS = 600.0
WARM_UP_SECONDS = 1.5
AFTER_SECONDS = 2.0
PROBE_END_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What clients and guests do, for each server."""

    packets_per_second: int
    line_seconds: float
    """Between two lines over TCP; `page_seconds`: between two HTTP requests."""
    page_seconds: float
    disk_per_s: float


TRAFFIC = (
    Traffic(packets_per_second=210, line_seconds=0.05, page_seconds=0.2, disk_per_s=10.0),
    Traffic(packets_per_second=105, line_seconds=0.1, page_seconds=0.4, disk_per_s=5.0),
    Traffic(packets_per_second=50, line_seconds=0.2, page_seconds=0.8, disk_per_s=5.0),
)
"""The first that leaves ROOM of the processors is taken: emulated guests that want more than there is answer
late whatever is done to them, and a demo would show the machine instead of the moves."""
ROOM = 0.25
ROOM_SECONDS = 2.5
"""Looked at for so long."""


class Demo:
    """One run. Owns the order of events; everything is asked of the cloud as an operator would."""

    def __init__(self, datacentre: Datacentre, out: Path, servers: int, console: Console) -> None:
        self._datacentre = datacentre
        self._out = out
        self._count = servers
        self._console = console
        self._plan = out / "probe-plan.json"
        self._probed: list[dict[str, str | float]] = []
        self._created: tuple[str, ...] = ()
        self._booted_seconds: float | None = None
        self._silent: set[str] = set()
        """Servers that never answered: nothing can be asked of them, and the report says so."""
        self._traffic = TRAFFIC[0]

    async def run(self) -> Report:
        async with self._datacentre.client as client:
            old, new = await self._releases(client)
            self.say(f"{self._count} servers on {old.id}")
            await self._create_servers(client)
            with_probe = self._probing()
            async with with_probe:
                await self._load()
                before = await client.servers()
                await self._show_plan(client, new.id)
                await client.start_upgrade(new.id, None)
                await self._watch(client)
                view = await self._finished(client)
                await asyncio.sleep(AFTER_SECONDS)
                after = await client.servers()
                await self._quiet()
            return await self._report(client, view, before, after)

    def say(self, text: str) -> None:
        self._console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False)

    # --- before ---

    async def _releases(self, client: OperatorClient) -> tuple[Release, Release]:
        """The oldest and the newest hypervisor release that were built; both made known to the cloud."""
        built = self._datacentre.build.movable_releases()
        if len(built) < 2:
            raise Refused(
                "an upgrade needs two releases", field="releases", remedy="build them: make releases"
            )
        old, new = built[0], built[-1]
        for release in (old, new):
            await client.register_release(release.id)
        self.say(f"hosts boot a probe under {old.id}")
        await self._until_serving(client)
        return old, new

    async def _until_serving(self, client: OperatorClient) -> None:
        """Servers are spread over all hosts only once all of them can take some."""
        async with within_seconds(UP_SECONDS, "until all hosts served"):
            while any(h.phase is not HostPhase.SERVING for h in await client.hosts()):
                await asyncio.sleep(0.2)

    async def _create_servers(self, client: OperatorClient) -> None:
        names = [f"vm-{i + 1}" for i in range(self._count)]
        asked = time.monotonic()
        for name in names:
            server = await client.create_server(_request(name))
            self._probed.append({"name": name, "ip": server.ip})
        await asyncio.gather(
            *(self._outside.until_up(str(p["ip"]), timeout=UP_SECONDS) for p in self._probed)
        )
        self._booted_seconds = time.monotonic() - asked
        await self._until_running(client, len(names))

    async def _until_running(self, client: OperatorClient, count: int) -> None:
        async with within_seconds(UP_SECONDS, "until all servers ran"):
            while sum(s.state is RunState.RUNNING for s in await client.servers()) < count:
                await asyncio.sleep(0.1)

    @property
    def _outside(self) -> Outside:
        assert self._datacentre.topology is not None
        return Outside(self._datacentre.topology.node("client").namespace)

    async def _load(self) -> None:
        """What customers do: change memory, write, ask; as much of it as fits on this machine."""
        room = 0.0
        for self._traffic in TRAFFIC:
            self._write_plan()
            for probed in self._probed:
                await self._load_server(str(probed["ip"]))
            await asyncio.sleep(WARM_UP_SECONDS)
            room = await spare(ROOM_SECONDS)
            if room >= ROOM:
                break
        rate = self._traffic.packets_per_second
        self.say(f"traffic: {rate} datagrams/s to each server; {room:.0%} of the processors free")

    async def _load_server(self, ip: str) -> None:
        await self._outside.set_load(
            ip,
            memory_mib=MEMORY_MIB,
            memory_mb_per_s=MEMORY_MB_PER_S,
            disk_per_s=self._traffic.disk_per_s,
        )

    async def _quiet(self) -> None:
        """No further writes, so that what was acknowledged can be looked for."""
        for probed in self._probed:
            if probed["name"] not in self._silent:
                await self._outside.set_load(str(probed["ip"]), disk_per_s=0)
        await asyncio.sleep(1.5)

    # --- the campaign ---

    async def _show_plan(self, client: OperatorClient, to: ReleaseId) -> None:
        plan = await client.plan_upgrade(to, None)
        for host in plan.hosts:
            moves = ", ".join(f"{m.server}→{m.destination}" for m in host.moves) or "empty"
            self.say(f"plan: {host.host}: {moves}")
        self.say(
            f"plan: {plan.total_moves} moves ({plan.moves_per_server:.2f} per server), "
            f"about {plan.seconds:.0f} s, gap {plan.gap_ms_p50:.0f} ms (from {plan.basis})"
        )
        for blocker in plan.blockers:
            raise Refused(f"{blocker.subject}: {blocker.reason}", field="upgrade", remedy=blocker.remedy)

    async def _watch(self, client: OperatorClient) -> None:
        async with within_seconds(CAMPAIGN_SECONDS, "to upgrade all hosts"):
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._create_in_the_middle(client))
                    async with self._datacentre.client as other:
                        await watch(other, self._console, probe_summary=self._out / "probe" / SUMMARY_NAME)
            except ExceptionGroup as group:
                raise next((e for e in group.exceptions if isinstance(e, Error)), group) from None

    async def _create_in_the_middle(self, client: OperatorClient) -> None:
        """A customer comes along while hosts are being emptied."""
        while (await client.campaign(None)).hosts_upgraded < 1:
            await asyncio.sleep(0.5)
        name = f"vm-{self._count + 1}"
        self._created = (name,)
        asked = time.time()
        server = await client.create_server(_request(name))
        self._probed.append({"name": name, "ip": server.ip, "start": asked})
        self._write_plan()
        try:
            await self._outside.until_up(server.ip, timeout=UP_SECONDS)
        except Unavailable as error:
            self._silent.add(name)
            self.say(str(error))
        else:
            await self._load_server(server.ip)

    async def _finished(self, client: OperatorClient) -> CampaignView:
        async with within_seconds(CAMPAIGN_SECONDS, "to end the campaign"):
            while (view := await client.campaign(None)).campaign.state is CampaignState.RUNNING:
                await asyncio.sleep(0.2)
        return view

    # --- probes ---

    def _write_plan(self) -> None:
        plan = {
            "servers": self._probed,
            "udp_pps": self._traffic.packets_per_second,
            "tcp_interval": self._traffic.line_seconds,
            "http_interval": self._traffic.page_seconds,
            "api_socket": str(self._datacentre.paths.operator_socket),
        }
        write_whole(self._plan, json.dumps(plan).encode())

    @asynccontextmanager
    async def _probing(self) -> AsyncGenerator[None]:
        """The prober runs while the context is open and has written its last word when it is closed."""
        assert self._datacentre.topology is not None
        self._write_plan()
        namespace = self._datacentre.topology.node("client").namespace
        with (self._out / "probe.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *("nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-m", "nahtlos.lab.probe"),
                *("--plan", str(self._plan), "--out", str(self._out / "probe")),
                env={**os.environ, LAB_VARIABLE: self._datacentre.paths.name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(PROBE_END_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()

    # --- after ---

    async def _report(
        self,
        client: OperatorClient,
        view: CampaignView,
        before: tuple[ServerView, ...],
        after: tuple[ServerView, ...],
    ) -> Report:
        self.say("looking for every acknowledged block in the volumes")
        hosts = tuple(h for h in await client.hosts() if h.role is HostRole.COMPUTE)
        accelerator = next((h.accelerator for h in hosts if h.accelerator), None)
        evidence = Evidence(
            campaign=view,
            servers_before=before,
            servers_after=after,
            hosts=hosts,
            disks=await self._check_disks(tuple(s for s in after if s.id not in self._silent)),
            machine=observe_machine(
                accelerator=accelerator.name if accelerator else "unknown",
                reason=accelerator.reason if accelerator else "",
                version=__version__,
            ),
            made_at=time.time(),
            created=self._created,
            booted_seconds=self._booted_seconds,
        )
        save_evidence(self._out, evidence)
        report = collect(self._out)
        write_whole(self._out / "report.json", encode(report))
        write_whole(self._out / "report.html", render_html(report).encode())
        return report

    async def _check_disks(self, servers: tuple[ServerView, ...]) -> tuple[DiskCheck, ...]:
        """In the volumes' own files, against what the guests said was on the disk."""
        checks: list[DiskCheck] = []
        for server in servers:
            status = await self._outside.status(server.ip)
            folder = self._datacentre.paths.node(server.volume_host).state / "volumes"
            volume = _volume_file(folder, server.id)
            checks.append(await asyncio.to_thread(check_volume, volume, status.disk.acknowledged, server.id))
        return tuple(checks)


@asynccontextmanager
async def within_seconds(seconds: float, what: str) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(
            f"it took more than {seconds:g} s {what}",
            remedy="give this machine less to do: make demo ARGS='--servers 3'",
        ) from None


def _volume_file(folder: Path, server: ServerId) -> Path:
    found = sorted(folder.glob(f"*{server}*.raw"))
    if len(found) != 1:
        raise Unavailable(f"{len(found)} volumes of {server} in {folder}")
    return found[0]


def _request(name: str) -> ServerRequest:
    return ServerRequest(name=name, vcpus=SERVER_SIZE.vcpus, memory_mib=SERVER_SIZE.memory_mib)


def _keep_logs(datacentre: Datacentre, out: Path) -> None:
    """What a person needs who wants to know why, after the lab is gone."""
    for log in datacentre.paths.state.glob("*/**/*.log"):
        target = out / "logs" / log.relative_to(datacentre.paths.state)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, target)


async def hold(arguments: argparse.Namespace, console: Console) -> int:
    out = Path(arguments.out)
    shutil.rmtree(out, ignore_errors=True)
    (out / "probe").mkdir(parents=True)
    shape = LabShape(hosts=arguments.hosts)
    shape = msgspec.structs.replace(shape, promised=promisable(shape.hosts, shape.capacity))
    datacentre = Datacentre(arguments.name, shape, BuildPaths.default())
    demo = Demo(datacentre, out, arguments.servers, console)
    began = time.monotonic()
    await datacentre.open(demo.say)
    try:
        report = await demo.run()
    finally:
        _keep_logs(datacentre, out)
        if not arguments.keep:
            await datacentre.close()
    console.print(render_text(report))
    console.print(f"{out / 'report.html'}   {time.monotonic() - began:.0f} s")
    return 0 if report.kept else 1


async def until_told(arguments: argparse.Namespace, console: Console) -> int:
    """`hold`, ended in order by SIGTERM or Ctrl-C."""
    task = asyncio.ensure_future(hold(arguments, console))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        console.print("interrupted; the lab was taken down")
        return 130


def main() -> None:
    parser = argparse.ArgumentParser(prog="nahtlos-demo")
    parser.add_argument("--name", default="demo")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--servers", type=int, default=6)
    parser.add_argument("--out", default=str(BuildPaths.default().root / "demo"))
    parser.add_argument("--keep", action="store_true", help="leave the lab open")
    arguments = parser.parse_args()
    console = Console()
    try:
        sys.exit(asyncio.run(until_told(arguments, console)))
    except Error as error:
        Console(stderr=True).print(f"[bold red]{error.kind}[/bold red] {error}", highlight=False)
        sys.exit(2 if isinstance(error, Refused) else 3)


if __name__ == "__main__":
    main()
