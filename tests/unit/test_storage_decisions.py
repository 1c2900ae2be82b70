"""Records of volumes, the nodes and command lines made of them, and what is decided by them; no daemon."""

import errno
import os
import threading
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

import nahtlos
from nahtlos.model.config import VolumeEndpoint
from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import HostId, KeyId, SnapshotId, VolumeId
from nahtlos.model.storage import DiskBudget, DiskLimits, SnapshotSpec, VolumeFormat
from nahtlos.physical.storage import decisions, graph
from nahtlos.physical.storage.daemon import Graph
from nahtlos.physical.storage.decisions import CatchUp
from nahtlos.physical.storage.definition import arguments, definition, limits
from nahtlos.physical.storage.graph import Export, Places
from nahtlos.physical.storage.overwriting import Overwriting, overwrite_slice
from nahtlos.physical.storage.record import (
    Layer,
    LayerRef,
    Merge,
    Mode,
    Records,
    SnapshotRecord,
    VolumeRecord,
    active_chain,
)
from nahtlos.physical.storage.snapshots import to_take, with_snapshot
from nahtlos.physical.storage.sparse import copy_sparse

V, W = VolumeId("v"), VolumeId("w")
PLACES = Places(volumes=Path("/vol"), keys=Path("/keys"))
MIB = 1 << 20


def layer(number: int, *, below: int | None = None, of: VolumeId = V, key: str | None = None) -> Layer:
    """Number 0 is raw, the others rest on something."""
    return Layer(
        number=number,
        file=f"{of}.{number}",
        format=VolumeFormat.RAW if number == 0 else VolumeFormat.QCOW2,
        size=8 * MIB,
        backing=None if below is None else LayerRef(V, below),
        encryption_key=KeyId(key) if key else None,
    )


def volume(*layers: Layer, snapshots: dict[str, int] | None = None, **more: object) -> VolumeRecord:
    names = tuple(SnapshotRecord(id=SnapshotId(i), layer=n) for i, n in (snapshots or {}).items())
    record = VolumeRecord(volume=V, layers=layers, active=layers[-1].number, snapshots=names, epoch=1)
    return msgspec.structs.replace(record, **more)


RAW = volume(layer(0))
SNAPPED = volume(layer(0), layer(1, below=0), snapshots={"s0": 0})
LONG = volume(layer(0), layer(1, below=0), layer(2, below=1), snapshots={"s0": 0, "s1": 1})
CLONE = VolumeRecord(volume=W, layers=(layer(1, below=1, of=W),), active=1, epoch=1)


# --- records -----------------------------------------------------------------------------------------


def test_records_are_found_again_and_change_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path)
    records.commit(RAW)
    assert Records(tmp_path).all() == {V: RAW}
    written: list[str] = []
    real = Path.replace

    def dies_after_two(self: Path, target: Path) -> Path:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(Path(target).name)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        records.commit(LONG, CLONE)
    monkeypatch.undo()
    assert written == [".commit.json", "v.json"]
    assert Records(tmp_path).all() == {V: LONG, W: CLONE}, "what was decided is carried out"
    assert not list(tmp_path.glob(".commit*.json"))


