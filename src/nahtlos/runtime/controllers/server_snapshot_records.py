"""What the ends of operations mean for snapshots of whole servers, and for a server that goes back to one."""

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.ids import SnapshotId, VolumeId
from nahtlos.model.nouns import ServerSpec
from nahtlos.model.power import Power, PowerState
from nahtlos.model.server_snapshots import ServerSnapshot, Taken
from nahtlos.model.volume_work import SnapshotGroup
from nahtlos.runtime.store import intent, server_snapshots, volumes

RESULT = "memory"
"""Of an operation: what its agent tells (`Taken`)."""


async def taken(tx: AsyncConnection, work: SnapshotGroup, told: str, now: float) -> None:
    if work.memory is not None:
        await server_snapshots.add(tx, snapshot_of(work, msgspec.json.decode(told, type=Taken), now))


def snapshot_of(work: SnapshotGroup, told: Taken, now: float) -> ServerSnapshot:
    assert work.memory is not None, f"{work.group} has no memory"
    by_volume = {each.volume: each.id for each in work.snapshots}
    return ServerSnapshot(
        id=SnapshotId(work.group),
        server=work.memory.server,
        snapshots=tuple(by_volume[disk.volume] for disk in told.saved.disks if disk.volume in by_volume),
        saved=told.saved,
        created_at=now,
        pause_seconds=told.pause_seconds,
    )


async def given_up(tx: AsyncConnection, work: SnapshotGroup) -> None:
    """It is not tried again: what was to hold the memory goes."""
    if work.memory is not None:
        await volumes.mark_removed(tx, work.memory.volume)


async def disk_is_back(tx: AsyncConnection, volume: VolumeId, snapshot: SnapshotId) -> None:
    """A disk of a server that goes back to a snapshot is what it was then."""
    known = await server_snapshots.all_of(tx)
    for row in (await intent.servers(tx)).values():
        back = row.spec.going_back
        if back is None or volume not in back.left:
            continue
        whole = known.get(back.snapshot)
        if whole is not None and snapshot in whole.snapshots:
            left = tuple(each for each in back.left if each != volume)
            after = msgspec.structs.replace(back, left=left)
            await volumes.put_server(tx, msgspec.structs.replace(row.spec, going_back=after))


def goes_on(spec: ServerSpec) -> ServerSpec:
    """A server that was stopped until its disks were what they were in a snapshot: it goes on from the
    memory, or, if what was to be done to them was given up, stays as it is."""
    assert spec.going_back is not None, f"{spec.id} goes back to nothing"
    before = spec.power
    if spec.going_back.left:
        power = msgspec.structs.replace(before, again=False)
        return msgspec.structs.replace(spec, power=power, memory_volume=None, going_back=None)
    power = Power(state=PowerState.ON, serial=before.serial + 1, boot=before.boot)
    return msgspec.structs.replace(spec, power=power)
