"""What is to be done so that a daemon and the files come to what records say. Pure.

A chain is told from the active layer down to the base, as names of nodes.
"""

from collections.abc import Collection
from enum import StrEnum

import msgspec

from nahtlos.model.errors import Conflict, NotFound, Refused
from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.daemon import Graph
from nahtlos.physical.storage.record import (
    Layer,
    LayerRef,
    Merge,
    Mode,
    RecordMap,
    VolumeRecord,
    active_chain,
    chain,
    children,
    clones,
)

# --- the daemon's nodes ------------------------------------------------------------------------------


class CatchUp(StrEnum):
    NOTHING = "nothing"
    BUILD = "build"
    """None of its nodes are used yet."""
    OVERLAY = "overlay"
    """A snapshot is recorded, and the daemon still writes into the layer below."""
    REBUILD = "rebuild"
    """Something else is served than what is recorded: that is withdrawn first."""


def expected_chains(records: RecordMap, volume: VolumeId) -> tuple[tuple[str, ...], ...]:
    """What the daemon may have; the first is what it shall have, another one as long as layers merge."""
    record = records[volume]
    if record.mode is Mode.PROXY:
        return ((graph.remote_node(volume),),)
    refs = active_chain(records, volume)
    wanted = _names(refs)
    if record.merge is None:
        return (wanted,)
    if record.merge.pivot:
        before = _names(chain(records, LayerRef(volume, record.merge.layer)))
        return (wanted, before) if record.pivoting else (wanted,)
    return (wanted, _names(tuple(ref for ref in refs if ref != LayerRef(volume, record.merge.layer))))


def _names(refs: tuple[LayerRef, ...]) -> tuple[str, ...]:
    return tuple(graph.format_node(ref) for ref in reversed(refs))


def known_nodes(records: RecordMap) -> frozenset[str]:
    """Names of what can be in a chain."""
    layers = {
        graph.format_node(LayerRef(record.volume, layer.number))
        for record in records.values()
        for layer in record.layers
    }
    return frozenset(layers | {graph.remote_node(volume) for volume in records})


def seen_chain(seen: Graph, volume: VolumeId, known: Collection[str]) -> tuple[str, ...] | None:
    """Under `top-…`, filters of jobs left out; None: there is no such node."""
    at: str | None = graph.top_node(volume)
    if at not in seen.nodes:
        return None
    found: list[str] = []
    while at is not None:
        if at in known:
            found.append(at)
            at = seen.edges.get((at, "backing"))
        else:
            at = seen.below(at)
    return tuple(found)


def catch_up(expected: tuple[tuple[str, ...], ...], seen: tuple[str, ...] | None) -> CatchUp:
    if seen is None:
        return CatchUp.BUILD
    if seen in expected:
        return CatchUp.NOTHING
    # Nothing known under it is what a volume was that is received anew: not what a lone layer is put onto.
    return CatchUp.OVERLAY if seen and expected[0][1:] == seen else CatchUp.REBUILD


def stray_nodes(seen: Graph, records: RecordMap) -> tuple[str, ...]:
    """Nodes of layers and volumes that are not there any more, users before what they use."""
    named = set(known_nodes(records))
    for record in records.values():
        named |= {graph.top_node(record.volume), graph.fair_node(record.volume)}
        refs = (LayerRef(record.volume, layer.number) for layer in record.layers)
        named |= {name for ref in refs for name in (graph.file_node(ref), graph.luks_node(ref))}
    ours = (name for name in seen.nodes - named if _rank(name) is not None)
    return tuple(sorted(ours, key=lambda name: (_rank(name), name)))


def _rank(name: str) -> int | None:
    kind = name.partition("-")[0].rstrip("0123456789")
    order = ("top", "fair", "remote", "layer", "raw", "luks", "file")
    return order.index(kind) if kind in order else None


# --- epochs ------------------------------------------------------------------------------------------


def epoch_is_spent(records: RecordMap, volume: VolumeId, epoch: int, boot_id: str) -> bool:
    """The host was restarted since it was served by `epoch`, and what was acknowledged may not all have been
    on disk: a client that came back would believe it was. Behind a flush after every write it is."""
    record = records[volume]
    if record.epoch != epoch or record.boot_id in ("", boot_id) or record.mode is Mode.PROXY:
        return False
    return not graph.writethrough(graph.layers_of(records, active_chain(records, volume)))


def checked_epoch(record: VolumeRecord, epoch: int) -> int:
    if epoch < record.epoch:
        raise Refused(
            f"volume '{record.volume}' was served by epoch {record.epoch}, {epoch} is older",
            field="epoch",
            remedy="give it a later one; an older one would let in clients that were shut out",
        )
    return epoch


# --- snapshots ---------------------------------------------------------------------------------------


def volume_of(records: RecordMap, snapshot: SnapshotId) -> VolumeRecord | None:
    return next((r for r in records.values() if r.snapshot(snapshot) is not None), None)


def snapshot_layer(records: RecordMap, snapshot: SnapshotId) -> LayerRef:
    record = volume_of(records, snapshot)
    found = record.snapshot(snapshot) if record else None
    if record is None or found is None:
        raise NotFound(f"snapshot '{snapshot}' is not on this host", field="snapshot")
    return LayerRef(record.volume, found.layer)


