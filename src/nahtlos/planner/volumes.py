"""Operations of volumes: which may run now, and who coordinates them.

    wished, stale, or on a drained host --ready, a slot free--> in the blueprint --end recorded--> gone
                                                                        |
                                                              undone: counted, tried again later

A volume takes part in one operation at a time, and its server does not move meanwhile. What a task leads to
is written down by whoever records its end (`Policy.volume_ends`); the planner only finds it in the policy.
"""

from collections.abc import Iterable, Iterator

from nahtlos.model.blueprint import Failure, HostIntent, WaitKind
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.inventory import OperationState
from nahtlos.model.nouns import Component
from nahtlos.model.storage import ReplicaState, StorageBackend, VolumeSpec
from nahtlos.model.volume_work import (
    BackingUp,
    DeletingBackup,
    PlannedVolumeTask,
    Rebuilding,
    Relocation,
    Restoring,
    Reverting,
    Scrubbing,
    SnapshotGroup,
    SnapshotMove,
    VolumeWork,
    WritingFile,
    kind_of,
    volumes_of,
    words,
)
from nahtlos.planner.draft import Draft
from nahtlos.planner.snapshots import snapshots_to_leave, tell_of_snapshots
from nahtlos.planner.volume_places import domain_of, places
from nahtlos.planner.volume_wishes import Decided, Unready, decided

MAX_ATTEMPTS = 5
LONGEST_PATIENCE = 60.0


def plan_volumes(draft: Draft) -> None:
    _absorb_ends(draft)
    wanted = {key for key, _ in _all_wanted(draft)}
    for key, begin in _all_wanted(draft):
        _serve(draft, key, begin)
    _tell_of_drains(draft)
    running = {task.key for task in draft.volume_tasks.values()}
    for key in draft.failed_volume_tasks.keys() - wanted - running:
        del draft.failed_volume_tasks[key]


# --- ends --------------------------------------------------------------------------------------------


def _absorb_ends(draft: Draft) -> None:
    wishes = {wish.id: wish for wish in draft.policy.volume_wishes}
    for task in tuple(draft.volume_tasks.values()):
        end = draft.policy.volume_ends.get(task.id)
        if end is None:
            _say_how_it_stands(draft, task)
            continue
        del draft.volume_tasks[task.id]
        if end.done:
            draft.failed_volume_tasks.pop(task.key, None)
            draft.change(f"{task.id} is done: {words(task.work)}")
            continue
        why = f": {end.error.message}" if end.error else ""
        draft.change(f"{task.id} was undone ({words(task.work)}){why}")
        if not task.wish or task.wish in wishes:
            before = draft.failed_volume_tasks.get(task.key)
            draft.failed_volume_tasks[task.key] = Failure(
                operation=task.id,
                attempts=before.attempts + 1 if before else 1,
                error=end.error,
                host=task.coordinator,
            )


def _say_how_it_stands(draft: Draft, task: PlannedVolumeTask) -> None:
    told = [s for h, s in draft.observed.operations.get(task.id, ()) if h == task.coordinator]
    status = told[0] if told else None
    for subject in volumes_of(task.work):
        what = f"{task.id} ({words(task.work)})"
        if status is not None and status.state is OperationState.STUCK:
            error = status.error
            remedy = error.remedy if error and error.remedy else f"look at {task.coordinator}"
            why = f": {error.message}" if error else ""
            draft.wait(subject, WaitKind.BLOCKED, f"{what} is stuck{why}", remedy)
        elif not draft.observed.connected(task.coordinator):
            text = f"{what}: the agent of {task.coordinator} is not connected"
            draft.wait(subject, WaitKind.HOST, text)
        elif status is None:
            again = f" (tried again after {task.patience_seconds:g} s)" if task.patience_seconds else ""
            draft.wait(subject, WaitKind.MOVE, f"{what} has not begun yet{again}")
        elif status.waits_for:
            draft.wait(subject, WaitKind.HOST, f"{what}: {task.coordinator} waits for {status.waits_for}")


# --- what is wanted ----------------------------------------------------------------------------------


def _all_wanted(draft: Draft) -> list[tuple[str, Decided | Unready]]:
    """In the order in which it is served: what makes data safe, what people asked for, what empties hosts."""
    rebuilds = [(_key(work), decided(draft, work, "a copy is stale")) for work in _stale_copies(draft)]
    wishes = [
        (wish.id, decided(draft, wish.work, "requested", wish.id))
        for wish in draft.policy.volume_wishes
        if not wish.cancelled
    ]
    drains = [(_key(work), _leaving(draft, work)) for work in copies_to_leave(draft)]
    snapshots = [(_key(work), begin) for work, begin in snapshots_to_leave(draft, drained_hosts(draft))]
    return [*rebuilds, *wishes, *drains, *snapshots]


