"""Volumes, snapshots, images and backups as people read them. Pure: values in, renderables out."""

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from nahtlos.model.inventory import OperationState
from nahtlos.model.storage import Consistency, DiskLimits, ReplicaState, StorageBackend
from nahtlos.model.volume_settings import VolumeSettings
from nahtlos.ops.cli.copying import standing
from nahtlos.ops.cli.pictures import BAD, GOOD, NOTHING, SOFT, WARN, facts, table
from nahtlos.ops.cli.volume_amounts import LIMITS
from nahtlos.runtime.controllers.volumes import (
    BackupView,
    CopyView,
    ExportTicket,
    FileView,
    ImageView,
    OperationView,
    SnapshotView,
    TargetView,
    TaskView,
    VolumeView,
)

MIB = 1 << 20


def amount(value: int) -> str:
    """Bytes, for people."""
    for size, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (MIB, "MiB")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} B"


def volumes(views: Sequence[VolumeView]) -> RenderableType:
    columns = ("Volume", "State", ">Size", ">Taken", "Server", "Copies", "Made from", "Under way")
    rows = (
        (
            v.spec.id,
            _state(v),
            amount(v.spec.size_mib * MIB),
            amount(sum(copy.allocated_bytes for copy in v.copies)),
            f"{v.server} (system)" if v.server and v.system else v.server or NOTHING,
            _places(v),
            v.spec.snapshot or v.spec.image or "blank",
            "; ".join(standing(task) for task in v.tasks) or v.waits_for or NOTHING,
        )
        for v in views
    )
    return table(columns, rows, "no volumes yet; `nahtlos volume create NAME --size 10G`")


def _state(view: VolumeView) -> Text:
    if view.removed:
        return Text("being deleted", style=WARN)
    if view.trouble or any(copy.problem for copy in view.copies):
        return Text("in trouble", style=BAD)
    if any(copy.state is ReplicaState.STALE for copy in view.copies):
        return Text("degraded", style=WARN)
    if view.tasks:
        return Text(view.tasks[0].kind, style=WARN)
    return Text("ready", style=GOOD) if view.settled else Text("settling", style=SOFT)


def _places(view: VolumeView) -> str:
    if view.spec.backend is StorageBackend.CEPH:
        return "Ceph"
    stale = ReplicaState.STALE
    return ", ".join(f"{c.host} (stale)" if c.state is stale else c.host for c in view.copies)


def volume(view: VolumeView) -> RenderableType:
    spec = view.spec
    parts: list[RenderableType] = [
        facts(
            [
                ("volume", spec.id),
                ("state", _state(view)),
                ("project", spec.project),
                ("size", amount(spec.size_mib * MIB)),
                ("made from", spec.snapshot or spec.image or "blank"),
                ("backend", spec.backend),
                ("format", spec.format),
                ("encrypted", "yes" if spec.encryption_key else "no"),
                (
                    "limits",
                    limits_text(spec.limits) + (f", group {spec.limits_group}" if spec.limits_group else ""),
                ),
                ("deletion", spec.deletion),
                ("server", _holder(view)),
                ("snapshots", ", ".join(view.snapshots) or NOTHING),
            ]
        ),
        Text(),
        table(
            ("Copy on", "State", "Served", ">Taken", ">Open", "Trouble"),
            (
                (
                    copy.host,
                    Text(copy.state, style=GOOD if copy.state is ReplicaState.CURRENT else WARN),
                    "yes" if copy.served else "no" if copy.connected else "its agent is away",
                    amount(copy.allocated_bytes),
                    str(copy.clients) if copy.clients >= 0 else NOTHING,
                    _trouble(copy),
                )
                for copy in view.copies
            ),
            "nowhere",
        ),
    ]
    if view.trouble:
        parts.append(Text(f"trouble: {view.trouble}", style=BAD))
    parts += [Text(standing(task)) for task in view.tasks]
    if view.waits_for:
        parts.append(Text(f"waits: {view.waits_for}", style=WARN))
    if view.ended:
        parts += [Text(), operations(view.ended, "")]
    return Group(*parts)


