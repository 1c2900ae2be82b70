"""What is decided of an image of Ceph's, and what its block nodes must say."""

from pathlib import Path

import msgspec
import pytest

from nahtlos.model.config import RbdEndpoint, VolumeEndpoint
from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, VolumeId
from nahtlos.model.storage import Deletion, StorageBackend, VolumeSpec
from nahtlos.physical.hypervisor.disks import rbd_connection
from nahtlos.physical.settings import CephSettings
from nahtlos.physical.storage.ceph import doors, images
from nahtlos.physical.storage.ceph.images import Act, ImageFacts, SnapshotFacts

HERE, OTHER = HostId("host-1"), HostId("host-2")
CEPH = CephSettings(configuration=Path("/etc/ceph/ceph.conf"), user="nahtlos", pool="volumes")
SPEC = VolumeSpec(id=VolumeId("data"), size_mib=64, image=None, host=HERE, backend=StorageBackend.CEPH)


def image(size_mib: int = 64, epoch: int = 1, host: HostId = HERE, **metadata: str) -> ImageFacts:
    noted = {"host": host, "epoch": str(epoch), "deletion": "discard", **metadata}
    return ImageFacts(name="data", size=size_mib << 20, metadata=noted, allocated=0, clients=(), snapshots=())


@pytest.mark.parametrize(
    ("spec", "found", "wanted"),
    [
        (SPEC, None, (Act.MAKE,)),
        (SPEC, image(), ()),
        (SPEC, image(receiving="yes"), (Act.NOTE,)),
        (msgspec.structs.replace(SPEC, size_mib=80), image(), (Act.ENLARGE,)),
        (msgspec.structs.replace(SPEC, epoch=2), image(), (Act.FENCE, Act.NOTE)),
        (msgspec.structs.replace(SPEC, deletion=Deletion.ZERO), image(), (Act.NOTE,)),
        (msgspec.structs.replace(SPEC, epoch=3), image(host=OTHER, epoch=2), (Act.FENCE, Act.NOTE)),
        (SPEC, image(epoch=2), ()),
    ],
    ids=["missing", "right", "arrived", "small", "older", "deletion", "taken-over", "late"],
)
def test_steps(spec: VolumeSpec, found: ImageFacts | None, wanted: tuple[Act, ...]) -> None:
    assert images.steps(spec, found, HERE) == wanted


@pytest.mark.parametrize("epoch", [1, 2])
def test_administration_is_not_taken_by_an_epoch_that_is_not_higher(epoch: int) -> None:
    with pytest.raises(Refused, match="administered by host-2"):
        images.steps(msgspec.structs.replace(SPEC, epoch=epoch), image(host=OTHER, epoch=2), HERE)


def test_an_epoch_never_goes_back() -> None:
    assert images.changed_notes(image(epoch=5), images.notes(SPEC, HERE)) == {}


def test_what_is_gone_is_told_by_its_volume_and_may_come_and_go_again() -> None:
    first, second = images.gone(image(epoch=1)), images.gone(image(epoch=2))
    assert first != second
    assert images.volume_of(first) == images.volume_of(second) == images.volume_of(".new.data") == "data"
    kept = msgspec.structs.replace(
        image(),
        name=first,
        snapshots=(
            SnapshotFacts(name="then", size=64 << 20, trashed=False, children=("two", ".new.three")),
            SnapshotFacts(name="removed", size=64 << 20, trashed=True),
        ),
    )
    assert [(s.id, s.volume, s.clones) for s in images.snapshot_statuses(kept)] == [
        ("then", "data", ("two",))
    ]


def test_no_node_of_an_image_caches_writes_that_it_acknowledged() -> None:
    rbd = RbdEndpoint(pool="volumes", image="data", user="nahtlos", configuration="/etc/ceph/ceph.conf")
    for node in (doors.image_node(CEPH, "n", "data"), rbd_connection(rbd, "n")):
        assert node["cache"] == {"direct": True}


def test_a_proxy_has_no_way_to_the_image_any_more() -> None:
    target = VolumeEndpoint(host=OTHER, address="127.0.0.2", port=10809, export="data.e2")
    door = doors.Door(volume=VolumeId("data"), epoch=1, target=target)
    drivers = {node["driver"] for node in doors.nodes(CEPH, door)}
    passed = {node["driver"] for node in doors.nodes(CEPH, msgspec.structs.replace(door, completed=True))}
    assert ("rbd" in drivers, "rbd" in passed) == (True, False)
