"""The guests of an operation, frozen before the moment its snapshots are of, and thawed after it.

Where the order prefers consistent file systems, a guest that cannot is said so and passed over; where it asks
for nothing less, the first one that cannot is why nothing is taken.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager

from nahtlos.model.errors import Conflict, Error, Unavailable
from nahtlos.model.ids import HostId, ServerId, VolumeId
from nahtlos.model.storage import Consistency
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.guests.asking import FREEZE_SECONDS, THAW_SECONDS
from nahtlos.physical.agent.volumes.hosts import Hosts
from nahtlos.wire.volumes import BackupOrder, GuestFreeze, GuestThaw, SnapshotOrder, VolumeClient

FILESYSTEM = "result.filesystem"
"""Note, and result: snapshots, or the backup, for which the guests had frozen their file systems."""
ANSWER_SECONDS = 3.0
"""Beyond what the guest is given."""


class FrozenGuests:
    """`consistent` afterwards: volumes all of whose servers had their file systems frozen all the while."""

    def __init__(self, context: Context, hosts: Hosts, order: SnapshotOrder | BackupOrder) -> None:
        self._context = context
        self._hosts = hosts
        self._order = order
        self.consistent: frozenset[VolumeId] = frozenset()

    @asynccontextmanager
    async def frozen(self) -> AsyncGenerator[None]:
        """Every guest that was told to freeze is told to thaw, whatever happens in between."""
        if self._order.consistency is Consistency.CRASH:
            yield
            return
        self.consistent = frozenset()
        self._check_all_have_a_guest()
        places: dict[ServerId, HostId] = {}
        failed: dict[ServerId, Error] = {}
        try:
            await self._side_by_side(self._freeze(client, places, failed) for client in self._order.clients)
            self._check(failed)
            yield
        finally:
            await self._side_by_side(self._thaw(*each, failed) for each in tuple(places.items()))
        self._check(failed)
        for server, error in failed.items():
            self._context.say("guest.not-frozen", server, str(error), id=self._order.id)
        self.consistent = self._held(failed)

    def _check_all_have_a_guest(self) -> None:
        if self._order.consistency is not Consistency.FILESYSTEM:
            return
        reached = {each.volume for client in self._order.clients for each in client.attachments}
        alone = sorted(set(self._order.volumes) - reached)
        if alone:
            raise Unavailable(
                f"{', '.join(alone)} is attached to no server that runs: there is no file system to freeze",
                field="consistency",
            )

    def _held(self, failed: dict[ServerId, Error]) -> frozenset[VolumeId]:
        return frozenset(
            each.volume
            for client in self._order.clients
            if client.server not in failed
            for each in client.attachments
        )

    def _check(self, failed: dict[ServerId, Error]) -> None:
        if self._order.consistency is Consistency.FILESYSTEM:
            for error in failed.values():
                raise error

    async def _side_by_side(self, asked: Iterable[object]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for each in asked:
                assert asyncio.iscoroutine(each)
                tasks.create_task(each)

    async def _freeze(
        self, client: VolumeClient, places: dict[ServerId, HostId], failed: dict[ServerId, Error]
    ) -> None:
        """Where it was frozen: there, or wherever it has moved to meanwhile."""
        server, expected = client.server, client.at.host
        body = GuestFreeze(
            id=self._order.id, server=server, epoch=client.epoch, seconds=self._order.freeze_seconds
        )
        why: Error = Unavailable(f"no host says that it owns {server}", field="server")
        for host in (expected, *(each for each in self._hosts.all if each != expected)):
            places[server] = host  # it may be frozen also if that is not said in time
            try:
                await self._hosts.ask(host, body, min(FREEZE_SECONDS, body.seconds) + ANSWER_SECONDS)
            except Exception as raised:
                why = self._context.error_of(raised)
                if not (isinstance(why, Conflict) and why.field == "server"):
                    break
            else:
                return
        failed[server] = why

    async def _thaw(self, server: ServerId, host: HostId, failed: dict[ServerId, Error]) -> None:
        body = GuestThaw(id=self._order.id, server=server)
        try:
            await self._hosts.ask(host, body, 2 * THAW_SECONDS + ANSWER_SECONDS)
        except Exception as error:
            failed.setdefault(server, self._context.error_of(error))
