"""Which host is given which volume key: one that holds a copy or a snapshot of a volume encrypted by it, or
takes part in an operation that brings one there. Everybody else is refused in the same words, whether or not
the key is there.
"""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Protocol

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, KeyId, VolumeId
from nahtlos.model.storage import SnapshotSpec, VolumeSpec
from nahtlos.model.volume_work import PlannedVolumeTask, Restoring, volumes_of
from nahtlos.runtime.store import blueprints, intent
from nahtlos.runtime.store import volumes as stored
from nahtlos.runtime.store.store import Store


class Secrets(Protocol):
    """As `identity.Keyring`; blocks shortly."""

    def create(self, key: KeyId) -> None: ...

    def secret(self, key: KeyId) -> bytes: ...


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


class VolumeKeys:
    def __init__(self, store: Store, secrets: Secrets) -> None:
        self._store = store
        self._secrets = secrets

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
