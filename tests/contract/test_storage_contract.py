"""What every storage driver must do: the promises of `physical.ports.Storage`. Each play runs on simulated
hosts and, where it can, on real ones: with files of theirs, and with images of a Ceph cluster."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypervisor_worlds import STORAGE_WORLDS, Hosts, Stage, ceph_world, stage_of

from nahtlos.model.errors import Error
from nahtlos.model.ids import VolumeId
from nahtlos.physical.ports import StorageDesired, VmmId


@pytest.fixture(scope="module")
def ceph() -> Iterator[Stage]:
    with ceph_world() as stage:
        yield stage


@pytest.fixture(params=STORAGE_WORLDS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    if request.param == "ceph":
        return request.getfixturevalue("ceph")
    return stage_of(request.param, tmp_path)


async def held(hosts: Hosts) -> dict[str, tuple[int, bool]]:
    return {v.id: (v.epoch, v.served) for v in await hosts.first.storage.observe()}


def test_volumes_are_made_and_served_and_doing_it_again_changes_nothing(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        one, two = hosts.volume("one"), hosts.volume("two")
        assert await storage.reconcile(StorageDesired(volumes=(one,)))
        assert await storage.reconcile(StorageDesired(volumes=(one, two)))
        assert await storage.reconcile(StorageDesired(volumes=(one, two))) == ()
        assert await held(hosts) == {"one": (1, True), "two": (1, True)}

    stage(play)


def test_a_volume_goes_only_when_it_is_named(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        storage = hosts.first.storage
        one, two = hosts.volume("one"), hosts.volume("two")
        await storage.reconcile(StorageDesired(volumes=(one, two)))
        await storage.reconcile(StorageDesired(volumes=(one,)))
        assert set(await held(hosts)) == {"one", "two"}
        assert await storage.reconcile(StorageDesired(volumes=(one,), removed=(two.id,)))
        assert (
            await storage.reconcile(StorageDesired(volumes=(one,), removed=(two.id, VolumeId("never")))) == ()
        )
        assert set(await held(hosts)) == {"one"}

    stage(play)


def test_a_new_epoch_fences_who_has_the_old_name(stage: Stage) -> None:
    async def play(hosts: Hosts) -> None:
        server = hosts.server()
        old = hosts.volume(server.volume.volume)
        await hosts.first.storage.reconcile(StorageDesired(volumes=(old,)))
        assert await hosts.first.storage.reconcile(StorageDesired(volumes=(hosts.volume(old.id, epoch=2),)))
        assert await held(hosts) == {old.id: (2, True)}
        await hosts.first.plug(server)
        with pytest.raises(Error):
            await hosts.first.hypervisor.start(server, hosts.release)
        await hosts.first.hypervisor.kill(VmmId(server.spec.id, 1))
        renamed = msgspec.structs.replace(server.volume, export=f"{old.id}.e2")
        server = msgspec.structs.replace(server, volume=renamed)
        await hosts.first.hypervisor.start(server, hosts.release)

    stage(play)
