"""Safety of what is decided for volumes, from one blueprint to the next. See `check`."""

from collections.abc import Iterator

from nahtlos.model.blueprint import Blueprint, Policy
from nahtlos.model.storage import StorageBackend
from nahtlos.model.volume_work import (
    PlannedVolumeTask,
    Rebuilding,
    Relocation,
    SnapshotMove,
    volumes_of,
)


def volume_violations(policy: Policy, before: Blueprint, child: Blueprint) -> Iterator[str]:
    yield from _operations(policy, before, child)
    seen: dict[str, str] = {}
    for task in child.volume_tasks:
        for volume in volumes_of(task.work):
            if volume in seen:
                yield f"{seen[volume]} and {task.id} are both of {volume}"
            seen[volume] = task.id
    begun = {task.id for task in before.volume_tasks}
    moving = {move.server for move in before.moves} & {move.server for move in child.moves}
    for task in child.volume_tasks:
        if task.id in begun:
            continue
        yield from _copies(policy, task)
        yield from _snapshots(policy, task)
        for server in moving:
            spec = policy.servers.get(server)
            if spec is not None and set(spec.all_volumes) & set(volumes_of(task.work)):
                yield f"{task.id} begins while {server}, whose volume it is of, moves"


def _operations(policy: Policy, before: Blueprint, child: Blueprint) -> Iterator[str]:
    old = {task.id: task for task in before.volume_tasks}
    new = {task.id: task for task in child.volume_tasks}
    if len(new) != len(child.volume_tasks):
        yield "two operations of volumes share an id"
    for operation, was in old.items():
        if operation not in new and operation not in policy.volume_ends:
            yield f"{operation} is dropped although its end is not recorded"
        if operation in new and new[operation] != was:
            yield f"{operation} is altered after it was decided"
    for operation in new.keys() - old.keys():
        if int(operation.rpartition("-")[2]) <= before.counter:
            yield f"the id {operation} is used again"


def _snapshots(policy: Policy, task: PlannedVolumeTask) -> Iterator[str]:
    """They come from where they are kept, and go to where they are not."""
    work = task.work
    if not isinstance(work, SnapshotMove):
        return
    if work.destination not in policy.hosts:
        yield f"{task.id} goes to {work.destination}, which is no host"
    for name in work.snapshots:
        spec = policy.snapshots.get(name)
        if spec is None or work.source not in spec.hosts or work.destination in spec.hosts:
            yield f"{task.id} brings {name} from where it is not, or to where it is"


def _copies(policy: Policy, task: PlannedVolumeTask) -> Iterator[str]:
    """A copy never goes to where another one is, and comes from one that holds every acknowledged write."""
    work = task.work
    if not isinstance(work, Relocation | Rebuilding):
        return
    volume = policy.volumes.get(work.volume)
    if volume is None:
        yield f"{task.id} is of {work.volume}, which is to be no more"
        return
    if work.source not in volume.current:
        yield f"{task.id} begins from {work.source}, whose copy of {volume.id} is not current"
    if task.epoch <= volume.newest_epoch:
        yield f"{task.id} serves {volume.id} by epoch {task.epoch}, which was there before"
    others = {copy.host for copy in volume.copies if copy.host != work.source}
    if isinstance(work, Rebuilding):
        if work.target not in others or work.target in volume.current:
            yield f"{task.id} rebuilds what is no stale copy of {volume.id}"
    elif work.destination is None or work.destination in others:
        yield f"{task.id} brings a second copy of {volume.id} to {work.destination}"
    elif work.destination not in policy.hosts:
        yield f"{task.id} goes to {work.destination}, which is no host"
    elif work.backend is StorageBackend.CEPH and len(volume.copies) > 1:
        yield f"{task.id} brings one of several copies of {volume.id} to Ceph"
