"""A server's VMM is replaced by one of another release while the server stays on its host.

    begin -> prepare -> switch -> stopped -> committed -> done
      |         |          |         |           forward only
      `---------+----------'         `-- did all of it arrive?  yes -> committed
        undo: it was never stopped       no -> abandoned (durable), then the old VMM goes on

The memory is shared, not sent: both VMMs map one file, and only one of them runs at any time. So the rule
is sharper than that of a move: **once the new VMM was told to run, the old one never is again**, because
what it remembers of the guest's devices no longer fits the memory. `Ledger.take_over` is written before the
new VMM is told; `abandoned` before the old one is resumed.

The frames' path changes before the stop, as in a move: the running guest empties its own queues, later
frames wait in those of the next VMM.
"""

import asyncio

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord, Refused, Unavailable
from nahtlos.model.inventory import OperationState, RunState
from nahtlos.physical.agent.consoles import serial
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.giving import with_vcpus
from nahtlos.physical.agent.hearing import ANSWERED, first_heard
from nahtlos.physical.agent.ledger import Hold, Journal
from nahtlos.physical.agent.steps import Steps
from nahtlos.physical.agent.switch_turn import take_turn
from nahtlos.physical.agent.volumes.freeze import check_paths
from nahtlos.physical.ports import VmmId, VmmStatus
from nahtlos.wire.messages import Decision

DRAIN_SECONDS = 0.5
ARRIVE_SECONDS = 10.0
KILL_AFTER_SECONDS = 0.3
"""The old VMM's end takes CPU time from the guest that was just resumed."""


