"""An operation of a volume that is one long act of this host's storage: repeated after a restart, undone by
one further act.

    begin -> work -> done            cancelled, refused, or tried in vain: undo -> undone

Owns the journal of one such operation. What the act does, and what undoes it, is its subclass's.
"""

import asyncio

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord, Refused, Unavailable
from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal

AGAIN_SECONDS = 1.0
ATTEMPTS = 10
"""What was not available is tried again so often."""


class SingleAct:
    """`work` is called again after a crash and after Unavailable; `undo` until it succeeds."""

    subject = ""
    """Of what it says."""
    what = "operation"

    def __init__(self, context: Context, journal: Journal) -> None:
        self._context = context
        self._journal = journal
        self._cancelled = False
        self._working: asyncio.Task[Exception | None] | None = None
        self._settled = False

    @property
    def journal(self) -> Journal:
        return self._journal

    def cancel(self) -> None:
        if self._settled:
            raise Conflict(f"the {self.what} is done already", field="operation")
        self._cancelled = True
        if self._working is not None:
            self._working.cancel()

    async def run(self, *, recovering: bool) -> Journal:
        try:
            await self._carry_out()
        finally:
            self._context.waits.pop(self._journal.id, None)
            self._context.progress.pop(self._journal.id, None)
        return self._journal

    # --- of the subclass -----------------------------------------------------------------------------

    async def work(self) -> None:
        raise NotImplementedError

    async def undo(self) -> None:
        raise NotImplementedError

    def on_copied(self, done: int, total: int) -> None:
        """Called in a thread: only a number is put where reports find it."""
        self._context.progress[self._journal.id] = done / total if total else 0.0

    def tell(self, name: str, text: str) -> None:
        """Part of what the operation's end says."""
        notes = {**self._journal.notes, f"result.{name}": text}
        self._journal = msgspec.structs.replace(self._journal, notes=notes)

    # --- steps ---------------------------------------------------------------------------------------

    async def _carry_out(self) -> None:
        if self._journal.step != "undo":
            error = await self._worked()
            if error is None:
                self._settled = True
                self._end(OperationState.DONE, None)
                return
            self._journal = msgspec.structs.replace(self._journal, error=ErrorRecord.of(error))
            self._record("undo")
        await self._undone()
        error = self._journal.error.raised() if self._journal.error else None
        self._end(OperationState.UNDONE, error)

    async def _worked(self) -> Error | None:
        """Why it is given up, if it is."""
        self._record("work")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._attempt()
            except Unavailable as error:
                if attempt == ATTEMPTS:
                    return error
                self._context.waits[self._journal.id] = f"to try it again ({error.message})"
                await asyncio.sleep(AGAIN_SECONDS)
            except Exception as error:
                return self._context.error_of(error)
            else:
                return None
        return Unavailable(f"the {self.what} was tried {ATTEMPTS} times in vain")

    async def _attempt(self) -> None:
        """One call of `work`; Refused if an operator has cancelled it meanwhile."""
        stopped = Refused("cancelled by an operator", field="operation")
        if self._cancelled:
            raise stopped
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(self._guarded())
            self._working = working
            await asyncio.wait((working,))
            self._working = None
        if working.cancelled():
            raise stopped
        if error := working.result():
            raise error
        self._context.waits.pop(self._journal.id, None)

    async def _guarded(self) -> Exception | None:
        """Errors as values: a task group would bundle them."""
        try:
            await self.work()
        except Exception as error:
            return error
        return None

    async def _undone(self) -> None:
        while True:
            try:
                await self.undo()
            except Exception as error:
                why = self._context.error_of(error)
                self._context.waits[self._journal.id] = f"to be taken back ({why.message})"
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                return

    def _record(self, step: str) -> None:
        times = {**self._journal.times, step: self._context.now()}
        self._journal = self._context.ledger.note(
            msgspec.structs.replace(self._journal, step=step, times=times), step
        )
        self._context.say(f"volume.{self.what}", self.subject, step, id=self._journal.id)
        self._context.changed()

    def _end(self, state: OperationState, error: Error | None) -> None:
        times = {**self._journal.times, "done": self._context.now()}
        record = ErrorRecord.of(error) if error else None
        self._journal = msgspec.structs.replace(
            self._journal, state=state, step="done", error=record, times=times
        )
        self._context.ledger.note(self._journal, "end")
        self._context.say(f"volume.{self.what}", self.subject, state, id=self._journal.id)
        self._context.changed()
