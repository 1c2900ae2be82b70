"""What has come true of volumes, and what follows without anybody's deciding. Pure: the state in, a list of
what to write out. See `bookkeeping`.
"""

from dataclasses import dataclass

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.blueprint import HostIntent, Policy
from nahtlos.model.errors import Conflict, ErrorRecord
from nahtlos.model.ids import HostId, OperationId, SnapshotId, VolumeId
from nahtlos.model.inventory import Inventory
from nahtlos.model.nouns import HostRole
from nahtlos.model.snapshot_places import reported_snapshots
from nahtlos.model.storage import ReplicaState, StorageBackend, VolumeSpec
from nahtlos.model.volume_work import SnapshotGroup, volumes_of
from nahtlos.planner.volume_places import places
from nahtlos.runtime.controllers.server_snapshot_records import given_up
from nahtlos.runtime.controllers.state import State
from nahtlos.runtime.controllers.volume_records import EndedTask, ended_tasks, rehomed, write_end
from nahtlos.runtime.executor.volume_orders import volume_order
from nahtlos.runtime.executor.world import World
from nahtlos.runtime.store import operations, volumes
from nahtlos.runtime.store.events import EventDraft
from nahtlos.runtime.store.volumes import with_state


@dataclass(frozen=True, kw_only=True)
class VolumeChores:
    ends: tuple[EndedTask, ...] = ()
    rehomed: tuple[tuple[VolumeSpec, VolumeSpec, str], ...] = ()
    """As it was, as it is to be, and why."""
    spent: tuple[tuple[VolumeId, HostId], ...] = ()
    """Copies whose host was restarted under them."""
    impossible: tuple[tuple[HostId, OperationId, ErrorRecord], ...] = ()
    """Operations that can never begin, with the host that will say so."""
    gone_snapshots: tuple[SnapshotId, ...] = ()
    dropped_wishes: tuple[str, ...] = ()
    exports_until: float | None = None
    """Not None: some have expired by then."""

    def __bool__(self) -> bool:
        return self != VolumeChores()


def volume_chores(state: State, policy: Policy, inventory: Inventory, world: World) -> VolumeChores:
    cancelled = frozenset(wish.id for wish in state.kept.wishes if wish.cancelled)
    statuses = {
        task.id: status
        for task in world.blueprint.volume_tasks
        if (status := world.status(task.coordinator, task.id)) is not None
    }
    recorded = (*state.ended, *state.volume_ends)
    ends = ended_tasks(world.blueprint.volume_tasks, statuses, recorded, cancelled)
    if ends:
        return VolumeChores(ends=ends)  # what follows is looked at once this is recorded
    expired = any(export.expires_at <= state.now for export in state.kept.exports)
    serving = {task.wish for task in world.blueprint.volume_tasks}
    return VolumeChores(
        rehomed=_rehomed(policy, inventory, world),
        spent=_spent(policy, inventory, world),
        impossible=_impossible(world),
        gone_snapshots=_gone_snapshots(state, inventory),
        dropped_wishes=tuple(sorted(cancelled - serving)),
        exports_until=state.now if expired else None,
    )


def _impossible(world: World) -> tuple[tuple[HostId, OperationId, ErrorRecord], ...]:
    """What an operation is of has changed, or gone, since it was decided and before it began."""
    error = ErrorRecord(kind="refused", message="what it is of has changed since it was decided")
    return tuple(
        (task.coordinator, task.id, error)
        for task in world.blueprint.volume_tasks
        if world.status(task.coordinator, task.id) is None
        and task.id not in world.refused
        and volume_order(world, task) is None
    )


def _busy(world: World) -> set[VolumeId]:
    return {volume for task in world.blueprint.volume_tasks for volume in volumes_of(task.work)}


def _rehomed(
    policy: Policy, inventory: Inventory, world: World
) -> tuple[tuple[VolumeSpec, VolumeSpec, str], ...]:
    """Stale copies on hosts that are away for too long or to be empty are made elsewhere; an image of Ceph's
    is administered elsewhere at once."""
    busy = _busy(world)
    found: list[tuple[VolumeSpec, VolumeSpec, str]] = []
    for name, volume in sorted(policy.volumes.items()):
        if name in busy:
            continue
        for copy in volume.copies:
            why = _why_left(policy, inventory, copy.host)
            after = _elsewhere(policy, inventory, volume, copy.host) if why else None
            if after is not None:
                found.append((volume, after, f"{name}: {copy.host} {why}"))
                break
    return tuple(found)


