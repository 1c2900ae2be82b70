"""The operator API of whole servers' snapshots as a typed client: the same methods as `ServerSnapshots` of
`runtime.controllers`. Sending is `ops.client`'s."""

from nahtlos.model.ids import ServerId, SnapshotId
from nahtlos.ops.network_client import Ask
from nahtlos.runtime.controllers.cloud import ServerView
from nahtlos.runtime.controllers.server_snapshots import (
    ServerRevertRequest,
    ServerSnapshotRequest,
    ServerSnapshotView,
)

PATH = "server-snapshots"


class ServerSnapshotClient:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def server_snapshots(self) -> tuple[ServerSnapshotView, ...]:
        return await self._ask("GET", (PATH,), None, tuple[ServerSnapshotView, ...])

    async def server_snapshot(self, snapshot: SnapshotId) -> ServerSnapshotView:
        return await self._ask("GET", (PATH, snapshot), None, ServerSnapshotView)

    async def create(self, request: ServerSnapshotRequest) -> tuple[SnapshotId, ...]:
        return await self._ask("POST", (PATH,), request, tuple[SnapshotId, ...])

    async def delete(self, snapshot: SnapshotId) -> None:
        await self._ask("DELETE", (PATH, snapshot), None, None)

    async def revert(self, server: ServerId, request: ServerRevertRequest) -> ServerView:
        return await self._ask("POST", ("servers", server, "revert"), request, ServerView)