def test_what_was_not_decided_did_not_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Records(tmp_path).commit(RAW)

    def dies(_self: Path, _target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        Records(tmp_path).commit(LONG, CLONE)
    monkeypatch.undo()
    assert Records(tmp_path).all() == {V: RAW}


def test_raw_files_without_a_record_are_volumes_and_layers_are_not(tmp_path: Path) -> None:
    (tmp_path / "old.raw").write_bytes(bytes(MIB))
    (tmp_path / ".unfinished-x.raw").write_bytes(b"")
    (tmp_path / "v.0").write_bytes(b"")
    records = Records(tmp_path)
    records.commit(RAW)
    found = Records(tmp_path).all()
    assert found.keys() == {V, VolumeId("old")}
    assert found[VolumeId("old")].size == MIB


def test_numbers_of_layers_are_never_used_twice() -> None:
    record = RAW.with_layer(layer(5, below=0))
    gone = msgspec.structs.replace(record, layers=RAW.layers)
    assert gone.next_number == 6


# --- what must never be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "through"),
    [
        (RAW, False),
        (SNAPPED, True),
        (LONG, True),
        (volume(layer(1)), True),
        (volume(layer(0, key="k")), False),
        (msgspec.structs.replace(SNAPPED, mode=Mode.RECEIVING), True),
    ],
)
def test_every_chain_with_qcow2_in_it_is_written_through_and_no_raw_one(
    record: VolumeRecord, through: bool
) -> None:
    """Otherwise a daemon that is killed forgets acknowledged writes, silently."""
    export = graph.export_of({V: record}, V)
    assert export is not None
    assert export.options["writethrough"] is through
    (said,) = definition({V: record}, PLACES, DiskBudget()).exports
    assert said["writethrough"] is through
    assert graph.parsed_export(export.id) == export


def sources() -> dict[str, str]:
    folder = Path(nahtlos.__file__).parent
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}


def test_no_other_place_decides_what_is_written_through() -> None:
    deciding = [path for path, text in sources().items() if '"writethrough":' in text]
    assert deciding == ["physical/storage/graph.py"]


def test_what_loses_writes_silently_is_used_nowhere_else() -> None:
    """vhost-user never flushes. null-co forgets all it is given: it may stand in for a lost copy, which
    is never read, and for the device of which only a bitmap is wanted."""
    text = sources()
    assert [path for path in text if "vhost-user" in text[path]] == []
    forgetting = {path: source.count('"null-co"') for path, source in text.items() if '"null-co"' in source}
    assert forgetting == {"physical/hypervisor/disks.py": 1, "physical/storage/replication.py": 1}


# --- nodes -------------------------------------------------------------------------------------------


def test_nodes_are_made_from_the_file_up_and_end_at_the_pivot() -> None:
    names = [node["node-name"] for node in graph.nodes({V: SNAPPED}, V, PLACES)]
    assert names == ["file-v", "raw-v", "file1-v", "layer1-v", "fair-v", "top-v"]
    made: set[object] = {None}
    for node in graph.nodes({V: LONG}, V, PLACES):
        assert {node.get("file"), node.get("backing")} <= made
        assert node["discard"] == "unmap"
        made.add(node["node-name"])


def test_only_the_active_layer_is_written_into() -> None:
    said = {node["node-name"]: node.get("read-only") for node in graph.nodes({V: LONG}, V, PLACES)}
    assert (said["raw-v"], said["layer1-v"], said["layer2-v"]) == (True, True, False)


def test_a_base_rests_on_nothing_whatever_its_header_says() -> None:
    (_, form) = graph.layer_nodes({V: volume(layer(1))}, LayerRef(V, 1), PLACES, writable=True)
    assert form["backing"] is None


def test_node_names_fit_and_stay_apart() -> None:
    long, longer = VolumeId("v" * 31 + "a"), VolumeId("v" * 31 + "b")
    assert graph.top_node(V) == "top-v"
    names = {
        name
        for v in (long, longer)
        for n in (0, 7, 123)
        for name in (
            graph.format_node(LayerRef(v, n)),
            graph.file_node(LayerRef(v, n)),
            graph.luks_node(LayerRef(v, n)),
            graph.top_node(v),
            graph.fair_node(v),
            graph.limits_group(v),
        )
    }
    assert len(names) == 2 * (3 * 3 + 3)
    assert max(len(name) for name in names) <= graph.NODE_NAME_LIMIT


def test_keys_are_named_by_file_and_never_said() -> None:
    record = volume(layer(0, key="k1"))
    (secret,) = graph.secrets({V: record}, V, PLACES)
    assert secret == {"qom-type": "secret", "id": "key-k1", "file": "/keys/k1.key"}
    names = [node["node-name"] for node in graph.nodes({V: record}, V, PLACES)]
    assert names[:3] == ["file-v", "luks-v", "raw-v"]


