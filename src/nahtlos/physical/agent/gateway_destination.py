"""The destination's half of a way out that moves (see `gateways`)."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from nahtlos.model.errors import Conflict, Error, ErrorRecord, NotFound, Unavailable
from nahtlos.model.inventory import OperationState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.gateway_decisions import ForGateway, prepared
from nahtlos.physical.agent.gateway_source import ASK_AGAIN_SECONDS
from nahtlos.physical.agent.ledger import Journal
from nahtlos.wire.gateways import GatewayAbandon, GatewayOutcome, GatewayPrepare, GatewayState, GatewayTake
from nahtlos.wire.messages import Decision, Done, Message

PREPARE_SECONDS = 10.0
"""For the destination's networks to be there: it was told of them a moment ago."""
PREPARE_AGAIN_SECONDS = 0.1
SILENCE_SECONDS = 60.0
"""Without a word of the source an untaken gateway is given up."""


class DestinationGateway:
    """`bring_network` makes the host's network as its configuration and its journals want it, now."""

    def __init__(
        self, context: Context, journal: Journal, bring_network: Callable[[], Awaitable[None]]
    ) -> None:
        assert journal.gateway is not None, f"operation {journal.id} is none of a gateway"
        self._context = context
        self._bring_network = bring_network
        self._order = journal.gateway
        self._lock = asyncio.Lock()
        self._heard = asyncio.Event()

    @property
    def journal(self) -> Journal:
        journal = self._context.ledger.operation(self._order.id)
        assert journal is not None, f"the ledger lost operation {self._order.id}"
        return journal

    def cancel(self) -> None:
        raise Conflict("the source of a way out cancels its move", field="operation")

    async def run(self, *, recovering: bool) -> Journal:
        """Until it is decided and carried out here. An earlier process may have abandoned it, and died."""
        if recovering and self.journal.decision is Decision.ABANDONED:
            await self._clear_away()
        while self.journal.running:
            self._heard.clear()
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    await self._heard.wait()
            except TimeoutError:
                await self._abandon(
                    Unavailable(f"{self._order.source.host} was silent for {SILENCE_SECONDS:g} s")
                )
        return self.journal

    async def answer(self, body: ForGateway) -> Message:
        try:
            async with self._lock:
                return await self._answer(body)
        finally:
            self._heard.set()

    async def _answer(self, body: ForGateway) -> Message:
        network = self._context.drivers.network
        match body:
            case GatewayPrepare():
                await self._prepare()
                return Done()
            case GatewayState():
                if self.journal.decision is Decision.ABANDONED:
                    raise Conflict(f"operation {body.id} was abandoned", field="operation")
                await network.gateway_state_import(self._order.number, body.state)
                return Done()
            case GatewayTake():
                return await self._take(body)
            case GatewayAbandon():
                await self._abandon(Unavailable(f"given up by {self._order.source.host}"))
                return self._outcome()

    async def _prepare(self) -> None:
        if self.journal.decision is not Decision.UNDECIDED:
            raise Conflict(f"operation {self._order.id} is {self.journal.decision}", field="operation")
        try:
            async with asyncio.timeout(PREPARE_SECONDS):
                while not await self._prepare_once():
                    await asyncio.sleep(PREPARE_AGAIN_SECONDS)
        except TimeoutError:
            raise Unavailable(
                f"{self._context.settings.host} did not get the networks of {self._order.id_of_router} ready"
            ) from None
        if self.journal.step != "prepared":
            self._note("prepared")

    async def _prepare_once(self) -> bool:
        """False while its networks are still on their way."""
        config = self._context.ledger.config()
        if config is None:
            return False
        try:
            async with self._context.paths:
                await self._context.drivers.network.gateway_prepare(
                    prepared(config, self._order), self._order.id_of_router
                )
        except (NotFound, Unavailable) as error:
            self._context.waits[self._order.id] = error.message
            return False
        self._context.waits.pop(self._order.id, None)
        return True

    async def _take(self, body: GatewayTake) -> GatewayOutcome:
        if self.journal.decision is Decision.UNDECIDED:
            if self.journal.step != "prepared":
                await self._prepare()  # it was told to an earlier process that did not write it down
            await self._context.drivers.network.gateway_state_import(self._order.number, body.state)
            self._context.ledger.take_gateway(self._order.id, self._context.now())
            self._context.say(
                "gateway.step", self._order.id_of_router, "is led out here now", id=self._order.id
            )
        if self.journal.decision is Decision.COMMITTED:
            await self._lead_out()
        return self._outcome()

    async def _lead_out(self) -> None:
        """What fails is put right by convergence, which goes by the same journal."""
        try:
            await self._bring_network()
        except Exception as error:
            why = str(self._context.error_of(error))
            self._context.say("gateway.waits", self._order.id_of_router, why, id=self._order.id)
        self._context.changed()

    def _outcome(self) -> GatewayOutcome:
        journal = self.journal
        return GatewayOutcome(id=journal.id, decision=journal.decision, error=journal.error)

    async def _abandon(self, error: Error) -> None:
        before = self.journal.decision
        journal = self._context.ledger.abandon(self._order.id, ErrorRecord.of(error))
        if before is Decision.UNDECIDED and journal.decision is Decision.ABANDONED:
            self._context.say("gateway.abandoned", self._order.id_of_router, str(error), id=self._order.id)
        if journal.decision is Decision.ABANDONED and journal.running:
            await self._clear_away()

    async def _clear_away(self) -> None:
        while True:
            try:
                await self._context.drivers.network.gateway_abandon(self._order.number)
            except Exception as error:
                self._context.waits[self._order.id] = self._context.error_of(error).message
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            else:
                break
        self._context.waits.pop(self._order.id, None)
        self._note("done", state=OperationState.UNDONE)

    def _note(self, step: str, *, state: OperationState = OperationState.RUNNING) -> None:
        journal = self.journal
        times = {**journal.times, step: self._context.now()}
        self._context.ledger.note(msgspec.structs.replace(journal, step=step, state=state, times=times), step)
        self._context.changed()
