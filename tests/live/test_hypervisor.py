"""The QEMU driver on real releases and the real guest: boots, moves in both directions between releases,
agents that come and go, destinations that die. Two hosts with a supervisor each share a namespace."""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from physical_host import Host, Place, release, server_on, volume_on

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import ReleaseId
from nahtlos.model.inventory import RunState
from nahtlos.physical.ports import MigrationPhase, StorageDesired, VmmId, VmmStatus

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
BOOTS_WITHIN = 90.0
CONVERGES_WITHIN = 60.0


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("hyp")
    try:
        yield place
    finally:
        await place.close()


async def booted(host: Host, name: str, under: ReleaseId) -> ServerConfig:
    server = server_on(host, name)
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, f"{name}-root"),)))
    await host.plug(server)
    await host.hypervisor.start(server, under)
    await console_says(host, VmmId(server.spec.id, server.epoch), "boot ")
    return server


async def console_says(host: Host, vmm: VmmId, text: str, *, since: int = 0) -> str:
    async with asyncio.timeout(BOOTS_WITHIN):
        while True:
            data, _ = await host.hypervisor.console(vmm, since, 1 << 20)
            if text in data.decode(errors="replace"):
                return data.decode(errors="replace")
            await asyncio.sleep(0.05)


async def guest_status(host: Host, vmm: VmmId) -> dict[str, Any]:
    """What the guest says of itself on its console, asked again where its kernel spoke in between."""
    async with asyncio.timeout(20):
        while True:
            _, offset = await host.hypervisor.console(vmm, 0, 1 << 20)
            await host.hypervisor.console_write(vmm, b"status\n")
            with suppress(ValueError):
                return json.loads(await _in_braces(host, vmm, offset))


async def _in_braces(host: Host, vmm: VmmId, offset: int) -> bytes:
    while True:
        data, _ = await host.hypervisor.console(vmm, offset, 1 << 20)
        found = re.search(rb"\{.*\}\s", data, re.DOTALL)
        if found:
            return found.group()
        await asyncio.sleep(0.05)


async def status(host: Host, vmm: VmmId) -> VmmStatus | None:
    return next((found for found in await host.hypervisor.observe() if found.id == vmm), None)


async def known_status(host: Host, vmm: VmmId) -> VmmStatus:
    found = await status(host, vmm)
    assert found is not None
    return found


async def prepared(server: ServerConfig, to: Host, under: ReleaseId) -> tuple[VmmId, str]:
    arriving = VmmId(server.spec.id, server.epoch + 1)
    await to.plug(server)
    await to.hypervisor.incoming_start(server, arriving.epoch, under)
    return arriving, await to.hypervisor.incoming_listen(arriving, to.settings.address)


async def converged(host: Host, vmm: VmmId) -> None:
    async with asyncio.timeout(CONVERGES_WITHIN):
        while True:
            progress = await host.hypervisor.migrate_progress(vmm)
            assert progress.phase is MigrationPhase.ACTIVE, progress
            if progress.passes >= 2 and progress.remaining <= 4 << 20:
                return
            await asyncio.sleep(0.002)


async def moved(server: ServerConfig, source: Host, to: Host, under: ReleaseId) -> VmmId:
    """The driver's part of a move, as the two agents order it."""
    leaving = VmmId(server.spec.id, server.epoch)
    arriving, uri = await prepared(server, to, under)
    await source.hypervisor.migrate_start(leaving, uri, peer=to.settings.host, bandwidth=0)
    await converged(source, leaving)
    assert (await known_status(source, leaving)).state is RunState.RUNNING
    await source.hypervisor.pause(leaving)
    await to.hypervisor.incoming_wait(arriving, timeout=30)
    assert (await known_status(to, arriving)).migrated
    await to.hypervisor.resume(arriving)
    assert (await known_status(source, leaving)).sent
    await source.hypervisor.kill(leaving)
    return arriving


