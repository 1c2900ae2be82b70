"""`ServerSnapshots` over the store: reads the state, checks the request, writes intent. Nothing here waits
for hosts."""

from nahtlos.model.ids import ServerId, SnapshotId
from nahtlos.runtime.controllers import server_snapshot_requests as requests
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.look import Looks
from nahtlos.runtime.controllers.power_service import Said, Shown
from nahtlos.runtime.controllers.server_snapshots import (
    ServerRevertRequest,
    ServerSnapshotRequest,
    ServerSnapshotView,
)
from nahtlos.runtime.store import server_snapshots as rows
from nahtlos.runtime.store import volumes


class ServerSnapshotService:
    """`said`: what has been asked for, as an event; `shown`: a server as it is seen then."""

    def __init__(self, looks: Looks, *, said: Said, shown: Shown) -> None:
        self._looks = looks
        self._said = said
        self._shown = shown

    async def server_snapshots(self) -> tuple[ServerSnapshotView, ...]:
        look = await self._looks.now()
        found = look.state.kept.server_snapshots.values()
        return tuple(requests.view(look.state, look.inventory, each) for each in found)

    async def server_snapshot(self, snapshot: SnapshotId) -> ServerSnapshotView:
        look = await self._looks.now()
        return requests.view(look.state, look.inventory, requests.known(look.state, snapshot))

    async def create(self, request: ServerSnapshotRequest) -> tuple[SnapshotId, ...]:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            work, memory = requests.taking(state, state.inventory(self._looks.connected), request)
            await volumes.add(tx, memory)
            await volumes.add_wish(tx, work, self._looks.wall())
        self._said("snapshot.wished", request.name, f"{request.server} is to be snapshot with its memory")
        return tuple(snapshot.id for snapshot in work.snapshots)

    async def delete(self, snapshot: SnapshotId) -> None:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            whole = requests.deletable(state, snapshot)
            for name in whole.snapshots:
                await volumes.mark_snapshot_removed(tx, name)
            await volumes.mark_removed(tx, whole.saved.volume)
            await rows.forget(tx, snapshot)
        self._said("snapshot.deleted", snapshot, f"{snapshot} of {whole.server} is to be deleted")

    async def revert(self, server: ServerId, request: ServerRevertRequest) -> ServerView:
        async with self._looks.changing() as tx:
            state = await self._looks.state(tx)
            seen = state.inventory(self._looks.connected)
            before = state.servers[server].spec if server in state.servers else None
            spec, works = requests.going_back(state, seen, server, request.snapshot)
            if before is not None and before.memory_volume is not None:
                await volumes.mark_removed(tx, before.memory_volume)
            await volumes.put_server(tx, spec)
            for work in works:
                await volumes.add_wish(tx, work, self._looks.wall())
        self._said("server.revert", server, f"{server} goes back to {request.snapshot}")
        return await self._shown(server)
