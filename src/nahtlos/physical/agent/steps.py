"""What operations of one agent have alike: how far they have come, what they wait for, how they end.

Owns the journal of one operation between its records. Never decides what is done next.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from nahtlos.model.errors import Error, ErrorRecord
from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal

AGAIN_SECONDS = 0.25


class Steps:
    """`kind` is the prefix of what it says, `subject` whom it says it of."""

    def __init__(self, context: Context, journal: Journal, *, kind: str, subject: str) -> None:
        self._context = context
        self._journal = journal
        self._kind = kind
        self._subject = subject

    @property
    def journal(self) -> Journal:
        return self._journal

    def mark(self, step: str, *, at: float | None = None) -> None:
        """In memory only: written with the next record, so that nothing is written while packets wait. `at`:
        when it was, if not now."""
        when = self._context.now() if at is None else at
        self._journal = msgspec.structs.replace(
            self._journal, step=step, times={**self._journal.times, step: when}
        )

    def record(self, step: str, *, durable: bool = False) -> None:
        self.mark(step)
        if durable:
            self._journal = self._context.ledger.note(self._journal, step)
        self.say("step", step)
        self._context.changed()

    def adopt(self, journal: Journal) -> None:
        """As the ledger holds it after a write of its own."""
        self._journal = msgspec.structs.replace(journal, times={**self._journal.times, **journal.times})

    def end(self, state: OperationState, error: Error | None = None) -> None:
        self.mark("done")
        self._journal = msgspec.structs.replace(
            self._journal, state=state, error=ErrorRecord.of(error) if error else None
        )
        self._context.ledger.note(self._journal, "end")
        self.say("step", state)
        self._context.changed()

    def say(self, what: str, text: str) -> None:
        self._context.say(f"{self._kind}.{what}", self._subject, text, id=self._journal.id)

    def wait_for(self, what: str) -> None:
        self._context.waits[self._journal.id] = what
        self._context.changed()

    def forget_waits(self) -> None:
        self._context.waits.pop(self._journal.id, None)
        self._context.progress.pop(self._journal.id, None)

    async def until_done(self, what: str, act: Callable[[], Awaitable[None]]) -> None:
        """Repeat an act that must succeed before anything else may happen, and say what is waited for."""
        while True:
            try:
                await act()
            except Exception as error:
                self.wait_for(f"{what} ({self._context.error_of(error).message})")
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                self._context.waits.pop(self._journal.id, None)
                return