async def test_boots_moves_to_the_next_release_and_back_with_the_same_guest(place: Place) -> None:
    old, new = release("10.0"), release("11.1")
    one, two = place.host("host-1"), place.host("host-2")
    server = await booted(one, "wanderer", old)
    first = VmmId(server.spec.id, 1)
    before = await guest_status(one, first)
    assert (await known_status(one, first)).release == old

    second = await moved(server, one, two, new)
    assert await status(one, first) is None
    assert not list(one.settings.ram_dir.iterdir())
    there = await known_status(two, second)
    assert (there.state, there.release, there.migrated) == (RunState.RUNNING, new, False)
    after = await guest_status(two, second)
    assert after["boot_id"] == before["boot_id"]
    assert after["uptime_ms"] > before["uptime_ms"]
    assert after["memory"]["errors"] == 0

    server = ServerConfig(spec=server.spec, epoch=2, volume=server.volume)
    await one.supervisor.drop_fd(f"tap.{server.spec.ports[0].id}")
    third = await moved(server, two, one, old)
    home = await guest_status(one, third)
    assert home["boot_id"] == before["boot_id"]
    assert home["memory"]["errors"] == home["disk"]["errors"] == 0


async def test_next_agent_finds_running_servers_and_commands_them(place: Place) -> None:
    host = place.host("host-1")
    server = await booted(host, "stayer", release("10.0"))
    vmm = VmmId(server.spec.id, 1)
    pid = await host.pid(vmm.unit)
    await host.restart_drivers()
    found = await known_status(host, vmm)
    assert found.state is RunState.RUNNING
    assert found.size == server.spec.size
    await host.hypervisor.start(server, release("10.0"))
    assert await host.pid(vmm.unit) == pid
    await host.hypervisor.pause(vmm)
    assert (await known_status(host, vmm)).state is RunState.PAUSED
    await host.hypervisor.resume(vmm)
    assert (await known_status(host, vmm)).state is RunState.RUNNING


async def test_killed_destination_leaves_the_source_running_and_free_for_another_try(place: Place) -> None:
    one, two = place.host("host-1"), place.host("host-2")
    server = await booted(one, "patient", release("10.0"))
    vmm = VmmId(server.spec.id, 1)
    arriving, uri = await prepared(server, two, release("11.1"))
    await one.hypervisor.migrate_start(vmm, uri, peer="host-2", bandwidth=8 << 20)
    await two.hypervisor.kill(arriving)
    async with asyncio.timeout(10):
        while True:
            progress = await one.hypervisor.migrate_progress(vmm)
            if progress.phase is MigrationPhase.FAILED:
                break
            await asyncio.sleep(0.01)
    assert progress.error
    assert (await known_status(one, vmm)).state is RunState.RUNNING
    await two.supervisor.drop_fd(f"tap.{server.spec.ports[0].id}")
    arrived = await moved(server, one, two, release("11.1"))
    assert (await guest_status(two, arrived))["memory"]["errors"] == 0


async def test_cancelled_move_leaves_everything_as_before(place: Place) -> None:
    one, two = place.host("host-1"), place.host("host-2")
    server = await booted(one, "undecided", release("11.1"))
    vmm = VmmId(server.spec.id, 1)
    arriving, uri = await prepared(server, two, release("11.1"))
    await one.hypervisor.migrate_start(vmm, uri, peer="host-2", bandwidth=8 << 20)
    await one.hypervisor.migrate_cancel(vmm)
    await one.hypervisor.migrate_cancel(vmm)
    assert (await one.hypervisor.migrate_progress(vmm)).phase is MigrationPhase.CANCELLED
    assert (await known_status(one, vmm)).state is RunState.RUNNING
    with pytest.raises(Refused, match="stream failed"):
        await two.hypervisor.incoming_wait(arriving, timeout=10)
    await two.hypervisor.kill(arriving)
    await two.hypervisor.kill(arriving)


