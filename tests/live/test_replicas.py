"""A guest that writes to several copies at once loses them: daemons and hosts killed, hung, cut off. What the
agent does about it is the real thing (`DiskKeeper`); the orchestrator is a list that takes a moment to be
written."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from disk_guest import Guest, entered
from physical_host import Host, Place, release, server_on, volume_on

from nahtlos.lab.disk_check import check_volume
from nahtlos.model.config import ServerConfig, VolumeEndpoint
from nahtlos.model.errors import Conflict, Refused, Unavailable
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.storage import Changes, CopyPhase, ReplicaState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Ledger
from nahtlos.physical.agent.volumes.rejoin import check_ran_on, end_alike, never_ran, on_one_copy
from nahtlos.physical.agent.volumes.replicas import DiskKeeper, reached_by_copies
from nahtlos.physical.ports import Drivers, StorageDesired, VmmId
from nahtlos.wire.messages import Message
from nahtlos.wire.volumes import ReplicaLost, ReplicasRecorded

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
MIB = 1 << 20
RECORD_SECONDS = 0.03
"""What the orchestrator's record takes here."""
STILL_SECONDS = 0.1
"""For which a guest may stand still beside that."""
BUSY = 4
"""How many times longer everything may take on a machine that is busy with other tests."""
CUT_OFF_SECONDS = 2.2
GOES_ON_SECONDS = 10.0
WRITES_PER_S = 400


@dataclass(frozen=True)
class Stall:
    """Seconds for which the guest did not answer at all, and about for how long it could not write."""

    guest: float
    writes: float

    def __str__(self) -> str:
        return f"{self.guest:.3f} s (writes {self.writes:.1f} s)"


@dataclass
class Cloudlet:
    place: Place
    hosts: list[Host]
    server: ServerConfig
    guest: Guest
    ledger: Ledger
    lost: list[HostId] = field(default_factory=list[HostId])
    connected: bool = True
    said: list[str] = field(default_factory=list[str])

    @property
    def vmm(self) -> VmmId:
        return VmmId(self.server.spec.id, 1)

    @property
    def server_now(self) -> ServerConfig:
        held = self.ledger.owner(self.server.spec.id)
        assert held is not None
        return held.server

    def copies(self) -> tuple[HostId, ...]:
        held = self.ledger.owner(self.server.spec.id)
        assert held is not None
        return tuple(each.host for each in held.server.volume.copies)

    async def ask(self, body: Message, timeout: float) -> Message:
        if not self.connected:
            raise Unavailable("no orchestrator is connected")
        assert isinstance(body, ReplicaLost)
        assert body.epoch == 1
        await asyncio.sleep(RECORD_SECONDS)
        left = tuple(
            each
            for each in self.server.volume.copies
            if each.host not in self.lost and each.host != body.lost
        )
        if not left:
            raise Conflict(f"the copy on {body.lost} is the only current one", field="lost")
        self.lost.append(body.lost)
        return ReplicasRecorded(attachment=reached_by_copies(self.server.volume, left))

    def keeper(self) -> DiskKeeper:
        return DiskKeeper(self.context())

    def context(self) -> Context:
        host = self.hosts[0]
        drivers = Drivers(
            supervisor=host.supervisor,
            hypervisor=host.hypervisor,
            network=None,  # pyright: ignore[reportArgumentType]
            storage=host.storage,
        )
        return Context(
            settings=host.settings,
            drivers=drivers,
            ledger=self.ledger,
            transport=None,  # pyright: ignore[reportArgumentType]
            now=lambda: 0.0,
            emit=lambda event: self.said.append(f"{event.kind}: {event.text}"),
            changed=lambda: None,
            on_bug=_raise,
            ask=self.ask,
        )

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncGenerator[None]:
        task = asyncio.create_task(self.keeper().run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stands_still_for(self, act: Callable[[], object]) -> "Stall":
        """What `act` costs the guest."""
        with self.guest.pulse() as pulse:
            await asyncio.sleep(0.1)
            began, first = time.monotonic(), (await self.guest.disk())["acknowledged"]
            act()
            await asyncio.sleep(0.3)
            async with asyncio.timeout(GOES_ON_SECONDS):
                await self.guest.acknowledges(30)
                taken = time.monotonic() - began
            done = (await self.guest.disk())["acknowledged"] - first
        return Stall(guest=pulse.longest, writes=taken - done / WRITES_PER_S)

    async def reach(self, copies: tuple[VolumeEndpoint, ...]) -> None:
        server = msgspec.structs.replace(self.server, volume=reached_by_copies(self.server.volume, copies))
        await self.hosts[0].hypervisor.disks_reconcile(self.vmm, server)
        self.ledger.adopt(server)

    async def daemon(self, number: int) -> int:
        return await self.hosts[number].pid("qsd")


def _raise(error: BaseException) -> None:
    raise error


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("rep")
    try:
        with entered(place):
            yield place
    finally:
        for host in place.hosts:  # what they started is ended by a supervisor that runs
            if host.running.process.poll() is not None:
                await host.restart_supervisor()
        await place.close()


async def replicated(
    place: Place, copies: int, under: str = "10.0", prepared: Callable[[Host], None] = lambda host: None
) -> Cloudlet:
    hosts = [place.host(f"host-{number}") for number in range(1, copies + 1)]
    for host in hosts:
        prepared(host)
        await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "server-root"),)))
    server = server_on(hosts[0], "server")
    endpoints = tuple(
        VolumeEndpoint(
            host=host.settings.host,
            address=host.settings.address,
            port=host.settings.nbd_port,
            export="server-root.e1",
        )
        for host in hosts
    )
    server = msgspec.structs.replace(server, volume=reached_by_copies(server.volume, endpoints))
    ledger = Ledger(place.folder / "ledger.db")
    ledger.own(server)
    await hosts[0].plug(server)
    await hosts[0].hypervisor.start(server, release(under))
    guest = Guest(place, hosts[0], server)
    await guest.ready()
    await guest.writes(WRITES_PER_S)
    await guest.acknowledges(20)
    return Cloudlet(place, hosts, server, guest, ledger)


