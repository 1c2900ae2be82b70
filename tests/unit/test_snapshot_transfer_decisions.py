"""What is offered of snapshots, what is recorded of those that come, and what is taken back; no daemon."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, NotFound, Unavailable
from nahtlos.model.ids import HostId, KeyId, OperationId, SnapshotId, VolumeId
from nahtlos.model.storage import Deletion, SnapshotOffer, VolumeFormat, VolumeSpec
from nahtlos.physical.ports import Crash, SnapshotFetch
from nahtlos.physical.storage import decisions
from nahtlos.physical.storage.arrivals import Arrivals, blank_record
from nahtlos.physical.storage.graph import Places
from nahtlos.physical.storage.layers import LayerFiles
from nahtlos.physical.storage.record import (
    Layer,
    LayerRef,
    Merge,
    Mode,
    RecordMap,
    Records,
    SnapshotRecord,
    VolumeRecord,
    chain,
)
from nahtlos.physical.storage.snapshot_arrivals import layer_files, with_arrived, without_arrived
from nahtlos.physical.storage.snapshot_offers import offer_of, offered_layers

V, W = VolumeId("v"), VolumeId("w")
S, T = SnapshotId("s"), SnapshotId("t")
FETCH = SnapshotFetch(
    operation=OperationId("volume-7"),
    volume=V,
    source=VolumeEndpoint(host=HostId("host-1"), address="10.0.0.1", port=1, export=""),
)


def layer(volume: VolumeId, number: int, below: LayerRef | None = None, key: str | None = None) -> Layer:
    form = VolumeFormat.RAW if below is None else VolumeFormat.QCOW2
    name = f"{volume}.{number}"
    encrypted = KeyId(key) if key else None
    return Layer(number=number, file=name, format=form, size=64, backing=below, encryption_key=encrypted)


def left(volume: VolumeId, *layers: Layer, snapshots: dict[SnapshotId, int], **more: object) -> VolumeRecord:
    record = VolumeRecord(
        volume=volume,
        layers=layers,
        active=max(snapshots.values()),
        mode=Mode.LEFT,
        snapshots=tuple(SnapshotRecord(id=i, layer=n, group="g", size=60) for i, n in snapshots.items()),
    )
    return msgspec.structs.replace(record, **more)


def serving(*numbers: int) -> VolumeRecord:
    """Of `V`, with so many layers one on the other."""
    layers = [layer(V, n, LayerRef(V, n - 1) if n != numbers[0] else None) for n in numbers]
    return VolumeRecord(volume=V, layers=tuple(layers), active=numbers[-1], epoch=1)


TWO = left(V, layer(V, 0), layer(V, 1, LayerRef(V, 0), "k"), snapshots={S: 0, T: 1})


def offer(records: RecordMap, volume: VolumeId, *snapshots: SnapshotId) -> SnapshotOffer:
    refs = offered_layers(records, volume, snapshots)
    return offer_of(records, volume, snapshots, {ref: 100 + place for place, ref in enumerate(refs)})


def test_what_snapshots_share_is_offered_once_and_from_the_base_up() -> None:
    made = offer({V: TWO}, V, T, S)
    assert [(each.export, each.below, each.length) for each in made.layers] == [
        ("offer.v.v.0", None, 100),
        ("offer.v.v.1", 0, 101),
    ]
    assert {each.id: each.layer for each in made.snapshots} == {S: 0, T: 1}
    assert made.layers[1].encryption_key == "k"
    assert [each.export for each in offer({V: TWO}, V, S).layers] == ["offer.v.v.0"]


def test_what_a_clone_that_has_left_rests_on_goes_with_its_snapshots() -> None:
    clone = left(W, layer(W, 0, LayerRef(V, 1)), snapshots={SnapshotId("of-w"): 0})
    made = offer({V: TWO, W: clone}, W, SnapshotId("of-w"))
    assert [each.export for each in made.layers] == ["offer.w.v.0", "offer.w.v.1", "offer.w.w.0"]
    assert [each.below for each in made.layers] == [None, 0, 1]


def test_nothing_is_offered_that_is_not_here_or_may_still_change() -> None:
    with pytest.raises(NotFound):
        offer({V: TWO}, V, SnapshotId("never"))
    with pytest.raises(NotFound):
        offer({}, V, S)
    below = msgspec.structs.replace(TWO, mode=Mode.SERVING)
    clone = left(W, layer(W, 0, LayerRef(V, 1)), snapshots={S: 0})
    with pytest.raises(Unavailable, match="rest on 'v', which is serving"):
        offer({V: below, W: clone}, W, S)
    assert offer({V: below}, V, S).layers, "its own layers do not merge meanwhile"
    merging = msgspec.structs.replace(below, merge=Merge(layer=1, into=0))
    with pytest.raises(Unavailable):
        offer({V: merging}, V, S)
    with pytest.raises(Unavailable):
        offer({V: msgspec.structs.replace(TWO, mode=Mode.PROXY)}, V, S)


def arrived(record: VolumeRecord | None, made: SnapshotOffer) -> VolumeRecord:
    return with_arrived(record, V, made, layer_files(FETCH, made))


def test_what_comes_stands_beside_what_the_volume_has() -> None:
    made = offer({V: TWO}, V, S, T)
    before = serving(3, 4)
    after = arrived(before, made)
    assert after.active == 4 and after.mode is Mode.SERVING
    assert after.layers[:2] == before.layers
    assert {each.id: (each.layer, each.size, each.group) for each in after.snapshots} == {
        S: (5, 60, "g"),
        T: (6, 60, "g"),
    }
    assert chain({V: after}, LayerRef(V, 6)) == (LayerRef(V, 5), LayerRef(V, 6))
    assert after.layer(6).encryption_key == "k" and after.next_number == 7
    assert not decisions.unused_layers({V: after}, V)
    assert arrived(after, made) == after, "said twice"


def test_of_a_volume_that_is_elsewhere_only_its_snapshots_are_here() -> None:
    made = msgspec.structs.replace(offer({V: TWO}, V, S, T), deletion=Deletion.ZERO)
    after = arrived(None, made)
    assert (after.mode, after.active, after.epoch, after.deletion) == (Mode.LEFT, 1, 0, Deletion.ZERO)
    assert [each.format for each in after.layers] == [VolumeFormat.RAW, VolumeFormat.QCOW2]
    assert arrived(left(V, layer(V, 9), snapshots={S: 9}), made).snapshot(T) is not None


@pytest.mark.parametrize("mode", [Mode.PROXY, Mode.RECEIVING, Mode.DELETING])
def test_nothing_comes_while_the_volume_comes_or_goes(mode: Mode) -> None:
    with pytest.raises(Conflict):
        arrived(msgspec.structs.replace(serving(0), mode=mode), offer({V: TWO}, V, S))


def test_names_are_those_of_one_offer_and_no_other() -> None:
    made = offer({V: TWO}, V, S, T)
    assert layer_files(FETCH, made) == layer_files(FETCH, made)
    other = msgspec.structs.replace(made, deletion=Deletion.ZERO)
    assert not set(layer_files(FETCH, made)) & set(layer_files(FETCH, other))


def test_no_file_that_comes_is_taken_for_a_volume(tmp_path: Path) -> None:
    """Neither on its way nor before it is recorded."""
    for name in layer_files(FETCH, offer({V: TWO}, V, S, T)):
        (tmp_path / name).touch()
        (tmp_path / f".arriving-{name}.boot").touch()
    assert Records(tmp_path).all() == {}


def test_what_came_is_taken_back_and_nothing_else() -> None:
    made, before = offer({V: TWO}, V, S, T), serving(3, 4)
    after = arrived(before, made)
    back = without_arrived({V: after}, after, "v.volume-7.")
    assert back is not None and (back.layers, back.snapshots) == (before.layers, before.snapshots)
    assert without_arrived({V: after}, after, "v.volume-70.") == after
    alone = arrived(None, made)
    assert without_arrived({V: alone}, alone, "v.volume-7.") is None
    clone = VolumeRecord(volume=W, layers=(layer(W, 0, LayerRef(V, 6)),), active=0)
    with pytest.raises(Conflict):
        without_arrived({V: after, W: clone}, after, "v.volume-7.")


def snapshots_in(record: VolumeRecord) -> Iterator[tuple[SnapshotId, Layer]]:
    return ((each.id, record.layer(each.layer)) for each in record.snapshots)


def test_a_volume_that_merges_into_its_base_keeps_what_came() -> None:
    """Its base and what is put onto it become one layer; what came is no part of that."""
    after = arrived(serving(0, 1), offer({V: TWO}, V, S, T))
    merge = decisions.next_merge({V: after}, V)
    assert merge is not None and merge.pivot
    whole = decisions.pivoted(decisions.with_pivot(after, merge), merge)
    assert dict(snapshots_in(whole)) == dict(snapshots_in(after))
    assert whole.active == merge.into
    assert {each.number for each in whole.layers} == {2, 3, merge.into}


@pytest.mark.parametrize("mode", [Mode.RECEIVING, Mode.SERVING, Mode.LEFT])
def test_a_copy_that_is_made_anew_keeps_the_snapshots_that_are_here(mode: Mode) -> None:
    """Their layers do not change, whatever became of the volume."""
    before = arrived(serving(3, 4), offer({V: TWO}, V, S, T))
    spec = VolumeSpec(id=V, size_mib=1, image=None, host=HostId("host-2"), epoch=9)
    new = blank_record(spec, msgspec.structs.replace(before, mode=mode))
    assert dict(snapshots_in(new)) == dict(snapshots_in(before))
    assert new.active == 7 and new.active_layer.backing is None
    assert {5, 6, 7} <= {each.number for each in new.layers}
    assert (3 in {each.number for each in new.layers}) is (mode is Mode.LEFT)


class Beside:
    """The parts of a host's storage around its records and files, without a daemon. Dies at `dies_at`."""

    def __init__(self, folder: Path, dies_at: str = "") -> None:
        self.records = Records(folder)
        self.places = Places(volumes=folder, keys=folder)
        self.daemon = self
        self._dies_at = dies_at

    async def keep(self, *written: VolumeRecord) -> None:
        self.records.commit(*written)

    async def define(self) -> bool:
        return False

    async def withdraw(self, volume: VolumeId) -> None:
        """Nothing is served here."""

    async def on_step(self, name: str) -> None:
        if name == self._dies_at:
            raise Crash(name)

    def arrivals(self) -> Arrivals:
        parts: Any = self
        return Arrivals(HostId("h"), parts, LayerFiles(self.places, Path(), parts))


@pytest.mark.parametrize("dies_at", ["", "receive.dropped"])
async def test_a_volume_that_was_received_in_vain_leaves_what_was_beside_it(
    tmp_path: Path, dies_at: str
) -> None:
    made = offer({V: TWO}, V, S, T)
    spec = VolumeSpec(id=V, size_mib=1, image=None, host=HostId("host-2"), epoch=9)
    coming = blank_record(spec, arrived(None, made))
    Records(tmp_path).commit(coming)
    for each in coming.layers:
        (tmp_path / each.file).touch()
    try:
        await Beside(tmp_path, dies_at).arrivals().give_back(V)
    except Crash:
        assert list(Records(tmp_path).all()) == [V], "no file of it is taken for a volume"
        await Beside(tmp_path).arrivals().give_back(V)
    after = Records(tmp_path).all()[V]
    assert after.mode is Mode.LEFT and not after.withdrawn
    assert dict(snapshots_in(after)) == dict(snapshots_in(coming))
    assert {path.name for path in tmp_path.iterdir()} == {"v.json", *layer_files(FETCH, made)}