async def test_source_that_was_stopped_takes_the_server_back(place: Place) -> None:
    """The destination died after everything was sent and before it ran: the source's copy is the only one."""
    one, two = place.host("host-1"), place.host("host-2")
    server = await booted(one, "returner", release("10.0"))
    vmm = VmmId(server.spec.id, 1)
    arriving, uri = await prepared(server, two, release("11.1"))
    await one.hypervisor.migrate_start(vmm, uri, peer="host-2", bandwidth=0)
    await converged(one, vmm)
    await one.hypervisor.pause(vmm)
    await two.hypervisor.incoming_wait(arriving, timeout=30)
    await two.hypervisor.kill(arriving)
    await one.hypervisor.migrate_cancel(vmm)
    await one.hypervisor.resume(vmm)
    found = await known_status(one, vmm)
    assert (found.state, found.sent) == (RunState.RUNNING, False)
    assert (await guest_status(one, vmm))["memory"]["errors"] == 0


async def test_stream_to_the_wrong_host_is_refused_at_once(place: Place) -> None:
    one, two = place.host("host-1"), place.host("host-2")
    server = await booted(one, "careful", release("10.0"))
    vmm = VmmId(server.spec.id, 1)
    _, uri = await prepared(server, two, release("10.0"))
    with pytest.raises(Refused, match="failed at once"):
        await one.hypervisor.migrate_start(vmm, uri, peer="host-3", bandwidth=0)
    assert (await known_status(one, vmm)).state is RunState.RUNNING


async def test_waiting_destination_must_not_be_resumed_and_may_be_asked_again(place: Place) -> None:
    one = place.host("host-1")
    server = server_on(one, "waiting")
    await one.storage.reconcile(StorageDesired(volumes=(volume_on(one, "waiting-root"),)))
    arriving, uri = await prepared(server, one, release("11.1"))
    assert (await known_status(one, arriving)).state is RunState.INCOMING
    with pytest.raises(Refused, match="not received"):
        await one.hypervisor.resume(arriving)
    await one.restart_drivers()
    await one.hypervisor.incoming_start(server, arriving.epoch, release("11.1"))
    assert await one.hypervisor.incoming_listen(arriving, one.settings.address) == uri


async def test_crashed_vmm_is_reported_and_started_anew(place: Place) -> None:
    host = place.host("host-1")
    server = await booted(host, "faller", release("11.1"))
    vmm = VmmId(server.spec.id, 1)
    first = (await guest_status(host, vmm))["boot_id"]
    os.kill(await host.pid(vmm.unit), 9)
    async with asyncio.timeout(5):
        while True:
            if (await known_status(host, vmm)).state is RunState.CRASHED:
                break
            await asyncio.sleep(0.01)
    _, said = await host.hypervisor.console(vmm, 0, 1 << 20)
    await host.hypervisor.start(server, release("11.1"))
    await console_says(host, vmm, "boot ", since=said)
    assert (await guest_status(host, vmm))["boot_id"] != first


async def test_release_is_verified_by_booting_and_the_choice_is_remembered(place: Place) -> None:
    host = place.host("host-1")
    assert set(await host.hypervisor.releases()) >= {release("10.0"), release("11.1")}
    chosen = await host.hypervisor.verify(release("11.1"))
    assert chosen.name in ("kvm", "tcg")
    assert chosen.reason
    began = time.monotonic()
    assert (await host.hypervisor.verify(release("11.1"))).name == chosen.name
    assert time.monotonic() - began < 20  # KVM's deadline is not waited for again
    assert not [name for name in await host.supervisor.units() if name.startswith("probe.")]


async def test_unfit_requests_are_refused_by_name_and_change_nothing(place: Place) -> None:
    host = place.host("host-1")
    server = server_on(host, "unfit")
    with pytest.raises(NotFound, match=r"'qemu-9\.9\.9-000000000000'"):
        await host.hypervisor.start(server, ReleaseId("qemu-9.9.9-000000000000"))
    with pytest.raises(Refused, match=r"tap\.unfit-p"):
        await host.hypervisor.start(server, release("10.0"))
    await host.plug(server)
    (host.settings.pki_dir / "client-key.pem").unlink()
    with pytest.raises(Refused, match=r"client-key\.pem"):
        await host.hypervisor.start(server, release("10.0"))
    assert await host.hypervisor.observe() == ()
