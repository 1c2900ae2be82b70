"""A router's way out goes from one edge host to another: both halves of the operation.

    source        begin -> prepare -> state -> take -> committed (passes on) -> done
                     \\________\\________\\      |
                              undone          only the destination knows: ask it
    destination   begin -> prepared -> done (taken: durable)
                     \\________\\___ abandoned: durable, final

The destination alone decides, by one durable write. Until then it has everything, and nothing leads to it.
From then on both host the way out: the new one answers to the outside, the old one leads out what hosts that
have not converged yet still send there, and what it learns meanwhile follows. Its end is the orchestrator's
word that every host knows (`RouterConfig.settled`). A step that was interrupted is repeated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from enum import StrEnum

import msgspec

from nahtlos.model.config import HostConfig, RouterConfig
from nahtlos.model.errors import Conflict, Error, ErrorRecord, NotFound, Refused, Unavailable
from nahtlos.model.ids import OperationId
from nahtlos.model.inventory import OperationKind, OperationState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Journal, Role
from nahtlos.physical.agent.peers import Peer
from nahtlos.wire.gateways import (
    GatewayAbandon,
    GatewayOrder,
    GatewayOutcome,
    GatewayPrepare,
    GatewayState,
    GatewayTake,
)
from nahtlos.wire.messages import Decision, Done, Message

ForGateway = GatewayPrepare | GatewayState | GatewayTake | GatewayAbandon
ASK_SECONDS = 15.0
ASK_AGAIN_SECONDS = 0.25
PREPARE_SECONDS = 10.0
"""For the destination's networks to be there: it was told of them a moment ago."""
PREPARE_AGAIN_SECONDS = 0.1
SILENCE_SECONDS = 60.0
"""Without a word of the source an untaken gateway is given up."""
CARRY_OVER_SECONDS = 20.0
"""For a destination that does not answer, before it is asked to take anything."""
CARRY_SECONDS = (0.05, 2.0)
"""What the old place learns follows at once after the switch, when hosts still send there, later seldom."""


# --- deciding ----------------------------------------------------------------------------------------


def as_decided(config: HostConfig, journals: Iterable[Journal]) -> HostConfig:
    """`config` with ways out where this host's journals, oldest first, know them to be: later than the
    configuration does. Its epoch says which of the two is later."""
    routers = {r.spec.id: r for r in config.routers}
    for journal in journals:
        order = journal.gateway
        if order is None or journal.decision is not Decision.COMMITTED:
            continue
        held = routers.get(order.id_of_router)
        if held is not None and held.spec.gateway is not None and held.gateway_epoch < order.epoch:
            routers[held.spec.id] = _moved(held, order, passing=journal.role is Role.SOURCE)
    return msgspec.structs.replace(config, routers=tuple(routers.values()))


def _moved(held: RouterConfig, order: GatewayOrder, *, passing: bool) -> RouterConfig:
    """As told by the configuration, but with the way out at the destination of `order`."""
    new = order.router
    assert held.spec.gateway is not None and new.spec.gateway is not None
    gateway = msgspec.structs.replace(held.spec.gateway, host=new.spec.gateway.host)
    return msgspec.structs.replace(
        held,
        spec=msgspec.structs.replace(held.spec, gateway=gateway),
        gateway_vtep=new.gateway_vtep,
        interface=held.interface if passing else new.interface,
        floating_ips=held.floating_ips if passing else new.floating_ips,
        gateway_epoch=new.gateway_epoch,
        passing=passing,
    )


def prepared(config: HostConfig, order: GatewayOrder) -> HostConfig:
    """The destination's configuration as it will be. NotFound while it does not have the router."""
    if all(r.spec.id != order.id_of_router for r in config.routers):
        raise NotFound(f"{config.host} has not been told of {order.id_of_router} yet", field="router")
    routers = (
        _moved(r, order, passing=False) if r.spec.id == order.id_of_router and r.spec.gateway else r
        for r in config.routers
    )
    return msgspec.structs.replace(config, routers=tuple(routers))


class Told(StrEnum):
    """What the source's configuration says of a way out that it has handed over."""

    NOTHING = "nothing"
    """Some host may still send here."""
    SETTLED = "settled"
    """Every host sends to the new place."""
    GONE = "gone"
    """There is no such way out any more, or it has gone further: nobody asks for what is known here."""


def told(config: HostConfig | None, order: GatewayOrder) -> Told:
    if config is None:
        return Told.NOTHING
    router = next((r for r in config.routers if r.spec.id == order.id_of_router), None)
    if router is None or router.spec.gateway is None or router.gateway_epoch > order.epoch:
        return Told.GONE
    if router.gateway_epoch < order.epoch:
        return Told.NOTHING
    return Told.SETTLED if router.settled or not router.passing else Told.NOTHING


# --- source ------------------------------------------------------------------------------------------


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


# --- destination -------------------------------------------------------------------------------------


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


# --- both of one agent -------------------------------------------------------------------------------


class Gateways:
    """The operations of ways out that run at one agent."""

    def __init__(self, context: Context, bring_network: Callable[[], Awaitable[None]]) -> None:
        self._context = context
        self._bring_network = bring_network
        self._running: dict[OperationId, SourceGateway | DestinationGateway] = {}

    def begun(self, order: GatewayOrder) -> Journal:
        """What is to be journaled. Refused if the order is for others."""
        me = self._context.settings.host
        if me not in order.hosts or len(set(order.hosts)) != 2:
            raise Refused(f"the move {' -> '.join(order.hosts)} is not for {me}", field="order")
        role = Role.SOURCE if me == order.source.host else Role.DESTINATION
        return Journal(id=order.id, kind=OperationKind.GATEWAY, role=role, gateway=order)

    async def supersede(self, order: GatewayOrder) -> None:
        """An earlier move to here that was not decided is given up: the orchestrator has done so, too."""
        earlier = self._context.ledger.running_for_router(order.id_of_router)
        if earlier is None or earlier.gateway is None or earlier.role is not Role.DESTINATION:
            return
        if earlier.gateway.epoch < order.epoch:
            running = self._running.get(earlier.id)
            operation = running if isinstance(running, DestinationGateway) else self._destination(earlier)
            await operation.answer(GatewayAbandon(id=earlier.id))

    def run(self, journal: Journal, *, recovering: bool) -> Coroutine[None, None, Journal]:
        if journal.role is Role.SOURCE:
            source = self._running[journal.id] = SourceGateway(self._context, journal)
            return source.run(recovering=recovering)
        destination = self._running[journal.id] = self._destination(journal)
        return destination.run(recovering=recovering)

    def _destination(self, journal: Journal) -> DestinationGateway:
        return DestinationGateway(self._context, journal, self._bring_network)

    def get(self, operation: OperationId) -> SourceGateway | DestinationGateway | None:
        return self._running.get(operation)

    def ended(self, operation: OperationId) -> None:
        self._running.pop(operation, None)

    async def answer(self, body: ForGateway, peer: str) -> Message:
        journal = self._context.ledger.operation(body.id)
        if journal is None or journal.gateway is None or journal.role is not Role.DESTINATION:
            raise NotFound(
                f"{self._context.settings.host} has no order for operation {body.id}",
                field="operation",
                remedy="the orchestrator orders the destination before the source",
            )
        if peer != f"host/{journal.gateway.source.host}":
            raise Refused(f"{peer} is not the source of {body.id}", field="peer")
        operation = self._running.get(body.id)
        if not isinstance(operation, DestinationGateway):
            operation = self._destination(journal)
        return await operation.answer(body)
