"""Hosts fail with a server on them, in a lab of real processes, packets and disks: one loses its power and
its cable while a campaign moves the server away, the next one its cable while its agent is frozen and its
supervisor is dead, and the server runs on.

The server answers from another host, with every block that its guest had acknowledged; never do two copies
run; the host comes back, runs it no second time, and its copy rejoins. About a minute and a half on two quiet
cores. Leases are shorter than any switch would have them.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import host_power
import msgspec
import pytest
import pytest_asyncio
from faults import Monitors, until

from nahtlos.lab.datacentre import Datacentre, LabShape, opened, unique_name
from nahtlos.lab.disk_check import check_volume
from nahtlos.lab.outside import Outside
from nahtlos.lab.probe.heartbeats import Heartbeats
from nahtlos.lab.topology import Topology, set_link, within
from nahtlos.model.availability import OnHostFailure, denial_seconds
from nahtlos.model.blueprint import CampaignState, Strategy
from nahtlos.model.config import UnderlayShares
from nahtlos.model.ids import HostId, ReleaseId, ServerId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import Release, Size
from nahtlos.model.storage import ReplicaState
from nahtlos.ops.client import OperatorClient
from nahtlos.physical.supervisor.client import SupervisorClient
from nahtlos.runtime.controllers.availability import AvailabilityChange, HostStanding
from nahtlos.runtime.controllers.cloud import ServerRequest

pytestmark = [
    pytest.mark.live,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    # Supervisors are meant to outlive whoever started them.
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
SHAPE = LabShape(hosts=3, capacity=Size(vcpus=4, memory_mib=512), promised=Size(vcpus=4, memory_mib=512))
WEB = ServerId("web")
DISK = f"{WEB}-disk"
LEASE, LOST = 5.0, 3.0
UNHEARD = 10.0
"""Until a connection that says nothing is given up."""
BOOT_SECONDS = 90.0
SOON_SECONDS = 60.0
WRITES_PER_SECOND = 50.0


@dataclass
class Cloud:
    datacentre: Datacentre
    client: OperatorClient
    monitors: Monitors
    ip: str
    beats: Heartbeats
    newest: ReleaseId
    """Of two that servers can be moved between; hosts have the other one."""

    @property
    def topology(self) -> Topology:
        assert self.datacentre.topology is not None
        return self.datacentre.topology

    @property
    def outside(self) -> Outside:
        return Outside(self.topology.client.namespace)

    # --- a host's power, cable and agent ---

    async def cable(self, host: HostId, *, up: bool) -> None:
        await asyncio.to_thread(set_link, self.topology, host, up=up)

    async def power_off(self, host: HostId) -> None:
        await asyncio.to_thread(host_power.power_off, self.datacentre.paths.name, host)

    async def power_on(self, host: HostId) -> None:
        await asyncio.to_thread(host_power.power_on, self.datacentre.paths.name, host)

    def supervisor(self, host: HostId) -> int:
        """Its process; not its keeper's, which has no socket."""
        running = host_power.processes(self.datacentre.paths.name, host)
        found = [p for p in running if _says(p, b"nahtlos.entry.supervisor", b"--socket")]
        assert len(found) == 1, found
        return found[0]

    async def agent(self, host: HostId, number: signal.Signals) -> None:
        supervisor = SupervisorClient(self.datacentre.paths.node(host).supervisor)
        try:
            pid = (await supervisor.units())["agent"].pid
        finally:
            supervisor.close()
        assert pid is not None
        os.kill(pid, number)

    # --- a campaign ---

    async def empty_slowly(self, host: HostId) -> None:
        """A campaign begins to empty `host`. Returns while memory is copied, which takes half a minute."""
        networks = self.client.networks
        shares = UnderlayShares(bits_per_second=400 * 10**6, control=35, moves=5, tenants=60)
        await networks.set_underlay(msgspec.structs.replace(await networks.underlay(), shares=shares))
        await self.client.start_upgrade(self.newest, (host,), strategy=Strategy.MOVE)

        async def so() -> bool:
            running = (await self.client.campaign(None)).running
            return any(o.server == WEB and o.step == "precopy" for o in running)

        await until("the campaign to move the server", so, SOON_SECONDS)

    async def campaign_is_over(self) -> None:
        async def so() -> bool:
            return (await self.client.campaign(None)).campaign.state is CampaignState.DONE

        await until("the campaign to go on to its end", so, SOON_SECONDS)

    # --- what is to be seen ---

    async def place(self) -> HostId:
        """Where it runs, by its VMM."""
        (vmm,) = self.monitors.running(WEB)
        return HostId(vmm.host)

    async def standing(self, host: HostId) -> HostStanding:
        view = await self.client.availability.view()
        return next(each for each in view.hosts if each.host == host)

    async def until_under_lease(self, host: HostId) -> None:
        """Until the orchestrator knows that it runs there only as long as the lease lasts."""

        async def so() -> bool:
            seen = (await self.client.host(host)).inventory
            leased = [s.under_lease for s in seen.servers if s.id == WEB] if seen else []
            return leased == [True] and (await self.standing(host)).lease_held

        await until("the server to run under a lease", so, SOON_SECONDS)

    async def until_writing(self) -> None:
        """Until its guest has acknowledged a hundred blocks more."""
        await self.outside.set_load(self.ip, disk_per_s=WRITES_PER_SECOND)
        before = (await self.outside.status(self.ip)).disk.acknowledged

        async def so() -> bool:
            return self.beats.disk_acknowledged > before + 100

        await until("the guest to write", so, SOON_SECONDS)

    async def copies(self) -> dict[HostId, ReplicaState]:
        volume = await self.client.volumes.volume(DISK)
        return {copy.host: copy.state for copy in volume.spec.copies}

    async def disk_is_whole(self, host: HostId, acknowledged: int) -> None:
        (volume,) = (self.datacentre.paths.node(host).state / "volumes").glob(f"*{WEB}*.raw")
        disk = await asyncio.to_thread(check_volume, volume, acknowledged, WEB)
        assert (disk.lost, disk.wrong) == (0, 0), disk

    # --- what has to hold ---

    async def outlives(self, host: HostId, fail: Callable[[], Awaitable[None]]) -> str:
        """The server is on `host`, which fails now; how long everything took, in words."""
        await self.until_under_lease(host)
        await self.until_writing()
        boot = (await self.outside.status(self.ip)).boot_id
        failed_at = time.time()
        await fail()
        terms = (await self.standing(host)).lease
        assert terms is not None
        answered_at = await self._answers(boot, LOST + UNHEARD + denial_seconds([terms]) + BOOT_SECONDS)
        acknowledged = self.beats.disk_acknowledged
        status = await self.outside.status(self.ip)
        assert status.disk.acknowledged >= acknowledged > 100
        place = await self.place()
        assert place != host
        copies = await self.copies()
        (current,) = (at for at, state in copies.items() if state is ReplicaState.CURRENT)
        await self.disk_is_whole(current, status.disk.acknowledged)
        assert copies[host] is ReplicaState.STALE
        return await self._told(host, failed_at, answered_at)

    async def _answers(self, boot: str, within_seconds: float) -> float:
        """When another boot than `boot` did."""

        async def so() -> bool:
            body = await self.outside.get(self.ip, "/", timeout=0.5)
            return body.decode().split()[1] != boot

        await until("the server to answer from elsewhere", so, within_seconds)
        return time.time()

    async def _told(self, host: HostId, failed_at: float, answered_at: float) -> str:
        at = {e.kind: e.at - failed_at for e in await self.client.events(0, 1000) if e.at >= failed_at}
        gone = [m.gone_at for m in self.monitors.all if m.host == host]
        assert gone and None not in gone, "what shall have ended by the lease still runs"
        ended = max(at or 0.0 for at in gone) - failed_at
        kinds = ("host.lost", "host.fenced", "server.restarted")
        parts = ", ".join(f"{kind} {at[kind]:.1f} s" for kind in kinds)
        return f"its VMM ended after {ended:.1f} s, {parts}, answers {answered_at - failed_at:.1f} s"

    async def comes_right(self, host: HostId) -> None:
        """It is back, and ran the server at no time beside another; both copies hold all that was written."""

        async def so() -> bool:
            standing, volume = await self.standing(host), await self.client.volumes.volume(DISK)
            return (
                (standing.state, standing.passed_over) == ("up", {})
                and volume.settled
                and len(volume.spec.current) == 2
                and (await self.client.server(WEB)).state is RunState.RUNNING
            )

        await self.until_writing()
        await until(f"{host} to be back, with every copy current", so, SOON_SECONDS)
        assert not self.monitors.overlaps(WEB)
        assert await self.place() == (await self.client.server(WEB)).host != host
        there = [m for m in self.monitors.all if m.host == host]
        assert there and not [m for m in there if m.alive]
        await self._is_whole_everywhere()

    async def _is_whole_everywhere(self) -> None:
        await self.outside.set_load(self.ip, disk_per_s=0)
        status = await self.outside.status(self.ip)
        assert (status.disk.errors, status.memory.errors) == (0, 0)
        copies = await self.copies()
        assert set(copies.values()) == {ReplicaState.CURRENT}
        for host in copies:
            await self.disk_is_whole(host, status.disk.acknowledged)