def lose_power(cloudlet: Cloudlet, number: int, daemon: int) -> Callable[[], None]:
    """All of a host's processes at once: nobody holds its sockets any more."""

    def act() -> None:
        os.kill(cloudlet.hosts[number].running.process.pid, signal.SIGKILL)
        os.kill(daemon, signal.SIGKILL)

    return act


async def until_in_step(host: Host, volume: VolumeId) -> None:
    async with asyncio.timeout(60):
        while (progress := await host.storage.relocate_progress(volume)).phase is not CopyPhase.READY:
            assert progress.phase is CopyPhase.COPYING, progress
            await asyncio.sleep(0.05)


def cut_off(place: Place, address: str) -> None:
    rules = (
        "add table inet cut",
        "add chain inet cut out { type filter hook output priority 0; }",
        f"add rule inet cut out ip daddr {address} drop",
        f"add rule inet cut out ip saddr {address} drop",
    )
    for rule in rules:
        subprocess.run(["ip", "netns", "exec", place.namespace, "nft", *rule.split()], check=True, timeout=10)


@pytest.mark.parametrize("under", ["10.0", "11.1"])
async def test_copies_are_lost_one_by_one_down_to_the_last(place: Place, under: str) -> None:
    cloudlet = await replicated(place, 3, under)
    bound = BUSY * (STILL_SECONDS + RECORD_SECONDS)
    async with cloudlet.kept():
        second, third = await cloudlet.daemon(1), await cloudlet.daemon(2)
        ridden_out = await cloudlet.stands_still_for(lambda: os.kill(second, signal.SIGKILL))
        assert cloudlet.lost == []
        assert ridden_out.guest < bound + 0.3

        dead = await cloudlet.stands_still_for(lose_power(cloudlet, 2, third))
        assert cloudlet.lost == [HostId("host-3")]
        assert cloudlet.copies() == (HostId("host-1"), HostId("host-2"))
        assert dead.guest < bound

        second = await cloudlet.daemon(1)
        hung = await cloudlet.stands_still_for(lambda: os.kill(second, signal.SIGSTOP))
        assert cloudlet.lost == [HostId("host-3"), HostId("host-2")]
        assert cloudlet.copies() == ()  # its address says where the only one is
        assert hung.guest < bound
        assert hung.writes < BUSY * CUT_OFF_SECONDS
        os.kill(second, signal.SIGCONT)

        first = await cloudlet.daemon(0)
        last = await cloudlet.stands_still_for(lambda: os.kill(first, signal.SIGKILL))
        assert cloudlet.lost == [HostId("host-3"), HostId("host-2")]
        assert (await cloudlet.guest.disk())["errors"] == 0
        written = await cloudlet.guest.verified()
    print(f"{under}: daemon {ridden_out}, host {dead}, hung {hung}, the only one {last}")
    found = check_volume(cloudlet.hosts[0].settings.state_dir / "volumes" / "server-root.raw", written)
    assert (found.lost, found.wrong) == (0, 0)


