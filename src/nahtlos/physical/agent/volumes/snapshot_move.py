"""Snapshots of a volume come to this host from another one, which is to be empty.

    begin -> work: offered there -> fetched here -> the offer ended -> done          given up: undo -> undone

The source only shows what it keeps and goes on keeping it: it is told to let go by its configuration, once
the orchestrator has recorded that the snapshots are here. So they can be read at one place at least, always,
and a crash of anybody costs no more than looking again at how much is here. The volume is not concerned.
"""

import asyncio

import msgspec

from nahtlos.model.errors import Error, Refused, Unavailable
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes.hosts import Hosts
from nahtlos.physical.agent.volumes.single import SingleAct
from nahtlos.physical.ports import SnapshotFetch
from nahtlos.wire.volumes import MoveSnapshotsOrder, VolumeOffer, VolumeOffered, VolumeOfferEnd

OFFER_SECONDS = 60.0
END_SECONDS = 3.0
ASK_AGAIN_SECONDS = 0.25


class SnapshotMove(SingleAct):
    what = "snapshot-move"

    def __init__(self, context: Context, journal: Journal) -> None:
        super().__init__(context, journal)
        assert isinstance(journal.task, MoveSnapshotsOrder), f"{journal.id} moves no snapshots"
        self._order = journal.task
        self.subject = journal.task.volume
        self._fetch = SnapshotFetch(
            operation=self._order.id, volume=self._order.volume, source=self._order.source
        )
        self._speed = int(journal.notes.get("speed", self._order.bytes_per_second))
        self._hosts = Hosts(context, self._order.hosts)
        self._done = 0

    async def run(self, *, recovering: bool) -> Journal:
        try:
            return await super().run(recovering=recovering)
        finally:
            await self._hosts.close()

    def set_speed(self, bytes_per_second: int) -> None:
        """From now on, also after a restart."""
        self._speed = bytes_per_second
        notes = {**self._journal.notes, "speed": str(bytes_per_second)}
        self._journal = self._context.ledger.note(msgspec.structs.replace(self._journal, notes=notes))

    async def work(self) -> None:
        """Interruptions count only where nothing has come since the one before."""
        if self._order.source.host == self._context.settings.host:
            raise Refused(f"{self._order.volume}'s snapshots are here already", field="source")
        while True:
            before = self._done
            try:
                await self._once()
            except Unavailable:
                if self._done <= before:
                    raise
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            else:
                return

    async def _once(self) -> None:
        order, storage = self._order, self._context.drivers.storage
        body = VolumeOffer(id=order.id, volume=order.volume, snapshots=order.snapshots)
        answer = await self._hosts.request(order.source.host, body, VolumeOffered, OFFER_SECONDS)
        await storage.fetch_snapshots(
            self._fetch, answer.offer, speed=lambda: self._speed, on_copied=self.on_copied
        )
        await self._end_offer()

    def on_copied(self, done: int, total: int) -> None:
        self._done = max(self._done, done)
        super().on_copied(done, total)

    async def undo(self) -> None:
        await self._context.drivers.storage.forget_fetched(self._fetch)
        await self._end_offer()

    async def _end_offer(self) -> None:
        """Spares the source an open file; it ends what it offers anyhow when it lets go of the snapshots."""
        body = VolumeOfferEnd(id=self._order.id, volume=self._order.volume)
        try:
            await self._hosts.ask(self._order.source.host, body, END_SECONDS)
        except Error as error:
            self._context.say("volume.snapshot-move", self.subject, f"not ended: {error}", id=self._order.id)