class Replacement(Steps):
    """`run` may be called again after a restart of the agent."""

    def __init__(self, context: Context, journal: Journal) -> None:
        assert journal.replace is not None, f"operation {journal.id} replaces no VMM"
        self._order = order = journal.replace
        super().__init__(context, journal, kind="replace", subject=order.server.spec.id)
        self._old = VmmId(order.server.spec.id, order.server.epoch)
        self._new = VmmId(order.server.spec.id, order.epoch)
        self._pause_asked = False
        self._cancelled = False

    def cancel(self) -> None:
        """Raises Conflict once the path is being switched."""
        if self._pause_asked or self.journal.step not in ("begin", "prepare"):
            raise Conflict("the replacement is past the point where it can be undone", field="operation")
        self._cancelled = True

    async def run(self, *, recovering: bool) -> Journal:
        try:
            await (self._recover() if recovering else self._carry_out())
        finally:
            self.forget_waits()
        return self.journal

    # --- forward -------------------------------------------------------------------------------------

    async def _carry_out(self) -> None:
        try:
            await self._prepare()
            await self._hand_over()
        except Exception as error:
            await self._fail(self._context.error_of(error))
            return
        await self._finish()

    async def _prepare(self) -> None:
        drivers, order = self._context.drivers, self._order
        self._check_owned()
        self.record("prepare", durable=True)
        await self._context.pass_paths()
        for port in order.ports:
            await drivers.network.replace_prepare(port)
        await self._context.pass_plugging()
        old = await self._observed(self._old)
        server = with_vcpus(order.server, old.compute.vcpus if old else 0)
        await drivers.hypervisor.incoming_start(server, order.epoch, order.release, in_place=True)
        await drivers.hypervisor.incoming_listen(self._new, self._context.settings.address)
        for port in order.ports:
            if not await drivers.network.replace_join(port):
                raise Unavailable(f"the waiting VMM did not take the sacrificial frame at {port.id}")

    def _check_owned(self) -> None:
        held = self._context.ledger.owner(self._old.server)
        if held is None or held.hold is not Hold.OWNED or held.epoch != self._old.epoch:
            raise Refused(
                f"{self._context.settings.host} does not own {self._old.server} by epoch {self._old.epoch}",
                field="server",
                remedy="plan again from the current inventory",
            )
        if held.server.spec.power != self._order.server.spec.power:
            raise Refused(f"{self._old.server} is to be stopped or booted anew first", field="server")
        check_paths(self._order.server, held.server.all_volumes)

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise Refused("cancelled by an operator", field="operation")

    async def _hand_over(self) -> None:
        await take_turn(self._context, self._order.id, lambda: self._cancelled)
        self._check_cancelled()
        self._context.switches(self._order.id)
        try:
            await self._switch_and_stop()
        finally:
            self._context.switched(self._order.id)

    async def _switch_and_stop(self) -> None:
        """What is done here is paid for in blackout, but for the first two acts."""
        network, hypervisor = self._context.drivers.network, self._context.drivers.hypervisor
        self._check_owned()
        self.mark("switch")
        for port in self._order.ports:
            await network.replace_switch(port)
        for port in self._order.ports:
            if not await network.replace_leave(port, timeout=DRAIN_SECONDS):
                raise Unavailable(f"the guest did not take the frames waiting at {port.id}")
        self._pause_asked = True
        await hypervisor.pause(self._old)
        self.mark("stopped")
        await hypervisor.replace_send(self._old, self._new)
        await hypervisor.incoming_wait(self._new, timeout=ARRIVE_SECONDS)
        self.mark("arrived")
        self._commit()
        await hypervisor.resume(self._new)
        self.mark("running")

    def _commit(self) -> None:
        self.adopt(self._context.ledger.take_over(self.journal, self._context.now()))

    # --- the end -------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Forward only: the new VMM is the server's."""
        await self.until_done("the new VMM to run the server", self._make_run)
        self._context.switched(self._order.id)
        self._context.changed()
        await self._listen()
        await self.until_done("the old VMM to end", self._kill_old)
        self.end(OperationState.DONE)

    async def _listen(self) -> None:
        """Until the old VMM may end."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if "running" in self.journal.times:
            frames = self._context.frames_of(self._order.ports)
            heard = await first_heard(frames, self._context.now, announced=False)
            if heard is not None:
                self.mark(ANSWERED, at=heard)
        await asyncio.sleep(max(0.0, began + KILL_AFTER_SECONDS - loop.time()))

    async def _make_run(self) -> None:
        """A VMM that died meanwhile is left to convergence, which starts the server again. Nothing is asked
        if this process told it to run: its guest needs the CPUs now."""
        if "running" in self.journal.times:
            return
        vmm = await self._observed(self._new)
        if vmm is None or vmm.state is RunState.CRASHED or vmm.state is RunState.RUNNING:
            return
        await self._context.drivers.hypervisor.resume(self._new)
        self.mark("running")

    async def _kill_old(self) -> None:
        await self._context.drivers.hypervisor.kill(self._old)
        for port in self._order.ports:
            await self._context.drivers.network.replace_settle(port)
        await serial.replaced(self._context, self._old, self._new)

    # --- when something failed -----------------------------------------------------------------------

    async def _fail(self, error: Error) -> None:
        self.say("failed", str(error))
        if self.journal.decision is Decision.COMMITTED:
            await self._finish()
        else:
            await self._undo(error)

    async def _recover(self) -> None:
        """The agent was restarted in the middle."""
        if self.journal.decision is Decision.COMMITTED:
            await self._finish()
            return
        error = Unavailable("the agent was restarted during the replacement")
        if self.journal.decision is Decision.UNDECIDED and await self._arrived():
            self._commit()
            await self._finish()
        else:
            await self._undo(error)

    async def _arrived(self) -> bool:
        """Everything was received: the old VMM was stopped for good; going on is as right as going back."""
        found: list[VmmStatus | None] = []

        async def look() -> None:
            found.append(await self._observed(self._new))

        await self.until_done("the hypervisor to say what runs", look)
        new = found[-1]
        return new is not None and new.migrated and new.state is RunState.PAUSED

    async def _undo(self, error: Error) -> None:
        """The server goes on in the old VMM. The new one is ended before anything else: of the two that share
        its memory only one may ever run again."""
        self._abandon(error)
        await self.until_done("the new VMM to end", self._kill_new)
        await self.until_done("the frames to come to the old VMM again", self._revert)
        await self.until_done("the old VMM to go on", self._go_on)
        self.end(OperationState.UNDONE, error)

    def _abandon(self, error: Error) -> None:
        if self.journal.decision is Decision.UNDECIDED:
            abandoned = msgspec.structs.replace(
                self.journal, decision=Decision.ABANDONED, error=ErrorRecord.of(error)
            )
            self.adopt(self._context.ledger.note(abandoned, "abandon"))

    async def _kill_new(self) -> None:
        await self._context.drivers.hypervisor.kill(self._new)
        await self._context.drivers.hypervisor.console_forget(self._new)

    async def _revert(self) -> None:
        for port in self._order.ports:
            await self._context.drivers.network.replace_revert(port)

    async def _go_on(self) -> None:
        """A VMM that died meanwhile is left to convergence."""
        vmm = await self._observed(self._old)
        if vmm is None or vmm.state is RunState.CRASHED:
            return
        await self._context.drivers.hypervisor.migrate_cancel(self._old)
        if vmm.state is not RunState.RUNNING or vmm.sent:
            await self._context.drivers.hypervisor.resume(self._old)

    async def _observed(self, vmm: VmmId) -> VmmStatus | None:
        vmms = await self._context.drivers.hypervisor.observe()
        return next((v for v in vmms if v.id == vmm), None)