def _holder(view: VolumeView) -> str:
    if view.server is None:
        return NOTHING
    place = f" on {view.server_host}" if view.server_host is not None else ""
    return f"{view.server}{place}{' (system disk)' if view.system else ''}"


def _trouble(copy: CopyView) -> str:
    if not copy.problem:
        return NOTHING
    return f"{copy.problem}; {copy.remedy}" if copy.remedy else copy.problem


def operations(views: Sequence[OperationView], empty: str) -> RenderableType:
    rows = (
        (
            v.record.id,
            v.record.kind,
            v.record.subject,
            Text(
                "under way" if v.ended_at is None else v.record.state,
                style=GOOD if v.record.state == OperationState.DONE else WARN,
            ),
            _moment(v.begun_at),
            f"{v.ended_at - v.begun_at:.1f} s" if v.ended_at is not None else NOTHING,
            came_of_it(v) or NOTHING,
        )
        for v in views
    )
    columns = ("Operation", "Kind", "Of", "State", "Decided", ">Took", "What came of it")
    return table(columns, rows, empty)


def came_of_it(view: OperationView) -> str:
    """In words: why it failed, or what it has found or made."""
    record = view.record
    if record.error is not None:
        return record.error.message
    result = record.result
    if "differences" in result:
        compared = f"{amount(int(result.get('compared_bytes', '0')))} of {result.get('copies', '?')} copies"
        if result["differences"] == "0":
            return f"{compared}: nothing differs"
        return f"{compared}: {result['ranges']}"
    if "sha256" in result:
        size = amount(int(result["bytes"]))
        return f"{result['file']} on {result['host']}, {size}, sha256 {result['sha256']}"
    if "stored_bytes" in result:
        rests = f"rests on {result['base']}" if result.get("base") else "whole"
        why = f": {result['why_full']}" if result.get("why_full") else ""
        return f"{amount(int(result['stored_bytes']))} stored, {rests}{why}"
    return ", ".join(f"{name} {text}" for name, text in sorted(result.items()))


def operation(view: OperationView) -> RenderableType:
    record = view.record
    return facts(
        [
            ("operation", record.id),
            ("kind", record.kind),
            ("of", record.subject),
            ("state", record.state),
            ("from", record.source or NOTHING),
            ("to", record.destination or NOTHING),
            ("why", record.reason or NOTHING),
            ("decided", _moment(view.begun_at)),
            ("ended", _moment(view.ended_at) if view.ended_at is not None else NOTHING),
            ("what came of it", came_of_it(view) or NOTHING),
            ("remedy", (record.error.remedy if record.error else "") or NOTHING),
        ]
    )


def file_written(view: FileView) -> RenderableType:
    return facts(
        [
            ("file", view.file),
            ("of image", view.image),
            ("format", view.format),
            ("state", "complete" if view.sha256 else f"{view.progress:.0%}"),
            ("size", amount(view.bytes) if view.bytes else NOTHING),
            ("sha256", view.sha256 or NOTHING),
        ]
    )


def limits_text(limits: DiskLimits) -> str:
    given = {name: getattr(limits, name) for name in LIMITS if name != "burst_seconds"}
    words = [
        f"{name.replace('_', ' ')} {amount(value) if name.startswith('bytes') else value}/s"
        for name, value in given.items()
        if value
    ]
    return ", ".join(words) or "none"


def tasks(views: Sequence[TaskView]) -> RenderableType:
    rows = ((v.id or "wished", v.kind, standing(v)) for v in views)
    return table(("Operation", "Kind", "How it stands"), rows, "nothing is under way")


