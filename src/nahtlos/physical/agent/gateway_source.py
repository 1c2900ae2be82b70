"""The source's half of a way out that moves (see `gateways`)."""

import asyncio

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord, Refused, Unavailable
from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.gateway_decisions import Told, told
from nahtlos.physical.agent.ledger import Journal
from nahtlos.physical.agent.peers import Peer
from nahtlos.wire.gateways import GatewayAbandon, GatewayOutcome, GatewayPrepare, GatewayState, GatewayTake
from nahtlos.wire.messages import Decision

ASK_SECONDS = 15.0
ASK_AGAIN_SECONDS = 0.25
CARRY_OVER_SECONDS = 20.0
"""For a destination that does not answer, before it is asked to take anything."""
CARRY_SECONDS = (0.05, 2.0)
"""What the old place learns follows at once after the switch, when hosts still send there, later seldom."""


class SourceGateway:
    def __init__(self, context: Context, journal: Journal) -> None:
        assert journal.gateway is not None, f"operation {journal.id} is none of a gateway"
        self._context = context
        self._order = journal.gateway
        self._peer = Peer(context, self._order.destination)
        self._cancelled = False
        self.journal = journal

    def cancel(self) -> None:
        """Raises Conflict once the destination was asked to take it."""
        if self.journal.step in ("take", "committed", "done"):
            raise Conflict("the destination has been asked to take it", field="operation")
        self._cancelled = True

    async def run(self, *, recovering: bool) -> Journal:
        try:
            if self.journal.decision is not Decision.COMMITTED:
                await self._hand_over(recovering=recovering)
            if self.journal.running:
                await self._pass_on()
        finally:
            await self._peer.close()
            self._context.waits.pop(self._order.id, None)
        return self.journal

    async def _hand_over(self, *, recovering: bool) -> None:
        if recovering and self.journal.step == "take":
            outcome = await self._resolve(Unavailable("the source's agent was restarted"))
        else:
            try:
                await self._until_carried_over()
                outcome = await self._ask_to_take()
            except Exception as raised:
                error = self._context.error_of(raised)
                if self.journal.step != "take":
                    await self._give_up(error)
                    return
                outcome = await self._resolve(error)
        if outcome.decision is Decision.COMMITTED:
            self.journal = msgspec.structs.replace(self.journal, decision=Decision.COMMITTED)
            self._record("committed")
        else:
            record = outcome.error or ErrorRecord(kind="unavailable", message="the destination gave it up")
            self._end(OperationState.UNDONE, record)

    async def _until_carried_over(self) -> None:
        """Tried for a while: nobody waits for it, and both agents may be restarted meanwhile."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CARRY_OVER_SECONDS
        while True:
            try:
                await self._carry_over()
            except Unavailable as error:
                if loop.time() > until:
                    raise
                self._context.waits[self._order.id] = f"{self._order.destination.host} ({error.message})"
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            else:
                self._context.waits.pop(self._order.id, None)
                return

    async def _carry_over(self) -> None:
        self._check_held()
        self._record("prepare")
        await self._peer.tell(GatewayPrepare(id=self._order.id), ASK_SECONDS)
        self._check_uncancelled()
        self._record("state")
        await self._peer.tell(GatewayState(id=self._order.id, state=await self._state()), ASK_SECONDS)
        self._check_uncancelled()

    async def _ask_to_take(self) -> GatewayOutcome:
        state = await self._state()
        self._record("take")
        return await self._peer.ask(GatewayTake(id=self._order.id, state=state), GatewayOutcome, ASK_SECONDS)

    async def _state(self) -> bytes:
        return await self._context.drivers.network.gateway_state_export(self._order.number)

    def _check_uncancelled(self) -> None:
        if self._cancelled:
            raise Refused("cancelled by an operator", field="operation")

    def _check_held(self) -> None:
        config, order = self._context.ledger.config(), self._order
        router = (
            next((r for r in config.routers if r.spec.id == order.id_of_router), None) if config else None
        )
        gateway = router.spec.gateway if router else None
        here = gateway is not None and gateway.host == self._context.settings.host
        if not here or router is None or router.gateway_epoch >= order.epoch:
            raise Refused(
                f"{self._context.settings.host} does not hold the way out of {order.id_of_router}",
                field="router",
                remedy="plan again from the current inventory",
            )

    async def _give_up(self, error: Error) -> None:
        """The destination was not asked to take it, and never does by itself."""
        try:
            await self._peer.ask(GatewayAbandon(id=self._order.id), GatewayOutcome, 3.0)
        except Exception as unheard:
            why = self._context.error_of(unheard)
            self._say("gateway.undo", f"{self._order.destination.host} not told: {why}")
        self._end(OperationState.UNDONE, ErrorRecord.of(error))

    async def _resolve(self, error: Error) -> GatewayOutcome:
        """The destination may have taken it: asked until it answers. This host leads out meanwhile."""
        said = ""
        while True:
            self._context.waits[self._order.id] = (
                f"{self._order.destination.host} to say whether it has taken the way out ({error.message})"
            )
            try:
                outcome = await self._peer.ask(GatewayAbandon(id=self._order.id), GatewayOutcome, 5.0)
            except Exception as again:
                text = f"{self._order.destination.host}: {self._context.error_of(again)}"
                said = self._context.say_anew("gateway.waits", self._order.id_of_router, text, last=said)
            else:
                if outcome.decision is not Decision.UNDECIDED:
                    self._context.waits.pop(self._order.id, None)
                    return msgspec.structs.replace(outcome, error=outcome.error or ErrorRecord.of(error))
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def _pass_on(self) -> None:
        """Forward only: what this place still learns follows, once more after it was told that nobody sends
        here any more."""
        pause = CARRY_SECONDS[0]
        while True:
            said = told(self._context.ledger.config(), self._order)
            if said is Told.GONE or (await self._carry_on() and said is Told.SETTLED):
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, CARRY_SECONDS[1])
        self._end(OperationState.DONE, None)

    async def _carry_on(self) -> bool:
        """Whether the destination has what is known here now."""
        self._context.waits[self._order.id] = "every host to send to the new place"
        try:
            await self._peer.tell(GatewayState(id=self._order.id, state=await self._state()), ASK_SECONDS)
        except Exception as error:
            why = self._context.error_of(error).message
            self._context.waits[self._order.id] = f"{self._order.destination.host} to hear the rest ({why})"
            return False
        return True

    # --- record ---

    def _record(self, step: str) -> None:
        times = {**self.journal.times, step: self._context.now()}
        self.journal = self._context.ledger.note(
            msgspec.structs.replace(self.journal, step=step, times=times), step
        )
        self._say("gateway.step", step)
        self._context.changed()

    def _end(self, state: OperationState, error: ErrorRecord | None) -> None:
        self.journal = msgspec.structs.replace(self.journal, state=state, error=error)
        self._record("done")

    def _say(self, kind: str, text: str) -> None:
        self._context.say(kind, self._order.id_of_router, text, id=self._order.id)
