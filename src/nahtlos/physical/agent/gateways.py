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

from collections.abc import Awaitable, Callable, Coroutine

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import OperationId
from nahtlos.model.inventory import OperationKind
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.gateway_decisions import ForGateway
from nahtlos.physical.agent.gateway_destination import DestinationGateway
from nahtlos.physical.agent.gateway_source import SourceGateway
from nahtlos.physical.agent.ledger import Journal, Role
from nahtlos.wire.gateways import GatewayAbandon, GatewayOrder
from nahtlos.wire.messages import Message


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
