"""What a host says of its volumes: what is served, what it takes, and what is wrong with it."""

import asyncio
import re
from collections.abc import Callable, Mapping

from nahtlos.model.errors import Unavailable
from nahtlos.model.ids import VolumeId
from nahtlos.model.inventory import VolumeStatus
from nahtlos.model.storage import VolumeFormat
from nahtlos.physical.hypervisor.qmp import Answer, Denied
from nahtlos.physical.storage import graph
from nahtlos.physical.storage.graph import Export
from nahtlos.physical.storage.layers import LayerFiles
from nahtlos.physical.storage.record import LayerRef, Mode, RecordMap, VolumeRecord
from nahtlos.physical.storage.serving import Serving

OBSERVE_WITHIN = 2.0
_EJECTED = re.compile(r"Block device (\S+) is ejected")


async def volume_statuses(
    serving: Serving, files: LayerFiles, spent: Callable[[VolumeId, int], bool]
) -> tuple[VolumeStatus, ...]:
    records = await asyncio.to_thread(serving.records.all)
    if not records:
        return ()
    exports = await serving.daemon.exports_if_answering(OBSERVE_WITHIN)
    corrupted = await _corrupted(serving, records, bool(exports))
    measured = await asyncio.to_thread(_measured, files, records)
    return tuple(
        _status(
            record,
            exports.get(volume),
            *measured[volume],
            problems=(serving.left_out.get(volume, ""), corrupted.get(volume, "")),
            spent_epoch=record.epoch if spent(volume, record.epoch) else 0,
        )
        for volume, record in sorted(records.items())
        if record.mode not in (Mode.DELETING, Mode.LEFT)
    )


def _status(
    record: VolumeRecord,
    export: Export | None,
    allocated: int,
    unreadable: str,
    *,
    problems: tuple[str, ...],
    spent_epoch: int,
) -> VolumeStatus:
    return VolumeStatus(
        id=record.volume,
        epoch=export.epoch if export else 0,
        served=export is not None and record.mode is not Mode.RECEIVING,
        size_mib=record.size >> 20,
        allocated_bytes=allocated,
        problem=next((words for words in (*problems, unreadable) if words), ""),
        spent_epoch=spent_epoch,
    )


def _measured(files: LayerFiles, records: RecordMap) -> dict[VolumeId, tuple[int, str]]:
    return {
        volume: (files.allocated(record), "" if record.mode is Mode.PROXY else files.problem(record))
        for volume, record in records.items()
    }


async def _corrupted(serving: Serving, records: RecordMap, answers: bool) -> dict[VolumeId, str]:
    """Volumes with a layer the daemon found corrupted: it refuses every further access to it."""
    formatted = any(
        layer.format is not VolumeFormat.RAW for record in records.values() for layer in record.layers
    )
    if not answers or not formatted:
        return {}
    said = dict(serving.daemon.corrupted)
    try:
        images = await serving.daemon.images()
        said |= {name: "it says so itself" for name, node in images.items() if is_corrupt(node)}
    except Denied as denied:  # one that was given up keeps the daemon from speaking of the others
        said |= dict.fromkeys(_EJECTED.findall(denied.message), "the daemon has given it up")
    except Unavailable:
        return {}
    found: dict[VolumeId, str] = {}
    for record in records.values():
        for layer in record.layers:
            name = graph.format_node(LayerRef(record.volume, layer.number))
            if name in said:
                found[record.volume] = f"{layer.file} is corrupted: {said[name]}"
    return found


def is_corrupt(node: Answer) -> bool:
    at: object = node
    for key in ("image", "format-specific", "data", "corrupt"):
        at = at.get(key) if isinstance(at, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return at is True
