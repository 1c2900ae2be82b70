"""A volume that no server has becomes again what a snapshot of it holds.

One act of the storage, atomic there and repeatable: what a crash leaves is finished by doing it again, so
there is nothing to undo. Refused by the storage while a client has the volume open.
"""

from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.volumes.single import SingleAct
from nahtlos.wire.volumes import RevertOrder


class Revert(SingleAct):
    what = "revert"

    def __init__(self, context: Context, journal: Journal) -> None:
        super().__init__(context, journal)
        assert isinstance(journal.task, RevertOrder), f"{journal.id} reverts nothing"
        self._order = journal.task
        self.subject = journal.task.volume.id

    async def work(self) -> None:
        await self._context.drivers.storage.revert(self._order.volume, self._order.snapshot)

    async def undo(self) -> None:
        """It was done whole or not at all."""