def test_a_proxy_passes_everything_on_and_opens_no_file() -> None:
    there = VolumeEndpoint(host=HostId("h2"), address="10.0.0.2", port=10809, export="v.e2")
    record = volume(layer(0), mode=Mode.PROXY, endpoint=there)
    first, *_ = graph.nodes({V: record}, V, PLACES)
    assert (first["driver"], first["export"], first["tls-creds"]) == ("nbd", "v.e2", "tls-client")
    assert all(node["driver"] != "file" for node in graph.nodes({V: record}, V, PLACES))


def test_everything_served_is_on_the_command_line_behind_tls_and_each_node_once() -> None:
    records = {V: LONG, W: CLONE}
    said = arguments(Path("/run/q"), Path("/pki"), definition(records, PLACES, DiskBudget()))
    exports = [msgspec.json.decode(value) for option, value in pairwise(said) if option == "--export"]
    assert [export["name"] for export in exports] == ["v.e1", "w.e1"]
    nodes = [msgspec.json.decode(value) for option, value in pairwise(said) if option == "--blockdev"]
    names = [node["node-name"] for node in nodes]
    assert len(names) == len(set(names)), "a clone shares its origin's nodes"
    server = said[said.index("--nbd-server") + 1]
    assert "addr.str={fd:nbd}" in server
    assert "tls-creds=" in server
    assert "tls-authz=" in server
    reversed_order = definition(dict(reversed(records.items())), PLACES, DiskBudget())
    assert definition(records, PLACES, DiskBudget()) == reversed_order


def test_what_is_left_out_withdrawn_or_deleted_is_in_no_definition() -> None:
    records = {V: LONG, W: CLONE}
    assert not definition(records, PLACES, DiskBudget(), {V}).exports, "nor what rests on it"
    for gone in ({"withdrawn": True}, {"mode": Mode.DELETING}, {"epoch": 0}):
        assert not definition({V: msgspec.structs.replace(RAW, **gone)}, PLACES, DiskBudget()).exports


def test_a_limit_that_is_taken_back_is_said_to_be_none() -> None:
    assert limits(DiskLimits(iops=5, iops_burst=9, burst_seconds=3)).items() >= {
        ("iops-total", 5),
        ("iops-total-max", 9),
        ("iops-total-max-length", 3),
    }
    assert limits(DiskLimits())["iops-total"] == 0


@pytest.mark.parametrize("name", ["v", "v.ex", "v.e", "snapshot-export"])
def test_other_exports_are_no_volumes(name: str) -> None:
    assert graph.parsed_export(name) is None


def test_export_ids_tell_all() -> None:
    for export in (
        Export(volume=V, epoch=12, writethrough=True),
        Export(volume=W, epoch=1, writethrough=False),
    ):
        assert graph.parsed_export(export.id) == export


# --- a running daemon --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "step"),
    [
        (None, CatchUp.BUILD),
        (("layer2-v", "layer1-v", "raw-v"), CatchUp.NOTHING),
        (("layer1-v", "raw-v"), CatchUp.OVERLAY),
        (("raw-v",), CatchUp.REBUILD),
        (("layer3-v", "layer1-v", "raw-v"), CatchUp.REBUILD),
    ],
)
def test_a_daemon_is_brought_to_what_is_recorded(seen: tuple[str, ...] | None, step: CatchUp) -> None:
    assert decisions.catch_up(decisions.expected_chains({V: LONG}, V), seen) is step


def test_a_volume_received_anew_is_not_put_onto_what_it_was() -> None:
    anew = volume(layer(3))
    assert decisions.catch_up(decisions.expected_chains({V: anew}, V), ()) is CatchUp.REBUILD