def _why_left(policy: Policy, inventory: Inventory, host: HostId) -> str:
    if host not in policy.hosts:
        return "is no host any more"
    if policy.intents.get(host) is HostIntent.DRAINED:
        return "is drained"
    if host in policy.given_up and host not in inventory.connected:
        return "is away"
    return ""


def _elsewhere(policy: Policy, inventory: Inventory, volume: VolumeSpec, host: HostId) -> VolumeSpec | None:
    if volume.backend is StorageBackend.CEPH:
        others = [
            h
            for h, spec in sorted(policy.hosts.items())
            if spec.role is HostRole.COMPUTE
            and h in inventory.connected
            and not _why_left(policy, inventory, h)
        ]
        return msgspec.structs.replace(volume, host=others[0]) if others else None
    stale = any(c.host == host and c.state is ReplicaState.STALE for c in volume.copies)
    if not stale or not volume.current:
        return None
    beside = [copy.host for copy in volume.copies if copy.host != host]
    to = places(policy, inventory, size_mib=volume.size_mib, beside=beside, without=(host,))
    return rehomed(volume, host, to[0]) if to else None


def _spent(policy: Policy, inventory: Inventory, world: World) -> tuple[tuple[VolumeId, HostId], ...]:
    busy = _busy(world)
    return tuple(
        (status.id, host)
        for host, seen in sorted(inventory.hosts.items())
        for status in seen.volumes
        if status.spent_epoch
        and status.id not in busy
        and (volume := policy.volumes.get(status.id)) is not None
        and host in volume.current
        and volume.at(host).epoch == status.spent_epoch
    )


def _gone_snapshots(state: State, inventory: Inventory) -> tuple[SnapshotId, ...]:
    """Also from where they are not kept any more."""
    found: list[SnapshotId] = []
    for name, row in state.kept.snapshots.items():
        having = (h for h in state.hosts if any(s.id == name for s in reported_snapshots(inventory, h)))
        hosts = {*having, *(host for host in row.spec.hosts if host in state.hosts)}
        if row.removed and all(_has_deleted(state, inventory, host, name) for host in hosts):
            found.append(name)
    return tuple(found)


def _has_deleted(state: State, inventory: Inventory, host: HostId, snapshot: SnapshotId) -> bool:
    config, seen = state.configs.get(host), inventory.hosts.get(host)
    if config is None or seen is None or snapshot not in config.removed_snapshots:
        return False
    return seen.generation >= config.generation and all(s.id != snapshot for s in seen.snapshots)


# --- writing -----------------------------------------------------------------------------------------


async def write_volume_chores(tx: AsyncConnection, found: VolumeChores, now: float) -> list[EventDraft]:
    """Decided on a look that may be old by now: what has changed since is left for the next one."""
    drafts = [await write_end(tx, end, now) for end in found.ends]
    for before, after, why in found.rehomed:
        if await volumes.get(tx, before.id) == before:
            await volumes.put(tx, after)
            drafts.append(EventDraft(kind="volume.rehomed", subject=before.id, text=why))
    for volume, host in found.spent:
        drafts += await _write_spent(tx, volume, host)
    for host, operation, error in found.impossible:
        await operations.refuse(tx, operation, host, error)
    for snapshot in found.gone_snapshots:
        await volumes.forget_snapshot(tx, snapshot)
        drafts.append(EventDraft(kind="snapshot.gone", subject=snapshot, text=f"{snapshot} is gone"))
    wished = {wish.id: wish.work for wish in await volumes.wishes(tx)} if found.dropped_wishes else {}
    for wish in found.dropped_wishes:
        await volumes.forget_wish(tx, wish)
        if isinstance(work := wished.get(wish), SnapshotGroup):
            await given_up(tx, work)
    if found.exports_until is not None:
        await volumes.forget_exports(tx, until=found.exports_until)
    return drafts


async def _write_spent(tx: AsyncConnection, volume: VolumeId, host: HostId) -> list[EventDraft]:
    """Another current copy has what this one may lack. Where there is none, it is what there is, and served
    by an epoch its former clients do not know."""
    spec = await volumes.get(tx, volume)
    if spec is None or host not in spec.current:
        return []
    text = f"{host} was restarted under {volume}"
    try:
        await volumes.lose_copy(tx, volume, host)
    except Conflict:
        await volumes.put(tx, with_state(spec, host, ReplicaState.CURRENT, spec.newest_epoch + 1))
        return [EventDraft(kind="volume.fenced", subject=volume, text=f"{text}: served by a new epoch")]
    return [
        EventDraft(kind="volume.copy-stale", subject=volume, text=f"{text}: its copy is brought up to date")
    ]
