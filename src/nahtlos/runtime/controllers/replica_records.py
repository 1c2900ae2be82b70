"""A copy that a server's writes do not reach any more is no current one: recorded before the server goes on.

The answer to `ReplicaLost`. One transaction: who asks owns the server, another copy is current, this one is
not from here on. Asked again it answers the same. Never decides what becomes of the copy.
"""

from sqlalchemy.ext.asyncio import AsyncConnection

from nahtlos.model.errors import NotFound, Refused, Stale
from nahtlos.model.ids import HostId, ServerId
from nahtlos.model.storage import ReplicaState, VolumeSpec
from nahtlos.runtime.executor.attachments import attachment
from nahtlos.runtime.store import blueprints, intent, volumes
from nahtlos.runtime.store.store import Store
from nahtlos.wire.volumes import ReplicaLost, ReplicasRecorded


async def lose(store: Store, epoch: int, asker: HostId, body: ReplicaLost) -> ReplicasRecorded:
    """`epoch`: the leader's. Stale if the asker does not own the server, Conflict if it has lost the last
    current copy, NotFound if there is no such volume."""
    async with store.deciding(epoch) as tx:
        await _check_owner(tx, asker, body)
        await _check_volume(tx, body)
        spec = await _lost(tx, body)
        hosts = {name: row.spec for name, row in (await intent.hosts(tx)).items()}
    reached = attachment(spec, hosts)
    if reached is None:
        raise NotFound(f"no host has a copy of {body.volume}", field="volume")
    return ReplicasRecorded(attachment=reached)


async def _lost(tx: AsyncConnection, body: ReplicaLost) -> VolumeSpec:
    spec = await volumes.get(tx, body.volume)
    if spec is None:
        raise NotFound(f"no volume '{body.volume}'", field="volume")
    if _is_known(spec, body) or _is_another(spec, body):
        return spec
    return await volumes.lose_copy(tx, body.volume, body.lost)


def _is_known(spec: VolumeSpec, body: ReplicaLost) -> bool:
    """Recorded already: asked again, because an answer did not arrive."""
    return any(
        copy.host == body.lost
        and copy.state is ReplicaState.STALE
        and _export(spec, body.lost) == body.export
        for copy in spec.copies
    )


def _is_another(spec: VolumeSpec, body: ReplicaLost) -> bool:
    """The copy that was lost is replaced by now, by one of a later epoch."""
    if not body.export or all(copy.host != body.lost for copy in spec.copies):
        return False
    return _epoch(body.export) < spec.at(body.lost).epoch


def _export(spec: VolumeSpec, host: HostId) -> str:
    return f"{spec.id}.e{spec.at(host).epoch}"


def _epoch(export: str) -> int:
    _, _, epoch = export.rpartition(".e")
    return int(epoch) if epoch.isdecimal() else 0


async def _check_owner(tx: AsyncConnection, asker: HostId, body: ReplicaLost) -> None:
    """As it is recorded, or as it will be once the end of a move that runs has been heard of. A server that
    is being removed has no place any more: whoever still had it says what it has left."""
    target = await blueprints.target(tx)
    held = target.servers.get(body.server) if target else None
    if held is None and await _is_removed(tx, body.server):
        return
    if target is None or held is None:
        raise NotFound(f"no server '{body.server}'", field="server")
    at_home = held.host == asker and body.epoch in (held.epoch, held.epoch + 1)
    arriving = any(
        move.server == body.server and move.destination == asker and move.epoch == body.epoch
        for move in target.moves
    )
    if not at_home and not arriving:
        raise Stale(
            f"{asker} does not own {body.server} by epoch {body.epoch}; {held.host} does by {held.epoch}",
            field="server",
        )


async def _is_removed(tx: AsyncConnection, server: ServerId) -> bool:
    row = (await intent.servers(tx)).get(server)
    return row is not None and row.removed_at is not None


async def _check_volume(tx: AsyncConnection, body: ReplicaLost) -> None:
    spec = (await intent.servers(tx)).get(body.server)
    if spec is not None and body.volume not in spec.spec.all_volumes:
        raise Refused(f"{body.server} has no volume {body.volume}", field="volume")