def test_while_layers_merge_both_are_right() -> None:
    merging = msgspec.structs.replace(LONG, merge=Merge(layer=1, into=0))
    for seen in (("layer2-v", "layer1-v", "raw-v"), ("layer2-v", "raw-v")):
        assert decisions.catch_up(decisions.expected_chains({V: merging}, V), seen) is CatchUp.NOTHING


def test_filters_of_jobs_are_seen_through() -> None:
    edges = {
        ("top-v", "file"): "fair-v",
        ("fair-v", "file"): "#block7",
        ("#block7", "backing"): "layer1-v",
        ("layer1-v", "file"): "file1-v",
        ("layer1-v", "backing"): "raw-v",
        ("raw-v", "file"): "file-v",
    }
    nodes = frozenset(name for (parent, _), child in edges.items() for name in (parent, child))
    known = decisions.known_nodes({V: SNAPPED})
    assert decisions.seen_chain(Graph(nodes, edges), V, known) == ("layer1-v", "raw-v")


def test_strays_go_users_first_and_nothing_of_others() -> None:
    seen = Graph(frozenset({"file9-v", "layer9-v", "top-x", "raw-v", "file-v", "hold-v", "backup-1"}), {})
    assert decisions.stray_nodes(seen, {V: RAW}) == ("top-x", "layer9-v", "file9-v")


# --- epochs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "epoch", "boot", "spent"),
    [
        (volume(layer(0), boot_id="b1"), 1, "b1", False),
        (volume(layer(0), boot_id="b1"), 1, "b2", True),
        (volume(layer(0), boot_id="b1"), 2, "b2", False),
        (volume(layer(0), boot_id=""), 1, "b2", False),
        (msgspec.structs.replace(SNAPPED, boot_id="b1"), 1, "b2", False),
    ],
)
def test_after_a_restart_of_the_host_only_what_was_written_through_keeps_its_epoch(
    record: VolumeRecord, epoch: int, boot: str, spent: bool
) -> None:
    assert decisions.epoch_is_spent({V: record}, V, epoch, boot) is spent


def test_an_older_epoch_is_refused() -> None:
    with pytest.raises(Refused) as refusal:
        decisions.checked_epoch(volume(layer(0), epoch=3), 2)
    assert refusal.value.field == "epoch"


# --- snapshots and merging ---------------------------------------------------------------------------


def test_a_snapshot_names_what_was_active() -> None:
    spec = SnapshotSpec(id=SnapshotId("s"), volume=V, group="g")
    record = with_snapshot(RAW, spec, layer(1, below=0))
    assert active_chain({V: record}, V) == (LayerRef(V, 0), LayerRef(V, 1))
    assert record.snapshot(SnapshotId("s")) == SnapshotRecord(
        id=SnapshotId("s"), layer=0, group="g", size=8 * MIB
    )
    assert to_take({V: record}, (spec,)) == ()


def test_what_cannot_be_taken_is_refused_by_name() -> None:
    one = SnapshotSpec(id=SnapshotId("a"), volume=V)
    with pytest.raises(NotFound):
        to_take({}, (one,))
    with pytest.raises(Refused, match="twice"):
        to_take({V: RAW}, (one, msgspec.structs.replace(one, id=SnapshotId("b"))))
    with pytest.raises(Conflict):
        to_take({V: msgspec.structs.replace(RAW, mode=Mode.PROXY)}, (one,))


def test_a_snapshot_that_is_rested_on_stays() -> None:
    with pytest.raises(Conflict) as refusal:
        decisions.without_snapshot({V: LONG, W: CLONE}, SnapshotId("s1"))
    assert (refusal.value.field, refusal.value.remedy) == ("snapshot", "delete what was made from it first")
    assert decisions.without_snapshot({V: LONG}, SnapshotId("none")) is None


def without(record: VolumeRecord, *names: str) -> VolumeRecord:
    kept = tuple(each for each in record.snapshots if each.id not in names)
    return msgspec.structs.replace(record, snapshots=kept)


