"""Which host is given which volume key: one that holds a copy or a snapshot of a volume encrypted by it, or
takes part in an operation that brings one there. Everybody else is refused in the same words, whether or not
the key is there. A key of what was deleted that nothing else needs is destroyed.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Protocol

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, KeyId, VolumeId
from nahtlos.model.storage import BackupSpec, SnapshotSpec, VolumeSpec
from nahtlos.model.volume_work import (
    BackingUp,
    DeletingBackup,
    PlannedVolumeTask,
    Restoring,
    VolumeWork,
    volumes_of,
)
from nahtlos.runtime.store import blueprints, intent, spent_keys
from nahtlos.runtime.store import volumes as stored
from nahtlos.runtime.store.store import AsyncConnection, Store


class Secrets(Protocol):
    """As `identity.Keyring`; blocks shortly."""

    def create(self, key: KeyId) -> None: ...

    def secret(self, key: KeyId) -> bytes: ...

    def destroy(self, key: KeyId) -> None:
        """Repeatable."""
        ...


def entitled(
    key: KeyId,
    volumes: Mapping[VolumeId, VolumeSpec],
    tasks: Iterable[PlannedVolumeTask],
    snapshots: Iterable[SnapshotSpec] = (),
) -> frozenset[HostId]:
    """Hosts that may have `key` now."""
    encrypted = {volume.id for volume in volumes.values() if volume.encryption_key == key}
    holding = {copy.host for volume in encrypted for copy in volumes[volume].copies}
    taking = {
        host
        for task in tasks
        if encrypted.intersection(volumes_of(task.work)) or _restores(task, key)
        for host in task.hosts
    }
    keeping = {host for snapshot in snapshots if snapshot.volume in encrypted for host in snapshot.hosts}
    return frozenset(holding | taking | keeping)


def _restores(task: PlannedVolumeTask, key: KeyId) -> bool:
    """A volume that is restored is known to nobody else yet."""
    return isinstance(task.work, Restoring) and task.work.volume.encryption_key == key


def needed(
    volumes: Iterable[VolumeSpec], backups: Iterable[BackupSpec], works: Iterable[VolumeWork]
) -> frozenset[KeyId]:
    """Keys without which something could not be read any more, or not be made as it is to be. Snapshots are
    of volumes, which last as long as they."""
    found: set[KeyId | None] = {volume.encryption_key for volume in volumes}
    found |= {backup.encryption_key for backup in backups}
    for work in works:
        match work:
            case Restoring():
                found.add(work.volume.encryption_key)
                found |= {backup.encryption_key for backup in work.chain}
            case BackingUp() | DeletingBackup():
                found.add(work.backup.encryption_key)
            case _:
                pass  # of volumes there are
    return frozenset(key for key in found if key is not None)


class VolumeKeys:
    def __init__(self, store: Store, secrets: Secrets) -> None:
        self._store = store
        self._secrets = secrets

    async def destroy_spent(self, tx: AsyncConnection) -> tuple[KeyId, ...]:
        """Which were. Killed before `tx` ends, they are destroyed once more."""
        candidates = await spent_keys.read(tx)
        if not candidates:
            return ()
        known = await stored.read(tx)
        target = await blueprints.target(tx)
        works = [wish.work for wish in known.wishes]
        works += [task.work for task in (target.volume_tasks if target else ())]
        rows = (await intent.volumes(tx)).values()
        wanted = needed((row.spec for row in rows), known.backups.values(), works)
        spent = tuple(key for key in candidates if key not in wanted)
        for key in spent:
            await asyncio.to_thread(self._secrets.destroy, key)
        if spent:
            await spent_keys.forget(tx, spent)
        return spent

    async def secret_for(self, host: HostId, key: KeyId) -> bytes:
        async with self._store.reading() as tx:
            volumes = {volume: row.spec for volume, row in (await intent.volumes(tx)).items()}
            snapshots = tuple(row.spec for row in (await stored.read(tx)).snapshots.values())
            target = await blueprints.target(tx)
        if host not in entitled(key, volumes, target.volume_tasks if target else (), snapshots):
            raise Refused(
                f"{host} holds no volume that is encrypted by '{key}'",
                field="key",
                remedy="a host is given the keys of the volumes it holds, and no others",
            )
        return await asyncio.to_thread(self._secrets.secret, key)
