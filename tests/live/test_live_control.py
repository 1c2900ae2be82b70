"""A running server is given more and less, in the real guest under real releases, and keeps that in moves."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from physical_host import Host, Place, release, server_on, volume_on
from test_hypervisor import console_says, guest_status, known_status, moved

from nahtlos.model.config import ServerConfig
from nahtlos.model.errors import Refused
from nahtlos.model.ids import ReleaseId
from nahtlos.model.inventory import RunState
from nahtlos.model.nouns import CpuShare, Size
from nahtlos.physical.ports import StorageDesired, VmmId

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]
GUEST_WITHIN = 20.0


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place("ctl")
    try:
        yield place
    finally:
        await place.close()


def given(server: ServerConfig, **fields: Any) -> ServerConfig:
    size = {name: fields.pop(name) for name in ("vcpus", "memory_mib") if name in fields}
    spec = msgspec.structs.replace(server.spec, size=msgspec.structs.replace(server.spec.size, **size))
    return msgspec.structs.replace(server, spec=msgspec.structs.replace(spec, **fields))


async def begun(host: Host, under: ReleaseId, **fields: Any) -> ServerConfig:
    places = {"max_vcpus": 4, "boot_memory_mib": 256, "max_memory_mib": 768, **fields}
    server = given(server_on(host, "grower"), **places)
    await host.storage.reconcile(StorageDesired(volumes=(volume_on(host, "grower-root"),)))
    await host.plug(server)
    await host.hypervisor.start(server, under)
    return server


class Control:
    """Of the one server."""

    def __init__(self, host: Host, server: ServerConfig) -> None:
        self.host, self.server = host, server

    @property
    def vmm(self) -> VmmId:
        return VmmId(self.server.spec.id, self.server.epoch)

    async def set(self, **fields: Any) -> tuple[str, ...]:
        """Until all of it is there."""
        self.server = given(self.server, **fields)
        texts = await self.host.hypervisor.compute_reconcile(self.vmm, self.server)
        async with asyncio.timeout(GUEST_WITHIN):
            while (await known_status(self.host, self.vmm)).compute.waits_for:
                await asyncio.sleep(0.05)
        await self.is_as_asked()
        return texts

    async def is_as_asked(self) -> None:
        compute = (await known_status(self.host, self.vmm)).compute
        assert Size(vcpus=compute.vcpus, memory_mib=compute.memory_mib) == self.server.spec.size
        assert (compute.cpu, compute.waits_for) == (self.server.spec.cpu, "")

    async def guest(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What it says of itself, once that is so."""
        async with asyncio.timeout(GUEST_WITHIN):
            while not holds(status := await guest_status(self.host, self.vmm)):
                await asyncio.sleep(0.05)
        return status


async def test_what_a_server_is_given_holds_in_its_guest_and_in_the_next_vmm(place: Place) -> None:
    """From 11.1 to 10.0: a vCPU that was let go of must not be asked anything as the next VMM takes over."""
    host, old = place.host("host-1"), release("10.0")
    control = Control(host, await begun(host, release("11.1")))
    await console_says(host, control.vmm, "boot ")
    before = await control.guest(lambda said: said["cpu"]["online"] == 1)
    for vcpus in (3, 2):
        assert await control.set(vcpus=vcpus)
        await control.guest(lambda said, wanted=vcpus: said["cpu"]["online"] == wanted)
    assert await control.set(memory_mib=512)
    small = before["memory"]["total_mib"]
    await control.guest(lambda said: said["memory"]["total_mib"] > small + 240)
    assert await control.set(memory_mib=320)
    await control.guest(lambda said: small + 40 < said["memory"]["total_mib"] <= small + 64)
    assert await control.set(cpu=CpuShare(quota=150, weight=300))
    assert await host.hypervisor.compute_reconcile(control.vmm, control.server) == ()
    with pytest.raises(Refused, match="has begun 3 of 4"):  # the fifth thread in its life would end it
        await host.hypervisor.compute_reconcile(control.vmm, given(control.server, vcpus=4))
    took = (await known_status(host, control.vmm)).compute.took_ms
    assert took.keys() == {"vcpus", "memory", "cpu"}

    await replaced_in_place(control, old)
    await control.is_as_asked()
    after = await control.guest(lambda said: said["cpu"]["online"] == 2)
    assert after["boot_id"] == before["boot_id"]
    assert small + 40 < after["memory"]["total_mib"] <= small + 64
    assert after["memory"]["errors"] == 0
    await control.set(vcpus=3, memory_mib=384, cpu=CpuShare())
    await control.guest(lambda said: said["cpu"]["online"] == 3 and said["memory"]["total_mib"] > small + 104)
    with pytest.raises(Refused, match="does not let go of a vCPU"):
        await host.hypervisor.compute_reconcile(control.vmm, given(control.server, vcpus=2))
    with pytest.raises(Refused, match="in place"):
        await host.hypervisor.migrate_start(control.vmm, "tcp:127.0.0.1:1", peer="nobody", bandwidth=0)
    await control.is_as_asked()