def _key(work: Rebuilding | Relocation | SnapshotMove) -> str:
    place = work.target if isinstance(work, Rebuilding) else work.source
    return f"{kind_of(work)}/{work.volume}/{place}"


def _stale_copies(draft: Draft) -> Iterator[Rebuilding]:
    for name, volume in sorted(draft.policy.volumes.items()):
        stale = [copy.host for copy in volume.copies if copy.state is ReplicaState.STALE]
        if not stale:
            continue
        if not volume.current:
            draft.wait(
                name,
                WaitKind.BLOCKED,
                f"no copy of {name} is current",
                f"restore it from a backup: nahtlos backup list --volume {name}",
            )
            continue
        near = [host for host in volume.current if draft.observed.connected(host)]
        for host in stale:
            yield Rebuilding(
                volume=name,
                source=(near or volume.current)[0],
                target=host,
                bytes_per_second=draft.policy.rebuild_bytes_per_second,
            )


def drained_hosts(draft: Draft) -> list[HostId]:
    """Whose operators want them empty, volumes included."""
    return [host for host in sorted(draft.hosts) if draft.intent(host) is HostIntent.DRAINED]


def copies_to_leave(draft: Draft) -> Iterator[Relocation]:
    """Those on hosts that are drained. A stale one is no matter: it is made elsewhere (see the records)."""
    for host in drained_hosts(draft):
        for name, volume in sorted(draft.policy.volumes.items()):
            here = any(c.host == host and c.state is ReplicaState.CURRENT for c in volume.copies)
            if here and volume.backend is StorageBackend.EMBEDDED:
                yield Relocation(
                    volume=name, source=host, bytes_per_second=draft.policy.rebuild_bytes_per_second
                )


def _leaving(draft: Draft, work: Relocation) -> Decided | Unready:
    """A server that leaves the same host does so first: moves are short, and one that is to run elsewhere
    tells where its volume is best."""
    server = server_of(draft, work.volume)
    owner = draft.servers.get(server) if server is not None else None
    if owner is not None and owner.host == work.source:
        return Unready(work, WaitKind.MOVE, f"{work.volume} leaves {work.source} after its server {server}")
    return decided(draft, work, f"{work.source} is drained")


def server_of(draft: Draft, volume: VolumeId) -> ServerId | None:
    return next((s for s, spec in sorted(draft.policy.servers.items()) if volume in spec.all_volumes), None)


# --- beginning ---------------------------------------------------------------------------------------


def _serve(draft: Draft, key: str, begin: Decided | Unready) -> None:
    if any(task.key == key for task in draft.volume_tasks.values()):
        return
    unready = begin if isinstance(begin, Unready) else _why_not_now(draft, key, begin)
    if unready is not None:
        for volume in volumes_of(unready.work):
            draft.wait(volume, unready.kind, unready.reason, unready.remedy)
        return
    assert isinstance(begin, Decided)
    failure = draft.failed_volume_tasks.get(key)
    task = PlannedVolumeTask(
        id=draft.next_operation("volume"),
        work=begin.work,
        coordinator=begin.coordinator,
        hosts=begin.hosts,
        epoch=begin.epoch,
        losses=begin.losses,
        wish=begin.wish,
        key=key,
        reason=begin.reason,
        patience_seconds=min(2.0 ** (failure.attempts - 1), LONGEST_PATIENCE) if failure else 0.0,
    )
    draft.volume_tasks[task.id] = task
    draft.change(f"{words(task.work)}: {task.reason}")


def _why_not_now(draft: Draft, key: str, begin: Decided) -> Unready | None:
    work = begin.work
    failure = draft.failed_volume_tasks.get(key)
    if failure is not None and failure.attempts >= MAX_ATTEMPTS and not isinstance(work, Rebuilding):
        last = f", last: {failure.error.message}" if failure.error else ""
        hint = f"{failure.error.remedy}; then " if failure.error and failure.error.remedy else ""
        return Unready(
            work,
            WaitKind.OPERATOR,
            f"could not {words(work)} in {failure.attempts} attempts{last}",
            f"{hint}cancel it and ask anew, or activate and drain the host",
        )
    for volume in volumes_of(work):
        if busy := task_of(draft, volume):
            return Unready(work, WaitKind.MOVE, f"to {words(work)} waits for {busy.id} ({words(busy.work)})")
        server = server_of(draft, volume)
        move = draft.moving.get(server) if server is not None else None
        if move is not None:
            return Unready(work, WaitKind.MOVE, f"to {words(work)} waits while {server} moves ({move.id})")
    for host in begin.hosts:
        if not draft.observed.connected(host):
            text = f"to {words(work)} waits: the agent of {host} is not connected"
            return Unready(work, WaitKind.HOST, text, f"start the agent of {host}")
        plan = draft.hosts.get(host)
        if plan is not None and plan.replacing is Component.STORAGE:
            text = f"to {words(work)} waits while the storage daemon of {host} is replaced"
            return Unready(work, WaitKind.HOST, text)
        if host == draft.upgrading and not isinstance(work, Rebuilding):
            return Unready(work, WaitKind.HOST, f"to {words(work)} waits while {host} is upgraded")
    return _not_served_yet(draft, begin) or _no_slot(draft, begin)