async def test_copy_that_is_cut_off_is_given_up_when_its_kernel_is_silent(place: Place) -> None:
    cloudlet = await replicated(place, 2)
    async with cloudlet.kept():
        still = await cloudlet.stands_still_for(lambda: cut_off(place, cloudlet.hosts[1].settings.address))
        print(f"cut off: {still}")
        assert still.writes < BUSY * CUT_OFF_SECONDS
        assert cloudlet.lost == [HostId("host-2")]
        assert (await cloudlet.guest.disk())["errors"] == 0
        await cloudlet.guest.verified()


async def test_without_an_orchestrator_the_server_waits_and_says_so(place: Place) -> None:
    cloudlet = await replicated(place, 2)
    cloudlet.connected = False
    daemon = await cloudlet.daemon(1)
    async with cloudlet.kept():
        lose_power(cloudlet, 1, daemon)()
        await asyncio.sleep(1.5)
        assert cloudlet.lost == []
        assert any("no orchestrator is connected" in each for each in cloudlet.said), cloudlet.said
    # That agent is killed; the next one finds what is to be done in the VMM.
    await cloudlet.hosts[0].restart_drivers()
    await cloudlet.hosts[0].hypervisor.observe()
    cloudlet.connected = True
    async with cloudlet.kept():
        await cloudlet.guest.acknowledges(30)
        assert cloudlet.lost == [HostId("host-2")]
        assert (await cloudlet.guest.disk())["errors"] == 0
        await cloudlet.guest.verified()


async def test_copy_is_rebuilt_under_the_writer_and_all_copies_are_the_same(place: Place) -> None:
    """The storage's and the disks' part of a rebuild, as its operation orders them."""
    cloudlet = await replicated(place, 2)
    one, two = cloudlet.hosts
    volume = volume_on(one, "server-root")
    async with cloudlet.kept():
        await cloudlet.stands_still_for(lose_power(cloudlet, 1, await cloudlet.daemon(1)))
        assert cloudlet.lost == [HostId("host-2")]
        await two.restart_supervisor()
        await two.restart_drivers()
        coming = msgspec.structs.replace(
            volume, host=HostId("host-2"), epoch=2, image=None, state=ReplicaState.STALE
        )
        await two.storage.receive(coming)
        target = VolumeEndpoint(
            host=HostId("host-2"),
            address=two.settings.address,
            port=two.settings.nbd_port,
            export="server-root.e2",
        )
        await one.storage.relocate_start(volume, target, bytes_per_second=0)
        await until_in_step(one, volume.id)
        source = cloudlet.server.volume.copies[0]
        joining = msgspec.structs.replace(target, joining=True)
        with cloudlet.guest.pulse() as pulse:
            await cloudlet.reach((source, joining))
            assert (await one.storage.relocate_progress(volume.id)).phase is CopyPhase.READY
            await one.storage.relocate_cancel(volume.id)
            await cloudlet.reach((source, target))
            await cloudlet.guest.acknowledges(50)
        print(f"joined: longest silence {pulse.longest:.3f} s")
        assert (await cloudlet.guest.disk())["errors"] == 0
        await cloudlet.guest.writes(0)
        await cloudlet.guest.verified()
        first = await one.storage.digest(volume.id, 0, volume.size_mib << 20)
        assert await two.storage.digest(volume.id, 0, volume.size_mib << 20) == first


async def test_a_server_that_writes_nothing_leaves_a_copy_that_is_shut_to_it(place: Place) -> None:
    """It has not noticed that its copy is gone. Its disk cannot flush any more, so it is not reopened while
    it runs; nobody's write is lost, nor does anybody see an error."""
    cloudlet = await replicated(place, 2)
    one, two = cloudlet.hosts
    await cloudlet.guest.writes(0)
    await two.storage.reconcile(StorageDesired(volumes=(volume_on(two, "server-root", epoch=2),)))
    await asyncio.wait_for(cloudlet.reach((cloudlet.server.volume.copies[0],)), GOES_ON_SECONDS)
    (status,) = await one.hypervisor.observe()
    assert (status.state, status.disk_problems) == (RunState.RUNNING, ())
    assert await one.hypervisor.disks_reconcile(cloudlet.vmm, cloudlet.server_now) == ()
    await cloudlet.guest.writes(WRITES_PER_S)
    await cloudlet.guest.acknowledges(50)
    assert (await cloudlet.guest.disk())["errors"] == 0
    await cloudlet.guest.writes(0)
    await cloudlet.guest.verified()