async def test_a_server_arrives_with_the_vcpus_it_has_then_and_its_share(place: Place) -> None:
    old, new = release("10.0"), release("11.1")
    one, two = place.host("host-1"), place.host("host-2")
    control = Control(one, await begun(one, new, boot_memory_mib=0, max_memory_mib=0, vcpus=2))
    await console_says(one, control.vmm, "boot ")
    before = await control.guest(lambda said: said["cpu"]["online"] == 2)
    await control.set(vcpus=3, cpu=CpuShare(quota=180, weight=300))
    await control.set(vcpus=2)
    there = await moved(control.server, one, two, old)
    control = Control(two, msgspec.structs.replace(control.server, epoch=there.epoch))
    await control.is_as_asked()
    await control.set(vcpus=3)
    after = await control.guest(lambda said: said["cpu"]["online"] == 3)
    assert (after["boot_id"], after["memory"]["errors"]) == (before["boot_id"], 0)


async def replaced_in_place(control: Control, under: ReleaseId) -> None:
    """The driver's part of it."""
    host, old = control.host, control.vmm
    new = VmmId(old.server, old.epoch + 1)
    port = control.server.spec.ports[0].id
    fd = host.place.tap("spare")
    await host.supervisor.store_fd(f"spare.{port}", fd)
    os.close(fd)
    await host.hypervisor.incoming_start(control.server, new.epoch, under, in_place=True)
    await host.hypervisor.incoming_listen(new, host.settings.address)
    await host.hypervisor.pause(old)
    await host.hypervisor.replace_send(old, new)
    await host.hypervisor.incoming_wait(new, timeout=20)
    await host.hypervisor.resume(new)
    await host.hypervisor.kill(old)
    control.server = msgspec.structs.replace(control.server, epoch=new.epoch)


async def test_a_release_that_would_die_of_it_is_not_asked_to(place: Place) -> None:
    taken = list[bytes]()

    async def take(piece: bytes) -> None:
        taken.append(piece)

    host, eldest = place.host("host-1"), release("7.2")
    control = Control(host, await begun(host, eldest, machine="pc-q35-7.2", vcpus=2))
    with pytest.raises(Refused) as refused:
        await host.hypervisor.compute_reconcile(control.vmm, given(control.server, vcpus=1))
    assert refused.value.field == "vcpus"
    with pytest.raises(Refused, match="misses pages"):
        await host.hypervisor.save(control.vmm, take, running=True)
    assert not taken
    await control.set(vcpus=3, cpu=CpuShare(quota=50))
    with pytest.raises(Refused, match="plugged memory"):
        await host.hypervisor.incoming_start(control.server, 2, eldest, in_place=True)
    assert (await known_status(host, control.vmm)).state is RunState.RUNNING