def without_snapshot(records: RecordMap, snapshot: SnapshotId) -> VolumeRecord | None:
    """Its volume's record; None if there is no such snapshot. Refused while volumes rest on it."""
    record = volume_of(records, snapshot)
    if record is None:
        return None
    resting = clones(records, record.volume, snapshot)
    if resting:
        raise Conflict(
            f"{', '.join(resting)} {'rests' if len(resting) == 1 else 'rest'} on snapshot '{snapshot}'",
            field="snapshot",
            remedy="delete what was made from it first",
        )
    kept = tuple(each for each in record.snapshots if each.id != snapshot)
    return msgspec.structs.replace(record, snapshots=kept)


def unused_layers(records: RecordMap, volume: VolumeId) -> tuple[int, ...]:
    """Layers nobody needs: no snapshot names them, nothing rests on them. One may free the one below."""
    record, found = records[volume], list[int]()
    kept = {record.active, *(each.layer for each in record.snapshots)}
    if record.merge is not None:
        kept |= {record.merge.layer, record.merge.into}  # and what these rest on
    while True:
        left = [layer for layer in record.layers if layer.number not in found]
        needed = {layer.backing.number for layer in left if layer.backing and layer.backing.volume == volume}
        for each in left:
            if each.number not in kept | needed and not clones_on(records, LayerRef(volume, each.number)):
                found.append(each.number)
                break
        else:
            return tuple(found)


def clones_on(records: RecordMap, ref: LayerRef) -> tuple[VolumeId, ...]:
    return tuple(sorted({child.volume for child in children(records, ref)} - {ref.volume}))


def next_merge(records: RecordMap, volume: VolumeId) -> Merge | None:
    """A layer that no snapshot names any more and that one other layer rests on: that one goes into it. Where
    that other is the active one, only a raw base of a raw volume takes it up: it is as fast as before then.
    A qcow2 volume keeps the one layer below until its next snapshot has gone."""
    record = records[volume]
    if record.mode is not Mode.SERVING:
        return None
    named = {record.active, *(each.layer for each in record.snapshots)}
    for layer in record.layers:
        resting = children(records, LayerRef(volume, layer.number))
        if layer.number in named or len(resting) != 1 or resting[0].volume != volume:
            continue
        above = record.layer(resting[0].number)
        if above.number != record.active:
            return Merge(layer=above.number, into=layer.number)
        if record.format is VolumeFormat.RAW and is_raw_base(layer):
            return Merge(layer=above.number, into=record.next_number, pivot=True)
    return None


def is_raw_base(layer: Layer) -> bool:
    return layer.format is VolumeFormat.RAW and layer.backing is None


def with_pivot(record: VolumeRecord, merge: Merge) -> VolumeRecord:
    """The base's file once more, as the layer that is to be active."""
    below = record.layer(merge.layer).backing
    assert below is not None and below.volume == record.volume
    base = msgspec.structs.replace(
        record.layer(below.number), number=merge.into, size=record.layer(merge.layer).size
    )
    return msgspec.structs.replace(record.with_layer(base), merge=merge)


def pivoted(record: VolumeRecord, merge: Merge) -> VolumeRecord:
    """The new layer of the base's file is all there is, beside layers of snapshots that came from elsewhere
    or were here before the volume."""
    below = record.layer(merge.layer).backing
    gone = {merge.layer, below.number if below is not None else merge.layer}
    layers = tuple(layer for layer in record.layers if layer.number not in gone)
    return msgspec.structs.replace(record, layers=layers, active=merge.into, merge=None)


def not_merged(record: VolumeRecord) -> VolumeRecord:
    """As before the merge, whose data the layer that stays shadows."""
    merge = record.merge
    if merge is None or not merge.pivot:
        return msgspec.structs.replace(record, merge=None)
    layers = tuple(layer for layer in record.layers if layer.number != merge.into)
    return msgspec.structs.replace(record, layers=layers, active=merge.layer, merge=None)


def merged(records: RecordMap, volume: VolumeId, merge: Merge) -> tuple[VolumeRecord, ...]:
    """Every record that changes when `merge.layer` has gone into `merge.into`, clones' included."""
    gone, into = LayerRef(volume, merge.layer), LayerRef(volume, merge.into)
    changed: list[VolumeRecord] = []
    for record in records.values():
        layers = tuple(
            msgspec.structs.replace(layer, backing=into) if layer.backing == gone else layer
            for layer in record.layers
        )
        if record.volume != volume and layers != record.layers:
            changed.append(msgspec.structs.replace(record, layers=layers))
        if record.volume == volume:
            changed.append(_merged(msgspec.structs.replace(record, layers=layers), merge))
    return tuple(changed)


def _merged(record: VolumeRecord, merge: Merge) -> VolumeRecord:
    size = max(record.layer(merge.into).size, record.layer(merge.layer).size)
    layers = tuple(
        msgspec.structs.replace(layer, size=size) if layer.number == merge.into else layer
        for layer in record.layers
        if layer.number != merge.layer
    )
    snapshots = tuple(
        msgspec.structs.replace(each, layer=merge.into) if each.layer == merge.layer else each
        for each in record.snapshots
    )
    return msgspec.structs.replace(record, layers=layers, snapshots=snapshots, merge=None)


def leaf_above(records: RecordMap, ref: LayerRef) -> LayerRef:
    """A layer on which nothing rests, somewhere above; the active one where it is above."""
    record = records[ref.volume]
    if ref in active_chain(records, ref.volume):
        return LayerRef(ref.volume, record.active)
    resting = children(records, ref)
    return leaf_above(records, resting[0]) if resting else ref