def _says(pid: int, *words: bytes) -> bool:
    """Whether its command line has all of them."""
    with suppress(OSError):
        return set(words) <= set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    return False


async def hear(beats: Heartbeats) -> None:
    """Until cancelled."""
    while True:
        now = time.monotonic()
        beats.keep_subscribed(now)
        beats.fetch(now, counted=True)
        await asyncio.sleep(0.01)


async def running_server(client: OperatorClient, releases: Sequence[Release]) -> str:
    """Its address; it has two copies of its disk, one where it runs."""
    for release in releases:
        await client.register_release(release.id)
    await client.availability.change(AvailabilityChange(lease_seconds=LEASE, lost_seconds=LOST))
    request = ServerRequest(
        name=WEB, memory_mib=128, host=HostId("host-1"), copies=2, on_host_failure=OnHostFailure.RESTART
    )
    return (await client.create_server(request)).ip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cloud() -> AsyncGenerator[Cloud]:
    async with opened(unique_name("hf"), SHAPE) as datacentre, datacentre.client as client:
        assert datacentre.topology is not None
        monitors = Monitors(datacentre.paths.run)
        releases = sorted(datacentre.build.movable_releases(), key=lambda r: r.version.split("."))
        ip = await running_server(client, releases)
        beats = within(datacentre.topology.client.namespace, lambda: Heartbeats(ip))
        beside = [asyncio.create_task(monitors.watch()), asyncio.create_task(hear(beats))]
        try:
            cloud = Cloud(datacentre, client, monitors, ip, beats, releases[-1].id)
            await cloud.outside.until_up(ip, timeout=BOOT_SECONDS)
            yield cloud
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            beats.close()


