"""What every hypervisor driver must do, whoever runs the guests: the promises of `physical.ports.Hypervisor`
that agents rely on. Each play runs on simulated hosts and, where it can, on real ones."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest
from hypervisor_worlds import WORLDS, Hosts, OneHost, Stage, stage_of
from rfb_viewer import RfbViewer

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Error, NotFound, Refused, Unavailable
from nahtlos.model.ids import ReleaseId, VolumeId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import CpuShare, ServerSpec, Size
from nahtlos.physical.ports import DisplayLine, MigrationPhase, Missing, StorageDesired, VmmId, VmmStatus

CONVERGES_WITHIN = 60.0
CANCELLED_WITHIN = 3.0
GIB = 1 << 30


@pytest.fixture(params=WORLDS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    return stage_of(request.param, tmp_path)


async def seen(host: OneHost, vmm: VmmId) -> VmmStatus | None:
    return next((v for v in await host.hypervisor.observe() if v.id == vmm), None)


async def state(host: OneHost, vmm: VmmId) -> RunState | None:
    status = await seen(host, vmm)
    return status.state if status else None


async def booted(hosts: Hosts) -> tuple[ServerConfig, VmmId]:
    server = hosts.server()
    await hosts.first.storage.reconcile(StorageDesired(volumes=(hosts.volume(server.volume.volume),)))
    await hosts.first.plug(server)
    await hosts.first.hypervisor.start(server, hosts.release)
    return server, VmmId(server.spec.id, server.epoch)


async def receiving(
    hosts: Hosts, server: ServerConfig, *, channels: int = 1, compressed: bool = False
) -> tuple[VmmId, str]:
    arriving = VmmId(server.spec.id, server.epoch + 1)
    await hosts.second.plug(server)
    for _ in range(2):
        await hosts.second.hypervisor.incoming_start(
            server, arriving.epoch, hosts.release, channels=channels, compressed=compressed
        )
    uris = [await hosts.second.hypervisor.incoming_listen(arriving, hosts.second.address) for _ in range(2)]
    assert uris[0] == uris[1]
    return arriving, uris[0]


async def sending(
    hosts: Hosts,
    vmm: VmmId,
    uri: str,
    *,
    slow_down: bool = False,
    channels: int = 1,
    compressed: bool = False,
) -> None:
    hypervisor, peer = hosts.first.hypervisor, hosts.second.name
    await hypervisor.migrate_start(
        vmm,
        uri,
        peer=peer,
        bandwidth=4 * GIB,
        slow_down=slow_down,
        channels=channels,
        compressed=compressed,
    )
    assert await hypervisor.migrate_in_flight(vmm) >= 0
    async with asyncio.timeout(CONVERGES_WITHIN):
        while True:
            progress = await hypervisor.migrate_progress(vmm)
            assert progress.phase is MigrationPhase.ACTIVE, progress
            if progress.passes >= 2 and progress.remaining <= 4 << 20:
                return
            await asyncio.sleep(0.002)


def test_a_server_boots_and_starting_it_again_changes_nothing(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, vmm = await booted(hosts)
        await hosts.first.hypervisor.start(server, hosts.release)
        found = await hosts.first.hypervisor.observe()
        assert [(v.id, v.state, v.release) for v in found] == [(vmm, RunState.RUNNING, hosts.release)]
        assert (found[0].migrated, found[0].sent, found[0].size) == (False, False, server.spec.size)
        for _ in range(2):
            await hosts.first.hypervisor.kill(vmm)
        assert await hosts.first.hypervisor.observe() == ()

    stage(play)


def test_a_move_is_held_by_its_source_and_ends_after_the_stop(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        arriving, uri = await receiving(hosts, server)
        assert await state(hosts.second, arriving) is RunState.INCOMING
        with pytest.raises(Refused):
            await hosts.second.hypervisor.resume(arriving)
        with pytest.raises(Unavailable):
            await hosts.second.hypervisor.incoming_wait(arriving, timeout=0.2)
        await sending(hosts, leaving, uri)
        assert await state(hosts.first, leaving) is RunState.RUNNING
        for bandwidth in (4 << 20, 4 << 20, 1 << 30):
            await hosts.first.hypervisor.migrate_pace(leaving, bandwidth)
        for _ in range(2):
            await hosts.first.hypervisor.pause(leaving)
        for _ in range(2):
            await hosts.second.hypervisor.incoming_wait(arriving, timeout=30.0)
        arrived = await seen(hosts.second, arriving)
        assert arrived is not None
        assert (arrived.state, arrived.migrated) == (RunState.PAUSED, True)
        for _ in range(2):
            await hosts.second.hypervisor.resume(arriving)
        sent = await seen(hosts.first, leaving)
        assert sent is not None
        assert (sent.state, sent.sent) == (RunState.PAUSED, True)
        running = await seen(hosts.second, arriving)
        assert running is not None
        assert (running.state, running.migrated, running.sent) == (RunState.RUNNING, False, False)
        await hosts.first.hypervisor.kill(leaving)

    stage(play)


def test_a_cancelled_move_leaves_the_server_and_can_be_begun_again(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        arriving, uri = await receiving(hosts, server)
        await sending(hosts, leaving, uri)
        for _ in range(2):
            await hosts.first.hypervisor.migrate_cancel(leaving)
        assert await state(hosts.first, leaving) is RunState.RUNNING
        with pytest.raises(Error):
            await hosts.second.hypervisor.incoming_wait(arriving, timeout=5.0)
        await hosts.second.hypervisor.kill(arriving)
        _, uri = await receiving(hosts, server)
        await sending(hosts, leaving, uri, slow_down=True)
        assert await state(hosts.first, leaving) is RunState.RUNNING

    stage(play)


@pytest.mark.parametrize(("channels", "compressed"), [(2, False), (1, True), (2, True)])
def test_a_stream_by_channels_of_its_own_is_given_more_bandwidth_and_a_slower_server(
    stage: Stage, channels: int, compressed: bool
) -> None:
    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        rate = await hosts.first.hypervisor.dirty_rate(leaving)
        assert rate is not None
        assert rate >= 0
        arriving, uri = await receiving(hosts, server, channels=channels, compressed=compressed)
        await sending(hosts, leaving, uri, slow_down=True, channels=channels, compressed=compressed)
        for _ in range(2):
            await hosts.first.hypervisor.migrate_pace(leaving, 512 << 20)
            await hosts.first.hypervisor.migrate_slow_down(leaving)
        assert await state(hosts.first, leaving) is RunState.RUNNING
        await hosts.first.hypervisor.pause(leaving)
        await hosts.second.hypervisor.incoming_wait(arriving, timeout=30.0)
        await hosts.second.hypervisor.resume(arriving)
        assert await state(hosts.second, arriving) is RunState.RUNNING
        await hosts.first.hypervisor.kill(leaving)

    stage(play)


async def handed_over(hosts: Hosts) -> tuple[VmmId, VmmId]:
    """By post-copy, with most of its memory still to follow. It may run there, and is not told to yet."""
    server, leaving = await booted(hosts)
    arriving = VmmId(server.spec.id, server.epoch + 1)
    first, second = hosts.first.hypervisor, hosts.second.hypervisor
    await hosts.second.plug(server)
    await second.incoming_start(server, arriving.epoch, hosts.release, post_copy=True)
    uri = await second.incoming_listen(arriving, hosts.second.address)
    await first.migrate_start(leaving, uri, peer=hosts.second.name, bandwidth=2 << 20, post_copy=True)
    for _ in range(2):
        await first.migrate_post_copy(leaving)
    await asyncio.sleep(0.5)
    assert await state(hosts.first, leaving) is RunState.RUNNING
    assert (await first.migrate_progress(leaving)).phase is MigrationPhase.ACTIVE
    with pytest.raises(Refused):
        await second.incoming_recover(arriving, hosts.second.address)
    await first.pause(leaving)
    await second.incoming_wait(arriving, timeout=30.0)
    arrived = await seen(hosts.second, arriving)
    assert arrived is not None
    assert (arrived.state, arrived.migrated, arrived.missing) == (RunState.PAUSED, True, Missing.COMING)
    return leaving, arriving


async def known_as_cut(host: OneHost, arriving: VmmId) -> None:
    """And stays so until it is killed."""
    async with asyncio.timeout(CANCELLED_WITHIN + 5.0):
        while (left := await seen(host, arriving)) and left.missing is not Missing.CUT:
            await asyncio.sleep(0.05)
    again = await seen(host, arriving)
    assert left is not None and again is not None
    assert again.arrived == left.arrived
    await host.hypervisor.kill(arriving)
    assert await seen(host, arriving) is None


def test_a_server_runs_before_its_memory_is_there_and_what_was_cut_is_taken_up(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        if await hosts.second.hypervisor.why_no_post_copy():
            pytest.skip("no userfaultfd")
        leaving, arriving = await handed_over(hosts)
        first, second = hosts.first.hypervisor, hosts.second.hypervisor
        await second.resume(arriving)
        assert (await first.migrate_progress(leaving)).phase is MigrationPhase.POST_COPY
        with pytest.raises(Refused):
            await first.resume(leaving)
        await first.migrate_cancel(leaving)
        sent = await seen(hosts.first, leaving)
        assert sent is not None
        assert (sent.state, sent.sent) == (RunState.PAUSED, True)
        for _ in range(2):
            uri = await second.incoming_recover(arriving, hosts.second.address)
            await first.migrate_recover(leaving, uri)
        await first.migrate_pace(leaving, 1 << 30)
        async with asyncio.timeout(CONVERGES_WITHIN):
            while (await first.migrate_progress(leaving)).phase is not MigrationPhase.COMPLETED:
                await asyncio.sleep(0.02)
            while (running := await seen(hosts.second, arriving)) and running.missing:
                await asyncio.sleep(0.02)
        assert running is not None
        assert running.state is RunState.RUNNING
        await first.kill(leaving)
        assert await state(hosts.second, arriving) is RunState.RUNNING

    stage(play)


def test_a_source_that_dies_before_all_memory_has_followed_is_told(
    stage: Stage,
) -> None:
    async def play(hosts: Hosts) -> None:
        if await hosts.second.hypervisor.why_no_post_copy():
            pytest.skip("no userfaultfd")
        leaving, arriving = await handed_over(hosts)
        await hosts.second.hypervisor.resume(arriving)
        await hosts.first.kill_vmm(leaving)
        await known_as_cut(hosts.second, arriving)

    stage(play)


def test_a_source_that_dies_before_the_server_was_let_run_is_told(stage: Stage) -> None:
    """To let it run may take pages of its memory: QEMU waits for them then, and does not answer."""

    async def play(hosts: Hosts) -> None:
        if await hosts.second.hypervisor.why_no_post_copy():
            pytest.skip("no userfaultfd")
        leaving, arriving = await handed_over(hosts)
        await hosts.first.kill_vmm(leaving)
        with suppress(Unavailable):
            await hosts.second.hypervisor.resume(arriving)
        await known_as_cut(hosts.second, arriving)

    stage(play)


def test_a_stopped_source_that_is_cancelled_runs_again(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        _server, vmm = await booted(hosts)
        await hosts.first.hypervisor.pause(vmm)
        assert await state(hosts.first, vmm) is RunState.PAUSED
        await hosts.first.hypervisor.migrate_cancel(vmm)
        await hosts.first.hypervisor.resume(vmm)
        assert await state(hosts.first, vmm) is RunState.RUNNING

    stage(play)


def test_a_link_that_stalls_is_not_told_and_a_cancelled_move_ends_at_once(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        arriving, uri = await receiving(hosts, server)
        await sending(hosts, leaving, uri)
        await hosts.second.stall_vmm(arriving)
        await asyncio.sleep(1.0)
        progress = await hosts.first.hypervisor.migrate_progress(leaving)
        assert progress.phase is MigrationPhase.ACTIVE
        async with asyncio.timeout(CANCELLED_WITHIN):
            await hosts.first.hypervisor.migrate_cancel(leaving)
        assert await state(hosts.first, leaving) is RunState.RUNNING
        await hosts.second.kill_vmm(arriving)
        await hosts.second.hypervisor.kill(arriving)

    stage(play)


def test_a_source_that_dies_takes_its_guest_along_and_nothing_arrives(stage: Stage) -> None:
    """As any crash of it: what it had written is on its disk, and it is started again from there."""

    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        arriving, uri = await receiving(hosts, server)
        await sending(hosts, leaving, uri)
        await hosts.first.kill_vmm(leaving)
        with pytest.raises(Error):
            await hosts.second.hypervisor.incoming_wait(arriving, timeout=2.0)
        with pytest.raises(Error):
            await hosts.second.hypervisor.resume(arriving)
        await hosts.second.hypervisor.kill(arriving)
        assert await state(hosts.first, leaving) is RunState.CRASHED
        await hosts.first.hypervisor.kill(leaving)
        await hosts.first.hypervisor.start(server, hosts.release)
        assert await state(hosts.first, leaving) is RunState.RUNNING

    stage(play)


def test_another_machine_is_refused_and_the_right_one_is_moved_to_afterwards(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        spec = server.spec
        alias = msgspec.structs.replace(spec, machine="q35")
        await hosts.second.plug(server)
        with pytest.raises(Refused, match="q35"):
            await hosts.second.hypervisor.incoming_start(of(server, alias), 2, hosts.release)
        larger = Size(vcpus=spec.size.vcpus, memory_mib=spec.size.memory_mib + 64)
        for wrong in (
            msgspec.structs.replace(spec, size=larger),
            msgspec.structs.replace(spec, machine="pc-q35-7.2"),
        ):
            arriving, uri = await receiving(hosts, of(server, wrong))
            assert await fails(hosts.first, leaving, uri, hosts.second.name)
            assert await state(hosts.first, leaving) is RunState.RUNNING
            await hosts.second.hypervisor.kill(arriving)
        _, uri = await receiving(hosts, server)
        await sending(hosts, leaving, uri)
        assert await state(hosts.first, leaving) is RunState.RUNNING

    stage(play)


def of(server: ServerConfig, spec: ServerSpec) -> ServerConfig:
    return msgspec.structs.replace(server, spec=spec)


async def fails(host: OneHost, vmm: VmmId, uri: str, peer: str) -> bool:
    """At once, or as soon as the destination has looked at what comes."""
    try:
        await host.hypervisor.migrate_start(vmm, uri, peer=peer, bandwidth=GIB)
        async with asyncio.timeout(10.0):
            while (found := await host.hypervisor.migrate_progress(vmm)).phase is MigrationPhase.ACTIVE:
                await asyncio.sleep(0.01)
    except Refused:
        return True
    return found.phase is MigrationPhase.FAILED


def test_a_destination_that_dies_fails_the_move_and_nothing_else(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, leaving = await booted(hosts)
        arriving, uri = await receiving(hosts, server)
        await sending(hosts, leaving, uri)
        await hosts.second.kill_vmm(arriving)
        async with asyncio.timeout(5.0):
            while (await hosts.first.hypervisor.migrate_progress(leaving)).phase is MigrationPhase.ACTIVE:
                await asyncio.sleep(0.01)
        assert await state(hosts.first, leaving) is RunState.RUNNING
        assert await state(hosts.second, arriving) is RunState.CRASHED
        with pytest.raises(Error):
            await hosts.second.hypervisor.incoming_wait(arriving, timeout=1.0)
        await hosts.second.hypervisor.kill(arriving)
        assert await seen(hosts.second, arriving) is None
        _, uri = await receiving(hosts, server)
        await sending(hosts, leaving, uri)

    stage(play)


def test_a_vmm_that_was_killed_is_seen_as_crashed_until_it_is_cleared_away(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        _server, vmm = await booted(hosts)
        await hosts.first.kill_vmm(vmm)
        async with asyncio.timeout(5.0):
            while await state(hosts.first, vmm) is not RunState.CRASHED:
                await asyncio.sleep(0.01)
        with pytest.raises(Error):
            await hosts.first.hypervisor.resume(vmm)
        await hosts.first.hypervisor.kill(vmm)
        assert await seen(hosts.first, vmm) is None

    stage(play)


def test_what_is_impossible_is_refused(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, vmm = await booted(hosts)
        unknown = VmmId(VolumeId("nobody"), 1)  # type: ignore[arg-type]
        with pytest.raises(NotFound):
            await hosts.first.hypervisor.pause(unknown)
        with pytest.raises(NotFound):
            await hosts.first.hypervisor.resume(unknown)
        await hosts.first.hypervisor.kill(unknown)
        with pytest.raises(Refused):
            await hosts.second.hypervisor.start(server, ReleaseId("qemu-0.0.0-000000000000"))
        with pytest.raises(Error):
            await hosts.second.hypervisor.start(server, hosts.release)  # no tap
        with pytest.raises(Error):
            await hosts.first.hypervisor.migrate_start(
                vmm, "tcp:127.0.0.1:1", peer=hosts.second.name, bandwidth=GIB
            )
        assert await state(hosts.first, vmm) is RunState.RUNNING

    stage(play)


def test_a_running_server_is_given_vcpus_and_a_share_and_keeps_them(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        plain = hosts.server()
        boot = plain.spec.size.memory_mib
        spec = msgspec.structs.replace(
            plain.spec, max_vcpus=3, boot_memory_mib=boot, max_memory_mib=boot + 128, cpu=CpuShare(weight=200)
        )
        server = msgspec.structs.replace(plain, spec=spec)
        vmm = VmmId(spec.id, server.epoch)
        await hosts.first.storage.reconcile(StorageDesired(volumes=(hosts.volume(server.volume.volume),)))
        await hosts.first.plug(server)
        await hosts.first.hypervisor.start(server, hosts.release)
        assert await compute(hosts.first, vmm) == (1, boot, CpuShare(weight=200))
        size, share = Size(vcpus=2, memory_mib=boot), CpuShare(quota=150, weight=50)
        server = msgspec.structs.replace(server, spec=msgspec.structs.replace(spec, size=size, cpu=share))
        assert len(await hosts.first.hypervisor.compute_reconcile(vmm, server)) == 2
        assert await hosts.first.hypervisor.compute_reconcile(vmm, server) == ()
        assert await compute(hosts.first, vmm) == (2, boot, share)
        for wrong in (Size(vcpus=4, memory_mib=boot), Size(vcpus=2, memory_mib=boot - 4)):
            asked = msgspec.structs.replace(server, spec=msgspec.structs.replace(spec, size=wrong))
            with pytest.raises(Refused):
                await hosts.first.hypervisor.compute_reconcile(vmm, asked)
        assert await compute(hosts.first, vmm) == (2, boot, share)
        with pytest.raises(NotFound):
            await hosts.first.hypervisor.compute_reconcile(VmmId(spec.id, 9), server)

    stage(play)


async def compute(host: OneHost, vmm: VmmId) -> tuple[int, int, CpuShare]:
    status = await seen(host, vmm)
    assert status is not None
    assert status.compute.waits_for == ""
    return status.compute.vcpus, status.compute.memory_mib, status.compute.cpu


def test_a_server_without_places_to_plug_has_no_way_to_more(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server, vmm = await booted(hosts)
        size = server.spec.size
        for wrong in (Size(vcpus=2, memory_mib=size.memory_mib), Size(vcpus=1, memory_mib=2048)):
            asked = msgspec.structs.replace(server, spec=msgspec.structs.replace(server.spec, size=wrong))
            with pytest.raises(Refused) as refused:
                await hosts.first.hypervisor.compute_reconcile(vmm, asked)
            assert refused.value.remedy
        assert await compute(hosts.first, vmm) == (size.vcpus, size.memory_mib, CpuShare())

    stage(play)


def test_the_console_can_be_read_from_anywhere(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        _server, vmm = await booted(hosts)
        async with asyncio.timeout(90.0):
            while len((await hosts.first.hypervisor.console(vmm, 0, 100))[0]) < 8:
                await asyncio.sleep(0.05)
        whole, end = await hosts.first.hypervisor.console(vmm, 0, 8)
        assert (len(whole), end) == (8, 8)
        assert await hosts.first.hypervisor.console(vmm, 2, 3) == (whole[2:5], 5)
        past, _ = await hosts.first.hypervisor.console(vmm, 1 << 40, 8)
        assert past == b""

    stage(play)


def test_what_a_console_has_said_stays_when_its_vmm_ends_and_goes_on_when_it_starts_again(
    stage: Stage,
) -> None:
    async def play(hosts: Hosts) -> None:
        server, vmm = await booted(hosts)
        hypervisor = hosts.first.hypervisor

        async def said_after(offset: int) -> int:
            async with asyncio.timeout(90.0):
                while await hypervisor.console_size(vmm) < offset + 8:
                    await asyncio.sleep(0.05)
            return await hypervisor.console_size(vmm)

        await said_after(0)
        await hypervisor.kill(vmm)
        size = await hypervisor.console_size(vmm)
        first, _ = await hypervisor.console(vmm, 0, size)
        await hypervisor.start(server, hosts.release)
        await said_after(size)
        assert (await hypervisor.console(vmm, 0, size))[0] == first
        await hypervisor.kill(vmm)
        for _ in range(2):
            await hypervisor.console_forget(vmm)
        assert await hypervisor.console_size(vmm) == 0

    stage(play)


@asynccontextmanager
async def looking(hosts: Hosts, vmm: VmmId) -> AsyncGenerator[tuple[RfbViewer, DisplayLine]]:
    """A viewer at a display of the first host, for a minute at most."""
    line = await hosts.first.hypervisor.display_open(vmm)
    held = bytearray()

    async def read(count: int) -> bytes:
        while len(held) < count:
            data = await line.read(65536)
            assert data, "the display has ended"
            held.extend(data)
        taken = bytes(held[:count])
        del held[:count]
        return taken

    viewer = RfbViewer(read, line.write)
    try:
        async with asyncio.timeout(60.0):
            await viewer.begin()
            yield viewer, line
    finally:
        await line.close()


def test_a_display_is_shown_to_several_and_ends_with_its_vmm(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server = hosts.server()
        spec = msgspec.structs.replace(server.spec, display=True)
        server = msgspec.structs.replace(server, spec=spec)
        await hosts.first.storage.reconcile(StorageDesired(volumes=(hosts.volume(server.volume.volume),)))
        await hosts.first.plug(server)
        await hosts.first.hypervisor.start(server, hosts.release)
        vmm = VmmId(server.spec.id, server.epoch)
        async with looking(hosts, vmm) as (first, line), looking(hosts, vmm) as (second, _line):
            for viewer in (first, second):
                await viewer.ask()
                assert len(await viewer.update()) == viewer.size[1]
            await hosts.first.hypervisor.kill(vmm)
            while await line.read(65536):
                pass

    stage(play)


def test_a_server_without_a_display_shows_none(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        _server, vmm = await booted(hosts)
        with pytest.raises(Refused):
            await hosts.first.hypervisor.display_open(vmm)

    stage(play)