def snapshots(views: Sequence[SnapshotView]) -> RenderableType:
    columns = (
        "Snapshot",
        "Volume",
        "Group",
        ">Size",
        ">Taken",
        "Made",
        "Consistent",
        "Kept on",
        "Clones",
        "Exported",
    )
    rows = (
        (
            v.spec.id,
            v.spec.volume,
            v.spec.group or NOTHING,
            amount(v.spec.size_mib * MIB),
            amount(v.allocated_bytes),
            _moment(v.spec.created_at),
            _whole(v.spec.consistent),
            Text("being deleted", style=WARN) if v.removed else ", ".join(v.spec.hosts),
            ", ".join(v.clones) or NOTHING,
            ", ".join(f"until {_moment(e.expires_at)}" for e in v.exports) or NOTHING,
        )
        for v in views
    )
    return table(columns, rows, "no snapshots yet; `nahtlos snapshot create NAME --volume VOLUME`")


def _whole(consistency: Consistency) -> str:
    return "file system" if consistency is Consistency.FILESYSTEM else "after a crash"


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else NOTHING


def snapshot(view: SnapshotView) -> RenderableType:
    exports = [Text(f"{e.uri} until {_moment(e.expires_at)}") for e in view.exports]
    return Group(snapshots((view,)), *exports)


def ticket(value: ExportTicket) -> RenderableType:
    return Group(
        facts(
            [
                ("address", value.export.uri),
                ("credential", value.credential),
                ("until", _moment(value.export.expires_at)),
            ]
        ),
        Text(
            "The credential is not shown again. Put it into a file of mode 0600, then: "
            f"nbdinfo '{value.export.uri}?tls-psk-file=FILE'",
            style=SOFT,
        ),
    )


def images(views: Sequence[ImageView]) -> RenderableType:
    rows = (
        (
            v.id,
            amount(v.size_mib * MIB),
            Text(v.problem, style=BAD)
            if v.problem
            else Text("ready", style=GOOD)
            if v.progress >= 1
            else f"{v.progress:.0%}",
            ", ".join(v.volumes) or NOTHING,
        )
        for v in views
    )
    return table(("Image", ">Size", "State", "Volumes"), rows, "no images yet; `nahtlos image import`")


def backups(views: Sequence[BackupView]) -> RenderableType:
    columns = (
        "Backup",
        "Volume",
        "Made",
        "Consistent",
        ">Size",
        ">Stored",
        "Rests on",
        "Target",
        "Rested on by",
    )
    rows = (
        (
            v.spec.id,
            v.spec.volume,
            _moment(v.spec.created_at),
            _whole(v.spec.consistent),
            amount(v.spec.size_mib * MIB),
            "being deleted"
            if v.deleting
            else amount(v.spec.stored_bytes)
            if v.spec.stored_bytes
            else NOTHING,
            v.spec.base or "nothing: whole",
            f"{v.spec.target} on {v.spec.host}" if v.spec.target.startswith("/") else v.spec.target,
            ", ".join(v.rested_on_by) or NOTHING,
        )
        for v in views
    )
    return table(columns, rows, "no backups yet; `nahtlos backup create NAME --volume VOLUME --to PLACE`")


def targets(views: Sequence[TargetView]) -> RenderableType:
    return table(("Target", "Place"), ((v.name, v.place) for v in views), "no targets yet")


def settings(value: VolumeSettings) -> RenderableType:
    ceph = value.ceph
    rate = value.rebuild_bytes_per_second
    return facts(
        [
            ("operations at once", str(value.parallel)),
            ("on one host", str(value.parallel_per_host)),
            ("rebuilds and drains", f"{amount(rate)}/s" if rate else "not limited"),
            ("copies elsewhere after", f"{value.elsewhere_seconds:g} s"),
            ("disks, for tenants", limits_text(value.budget.tenants)),
            ("disks, for copies", limits_text(value.budget.copies)),
            ("Ceph", f"pool {ceph.pool} as {ceph.user}, {ceph.configuration}" if ceph else "none"),
        ]
    )