@pytest.mark.parametrize(
    ("record", "merge"),
    [
        (LONG, None),
        (without(LONG, "s0"), Merge(layer=1, into=0)),
        (without(LONG, "s1"), None),  # an active qcow2 layer stays over the one that is left
        (without(SNAPPED, "s0"), Merge(layer=1, into=2, pivot=True)),
        (msgspec.structs.replace(without(SNAPPED, "s0"), format=VolumeFormat.QCOW2), None),
        (msgspec.structs.replace(without(LONG, "s0"), mode=Mode.PROXY), None),
    ],
)
def test_layers_without_a_name_merge(record: VolumeRecord, merge: Merge | None) -> None:
    assert decisions.next_merge({V: record}, V) == merge


def test_what_was_merged_is_named_and_rested_on_by_its_new_layer() -> None:
    record = without(LONG, "s0")
    changed = {
        each.volume: each for each in decisions.merged({V: record, W: CLONE}, V, Merge(layer=1, into=0))
    }
    assert [each.number for each in changed[V].layers] == [0, 2]
    assert changed[V].layer(2).backing == LayerRef(V, 0)
    assert changed[W].layer(1).backing == LayerRef(V, 0)
    assert changed[V].snapshots == (SnapshotRecord(id=SnapshotId("s1"), layer=0),)


def test_a_base_takes_up_the_active_layer_in_two_steps_that_can_be_taken_back() -> None:
    record = without(SNAPPED, "s0")
    merge = Merge(layer=1, into=2, pivot=True)
    begun = decisions.with_pivot(record, merge)
    assert begun.layer(2).file == record.layer(0).file
    assert active_chain({V: begun}, V)[-1].number == 1, "as long as they are not alike, the old one counts"
    alike = msgspec.structs.replace(begun, active=2)
    assert alike.pivoting
    for seen in (("layer2-v",), ("layer1-v", "raw-v")):
        assert decisions.catch_up(decisions.expected_chains({V: alike}, V), seen) is CatchUp.NOTHING
    assert [each.number for each in decisions.pivoted(alike, merge).layers] == [2]
    for at in (begun, alike):
        assert msgspec.structs.replace(decisions.not_merged(at), last_number=0) == record


def test_layers_nobody_needs_go_from_the_leaves_down() -> None:
    branch = volume(layer(0), layer(1, below=0), layer(2, below=1), layer(3, below=0), snapshots={"s": 0})
    assert set(decisions.unused_layers({V: branch}, V)) == {1, 2}
    assert decisions.unused_layers({V: branch, W: CLONE}, V) == (2,), "a clone rests on 1"
    assert decisions.unused_layers({V: LONG}, V) == ()


# --- files -------------------------------------------------------------------------------------------


def sparse_file(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(b"head")
        file.seek(4 << 20)
        file.write(b"tail")
        file.truncate(6 << 20)
    return path


def test_copies_are_equal_and_as_sparse(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "a")
    target = tmp_path / "b"
    with source.open("rb") as reading, target.open("w+b") as writing:
        copy_sparse(reading.fileno(), writing.fileno())
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks + 16


def test_the_kernel_copies_nothing_from_one_kind_of_file_system_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    test_copies_are_equal_and_as_sparse(tmp_path)


def test_what_is_stored_is_overwritten_and_holes_stay_holes(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "a")
    with path.open("r+b") as file:
        overwrite_slice(file.fileno(), 0, 6 << 20)
        assert os.fstat(file.fileno()).st_blocks <= 32
    assert path.read_bytes() == bytes(6 << 20)


def test_overwriting_ends_with_nothing_left(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sparse_file(tmp_path / name)
    work = Overwriting(lambda: sorted(tmp_path.iterdir()))
    work.begin()
    thread = next(each for each in threading.enumerate() if each.name == "overwriting")
    thread.join(timeout=10)
    assert list(tmp_path.iterdir()) == []
    work.end()
