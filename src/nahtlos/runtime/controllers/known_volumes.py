"""Which volumes there are, what has them, and what is under way with them. Pure; every refusal names the
field and the remedy."""

from collections.abc import Mapping

from nahtlos.model.errors import Conflict, NotFound
from nahtlos.model.ids import ServerId, SnapshotId, VolumeId
from nahtlos.model.storage import VolumeSpec
from nahtlos.model.volume_work import SnapshotMove, VolumeWish, VolumeWork, new_names, volumes_of, words
from nahtlos.runtime.controllers.requests import listed
from nahtlos.runtime.controllers.state import State


def known_volume(state: State, volume: VolumeId, field: str = "volume") -> VolumeSpec:
    row = state.volumes.get(volume)
    if row is None:
        known = (name for name, each in state.volumes.items() if not each.removed)
        raise NotFound(f"no volume '{volume}'", field=field, remedy=f"volumes: {listed(known)}")
    if row.removed:
        raise Conflict(f"{volume} is being deleted", field=field, remedy="wait until it is gone")
    return row.spec


def holder_of(state: State, volume: VolumeId) -> ServerId | None:
    """The server that has it, as its system disk or beside it, or whose memory is saved on it."""
    found = (s for s, r in state.servers.items() if volume in (*r.spec.all_volumes, r.spec.memory_volume))
    return next(found, None)


def is_system_disk(state: State, volume: VolumeId) -> bool:
    return any(row.spec.volume == volume for row in state.servers.values())


def check_idle(state: State, volume: VolumeId) -> None:
    """Conflict while an operation of it runs or is wished."""
    for name, work in _under_way(state):
        if volume in volumes_of(work):
            raise Conflict(
                f"{volume} is in use by {name} ({words(work)})",
                field="volume",
                remedy=f"wait until it has ended, or: nahtlos volume cancel {volume}",
            )


def check_stays(state: State, snapshot: SnapshotId) -> None:
    """Conflict while it is on its way to another host: nobody could rest on it where it was."""
    for name, work in _under_way(state):
        if isinstance(work, SnapshotMove) and snapshot in work.snapshots:
            raise Conflict(
                f"{snapshot} is on its way to {work.destination} ({name})",
                field="snapshot",
                remedy="wait until it is there: nahtlos volume tasks --watch",
            )


def _under_way(state: State) -> list[tuple[str, VolumeWork]]:
    """What runs or is wished, by the name of the operation or of the wish."""
    running = state.blueprint.volume_tasks if state.blueprint else ()
    works: list[tuple[str, VolumeWork]] = [
        (str(task.id), task.work) for task in running if task.id not in state.volume_ends
    ]
    return works + [(wish.id, wish.work) for wish in state.kept.wishes]


def wishes_of(state: State, volume: VolumeId) -> tuple[VolumeWish, ...]:
    """Those that can be taken back. Conflict if there are none."""
    found = tuple(w for w in state.kept.wishes if volume in volumes_of(w.work) and not w.cancelled)
    if not found:
        planned = state.blueprint.volume_tasks if state.blueprint else ()
        own = [t for t in planned if volume in volumes_of(t.work) and t.id not in state.volume_ends]
        remedy = "nothing is to be done"
        if own:
            remedy = f"{own[0].id} is the cloud's own ({own[0].reason}); it ends with its cause"
        raise Conflict(f"nothing is asked for of {volume}", field="volume", remedy=remedy)
    return found


def check_no_memory(state: State, volume: VolumeId, field: str) -> None:
    """Conflict if a whole server's snapshot keeps its memory on it."""
    for whole in state.kept.server_snapshots.values():
        if whole.saved.volume == volume:
            raise Conflict(
                f"{volume} holds the memory of snapshot {whole.id}",
                field=field,
                remedy=f"it goes with it: nahtlos snapshot delete {whole.id}",
            )


def check_name_free(state: State, name: str, kind: str) -> None:
    """Volumes, snapshots and backups each have names of their own; what is only wished has its name, too."""
    taken: Mapping[str, set[str]] = {
        "volume": set(state.volumes),
        "snapshot": set(state.kept.snapshots),
        "backup": set(state.kept.backups),
    }
    wished = {new for wish in state.kept.wishes for new in new_names(wish.work)}
    if name in taken[kind] or name in wished:
        raise Conflict(f"a {kind} '{name}' exists", field="name", remedy="choose another name")