async def test_a_server_outlives_its_host_and_does_not_run_there_again(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    host = await cloud.place()

    async def fail() -> None:
        """The cable first: nobody is told of what dies behind it."""
        await cloud.empty_slowly(host)
        await cloud.cable(host, up=False)
        await cloud.power_off(host)

    told = await cloud.outlives(host, fail)
    with capsys.disabled():
        print(f"\n  no power: {told} (lease {LEASE:g} s, lost {LOST:g} s)")
    await cloud.power_on(host)
    await cloud.cable(host, up=True)
    await cloud.comes_right(host)
    await cloud.campaign_is_over()


async def test_a_host_that_is_cut_off_ends_its_server_in_time_without_agent_and_supervisor(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the keeper is left to end it: behind the cable its VMM and its storage daemon run on."""
    host = await cloud.place()

    async def fail() -> None:
        await cloud.agent(host, signal.SIGSTOP)
        os.kill(cloud.supervisor(host), signal.SIGKILL)
        await cloud.cable(host, up=False)

    try:
        told = await cloud.outlives(host, fail)
        with capsys.disabled():
            print(f"\n  cut off: {told} (lease {LEASE:g} s, lost {LOST:g} s)")
    finally:
        await cloud.cable(host, up=True)
        await cloud.power_on(host)
        await cloud.agent(host, signal.SIGCONT)
    await cloud.comes_right(host)
