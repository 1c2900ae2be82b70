"""Tells one agent its orders over one connection. Thin: what to say is decided in `decide`.

Owns the memory of what was accepted on this connection, and nothing else: a new connection starts with
none, and everything is said again. Never retries by itself: whoever posts does so again and again.
"""

import asyncio
from collections.abc import Awaitable, Callable

from nahtlos.model.errors import Error, ErrorRecord, Refused, Stale
from nahtlos.model.ids import OperationId
from nahtlos.runtime.executor.decide import Begin, HostOrders
from nahtlos.wire.messages import Acknowledge, BeginVerify, CancelOperation, Configure
from nahtlos.wire.session import Session
from nahtlos.wire.volumes import SetCopySpeed

COMMAND_TIMEOUT = 10.0
"""Seconds within which an agent must accept an order; it carries it out in its own time."""
REPORTS_UNTIL_AGAIN = 3
"""An order accepted, but still missing in that many reports since, was lost: it is given again."""

OnRefused = Callable[[OperationId, ErrorRecord], Awaitable[None]]
OnTrouble = Callable[[Error], None]


class Outbox:
    """`on_refused`: the agent will not begin an operation. `on_accepted`: it has begun one. `on_trouble`:
    anything else that went wrong; Stale among it means that another orchestrator leads."""

    def __init__(
        self,
        session: Session,
        *,
        on_refused: OnRefused,
        on_accepted: Callable[[], None],
        on_trouble: OnTrouble,
    ) -> None:
        self._session = session
        self._on_refused = on_refused
        self._on_accepted = on_accepted
        self._on_trouble = on_trouble
        self._orders: HostOrders | None = None
        self._posted = asyncio.Event()
        self._generation = 0
        self._begun: dict[OperationId, int] = {}
        self._cancelled: set[OperationId] = set()
        self._speeds: dict[OperationId, int] = {}
        self._reports = 0

    def post(self, orders: HostOrders) -> None:
        """Replaces what was posted before; it was decided on older knowledge."""
        self._orders = orders
        self._posted.set()

    def reported(self) -> None:
        """The agent has sent a report."""
        self._reports += 1

    async def run(self) -> None:
        while True:
            await self._posted.wait()
            self._posted.clear()
            orders, self._orders = self._orders, None
            if orders is None:
                continue
            try:
                await self._tell(orders)
            except Error as error:
                self._on_trouble(error)

    async def _tell(self, orders: HostOrders) -> None:
        if orders.config.generation > self._generation:
            await self._session.request(Configure(config=orders.config), timeout=COMMAND_TIMEOUT)
            self._generation = orders.config.generation
        for order in orders.begin:
            await self._begin(order)
        for operation in orders.cancel:
            await self._cancel(operation)
        for speed in orders.speeds:
            await self._pace(speed)
        if orders.acknowledge:
            await self._session.request(Acknowledge(ids=orders.acknowledge), timeout=COMMAND_TIMEOUT)

    async def _cancel(self, operation: OperationId) -> None:
        """Once on this connection. Conflict: it is past its point of no return and goes on to its end."""
        if operation in self._cancelled:
            return
        try:
            await self._session.request(CancelOperation(id=operation), timeout=COMMAND_TIMEOUT)
        except Stale:
            raise
        except Refused:
            pass
        self._cancelled.add(operation)

    async def _pace(self, speed: SetCopySpeed) -> None:
        """Once on this connection, and whenever it changes. Refused: it does not copy (any more)."""
        if self._speeds.get(speed.id) == speed.bytes_per_second:
            return
        try:
            await self._session.request(speed, timeout=COMMAND_TIMEOUT)
        except Stale:
            raise
        except Refused:
            pass
        self._speeds[speed.id] = speed.bytes_per_second

    async def _begin(self, order: Begin) -> None:
        operation = order.id if isinstance(order, BeginVerify) else order.order.id
        told_at = self._begun.get(operation)
        if told_at is not None and self._reports < told_at + REPORTS_UNTIL_AGAIN:
            return
        try:
            await self._session.request(order, timeout=COMMAND_TIMEOUT)
        except Stale:
            raise
        except Refused as error:
            await self._on_refused(operation, ErrorRecord.of(error))
        else:
            self._begun[operation] = self._reports
            self._on_accepted()