async def test_copy_comes_back_by_what_differs_under_the_writer(place: Place) -> None:
    """Its daemon does not know what it was written last; the server, which has run on, does."""
    cloudlet = await replicated(place, 2)
    one, two = cloudlet.hosts
    volume = volume_on(one, "server-root")
    context = cloudlet.context()
    for host in cloudlet.hosts:
        await host.storage.step_begin(volume.id, "2-a")
    assert await one.hypervisor.disks_settled(cloudlet.vmm, cloudlet.server)
    for host in cloudlet.hosts:
        await host.storage.step_reached(volume.id, "2-a")
    async with cloudlet.kept():
        source, gone = cloudlet.server.volume.copies
        await cloudlet.stands_still_for(lose_power(cloudlet, 1, await cloudlet.daemon(1)))
        await two.restart_supervisor()
        await two.restart_drivers()
        coming = msgspec.structs.replace(
            volume, host=HostId("host-2"), epoch=2, image=None, state=ReplicaState.STALE
        )
        changes = await two.storage.rejoin(coming)
        assert changes == Changes(since="2-a", ranges=None)
        await check_ran_on(context, cloudlet.server.spec.id, gone)
        target = msgspec.structs.replace(gone, export="server-root.e2")
        await one.storage.relocate_start(volume, target, bytes_per_second=0, changes=changes)
        await until_in_step(one, volume.id)
        copied = (await one.storage.relocate_progress(volume.id)).done
        with cloudlet.guest.pulse() as pulse:
            await cloudlet.reach((source, msgspec.structs.replace(target, joining=True)))
            assert (await one.storage.relocate_progress(volume.id)).phase is CopyPhase.READY
            await one.storage.relocate_cancel(volume.id)
            await cloudlet.reach((source, target))
            await cloudlet.guest.acknowledges(50)
        print(f"rejoined: {copied / MIB:.1f} of {volume.size_mib} MiB, longest silence {pulse.longest:.3f} s")
        assert 0 < copied < volume.size_mib * MIB / 4
        assert (await cloudlet.guest.disk())["errors"] == 0
        await cloudlet.guest.writes(0)
        await cloudlet.guest.verified()
        first = await one.storage.digest(volume.id, 0, volume.size_mib * MIB)
        assert await two.storage.digest(volume.id, 0, volume.size_mib * MIB) == first


async def test_server_whose_vmm_is_killed_goes_on_with_one_copy(place: Place) -> None:
    """What was on its way may be at one copy alone: that the other is stale is recorded before that."""
    cloudlet = await replicated(place, 2)
    one = cloudlet.hosts[0]
    pid = await one.pid(cloudlet.vmm.unit)
    os.kill(pid, signal.SIGKILL)
    await one.until_ended(cloudlet.vmm.unit)
    cloudlet.connected = False
    with pytest.raises(Unavailable):
        await on_one_copy(cloudlet.context(), cloudlet.server)
    cloudlet.connected = True
    alone = await on_one_copy(cloudlet.context(), cloudlet.server)
    assert cloudlet.lost == [HostId("host-2")]
    assert (alone.volume.copies, alone.volume.export) == ((), "server-root.e1")
    assert alone.volume.address == one.settings.address
    assert await on_one_copy(cloudlet.context(), alone) == alone


async def test_server_that_is_removed_while_it_writes_leaves_copies_that_are_alike(place: Place) -> None:
    cloudlet = await replicated(place, 2)
    one, two = cloudlet.hosts
    await end_alike(cloudlet.context(), cloudlet.server)
    await one.hypervisor.kill(cloudlet.vmm)
    assert cloudlet.lost == []
    assert never_ran(cloudlet.ledger, cloudlet.server.spec.id)
    volume = volume_on(one, "server-root")
    first = await one.storage.digest(volume.id, 0, volume.size_mib * MIB)
    assert await two.storage.digest(volume.id, 0, volume.size_mib * MIB) == first


async def test_client_of_an_older_epoch_is_shut_out(place: Place) -> None:
    """Whoever still has the volume open by the epoch before gets errors: its guest stands still, and what it
    would have written is not there."""
    cloudlet = await replicated(place, 2)
    cloudlet.connected = False
    for host in cloudlet.hosts:
        fenced = volume_on(host, "server-root", epoch=2)
        await host.storage.reconcile(StorageDesired(volumes=(fenced,)))
    async with asyncio.timeout(GOES_ON_SECONDS):
        while not (await cloudlet.hosts[0].hypervisor.observe())[0].disk_problems:
            await asyncio.sleep(0.05)
    with pytest.raises(Refused, match="not available"):
        await cloudlet.hosts[0].hypervisor.disks_reconcile(cloudlet.vmm, cloudlet.server)
    lost = await cloudlet.hosts[0].hypervisor.disks_check(cloudlet.vmm)
    assert [each.replica for each in lost if each.replica] == [HostId("host-1")]
    assert (await cloudlet.hosts[0].hypervisor.observe())[0].state is RunState.PAUSED