def _not_served_yet(draft: Draft, begin: Decided) -> Unready | None:
    """A copy that is read must be served as it is recorded: from the operation's begin to its end its host
    leaves it as it is."""
    work = begin.work
    for volume, host in _read(draft, begin):
        seen = draft.observed.host(host)
        told = next((v for v in (seen.volumes if seen else ()) if v.id == volume.id), None)
        epoch = volume.at(host).epoch
        if told is None or not told.served or told.epoch != epoch or told.size_mib < volume.size_mib:
            text = f"to {words(work)} waits until {host} serves {volume.id} by epoch {epoch}"
            return Unready(work, WaitKind.HOST, text)
    return None


def _read(draft: Draft, begin: Decided) -> Iterator[tuple[VolumeSpec, HostId]]:
    """Copies that an operation begins from."""
    work = begin.work
    for name in volumes_of(work):
        volume = draft.policy.volumes.get(name)
        if volume is None or volume.backend is StorageBackend.CEPH:
            continue
        match work:
            case Relocation() | Rebuilding():
                yield volume, work.source or volume.host
            case SnapshotGroup() | Scrubbing():
                for host in volume.current:
                    yield volume, host
            case BackingUp():
                yield volume, work.backup.host
            case Reverting():
                yield volume, begin.coordinator
            case Restoring() | SnapshotMove() | WritingFile() | DeletingBackup():
                pass


def task_of(draft: Draft, volume: VolumeId) -> PlannedVolumeTask | None:
    return next((t for t in draft.volume_tasks.values() if volume in volumes_of(t.work)), None)


def _no_slot(draft: Draft, begin: Decided) -> Unready | None:
    if is_short(begin.work):
        return None
    running = [task for task in draft.volume_tasks.values() if not is_short(task.work)]
    if len(running) >= draft.policy.parallel_volume_tasks:
        text = f"to {words(begin.work)} waits for its turn: {len(running)} of as many operations run"
        return Unready(begin.work, WaitKind.MOVE, text)
    for host in begin.hosts:
        there = sum(host in task.hosts for task in running)
        if there >= draft.policy.parallel_volume_tasks_per_host:
            text = f"to {words(begin.work)} waits for its turn: {there} of as many operations run on {host}"
            return Unready(begin.work, WaitKind.MOVE, text)
    return None


def is_short(work: VolumeWork) -> bool:
    """Copies nothing, so it takes no slot."""
    if isinstance(work, SnapshotGroup):
        return work.memory is None
    return isinstance(work, Reverting | DeletingBackup)


# --- what others ask ---------------------------------------------------------------------------------


def why_held_by_volumes(draft: Draft, server: ServerId) -> str | None:
    """Why `server` does not move now: an operation that speaks to it, or one of its source, would not find
    it where it was."""
    spec = draft.policy.servers.get(server)
    for volume in spec.all_volumes if spec is not None else ():
        task = task_of(draft, volume)
        if task is not None and _has_client(task.work):
            return f"{server} is not moved during {task.id} ({words(task.work)})"
    return None


def _has_client(work: VolumeWork) -> bool:
    return isinstance(work, Relocation | Rebuilding | SnapshotGroup)


def kept_on(volumes: Iterable[VolumeSpec], host: HostId) -> list[VolumeSpec]:
    """Volumes with a copy on `host`."""
    return [
        volume
        for volume in volumes
        if volume.backend is StorageBackend.EMBEDDED and any(copy.host == host for copy in volume.copies)
    ]


def _tell_of_drains(draft: Draft) -> None:
    for host in drained_hosts(draft):
        kept = kept_on(draft.policy.volumes.values(), host)
        if kept:
            mib = sum(volume.size_mib for volume in kept)
            many = "1 volume" if len(kept) == 1 else f"{len(kept)} volumes"
            draft.wait(host, WaitKind.MOVE, f"{host} still keeps {many} ({mib} MiB)")
        tell_of_snapshots(draft, host)


def spread_badly(draft: Draft, volume: VolumeSpec) -> bool:
    """Whether two copies would fail together although another host could have one."""
    domains = [domain_of(draft.policy.hosts[c.host]) for c in volume.copies if c.host in draft.policy.hosts]
    others = places(
        draft.policy,
        draft.observed.inventory,
        size_mib=volume.size_mib,
        beside=[c.host for c in volume.copies],
    )
    free = [h for h in others if domain_of(draft.policy.hosts[h]) not in domains]
    return len(set(domains)) < len(domains) and bool(free)
